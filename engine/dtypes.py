"""Element types: a name, a size and the NumPy type that stores them.

The engine has its own small DType so that a type NumPy lacks (bfloat16) can be a tag over storage NumPy has.
Promotion follows the array API standard (2025.12, "Type promotion rules"), and where the standard leaves a
mixture undefined (integer with float) the float wins, as in PyTorch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


class DType:
    """An element type. Compare with `is` or `==`; print it to see its name."""

    __slots__ = ("itemsize", "kind", "name", "numpy")

    def __init__(self, name: str, kind: str):
        self.name = name
        self.kind = kind  # "b" bool, "i" signed, "u" unsigned, "f" floating
        self.numpy = np.dtype(name)
        self.itemsize = self.numpy.itemsize

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return as_dtype, (self.name,)  # a pickled or copied DType is the same object again

    @property
    def is_floating(self) -> bool:
        return self.kind == "f"


bool_ = DType("bool", "b")
uint8, uint16, uint32, uint64 = (DType(f"uint{bits}", "u") for bits in (8, 16, 32, 64))
int8, int16, int32, int64 = (DType(f"int{bits}", "i") for bits in (8, 16, 32, 64))
float32, float64 = DType("float32", "f"), DType("float64", "f")

ALL = (bool_, uint8, uint16, uint32, uint64, int8, int16, int32, int64, float32, float64)
_BY_NAME = {dtype.name: dtype for dtype in ALL}
_BY_NUMPY = {dtype.numpy: dtype for dtype in ALL}


def as_dtype(value: Any) -> DType:
    """The DType that `value` names: a DType, a name, a NumPy dtype or scalar type, or bool, int, float.

    Raises TypeError with one line when there is no such type.
    """
    if isinstance(value, DType):
        return value
    if value is float:  # Python's own float means the default floating type, not float64
        return float32
    try:
        return _BY_NAME[value] if isinstance(value, str) else _BY_NUMPY[np.dtype(value)]
    except (KeyError, TypeError):
        raise TypeError(f"dtype: got {value!r}, expected one of {', '.join(_BY_NAME)}") from None


@cache
def promote(a: DType, b: DType) -> DType:
    """The type that holds the result of combining an `a` with a `b`.

    Raises TypeError for uint64 with a signed integer, which no type holds.
    """
    if a is b:
        return a
    if a.is_floating or b.is_floating:
        return max((t for t in (a, b) if t.is_floating), key=lambda t: t.itemsize)
    if {a.kind, b.kind} == {"i", "u"} and uint64 in (a, b):
        raise TypeError(f"dtype: {a} and {b} have no common type; convert one of them first")
    return _BY_NUMPY[np.promote_types(a.numpy, b.numpy)]


@cache
def promote_scalar(dtype: DType, scalar_type: str) -> DType:
    """The type of a tensor of `dtype` combined with a Python bool, int or float (the scalar is weak)."""
    if scalar_type == "float" and not dtype.is_floating:
        return float32
    if scalar_type == "int" and dtype is bool_:
        return int64
    return dtype
