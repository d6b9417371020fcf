"""The driver for one machine: a process for each shard, each worker and the coordinator, any of which may be killed.

    server = ProcessServer(model, AdamWRule(), shards=2, workers=2, microbatches=4)
    for done in server.run(train, clocks=1000):       # train(client): see client.py
        print(done.clock, done.mean_loss)

The process that calls run() is the supervisor (supervisor.py): it bears the others and brings back whatever dies by a
signal. Messages go through Unix-domain sockets as frames (wire.py) under a secret that is drawn for each run; logs
and snapshots are files (files.py) in a folder of the run's own. In BSP the bits are those of the other drivers and of
plain training, whatever is killed and whenever; at the end nothing is left behind, neither processes nor files.

start: "fork" or "spawn"; with "spawn" the rule, the hyper-parameters and the program must be importable

A program must bear being run again from its beginning: when its process has died, that is what happens, in a new one.
An exception in it, or in any machine, ends the run and is raised in the caller, as WorkFailed, with its text. Ctrl-C
ends it at the end of the running clock, a second one at once. When the supervisor itself is killed, its children see
that, clear up and die.
"""

from __future__ import annotations

import multiprocessing
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.sharder.client import Program
from engine.sharder.drivers.child import Order, live
from engine.sharder.drivers.post import Post
from engine.sharder.drivers.supervisor import SupervisedServer, Team
from engine.sharder.events import RUN, Address
from engine.sharder.memory import Checkpoint
from engine.sharder.wire import Hello, arithmetic

LAST_WORDS = 0.1  # seconds to wait for what an ended process has said


class ProcessServer(SupervisedServer):
    """A parameter server in processes of this machine; the arguments are SupervisedServer's, and `start`."""

    def __init__(self, parameters: Any, rule: Any, *, start: str = "fork", **arguments: Any):
        super().__init__(parameters, rule, **arguments)
        if start not in ("fork", "spawn"):
            raise ValueError(f"ProcessServer: start is {start!r}, expected fork or spawn")
        self.context: Any = multiprocessing.get_context(start)

    def processes(self) -> dict[Address, int]:
        """The process numbers of the machines that run now."""
        return self._team.pids() if isinstance(self._team, _Processes) else {}

    def _make_team(self, program: Program, origin: Checkpoint, last: int | None, epoch: int) -> Team:
        return _Processes(self, program, origin, last, epoch)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until this is over, however it ends."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Processes(Team):
    """The processes of one run."""

    server: ProcessServer
    mail: Post

    def open(self) -> None:
        self.children: dict[Address, Any] = {}
        self.ended: dict[Address, float] = {}  # when each was seen to have ended by itself
        self.secret = secrets.token_bytes(32)
        self.mail = Post(Hello(*RUN, 0, arithmetic(self.server.k)), self.folder, self.secret)
        self.lifeline, self.end = self.server.context.Pipe(duplex=False)

    def bear(self, order: Order) -> None:
        forks = self.server.context.get_start_method() == "fork"
        let_go = (self.end.close, self.mail.close) if forks else ()
        child = self.server.context.Process(target=live, args=(order, self.secret, self.lifeline, let_go),
                                            name=f"{order.address[0]} {order.address[1]}", daemon=True)
        with _undisturbed():  # until the child ignores Ctrl-C
            child.start()
            self.children[order.address] = child

    def alive(self, address: Address) -> bool:
        return address in self.children and self.children[address].is_alive()

    def pids(self) -> dict[Address, int]:
        return {address: child.pid for address, child in list(self.children.items()) if child.is_alive()}

    def remove(self, address: Address) -> None:
        child = self.children.pop(address)
        child.kill()
        child.join()
        self.ended.pop(address, None)

    def lost(self) -> Iterator[tuple[Address, str]]:
        """What was killed. What ended by itself has failed, unless it is a worker that has said that it would."""
        for address, child in list(self.children.items()):
            if child.exitcode is None or (address[0] == "worker" and address[1] in self.returned):
                continue
            if child.exitcode < 0:
                yield address, f"by signal {-child.exitcode}"
            elif time.monotonic() - self.ended.setdefault(address, time.monotonic()) >= LAST_WORDS:
                why = f"; {self.mail.refusals[-1]}" if self.mail.refusals else ""
                raise self.fail(f"{address[0]} {address[1]}: its process ended with exit code {child.exitcode}{why}")

    def close(self) -> None:
        with _undisturbed():
            for child in self.children.values():
                child.kill()
            for child in self.children.values():
                child.join()
            self.mail.close()
            self.end.close()
            self.lifeline.close()
            self.clear()
