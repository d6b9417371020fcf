"""What the simulator says of a plan: how long a step takes, where the time goes, and what failures cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf
from statistics import fmean, median
from typing import Any

from engine.sharder.drivers.history import History
from engine.sharder.drivers.priced import PATIENT, PricedRun, PricedSimulation, stand_in
from engine.sharder.drivers.program import Computed
from engine.sharder.events import Address, shard_address, worker_address
from engine.sharder.messages import Begin, Parameters, Pushed
from tools.planning.cost_model import Plan

DAY = 86400.0
PARTS = ("compute", "push", "update", "pull", "waiting")
SIMULATED = 2  # clocks between two snapshots, at most, where deaths are simulated
DEATHS = 2  # of each kind of node


@dataclass(frozen=True)
class Prediction:
    """Seconds, bytes, and what they are of.

    step, p90, mean: of the time from one committed clock to the next
    parts:     of a worker's step in the mean, by what it does or waits for
    pushed, pulled: bytes through a worker's link each step; received, served: through the link of the busiest shard
    memory:    bytes, of a worker and of the largest shard, by what it holds
    lost:      seconds a day, by kind of node       rate: tokens, or microbatches, a second, failures included
    """

    plan: Plan
    step: float
    p90: float
    mean: float
    parts: dict[str, float]
    pushed: float
    pulled: float
    received: float
    served: float
    memory: dict[str, dict[str, float]]
    lost: dict[str, float] = field(default_factory=dict)

    @property
    def lost_a_day(self) -> float:
        return min(DAY, sum(self.lost.values()))

    @property
    def rate(self) -> float:
        applied = self.plan.microbatches - self.plan.backups
        return applied * (self.plan.tokens or 1) / self.mean * (1 - self.lost_a_day / DAY) if self.mean else inf

    def asdict(self) -> dict[str, Any]:
        return {**asdict(self), "lost_a_day": self.lost_a_day, "rate": self.rate}


def predict(plan: Plan, clocks: int = 20, seed: int = 0) -> Prediction:
    """Simulate so many steps, and deaths if nodes die."""
    run, history = simulate(plan.simulation(seed), clocks, seed)
    times = sorted(b - a for a, b in zip(history.committed_at, history.committed_at[1:]))
    shards = [shard_address(s) for s in range(plan.shards)]
    workers = [worker_address(w) for w in range(plan.workers)]

    def a_step(counter: Mapping[Address, float], machines: list[Address]) -> list[float]:
        return [counter[machine] / clocks for machine in machines]

    return Prediction(
        plan, median(times), times[int(0.9 * len(times))], fmean(times), parts_of(history, run.updating),
        fmean(a_step(run.sent, workers)), fmean(a_step(run.received, workers)),
        max(a_step(run.received, shards)), max(a_step(run.sent, shards)), plan.memory_bytes(),
        losses(plan, fmean(times), seed) if plan.mtbf < inf else {})


def simulate(simulation: PricedSimulation, clocks: int, seed: int, timeout: float = inf, restart: float = 0.0
             ) -> tuple[PricedRun, History]:
    weather = replace(PATIENT, timeout=timeout, absence=restart)
    asynchronous = simulation.setup.consistency.asynchronous
    history = simulation.run(stand_in, clocks, seed, weather, limit=inf, checked=False,
                             stride=clocks if asynchronous else 1)
    assert simulation.last is not None
    return simulation.last, history


# ── where the time goes ───────────────────────────────────────────────────────────────────────────────

@dataclass
class _Clock:
    """What a worker has done since a clock began for it."""

    begin: float
    pulled: float = 0.0
    computed: float = 0.0
    acknowledged: float = 0.0


def parts_of(history: History, updating: Iterable[tuple[float, float]]) -> dict[str, float]:
    """The mean step of a worker, from one Begin to the next. From the last gradient on it waits: for its own pushes to
    be acknowledged, then for what shards update, and for the others."""
    parts, count, updates = dict.fromkeys(PARTS, 0.0), 0, _union(updating)
    running: dict[int, _Clock] = {}
    begun: dict[int, int] = defaultdict(int)
    for time, (kind, worker), event, _ in history.events:
        if kind != "worker":
            continue
        if isinstance(event, Begin):
            begun[worker] += 1
            if begun[worker] > 2:  # the first clock is not like the others
                count += 1
                for name, seconds in _split(running[worker], time, updates).items():
                    parts[name] += seconds
            running[worker] = _Clock(time, time, time, time)
        elif worker in running:
            clock = running[worker]
            if isinstance(event, Parameters):
                clock.pulled = time
            elif isinstance(event, Computed):
                clock.computed = time
            elif isinstance(event, Pushed):
                clock.acknowledged = time
    return {name: seconds / max(1, count) for name, seconds in parts.items()}


def _split(clock: _Clock, end: float, updates: list[tuple[float, float]]) -> dict[str, float]:
    pushed = min(max(clock.acknowledged, clock.computed), end)
    update = sum(max(0.0, min(stop, end) - max(start, pushed)) for start, stop in updates)
    return {"pull": clock.pulled - clock.begin, "compute": clock.computed - clock.pulled,
            "push": pushed - clock.computed, "update": update, "waiting": end - pushed - update}


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that overlap or touch made one."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────

def losses(plan: Plan, step: float, seed: int) -> dict[str, float]:
    """Seconds lost a day to deaths of each kind of node. step: the mean one."""
    every = min(plan.snapshot_every, SIMULATED)
    clocks, timeout = 3 * every, plan.timeout or 10 * step
    _, calm = simulate(plan.simulation(seed, every), clocks, seed, timeout, plan.restart)
    first, last = calm.committed_at[every - 1], calm.committed_at[2 * every - 1]
    lost = {}
    for kind, nodes in plan.nodes().items():
        costs = []
        for i in range(DEATHS):
            time = first + (last - first) * (i + 0.5) / DEATHS
            dying = plan.simulation(seed, every, ((time, nodes[i % len(nodes)]),))
            _, history = simulate(dying, clocks, seed, timeout, plan.restart)
            costs.append(history.committed_at[-1] - calm.committed_at[-1])
        beyond = _beyond(plan, plan.snapshot_every - every, step) if kind == "shard" else 0.0
        lost[kind] = len(nodes) * DAY / plan.mtbf * max(0.0, fmean(costs) + beyond)
    return lost


def _beyond(plan: Plan, extra: int, step: float) -> float:
    """What the death of a shard costs more when snapshots are `extra` clocks further apart than simulated."""
    if plan.kept == "snapshot":
        return extra / 2 * step
    if plan.kept == "log":
        costs = plan.costs(0)
        return extra / 2 * max(plan.microbatches * (push / plan.disk + add) + update
                               for push, add, update in zip(costs.push, costs.sum, costs.update))
    return 0.0


# ── the best of several ───────────────────────────────────────────────────────────────────────────────

WORTH = 0.01  # a faster plan with more shards is better if it gains more than this


def scan(plan: Plan, shards: Iterable[int], clocks: int = 20, seed: int = 0) -> list[Prediction]:
    return [predict(plan.with_(shards=s), clocks, seed) for s in shards]


def best(predictions: list[Prediction]) -> Prediction:
    """The one with the fewest shards among those within WORTH of the fastest."""
    fastest = max(p.rate for p in predictions)
    return min((p for p in predictions if p.rate >= (1 - WORTH) * fastest), key=lambda p: p.plan.shards)
