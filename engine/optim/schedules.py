"""Learning rate schedules: the learning rate as a function of the number of the update, t = 1, 2, 3 ...

    rate = warmup_cosine(3e-4, warmup=100, steps=2000)
    rate(1), rate(100), rate(2000)             # 3e-6, 3e-4, nearly 0

A schedule is a pure function, so a resumed run needs nothing but its step. Scheduler sets it in an optimizer's groups;
a parameter server takes the function itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Schedule = Callable[[int], float]


def constant(lr: float) -> Schedule:
    """η_t = lr."""
    return lambda t: lr


def linear(initial: float, steps: int, final: float = 0.0) -> Schedule:
    """A straight line from `initial` at t = 1 that reaches `final` after `steps` updates, and stays there."""
    _check("linear", steps)
    return lambda t: initial + (final - initial) * _progress(t, steps)


def cosine(initial: float, steps: int, final: float = 0.0) -> Schedule:
    """η_t = final + (initial − final) (1 + cos(π (t − 1) / steps)) / 2, then final.

    Loshchilov, Hutter 2016, arXiv:1608.03983, eq. 5, without restarts.
    """
    _check("cosine", steps)
    return lambda t: final + (initial - final) * (1 + math.cos(math.pi * _progress(t, steps))) / 2


def step_decay(initial: float, every: int, factor: float = 0.1) -> Schedule:
    """Multiplied by `factor` after every `every` updates."""
    _check("step_decay", every)
    return lambda t: initial * factor ** ((t - 1) // every)


def exponential(initial: float, factor: float) -> Schedule:
    """Multiplied by `factor` after every update."""
    return lambda t: initial * factor ** (t - 1)


def warmup(steps: int, after: Schedule) -> Schedule:
    """A straight line from nothing up to after(1) at t = `steps`, then after(1), after(2) ...

    Goyal et al. 2017, arXiv:1706.02677, section 2.2.
    """
    return lambda t: after(1) * t / steps if t <= steps else after(t - steps)


def warmup_cosine(peak: float, warmup_steps: int, steps: int, final: float = 0.0) -> Schedule:
    """Up to `peak` in `warmup_steps` updates, then down along a cosine, `steps` updates in all."""
    return warmup(warmup_steps, cosine(peak, max(1, steps - warmup_steps), final))


def one_cycle(peak: float, steps: int, rise: float = 0.3, initial: float | None = None,
              final: float | None = None) -> Schedule:
    """Up to `peak` in the first part of `steps` (its share is `rise`) and down in the rest, each along half a cosine.

    initial: peak / 25 by default; final: initial / 10,000. Smith, Topin 2017, arXiv:1708.07120.
    """
    _check("one_cycle", steps)
    if not 0 < rise < 1:
        raise ValueError(f"one_cycle: rise is {rise!r}, expected a share in (0, 1)")
    low = peak / 25 if initial is None else initial
    rising = max(1, round(rise * steps))
    up, down = cosine(low, rising, peak), cosine(peak, max(1, steps - rising), low / 1e4 if final is None else final)
    return lambda t: up(t) if t <= rising else down(t - rising)


def _progress(t: int, steps: int) -> float:
    """How much of a phase lies behind update t: 0 at its first, 1 once it is over."""
    return min(max(t - 1, 0) / steps, 1.0)


def _check(name: str, steps: int) -> None:
    if not steps >= 1:
        raise ValueError(f"{name}: the number of updates is {steps!r}, expected at least 1")


class Scheduler:
    """Sets the learning rate of an optimizer's groups, for the first update when it is made, then at each step().

        scheduler = Scheduler(optimizer, warmup_cosine(3e-4, 100, 2000))
        for batch in batches:
            ...
            optimizer.step()
            scheduler.step()

    schedule: one for all groups, or a list with one for each.
    """

    def __init__(self, optimizer: Any, schedule: Schedule | Sequence[Schedule]):
        groups = optimizer.param_groups
        self.optimizer = optimizer
        self.schedules = [schedule] * len(groups) if callable(schedule) else list(schedule)
        if len(self.schedules) != len(groups):
            raise ValueError(f"Scheduler: got {len(self.schedules)} schedules, expected one for each of the "
                             f"{len(groups)} groups")
        self.updates = 0
        self._set()

    def step(self) -> None:
        """To be called after the optimizer's step()."""
        self.updates += 1
        self._set()

    @property
    def last_lr(self) -> list[float]:
        """The learning rate of each group for the coming update."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def _set(self) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(self.schedules):
            raise ValueError(f"Scheduler: the optimizer has {len(groups)} groups by now, expected "
                             f"{len(self.schedules)} as when this was made")
        for group, schedule in zip(groups, self.schedules):
            group["lr"] = schedule(self.updates + 1)

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after as many updates as were saved. Raises ValueError, and changes nothing, for anything else."""
        if set(state) != {"updates"} or not isinstance(state["updates"], int) or state["updates"] < 0:
            raise ValueError(f"Scheduler.load_state_dict: got {state!r:.100}, expected a number of updates")
        self.updates = state["updates"]
        self._set()
