"""Simulated storage: a log and a snapshot for each machine, and the consistent snapshots that terms begin with.

What is on its way to the disk when a machine dies may have come there or not, but always in order.
"""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

from engine.sharder.events import Append, Save
from engine.sharder.memory import Checkpoint, Snapshot, gather
from engine.sharder.setup import Setup


class Disk:
    """Of one machine: its newest snapshot, and the records after it. What is pending is written together."""

    def __init__(self) -> None:
        self.snapshot: Save | None = None
        self.records: list[Append] = []
        self.pending: deque[Append] = deque()
        self.writing = False  # records are on their way; those that come meanwhile go together after them

    def flush(self, number: int) -> None:
        """Records up to `number` have come to the disk."""
        while self.pending and self.pending[0].number <= number:
            self.records.append(self.pending.popleft())

    def keep(self, save: Save) -> None:
        """A snapshot has come to the disk: what it holds need not be replayed."""
        self.snapshot = save
        self.flush(save.number)
        self.records = [record for record in self.records if record.number > save.number]

    def crash(self, random: Random) -> None:
        """The machine dies."""
        for _ in range(random.randint(0, len(self.pending))):
            self.records.append(self.pending.popleft())
        self.pending.clear()
        self.writing = False

    @property
    def number(self) -> int:
        """Of the last record."""
        return self.records[-1].number if self.records else self.snapshot.number if self.snapshot else 0


class Archive:
    """Snapshots by version, in parts as the shards of some term saved them; `whole` is there from the beginning."""

    def __init__(self, setup: Setup, whole: Checkpoint):
        self.setup, self.whole = setup, whole
        self.parts: dict[int, dict[int, dict[int, Snapshot]]] = {}  # version, term, shard

    def keep(self, shard: int, snapshot: Snapshot) -> None:
        assert snapshot.term is not None
        self.parts.setdefault(snapshot.clock, {}).setdefault(snapshot.term.number, {})[shard] = snapshot

    def checkpoint(self, version: int) -> Checkpoint:
        """The snapshot of a version, of the newest term in which every shard saved its part."""
        for _, parts in sorted(self.parts.get(version, {}).items(), reverse=True):
            term = next(iter(parts.values())).term
            if term is not None and len(parts) >= term.shards:
                return self._join([parts[s] for s in range(term.shards)])
        if version != self.whole.clock:
            raise KeyError(f"there is no snapshot of version {version} that all shards have")
        return self.whole

    def _join(self, parts: list[Any]) -> Checkpoint:
        partition = self.setup.partition(len(parts))
        return gather(partition, parts[0].clock, [part.kept[-1] for part in parts], [part.slots for part in parts],
                      self.setup.rule.slots)
