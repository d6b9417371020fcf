"""The driver for one machine: a process for each shard, each worker and the coordinator, any of which may be killed.

    server = ProcessServer(model, AdamWRule(), shards=2, workers=2, microbatches=4)
    for done in server.run(train, clocks=1000):       # train(client): see client.py
        print(done.clock, done.mean_loss)

The process that calls run() is the supervisor: it bears the others, brings back whatever dies by a signal, and asks for
the clocks. Messages go through Unix-domain sockets as frames (wire.py) under a secret that is drawn for each run; logs
and snapshots are files (files.py) in a folder of the run's own. In BSP the bits are those of the other drivers and of
plain training, whatever is killed and whenever; at the end nothing is left behind, neither processes nor files.

durability: what a shard that dies comes back with, as in the simulator. "snapshot": nothing; all go back to their last
            snapshot and compute again what came after (BSP only, and there the default); "log": all it was told
start:      "fork" or "spawn"; with "spawn" the rule, the hyper-parameters and the program must be importable
folder:     where the run's own folder is made; by default where the system keeps temporary files

A program must bear being run again from its beginning: when its process has died, that is what happens, in a new one.
An exception in it, or in any machine, ends the run and is raised in the caller, as WorkFailed, with its text. Ctrl-C
ends it at the end of the running clock, a second one at once. When the supervisor itself is killed, its children see
that, clear up and die.
"""

from __future__ import annotations

import atexit
import multiprocessing
import secrets
import shutil
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.backend import get_num_threads
from engine.sharder.client import Program
from engine.sharder.cluster import Cluster
from engine.sharder.drivers.child import (
    RUN,
    Failed,
    Inspect,
    Order,
    Patience,
    Recipe,
    Returned,
    Standing,
    Stop,
    live,
)
from engine.sharder.drivers.files import Library, join
from engine.sharder.drivers.frozen import Frozen
from engine.sharder.drivers.post import Post
from engine.sharder.events import COORDINATOR, Address, Committed, Finish, Proceed, shard_address, worker_address
from engine.sharder.memory import Checkpoint
from engine.sharder.wire import Hello, arithmetic

DURABILITIES = ("snapshot", "log")
DEATHS = 100  # in one clock, after which it is no accident
LAST_WORDS = 0.1  # seconds to wait for what an ended process has said
GRACE = 5.0  # seconds for a program to clean up when the run is ended
STANDING = 10.0  # seconds to wait for the state of a run that failed


class WorkFailed(RuntimeError):
    """An exception in another process: its type and text, and where it was raised."""


class ProcessServer(Cluster):
    """A parameter server in processes of its own; the arguments are Cluster's, and those above."""

    shared = False

    def __init__(self, parameters: Any, rule: Any, *, durability: str | None = None, save_every: int = 10,
                 start: str = "fork", folder: str | Path | None = None, hyper: Any = None,
                 compress: str | None = None, **arguments: Any):
        if compress is not None:
            raise ValueError(f"ProcessServer: compress is {compress!r}, and what a codec has left to say would be lost "
                             "with a worker's process; expected None")
        super().__init__(parameters, rule, save_every=save_every, hyper=hyper, **arguments)
        replays = self.setup.consistency.replays
        self.durability = durability or ("snapshot" if replays else "log")
        if self.durability not in DURABILITIES or (self.durability == "snapshot" and not replays):
            raise ValueError(f"ProcessServer: durability is {durability!r}, expected "
                             f"{' or '.join(DURABILITIES) if replays else 'log, the only one with this consistency'}")
        if start not in ("fork", "spawn"):
            raise ValueError(f"ProcessServer: start is {start!r}, expected fork or spawn")
        self.context: Any = multiprocessing.get_context(start)
        self.folder = folder
        known = {field.name: getattr(self.setup, field.name) for field in fields(self.setup)
                 if field.name not in ("k", "hyper", "_partitions")}
        self.recipe = Recipe(known, self.device, hyper)
        self._team: _Team | None = None
        self._stale = False  # whether the shards are ahead of what this process has

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def clock(self) -> int:
        return self._team.clock if self._team else super().clock

    def checkpoint(self) -> Checkpoint:
        self._fetch()
        return super().checkpoint()

    def parameters(self) -> dict[str, Any]:
        self._fetch()
        return super().parameters()

    def _fetch(self, seconds: float = float("inf")) -> None:
        """Bring the state of the shards here, if they are ahead."""
        if self.busy:
            raise RuntimeError("parameters: a clock is running; ask between two clocks, in the loop over run()")
        if self._team and self._stale:
            parts = self._team.standing(seconds)
            self._stale = False
            self._team.clock = parts[0].clock
            self._place(join(self.setup, parts))

    # ── running ─────────────────────────────────────────────────────────────────────────────────────

    def processes(self) -> dict[Address, int]:
        """The process numbers of the machines that run now."""
        return self._team.pids() if self._team else {}

    def run(self, program: Program, clocks: int | None = None, stride: int = 1) -> Iterator[Committed]:
        """Train, as ParameterServer.run does, with program(client) in a process for each worker."""
        origin = self.checkpoint()
        coordinator, _, workers = self.start(clocks)
        try:
            self._team = team = _Team(self, program, origin, coordinator.last, workers[0].epoch)
            atexit.register(team.stop)  # for a caller that ends without leaving the loop
            try:
                team.bear_all()
                yield from self._clocks(team, coordinator.last, stride)
            finally:
                try:
                    self._settle()
                finally:
                    team.stop()
                    atexit.unregister(team.stop)
        finally:
            self._team = None
            self.active = self.busy = self._stale = False

    def _clocks(self, team: _Team, last: int | None, stride: int) -> Iterator[Committed]:
        try:
            while last is None or team.clock < last:
                if team.clock == team.granted:
                    team.heed_interrupt()
                    team.grant(team.clock + stride if last is None else min(team.clock + stride, last))
                yield self._next_clock(team)
            team.heed_interrupt()
            self._fetch()
            team.finish()
            team.heed_interrupt()
        except GeneratorExit:
            while team.clock < team.granted and not team.over:
                self._next_clock(team)
            raise

    def _next_clock(self, team: _Team) -> Committed:
        self.busy = self._stale = True
        committed = team.next_clock()
        self.busy = team.clock < team.granted
        return committed

    def _settle(self) -> None:
        """Have the state that a run ends with. If it cannot be had, whatever asks for it later says so."""
        self.busy = False
        try:
            self._fetch(STANDING)
        except BaseException as error:
            for memory in self.memories:
                memory.torn = True
            if not isinstance(error, (TimeoutError, WorkFailed)):
                raise


class _Team:
    """The processes of one run."""

    def __init__(self, server: ProcessServer, program: Program, origin: Checkpoint, last: int | None, epoch: int):
        self.server, self.program, self.last, self.epoch = server, program, last, epoch
        self.clock = self.granted = self.heard = origin.clock  # yielded; may be applied; committed
        self.interrupted = self.finishing = self.failed = self.over = False
        self.secret = secrets.token_bytes(32)
        self.children: dict[Address, Any] = {}
        self.incarnations: Counter[Address] = Counter()
        self.deaths: Counter[Address] = Counter()  # in this clock
        self.ended: dict[Address, float] = {}  # when each was seen to have ended by itself
        self.returned: set[int] = set()
        self.news: deque[Committed] = deque()
        self.parts: dict[int, Frozen] = {}  # by shard
        made = ""
        try:
            made = tempfile.mkdtemp(prefix="shardgrad-", dir=server.folder)
            self.folder = Path(made)
            Library(self.folder, server.setup).keep_origin(origin)
            self.post = Post(Hello(*RUN, 0, arithmetic(server.k)), self.folder, self.secret)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            raise ValueError(f"ProcessServer: folder is {server.folder!r}, where no run can be: {error}") from error
        self.patience = Patience(self.post)
        self.lifeline, self.end = server.context.Pipe(duplex=False)

    # ── children ────────────────────────────────────────────────────────────────────────────────────

    def bear_all(self) -> None:
        shards, workers = self.server.term.shards, self.server.workers
        for address in (COORDINATOR, *map(shard_address, range(shards)), *map(worker_address, range(workers))):
            self._bear(address)

    def _bear(self, address: Address) -> None:
        server, incarnation = self.server, self.incarnations[address]
        forks = server.context.get_start_method() == "fork"
        share = {"coordinator": get_num_threads(), "shard": server.term.shards, "worker": server.workers}[address[0]]
        order = Order(address, incarnation, self.folder, self.secret, server.recipe, server.term,
                      self.epoch + incarnation, server.workers, self.last, server.durability,
                      self.program if address[0] == "worker" else None, max(1, get_num_threads() // share),
                      self.post.close if forks else None)
        child = server.context.Process(target=live, args=(order, self.lifeline, self.end if forks else None),
                                       name=f"{address[0]} {address[1]}", daemon=True)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child ignores it
        try:
            child.start()
            self.children[address] = child
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.incarnations[address] += 1

    def pids(self) -> dict[Address, int]:
        return {address: child.pid for address, child in list(self.children.items()) if child.is_alive()}

    def _look_after(self) -> None:
        """Bring back what was killed. Raises for what failed."""
        for address, child in list(self.children.items()):
            if child.exitcode is None or (address[0] == "worker" and address[1] in self.returned):
                continue
            if child.exitcode >= 0:
                if time.monotonic() - self.ended.setdefault(address, time.monotonic()) < LAST_WORDS:
                    continue
                self.failed = True
                why = f"; {self.post.refusals[-1]}" if self.post.refusals else ""
                raise WorkFailed(f"{address[0]} {address[1]}: its process ended with exit code {child.exitcode}{why}")
            self.deaths[address] += 1
            if self.deaths[address] > DEATHS:
                self.failed = True
                raise WorkFailed(f"{address[0]} {address[1]}: its process died {DEATHS} times in clock {self.clock}, "
                                 f"the last time by signal {-child.exitcode}")
            self._bear(address)

    # ── what the run waits for ──────────────────────────────────────────────────────────────────────

    def _attend(self, ask: Callable[[], None]) -> None:
        """Wait for a while, take what comes, and ask again when it is time."""
        messages = self.post.receive(min(0.05, self.patience.wait))
        for message in messages:
            if isinstance(message, Committed):
                if message.clock >= self.heard:
                    self.news.append(message)
                    self.heard = message.clock + 1
            elif isinstance(message, Standing):
                self.parts[message.shard] = message.frozen
            elif isinstance(message, Returned):
                self.returned.add(message.worker)
            elif isinstance(message, Failed) and not self.failed:
                self.failed = True
                raise WorkFailed(f"{message.error}\n{message.text}")
        if not self.failed:
            self._look_after()
        if self.patience.is_over(messages):
            ask()

    def _until(self, ready: Callable[[], bool], ask: Callable[[], None], end: float = float("inf")) -> None:
        """Ask, and wait until it is so. Raises KeyboardInterrupt at the second one."""
        if not self.over:
            ask()
        while not ready():
            dead = self.failed and any(child.exitcode is not None for (kind, _), child in self.children.items()
                                       if kind != "worker")
            if time.monotonic() > end or dead or self.over:
                raise TimeoutError("ProcessServer: the shards do not answer")
            try:
                self._attend(ask)
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self.interrupted = True

    def grant(self, clock: int) -> None:
        """Let the clocks before `clock` be applied."""
        self.granted = clock

    def _proceed(self) -> None:
        self.post.send(COORDINATOR, Finish() if self.finishing else Proceed(self.granted - 1))

    def next_clock(self) -> Committed:
        """Wait for the end of the next clock."""
        self._until(lambda: bool(self.news), self._proceed)
        committed = self.news.popleft()
        self.clock = committed.clock + 1
        self.deaths.clear()
        return committed

    def standing(self, seconds: float) -> list[Frozen]:
        """What the shards hold, all of one clock, which is not before the last that was committed."""
        shards, wanted = range(self.server.term.shards), self.clock
        self.parts.clear()

        def ask() -> None:
            for shard in shards:
                if shard not in self.parts:
                    self.post.send(shard_address(shard), Inspect(wanted))

        def ready() -> bool:
            nonlocal wanted
            newest = max([wanted, *(part.clock for part in self.parts.values())])
            self.parts = {s: part for s, part in self.parts.items() if part.clock == newest}  # others answer late
            if newest > wanted:  # where one is, all will be
                wanted = newest
                ask()
            return len(self.parts) == len(shards)

        self._until(ready, ask, time.monotonic() + seconds)
        return [self.parts[shard] for shard in shards]

    def finish(self) -> None:
        """Tell the workers that it is over and wait for their programs to return."""
        self.finishing = True
        self._until(lambda: len(self.returned) == self.server.workers, self._proceed)

    def heed_interrupt(self) -> None:
        """Between two clocks: raise the KeyboardInterrupt that came during the last one."""
        if self.interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """End every process: workers after their program has cleaned up, the others as they stand."""
        if self.over:
            return
        self.over = True
        workers = {address: child for address, child in self.children.items() if address[0] == "worker"}
        end = time.monotonic() + GRACE
        try:
            while any(child.is_alive() for child in workers.values()) and time.monotonic() < end:
                for address in workers:
                    self.post.send(address, Stop())
                self.post.receive(0.01)
        finally:
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            for child in self.children.values():
                child.kill()
            for child in self.children.values():
                child.join()
            self.post.close()
            self.end.close()
            self.lifeline.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
