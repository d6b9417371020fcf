"""What workers, shards and the coordinator say to each other. README.md has the picture.

Every message is immutable and names its sender: a worker by number and epoch (its epoch grows with each restart, so
that words of a dead incarnation are recognised), a push also by sequence number. Only a push changes anything that
could be changed twice, so only a push must be applied exactly once; every other message can be lost, repeated or late
without harm, since its answer depends on what it names and not on how often it was asked. Whoever waits for an answer
asks again at a Timeout.

A *clock* is one step of training: its microbatches are summed and applied together. Parameters of *version* v are
those after v clocks, so the commit of clock c makes version c + 1. A *term* is a stretch of training with one
partition; it ends when shards are added or removed, or when all of them go back to a snapshot, and what was said in
it is void in the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.backend import Array
from engine.sharder.codecs import Payload
from engine.sharder.versions import Version

PROTOCOL = 3


class Message:
    """What travels between machines, and can be lost, late or repeated."""


class ProtocolError(RuntimeError):
    """A message that no correct peer sends: a bug, not a fault of the network."""


@dataclass(frozen=True)
class Identity:
    """Names one push for ever: the sequence-th push of this incarnation of this worker."""

    worker: int
    epoch: int
    sequence: int


@dataclass(frozen=True)
class Term:
    """Term `number` began at version `start` and has so many shards; they decide the partition."""

    number: int
    shards: int
    start: int


# ── worker and coordinator ────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Ready(Message):
    """Worker: I have taken `taken` Begins and computed them; give me the next. Answered by Begin, End or Refused."""

    worker: int
    epoch: int
    taken: int
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Begin(Message):
    """Coordinator: compute these microbatches of `clock` on parameters of `version` (ASP: on any). number: of the
    Begins to this incarnation, from 1. floor: no term will begin before this version."""

    worker: int
    epoch: int
    number: int
    term: Term
    clock: int
    version: int
    microbatches: tuple[int, ...]
    floor: int = 0


@dataclass(frozen=True)
class End(Message):
    """Coordinator: training is over."""

    worker: int
    epoch: int


@dataclass(frozen=True)
class Refused(Message):
    """Coordinator: this worker may not take part."""

    worker: int
    epoch: int
    reason: str


@dataclass(frozen=True)
class Gone(Message):
    """This incarnation leaves, or whoever watches over it says that it is lost: others are to do its work."""

    worker: int
    epoch: int


# ── worker and shard ──────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Pull(Message):
    """Worker: your parameters of `version`. Answered by Parameters: of a later version if this one is no longer
    needed by any clock, not at all if it is yet to come. ASP: of that version or any later one."""

    worker: int
    epoch: int
    term: int
    version: int


@dataclass(frozen=True)
class Parameters(Message):
    """Shard: a read-only view of my parameters, to whom asked for this version; it stays what it is while anybody
    holds it."""

    worker: int
    epoch: int
    shard: int
    term: int
    version: int
    values: Version


@dataclass(frozen=True)
class Push(Message):
    """Worker: gradients of the loss sum of one microbatch, for the pieces this shard owns, as computed on parameters
    of `version`. A gradient is an Array, or what was made of it to travel. Answered by Pushed."""

    identity: Identity
    term: int
    clock: int
    version: int
    microbatch: int
    loss: float
    tokens: float
    gradients: tuple[Array | Payload, ...] = field(repr=False)


@dataclass(frozen=True)
class Pushed(Message):
    """Shard: I have this push (from now or from before); forget it."""

    identity: Identity
    shard: int


@dataclass(frozen=True)
class Moved(Message):
    """Shard, to words of an older term: we are in this one now."""

    worker: int
    epoch: int
    term: Term


# ── shard and coordinator ─────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Held(Message):
    """Shard: I hold these microbatches of `clock`, which are enough. Answered by Choose. (Only with backups.)"""

    shard: int
    term: int
    clock: int
    microbatches: tuple[int, ...]


@dataclass(frozen=True)
class Choose(Message):
    """Coordinator: these microbatches, which every shard holds, make up `clock`; drop the others."""

    term: int
    clock: int
    microbatches: tuple[int, ...]


@dataclass(frozen=True)
class Reduced(Message):
    """Shard: I have summed all of `clock`. squares: Σg² of each of my blocks. Answered by Apply."""

    shard: int
    term: int
    clock: int
    loss: float
    tokens: float
    squares: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Apply(Message):
    """Coordinator: every shard has summed `clock`; update, with gradients times `scale`. save: and make a snapshot."""

    term: int
    clock: int
    scale: float
    save: bool = False


@dataclass(frozen=True)
class Applied(Message):
    """Shard: my parameters are of version clock + 1."""

    shard: int
    term: int
    clock: int


@dataclass(frozen=True)
class Saved(Message):
    """Shard: my snapshot of `version` is on record."""

    shard: int
    term: int
    version: int


@dataclass(frozen=True)
class Blank(Message):
    """Shard: I have lost my memory and everything since my last snapshot. `incarnation` counts how often."""

    shard: int
    incarnation: int


@dataclass(frozen=True)
class Restore(Message):
    """Coordinator: `term` begins; take your part of the snapshot of version term.start. Answered by Restored."""

    term: Term


@dataclass(frozen=True)
class Restored(Message):
    """Shard: I am in this term."""

    shard: int
    term: int

