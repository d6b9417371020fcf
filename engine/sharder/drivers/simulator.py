"""The driver without a clock: virtual time, a network that loses, repeats and reorders, workers that stall and die.

    simulation = Simulation(parameters, rule, shards=3, workers=2, microbatches=4)
    history = simulation.run(gradient, clocks=5, seed=7, weather=Weather(loss=0.1, duplication=0.1))

One event at a time, in the order of virtual time; all chance comes from the seed. So one seed is one history, and
its log is the same to the byte each time: a failure found once can be looked at for ever. Invariants are checked
after every event (invariants.py). The idea is FoundationDB's: test the protocol, not the machine it runs on.

A worker's program is a function, since the simulator has no threads:
gradient(parameters, clock, microbatch) -> (gradients of the loss sum, loss sum, tokens), name -> NumPy array both ways.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from engine.sharder.binding import flat_gradients
from engine.sharder.cluster import Cluster
from engine.sharder.drivers.invariants import Invariants, Oracle, Violated
from engine.sharder.events import (
    COORDINATOR,
    Address,
    Began,
    ClockRequested,
    Committed,
    Finish,
    Proceed,
    Pulled,
    PullRequested,
    PushRequested,
    Send,
    Timeout,
    shard_address,
    worker_address,
)
from engine.sharder.messages import Message, Parameters, Push, Reduced
from engine.sharder.partition import Partition
from engine.sharder.versions import assemble

Values = Mapping[str, np.ndarray]
Gradient = Callable[[Values, int, int], "tuple[Values, float, float]"]

FAULTS = ("lose", "repeat", "delay", "crash")


@dataclass(frozen=True)
class Weather:
    """What the network and the machines are like. Times are in units of virtual time.

    latency:  shortest and longest way of a message; a spread reorders
    loss, duplication: the probability that a message gets lost, and that it arrives twice
    work:     a microbatch takes this long, and `stall` times as long with probability `stalling`
    crashing: the probability, at each event of a worker, that it dies; it comes back after `absence`
    timeout:  who waits asks again this often
    """

    latency: tuple[int, int] = (1, 10)
    loss: float = 0.0
    duplication: float = 0.0
    work: int = 5
    stalling: float = 0.0
    stall: int = 20
    crashing: float = 0.0
    absence: int = 40
    timeout: int = 60


@dataclass
class History:
    """What happened: the committed clocks, one line an event, and how often each fault struck."""

    committed: list[Committed] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    time: int = 0


@dataclass(frozen=True)
class _Computed:
    """To a worker's program: it has had the time to compute its next microbatch."""


@dataclass(frozen=True)
class _Restart:
    """To a dead worker: it comes back."""


class Simulation(Cluster):
    """A cluster whose shards share nothing; the arguments are Cluster's."""

    shared = False

    def run(self, gradient: Gradient, clocks: int, seed: int, weather: Weather = Weather(),
            faults: Iterable[tuple[int, str]] = (), oracle: Oracle | None = None, limit: int = 100_000) -> History:
        """Train for `clocks` clocks in virtual time.

        faults: besides the weather's, (n, "lose" | "repeat" | "delay" | "crash") strikes event number n. The first
                three strike messages only; a crash kills the worker the event is for, or else worker n mod workers.
        oracle: version -> the parameters that plain training has then; every shard is held to its bits.
        Raises Violated when an invariant is broken, and when training has not ended by time `limit`.
        """
        try:
            return _Run(self, gradient, self.clock + clocks, seed, weather, faults, oracle).to_the_end(limit)
        finally:
            self.active = False


class _Run:
    def __init__(self, cluster: Simulation, gradient: Gradient, last: int, seed: int, weather: Weather,
                 faults: Iterable[tuple[int, str]], oracle: Oracle | None):
        self.cluster, self.gradient, self.last, self.weather = cluster, gradient, last, weather
        self.random = Random(seed)
        self.faults = dict(faults)
        self.history = History()
        self.events: list[tuple[int, int, Address, int, Any]] = []  # (time, order, to, incarnation, event)
        self.scheduled = 0
        self.coordinator, self.shards, self.workers = cluster.start()
        self.programs = [_Program(self, w.number) for w in self.workers]
        self.alive = [True] * len(self.workers)
        self.invariants = Invariants(self, oracle)
        for address in (COORDINATOR, *(shard_address(s.number) for s in self.shards)):
            self.schedule(weather.timeout, address, Timeout())
        for worker in self.workers:
            self.born(worker.number)
        self.schedule(0, COORDINATOR, self.next_command())

    # ── the future ──────────────────────────────────────────────────────────────────────────────────

    def schedule(self, delay: int, to: Address, event: Any, incarnation: int = -1) -> None:
        """An event to come; one that is for a certain incarnation of a worker is void when that is dead."""
        self.scheduled += 1
        heapq.heappush(self.events, (self.history.time + delay, self.scheduled, to, incarnation, event))

    def send(self, send: Send) -> None:
        copies = 1
        if self.random.random() < self.weather.loss:
            self.history.faults["lose"] += 1
            copies = 0
        elif self.random.random() < self.weather.duplication:
            self.history.faults["repeat"] += 1
            copies = 2
        for _ in range(copies):
            self.schedule(self.random.randint(*self.weather.latency), send.to, send.message)

    def next_command(self) -> Any:
        return Proceed() if self.coordinator.clock < self.last else Finish()

    # ── the present ─────────────────────────────────────────────────────────────────────────────────

    def to_the_end(self, limit: int) -> History:
        number = 0
        while not all(worker.ended for worker in self.workers):
            self.history.time, _, to, incarnation, event = heapq.heappop(self.events)
            if self.history.time > limit:
                raise Violated(f"training has not ended by virtual time {limit}", self.history.log)
            if incarnation not in (-1, self.incarnation(to)):
                continue
            number += 1
            self.history.log.append(f"{self.history.time} {to[0]} {to[1]} {describe(event, self.cluster.partition)}")
            if not self.struck(number, to, event):
                self.happen(to, event)
            self.invariants.check()
        return self.history

    def incarnation(self, address: Address) -> int:
        return self.workers[address[1]].epoch if address[0] == "worker" else -1

    def struck(self, number: int, to: Address, event: Any) -> bool:
        """Whether a fault keeps this event from happening (now)."""
        fault = self.faults.get(number, "")
        if not fault and to[0] == "worker" and self.random.random() < self.weather.crashing:
            fault = "crash"
        if fault == "crash":
            return self.crash(to[1] if to[0] == "worker" else number % len(self.workers)) and to[0] == "worker"
        if not fault or not isinstance(event, Message):
            return False
        self.history.faults[fault] += 1
        self.history.log[-1] += f" [{fault}]"
        if fault != "lose":
            self.schedule(2 * self.weather.timeout, to, event)
        return fault != "repeat"

    def happen(self, to: Address, event: Any) -> None:
        kind, number = to
        if isinstance(event, Timeout):
            self.schedule(self.weather.timeout, to, event, self.incarnation(to))
        if kind == "worker":
            if isinstance(event, _Restart):
                self.born(number)
            elif self.alive[number]:
                self.programs[number].react(event)
            return
        machine = self.coordinator if kind == "coordinator" else self.shards[number]
        for action in machine.step(event):
            if isinstance(action, Send):
                self.send(action)
            else:
                self.history.committed.append(action)
                self.schedule(0, COORDINATOR, self.next_command())

    # ── life and death of workers ───────────────────────────────────────────────────────────────────

    def born(self, number: int) -> None:
        self.alive[number] = True
        self.schedule(0, worker_address(number), ClockRequested(), self.workers[number].epoch)
        self.schedule(self.weather.timeout, worker_address(number), Timeout(), self.workers[number].epoch)

    def crash(self, number: int) -> bool:
        """Kill a worker: its memory is gone, what it sent is on its way. False if it was dead or done already."""
        worker = self.workers[number]
        if not self.alive[number] or worker.ended:
            return False
        self.history.faults["crash"] += 1
        self.history.log[-1] += f" [worker {number} dies]"
        self.alive[number] = False
        self.workers[number] = self.cluster.make_worker(number, worker.epoch + 1)
        self.cluster.epoch = max(self.cluster.epoch, worker.epoch + 1)
        self.programs[number] = _Program(self, number)
        self.schedule(self.weather.absence, worker_address(number), _Restart(), worker.epoch + 1)
        return True


class _Program:
    """What the program of a worker would do: clock, pull, compute and push each microbatch, clock ..."""

    def __init__(self, run: _Run, number: int):
        self.run, self.worker = run, run.workers[number]
        self.parameters: Values = {}
        self.queue: list[int] = []

    def react(self, event: Any) -> None:
        cluster, worker = self.run.cluster, self.worker
        if isinstance(event, _Computed):
            index = self.queue.pop(0)
            gradients, loss, tokens = self.run.gradient(self.parameters, worker.clock, index)
            flat = flat_gradients(cluster.partition, cluster.dtype, gradients, cluster.copied)
            self.perform(worker.step(PushRequested(index, flat, loss, tokens)))
            self.compute_or_go_on()
        else:
            self.perform(worker.step(event))

    def perform(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.run.send(action)
            elif isinstance(action, Began):
                self.queue = list(action.microbatches)
                self.perform(self.worker.step(PullRequested()))
            elif isinstance(action, Pulled):
                self.run.invariants.pulled(self.worker, action)
                cluster = self.run.cluster
                self.parameters = assemble(cluster.partition, action.values, cluster.k, cluster.copied)
                self.compute_or_go_on()

    def compute_or_go_on(self) -> None:
        if not self.queue:
            return self.perform(self.worker.step(ClockRequested()))
        weather = self.run.weather
        slow = self.run.random.random() < weather.stalling
        delay = weather.work * (weather.stall if slow else 1)
        self.run.schedule(delay, worker_address(self.worker.number), _Computed(), self.worker.epoch)


def describe(event: Any, partition: Partition) -> str:
    """The event in one line, with a checksum of the arrays it carries."""
    arrays: list[np.ndarray] = []
    if isinstance(event, Push):
        arrays = [gradient.data for gradient in event.gradients]
    elif isinstance(event, Parameters):
        arrays = [event.values.read(piece) for piece in partition.pieces[event.shard]]
    elif isinstance(event, Reduced):
        arrays = [event.squares]
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"{event!r} {checksum:08x}" if arrays else repr(event)
