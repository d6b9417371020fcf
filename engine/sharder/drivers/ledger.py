"""The books of an asynchronous run: which pushes each shard took, in which order, and what that must have made of it.

A shard may lose its last updates in a crash, if nobody was told of them: then its book goes back as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.optim.accumulator import Accumulator
from engine.sharder.memory import Checkpoint, decoded
from engine.sharder.messages import Push
from engine.sharder.setup import Setup
from engine.sharder.shard import Shard


@dataclass
class Book:
    """Of one shard in one term. states[i]: after `first + i` updates, its pieces alone."""

    first: int
    states: list[dict[str, Any]]  # kind -> one array a piece
    taken: list[tuple[int, int]] = field(default_factory=list)  # (clock, microbatch), one an update


class Ledger:
    """Holds every shard of a run to its book."""

    def __init__(self, setup: Setup, origin: Checkpoint, require: Callable[..., None]):
        self.setup, self.origin, self.require, self.k = setup, origin, require, setup.k
        self.books: dict[tuple[int, int], Book] = {}  # by term and shard
        self.sealed: dict[int, Checkpoint] = {}  # by term: the state it began with

    def check(self, shard: Shard, event: Any) -> None:
        """A shard has changed, at this event."""
        assert shard.term is not None
        version, key = shard.memory.version, (shard.term.number, shard.number)
        if key not in self.books:
            self.books[key] = self._open(shard)
        book = self.books[key]
        count = version - book.first
        require = self.require
        if count == len(book.states):
            require(isinstance(event, Push), "shard {} was updated by {}", shard.number, event)
            work = event.clock, event.microbatch
            require(work not in book.taken, "shard {} took clock {}, microbatch {} twice", shard.number, *work)
            book.taken.append(work)
            book.states.append(self._update(shard, book, event))
        require(0 <= count < len(book.states), "shard {} is at version {}, its book at {}", shard.number, version,
                book.first + len(book.states) - 1)
        del book.states[count + 1:], book.taken[count:]
        for kind, own in _state(shard).items():
            same = all(a.tobytes() == b.tobytes() for a, b in zip(own, book.states[count][kind]))
            require(same, "shard {}, version {}: {} has other bits than its pushes make", shard.number, version, kind)

    def _open(self, shard: Shard) -> Book:
        """A book begins with what the books of the term before ended with."""
        term = shard.term
        assert term is not None
        if term.number not in self.sealed:
            self.sealed[term.number] = self._end_of_books() if self.books else self.origin
        origin = self.sealed[term.number]
        kinds = {"parameters": origin.parameters, **{slot: values for slot, values in origin.slots.items() if values}}
        state = {kind: [values[p.parameter.name].reshape(-1)[p.start:p.stop] for p in shard.pieces]
                 for kind, values in kinds.items()}
        for slot, values in origin.slots.items():
            if values is None:
                state[slot] = [self.setup.rule.init(self.k, p.size, self.setup.dtype)[slot].data for p in shard.pieces]
        return Book(self.setup.updates(term.start), [state])

    def _end_of_books(self) -> Checkpoint:
        """The end of the term before, joined."""
        newest = max(term for term, _ in self.books)
        books = {s: book for (term, s), book in self.books.items() if term == newest}
        whole: dict[str, dict[str, np.ndarray]] = {}
        for s, book in books.items():
            for i, piece in enumerate(self.setup.partition(len(books)).pieces[s]):
                for kind, arrays in book.states[-1].items():
                    size, name = piece.parameter.size, piece.parameter.name
                    values = whole.setdefault(kind, {}).setdefault(name, np.empty(size, self.setup.dtype.numpy))
                    values[piece.start:piece.stop] = arrays[i]
        return Checkpoint(-1, whole.pop("parameters"), whole)

    def _update(self, shard: Shard, book: Book, push: Push) -> dict[str, Any]:
        """What one more push makes of the newest state."""
        k, rule, before, step = self.k, self.setup.rule, book.states[-1], book.first + len(book.states)
        accumulator = Accumulator(1, k)
        accumulator.add(0, decoded(push, shard.pieces, self.setup), push.loss, push.tokens)
        after: dict[str, Any] = {kind: [] for kind in before}
        for i, (piece, gradient) in enumerate(zip(shard.pieces, accumulator.mean().gradients)):
            old = k.array(before["parameters"][i])
            state = {slot: k.array(before[slot][i]) for slot in rule.slots}
            new = k.empty_like(old)
            update = self.setup.update_at(step, piece.parameter.name, step - 1 - push.version)
            update(k, new, state, old, state, gradient, step)
            for kind, value in (("parameters", new), *state.items()):
                after[kind].append(value.data)
        return after

    def check_end(self, shards: Iterable[Shard | None], last: int) -> None:
        """Every shard took every microbatch of the clocks before `last` exactly once since its term began."""
        for shard in shards:
            assert shard is not None and shard.term is not None
            due = [(clock, i) for clock in range(shard.term.start, last) for i in range(self.setup.microbatches)]
            book = self.books.get((shard.term.number, shard.number))
            taken = sorted(book.taken) if book else []
            self.require(taken == due, "shard {} took {}, expected {}", shard.number, taken, due)


def _state(shard: Shard) -> dict[str, Any]:
    current = shard.memory.versions.current
    return {"parameters": [current.read(piece) for piece in shard.pieces],
            **{slot: [array.data.copy() for array in arrays] for slot, arrays in shard.memory.slots.items()}}
