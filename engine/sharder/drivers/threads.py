"""The driver for one process: a thread a shard, a thread a worker, one for the coordinator; shared memory; no copies.

    server = ParameterServer(model, AdamW(), shards=2, workers=2, microbatches=4, hyper={"lr": 1e-3})
    for done in server.run(train, clocks=1000):       # train(client): see client.py
        print(done.clock, done.mean_loss)
        if done.clock % 100 == 99:
            save(server.state())

run() is a generator: while the caller looks at a finished clock nothing is applied, so the state it sees is that of all
shards at this clock. (In BSP every worker stands before the next clock; in SSP they are computing ahead.) Leaving the
loop ends the run, and a later run() goes on from there.
An exception in any thread ends the run at once and is raised in the caller; Ctrl-C ends it at the end of the running
clock, and a second one at once. In all these cases the server stands at the last clock that was committed.

Queues neither lose nor repeat, so this driver needs no Timeout.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from engine.backend import get_num_threads, set_num_threads
from engine.sharder.client import Program, Stopped, run_to_end
from engine.sharder.cluster import Cluster
from engine.sharder.coordinator import Coordinator
from engine.sharder.drivers.playback import Recording
from engine.sharder.drivers.tape import BLANK, Blank, TapedClient
from engine.sharder.events import (
    COORDINATOR,
    RUN,
    Address,
    Committed,
    Finish,
    Proceed,
    Send,
    shard_address,
    worker_address,
)
from engine.sharder.messages import Parameters, Pull
from engine.sharder.shard import Shard
from engine.sharder.worker import Worker


class _Stop:
    """The last message in an inbox."""


@dataclass(frozen=True)
class _Failed:
    error: BaseException


LOOK_FOR_SIGNALS = 0.2
"""Seconds. Python looks for signals and then waits for a lock: one that comes in between ends no wait, however long."""


@dataclass(frozen=True)
class _Returned:
    worker: int


class ParameterServer(Cluster):
    """A parameter server in this process; the arguments are Cluster's."""

    def run(self, program: Program, clocks: int | None = None, stride: int = 1,
            trace: str | Path | None = None) -> Iterator[Committed]:
        """Train: `program(client)` on a thread for each worker, for `clocks` clocks or until the caller stops.

        Yields a Committed for each clock done. With a stride, parameters stand still only after so many clocks (and
        state() can be asked for then), not after each: ASP needs one to run ahead at all. Raises what a program, a
        shard or the rule raises; KeyboardInterrupt is raised at the end of the stride in which it came. trace: a file
        for a Chrome trace of what all machines did (playback.py).
        """
        self.check_run(clocks, stride)
        machines = self.start(clocks)
        try:
            recording = Recording(trace) if trace else None
            team = _Team(self, program, recording, *machines)
            last = None if clocks is None else team.clock + clocks
            try:
                while last is None or team.clock < last:
                    if team.clock == team.granted:
                        team.heed_interrupt()
                        team.grant(team.clock + stride if last is None else min(team.clock + stride, last))
                    yield team.next_clock()
                team.heed_interrupt()
                team.finish()
                team.heed_interrupt()
            except GeneratorExit:
                while team.clock < team.granted:
                    team.next_clock()
                team.heed_interrupt()
                raise
            finally:
                team.stop()
                if recording:
                    recording.write()
        finally:
            self.active = self.busy = False


class _Team:
    """The threads of one run."""

    def __init__(self, server: ParameterServer, program: Program, recording: Recording | None,
                 coordinator: Coordinator, shards: list[Shard], workers: list[Worker]):
        self.server, self.program, self.recording = server, program, recording
        self.tape = recording.caller() if recording else BLANK
        self.clock = self.granted = server.clock  # committed; may be applied
        self.interrupted = False
        self.news: deque[Any] = deque()  # to the caller: Committed, _Returned, _Failed
        self.arrived = threading.Semaphore(0)
        self.inboxes: dict[Address, SimpleQueue[Any]] = {
            address: SimpleQueue() for address in
            [COORDINATOR, *(shard_address(s.number) for s in shards), *(worker_address(w.number) for w in workers)]}
        cores = get_num_threads()
        self.coordinator = self._thread("coordinator", 1, self._serve, coordinator, COORDINATOR)
        self.shards = [self._thread(f"shard {s.number}", cores // len(shards), self._serve, s, shard_address(s.number))
                       for s in shards]
        self.workers = [self._thread(f"worker {w.number}", cores // len(workers), self._work, w) for w in workers]
        for thread in (self.coordinator, *self.shards, *self.workers):
            thread.start()

    # ── in the threads ──────────────────────────────────────────────────────────────────────────────

    def _thread(self, name: str, cores: int, body: Callable[..., None], *arguments: Any) -> threading.Thread:
        """A thread with the caller's context (device, grad mode, generator) and a kernel team of `cores`."""
        context = contextvars.copy_context()

        def run() -> None:
            try:
                set_num_threads(max(1, cores))
                context.run(body, *arguments)
            except Stopped:
                pass
            except BaseException as error:
                self.tell(_Failed(error))

        return threading.Thread(target=run, name=name, daemon=True)

    def tell(self, news: Any) -> None:
        self.news.append(news)
        self.arrived.release()

    def send(self, to: Address, message: Any, tape: Blank) -> None:
        """tape: of the machine that sends it"""
        tape.sent(to, message)
        if to == RUN:
            self.tell(message)
        else:
            self.inboxes[to].put(message)

    def _tape(self, address: Address) -> Blank:
        return self.recording.tape(address) if self.recording else BLANK

    def _serve(self, machine: Any, address: Address) -> None:
        """Run a shard or the coordinator."""
        inbox, tape = self.inboxes[address], self._tape(address)
        while not isinstance(message := inbox.get(), _Stop):
            with tape.answer(message):
                for action in machine.step(message):
                    if isinstance(action, Send):
                        self.send(action.to, action.message, tape)
                    else:
                        self.send(RUN, action, tape)

    def _work(self, machine: Worker) -> None:
        """Run a worker's program."""
        tape = self._tape(worker_address(machine.number))
        run_to_end(self.program, TapedClient(tape, self.server, machine, _Port(self, machine, tape)))
        self.tell(_Returned(machine.number))

    # ── in the caller ───────────────────────────────────────────────────────────────────────────────

    def grant(self, clock: int) -> None:
        """Let the clocks before `clock` be applied."""
        self.granted, self.server.busy = clock, True
        self.send(COORDINATOR, Proceed(clock - 1), self.tape)

    def next_clock(self) -> Committed:
        """Wait for the end of the next clock."""
        self.tape.turn(f"clock {self.clock}")
        committed = self._next_news()
        self.clock += 1
        self.tape.heard(committed)
        self.tape.turn("caller")
        self.tape.count(self.clock)
        self.server.busy = self.clock < self.granted
        return committed

    def finish(self) -> None:
        """Tell the workers that it is over and wait for their programs to return."""
        self.tape.turn("finish")
        self.send(COORDINATOR, Finish(), self.tape)
        for _ in self.workers:
            self._next_news()

    def heed_interrupt(self) -> None:
        """Between two clocks: raise the KeyboardInterrupt that came during the last one."""
        if self.interrupted:
            raise KeyboardInterrupt

    def _next_news(self) -> Any:
        while True:
            try:
                while not self.news:  # looked at before waiting: an interrupt may have eaten a release
                    self.arrived.acquire(timeout=LOOK_FOR_SIGNALS)
                break
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self.interrupted = True
        news = self.news.popleft()
        if isinstance(news, _Failed):
            if isinstance(news.error, StopIteration):  # which a generator, as run() is, cannot pass on
                raise RuntimeError("run: a program raised StopIteration: an iterator had nothing more") from news.error
            raise news.error
        return news

    def stop(self) -> None:
        """End every thread. The coordinator first: then a decision to apply has reached all shards or none of them,
        and the shards still carry it out before they come to their last message. An interrupt meanwhile is raised when
        all have been told; it leaves nobody behind but a program that does not return."""
        interrupt = None
        for kind, threads in (("coordinator", [self.coordinator]), ("shard", self.shards), ("worker", self.workers)):
            for number in range(len(threads)):
                self.inboxes[kind, number].put(_Stop())
            for thread in threads:
                while thread.is_alive():
                    try:
                        thread.join()
                    except KeyboardInterrupt as error:
                        if kind == "worker":
                            raise
                        interrupt = error
        if interrupt is not None:
            raise interrupt


class _Port:
    """A worker's queues. A pull is answered on the spot: the shards' memory is shared, and reading needs no shard."""

    def __init__(self, team: _Team, machine: Worker, tape: Blank):
        self.team, self.inbox, self.tape = team, team.inboxes[worker_address(machine.number)], tape

    def send(self, send: Send) -> None:
        if isinstance(send.message, Pull):
            pull, shard = send.message, send.to[1]
            values = self.team.server.memories[shard].versions.at(pull.version)
            self.inbox.put(Parameters(pull.worker, pull.epoch, shard, pull.term, pull.version, values))
        else:
            self.team.send(send.to, send.message, self.tape)

    def receive(self, wait: bool = True) -> Any:
        try:
            message = self.inbox.get(wait)
        except Empty:
            return None
        if isinstance(message, _Stop):
            self.inbox.put(message)  # for a program that calls again while it cleans up
            raise Stopped
        if not isinstance(message, Parameters):
            self.tape.heard(message)
        return message
