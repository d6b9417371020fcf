"""How far workers may run ahead of the updates: BSP, SSP, ASP, and clocks that do without their slowest microbatches.

Let `committed` be the number of clocks whose updates are done on every shard.

    bsp      bulk-synchronous: clock c begins once clock c − 1 is committed                  Valiant 1990
    ssp:s    stale-synchronous: clock c begins once clock c − 1 − s is committed             Ho et al. 2013
    asp      asynchronous: each push is an update of its own, applied when it arrives        Recht et al. 2011 (Hogwild)
    backups  a clock is complete when all but `backups` of its microbatches are in           Chen et al. 2016

In BSP and SSP a clock has one *version*: the number of committed clocks when it was begun, for whichever worker asked
first. All its microbatches are computed on the parameters of that version, so a microbatch's gradient is a function of
(clock, microbatch) alone, whoever computes it and however often. That is what makes recomputing it harmless. The
staleness of clock c is c − version, at most s by construction; SSP with s = 0 is BSP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Damping = Callable[[int], float]
"""damping(staleness) -> the factor on the learning rate of an update that is so many updates late."""


def inverse_staleness(staleness: int) -> float:
    """1 / max(1, τ). Zhang, Gupta, Lian, Liu 2016, "Staleness-aware async-SGD", arXiv:1511.05950, eq. 6."""
    return 1.0 / max(1, staleness)


@dataclass(frozen=True)
class Consistency:
    """staleness: s of SSP, 0 for BSP; asynchronous: ASP, which has no bound; backups: how many may be left out."""

    staleness: int = 0
    asynchronous: bool = False
    backups: int = 0

    def __post_init__(self) -> None:
        for name, value in (("staleness", self.staleness), ("backups", self.backups)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Consistency: {name} is {value!r}, expected a whole number of at least 0")
        if self.asynchronous and (self.staleness or self.backups):
            raise ValueError("Consistency: asp has neither a staleness bound nor backups")

    @classmethod
    def parse(cls, text: str, backups: int = 0) -> Consistency:
        """From "bsp", "asp" or "ssp:3"."""
        name, colon, bound = text.partition(":")
        if name in ("bsp", "asp") and not colon:
            return cls(0, name == "asp", backups)
        if name == "ssp" and bound.isdecimal():
            return cls(int(bound), False, backups)
        raise ValueError(f"consistency is {text!r}, expected bsp, asp, or ssp: and a staleness bound, as in ssp:3")

    def may_begin(self, clock: int, committed: int, granted: int) -> bool:
        """Whether `clock` may begin, where clocks below `granted` may be applied."""
        if self.asynchronous:
            return clock < granted
        return clock <= committed + self.staleness and clock < granted + self.staleness

    def updates(self, clocks: int, microbatches: int) -> int:
        """How many updates make so many clocks: one each, or one for each microbatch."""
        return clocks * microbatches if self.asynchronous else clocks

    @property
    def replays(self) -> bool:
        """Whether clocks that are computed again from an older version give the same bits."""
        return not (self.asynchronous or self.staleness or self.backups)


BSP = Consistency()
