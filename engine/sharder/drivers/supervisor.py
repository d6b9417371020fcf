"""A server whose machines live in other processes, here or elsewhere, and the run that watches over them.

The process that calls run() is the supervisor: it bears the machines, brings back in a new incarnation what is lost,
and asks for the clocks. All that it tells them or hears goes by its mail, as messages, which may be lost with either
end; so whatever it waits for it asks for again. What a machine runs in and how its death is seen is the business of a
driver: processes.py, ray_server.py.

    grant, next_clock, next_clock ...   the coordinator: Proceed --> Committed
    standing                            every shard: Inspect --> Standing
    finish                              the coordinator: Finish; the workers: Returned
    stop                                the workers: Stop; then all are ended
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.backend import get_num_threads
from engine.sharder.client import Program
from engine.sharder.cluster import Cluster
from engine.sharder.drivers.child import (
    Failed,
    Inspect,
    Mail,
    Order,
    Patience,
    Recipe,
    Returned,
    Sent,
    Standing,
    Stop,
)
from engine.sharder.drivers.files import Library, join
from engine.sharder.drivers.frozen import Frozen
from engine.sharder.drivers.playback import Recording
from engine.sharder.drivers.residual_files import shelves_of
from engine.sharder.drivers.tape import BLANK
from engine.sharder.events import (
    COORDINATOR,
    Address,
    Committed,
    Entered,
    Finish,
    Proceed,
    Reshard,
    shard_address,
    worker_address,
)
from engine.sharder.learners import Learners, expect_repeatable
from engine.sharder.memory import Checkpoint
from engine.sharder.messages import Term

DURABILITIES = ("snapshot", "log")
DEATHS = 100  # in one clock, after which it is no accident
GRACE = 5.0  # seconds for a program to clean up when the run is ended
STANDING = 10.0  # seconds to wait for the state of a run that failed


class WorkFailed(RuntimeError):
    """An exception in another process: its type and text, and where it was raised."""


class SupervisedServer(Cluster, ABC):
    """A parameter server in processes of its own; the arguments are Cluster's, and

    durability: what a shard that is lost comes back with, as in the simulator. "snapshot": nothing; all go back to
                their last snapshot and compute again what came after (BSP only, and there the default); "log": all
                it was told
    folder:     where the run's own folder is made; by default where the system keeps temporary files
    """

    shared = False

    def __init__(self, parameters: Any, rule: Any, *, durability: str | None = None, save_every: int = 10,
                 folder: str | Path | None = None, hyper: Any = None, **arguments: Any):
        self.name = type(self).__name__
        super().__init__(parameters, rule, save_every=save_every, hyper=hyper, **arguments)
        expect_repeatable(self.name, self.setup)
        replays = self.setup.consistency.replays
        self.durability = durability or ("snapshot" if replays else "log")
        if self.durability not in DURABILITIES or (self.durability == "snapshot" and not replays):
            raise ValueError(f"{self.name}: durability is {durability!r}, expected "
                             f"{' or '.join(DURABILITIES) if replays else 'log, the only one with this consistency'}")
        self.folder = folder
        known = {field.name: getattr(self.setup, field.name) for field in fields(self.setup)
                 if field.name not in ("k", "hyper", "_partitions")}
        self.recipe = Recipe(known, self.device, dict(hyper) if isinstance(hyper, Mapping) else hyper)  # as as_hyper
        self.recording: Recording | None = None  # of the present run
        self._team: Team | None = None
        self._stale = False  # whether the shards are ahead of what this process has

    @abstractmethod
    def _make_team(self, program: Program, origin: Checkpoint, last: int | None, epoch: int) -> Team:
        """What runs the machines of one run, none of them born yet."""

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

    def reshard(self, shards: int) -> None:
        """Go on with so many shards, to the same bits. During a run this returns at once, between two clocks or from
        another thread; a clock then ends with a snapshot, and with that the new shards begin."""
        self._check_shards(shards)
        if self._team:
            self._team.wish = shards
        else:
            super().reshard(shards)

    def state(self) -> dict[str, Any]:
        if not self.busy:
            self._fetch()
            self._fetch_learners()
        return super().state()

    def _fetch_learners(self) -> None:
        """Bring what workers keep at this clock here, from their files."""
        if self._team:
            parameters, clock = self.partition.parameters, self.clock
            self.learners.load(parameters, self._team.learners.state(parameters, clock), clock)

    # ── running ─────────────────────────────────────────────────────────────────────────────────────

    def run(self, program: Program, clocks: int | None = None, stride: int = 1,
            trace: str | Path | None = None) -> Iterator[Committed]:
        """Train, as ParameterServer.run does, with program(client) in a process for each worker."""
        self.check_run(clocks, stride)
        origin = self.checkpoint()
        coordinator, _, workers = self.start(clocks)
        try:
            self.recording = Recording(trace) if trace else None
            self._team = team = self._make_team(program, origin, coordinator.last, workers[0].epoch)
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

    def _clocks(self, team: Team, last: int | None, stride: int) -> Iterator[Committed]:
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
            team.heed_interrupt()
            raise

    def _next_clock(self, team: Team) -> Committed:
        self.busy = self._stale = True
        committed = team.next_clock()
        self.busy = team.clock < team.granted
        return committed

    def _settle(self) -> None:
        """Have the state that a run ends with. If it cannot be had, whatever asks for it later says so."""
        self.busy = False
        try:
            self._fetch(STANDING)
            self._fetch_learners()
            if self._team and (wish := self._team.wish or self._team.term.shards) != self.term.shards:
                self._split(wish)  # during the run what is here belongs to no number of shards
        except BaseException as error:
            for memory in self.memories:
                memory.torn = True
            if not isinstance(error, (TimeoutError, WorkFailed)):
                raise


class Team(ABC):
    """The machines of one run. mail: the supervisor's; folder: of the run, with its origin in it; learners: over
    what workers keep there."""

    mail: Mail

    def __init__(self, server: SupervisedServer, program: Program, origin: Checkpoint, last: int | None, epoch: int):
        self.server, self.program, self.last, self.epoch = server, program, last, epoch
        self.clock = self.granted = self.heard = origin.clock  # yielded; may be applied; committed
        self.interrupted = self.finishing = self.failed = self.over = False
        self.origin = self.term = server.term  # with which the run began; which is running
        self.wish: int | None = None  # to go on with so many shards
        self.asked: int | None = None  # the coordinator, for so many
        self.servers = [COORDINATOR, *map(shard_address, range(server.term.shards))]
        self.workers = [*map(worker_address, range(server.workers))]
        self.incarnations: Counter[Address] = Counter()
        self.deaths: Counter[Address] = Counter()  # in this clock
        self.returned: set[int] = set()
        self.news: deque[Committed] = deque()
        self.parts: dict[int, Frozen] = {}  # by shard
        self.sent: dict[tuple[int, int], Sent] = {}  # by worker and epoch: the newest
        made = ""
        try:
            made = tempfile.mkdtemp(prefix="shardgrad-", dir=server.folder)
            self.folder = Path(made)
            Library(self.folder, server.setup).keep_origin(origin)
            self._keep_learners(origin.clock)
            self.open()
        except BaseException as error:
            shutil.rmtree(made, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                raise ValueError(f"{server.name}: folder is {server.folder!r}, where no run can be: {error}") from error
            raise
        self.tape = self.mail.tape = server.recording.caller() if server.recording else BLANK
        self.patience = Patience(self.mail)

    def _keep_learners(self, clock: int) -> None:
        """Put what workers keep where they find it."""
        server, parameters = self.server, self.server.partition.parameters
        self.learners = Learners(server.setup, False, shelves_of(self.folder, server.setup))
        self.learners.load(parameters, server.learners.state(parameters, clock), clock)

    # ── what a driver does ──────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def open(self) -> None:
        """Be able to bear machines, and to hear from them by self.mail."""

    @abstractmethod
    def bear(self, order: Order) -> None:
        """Let there be a machine, in place of the one that was lost if there was one."""

    @abstractmethod
    def remove(self, address: Address) -> None:
        """End a machine that is needed no more, and do not miss it."""

    @abstractmethod
    def lost(self) -> Iterator[tuple[Address, str]]:
        """Who has died, and of what. Raises WorkFailed for what nobody can bring back."""

    @abstractmethod
    def alive(self, address: Address) -> bool:
        """Whether a machine was born and neither died nor came to its end."""

    @abstractmethod
    def close(self) -> None:
        """End all machines as they stand, and let go of everything, the folder by clear()."""

    def clear(self) -> None:
        """Remove the run's folder; the trace that is wanted is made of it first."""
        try:
            if self.server.recording:
                self.server.recording.write(self.folder)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def computers(self) -> bool:
        """Whether machines are on several computers, one of which may be lost."""
        return False

    def threads(self, address: Address) -> int:
        """How many threads a machine's kernels have: its share of this computer."""
        of_kind = {"coordinator": 1, "shard": len(self.servers) - 1, "worker": len(self.workers)}
        return max(1, get_num_threads() // of_kind[address[0]])

    # ── births and deaths ───────────────────────────────────────────────────────────────────────────

    def bear_all(self) -> None:
        for address in (*self.servers, *self.workers):
            self._bear(address)

    def _bear(self, address: Address) -> None:
        server, incarnation = self.server, self.incarnations[address]
        program = self.program if address[0] == "worker" else None
        self.tape.birth(address, f"incarnation {incarnation}")  # first, for what is born may begin at once
        self.bear(Order(address, incarnation, self.folder, server.recipe, self.origin, self.epoch + incarnation,
                        server.workers, self.last, server.durability, program, self.threads(address),
                        server.recording is not None, self.computers))
        self.incarnations[address] += 1

    def fail(self, why: str) -> WorkFailed:
        self.failed = True
        return WorkFailed(why)

    def _look_after(self) -> None:
        """Bring back what was lost. Raises for what failed."""
        for address, why in self.lost():
            if address[0] == "worker" and address[1] in self.returned:
                continue
            self.tape.death(address, f"dies {why}")
            self.deaths[address] += 1
            if self.deaths[address] > DEATHS:
                raise self.fail(f"{address[0]} {address[1]}: its process died {DEATHS} times in clock {self.clock}, "
                                f"the last time {why}")
            self._bear(address)
            self.server.returns += 1

    # ── more shards, or fewer ───────────────────────────────────────────────────────────────────────

    def _ask_for_shards(self) -> None:
        """Ask for the term that is wished for; its shards are born, and blank."""
        if self.wish is not None and not self.finishing:
            for shard in range(len(self.servers) - 1, self.wish):
                self.servers.append(shard_address(shard))
                self._bear(shard_address(shard))
            self.mail.send(COORDINATOR, Reshard(self.wish))

    def _enter(self, term: Term) -> None:
        """A term is running: shards that have no part in it are not needed any more, unless for the next."""
        self.term = max(self.term, term, key=lambda term: term.number)
        if self.wish == self.term.shards:
            self.wish = None
        while len(self.servers) - 1 > max(self.term.shards, self.wish or 0):
            address = self.servers.pop()
            self.remove(address)
            self.tape.death(address, "is removed")

    # ── what the run waits for ──────────────────────────────────────────────────────────────────────

    def _attend(self, ask: Callable[[], None]) -> None:
        """Wait for a while, take what comes, and ask again when it is time."""
        messages = self.mail.receive(min(0.05, self.patience.wait))
        for message in messages:
            self.tape.heard(message)
            if isinstance(message, Committed):
                if message.clock >= self.heard:
                    self.news.append(message)
                    self.heard = message.clock + 1
            elif isinstance(message, Entered):
                self._enter(message.term)
            elif isinstance(message, Standing):
                self.parts[message.shard] = message.frozen
            elif isinstance(message, Returned):
                self.returned.add(message.worker)
            elif isinstance(message, Sent):
                self._count(message)
            elif isinstance(message, Failed) and not self.failed:
                raise self.fail(f"{message.error}\n{message.text}")
        if not self.failed:
            self._look_after()
        if self.wish != self.asked:
            self.asked = self.wish
            self._ask_for_shards()
        if self.patience.is_over(messages):
            ask()

    def _count(self, new: Sent) -> None:
        known = self.sent.get((new.worker, new.epoch), Sent(new.worker, new.epoch, 0, 0, 0))
        if (new.dense, new.again) > (known.dense, known.again):
            self.sent[new.worker, new.epoch] = new
            self.server.pushed.add(new.sent - known.sent, new.dense - known.dense, new.again - known.again)

    def _until(self, what: str, ready: Callable[[], bool], ask: Callable[[], None], end: float = float("inf")) -> None:
        """Ask, and wait until it is so. Raises KeyboardInterrupt at the second one. what: it is called on a tape"""
        self.tape.turn(what)
        if not self.over:
            ask()
        while not ready():
            dead = self.failed and not all(map(self.alive, self.servers))
            if time.monotonic() > end or dead or self.over:
                raise TimeoutError(f"{self.server.name}: the shards do not answer")
            try:
                self._attend(ask)
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self.interrupted = True
        self.tape.turn("caller")

    def grant(self, clock: int) -> None:
        """Let the clocks before `clock` be applied."""
        self.granted = clock

    def _proceed(self) -> None:
        self._ask_for_shards()
        self.mail.send(COORDINATOR, Finish() if self.finishing else Proceed(self.granted - 1))

    def next_clock(self) -> Committed:
        """Wait for the end of the next clock."""
        self._until(f"clock {self.clock}", lambda: bool(self.news), self._proceed)
        committed = self.news.popleft()
        self.clock = committed.clock + 1
        self.tape.count(self.clock)
        self.deaths.clear()
        return committed

    def standing(self, seconds: float) -> list[Frozen]:
        """What the shards hold, all of one term and clock, which is not before the last that was committed."""
        wanted = self.clock, self.term.number
        self.parts.clear()

        def ask() -> None:
            for _, shard in self.servers[1:]:
                if shard not in self.parts:
                    self.mail.send(shard_address(shard), Inspect(wanted[0]))

        def ready() -> bool:
            nonlocal wanted
            newest = max([wanted, *map(_place_in_time, self.parts.values())])
            self.parts = {s: p for s, p in self.parts.items() if _place_in_time(p) == newest}  # others answer late
            if newest > wanted:  # where one is, all will be
                wanted = newest
                ask()
            return bool(self.parts) and all(shard in self.parts for shard in range(_term(self.parts).shards))

        self._until("state", ready, ask, time.monotonic() + seconds)
        return [self.parts[shard] for shard in range(_term(self.parts).shards)]

    def finish(self) -> None:
        """Tell the workers that it is over and wait for their programs to return."""
        self.finishing = True
        self._until("finish", lambda: len(self.returned) == len(self.workers), self._proceed)

    def heed_interrupt(self) -> None:
        """Between two clocks: raise the KeyboardInterrupt that came during the last one."""
        if self.interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """End every machine: workers after their program has cleaned up, the others as they stand."""
        if self.over:
            return
        self.over = True
        self.tape.turn("stop")
        end = time.monotonic() + GRACE
        try:
            while any(map(self.alive, self.workers)) and time.monotonic() < end:
                for address in self.workers:
                    self.mail.send(address, Stop())
                self.mail.receive(0.01)
        finally:
            self.close()


def _place_in_time(part: Frozen) -> tuple[int, int]:
    assert part.term is not None
    return part.clock, part.term.number


def _term(parts: Mapping[int, Frozen]) -> Term:
    """That of parts that are all of one."""
    term = next(iter(parts.values())).term
    assert term is not None
    return term
