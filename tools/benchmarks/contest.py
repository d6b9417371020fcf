"""Contestants that take turns, A B C A B C ..., so that a machine whose speed changes is fair to all of them.

Each turn is a pause, until the threads of the one before have stopped spinning (OpenBLAS's go on for a tenth of a
second), untimed calls, which bring back caches and sleeping threads, and then as many timed calls as fill TURN_SECONDS.
The machine takes turns as well: what it can do is measured as often as what is done with it. What is reported is the
median over the turns and the spread from the 10th to the 90th percentile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

TURN_SECONDS = 0.01
TIMES = {"ms": 1e3, "µs": 1e6}  # units of time, in a second
WARM_SECONDS = 0.002  # of untimed calls, and at least one
QUIET_SECONDS = 0.02  # in which next to nothing may run, and
PATIENCE_SECONDS = 1.0  # how long to wait for that
OURS = "engine"
EAGER = "engine, eager"  # ours as well: what is not captured (eg.capture)


@dataclass(frozen=True)
class Machine:
    """What this machine can do with so many threads: float32 flops/s, and bytes/s of reading and of copying."""

    threads: int
    peak: float
    read: float
    copy: float


Probe = Callable[[], float]
"""Measures the machine once: flops/s or bytes/s."""


@dataclass
class Contest:
    """One row of a table: the same work done by each contestant.

    flops, bytes: what the work needs at least; bytes/bandwidth is its bound if they come from memory, else flops/peak
    work, unit:   what the table shows: `work` units a second, or the time itself where the unit is one
    streams:      whether the bytes come from memory: they do not where they stay in the caches
    """

    name: str
    contestants: dict[str, Callable[[], object]]
    flops: float = 0.0
    bytes: float = 0.0
    work: float = 0.0
    unit: str = "ms"
    streams: bool = True

    @property
    def limited_by_flops(self) -> bool:
        """Whether the bound is flops/peak; else it is bytes/bandwidth, of bytes that come from memory."""
        return not (self.streams and self.bytes)


@dataclass
class Result:
    """Seconds a call, of each turn of each contestant; and of each turn the least seconds that the machine allows."""

    contest: Contest
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bounds: list[float] = field(default_factory=list)

    def quantile(self, who: str, q: float) -> float:
        return float(np.quantile(self.seconds[who], q))

    def median(self, who: str) -> float:
        return self.quantile(who, 0.5)

    def shown(self, who: str, q: float = 0.5) -> float:
        """What the table shows: units a second, or the time."""
        seconds, unit = self.quantile(who, q), self.contest.unit
        return seconds * TIMES[unit] if unit in TIMES else self.contest.work / seconds

    @property
    def best_peer(self) -> str | None:
        peers = [who for who in self.seconds if who not in (OURS, EAGER)]
        return min(peers, key=self.median) if peers else None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best peer: the median of the turns' own ratios."""
        return self.times(self.best_peer)

    def times(self, who: str | None) -> float | None:
        """How many times as fast as this one, or None where it or we did not take part."""
        if who not in self.seconds or OURS not in self.seconds:
            return None
        return float(np.median(np.array(self.seconds[who]) / np.array(self.seconds[OURS])))

    @property
    def of_bound(self) -> float | None:
        """Which share of the machine's limit we reach, turn by turn."""
        return float(np.median(np.array(self.bounds) / np.array(self.seconds[OURS]))) if self.bounds else None

    def line(self) -> str:
        """The medians in one line."""
        return f"{self.contest.name}: " + ", ".join(f"{who} {self.shown(who):.4g}" for who in self.seconds)


def wait_until_quiet() -> None:
    """Sleep until no thread of this process runs: one that spins holds up whoever is measured next."""
    patience = time.perf_counter() + PATIENCE_SECONDS
    while time.perf_counter() < patience:
        used = time.process_time()
        time.sleep(QUIET_SECONDS)
        if time.process_time() - used < QUIET_SECONDS / 10:
            return


def take_turn(run: Callable[[], object], calls: int) -> float:
    """Seconds a call, of so many calls in a row; before them a pause and calls that are not timed."""
    wait_until_quiet()
    warm = time.perf_counter() + WARM_SECONDS
    run()
    while time.perf_counter() < warm:
        run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def calls_a_turn(run: Callable[[], object]) -> int:
    return max(1, int(TURN_SECONDS / max(take_turn(run, 1), 1e-9)))


def measure(contest: Contest, seconds: float, probes: tuple[Probe, Probe], least_turns: int = 5) -> Result:
    """Let the contestants take turns for about `seconds`, and for at least `least_turns` turns each.

    probes: of the peak and of the copy bandwidth
    """
    calls = {who: calls_a_turn(run) for who, run in contest.contestants.items()}
    result = Result(contest, {who: [] for who in calls})
    need, probe = (contest.flops, probes[0]) if contest.limited_by_flops else (contest.bytes, probes[1])
    stop, turns = time.perf_counter() + seconds, 0
    while turns < least_turns or time.perf_counter() < stop:
        turns += 1
        for who, run in contest.contestants.items():
            result.seconds[who].append(take_turn(run, calls[who]))
        if need:
            wait_until_quiet()
            result.bounds.append(need / probe())
    return result
