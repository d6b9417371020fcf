"""Elementwise ops: y[i] = f(a[i], b[i], ...), with broadcasting.

Each is one kernel and one derivative. Broadcasting needs no care in the rules: the walk sums a gradient over the
axes that broadcasting added (autograd._fit).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine.backend import Array
from engine.dtypes import bool_
from engine.ops.registry import composite, op
from engine.tensor import Tensor

UNARY, BINARY = "... -> ...", "..., ... -> ..."
_erf = np.vectorize(math.erf, otypes=[float])


# ── arithmetic ────────────────────────────────────────────────────────────────────────────────────────

@op(BINARY, reference=np.add, method="__add__")
def add(k: Any, a: Array, b: Array) -> Array:
    """y = a + b."""
    return k.map("add", a, b)


@add.vjp
def _(g: Tensor) -> Any:
    return g, g


@op(BINARY, reference=np.subtract, method="__sub__")
def subtract(k: Any, a: Array, b: Array) -> Array:
    """y = a − b."""
    return k.map("subtract", a, b)


@subtract.vjp
def _(g: Tensor) -> Any:
    return g, -g


@op(BINARY, reference=np.multiply, method="__mul__")
def multiply(k: Any, a: Array, b: Array) -> Array:
    """y = a · b."""
    return k.map("multiply", a, b)


@multiply.vjp
def _(g: Tensor, a: Tensor, b: Tensor, needs: tuple[bool, ...]) -> Any:
    return g * b if needs[0] else None, g * a if needs[1] else None


@op(BINARY, reference=np.divide, types="float", method="__truediv__")
def divide(k: Any, a: Array, b: Array) -> Array:
    """y = a / b, IEEE: x/0 = ±∞, 0/0 = NaN. Integers become float32."""
    return k.map("divide", a, b)


@divide.vjp
def _(g: Tensor, b: Tensor, y: Tensor, needs: tuple[bool, ...]) -> Any:
    da = g / b
    return da, -(da * y) if needs[1] else None


@op(BINARY, reference=np.power, method="__pow__")
def pow(k: Any, a: Array, b: Array) -> Array:
    """y = aᵇ, with C's special cases: a⁰ = 1, also for NaN. Raises ValueError for integers to a negative power."""
    return k.map("pow", a, b)


@pow.vjp
def _(g: Tensor, a: Tensor, b: Tensor, y: Tensor, needs: tuple[bool, ...]) -> Any:
    # ∂/∂a = b aᵇ⁻¹, which is 0 for b = 0 also where a = 0; ∂/∂b = aᵇ ln a, which is 0 where a = 0 < b.
    da = g * where(b == 0, 0.0, b * pow(a, where(b == 0, 1.0, b - 1))) if needs[0] else None
    db = g * where(a == 0, 0.0, y * log(where(a == 0, 1.0, a))) if needs[1] else None
    return da, db


@op(BINARY, reference=np.floor_divide, method="__floordiv__")
def floor_divide(k: Any, a: Array, b: Array) -> Array:
    """y = ⌊a / b⌋, which is −0 for 1 // −∞. Raises ZeroDivisionError for integers divided by 0."""
    return k.map("floor_divide", a, b)


@op(BINARY, reference=np.remainder, method="__mod__")
def remainder(k: Any, a: Array, b: Array) -> Array:
    """y = a − ⌊a / b⌋ b, with the sign of b."""
    return k.map("remainder", a, b)


@op(BINARY, reference=np.maximum, method="maximum")
def maximum(k: Any, a: Array, b: Array) -> Array:
    """y = max(a, b); NaN if either is. Where they are equal, each gets half of the gradient."""
    return k.map("maximum", a, b)


@maximum.vjp
def _(g: Tensor, a: Tensor, b: Tensor) -> Any:
    half = where(a == b, 0.5, 0.0).to(dtype=g.dtype)
    return g * (where(b < a, 1.0, half)), g * (where(a < b, 1.0, half))


@op(BINARY, reference=np.minimum, method="minimum")
def minimum(k: Any, a: Array, b: Array) -> Array:
    """y = min(a, b); NaN if either is. Where they are equal, each gets half of the gradient."""
    return k.map("minimum", a, b)


@minimum.vjp
def _(g: Tensor, a: Tensor, b: Tensor) -> Any:
    half = where(a == b, 0.5, 0.0).to(dtype=g.dtype)
    return g * (where(a < b, 1.0, half)), g * (where(b < a, 1.0, half))


@op(UNARY, reference=np.negative, method="__neg__")
def negative(k: Any, x: Array) -> Array:
    """y = −x."""
    return k.map("negative", x)


@negative.vjp
def _(g: Tensor) -> Tensor:
    return -g


@op(UNARY, reference=np.abs, method="__abs__")
def abs(k: Any, x: Array) -> Array:
    """y = |x|; the gradient at 0 is 0."""
    return k.map("abs", x)


@abs.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g * sign(x)


@op(UNARY, reference=np.sign)
def sign(k: Any, x: Array) -> Array:
    """y = −1, 0 or 1; NaN stays. Its gradient is 0."""
    return k.map("sign", x)


@sign.vjp
def _(g: Tensor) -> Tensor:
    return g * 0.0


@op(UNARY, reference=np.square, method="square")
def square(k: Any, x: Array) -> Array:
    """y = x²."""
    return k.map("square", x)


@square.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g * (x * 2.0)


@op(UNARY, reference=lambda x: 1 / x, types="float")
def reciprocal(k: Any, x: Array) -> Array:
    """y = 1 / x."""
    return k.map("reciprocal", x)


@reciprocal.vjp
def _(g: Tensor, y: Tensor) -> Tensor:
    return -(g * (y * y))


@op(UNARY, reference=np.floor)
def floor(k: Any, x: Array) -> Array:
    """y = ⌊x⌋."""
    return k.map("floor", x)


@op(UNARY, reference=np.ceil)
def ceil(k: Any, x: Array) -> Array:
    """y = ⌈x⌉."""
    return k.map("ceil", x)


@op(UNARY, reference=np.round)
def round(k: Any, x: Array) -> Array:
    """y = the nearest whole number, halves to the even one."""
    return k.map("round", x)


# ── exponentials and their kin ────────────────────────────────────────────────────────────────────────

@op(UNARY, reference=np.exp, types="float", method="exp")
def exp(k: Any, x: Array) -> Array:
    """y = eˣ."""
    return k.map("exp", x)


@exp.vjp
def _(g: Tensor, y: Tensor) -> Tensor:
    return g * y


@op(UNARY, reference=np.expm1, types="float")
def expm1(k: Any, x: Array) -> Array:
    """y = eˣ − 1, exact to rounding near 0."""
    return k.map("expm1", x)


@expm1.vjp
def _(g: Tensor, y: Tensor) -> Tensor:
    return g * (y + 1.0)


@op(UNARY, reference=np.log, types="float", method="log")
def log(k: Any, x: Array) -> Array:
    """y = ln x; −∞ at 0, NaN below."""
    return k.map("log", x)


@log.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / x


@op(UNARY, reference=np.log1p, types="float")
def log1p(k: Any, x: Array) -> Array:
    """y = ln(1 + x), exact to rounding near 0."""
    return k.map("log1p", x)


@log1p.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g / (x + 1.0)


@op(UNARY, reference=np.sqrt, types="float", method="sqrt")
def sqrt(k: Any, x: Array) -> Array:
    """y = √x; NaN below 0."""
    return k.map("sqrt", x)


@sqrt.vjp
def _(g: Tensor, y: Tensor) -> Tensor:
    return g * (0.5 / y)


@op(UNARY, reference=lambda x: 1 / np.sqrt(x), types="float", method="rsqrt")
def rsqrt(k: Any, x: Array) -> Array:
    """y = 1/√x."""
    return k.map("rsqrt", x)


@rsqrt.vjp
def _(g: Tensor, y: Tensor) -> Tensor:
    return g * (-0.5 * (y * y * y))


@op(UNARY, reference=np.sin, types="float")
def sin(k: Any, x: Array) -> Array:
    """y = sin x, x in radians."""
    return k.map("sin", x)


@sin.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g * cos(x)


@op(UNARY, reference=np.cos, types="float")
def cos(k: Any, x: Array) -> Array:
    """y = cos x, x in radians."""
    return k.map("cos", x)


@cos.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return -(g * sin(x))


@op(UNARY, reference=np.tanh, types="float", method="tanh")
def tanh(k: Any, x: Array) -> Array:
    """y = (eˣ − e⁻ˣ) / (eˣ + e⁻ˣ)."""
    return k.map("tanh", x)


@tanh.vjp
def _(g: Tensor, y: Tensor) -> Tensor:
    return g * (1.0 - y * y)


@op(UNARY, reference=lambda x: 1 / (1 + np.exp(-x)), types="float", method="sigmoid")
def sigmoid(k: Any, x: Array) -> Array:
    """y = 1 / (1 + e⁻ˣ)."""
    return k.map("sigmoid", x)


@sigmoid.vjp
def _(g: Tensor, y: Tensor) -> Tensor:
    return g * (y * (1.0 - y))


@op(UNARY, reference=_erf, types="float")
def erf(k: Any, x: Array) -> Array:
    """y = 2/√π ∫₀ˣ e^(−t²) dt."""
    return k.map("erf", x)


@erf.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g * (exp(-(x * x)) * (2 / math.sqrt(math.pi)))


@op(UNARY, reference=lambda x: np.logaddexp(x, 0), types="float")
def softplus(k: Any, x: Array) -> Array:
    """y = ln(1 + eˣ)."""
    return k.map("softplus", x)


@softplus.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return g * sigmoid(x)


# ── activations: fused, the derivative in one pass ────────────────────────────────────────────────────

@op(UNARY, types="float!", method="relu")
def relu(k: Any, x: Array) -> Array:
    """y = max(x, 0); the gradient at 0 is 0."""
    return k.map("relu", x)


@relu.kernel_vjp
def _(k: Any, g: Array, x: Array) -> Array:
    return k.map("relu_vjp", g, x)


@relu.composition
def _(x: Tensor) -> Tensor:
    return where(x <= 0.0, 0.0, x)


@op(UNARY, types="float!")
def silu(k: Any, x: Array) -> Array:
    """y = x σ(x). Hendrycks, Gimpel 2016, arXiv:1606.08415; also called swish."""
    return k.map("silu", x)


@silu.kernel_vjp
def _(k: Any, g: Array, x: Array) -> Array:
    return k.map("silu_vjp", g, x)


@silu.composition
def _(x: Tensor) -> Tensor:
    return x * sigmoid(x)


@op(UNARY, types="float!")
def gelu(k: Any, x: Array) -> Array:
    """y = x Φ(x), Φ the normal distribution function. Hendrycks, Gimpel 2016, arXiv:1606.08415, eq. 1."""
    return k.map("gelu", x)


@gelu.kernel_vjp
def _(k: Any, g: Array, x: Array) -> Array:
    return k.map("gelu_vjp", g, x)


@gelu.composition
def _(x: Tensor) -> Tensor:
    return x * ((erf(x * math.sqrt(0.5)) + 1.0) * 0.5)


@op(UNARY, types="float!")
def gelu_tanh(k: Any, x: Array) -> Array:
    """y = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), GPT-2's form. Hendrycks, Gimpel 2016, arXiv:1606.08415, sec. 2."""
    return k.map("gelu_tanh", x)


@gelu_tanh.kernel_vjp
def _(k: Any, g: Array, x: Array) -> Array:
    return k.map("gelu_tanh_vjp", g, x)


@gelu_tanh.composition
def _(x: Tensor) -> Tensor:
    # (1 + tanh z)/2 = σ(2z), which keeps its digits where 1 + tanh has none left
    return x * sigmoid((x + x * x * x * 0.044715) * (2 * math.sqrt(2 / math.pi)))


# ── selection ─────────────────────────────────────────────────────────────────────────────────────────

@op("..., ..., ... -> ...", reference=np.where, fixed=("condition",))
def where(k: Any, condition: Array, a: Array, b: Array) -> Array:
    """y = a where condition, else b."""
    if condition.dtype is not bool_:
        condition = k.map("not_equal", condition, k.constant(0, condition.dtype), dtype=bool_)
    return k.map("where", condition, a, b)


@where.vjp
def _(g: Tensor, condition: Tensor, needs: tuple[bool, ...]) -> Any:
    return None, where(condition, g, 0.0) if needs[1] else None, where(condition, 0.0, g) if needs[2] else None


@composite(UNARY, reference=np.clip, method="clip")
def clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """y = x, or the bound that it exceeds; either may be None. The gradient is 0 outside, and 1/2 on a bound."""
    x = x if min is None else maximum(x, min)
    return x if max is None else minimum(x, max)
