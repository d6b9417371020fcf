"""What a shard remembers, as records that can be written down: Snapshot -> Frozen -> Snapshot.

A Snapshot holds machinery (windows, trees of half-made sums); a Frozen holds what is in it, in classes that encoding.py
can write. Thawed again it is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.backend import Array
from engine.optim.accumulator import Accumulated
from engine.sharder.encoding import declare
from engine.sharder.memory import Gathering, Snapshot, Window
from engine.sharder.messages import Push, Reduced, Term
from engine.sharder.setup import Setup
from engine.sharder.versions import Version


@dataclass(frozen=True)
class Seen:
    """A Window."""

    epoch: int
    floor: int
    above: tuple[int, ...]


@dataclass(frozen=True)
class Sum:
    """The sum over microbatches [start, stop)."""

    start: int
    stop: int
    gradients: tuple[Array, ...]
    loss: float
    tokens: float


@dataclass(frozen=True)
class Gathered:
    """A Gathering: pushes that are held, and the subtrees of the sum, of which it has `added` leaves."""

    version: int | None
    held: Mapping[int, Push]
    chosen: tuple[int, ...] | None
    added: tuple[int, ...]
    sums: tuple[Sum, ...]
    reduced: Reduced | None


@dataclass(frozen=True)
class Frozen:
    """A Snapshot."""

    term: Term | None
    incarnation: int
    active: bool
    clock: int
    version: int
    kept: tuple[Version, ...]
    slots: Mapping[str, tuple[Array, ...]]
    windows: Mapping[int, Seen]
    gatherings: Mapping[int, Gathered]


for _class in (Seen, Sum, Gathered):
    declare(None, _class)
declare(49, Frozen)


def freeze(snapshot: Snapshot) -> Frozen:
    return Frozen(snapshot.term, snapshot.incarnation, snapshot.active, snapshot.clock, snapshot.version,
                  snapshot.kept, snapshot.slots,
                  {worker: Seen(w.epoch, w.floor, tuple(sorted(w.above))) for worker, w in snapshot.windows.items()},
                  {clock: _freeze_gathering(gathering) for clock, gathering in snapshot.gatherings.items()})


def _freeze_sum(start: int, stop: int, total: Accumulated) -> Sum:
    return Sum(start, stop, total.gradients, total.loss, total.tokens)


def _freeze_gathering(gathering: Gathering) -> Gathered:
    finished = gathering.sum._finished
    return Gathered(gathering.version, dict(gathering.held), gathering.chosen, tuple(sorted(gathering.sum._added)),
                    tuple(_freeze_sum(*key, finished[key]) for key in sorted(finished)),
                    gathering.reduced)


def thaw(frozen: Frozen, setup: Setup, number: int) -> Snapshot:
    """The snapshot of shard `number`."""
    pieces = setup.partition(frozen.term.shards).pieces[number] if frozen.term and frozen.active else ()
    gatherings = {}
    for clock, gathered in frozen.gatherings.items():
        gathering = gatherings[clock] = Gathering(setup, pieces)
        if gathered.chosen is not None:
            gathering.choose(gathered.chosen)
        gathering.version, gathering.held, gathering.reduced = gathered.version, dict(gathered.held), gathered.reduced
        gathering.sum._added = set(gathered.added)
        gathering.sum._finished = {(s.start, s.stop): _thaw_sum(s) for s in gathered.sums}
    windows = {}
    for worker, seen in frozen.windows.items():
        window = windows[worker] = Window(seen.epoch)
        window.floor, window.above = seen.floor, set(seen.above)
    return Snapshot(frozen.term, frozen.incarnation, frozen.active, frozen.clock, frozen.version, frozen.kept,
                    frozen.slots, windows, gatherings)


def _thaw_sum(total: Sum) -> Accumulated:
    return Accumulated(total.gradients, total.loss, total.tokens)
