"""Logs and replicas: what a machine was told is on record before anybody hears what it says.

A state machine is a function of what it was told, in that order. So its log brings it back, to the same bits: a
machine that comes back with its log was never gone, it was only slow; and whatever was lost on the way is asked for
again. For a shard this covers parameters, optimizer state, and the identities of the pushes that made them, together:
they are one state. Schneider 1990, "Implementing fault-tolerant services using the state machine approach".

    event --> machine.step --> actions ----------------------.
      '-----> Append(n, event) --> storage, or the backup     |
                                        '--> Written(n) --> released

A Journal with a backup sends its records to another machine, where a Backup follows. When the primary is lost, the
backup is promoted and stands in for it: it knows everything that anybody has ever been told. It acknowledges nothing
to the old primary any more, which can then say nothing new, even if it was only slow and never lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from engine.sharder.events import Address, Append, Save, Send, Timeout, Written
from engine.sharder.messages import Message, ProtocolError


@dataclass(frozen=True)
class Record(Message):
    """Primary to backup: my record `number`."""

    number: int
    event: Any = field(repr=False)


@dataclass(frozen=True)
class Recorded(Message):
    """Backup to primary: I have your records up to `number`."""

    number: int


class Journal:
    """`machine` behind a log that holds `number` records so far.

    own: the primary's address, backup: its backup's; without a backup records go to storage.
    """

    def __init__(self, machine: Any, number: int = 0, own: Address | None = None, backup: Address | None = None):
        self.machine, self.appended, self.written, self.own, self.backup = machine, number, number, own, backup
        self.withheld: deque[tuple[int, Any]] = deque()  # (the record it waits for, action)
        self.unwritten: deque[Record] = deque()  # on their way to the backup

    def step(self, event: Any) -> list[Any]:
        """React as the machine does, but withhold what it says until what it was told is on record."""
        if isinstance(event, (Written, Recorded)):
            self.written = max(self.written, event.number)
            while self.unwritten and self.unwritten[0].number <= self.written:
                self.unwritten.popleft()
            return self._released()
        actions, append = self.machine.step(event), []
        new = isinstance(event, self.machine.RECORDED) and not self.machine.repeated
        if not actions and not new and not self.unwritten:
            return []
        if new:
            self.appended += 1
            append = [self._append(event)]
        elif isinstance(event, Timeout) and self.backup:
            append = [Send(self.backup, record) for record in self.unwritten]
        self.withheld += [(self.appended, replace(a, number=self.appended) if isinstance(a, Save) else a)
                          for a in actions]
        return append + self._released()

    def save(self) -> list[Any]:
        """Begin the log with a snapshot of what the machine is now; nothing is said before that is on record."""
        self.appended += 1
        return [Save(self.machine.snapshot(), self.appended)]

    def _append(self, event: Any) -> Any:
        if self.backup is None:
            return Append(self.appended, event)
        record = Record(self.appended, event)
        self.unwritten.append(record)
        return Send(self.backup, record)

    def _released(self) -> list[Any]:
        released = []
        while self.withheld and self.withheld[0][0] <= self.written:
            released.append(self.withheld.popleft()[1])
        return released


class Backup:
    """Follows a primary: the same machine, told the same things."""

    def __init__(self, machine: Any, primary: Address):
        self.machine, self.primary = machine, primary
        self.number = 0
        self.early: dict[int, Any] = {}  # records that came before those that go before them
        self.promoted = False

    def step(self, event: Any) -> list[Any]:
        """React to a Record: take it when its turn has come, and say how far it has come."""
        if isinstance(event, Timeout) or self.promoted:
            return []
        if not isinstance(event, Record):
            raise ProtocolError(f"backup of {self.primary}: got {event!r}, which is not for a backup")
        if event.number > self.number:
            self.early[event.number] = event.event
        while self.number + 1 in self.early:
            self.number += 1
            self.machine.step(self.early.pop(self.number))
        return [Send(self.primary, Recorded(self.number))]

    def promote(self) -> Any:
        """The machine as it stands, from here on on its own. The old primary hears nothing from here any more."""
        self.promoted = True
        return self.machine


def replay(machine: Any, records: Iterable[Any]) -> None:
    """Bring a machine to where its log ends. What it says was said before, or will be asked for again."""
    for record in records:
        machine.step(record)
