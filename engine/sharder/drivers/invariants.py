"""What must hold after every event of a simulated history, whatever fails.

1. All or none. A shard is at the coordinator's clock, or one ahead when that clock is decided; a clock is decided only
   when every shard has summed all of it.
2. Nothing that was said is taken back. Whatever a shard has told anybody it has done, it has done, after any crash.
3. No mixtures. The microbatches of a clock are computed on one version, at most `staleness` old; a later clock's is not
   older; a worker gets exactly that version of every shard. In ASP what it reads never goes back.
4. Parameters that somebody holds never change.
5. The bits. At every version every shard holds the parameters and optimizer state of plain training (plain.py) along
   the same course; in ASP, of a loop over the pushes in the order in which this shard took them. This includes that
   each microbatch counts exactly once, in the order of the tree.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from engine.sharder.drivers.history import History
from engine.sharder.drivers.ledger import Ledger
from engine.sharder.events import COORDINATOR, Address, Pulled, Received, Send
from engine.sharder.memory import Checkpoint
from engine.sharder.messages import Applied, Begin
from engine.sharder.shard import Shard
from engine.sharder.versions import Version
from engine.sharder.worker import Worker

if TYPE_CHECKING:
    from engine.sharder.drivers.plain import Plain
    from engine.sharder.drivers.run import Run


class Violated(AssertionError):
    """An invariant is broken; the message ends with the last events of the history."""

    def __init__(self, what: str, history: History):
        super().__init__("\n  ".join([what, f"the last of {len(history.events)} events:", *history.tail(16)]))


class Invariants:
    """Watches one run: check() after each event, said() at each message of a shard, pulled() at each completed pull,
    received() at each part of one that comes late."""

    def __init__(self, run: Run, plain: Plain):
        self.run, self.plain, self.setup = run, plain, run.cluster.setup
        self.asynchronous = self.setup.consistency.asynchronous
        self.course: list[tuple[int, tuple[int, ...]]] = []
        self.ledger = Ledger(self.setup, plain.origin, self.require)
        self.seen: dict[int, tuple[Shard, int, int, int]] = {}  # by shard: machine, term, clock, version
        self.promised: dict[int, tuple[int, int]] = {}  # by shard: term and clock
        self.begun: dict[tuple[int, int], int] = {}  # by term and clock: the version it is computed on
        self.read: dict[tuple[int, int, int, int], int] = {}  # by worker, epoch, term, shard: the newest version
        self.held: dict[int, tuple[Version, ...]] = {}  # by worker: what it pulled last
        self.checksums: dict[int, tuple[Version, int]] = {}  # by id: each version that somebody holds

    def require(self, holds: bool, what: str, *values: Any) -> None:
        if not holds:
            raise Violated(what.format(*values), self.run.history)

    def check(self, to: Address, event: Any) -> None:
        """Of what this event can have changed: the machine it was for, and what others have of it."""
        if to == COORDINATOR:
            for shard in self.run.shards():
                if shard is not None and shard.active:
                    self._check_clock(shard)
        elif to[0] == "shard":
            shard = self.run.machine(to)
            if shard is not None and shard.active:
                self._check_clock(shard)
                self._check_shard(shard, event)
            for version, checksum in self.checksums.values():
                if _checksum(version) != checksum:
                    self.require(False, "parameters of version {} have changed while workers hold them", version.number)

    # ── shards ──────────────────────────────────────────────────────────────────────────────────────

    def _check_shard(self, shard: Shard, event: Any) -> None:
        assert shard.term is not None
        number, term, clock, version = shard.number, shard.term, shard.clock, shard.memory.version
        machine, *before = self.seen.get(number, (None, -1, -1, -1))
        if machine is shard and before == [term.number, clock, version]:
            return
        self.seen[number] = shard, term.number, clock, version
        self.require((term.number, clock) >= self.promised.get(number, (-1, -1)),
                     "shard {} is at term {}, clock {}, and had told of {}", number, term.number, clock,
                     self.promised.get(number))
        if machine is shard and before[0] == term.number:
            self.require(before[1] <= clock <= before[1] + 1 and before[2] <= version <= before[2] + 1,
                         "shard {} went from clock {} and version {} to {} and {}", number, *before[1:], clock, version)
        self.require(shard.memory.versions.current.number == version, "shard {} shows version {} at {}", number,
                     shard.memory.versions.current.number, version)
        if self.asynchronous:
            self.ledger.check(shard, event)
        else:
            self.compare(shard, self.expected(clock), clock)

    def _check_clock(self, shard: Shard) -> None:
        coordinator, clock = self.run.coordinator, shard.clock
        if shard.term != coordinator.term or coordinator.restoring:
            return
        running = coordinator.clocks.get(coordinator.clock)
        decided = running is not None and running.decision is not None
        self.require(clock == coordinator.clock or (clock == coordinator.clock + 1 and decided),
                     "shard {} is at clock {} while the coordinator is at {}", shard.number, clock, coordinator.clock)
        if decided and clock == coordinator.clock:
            gathering = shard.gatherings.get(clock)
            self.require(gathering is not None and gathering.reduced is not None,
                         "clock {} was decided while shard {} had not all of it", clock, shard.number)

    def expected(self, clock: int) -> Checkpoint:
        """What plain training has along the course so far, which the coordinator decides clock by clock."""
        length = clock - self.run.first
        if length > len(self.course):
            running = self.run.coordinator.clocks[clock - 1]
            self.course.append((running.version, running.chosen or tuple(range(self.setup.microbatches))))
        return self.plain.after(tuple(self.course[:length]))

    def compare(self, shard: Shard, expected: Checkpoint, version: int) -> None:
        """Hold parameters and optimizer state of a shard against a checkpoint."""
        current = shard.memory.versions.current
        for i, piece in enumerate(shard.pieces):
            name = piece.parameter.name
            kinds = [("parameters", expected.parameters, current.read(piece))]
            kinds += [(slot, saved, shard.memory.slots[slot][i].data)
                      for slot, saved in expected.slots.items() if saved]
            for kind, saved, own in kinds:
                right = saved[name].reshape(-1)[piece.start:piece.stop]
                self.require(right.tobytes() == own.tobytes(), "shard {}, version {}: {}/{} has other bits than plain "
                             "training", shard.number, version, kind, name)

    def said(self, source: Address, send: Send) -> None:
        """A shard tells the coordinator that it has applied a clock."""
        if isinstance(send.message, Applied):
            applied = send.message
            self.promised[source[1]] = max(self.promised.get(source[1], (-1, -1)), (applied.term, applied.clock + 1))

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────

    def pulled(self, worker: Worker, pulled: Pulled) -> None:
        begun, numbers = worker.begun, [version.number for version in pulled.values]
        assert begun is not None
        self._hold(worker, pulled.values)
        if self.asynchronous:
            for shard, number in enumerate(numbers):
                key = worker.number, worker.epoch, worker.term.number, shard
                self.require(number >= self.read.get(key, 0), "worker {} read version {} of shard {} after {}",
                             worker.number, number, shard, self.read.get(key))
                self.read[key] = number
            return
        self.require(len(set(numbers)) == 1, "worker {} pulled a mixture of versions {}", worker.number, numbers)
        if begun.term == worker.term:
            self._check_version(worker, begun, numbers[0])

    def received(self, worker: Worker, received: Received) -> None:
        """One shard's part of the parameters: of the version of the clock, while that may count."""
        begun = worker.begun
        assert begun is not None
        self._hold(worker, (received.values,))
        if begun.term == worker.term:
            self._check_version(worker, begun, received.values.number)

    def _hold(self, worker: Worker, values: tuple[Version, ...]) -> None:
        """From here on the worker holds these instead; of versions that nobody holds any more nothing is asked."""
        self.held[worker.number] = values
        versions = {id(version): version for held in self.held.values() for version in held}
        self.checksums = {key: self.checksums.get(key) or (version, _checksum(version))
                          for key, version in versions.items()}

    def _check_version(self, worker: Worker, begun: Begin, number: int) -> None:
        term, clock, version = begun.term.number, begun.clock, begun.version
        self.require(clock - self.setup.consistency.staleness <= version <= clock, "clock {} was begun on version {}",
                     clock, version)
        self.require(self.begun.setdefault((term, clock), version) == version,
                     "clock {} is computed on versions {} and {}", clock, self.begun[term, clock], version)
        earlier = [v for (t, c), v in self.begun.items() if t == term and c < clock]
        self.require(not earlier or max(earlier) <= version, "clock {} is computed on version {}, an earlier one on {}",
                     clock, version, max(earlier, default=0))
        coordinator = self.run.coordinator
        over = coordinator.term != begun.term or any(  # a shard that has applied it has said so, and may be dead by now
            known > (term, clock) for known in self.promised.values())
        self.require(number == version or over, "worker {} pulled version {} for clock {}, which is computed on {}",
                     worker.number, number, clock, version)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────

    def check_end(self) -> None:
        """Every clock was committed, once; and the parameters are what they must be after them."""
        run = self.run
        clocks = [committed.clock for committed in run.history.committed]
        if run.stride == 1:
            self.require(clocks == list(range(run.first, run.last)), "the committed clocks are {}", clocks)
        if self.asynchronous:
            self.ledger.check_end(run.shards(), run.last)


def _checksum(version: Version) -> int:
    return zlib.crc32(version.flat.data.data)
