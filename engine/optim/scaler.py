"""Loss scaling: gradients that are too small for float16 are multiplied up before they are rounded, and back after.

    scaler = eg.optim.GradScaler()
    with eg.autocast("float16"):
        loss = model(tokens, targets)
    scaler.scale(loss).backward()       gradients of s · loss: s times as large, in every product of backward
    scaler.step(optimizer)              divides them by s; steps, unless one of them is Inf or NaN
    scaler.update()                     s ← s/2 where one was, 2 s after 2,000 steps without

float16 ends at 6e-8 below and 65504 above. The largest s with which nothing overflows loses the least, and it is found
by trying: one too large costs a step, in which nothing is changed. s is a power of two, so scaling loses no bits.

Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, arXiv:1710.03740.
"""

from __future__ import annotations

import math
from typing import Any

from engine.backend import refuse
from engine.optim.clip import norm_of_gradients, scaled, with_gradients
from engine.optim.optimizers import Optimizer
from engine.tensor import Tensor


class GradScaler:
    """The factor s by which a loss is multiplied, found by trying.

    init_scale and growth: powers of two; s is multiplied by growth after growth_interval steps without an overflow, and
    divided by it after one with. With enabled=False every method passes on what it is given: for a program that runs
    with and without float16. Raises ValueError for numbers that are not so.
    """

    def __init__(self, init_scale: float = 65536.0, growth: float = 2.0, growth_interval: int = 2000,
                 enabled: bool = True):
        if growth < 2:
            raise ValueError(f"GradScaler: growth is {growth!r}, expected a power of two of at least 2")
        if growth_interval < 1:
            raise ValueError(f"GradScaler: growth_interval is {growth_interval!r}, expected at least 1")
        self.scale_factor = _power_of_two("GradScaler", "init_scale", init_scale)
        self.growth, self.growth_interval = _power_of_two("GradScaler", "growth", growth), growth_interval
        self.enabled = enabled
        self.good_steps = self.skipped_steps = 0
        # By id(optimizer), since the last update: whether the divided gradients are finite; which have made their step.
        self._finite: dict[int, bool] = {}
        self._stepped: set[int] = set()

    def scale(self, loss: Tensor) -> Tensor:
        """s · loss, in a graph."""
        refuse("GradScaler.scale")
        return loss * self.scale_factor if self.enabled else loss

    def unscale_(self, optimizer: Optimizer) -> bool:
        """Divide the gradients of an optimizer's parameters by s: to look at them, or clip them, before step.

        Returns whether all of them are finite. Raises RuntimeError if that was done since the last update.
        """
        if not self.enabled:
            return True
        if id(optimizer) in self._finite:
            raise RuntimeError("GradScaler.unscale_: the gradients of this optimizer are unscaled already; "
                               "call update() after step()")
        divided = []
        for p, g in with_gradients(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = scaled(g, 1 / self.scale_factor)
            divided.append(p.grad)
        self._finite[id(optimizer)] = math.isfinite(norm_of_gradients(divided))
        return self._finite[id(optimizer)]

    def step(self, optimizer: Optimizer, **options: Any) -> float | None:
        """optimizer.step(**options) on gradients divided by s; nothing at all if one of them is Inf or NaN.

        Returns what the optimizer does, None for a step that was left out. Raises RuntimeError for a second step since
        the last update, whose gradients nobody would have divided; else as the optimizer does.
        """
        if not self.enabled:
            return optimizer.step(**options)
        if id(optimizer) in self._stepped:
            raise RuntimeError("GradScaler.step: this optimizer has made a step already; call update() after step()")
        finite = self._finite.get(id(optimizer))
        if finite is None:
            finite = self.unscale_(optimizer)
        norm = optimizer.step(**options) if finite else None
        self._stepped.add(id(optimizer))
        return norm

    def update(self) -> None:
        """The factor of the next step. Raises RuntimeError if no gradients were divided since the last update."""
        if not self.enabled:
            return
        if not self._finite:
            raise RuntimeError("GradScaler.update: no step was made since the last update; call step(optimizer) first")
        if all(self._finite.values()):
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0 and self.scale_factor * self.growth < math.inf:
                self.scale_factor *= self.growth
        else:
            self.skipped_steps += 1
            self.good_steps = 0
            self.scale_factor = max(self.scale_factor / self.growth, 2.0**-126)
        self._finite.clear()
        self._stepped.clear()

    def state_dict(self) -> dict[str, Any]:
        """The factor and its history: plain numbers."""
        return {"scale": self.scale_factor, "good_steps": self.good_steps, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict. Raises ValueError, and changes nothing, if it is not one."""
        if set(state) != {"scale", "good_steps", "skipped_steps"}:
            raise ValueError(f"GradScaler.load_state_dict: got {sorted(state)}, expected scale, good_steps and "
                             "skipped_steps")
        scale = _power_of_two("GradScaler.load_state_dict", "scale", state["scale"])
        for name in ("good_steps", "skipped_steps"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"GradScaler.load_state_dict: {name} is {state[name]!r}, expected a whole number of "
                                 "at least 0")
        self.scale_factor, self.good_steps, self.skipped_steps = scale, state["good_steps"], state["skipped_steps"]
        self._finite.clear()
        self._stepped.clear()


def _power_of_two(what: str, name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf or math.frexp(value)[0] != 0.5:
        raise ValueError(f"{what}: {name} is {value!r}, expected a power of two")
    return float(value)
