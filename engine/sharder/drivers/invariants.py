"""What must hold after every event of a simulated history, whatever the network does.

1. A version only grows; no shard is more than one ahead of another; the coordinator counts a clock only when every
   shard has done it.
2. The decision to apply a clock is taken only when every shard holds all of it: all shards update, or none.
3. A pull gives one version, on every shard, not older than the clock it is for, nor than what the worker saw before;
   and a worker goes from clock to later clock.
4. Parameters that somebody holds never change.
5. With an oracle: at every version, every shard holds the bits that plain training has. This includes that each
   microbatch was applied exactly once, and summed in the order of the tree.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.sharder.events import Pulled
from engine.sharder.versions import Version
from engine.sharder.worker import Worker

if TYPE_CHECKING:
    from engine.sharder.drivers.simulator import _Run

Oracle = Callable[[int], Mapping[str, np.ndarray]]


class Violated(AssertionError):
    """An invariant is broken; the message ends with the last events of the history."""

    def __init__(self, what: str, log: list[str]):
        super().__init__("\n  ".join([what, f"the last of {len(log)} events:", *log[-12:]]))


class Invariants:
    """Watches one run; check() after each event, pulled() at each completed pull."""

    def __init__(self, run: _Run, oracle: Oracle | None):
        self.run, self.oracle = run, oracle
        self.versions = [-1] * len(run.shards)
        self.seen: dict[tuple[int, int], tuple[int, int]] = {}  # by worker and epoch: its last clock and version
        self.held: dict[int, tuple[tuple[Version, ...], int]] = {}  # by worker: what it pulled last, and its checksum

    def require(self, holds: bool, what: str, *values: Any) -> None:
        if not holds:
            raise Violated(what.format(*values), self.run.history.log)

    def check(self) -> None:
        clock, decision = self.run.coordinator.clock, self.run.coordinator.decision
        versions = [shard.version for shard in self.run.shards]
        for number, (shard, before) in enumerate(zip(self.run.shards, self.versions)):
            version = versions[number]
            self.require(version in (before, before + 1) or before == -1, "shard {} went from version {} to {}", number,
                         before, version)
            self.require(version == clock or (version == clock + 1 and decision is not None),
                         "shard {} is at version {} while the coordinator is at clock {}", number, version, clock)
            self.require(decision is None or version > clock or shard.accumulator.complete,
                         "clock {} was decided while shard {} had not all of it", clock, number)
            if version != before and self.oracle:
                self.compare(number, version)
        self.versions = versions
        for worker, (values, checksum) in self.held.items():
            self.require(_checksum(values) == checksum, "the parameters that worker {} holds have changed", worker)

    def compare(self, number: int, version: int) -> None:
        assert self.oracle is not None
        expected, current = self.oracle(version), self.run.shards[number].memory.versions.current
        self.require(current.number == version, "shard {} shows version {} at {}", number, current.number, version)
        for piece in self.run.cluster.partition.pieces[number]:
            whole = np.ascontiguousarray(expected[piece.parameter.name]).reshape(-1)
            same = whole[piece.start:piece.stop].tobytes() == current.read(piece).tobytes()
            self.require(same, "shard {}, version {}: {!r} has other bits than plain training", number, version,
                         piece.parameter.name)

    def pulled(self, worker: Worker, pulled: Pulled) -> None:
        numbers = [version.number for version in pulled.values]
        self.require(len(set(numbers)) == 1, "worker {} pulled a mixture of versions {}", worker.number, numbers)
        clock, version = self.seen.get((worker.number, worker.epoch), (-1, 0))
        self.require(worker.clock > clock, "worker {} began clock {} after {}", worker.number, worker.clock, clock)
        self.require(numbers[0] >= max(worker.clock, version), "worker {} pulled version {} for clock {}, after {}",
                     worker.number, numbers[0], worker.clock, version)
        self.seen[worker.number, worker.epoch] = worker.clock, numbers[0]
        self.held[worker.number] = pulled.values, _checksum(pulled.values)


def _checksum(values: tuple[Version, ...]) -> int:
    checksum = 0
    for version in values:
        checksum = zlib.crc32(version.flat.data.tobytes(), checksum)
    return checksum
