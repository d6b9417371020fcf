"""Where the inputs of an op's examples come from: Hypothesis, or a seeded generator.

A row of the op table (opspec.py) says once how an example of the op is drawn, in terms of a Source. Under Hypothesis
(strategies.py) the examples are small, varied and shrink; `Seeded` gives one example for a number, of a chosen size,
for the checks that need large inputs and for benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.testing.layouts import LAYOUTS, zero_stride


class Source:
    """Draws shapes, numbers and arrays. Subclasses say how a number is drawn.

    smooth:  keep away from kinks and from ties, as finite differences need
    special: mix ±0, ±∞, NaN, subnormals and the largest numbers in among the values
    arrange: lay operands out in other ways than C order
    """

    def __init__(self, dtype: str = "float64", *, smooth: bool = False, special: bool = False, arrange: bool = False,
                 largest_side: int = 6):
        self.dtype = np.dtype(dtype)
        self.smooth, self.special, self.arrange = smooth, special, arrange
        self.largest_side = largest_side
        self.has_special = False

    # ── how a number is drawn ───────────────────────────────────────────────────────────────────────

    def integer(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        raise NotImplementedError

    def choice(self, options: Sequence[Any]) -> Any:
        """One of the options; under Hypothesis it shrinks towards the first."""
        return options[self.integer(0, len(options) - 1)]

    def boolean(self) -> bool:
        return bool(self.integer(0, 1))

    def side(self, low: int = 0) -> int:
        """The length of an axis."""
        return self.integer(low, max(low, self.largest_side))

    def shape(self, least: int = 0, most: int = 3, low: int = 0) -> tuple[int, ...]:
        """Of `least` to `most` axes, each of length `low` or more. Now and then one long axis, for tails and blocks."""
        sides = [self.side(low) for _ in range(self.integer(least, most))]
        if sides and self.integer(0, 3) == 3:
            sides[-1] = self.integer(low, 100)
        return tuple(sides)

    def broadcastable(self, count: int, most: int = 3) -> list[tuple[int, ...]]:
        """`count` shapes that broadcast together: some lack leading axes, some have a length of 1."""
        whole = self.shape(most=most)
        shapes = []
        for _ in range(count):
            own = whole[self.integer(0, len(whole)):] if self.integer(0, 2) == 2 else whole
            shapes.append(tuple(1 if self.integer(0, 4) == 4 else n for n in own))
        return shapes

    # ── arrays ──────────────────────────────────────────────────────────────────────────────────────

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.integer(0, 2**16))

    def array(self, shape: tuple[int, ...], low: float = -4.0, high: float = 4.0, *, kinks: Sequence[float] = (),
              margin: float = 0.05, special: bool = True) -> np.ndarray:
        """Floating values in [low, high], away from the kinks if smooth."""
        rng = self.generator()
        x = np.asarray(rng.uniform(low, high, shape))
        for kink in kinks if self.smooth else ():
            x = np.where(np.abs(x - kink) < margin, kink + np.where(x < kink, -margin, margin) * 1.5, x)
        if self.smooth:
            x = np.round(x * 2.0**30) / 2.0**30  # as the gradient checks want it (checks.py)
        x = np.asarray(x).astype(self.dtype)
        if self.special and special and x.size and self.boolean():
            self._put_special(x, rng)
        return self.arranged(x)

    def distinct(self, shape: tuple[int, ...], low: float = -4.0, high: float = 4.0) -> np.ndarray:
        """Values with no two close to each other if smooth; else with many ties."""
        rng = self.generator()
        size = int(np.prod(shape))
        if self.smooth:
            x = low + 0.125 * np.arange(size)  # further apart than the differences reach
            x = np.asarray(rng.permutation(x).reshape(shape)).astype(self.dtype)
            return self.arranged(x, repeat=False)
        x = np.asarray(rng.integers(-3, 4, shape) * ((high - low) / 8) + (high + low) / 2).astype(self.dtype)
        if self.special and size and self.boolean():
            self._put_special(x, rng)
        return self.arranged(x)

    def whole(self, shape: tuple[int, ...], low: int, high: int, dtype: str = "int64") -> np.ndarray:
        """Integers in [low, high], such as indices."""
        return self.arranged(np.asarray(self.generator().integers(low, high + 1, shape)).astype(dtype))

    def truth(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.arranged(np.asarray(self.generator().integers(0, 2, shape)).astype(bool))

    def _put_special(self, x: np.ndarray, rng: np.random.Generator) -> None:
        count = 1 + x.size // 8
        x.reshape(-1)[rng.integers(x.size, size=count)] = some_special(x.dtype, rng, count)
        self.has_special = True

    def arranged(self, x: np.ndarray, repeat: bool = True) -> np.ndarray:
        """x in a layout of the source's choice; with `repeat`, perhaps with an axis of stride 0."""
        if not self.arrange:
            return x
        names = [*LAYOUTS, "zero stride"] if repeat else list(LAYOUTS)
        name = self.choice(names)
        rng = np.random.default_rng(x.size)
        return zero_stride(x, rng) if name == "zero stride" else LAYOUTS[name](x, rng)

    def axes(self, ndim: int) -> Any:
        """An `axis` argument: None, one, or several."""
        if not ndim or self.integer(0, 3) == 3:
            return None
        if self.boolean():
            return self.axis(ndim)
        return tuple(i for i in range(ndim) if self.boolean())

    def axis(self, ndim: int) -> int:
        return self.integer(-ndim, ndim - 1)


class Seeded(Source):
    """A source that a number decides: every shape has `ndim` axes, where the op allows, each of length `side`."""

    def __init__(self, seed: int, dtype: str = "float64", *, side: int = 6, ndim: int = 2, **options: Any):
        super().__init__(dtype, largest_side=side, **options)
        self.ndim = ndim
        self._rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))

    def side(self, low: int = 0) -> int:
        return max(low, self.largest_side)

    def shape(self, least: int = 0, most: int = 3, low: int = 0) -> tuple[int, ...]:
        return (self.side(low),) * min(max(least, self.ndim), most)

    def broadcastable(self, count: int, most: int = 3) -> list[tuple[int, ...]]:
        shape = self.shape(most=most)
        return [shape] * (count - 1) + [shape[1:] if self.boolean() else shape]


def reduction_killers(dtype: np.dtype) -> np.ndarray:
    """Where reducing an argument loses most: next to multiples of π/2 and halfway between multiples of ln 2.

    355 and 103993 are all but multiples of π. Of all numbers of their type, 16367173 · 2⁷² (float32) and
    6381956970095103 · 2⁷⁹⁷ (float64) are the nearest to a multiple of π/2 (Muller 2016, "Elementary Functions", 3rd
    ed., section 11.2).
    """
    worst = 16367173 * 2.0**72 if np.dtype(dtype).itemsize == 4 else 6381956970095103 * 2.0**797
    turns = [k * math.pi / 2 for k in (1, 2, 3, 5, 1024, 65537)]
    positive = [*turns, 355.0, 103993.0, worst, *((k + 0.5) * math.log(2) for k in (0, 1, 100))]
    return np.array([*positive, *(-x for x in positive)]).astype(dtype)


def special_values(dtype: np.dtype) -> np.ndarray:
    """±0, ±1, ±∞, NaN, the smallest and largest subnormal and normal numbers, where exp over- and underflows, and where
    reducing an argument is hard."""
    kind = np.finfo(dtype)
    edge = float(np.log(float(kind.max)))
    least = float(np.log(float(kind.smallest_subnormal)))
    positive = [0.0, 1.0, np.inf, float(kind.smallest_subnormal), float(kind.tiny), float(kind.tiny) * (1 - kind.eps),
                float(kind.max), float(kind.eps), 0.5, 1.5, 2.5, edge, edge * 1.01, -least, -least * 1.01, 1e4]
    with np.errstate(over="ignore"):
        return np.array([*positive, *(-x for x in positive), np.nan, *reduction_killers(dtype)]).astype(dtype)


def some_special(dtype: np.dtype, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` numbers: half of special_values, a quarter neighbours of powers of two, a quarter subnormals, of either
    sign."""
    kind = np.finfo(dtype)
    power = np.ldexp(np.ones(count, dtype), rng.integers(kind.minexp - kind.nmant, kind.maxexp, count))
    near = np.nextafter(power, rng.choice([0, np.inf], count).astype(dtype))
    subnormal = rng.integers(1, 2**kind.nmant, count) * kind.smallest_subnormal
    signed = rng.choice([-1, 1], count) * np.where(rng.integers(2, size=count), near, subnormal)
    return np.where(rng.integers(2, size=count), rng.choice(special_values(dtype), count), signed).astype(dtype)
