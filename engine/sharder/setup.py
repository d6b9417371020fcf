"""What every machine of a cluster knows from the start, and never changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from engine.backend import Backend
from engine.dtypes import DType
from engine.optim import Rule, clip
from engine.sharder.consistency import BSP, Consistency, Damping
from engine.sharder.partition import Partition

Hyper = Callable[[int, str], Mapping[str, Any]]
"""hyper(step, parameter name): what the update rule is given besides its defaults. step counts from 1."""


def as_hyper(given: Mapping[str, Any] | Hyper | None) -> Hyper:
    """A function as it is; a dict, as it is now, for every step and parameter."""
    if callable(given):
        return given
    fixed = dict(given or {})
    return lambda step, name: fixed


@dataclass(frozen=True)
class Setup:
    """shapes: of the parameters, by name   rule: engine.optim.rules    microbatches: in a clock
    local: the rule of the workers' own steps (local.py), None: there are none
    clip_norm: the mean gradient of a clock is clipped to it, with a local rule that of a microbatch
    damping: of the learning rate, by staleness
    save_every: so many clocks lie between two consistent snapshots; 0: none are made
    compress: the codec by which gradients travel, None: as they are
    zero: what a worker holds only while it needs it: 1: nothing; 2: gradients; 3: gradients and parameters
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: DType
    k: Backend
    rule: Any
    hyper: Hyper
    microbatches: int
    clip_norm: float | None = None
    consistency: Consistency = BSP
    damping: Damping | None = None
    placement: str = "ranges"
    save_every: int = 0
    compress: str | None = None
    local: Any = None
    zero: int = 2
    _partitions: dict[int, Partition] = field(default_factory=dict)

    def partition(self, shards: int) -> Partition:
        """The parameters over so many shards; everybody works out the same."""
        if shards not in self._partitions:
            self._partitions[shards] = Partition(self.shapes, shards, self.placement)
        return self._partitions[shards]

    @property
    def needed(self) -> int:
        """How many microbatches complete a clock."""
        return self.microbatches - self.consistency.backups

    def updates(self, clock: int) -> int:
        """How many updates make so many clocks."""
        return self.consistency.updates(clock, self.microbatches)

    def update_at(self, step: int, name: str, staleness: int) -> Callable[..., None]:
        """The rule's apply(), with the hyper-parameters of an update that comes `staleness` updates late. Raises
        ValueError as the rule does for those that it cannot work with: before anything is written."""
        hyper = {} if self.local else self.hyper(step, name)
        if self.damping is not None:
            hyper = {**hyper, "lr": hyper.get("lr", self.rule.lr) * self.damping(staleness)}
        return _with(self.rule, hyper)

    def local_update_at(self, step: int, name: str) -> Callable[..., None]:
        """The local rule's apply(), as update_at() has the other's."""
        return _with(self.local, self.hyper(step, name))

    def divisor(self, tokens: float) -> float:
        """What the sum that arrives at a shard is divided by: the tokens of the clock, or how many steps it sums."""
        return float(self.needed) if self.local else tokens

    @property
    def remembers(self) -> bool:
        """Whether a microbatch of a clock leaves something that its next one begins with."""
        return self.compress is not None or self.local is not None

    @property
    def clips(self) -> bool:
        """Whether the server does."""
        return self.clip_norm is not None and self.local is None

    def clip(self, squares: np.ndarray) -> tuple[float, float]:
        """Σg² of every block -> (norm of the gradient, factor that clips it)."""
        assert self.clip_norm is not None
        norm = clip.norm_of_blocks(self.k, squares)
        return norm, clip.clip_scale(norm, self.clip_norm)


def _with(rule: Any, hyper: Mapping[str, Any]) -> Callable[..., None]:
    """A rule's apply() with these hyper-parameters."""
    if isinstance(rule, Rule):
        return rule.with_(**hyper).apply if hyper else rule.apply
    return partial(rule.apply, **hyper)
