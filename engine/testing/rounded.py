"""Rounded: a number that knows how wrong a computation of it in low precision may be. Running error analysis.

Every operation on a Rounded computes its value in float64 and a bound on the error that any evaluation of the same
formula in precision u has by then: the errors that came in, amplified by the derivative, plus one new rounding. So a
formula written once gives both the reference of an op and its tolerance: nothing is tuned.

    x = Rounded(array, dtype="float32")
    y = exp(x) / total(exp(x), -1)
    y.value, y.tolerance

    fl(a + b): e = e_a + e_b + u|a + b|           fl(ab): e = |a| e_b + |b| e_a + e_a e_b + u|ab| + η
    fl(f(a)):  e = |f′(a)| e_a + (ULPs of f) 2u |f(a)| + η        Σ of n: e = Σ e + γ_n Σ (|x| + e)

Wilkinson 1986, "Error analysis revisited"; Higham 2002, section 3.3.

`tolerance` is twice that bound, because the kernel need not use the same formula: it may multiply by a reciprocal
instead of dividing, or subtract a maximum first, which costs as many roundings again at most. Against a reference that
was itself computed in the kernel's precision (float64) both sides may be wrong by the bound: that is the same factor.

The functions below take plain arrays as well, so the formula is also the plain reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from engine.testing.bounds import gamma, smallest_subnormal, unit_roundoff

# ULPs that a library function may be wrong by. float32: what kernels/README.md states for the C kernels (goal of the
# exponentials' kin 1, others 2), and 4 for NumPy's own, which run for functions that are not named here, and for all
# where no kernels were compiled. float64: the C library's (glibc manual, "Known Maximum Errors in Math Functions": at
# most 2) and NumPy's, which is the reference.
FLOAT32_ULPS = {"exp": 1.0, "log": 1.0, "tanh": 1.0, "sigmoid": 1.0, "erf": 1.0, "rsqrt": 1.0, "expm1": 2.0,
                "log1p": 2.0, "sin": 2.0, "cos": 2.0, "softplus": 2.0, "pow": 2.0}
NUMPY_ULPS = 4.0
FLOAT64_ULPS = 4.0


@cache
def function_ulps(name: str, dtype: Any) -> float:
    """The ULPs that function `name` may be wrong by in `dtype`, on the CPU as it is here."""
    from engine.backend import get_backend
    from engine.backend.cpu import CpuBackend

    if name == "sqrt":
        return 0.5  # IEEE 754 asks for it
    if np.dtype(str(dtype)).itemsize == 8:
        return FLOAT64_ULPS
    return FLOAT32_ULPS.get(name, NUMPY_ULPS) if isinstance(get_backend("cpu"), CpuBackend) else NUMPY_ULPS


class Rounded:
    """An array of exact values (float64), each with a bound on the error of computing it in `dtype`."""

    __array_ufunc__ = None  # so that array ∘ Rounded comes to the reflected operators below

    def __init__(self, value: Any, error: Any = 0.0, *, dtype: Any):
        self.value = np.asarray(value, np.float64)
        self.error = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)
        self.dtype = dtype

    @property
    def unit(self) -> float:
        return unit_roundoff(self.dtype)

    @property
    def tolerance(self) -> np.ndarray:
        """Twice the bound, and never nothing: a formula does not say which sign a zero has."""
        return np.maximum(2 * self.error, smallest_subnormal(self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def size(self) -> int:
        return self.value.size

    def _with(self, value: Any, carried: Any, roundings: float = 1.0, underflow: Any = True) -> Rounded:
        """A result that carries an error in and is rounded once more; `underflow`: where it can lose to that."""
        error = carried + roundings * self.unit * (np.abs(value) + carried)
        return Rounded(value, error + np.where(underflow, smallest_subnormal(self.dtype), 0.0), dtype=self.dtype)

    @property
    def nonzero(self) -> np.ndarray:
        """Where it may be another number than 0: products with an exact 0 are exact."""
        return (self.value != 0) | (self.error != 0)

    def _other(self, other: Any) -> Rounded:
        """The other operand: a Rounded, exact data, or a constant, which is rounded to dtype if it does not fit."""
        if isinstance(other, Rounded):
            return other
        value = np.asarray(other, np.float64)
        lost = np.abs(value - value.astype(np.dtype(str(self.dtype))).astype(np.float64))
        return Rounded(value, np.where(np.isfinite(value), lost, 0.0), dtype=self.dtype)

    def __add__(self, other: Any) -> Rounded:
        b = self._other(other)
        return self._with(self.value + b.value, self.error + b.error, underflow=False)

    def __sub__(self, other: Any) -> Rounded:
        b = self._other(other)
        return self._with(self.value - b.value, self.error + b.error, underflow=False)

    def __mul__(self, other: Any) -> Rounded:
        b = self._other(other)
        carried = np.abs(self.value) * b.error + np.abs(b.value) * self.error + self.error * b.error
        return self._with(self.value * b.value, carried, underflow=self.nonzero & b.nonzero)

    def __truediv__(self, other: Any) -> Rounded:
        b = self._other(other)
        value = self.value / b.value
        carried = (self.error + np.abs(value) * b.error) / (np.abs(b.value) - b.error)
        return self._with(value, carried, underflow=self.nonzero)

    def __radd__(self, other: Any) -> Rounded:
        return self + other

    def __rmul__(self, other: Any) -> Rounded:
        return self * other

    def __rsub__(self, other: Any) -> Rounded:
        return self._other(other) - self

    def __rtruediv__(self, other: Any) -> Rounded:
        return self._other(other) / self

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, dtype=self.dtype)

    def __getitem__(self, index: Any) -> Rounded:
        return Rounded(self.value[index], self.error[index], dtype=self.dtype)

    def moved(self, f: Callable[[np.ndarray], np.ndarray]) -> Rounded:
        """A movement of elements, which rounds nothing."""
        return Rounded(f(self.value), f(self.error), dtype=self.dtype)

    def reshape(self, *shape: Any) -> Rounded:
        return self.moved(lambda x: x.reshape(*shape))


Number = Any  # a Rounded, or a float64 array


def plain(x: Number) -> np.ndarray:
    """The exact values."""
    return x.value if isinstance(x, Rounded) else np.asarray(x)


# ── functions of one argument ─────────────────────────────────────────────────────────────────────────

def _function(name: str, f: Callable[[Any], Any], derivative: Callable[[Any, Any], Any]) -> Callable[[Number], Number]:
    def run(x: Number) -> Number:
        if not isinstance(x, Rounded):
            return f(x)
        value = f(x.value)
        slope = np.abs(derivative(x.value, value))
        carried = np.where((x.error == 0) | (slope == 0), 0.0, slope * x.error)  # also where one of them is infinite
        return x._with(value, carried, 2 * function_ulps(name, x.dtype))
    run.__name__ = name
    return run


_erf = np.vectorize(math.erf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])
_BELL = 2 / math.sqrt(math.pi)


def _sigmoid(x: Any) -> Any:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1 + e)


def _normal_cdf(x: Any) -> Any:
    return 0.5 * _erfc(-np.asarray(x) * math.sqrt(0.5))


exp = _function("exp", np.exp, lambda x, y: y)
expm1 = _function("expm1", np.expm1, lambda x, y: y + 1)
log = _function("log", np.log, lambda x, y: 1 / x)
log1p = _function("log1p", np.log1p, lambda x, y: 1 / (1 + x))
sqrt = _function("sqrt", np.sqrt, lambda x, y: 0.5 / y)
rsqrt = _function("rsqrt", lambda x: 1 / np.sqrt(x), lambda x, y: y / (2 * x))
sin = _function("sin", np.sin, lambda x, y: np.cos(x))
cos = _function("cos", np.cos, lambda x, y: np.sin(x))
tanh = _function("tanh", np.tanh, lambda x, y: 1 - y * y)
sigmoid = _function("sigmoid", _sigmoid, lambda x, y: y * (1 - y))
erf = _function("erf", _erf, lambda x, y: _BELL * np.exp(-x * x))
softplus = _function("softplus", lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), lambda x, y: _sigmoid(x))
_erfc_function = _function("erf", _erfc, lambda x, y: _BELL * np.exp(-x * x))
_normal_cdf_function = _function("erf", _normal_cdf, lambda x, y: np.exp(-x * x / 2) / math.sqrt(2 * math.pi))


def normal_cdf(x: Number) -> Number:
    """Φ(x). The float64 kernel takes erfc of a rounded argument, which counts x² times in the tail."""
    if isinstance(x, Rounded) and np.dtype(str(x.dtype)).itemsize == 8:
        return _erfc_function(x * -math.sqrt(0.5)) * 0.5
    return _normal_cdf_function(x)


# ── selection ─────────────────────────────────────────────────────────────────────────────────────────

def absolute(x: Number) -> Number:
    return Rounded(np.abs(x.value), x.error, dtype=x.dtype) if isinstance(x, Rounded) else np.abs(x)


def where(condition: Any, a: Number, b: Number) -> Number:
    """a where condition, else b; an exact operand may be a plain number."""
    if not (isinstance(a, Rounded) or isinstance(b, Rounded)):
        return np.where(condition, a, b)
    dtype = a.dtype if isinstance(a, Rounded) else b.dtype
    error = np.where(condition, a.error if isinstance(a, Rounded) else 0.0, b.error if isinstance(b, Rounded) else 0.0)
    return Rounded(np.where(condition, plain(a), plain(b)), error, dtype=dtype)


def maximum(a: Number, b: Number) -> Number:
    """The larger one: an error in either moves it by no more than that error."""
    if not (isinstance(a, Rounded) or isinstance(b, Rounded)):
        return np.maximum(a, b)
    dtype = a.dtype if isinstance(a, Rounded) else b.dtype
    error = np.maximum(a.error if isinstance(a, Rounded) else 0.0, b.error if isinstance(b, Rounded) else 0.0)
    return Rounded(np.maximum(plain(a), plain(b)), error, dtype=dtype)


def minimum(a: Number, b: Number) -> Number:
    return -maximum(-a, -b)


# ── sums and products over axes ───────────────────────────────────────────────────────────────────────

def total(x: Number, axis: Any = None, keepdims: bool = False) -> Number:
    """Σ x, in any order of the additions."""
    if not isinstance(x, Rounded):
        return np.sum(x, axis=axis, keepdims=keepdims)
    value = x.value.sum(axis=axis, keepdims=keepdims)
    carried = x.error.sum(axis=axis, keepdims=keepdims)
    size = np.abs(x.value).sum(axis=axis, keepdims=keepdims) + carried
    n = x.value.size // max(value.size, 1)
    return Rounded(value, carried + gamma(n, x.unit) * size, dtype=x.dtype)


def mean(x: Number, axis: Any = None, keepdims: bool = False) -> Number:
    y = total(x, axis, keepdims)
    return y / float(x.size // max(y.size, 1) if x.size else 0)


def largest(x: Number, axis: Any = None, keepdims: bool = False) -> Number:
    if not isinstance(x, Rounded):
        return np.max(x, axis=axis, keepdims=keepdims)
    return Rounded(x.value.max(axis=axis, keepdims=keepdims), x.error.max(axis=axis, keepdims=keepdims), dtype=x.dtype)


def matmul(a: Number, b: Number) -> Number:
    """A B: γ_k(|A| + E_A)(|B| + E_B) for the roundings, in any order, and the errors that came in."""
    if not (isinstance(a, Rounded) or isinstance(b, Rounded)):
        return np.matmul(a, b)
    x, y = (a, a._other(b)) if isinstance(a, Rounded) else (b._other(a), b)
    size_x, size_y = np.abs(x.value) + x.error, np.abs(y.value) + y.error
    k = x.shape[-1]
    carried = np.matmul(x.error, size_y) + np.matmul(np.abs(x.value), y.error)
    error = carried + gamma(k, x.unit) * np.matmul(size_x, size_y) + k * smallest_subnormal(x.dtype)
    return Rounded(np.matmul(x.value, y.value), error, dtype=x.dtype)


def swap(x: Number) -> Number:
    """The last two axes exchanged."""
    return x.moved(lambda v: np.swapaxes(v, -1, -2)) if isinstance(x, Rounded) else np.swapaxes(x, -1, -2)


def gather(x: Number, index: np.ndarray) -> Number:
    """x[..., index[...]] along the last axis."""
    def pick(v: np.ndarray) -> np.ndarray:
        return np.take_along_axis(v, index[..., None], -1)[..., 0]
    return x.moved(pick) if isinstance(x, Rounded) else pick(x)


def join(parts: list[Number], axis: int) -> Number:
    """Concatenation."""
    if not isinstance(parts[0], Rounded):
        return np.concatenate(parts, axis)
    return Rounded(np.concatenate([p.value for p in parts], axis), np.concatenate([p.error for p in parts], axis),
                   dtype=parts[0].dtype)
