"""Rows of the elementwise ops, selection and comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import engine as eg
from engine.testing import formulas
from engine.testing.opspec import Drawing, ErrorCase, OpSpec, register
from engine.testing.source import Source

Draw = tuple[list[Any], dict[str, Any]]


def one(low: float = -4.0, high: float = 4.0, kinks: tuple[float, ...] = (), special: bool = True) -> Drawing:
    """One floating operand."""
    return lambda s: ([s.array(s.shape(), low, high, kinks=kinks, special=special)], {})


def two(low: float = -4.0, high: float = 4.0, special: bool = True) -> Drawing:
    """Two floating operands that broadcast."""
    return lambda s: ([s.array(shape, low, high, special=special) for shape in s.broadcastable(2)], {})


def apart(low: float = -4.0, high: float = 4.0) -> Drawing:
    """Two operands that are nowhere nearly equal if smooth, and often equal if not."""
    def draw(s: Source) -> Draw:
        left, right = s.broadcastable(2)
        if not s.smooth:
            return [s.distinct(left, low, high), s.distinct(right, low, high)], {}
        a = s.array(left, low, high)
        rng = s.generator()
        b = rng.uniform(low, high, right)
        if left != right or not a.size:  # under broadcasting: two bands
            return [np.where(a < 0, a - 1, a + 1), (b / max(abs(low), abs(high)) / 2).astype(s.dtype)], {}
        return [a, (a + np.where(b < 0, b - 0.1, b + 0.1)).astype(s.dtype)], {}
    return draw


def whole_two(low: int = -9, high: int = 9, dtype: str = "int64") -> Drawing:
    """Two integer operands that broadcast."""
    return lambda s: ([s.whole(shape, low, high, dtype) for shape in s.broadcastable(2)], {})


LARGE = (301, 307)  # several pieces for the threads, and no multiple of a vector


def unary(name: str, draw: Drawing | None = None, **row: Any) -> OpSpec:
    row = {"special": True, "large": lambda s: ([s.array(LARGE, 0.5, 4.0)], {}), **row}
    return register(OpSpec(name, draw or one(), **row))


def binary(name: str, draw: Drawing | None = None, **row: Any) -> OpSpec:
    function: Callable[..., Any] = getattr(eg, name)
    row = {"large": lambda s: ([s.array(LARGE, 0.5, 4.0), s.array(LARGE[1:], 0.5, 4.0)], {}), **row}
    kind = eg.int64 if name.startswith("bitwise") else eg.float32
    clash = ErrorCase(lambda: function(eg.zeros(2, 3, dtype=kind), eg.zeros(4, 3, dtype=kind)), ValueError,
                      (name, "(2, 3)", "(4, 3)"))
    row = {"wrt": (0, 1), "special": True, **row, "errors": (clash, *row.get("errors", ()))}
    return register(OpSpec(name, draw or two(), **row))


# ── arithmetic: + − × ÷ √ and what selects or moves bits are correctly rounded, so exact ──────────────

binary("add", linear=(0, 1), integers=True)
binary("subtract", linear=(0, 1), integers=True)
binary("multiply", linear=(0, 1), integers=True)
binary("divide", lambda s: ([s.array(x, 0.5, 4.0) for x in s.broadcastable(2)], {}), linear=(0,))
binary("pow", lambda s: ([s.array(x, 0.25, 3.0) for x in s.broadcastable(2)], {}), ulps="pow",
       errors=(ErrorCase(lambda: eg.pow(eg.tensor([2]), eg.tensor([-1])), ValueError, ("pow", "negative")),))


def _quotients(s: Source) -> Draw:
    """Dividends and divisors of both signs, whole numbers, so that the quotients' floors are decided exactly."""
    a, b = s.broadcastable(2)
    return [s.whole(a, -40, 40, str(s.dtype)), s.whole(b, 1, 9, str(s.dtype))], {}


def _floored(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(a) & np.isfinite(b), np.floor_divide(a, b), a / b)


def _dividends(s: Source) -> Draw:
    """The same, with infinities on either side, or both, if special."""
    operands, _ = _quotients(s)
    if not s.special:
        return operands, {}
    edge = np.array([np.inf, -np.inf], s.dtype)
    rng = s.generator()
    return [s.arranged(np.where(rng.integers(0, 3, x.shape) == 0, rng.choice(edge, x.shape), x)) for x in operands], {}


binary("floor_divide", _dividends, wrt=(), integers=True, reference=_floored,
       errors=(ErrorCase(lambda: eg.tensor([2]) // eg.tensor([0]), ZeroDivisionError, ("floor_divide",)),))
binary("remainder", _quotients, wrt=(), integers=True)
binary("maximum", apart(), signed_zero=False, integers=True)
binary("minimum", apart(), signed_zero=False, integers=True)
unary("negative", linear=(0,), integers=True)
unary("abs", one(kinks=(0.0,)), integers=True)
unary("sign", one(kinks=(0.0,)), integers=True)
unary("square", integers=True, analytic=np.square)
unary("reciprocal", one(0.5, 4.0), analytic=np.reciprocal)
unary("floor", one(kinks=tuple(range(-4, 5))), wrt=())
unary("ceil", one(kinks=tuple(range(-4, 5))), wrt=())
unary("round", lambda s: ([s.distinct(s.shape(), -4, 4)], {}), wrt=())  # ties among them

# ── functions ─────────────────────────────────────────────────────────────────────────────────────────

unary("exp", one(-80, 80), ulps="exp", analytic=np.exp)
unary("expm1", one(-3, 3), ulps="expm1", analytic=np.expm1)
unary("log", one(0.1, 8.0), ulps="log", analytic=np.log)
unary("log1p", one(-0.8, 8.0), ulps="log1p", analytic=np.log1p)
unary("sqrt", one(0.1, 8.0), analytic=np.sqrt)
unary("rsqrt", one(0.1, 8.0), ulps="rsqrt", reference=lambda x: 1 / np.sqrt(x),
      analytic=lambda x: 1 / np.sqrt(x))
unary("sin", one(-40, 40), ulps="sin", analytic=np.sin)
unary("cos", one(-40, 40), ulps="cos", analytic=np.cos)
unary("tanh", one(-9, 9), ulps="tanh")
unary("sigmoid", one(-30, 30), ulps="sigmoid",
      reference=lambda x: np.where(x >= 0, 1.0, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x))))
unary("erf", one(-4, 4), ulps="erf")
unary("softplus", one(-30, 30), ulps="softplus", formula=formulas.softplus)


def not_floating(name: str) -> ErrorCase:
    function = getattr(eg, name)
    return ErrorCase(lambda: function(eg.tensor([1, 2])), TypeError, (name, "int64", "float32"))


# Their kernel gradients are compared with the equations; a NaN among the inputs of relu's is defined to give 0.
unary("relu", one(kinks=(0.0,)), formula=formulas.relu, gradient=formulas.relu_vjp, errors=(not_floating("relu"),))
unary("silu", one(-30, 30), formula=formulas.silu, gradient=formulas.silu_vjp,
      errors=(not_floating("silu"),))
# Below 0 their compositions subtract from 1 what the kernels and these equations compute directly.
unary("gelu", one(-12, 12), formula=formulas.gelu, gradient=formulas.gelu_vjp, cancels=16,
      errors=(not_floating("gelu"),))
# The relative error of its argument counts |2z| times in the tail, so ULPs are no measure: the formula's bound is.
unary("gelu_tanh", one(-6, 6), formula=formulas.gelu_tanh, gradient=formulas.gelu_tanh_vjp, cancels=16,
      errors=(not_floating("gelu_tanh"),))

# ── selection and comparison ──────────────────────────────────────────────────────────────────────────


def _where(s: Source) -> Draw:
    condition, a, b = s.broadcastable(3)
    return [s.truth(condition), s.array(a), s.array(b)], {}


register(OpSpec("where", _where, wrt=(1, 2), linear=(1, 2), special=True,
                large=lambda s: ([s.truth(LARGE), s.array(LARGE), s.array(LARGE[1:])], {}), errors=(
    ErrorCase(lambda: eg.where(eg.tensor([1.0]), 1.0, 2.0), TypeError, ("where", "condition", "float32")),)))


def _clip(s: Source) -> Draw:
    low, high = s.choice([(-1.0, 1.5), (None, 0.5), (-0.5, None), (None, None)])
    kinks = tuple(k for k in (low, high) if k is not None)
    return [s.array(s.shape(), -3, 3, kinks=kinks)], {"min": low, "max": high}


def _clipped(x: np.ndarray, min: float | None, max: float | None) -> np.ndarray:
    return np.minimum(np.maximum(x, -math.inf if min is None else min), math.inf if max is None else max)


register(OpSpec("clip", _clip, special=True, view=True, signed_zero=False, reference=_clipped))

for _name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"):
    binary(_name, apart(), wrt=(), integers=True)
for _name in ("isnan", "isfinite", "isinf", "logical_not"):
    unary(_name, wrt=(), integers=True)
for _name in ("logical_and", "logical_or", "logical_xor"):
    binary(_name, apart(), wrt=(), integers=True)

def not_integer(name: str, operands: int) -> ErrorCase:
    function = getattr(eg, name)
    return ErrorCase(lambda: function(*[eg.ones(2)] * operands), TypeError, (name, "float32"))


def bitwise(name: str, reference: Callable[..., Any], low: int = -9) -> None:
    binary(name, whole_two(low), wrt=(), special=False, large=whole_two(low), reference=reference,
           errors=(not_integer(name, 2),))


bitwise("bitwise_and", np.bitwise_and)
bitwise("bitwise_or", np.bitwise_or)
bitwise("bitwise_xor", np.bitwise_xor)
bitwise("bitwise_left_shift", np.left_shift, low=0)
bitwise("bitwise_right_shift", np.right_shift, low=0)
register(OpSpec("bitwise_not", lambda s: ([s.whole(s.shape(), -9, 9)], {}), wrt=(), reference=np.invert,
                errors=(not_integer("bitwise_not", 1),)))
