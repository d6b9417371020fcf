"""What workers, shards and the coordinator say to each other. README.md has the picture.

Every message is immutable and names its sender: a worker by number and epoch (its epoch grows with each restart, so
that words of a dead incarnation are recognised), a push also by sequence number. Only a push changes anything, so
only a push must be applied exactly once; every other message can be lost, repeated or late without harm, since its
answer depends on the clock it names and not on how often it was asked. Whoever waits for an answer asks again at a
Timeout.

A *clock* is one step of training: its microbatches are summed and applied together. Parameters of *version* v are
those after v clocks, so clock c computes on version c and its commit makes version c + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.backend import Array
from engine.sharder.versions import Version

PROTOCOL = 1


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


# ── worker and coordinator ────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Ready(Message):
    """Worker: I can begin any clock from `clock` on. Answered by Begin, End or Refused."""

    worker: int
    epoch: int
    clock: int
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Begin(Message):
    """Coordinator: compute these microbatches of `clock`, on parameters of version `clock`."""

    worker: int
    epoch: int
    clock: int
    microbatches: tuple[int, ...]


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


# ── worker and shard ──────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Pull(Message):
    """Worker: your parameters, of at least `version`. Answered by Parameters, once there is such a version."""

    worker: int
    epoch: int
    version: int


@dataclass(frozen=True)
class Parameters(Message):
    """Shard: a read-only view of my parameters; it stays what it is while anybody holds it."""

    worker: int
    epoch: int
    shard: int
    values: Version


@dataclass(frozen=True)
class Push(Message):
    """Worker: gradients of the loss sum of one microbatch, for the pieces this shard owns. Answered by Pushed."""

    identity: Identity
    clock: int
    microbatch: int
    loss: float
    tokens: float
    gradients: tuple[Array, ...] = field(repr=False)


@dataclass(frozen=True)
class Pushed(Message):
    """Shard: I have this push (from now or from before); forget it."""

    identity: Identity
    shard: int


# ── shard and coordinator ─────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Reduced(Message):
    """Shard: I hold every microbatch of `clock`. squares: Σg² of each of my blocks. Answered by Apply."""

    shard: int
    clock: int
    loss: float
    tokens: float
    squares: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Apply(Message):
    """Coordinator: every shard holds every microbatch of `clock`; update, with gradients times `scale`."""

    clock: int
    scale: float


@dataclass(frozen=True)
class Applied(Message):
    """Shard: my parameters are of version clock + 1."""

    shard: int
    clock: int
