"""What drivers and machines say to each other: where to send, that time has passed, what storage and programs want.

Nothing here travels. A driver calls machine.step(event) and carries out the actions that come back, in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.backend import Array
from engine.rowsparse import RowSparse
from engine.sharder.messages import Term
from engine.sharder.versions import Version

Address = tuple[str, int]
COORDINATOR: Address = ("coordinator", 0)
RUN: Address = ("run", 0)  # whoever wants the training: grants clocks, and bears machines where they can die


def shard_address(number: int) -> Address:
    return "shard", number


def backup_address(number: int) -> Address:
    return "backup", number


def worker_address(number: int) -> Address:
    return "worker", number


@dataclass(frozen=True)
class Timeout:
    """Time has passed: ask again for whatever is unanswered."""


@dataclass(frozen=True)
class Send:
    """Action: deliver `message` to `to`. It may be lost, late or repeated."""

    to: Address
    message: Any


# ── the run and the coordinator ───────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Proceed:
    """To the coordinator: clocks up to `clock` may be applied. Ends in Committed for each; asked again, it answers
    again, with the last of them."""

    clock: int


@dataclass(frozen=True)
class Finish:
    """To the coordinator: there will be no further clock."""


@dataclass(frozen=True)
class Reshard:
    """To the coordinator: go on with so many shards, from the next clock boundary on. Ends in Entered; asked again, it
    answers again."""

    shards: int


@dataclass(frozen=True)
class Entered:
    """Action of the coordinator: every shard is in this term."""

    term: Term


@dataclass(frozen=True)
class Committed:
    """Action of the coordinator: clock `clock` is done on every shard.

    loss: sum over all tokens of the clock; tokens: their number; norm: of the mean gradient, None without clipping;
    version: the clock was computed on; dropped: microbatches that came too late to be waited for.
    """

    clock: int
    loss: float
    tokens: float
    norm: float | None
    version: int = 0
    dropped: tuple[int, ...] = ()

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens


# ── a program and its worker ──────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class ClockRequested:
    """To a worker: its program has pushed everything and waits for work. Ends in Began or Ended."""


@dataclass(frozen=True)
class PullRequested:
    """To a worker: its program wants parameters of this clock: all of them, which ends in Pulled, or those of these
    names, which ends in a Received for each shard that owns any of them."""

    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PushRequested:
    """To a worker: its program has gradients of a microbatch: name -> flat Array, or RowSparse.

    shard: they are all that this shard owns, and may leave for it while others are computed; None: the microbatch is
    done, and they are all that has not left
    place: with a local rule, where they were computed, name -> parameters
    """

    microbatch: int
    gradients: dict[str, Array | RowSparse] = field(repr=False)
    loss: float
    tokens: float
    shard: int | None = None
    place: Mapping[str, np.ndarray] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Began:
    """Action of a worker: a clock began, with these microbatches to compute."""

    clock: int
    microbatches: tuple[int, ...]


@dataclass(frozen=True)
class Pulled:
    """Action of a worker: the parameters, one read-only view a shard, all of one version (except in ASP)."""

    values: tuple[Version, ...]


@dataclass(frozen=True)
class Received:
    """Action of a worker: a read-only view of the parameters of one shard."""

    shard: int
    values: Version


@dataclass(frozen=True)
class Ended:
    """Action of a worker: there will be no further clock; `refused` says why, if it is the coordinator's decision."""

    refused: str = ""


# ── storage ───────────────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Append:
    """Action: put record `number` at the end of the log. Ends in Written."""

    number: int
    record: Any


@dataclass(frozen=True)
class Written:
    """The log is on record up to `number`."""

    number: int


@dataclass(frozen=True)
class Save:
    """Action: keep this snapshot, which holds everything up to log record `number`. Ends in Stored."""

    snapshot: Any
    number: int = 0


@dataclass(frozen=True)
class Stored:
    """A snapshot of `term` and `version` is on record."""

    term: int
    version: int


@dataclass(frozen=True)
class Load:
    """Action: read the consistent snapshot that `term` begins with. Ends in Loaded."""

    term: Term


@dataclass(frozen=True)
class Loaded:
    """The snapshot that `term` begins with: an engine.sharder.memory.Checkpoint."""

    term: Term
    checkpoint: Any = field(repr=False)
