"""Reductions: one value from all elements along some axes.

A kernel sees a dense (outer, n, inner) array and reduces the middle axis, so reduced axes are first brought side by
side. The order of summation is a function of n alone (kernels/reduce.c): the same bits for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.backend import Array
from engine.dtypes import DType, as_dtype, bool_, int64, uint64
from engine.ops.creation import full
from engine.ops.elementwise import exp, square, where
from engine.ops.movement import concat
from engine.ops.registry import Op, axes_tuple, axis_index, cast, composite, op
from engine.tensor import Tensor

Axis = int | Sequence[int] | None


def _axes(name: str, axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes to reduce. As in NumPy, a 0-d tensor also has an axis 0, of one element."""
    return () if not ndim and axis in (0, -1) else axes_tuple(name, axis, ndim)


def _arranged(k: Any, x: Array, axes: tuple[int, ...]) -> tuple[Array, int, int, int]:
    """x as a dense (outer, n, inner), n over `axes`: as it lies if the axes are neighbours, else moved to the end."""
    shape = x.data.shape
    if axes and axes != tuple(range(axes[0], axes[-1] + 1)):
        kept = [i for i in range(len(shape)) if i not in axes]
        x = k.contiguous(Array(x.data.transpose(*kept, *axes), x.dtype, None, x.storage))
        return x, math.prod(shape[i] for i in kept), math.prod(shape[i] for i in axes), 1
    first, last = (axes[0], axes[-1] + 1) if axes else (len(shape), len(shape))
    return k.contiguous(x), math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:])


def _reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[int, ...]:
    if keepdims:
        return tuple([1 if i in axes else n for i, n in enumerate(shape)])
    return tuple([n for i, n in enumerate(shape) if i not in axes])


def _reduce(k: Any, name: str, x: Array, axis: Axis, keepdims: bool, dtype: DType | None = None,
            non_empty: bool = False) -> Array:
    axes = _axes(name, axis, x.data.ndim)
    dense, outer, n, inner = _arranged(k, x, axes)
    if non_empty and n == 0 and outer * inner:
        raise ValueError(f"{name}: axis {axis} of shape {x.data.shape} is empty, and {name} of nothing is undefined")
    y = k.empty(_reduced_shape(x.data.shape, axes, keepdims), dtype or x.dtype)
    getattr(k, name)(y, dense, outer, n, inner)
    return y


def _wide(dtype: DType, wanted: Any) -> DType:
    """The type that sums and products of `dtype` are kept in: the wanted one, else 64 bits for whole numbers."""
    if wanted is not None:
        return as_dtype(wanted)
    return dtype if dtype.is_floating else uint64 if dtype.kind == "u" else int64


def _spread(g: Tensor, shape: tuple[int, ...], axis: Axis) -> Tensor:
    """A reduction's gradient with the reduced axes back in place, as length 1."""
    axes = _axes("sum", axis, len(shape))
    return g.reshape(_reduced_shape(shape, axes, True))


@op("... -> ...", reference=np.sum, method="sum")
def sum(k: Any, x: Array, axis: Axis = None, keepdims: bool = False, dtype: Any = None) -> Array:
    """y = Σ x over `axis` (None: all). Integers are summed as int64 or uint64, bools as int64; 0 over an empty axis."""
    wanted = _wide(x.dtype, dtype)
    return _reduce(k, "sum", x if x.dtype is wanted else cast(k, x, wanted), axis, keepdims)


@sum.vjp
def _(g: Tensor, x_shape: tuple[int, ...], axis: Axis) -> Tensor:
    return _spread(g, x_shape, axis).broadcast_to(x_shape)


@op("... -> ...", reference=np.prod, method="prod")
def prod(k: Any, x: Array, axis: Axis = None, keepdims: bool = False, dtype: Any = None) -> Array:
    """y = Π x over `axis` (None: all); 1 over an empty axis. The gradient is y / x, so NaN where x is 0."""
    wanted = _wide(x.dtype, dtype)
    return _reduce(k, "prod", x if x.dtype is wanted else cast(k, x, wanted), axis, keepdims)


@prod.vjp
def _(g: Tensor, x: Tensor, y: Tensor, axis: Axis) -> Tensor:
    return _spread(g * y, x.shape, axis) / x


@composite("... -> ...", reference=np.mean, method="mean")
def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """y = Σ x / n over `axis` (None: all). NaN over an empty axis."""
    axes = _axes("mean", axis, x.ndim)
    return sum(x, axis, keepdims) / float(math.prod(x.shape[i] for i in axes))


@composite("... -> ...", reference=lambda x, axis=None, correction=0.0, keepdims=False:
           np.var(x, axis=axis, ddof=correction, keepdims=keepdims), method="var")
def var(x: Tensor, axis: Axis = None, correction: float = 0.0, keepdims: bool = False) -> Tensor:
    """y = Σ (x − mean x)² / (n − correction) over `axis`, in two passes."""
    axes = _axes("var", axis, x.ndim)
    deviation = x - mean(x, axis, keepdims=True)
    divisor = max_of_two(float(math.prod(x.shape[i] for i in axes)) - correction, 0.0)
    return sum(square(deviation), axis, keepdims) / divisor


@composite("... -> ...", reference=lambda x, axis=None, correction=0.0, keepdims=False:
           np.std(x, axis=axis, ddof=correction, keepdims=keepdims), method="std")
def std(x: Tensor, axis: Axis = None, correction: float = 0.0, keepdims: bool = False) -> Tensor:
    """y = √var(x)."""
    _axes("std", axis, x.ndim)
    return var(x, axis, correction, keepdims).sqrt()


def max_of_two(a: float, b: float) -> float:
    return a if a > b else b  # `max` is the reduction in this file


@op("... -> ...", reference=np.max, method="max")
def max(k: Any, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """y = the largest x over `axis` (None: all); NaN if any is. Equal largest ones share the gradient equally."""
    return _reduce(k, "max", x, axis, keepdims, non_empty=True)


@max.vjp
def _(g: Tensor, x: Tensor, y: Tensor, axis: Axis) -> Tensor:
    return _to_winners(g, x, y, axis)


@op("... -> ...", reference=np.min, method="min")
def min(k: Any, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """y = the smallest x over `axis` (None: all); NaN if any is. Equal smallest ones share the gradient equally."""
    return _reduce(k, "min", x, axis, keepdims, non_empty=True)


@min.vjp
def _(g: Tensor, x: Tensor, y: Tensor, axis: Axis) -> Tensor:
    return _to_winners(g, x, y, axis)


def _to_winners(g: Tensor, x: Tensor, y: Tensor, axis: Axis) -> Tensor:
    won = (x == _spread(y, x.shape, axis)).to(dtype=g.dtype)
    return won * (_spread(g, x.shape, axis) / sum(won, axis, keepdims=True))


@op("... -> ...", reference=np.argmax, method="argmax")
def argmax(k: Any, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    """The index (int64) of the first largest x along `axis` (None: in the flattened x); a NaN counts as largest."""
    return _reduce(k, "argmax", x, axis, keepdims, dtype=int64, non_empty=True)


@op("... -> ...", reference=np.argmin, method="argmin")
def argmin(k: Any, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    """The index (int64) of the first smallest x along `axis` (None: in the flattened x); a NaN counts as smallest."""
    return _reduce(k, "argmin", x, axis, keepdims, dtype=int64, non_empty=True)


@op("... -> ...", reference=np.any, method="any")
def any(k: Any, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Whether any x is true (not 0) over `axis`."""
    return _reduce(k, "any", x if x.dtype is bool_ else cast(k, x, bool_), axis, keepdims)


@op("... -> ...", reference=np.all, method="all")
def all(k: Any, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Whether every x is true (not 0) over `axis`."""
    return _reduce(k, "all", x if x.dtype is bool_ else cast(k, x, bool_), axis, keepdims)


@composite("... -> ...", reference=np.count_nonzero)
def count_nonzero(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """How many x over `axis` are not 0 (int64)."""
    _axes("count_nonzero", axis, x.ndim)
    return sum(x != 0, axis, keepdims)


def _logsumexp(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    return np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims))


@op("... -> ...", reference=_logsumexp, types="float", method="logsumexp")
def logsumexp(k: Any, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """y = ln Σ eˣ over `axis` (None: all), without overflow; −∞ over an empty axis."""
    return _reduce(k, "logsumexp", x, axis, keepdims)


@logsumexp.vjp
def _(g: Tensor, x: Tensor, y: Tensor, axis: Axis) -> Tensor:
    top = _spread(y, x.shape, axis)
    # A row of −∞ has y = −∞, and −∞ − (−∞) is NaN where the gradient is 0.
    return _spread(g, x.shape, axis) * exp(x - where(top == -math.inf, 0.0, top))


def _running(k: Any, name: str, x: Array, axis: int) -> Array:
    at = axis_index(name, axis, x.data.ndim or 1)
    dense, outer, n, inner = _arranged(k, x, (at,) if x.data.ndim else ())
    y = k.empty(x.data.shape, x.dtype)
    getattr(k, name)(y, dense, outer, n, inner)
    return y


@op("... -> ...", public=False)
def running_sum(k: Any, x: Array, axis: int) -> Array:
    """y[i] = x[0] + ... + x[i] along `axis`."""
    return _running(k, "cumulative_sum", x, axis)


@running_sum.vjp
def _(g: Tensor, axis: int) -> Tensor:
    return running_sum(g.flip(axis), axis).flip(axis)  # the transpose sums from the other end


@op("... -> ...", public=False)
def running_prod(k: Any, x: Array, axis: int) -> Array:
    """y[i] = x[0] · ... · x[i] along `axis`."""
    return _running(k, "cumulative_prod", x, axis)


@running_prod.vjp
def _(g: Tensor, x: Tensor, y: Tensor, axis: int) -> Tensor:
    return running_sum((g * y).flip(axis), axis).flip(axis) / x


def _cumulated(run: Op, initial: int, x: Tensor, axis: int | None, dtype: Any, include_initial: bool) -> Tensor:
    axis = -1 if axis is None else axis
    y = run(x.to(dtype=_wide(x.dtype, dtype)), axis)
    if not include_initial:
        return y
    at = axis_index(run.name, axis, x.ndim)
    return concat([full((*x.shape[:at], 1, *x.shape[at + 1:]), initial, dtype=y.dtype, device=x.device), y], at)


@composite("... -> ...", method="cumulative_sum")
def cumulative_sum(x: Tensor, axis: int | None = -1, dtype: Any = None, include_initial: bool = False) -> Tensor:
    """y[i] = x[0] + ... + x[i] along `axis`, in the type that sum gives; with include_initial, 0 before them."""
    return _cumulated(running_sum, 0, x, axis, dtype, include_initial)


@composite("... -> ...", method="cumulative_prod")
def cumulative_prod(x: Tensor, axis: int | None = -1, dtype: Any = None, include_initial: bool = False) -> Tensor:
    """y[i] = x[0] · ... · x[i] along `axis`; with include_initial, 1 before them. The gradient is NaN where x is 0."""
    return _cumulated(running_prod, 1, x, axis, dtype, include_initial)


@composite("... -> ...", reference=np.diff)
def diff(x: Tensor, axis: int = -1, n: int = 1, prepend: Tensor | None = None, append: Tensor | None = None) -> Tensor:
    """y[i] = x[i + 1] − x[i] along `axis`, n times over, of x with `prepend` before it and `append` behind it."""
    at = axis_index("diff", axis, x.ndim)
    if n < 0:
        raise ValueError(f"diff: n is {n!r}, expected a whole number of at least 0")
    parts = [part for part in (prepend, x, append) if part is not None]
    x = concat(parts, at) if len(parts) > 1 else x
    before = (slice(None),) * at
    for _ in range(n):
        x = x[before + (slice(1, None),)] - x[before + (slice(0, -1),)]
    return x
