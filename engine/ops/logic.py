"""Comparisons, kinds of numbers, logic and bits: elementwise ops whose results are bools, or integers from integers.

None has a gradient: their results stand still but where they jump.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.backend import Array, broadcast_shapes
from engine.dtypes import bool_
from engine.ops.elementwise import BINARY, UNARY
from engine.ops.registry import op

# ── comparisons ───────────────────────────────────────────────────────────────────────────────────────

@op(BINARY, reference=np.equal, method="__eq__")
def equal(k: Any, a: Array, b: Array) -> Array:
    """y = (a == b), a bool tensor."""
    return k.map("equal", a, b, dtype=bool_)


@op(BINARY, reference=np.not_equal, method="__ne__")
def not_equal(k: Any, a: Array, b: Array) -> Array:
    """y = (a ≠ b)."""
    return k.map("not_equal", a, b, dtype=bool_)


@op(BINARY, reference=np.less, method="__lt__")
def less(k: Any, a: Array, b: Array) -> Array:
    """y = (a < b)."""
    return k.map("less", a, b, dtype=bool_)


@op(BINARY, reference=np.less_equal, method="__le__")
def less_equal(k: Any, a: Array, b: Array) -> Array:
    """y = (a ≤ b)."""
    return k.map("less_equal", a, b, dtype=bool_)


@op(BINARY, reference=np.greater, method="__gt__")
def greater(k: Any, a: Array, b: Array) -> Array:
    """y = (a > b)."""
    broadcast_shapes("greater", a.data.shape, b.data.shape)
    return k.map("less", b, a, dtype=bool_)


@op(BINARY, reference=np.greater_equal, method="__ge__")
def greater_equal(k: Any, a: Array, b: Array) -> Array:
    """y = (a ≥ b)."""
    broadcast_shapes("greater_equal", a.data.shape, b.data.shape)
    return k.map("less_equal", b, a, dtype=bool_)


# ── kinds of numbers ──────────────────────────────────────────────────────────────────────────────────

@op(UNARY, reference=np.isnan)
def isnan(k: Any, x: Array) -> Array:
    """y = whether x is NaN: the only value that differs from itself."""
    return k.map("not_equal", x, x, dtype=bool_)


@op(UNARY, reference=np.isfinite)
def isfinite(k: Any, x: Array) -> Array:
    """y = whether x is neither infinite nor NaN."""
    return k.map("isfinite", x, dtype=bool_)


@op(UNARY, reference=np.isinf)
def isinf(k: Any, x: Array) -> Array:
    """y = whether x is ±∞."""
    return k.map("isinf", x, dtype=bool_)


# ── logic ─────────────────────────────────────────────────────────────────────────────────────────────

@op(UNARY, reference=np.logical_not)
def logical_not(k: Any, x: Array) -> Array:
    """y = not x; a number counts as true unless it is 0."""
    return k.map("logical_not", x, dtype=bool_)


@op(BINARY, reference=np.logical_and)
def logical_and(k: Any, a: Array, b: Array) -> Array:
    """y = a and b."""
    return k.map("logical_and", a, b, dtype=bool_)


@op(BINARY, reference=np.logical_or)
def logical_or(k: Any, a: Array, b: Array) -> Array:
    """y = a or b."""
    return k.map("logical_or", a, b, dtype=bool_)


@op(BINARY, reference=np.logical_xor)
def logical_xor(k: Any, a: Array, b: Array) -> Array:
    """y = exactly one of a and b."""
    return k.map("logical_xor", a, b, dtype=bool_)


# ── bits ──────────────────────────────────────────────────────────────────────────────────────────────

def _integers_only(name: str, *operands: Array) -> None:
    for x in operands:
        if x.dtype.is_floating:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected an integer or bool type")


@op(BINARY, method="__and__")
def bitwise_and(k: Any, a: Array, b: Array) -> Array:
    """y = a & b, bit by bit; on bools, and."""
    _integers_only("bitwise_and", a, b)
    return k.map("bitwise_and", a, b)


@op(BINARY, method="__or__")
def bitwise_or(k: Any, a: Array, b: Array) -> Array:
    """y = a | b, bit by bit; on bools, or."""
    _integers_only("bitwise_or", a, b)
    return k.map("bitwise_or", a, b)


@op(BINARY, method="__xor__")
def bitwise_xor(k: Any, a: Array, b: Array) -> Array:
    """y = a ^ b, bit by bit; on bools, exclusive or."""
    _integers_only("bitwise_xor", a, b)
    return k.map("bitwise_xor", a, b)


@op(BINARY, method="__lshift__")
def bitwise_left_shift(k: Any, a: Array, b: Array) -> Array:
    """y = a · 2ᵇ, bits that leave the type are lost."""
    _integers_only("bitwise_left_shift", a, b)
    return k.map("bitwise_left_shift", a, b)


@op(BINARY, method="__rshift__")
def bitwise_right_shift(k: Any, a: Array, b: Array) -> Array:
    """y = ⌊a / 2ᵇ⌋."""
    _integers_only("bitwise_right_shift", a, b)
    return k.map("bitwise_right_shift", a, b)


@op(UNARY, method="__invert__")
def bitwise_not(k: Any, x: Array) -> Array:
    """y = ~x, bit by bit; on bools, not."""
    _integers_only("bitwise_not", x)
    return k.map("bitwise_not", x)
