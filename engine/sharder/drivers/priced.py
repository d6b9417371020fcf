"""The simulator with costs: the same machines and messages, where bytes, additions and updates take their time.

    costs = Costs(push=(50e6,) * 2, pull=(50e6,) * 2, bandwidth=1.25e9, latency=50e-6, work=lambda *_: 0.2)
    simulation = PricedSimulation(costs, rule, workers=8, microbatches=8)
    history = simulation.run(gradient, clocks=20, seed=0, weather=PATIENT, checked=False)

A model of any size is stood for by one number a shard: what the protocol does is the same, and what a message would
weigh is in `costs`. The unit of virtual time is the second, and all durations come from here:

    a message of n bytes, to another node      n over its fair share of both links (network.py), then the latency
                          within a node        n / local
    a microbatch                               work(worker, clock, microbatch)
    its gradients leave                        during the last `overlap` of it, at a steady rate, or at its end
    a shard, one thing after the other         sum: a push; update: the rule (in ASP at each push)
    a disk, one thing after the other          fsync + bytes / disk: a batch of records, a snapshot, reading one

Deciding, asking and acknowledging take the latency alone. What a shard serves (pulls) does not wait for what it
computes: versions are immutable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from engine.sharder.drivers.faults import Weather
from engine.sharder.drivers.network import Flow, Network
from engine.sharder.drivers.run import Kept, Run
from engine.sharder.drivers.simulator import Simulation
from engine.sharder.events import Address, Loaded, Send, Written, worker_address
from engine.sharder.journal import Record
from engine.sharder.messages import Apply, Choose, Parameters, Push

NETWORK: Address = ("network", 0)
PATIENT = Weather(latency=(0, 0), timeout=inf)  # nothing is lost, so nobody asks again

Work = Callable[[int, int, int], float]
"""work(worker, clock, microbatch): seconds."""


@dataclass(frozen=True)
class Costs:
    """push, pull, snapshot: bytes, by shard      sum, update: seconds, by shard
    bandwidth, local, disk: bytes a second        latency, fsync: seconds
    node: the node on which a machine runs; by default each has one to itself
    """

    push: tuple[float, ...]
    pull: tuple[float, ...]
    work: Work
    snapshot: tuple[float, ...] = ()
    sum: tuple[float, ...] = ()
    update: tuple[float, ...] = ()
    bandwidth: float = inf
    local: float = inf
    latency: float = 0.0
    overlap: float = 0.0
    disk: float = inf
    fsync: float = 0.0
    node: Callable[[Address], int] | None = None


@dataclass(frozen=True)
class Arrived:
    """To a machine that may be busy: what it will come to."""

    event: Any = field(repr=False)


class _Tick:
    """To the network: a flow may have ended."""


@dataclass(frozen=True)
class _Streams:
    """To the network: a worker's next gradients begin to be there, at these bytes a second."""

    worker: int
    epoch: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class _Fails:
    """To the network: a node dies, with all that runs on it."""

    node: int


class PricedRun(Run):
    """sent, received: bytes that went through its link, by machine     updating: when a shard's rule ran"""

    def __init__(self, cluster: PricedSimulation, *arguments: Any):
        self.costs, self.setup = cluster.costs, cluster.setup
        self.network = Network(self.costs.bandwidth)
        self.streams: dict[tuple[int, int, int], Flow] = {}  # by worker, its epoch and shard: gradients in the making
        self.nodes_by_machine: dict[Address, int] = {}
        self.free: dict[Any, float] = {}  # when a machine, or a node's disk, has done what it was given so far
        self.sent: defaultdict[Address, float] = defaultdict(float)
        self.received: defaultdict[Address, float] = defaultdict(float)
        self.updating: list[tuple[float, float]] = []
        super().__init__(cluster, *arguments)
        for time, node in cluster.failures:
            self.schedule_at(time, NETWORK, _Fails(node))

    def node(self, address: Address) -> int:
        place = self.costs.node
        return place(address) if place else self.nodes_by_machine.setdefault(address, len(self.nodes_by_machine))

    # ── the network ─────────────────────────────────────────────────────────────────────────────────

    def weight(self, shard: int, message: Any) -> float:
        """The bytes of a message from or to a shard, or of a record."""
        if isinstance(message, Record):
            return self.weight(shard, message.event)
        return (self.costs.push[shard] if isinstance(message, Push)
                else self.costs.pull[shard] if isinstance(message, Parameters) else 0.0)

    def send(self, source: Address, send: Send) -> None:
        to, message = send.to, send.message
        shard = message.shard if isinstance(message, Parameters) else to[1]
        weight = self.weight(shard, message)
        here, there, now = self.node(source), self.node(to), self.history.time
        cargo = (now, source, to, message)
        flow = self.streams.pop((source[1], message.identity.epoch, shard), None) if isinstance(message, Push) else None
        if here == there or weight == 0 or self.costs.bandwidth == inf:
            self._deliver(cargo, self.costs.latency if here != there else weight / self.costs.local)
            return
        self.sent[source] += weight
        self.received[to] += weight
        if flow is None:
            flow = Flow(here, there, weight, cargo)
            self.network.begin(now, flow)
        elif flow not in self.network.flows:
            self._deliver(cargo, self.costs.latency)
            return
        else:
            flow.cargo = cargo
            self.network.release(now, flow)
        self._tick(now)

    def _deliver(self, cargo: tuple[float, Address, Address, Any], delay: float) -> None:
        left, source, to, message = cargo
        self.history.carried.append((left, self.history.time + delay, source, to, message))
        self.schedule(delay, to, Arrived(message) if self._service(to, message) else message)

    def _tick(self, time: float) -> None:
        """Look at the flows at this time, and not at the time that was planned."""
        self.incarnations[NETWORK] += 1
        if time < inf:
            self.schedule_at(time, NETWORK, _Tick(), self.incarnations[NETWORK])

    def _in_network(self, event: Any) -> None:
        now = self.history.time
        if isinstance(event, _Tick):
            for flow in self.network.ended(now):
                if flow.cargo is not None:
                    self._deliver(flow.cargo, self.costs.latency)
            self._tick(self.network.share())
        elif isinstance(event, _Fails):
            for address in [a for a, node in self.nodes.items() if node is not None and self.node(a) == event.node]:
                self.faults.crash(address)
            for key, flow in [(key, flow) for key, flow in self.streams.items() if flow.source == event.node]:
                del self.streams[key]
                self.network.drop(now, flow)
            self._tick(now)
        elif event.epoch == self.incarnations[worker_address(event.worker)]:
            here = self.node(worker_address(event.worker))
            for shard, rate in enumerate(event.rates):
                there = self.node(("shard", shard))
                if here != there and rate > 0:
                    flow = Flow(here, there, self.costs.push[shard], None, rate)
                    self.streams[event.worker, event.epoch, shard] = flow
                    self.network.begin(now, flow)
            self._tick(now)

    # ── what computes ───────────────────────────────────────────────────────────────────────────────

    def work(self, worker: int, clock: int, microbatch: int) -> float:
        seconds, overlap = self.costs.work(worker, clock, microbatch), self.costs.overlap
        if overlap and seconds and self.costs.bandwidth < inf:
            rates = tuple(weight / (overlap * seconds) for weight in self.costs.push)
            self.schedule((1 - overlap) * seconds, NETWORK,
                          _Streams(worker, self.incarnations[worker_address(worker)], rates))
        return seconds

    def _service(self, to: Address, event: Any) -> float:
        """How long a machine is busy with an event."""
        kind, shard = to
        if kind != "shard" or not self.costs.sum:
            return 0.0
        consistency = self.setup.consistency
        if isinstance(event, Push) and not consistency.backups:
            return self.costs.update[shard] if consistency.asynchronous else self.costs.sum[shard]
        if isinstance(event, Choose):
            return self.setup.needed * self.costs.sum[shard]
        return self.costs.update[shard] if isinstance(event, Apply) and not consistency.asynchronous else 0.0

    def _happen(self, to: Address, event: Any) -> None:
        if to == NETWORK:
            return self._in_network(event)
        if not isinstance(event, Arrived):
            return super()._happen(to, event)
        start = max(self.history.time, self.free.get((to, self.incarnations[to]), 0.0))
        end = self.free[to, self.incarnations[to]] = start + self._service(to, event.event)
        if isinstance(event.event, Apply):
            self.updating.append((start, end))
        return self.schedule_at(end, to, event.event, self.incarnations[to])

    # ── disks ───────────────────────────────────────────────────────────────────────────────────────

    def _to_disk(self, address: Address, answer: Any) -> None:
        weight, shard = 0.0, address[1]
        if isinstance(answer, Written):
            weight = sum(self.weight(shard, record.record) for record in self.disk(address).pending)
        elif isinstance(answer, (Kept, Loaded)) and self.costs.snapshot:
            weight = self.costs.snapshot[shard]
        disk = ("disk", self.node(address))
        start = max(self.history.time, self.free.get(disk, 0.0))
        end = self.free[disk] = start + self.costs.fsync + weight / self.costs.disk
        self.schedule_at(end, address, answer, self.incarnations[address])


class PricedSimulation(Simulation):
    """A Simulation of one number a shard. failures: (time, node): it dies then. last: the run that was made last."""

    def __init__(self, costs: Costs, rule: Any, *, failures: tuple[tuple[float, int], ...] = (), **arguments: Any):
        shards = len(costs.push)
        super().__init__({f"shard {s}": np.zeros(1, np.float32) for s in range(shards)}, rule, shards=shards,
                         device="reference", **arguments)
        self.costs, self.failures = costs, failures
        self.last: PricedRun | None = None

    def make_run(self, *arguments: Any) -> Run:
        self.last = PricedRun(self, *arguments)
        return self.last


def stand_in(parameters: Any, clock: int, microbatch: int) -> tuple[dict[str, np.ndarray], float, float]:
    """A gradient for machines that are only timed."""
    return {name: np.zeros_like(value) for name, value in parameters.items()}, 0.0, 1.0
