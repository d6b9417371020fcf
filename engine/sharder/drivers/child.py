"""What runs in a process of a supervised run: one machine, its mail, and its files.

A child is told everything at its birth (Order), and then lives on messages alone. It may be killed at any moment: what
it has said is on record, or can be computed again. A child of the processes driver sees by the end of a pipe when the
process that bore it is gone; then it removes the run's folder and dies too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.backend import Backend, get_backend, set_num_threads
from engine.dtypes import DType
from engine.sharder.client import Stopped, run_to_end
from engine.sharder.coordinator import Coordinator
from engine.sharder.drivers.files import Library, Replaced, Store
from engine.sharder.drivers.frozen import Frozen, freeze
from engine.sharder.drivers.post import Post
from engine.sharder.drivers.residual_files import shelves_of
from engine.sharder.drivers.tape import Blank, Tape, TapedClient, tape_path
from engine.sharder.encoding import WireError, declare
from engine.sharder.events import (
    COORDINATOR,
    RUN,
    Address,
    Append,
    Load,
    Loaded,
    Save,
    Send,
    Stored,
    Timeout,
    Written,
    shard_address,
)
from engine.sharder.journal import Journal, replay
from engine.sharder.learners import Learners
from engine.sharder.memory import Snapshot
from engine.sharder.messages import Ready, Restore, Term
from engine.sharder.setup import Setup, as_hyper
from engine.sharder.shard import Shard
from engine.sharder.versions import Counter, Traffic
from engine.sharder.wire import Hello, arithmetic
from engine.sharder.worker import Worker

PATIENCE = (0.5, 8.0)  # seconds until somebody who hears nothing asks again: at first, and at most


# ── between the run and its children, besides what the protocol says ──────────────────────────────────

@dataclass(frozen=True)
class Failed:
    """Child: an exception ended me; its text."""

    error: str
    text: str


@dataclass(frozen=True)
class Returned:
    """Worker: the program has returned, after the end of training."""

    worker: int


@dataclass(frozen=True)
class Sent:
    """Worker: what this incarnation has pushed so far took so many bytes; dense gradients would have taken so many; so
    often it had to push or pull again."""

    worker: int
    epoch: int
    sent: int
    dense: int
    again: int


@dataclass(frozen=True)
class Inspect:
    """Run, to a shard: what do you hold, once you have done so many clocks?"""

    clocks: int


@dataclass(frozen=True)
class Standing:
    """Shard: this."""

    shard: int
    frozen: Frozen


@dataclass(frozen=True)
class Stop:
    """Run, to a worker: the run is over."""


for _number, _class in enumerate((Failed, Returned, Sent, Inspect, Standing, Stop), 65):
    declare(_number, _class)


# ── a life ────────────────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Recipe:
    """A Setup that can be sent to a new process: without what belongs to one process alone."""

    fields: dict[str, Any]
    device: str
    hyper: Any

    def setup(self) -> Setup:
        return Setup(**self.fields, k=get_backend(self.device), hyper=as_hyper(self.hyper))


@dataclass(frozen=True)
class Order:
    """What a child is told at its birth.

    incarnation: how often its address had another child before
    last:        the clock before which training ends, None if that is open
    program:     of a worker
    traced:      whether it records what it does, in the folder
    computers:   whether there are several, one of which may be lost
    """

    address: Address
    incarnation: int
    folder: Path
    recipe: Recipe
    term: Term
    epoch: int
    workers: int
    last: int | None
    durability: str
    program: Any
    threads: int
    traced: bool = False
    computers: bool = False


class Mail(Protocol):
    """How a machine's messages come and go; they may be lost, late or repeated.

    met: whether somebody is there, since somebody last looked, who has not heard what was said before
    stirred: the monotonic time at which anything has last come or gone; sending: whether something is still on its way
    tape: where messages that leave are recorded
    """

    met: bool
    stirred: float
    tape: Blank

    @property
    def sending(self) -> bool: ...
    def send(self, to: Address, message: Any) -> None: ...
    def forget(self, address: Address) -> None:
        """There will be nothing more to say to this machine."""

    def receive(self, seconds: float) -> list[Any]:
        """The messages that have come; waits for so long if there are none."""


def be(order: Order, setup: Setup, mail: Mail) -> None:
    """Be the machine that the order says. Raises Stopped when the run is over, Replaced when another is it now."""
    set_num_threads(order.threads)
    if order.traced:
        mail.tape = Tape(order.address, order.incarnation, tape_path(order.folder, order.address, order.incarnation))
    if order.address[0] == "worker":
        _work(order, setup, mail)
    else:
        _Server(order, setup, mail).serve()


def failure(error: BaseException) -> Failed:
    """Of the exception that is being handled."""
    return Failed(f"{type(error).__name__}: {error}", traceback.format_exc())


def live(order: Order, secret: bytes, lifeline: Any, let_go: Sequence[Callable[[], None]]) -> None:
    """Be a child of the processes driver. lifeline: ends when the run does; let_go: closes what a forked child has of
    the run's, lest it outlive the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its children
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for close in let_go:
        close()
    threading.Thread(target=_watch, args=(lifeline, order.folder), daemon=True).start()
    kind, number = order.address
    setup = order.recipe.setup()
    post = Post(Hello(kind, number, order.incarnation, arithmetic(setup.k)), order.folder, secret)
    post.calls.add(RUN)
    if kind == "shard":
        post.calls.add(COORDINATOR)
    elif kind == "worker":
        post.calls |= {COORDINATOR, *map(shard_address, range(order.term.shards))}
    try:
        be(order, setup, post)
    except (Stopped, Replaced):
        pass
    except WireError as error:
        sys.exit(f"{kind} {number}: {error}")
    except BaseException as error:
        post.send(RUN, failure(error))
        post.flush(10)
        sys.exit(1)


def _watch(lifeline: Any, folder: Path) -> None:
    """Die with the run, and take its folder along: first its name, for others still write to it."""
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        pass
    gone = folder.with_name(f"{folder.name}-gone")
    with contextlib.suppress(OSError):  # another was first
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    os._exit(1)


class Patience:
    """When it is time to ask again: at a new connection, and when nothing has come for a while."""

    def __init__(self, mail: Mail):
        self.mail = mail
        self.wait = PATIENCE[0]
        self.heard = time.monotonic()

    def is_over(self, messages: list[Any]) -> bool:
        met, self.mail.met = self.mail.met, False
        if messages or self.mail.stirred > self.heard or self.mail.sending:
            self.wait, self.heard = PATIENCE[0], time.monotonic()
        elif not met and time.monotonic() - self.heard >= self.wait:
            self.wait, self.heard = min(2 * self.wait, PATIENCE[1]), time.monotonic()
            return True
        return met


# ── a shard, or the coordinator ───────────────────────────────────────────────────────────────────────

class _Server:
    """A machine with its storage."""

    def __init__(self, order: Order, setup: Setup, mail: Mail):
        self.mail, self.tape, self.library = mail, mail.tape, Library(order.folder, setup)
        self.library.expect_origin()
        self.store = Store(order.folder, order.address, setup, order.incarnation)
        kind, number = order.address
        self.machine: Any
        if kind == "coordinator":
            self.machine = Coordinator(setup, order.term, order.workers, order.last)
        else:
            self.machine = Shard(number, setup, incarnation=order.incarnation)
        logged = kind == "coordinator" or order.durability == "log"
        if kind == "shard" and (logged or order.incarnation == 0):
            replay(self.machine, [Restore(order.term), Loaded(order.term, self.library.origin())])
        if logged:
            if self.store.snapshot:
                self.machine.resume(self.store.snapshot)
            replay(self.machine, self.store.records)
        self.store.records.clear()
        self.node: Any = Journal(self.machine, self.store.number) if logged else self.machine
        self.asked: Inspect | None = None

    def serve(self) -> None:
        patience = Patience(self.mail)
        while True:
            messages = self.mail.receive(patience.wait)
            for message in messages:
                self._take(message)
            if patience.is_over(messages):
                self._react(Timeout())
            while self.store.pending:
                with self.tape.span("log"):
                    self.store.synchronise()
                self._react(Written(self.store.number))
            if self.asked and self.machine.active and self.machine.clock >= self.asked.clocks:
                self._report()

    def _take(self, message: Any) -> None:
        with self.tape.answer(message):
            if isinstance(message, Inspect):
                self.asked = message
            else:
                self._perform(self.node.step(message))

    def _react(self, event: Any) -> None:
        with self.tape.reaction(event):
            self._perform(self.node.step(event))

    def _perform(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.mail.send(action.to, action.message)
            elif isinstance(action, Append):
                self.store.append(action.number, action.record)
            elif isinstance(action, Save):
                self._save(action)
            elif isinstance(action, Load):
                loaded = Loaded(action.term, self.library.checkpoint(action.term.start))
                self._perform(self.node.step(loaded))
            else:
                self.mail.send(RUN, action)

    def _save(self, save: Save) -> None:
        with self.tape.span("snapshot"):
            self.store.save(save.snapshot, save.number)
        if isinstance(self.node, Journal):
            self._perform(self.node.step(Written(save.number)))
        self._perform(self.node.step(Stored(save.snapshot.term.number, save.snapshot.clock)))

    def _report(self) -> None:
        """Parameters and optimizer state as they are; what is under way does not belong to them."""
        shard, memory, self.asked = self.machine, self.machine.memory, None
        state = Snapshot(shard.term, shard.incarnation, True, shard.clock, memory.version,
                         (memory.versions.current,), memory.slots)
        with self.tape.span("state"):
            self.mail.send(RUN, Standing(shard.number, freeze(state)))


# ── a worker ──────────────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class _Desk:
    """What a Client wants of a cluster."""

    k: Backend
    dtype: DType
    copied: Counter
    pushed: Traffic


class _Port:
    """A worker's mail. pushed: counts for the run, which hears of it before the next clock."""

    def __init__(self, mail: Mail, machine: Worker, pushed: Traffic):
        self.mail, self.patience, self.machine, self.pushed = mail, Patience(mail), machine, pushed
        self.messages: deque[Any] = deque()
        self.stopped = False
        self.shards = machine.term.shards

    def send(self, send: Send) -> None:
        if isinstance(send.message, Ready):
            machine, pushed = self.machine, self.pushed
            for removed in range(machine.term.shards, self.shards):
                self.mail.forget(shard_address(removed))
            self.shards = machine.term.shards
            self.mail.send(RUN, Sent(machine.number, machine.epoch, pushed.sent, pushed.dense, machine.again))
        self.mail.send(send.to, send.message)

    def receive(self, wait: bool = True) -> Any:
        while not self.messages and not self.stopped:
            found = self.mail.receive(self.patience.wait if wait else 0)
            for message in found:
                self.mail.tape.heard(message)
            self.messages += found
            if self.patience.is_over(found):
                self.messages.append(Timeout())
            if not wait:
                break
        if not self.messages and not self.stopped:
            return None
        if self.stopped or isinstance(self.messages[0], Stop):
            self.stopped = True  # for a program that calls again while it cleans up
            raise Stopped
        return self.messages.popleft()


def _work(order: Order, setup: Setup, mail: Mail) -> None:
    """Run the program."""
    number = order.address[1]
    # What it keeps is there for whoever does its work after its death.
    learners = Learners(setup, order.durability == "snapshot", shelves_of(order.folder, setup, order.computers))
    machine = Worker(number, order.epoch, setup, order.term, learners)
    desk = _Desk(setup.k, setup.dtype, Counter(), Traffic())
    run_to_end(order.program, TapedClient(mail.tape, desk, machine, _Port(mail, machine, desk.pushed)))
    while True:  # said again until the run has heard it, and ends this process
        mail.send(RUN, Returned(number))
        for message in mail.receive(PATIENCE[0]):
            mail.tape.heard(message)
            if isinstance(message, Stop):
                return
