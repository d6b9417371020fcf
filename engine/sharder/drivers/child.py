"""What runs in each process of the processes driver: one machine, its connections, and its files.

A child is told everything at its birth (Order), and then lives on messages alone. It may be killed at any moment: what
it has said is on record, or can be computed again. When the process that bore it is gone, which it sees by the end of a
pipe, it removes the run's folder and dies too.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backend import Backend, get_backend, set_num_threads
from engine.dtypes import DType
from engine.sharder.client import Client, Stopped, run_to_end
from engine.sharder.coordinator import Coordinator
from engine.sharder.drivers.files import Library, Store
from engine.sharder.drivers.frozen import Frozen, freeze
from engine.sharder.drivers.post import Post
from engine.sharder.encoding import WireError, declare
from engine.sharder.events import (
    COORDINATOR,
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
from engine.sharder.memory import Snapshot
from engine.sharder.messages import Restore, Term
from engine.sharder.setup import Setup, as_hyper
from engine.sharder.shard import Shard
from engine.sharder.versions import Counter, Traffic
from engine.sharder.wire import Hello, arithmetic
from engine.sharder.worker import Worker

RUN: Address = ("run", 0)  # the process that bore all others
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


for _number, _class in enumerate((Failed, Returned, Inspect, Standing, Stop), 65):
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
    let_go:      closes the run's connections in a forked child, lest they outlive the run; None if it has none
    """

    address: Address
    incarnation: int
    folder: Path
    secret: bytes
    recipe: Recipe
    term: Term
    epoch: int
    workers: int
    last: int | None
    durability: str
    program: Any
    threads: int
    let_go: Callable[[], None] | None


def live(order: Order, lifeline: Any, other_end: Any) -> None:
    """Be the machine that the order says. lifeline: ends when the run does; other_end: of it, to be closed here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its children
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if other_end is not None:
        other_end.close()
    if order.let_go is not None:
        order.let_go()
    threading.Thread(target=_watch, args=(lifeline, order.folder), daemon=True).start()
    kind, number = order.address
    setup = order.recipe.setup()
    set_num_threads(order.threads)
    post = Post(Hello(kind, number, order.incarnation, arithmetic(setup.k)), order.folder, order.secret)
    post.calls.add(RUN)
    try:
        if kind == "worker":
            _work(order, setup, post)
        else:
            _Server(order, setup, post).serve()
    except Stopped:
        pass
    except WireError as error:
        sys.exit(f"{kind} {number}: {error}")
    except BaseException as error:
        post.send(RUN, Failed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        post.flush(10)
        sys.exit(1)


def _watch(lifeline: Any, folder: Path) -> None:
    """Die with the run."""
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


class Patience:
    """When it is time to ask again: at a new connection, and when nothing has come for a while."""

    def __init__(self, post: Post):
        self.post = post
        self.wait = PATIENCE[0]
        self.heard = time.monotonic()

    def is_over(self, messages: list[Any]) -> bool:
        met, self.post.met = self.post.met, False
        if messages or self.post.stirred > self.heard or self.post.sending:
            self.wait, self.heard = PATIENCE[0], time.monotonic()
        elif not met and time.monotonic() - self.heard >= self.wait:
            self.wait, self.heard = min(2 * self.wait, PATIENCE[1]), time.monotonic()
            return True
        return met


# ── a shard, or the coordinator ───────────────────────────────────────────────────────────────────────

class _Server:
    """A machine with its storage."""

    def __init__(self, order: Order, setup: Setup, post: Post):
        self.post, self.address, self.library = post, order.address, Library(order.folder, setup)
        self.store = Store(order.folder, order.address, setup)
        kind, number = order.address
        self.machine: Any
        if kind == "coordinator":
            self.machine = Coordinator(setup, order.term, order.workers, order.last)
        else:
            post.calls.add(COORDINATOR)
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
        patience = Patience(self.post)
        while True:
            messages = self.post.receive(patience.wait)
            for message in messages:
                if isinstance(message, Inspect):
                    self.asked = message
                else:
                    self._perform(self.node.step(message))
            if patience.is_over(messages):
                self._perform(self.node.step(Timeout()))
            while (number := self.store.synchronise()) is not None:
                self._perform(self.node.step(Written(number)))
            if self.asked and self.machine.active and self.machine.clock >= self.asked.clocks:
                self._report()

    def _perform(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.post.send(action.to, action.message)
            elif isinstance(action, Append):
                self.store.append(action.number, action.record)
            elif isinstance(action, Save):
                self._save(action)
            elif isinstance(action, Load):
                loaded = Loaded(action.term, self.library.checkpoint(action.term.start))
                self._perform(self.node.step(loaded))
            else:
                self.post.send(RUN, action)

    def _save(self, save: Save) -> None:
        self.store.save(save.snapshot, save.number)
        if isinstance(self.node, Journal):
            self._perform(self.node.step(Written(save.number)))
        self._perform(self.node.step(Stored(save.snapshot.term.number, save.snapshot.clock)))

    def _report(self) -> None:
        """Parameters and optimizer state as they are; what is under way does not belong to them."""
        shard, memory, self.asked = self.machine, self.machine.memory, None
        state = Snapshot(shard.term, shard.incarnation, True, shard.clock, memory.version,
                         (memory.versions.current,), memory.slots)
        self.post.send(RUN, Standing(shard.number, freeze(state)))


# ── a worker ──────────────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class _Desk:
    """What a Client wants of a cluster."""

    k: Backend
    dtype: DType
    copied: Counter
    pushed: Traffic


class _Port:
    """A worker's connections."""

    def __init__(self, post: Post):
        self.post, self.patience = post, Patience(post)
        self.messages: deque[Any] = deque()
        self.stopped = False

    def send(self, send: Send) -> None:
        self.post.send(send.to, send.message)

    def receive(self) -> Any:
        while not self.messages and not self.stopped:
            found = self.post.receive(self.patience.wait)
            self.messages += found
            if self.patience.is_over(found):
                self.messages.append(Timeout())
        if self.stopped or isinstance(self.messages[0], Stop):
            self.stopped = True  # for a program that calls again while it cleans up
            raise Stopped
        return self.messages.popleft()


def _work(order: Order, setup: Setup, post: Post) -> None:
    """Run the program."""
    post.calls |= {COORDINATOR, *(shard_address(s) for s in range(order.term.shards))}
    number = order.address[1]
    machine = Worker(number, order.epoch, setup, order.term)
    desk = _Desk(setup.k, setup.dtype, Counter(), Traffic())
    run_to_end(order.program, Client(desk, machine, _Port(post)))
    while True:  # said again until the run has heard it, and ends this process
        post.send(RUN, Returned(number))
        if any(isinstance(message, Stop) for message in post.receive(PATIENCE[0])):
            return
