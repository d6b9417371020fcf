"""Elementwise functions of the array API standard that no layer needs: NumPy computes them, behind the launch point.

They have no C kernel but NumPy's accuracy (a float32 result is within 4 ULP; of logaddexp each of its terms is) and its
choice of vector instructions, so their bits are promised per version of NumPy and processor.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine.backend import Array
from engine.dtypes import bool_
from engine.ops.elementwise import BINARY, UNARY, sigmoid, sqrt, where
from engine.ops.logic import isinf
from engine.ops.registry import op
from engine.tensor import Tensor

# ── logarithms ────────────────────────────────────────────────────────────────────────────────────────

@op(UNARY, reference=np.log2, types="float")
def log2(k: Any, x: Array) -> Array:
    """y = log₂ x; −∞ at 0, NaN below."""
    return k.map("log2", x)


@log2.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / (x * math.log(2))


@op(UNARY, reference=np.log10, types="float")
def log10(k: Any, x: Array) -> Array:
    """y = log₁₀ x; −∞ at 0, NaN below."""
    return k.map("log10", x)


@log10.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / (x * math.log(10))


@op(BINARY, reference=np.logaddexp, types="float")
def logaddexp(k: Any, a: Array, b: Array) -> Array:
    """y = ln(eᵃ + eᵇ) = max(a, b) + ln(1 + e^−|a − b|), without overflow; where y is near 0 these two cancel."""
    return k.map("logaddexp", a, b)


@logaddexp.vjp
def _(g: Tensor, a: Tensor, b: Tensor) -> Any:
    difference = where(isinf(a) & (a == b), 0.0, a - b)  # equal infinities share the gradient, and ∞ − ∞ is NaN
    return g * sigmoid(difference), g * sigmoid(-difference)


# ── the circle ────────────────────────────────────────────────────────────────────────────────────────

@op(UNARY, reference=np.tan, types="float")
def tan(k: Any, x: Array) -> Array:
    """y = sin x / cos x, x in radians."""
    return k.map("tan", x)


@tan.vjp
def _(g: Tensor, y: Tensor) -> Tensor:
    return g * (y * y + 1.0)


@op(UNARY, reference=np.arcsin, types="float")
def asin(k: Any, x: Array) -> Array:
    """y in [−π/2, π/2] with sin y = x; NaN where |x| > 1."""
    return k.map("asin", x)


@asin.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / sqrt((1.0 - x) * (1.0 + x))


@op(UNARY, reference=np.arccos, types="float")
def acos(k: Any, x: Array) -> Array:
    """y in [0, π] with cos y = x; NaN where |x| > 1."""
    return k.map("acos", x)


@acos.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return -(g / sqrt((1.0 - x) * (1.0 + x)))


@op(UNARY, reference=np.arctan, types="float")
def atan(k: Any, x: Array) -> Array:
    """y in [−π/2, π/2] with tan y = x."""
    return k.map("atan", x)


@atan.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / (x * x + 1.0)


@op(BINARY, reference=np.arctan2, types="float")
def atan2(k: Any, a: Array, b: Array) -> Array:
    """The angle of the point with abscissa b and ordinate a, in [−π, π]."""
    return k.map("atan2", a, b)


@atan2.vjp
def _(g: Tensor, a: Tensor, b: Tensor) -> Any:
    r = hypot(a, b)  # twice divided by, since r² overflows where r does not
    return g * (b / r / r), -(g * (a / r / r))


@op(BINARY, reference=np.hypot, types="float")
def hypot(k: Any, a: Array, b: Array) -> Array:
    """y = √(a² + b²), without overflow on the way; the gradient at 0, 0 is 0."""
    return k.map("hypot", a, b)


@hypot.vjp
def _(g: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Any:
    r = where(y == 0, 1.0, y)
    return g * (a / r), g * (b / r)


# ── the hyperbola ─────────────────────────────────────────────────────────────────────────────────────

@op(UNARY, reference=np.sinh, types="float")
def sinh(k: Any, x: Array) -> Array:
    """y = (eˣ − e⁻ˣ) / 2."""
    return k.map("sinh", x)


@sinh.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g * cosh(x)


@op(UNARY, reference=np.cosh, types="float")
def cosh(k: Any, x: Array) -> Array:
    """y = (eˣ + e⁻ˣ) / 2."""
    return k.map("cosh", x)


@cosh.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g * sinh(x)


@op(UNARY, reference=np.arcsinh, types="float")
def asinh(k: Any, x: Array) -> Array:
    """y with sinh y = x: ln(x + √(x² + 1))."""
    return k.map("asinh", x)


@asinh.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / hypot(x, 1.0)


@op(UNARY, reference=np.arccosh, types="float")
def acosh(k: Any, x: Array) -> Array:
    """y ≥ 0 with cosh y = x: ln(x + √(x² − 1)); NaN where x < 1."""
    return k.map("acosh", x)


@acosh.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / (sqrt(x - 1.0) * sqrt(x + 1.0))


@op(UNARY, reference=np.arctanh, types="float")
def atanh(k: Any, x: Array) -> Array:
    """y with tanh y = x: ½ ln((1 + x)/(1 − x)); ±∞ at ±1, NaN outside."""
    return k.map("atanh", x)


@atanh.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / ((1.0 - x) * (1.0 + x))


# ── signs and neighbours ──────────────────────────────────────────────────────────────────────────────

@op(UNARY, reference=np.positive, method="__pos__")
def positive(k: Any, x: Array) -> Array:
    """y = x, in memory of its own."""
    return k.map("copy", x)


@positive.vjp
def _(g: Tensor) -> Tensor:
    return g


@op(UNARY, reference=np.signbit)
def signbit(k: Any, x: Array) -> Array:
    """Whether x carries a minus sign, as −0 and some NaNs do."""
    return k.map("signbit", x, dtype=bool_)


@op(BINARY, reference=np.copysign, types="float")
def copysign(k: Any, a: Array, b: Array) -> Array:
    """y = |a| with the sign of b, be it that of −0 or of a NaN. The gradient of b is 0."""
    return k.map("copysign", a, b)


@copysign.vjp
def _(g: Tensor, a: Tensor, b: Tensor) -> Any:
    return where(signbit(a) == signbit(b), g, -g), None


@op(BINARY, reference=np.nextafter, types="float")
def nextafter(k: Any, a: Array, b: Array) -> Array:
    """The floating-point number next to a on the way to b; b where they are equal."""
    return k.map("nextafter", a, b)


@op(UNARY, reference=np.trunc)
def trunc(k: Any, x: Array) -> Array:
    """y = x without its fraction: rounded towards 0."""
    return k.map("trunc", x)
