"""Row-sparse updates with the bits of dense ones: rows without gradient are updated later, and step by step.

A dense optimizer updates all V rows of a table at every step, although a row whose gradient is 0 moves only by what it
remembers (Adam's m and v, a momentum, weight decay). Here a step updates the touched rows, and a row that was untouched
from step a to step b is brought up to date when somebody looks at it, by the b − a + 1 updates that it missed:

    for s = a ... b:   θ, state ← rule_s(θ, state, g = 0, s)      with the rule, so the learning rate, of step s

These are the launches of the dense optimizer with the same numbers, on fewer rows, and an element's update does not
depend on its neighbours: so the bits are the same too. They pay in three ways: a row is in the cache while its updates
are made; rows that were never touched have zeros to remember and need none; and what nobody looks at waits.

Who looks? Everything that computes passes the launch point (backend/launch.py), so an observer there sees a table
before it is read or written, and brings its rows up to date: those that are looked up where the kernel is `embedding`,
else all of them. Tensor.numpy() does the same. While nothing is postponed, the observer is not there.

"Lazy" updates, which leave the missed ones out, are another algorithm: optimizers.LazyAdam.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import numpy as np

from engine.backend import Array, Backend, observers
from engine.optim.rules import Rule
from engine.rowsparse import RowSparse, put_rows

CHUNK = 1 << 16  # elements whose parameters, state and zero gradient stay in the second-level cache while they catch up

_waiting: WeakSet[Postponed] = WeakSet()
_observing = threading.Lock()


def _observe() -> None:
    """Be an observer exactly while updates are postponed."""
    with _observing:
        if _waiting and _look not in observers:
            observers.insert(0, _look)  # before those that look at the arguments
        elif not _waiting and _look in observers:
            observers.remove(_look)


def _look(name: str, arguments: tuple[Any, ...]) -> None:
    """The observer: bring what a kernel is about to read or write up to date."""
    if not _waiting:  # the tables are gone
        _observe()
    for argument in arguments:
        if argument.__class__ is Array and argument.storage.postponed is not None:
            looked_up = name == "embedding" and argument is arguments[1]
            argument.storage.postponed.look(arguments[2] if looked_up else None)


class Postponed:
    """A table, its optimizer state, and for each row how many updates it has had.

    table, state: in place; the state's Arrays have the table's shape
    step:         how many updates all rows have had so far
    """

    def __init__(self, k: Backend, table: Array, state: dict[str, Any], step: int):
        self.k, self.state = k, state
        self.height = table.shape[0]
        self.width = math.prod(table.shape[1:])
        self.table = self._flat(table)
        self.done = np.full(self.height, step)
        self.newest = step  # the last update that changes rows without gradient
        self.rules: list[tuple[int, Rule | None]] = []  # (from this update on, by this rule, or rows stay as they are)
        self.fresh = np.ones(self.height, bool)  # rows whose state is the zeros that it began with
        for slot in self._slots():
            self.fresh &= ~k.to_numpy(slot).any(axis=1)
        self.lock = threading.RLock()
        if table.storage.postponed is not None:  # another optimizer's
            table.storage.postponed.settle()
        table.storage.postponed = self

    def _flat(self, array: Array) -> Array:
        """The rows as a matrix, by an Array with a storage of its own: the observer does not see what is done here."""
        return Array(array.data.reshape(self.height, self.width), array.dtype)

    def _slots(self) -> list[Array]:
        return [self._flat(value) for value in self.state.values() if isinstance(value, Array)]

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────

    def update(self, rule: Rule, gradient: RowSparse, step: int) -> None:
        """Update number `step`: the rows that have a gradient now, the others when somebody looks."""
        with self.lock:
            self.settle(gradient.rows)
            update_rows(self.k, rule, self.table, self.state, gradient, step)
            self.fresh[gradient.rows] = False
            missed = None if rule.stays_without_gradient else rule
            if not self.rules or self.rules[-1][1] != missed:
                self.rules.append((step, missed))
            if missed is not None:
                self.newest = step
                self.done[gradient.rows] = step
                _waiting.add(self)
                _observe()

    # ── catching up ─────────────────────────────────────────────────────────────────────────────────

    def look(self, index: Array | None = None) -> None:
        """Somebody is about to read the rows of this index (None: all)."""
        self.settle(None if index is None else np.unique(self.k.to_numpy(index)))

    def settle(self, rows: np.ndarray | None = None) -> None:
        """Bring rows (distinct ones; None: all) up to date."""
        with self.lock:
            if self not in _waiting:
                return
            behind = np.flatnonzero(self.done < self.newest) if rows is None else rows[self.done[rows] < self.newest]
            if all(rule is None or rule.stays_at_zero for _, rule in self.rules):
                self.done[behind[self.fresh[behind]]] = self.newest
                behind = behind[~self.fresh[behind]]
            behind = behind[np.argsort(self.done[behind], kind="stable")]
            count = max(1, CHUNK // max(1, self.width))
            for start in range(0, len(behind), count):
                self._replay(behind[start:start + count])
            if rows is None:
                del self.rules[:-1]
                _waiting.discard(self)
                _observe()

    def _replay(self, rows: np.ndarray) -> None:
        """Make the updates that these rows missed; they are ordered so that those that missed most come first."""
        k, done = self.k, self.done[rows]
        table, state = gather(k, self.table, rows), {name: gather(k, self._flat(value), rows)
                                                     for name, value in self.state.items() if isinstance(value, Array)}
        zeros = k.zeros(table.shape, table.dtype)
        for step, rule in self._rules(int(done[0]) + 1):
            count = int(np.searchsorted(done, step))  # rows that have had fewer updates than this one

            def first(array: Array, count: int = count) -> Array:
                return array.view(array.data[:count])

            some = {name: first(value) for name, value in state.items()}
            rule.apply(k, first(table), some, first(table), some, first(zeros), step)
        put_rows(k, self.table, rows, table)
        for name, value in state.items():
            put_rows(k, self._flat(self.state[name]), rows, value)
        self.done[rows], self.fresh[rows] = self.newest, False

    def _rules(self, first: int) -> Iterator[tuple[int, Rule]]:
        """(step, its rule) from `first` to the newest, without those that do nothing."""
        at = bisect_right(self.rules, first, key=lambda entry: entry[0]) - 1
        for step in range(first, self.newest + 1):
            while at + 1 < len(self.rules) and self.rules[at + 1][0] <= step:
                at += 1
            rule = self.rules[at][1]
            if rule is not None:
                yield step, rule


def update_rows(k: Backend, rule: Rule, table: Array, state: dict[str, Any], gradient: RowSparse, step: int) -> None:
    """Update the rows that have a gradient, and no others. table (height, width), state of its size: in place."""
    height, width = table.shape
    slots = {name: Array(state[name].data.reshape(height, width), table.dtype) for name in rule.slots}
    rows = gradient.rows
    some, some_slots = gather(k, table, rows), {name: gather(k, slot, rows) for name, slot in slots.items()}
    rule.apply(k, some, some_slots, some, some_slots, k.contiguous(gradient.values.array).reshaped(some.shape), step)
    put_rows(k, table, rows, some)
    for name, slot in slots.items():
        put_rows(k, slot, rows, some_slots[name])


def gather(k: Backend, table: Array, rows: np.ndarray) -> Array:
    """table[rows]."""
    height, width = table.shape
    chosen = k.empty((len(rows), width), table.dtype)
    k.embedding(chosen, table, k.array(rows), len(rows), height, width)
    return chosen
