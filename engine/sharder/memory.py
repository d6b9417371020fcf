"""What a shard remembers: parameters, optimizer state, and what it has been given; live, and as a snapshot.

A Checkpoint is all of it for all shards, by name and whole, so it belongs to no number of shards: one made with three
loads into five. A Snapshot is one shard's, with whatever was under way; it and the log of what came after are enough
to bring the shard back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from engine.backend import Array, Backend
from engine.optim.accumulator import Accumulator
from engine.sharder.messages import Push, Reduced, Term
from engine.sharder.partition import Parameter, Partition, Piece
from engine.sharder.setup import Setup
from engine.sharder.versions import Version, Versions

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """Parameters after `clock` clocks, and each slot of the update rule (None: as it begins); by parameter name."""

    clock: int
    parameters: Values
    slots: Mapping[str, Values | None]


@dataclass
class Memory:
    """Parameters, optimizer state (in place), and how many updates made them."""

    versions: Versions
    slots: dict[str, tuple[Array, ...]]  # by name: one Array a piece
    version: int
    torn: bool = False  # an update began and did not end


def place(k: Backend, rule: Any, pieces: Sequence[Piece], versions: Versions, checkpoint: Checkpoint) -> Memory:
    """Write the pieces of a checkpoint into the current version, and make the slots."""
    fresh = [rule.init(k, piece.size, versions.dtype) for piece in pieces]
    slots = {slot: tuple(state[slot] for state in fresh) for slot in rule.slots}
    for i, piece in enumerate(pieces):
        _write(k, versions.current.piece(piece), piece, checkpoint.parameters)
        for slot, saved in checkpoint.slots.items():
            if saved is not None:
                _write(k, slots[slot][i], piece, saved)
    return Memory(versions, slots, versions.current.number)


def _write(k: Backend, target: Array, piece: Piece, source: Values) -> None:
    elements = np.ascontiguousarray(source[piece.parameter.name]).reshape(-1)[piece.start:piece.stop]
    k.cast(target, k.from_numpy(elements))


def gather(partition: Partition, clock: int, versions: Sequence[Version],
           slots: Sequence[Mapping[str, tuple[Array, ...]]], names: Iterable[str]) -> Checkpoint:
    """The checkpoint that the shards hold together: copies. names: of the rule's slots."""
    def whole(parameter: Parameter, part: Any) -> np.ndarray:
        joined = np.empty(parameter.size, versions[0].flat.dtype.numpy)
        for s, pieces in enumerate(partition.pieces):
            for i, piece in enumerate(pieces):
                if piece.parameter is parameter:
                    joined[piece.start:piece.stop] = part(s, i, piece)
        return joined.reshape(parameter.shape)

    parameters = partition.parameters.values()
    return Checkpoint(clock, {p.name: whole(p, lambda s, i, piece: versions[s].read(piece)) for p in parameters},
                      {slot: {p.name: whole(p, lambda s, i, piece, slot=slot: slots[s][slot][i].data)
                              for p in parameters} for slot in names})


class Window:
    """Which sequence numbers of one incarnation have been seen: all below `floor`, and those in `above`."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.floor = 0
        self.above: set[int] = set()

    def first_time(self, sequence: int) -> bool:
        """Record a sequence number; False if it was there already."""
        if sequence < self.floor or sequence in self.above:
            return False
        self.above.add(sequence)
        while self.floor in self.above:
            self.above.remove(self.floor)
            self.floor += 1
        return True

    def __copy__(self) -> Window:
        twin = Window(self.epoch)
        twin.floor, twin.above = self.floor, set(self.above)
        return twin


class Gathering:
    """The pushes of one clock at one shard, until it is applied.

    With backups, the first `needed` microbatches are held until the coordinator has chosen among them; otherwise all
    are chosen from the beginning, and sums are made as soon as both halves of a subtree are there.
    """

    def __init__(self, setup: Setup, pieces: tuple[Piece, ...]):
        self.setup, self.pieces, self.k, self.needed = setup, pieces, setup.k, setup.needed
        self.version: int | None = None  # of the parameters all its gradients were computed on
        self.held: dict[int, Push] = {}  # by microbatch: not chosen yet
        self.chosen: tuple[int, ...] | None = None
        self.sum = Accumulator(setup.microbatches, self.k)
        self.reduced: Reduced | None = None  # what the coordinator was told of it
        if setup.needed == setup.microbatches:
            self.choose(tuple(range(setup.microbatches)))

    def add(self, push: Push) -> bool:
        """Take one push of dense gradients. False if this microbatch is here already, or was left out: a microbatch's
        gradients are a function of the clock and its index, so whatever incarnation computed them, they have the same
        bits."""
        if self.chosen is None:
            return self.held.setdefault(push.microbatch, push) is push
        if push.microbatch not in self.chosen or self.chosen.index(push.microbatch) in self.sum:
            return False
        self.sum.add(self.chosen.index(push.microbatch), dense(push), push.loss, push.tokens)
        return True

    def choose(self, microbatches: tuple[int, ...]) -> None:
        self.chosen, self.sum = microbatches, Accumulator(len(microbatches), self.k)
        for microbatch in sorted(self.held):
            self.add(self.held[microbatch])
        self.held = {}

    @property
    def complete(self) -> bool:
        return self.chosen is not None and self.sum.complete

    def __copy__(self) -> Gathering:
        twin = Gathering.__new__(Gathering)
        twin.__dict__.update(self.__dict__, held=dict(self.held), sum=copy(self.sum))
        return twin


def dense(push: Push) -> tuple[Array, ...]:
    """The gradients of a push that was decoded when it came."""
    return cast("tuple[Array, ...]", push.gradients)


def decoded(push: Push, pieces: tuple[Piece, ...], setup: Setup) -> tuple[Array, ...]:
    """The gradients of a push, dense: one a piece. Raises ValueError with one line for anything else."""
    if len(push.gradients) != len(pieces):
        raise ValueError(f"{len(push.gradients)} gradients, expected {len(pieces)}")
    return tuple(_dense(*part, setup) for part in zip(push.gradients, pieces))


def _dense(gradient: Any, piece: Piece, setup: Setup) -> Array:
    if not isinstance(gradient, Array):
        gradient = gradient.decode(setup.k, piece.size, setup.dtype)
    if (gradient.shape, gradient.dtype) != ((piece.size,), setup.dtype):
        raise ValueError(f"a gradient for {piece.parameter.name!r} is {gradient.dtype} {gradient.shape}, expected "
                         f"{setup.dtype} {(piece.size,)}")
    return gradient


@dataclass(frozen=True)
class Snapshot:
    """All that one shard remembers at one moment; nothing in it changes any more. Of one that is blank, or has been
    removed (not active), that is little."""

    term: Term | None
    incarnation: int
    active: bool = False
    clock: int = -1
    version: int = -1
    kept: tuple[Version, ...] = ()
    slots: Mapping[str, tuple[Array, ...]] = field(default_factory=dict, repr=False)
    windows: Mapping[int, Window] = field(default_factory=dict, repr=False)
    gatherings: Mapping[int, Gathering] = field(default_factory=dict, repr=False)
