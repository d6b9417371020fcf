"""Rows of the elementwise functions that NumPy computes.

Their references are the same functions in long double (80 bits on x86-64), so not what is tested; where that is no
wider than float64 they are NumPy's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.testing.opspec import Drawing
from engine.testing.rounded import Rounded, absolute, exp, log1p, maximum, plain, where
from engine.testing.rows.elementwise import LARGE, apart, binary, one, two, unary
from engine.testing.source import Source


def widely(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """The function of float64 arrays, by way of long double."""
    def run(*operands: np.ndarray) -> np.ndarray:
        return np.asarray(function(*[np.asarray(x, np.longdouble) for x in operands])).astype(np.float64)
    return run


def over(smooth: tuple[float, float], whole: tuple[float, float]) -> Drawing:
    """One operand: from the first range where differences are taken, from the second where values are compared."""
    def draw(s: Source) -> Any:
        return one(*(smooth if s.smooth else whole))(s)
    return draw


def logaddexp(a: Any, b: Any) -> Any:
    """max(a, b) + ln(1 + e^−|a − b|), as NumPy computes it: two terms that cancel where the result is near 0."""
    top = maximum(a, b)
    return where(plain(a) == plain(b), top + np.log(2.0), top + log1p(exp(-absolute(a - b))))


def large(low: float, high: float) -> Drawing:
    return lambda s: ([s.array(LARGE, low, high)], {})


def away_from_0(s: Source) -> Any:
    """Two operands, in the first quadrant where differences are taken."""
    return (two(0.5, 4.0) if s.smooth else two())(s)


unary("log2", one(0.1, 8.0), ulps="log2", reference=widely(np.log2), analytic=np.log2)
unary("log10", one(0.1, 8.0), ulps="log10", reference=widely(np.log10), analytic=np.log10)
binary("logaddexp", two(-30, 30), formula=logaddexp)
unary("tan", over((-1.2, 1.2), (-40, 40)), ulps="tan", reference=widely(np.tan))
unary("asin", over((-0.9, 0.9), (-1, 1)), ulps="asin", reference=widely(np.arcsin), large=large(-0.9, 0.9))
unary("acos", over((-0.9, 0.9), (-1, 1)), ulps="acos", reference=widely(np.arccos), large=large(-0.9, 0.9))
unary("atan", one(-40, 40), ulps="atan", reference=widely(np.arctan))
binary("atan2", away_from_0, ulps="atan2", reference=widely(np.arctan2))
binary("hypot", away_from_0, ulps="hypot", reference=widely(np.hypot))
unary("sinh", one(-9, 9), ulps="sinh", reference=widely(np.sinh), analytic=np.sinh)
unary("cosh", one(-9, 9), ulps="cosh", reference=widely(np.cosh), analytic=np.cosh)
unary("asinh", one(-40, 40), ulps="asinh", reference=widely(np.arcsinh))
unary("acosh", over((1.2, 8.0), (1, 40)), ulps="acosh", reference=widely(np.arccosh), large=large(1.2, 40))
unary("atanh", over((-0.9, 0.9), (-1, 1)), ulps="atanh", reference=widely(np.arctanh), large=large(-0.9, 0.9))

# ── exact ─────────────────────────────────────────────────────────────────────────────────────────────

unary("positive", linear=(0,), integers=True, reference=lambda x: x)
unary("signbit", wrt=())
binary("copysign", lambda s: ([s.array(shape, kinks=(0.0,)) for shape in s.broadcastable(2)], {}), wrt=(0,))
unary("trunc", one(kinks=tuple(range(-4, 5))), wrt=(), integers=True)


def _neighbour(a: Any, b: Any) -> np.ndarray:
    """In the type of the operands: the neighbours of a float32 are others than those of the same float64."""
    if isinstance(a, Rounded):
        a, b = (x.value.astype(x.dtype) for x in (a, b))
    return np.nextafter(a, b).astype(np.float64)


binary("nextafter", apart(), wrt=(), formula=_neighbour)
