"""What drivers and machines say to each other: where to send, that time has passed, what a program wants and gets.

Nothing here travels. A driver calls machine.step(event) and carries out the actions that come back, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.backend import Array
from engine.sharder.versions import Version

Address = tuple[str, int]
COORDINATOR: Address = ("coordinator", 0)


def shard_address(number: int) -> Address:
    return "shard", number


def worker_address(number: int) -> Address:
    return "worker", number


@dataclass(frozen=True)
class Timeout:
    """Time has passed: ask again for whatever is unanswered."""


@dataclass(frozen=True)
class Proceed:
    """To the coordinator: begin the next clock."""


@dataclass(frozen=True)
class Finish:
    """To the coordinator: there will be no further clock."""


@dataclass(frozen=True)
class ClockRequested:
    """To a worker: its program has pushed everything and waits for the next clock. Ends in Began or Ended."""


@dataclass(frozen=True)
class PullRequested:
    """To a worker: its program wants the parameters of this clock. Ends in Pulled."""


@dataclass(frozen=True)
class PushRequested:
    """To a worker: its program has the gradients of a microbatch: name -> flat Array."""

    microbatch: int
    gradients: dict[str, Array] = field(repr=False)
    loss: float
    tokens: float


@dataclass(frozen=True)
class Send:
    """Action: deliver `message` to `to`. It may be lost, late or repeated."""

    to: Address
    message: Any


@dataclass(frozen=True)
class Began:
    """Action of a worker: a clock began, with these microbatches to compute."""

    clock: int
    microbatches: tuple[int, ...]


@dataclass(frozen=True)
class Pulled:
    """Action of a worker: the parameters, one read-only view a shard, all of one version."""

    values: tuple[Version, ...]


@dataclass(frozen=True)
class Ended:
    """Action of a worker: there will be no further clock; `refused` says why, if it is the coordinator's decision."""

    refused: str = ""


@dataclass(frozen=True)
class Committed:
    """Action of the coordinator: clock `clock` is done on every shard.

    loss: sum over all tokens of the clock; tokens: their number; norm: of the mean gradient, None without clipping.
    """

    clock: int
    loss: float
    tokens: float
    norm: float | None

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens
