"""Indexing: reading, writing and scattering by index.

Slices and numbers give views; arrays of integers or bools give copies, as in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine import autograd
from engine.backend import Array, get_backend
from engine.dtypes import int64
from engine.ops.registry import attach, axis_index, cast, composite, op
from engine.rowsparse import RowSparse
from engine.tensor import Tensor, tensor


def _plain(index: Any) -> Any:
    """An index with tensors and lists turned into NumPy arrays; always a tuple."""
    parts = tuple([_plain_part(part) for part in (index if isinstance(index, tuple) else (index,))])
    # With an ellipsis NumPy gives a 0-d view of one element, not a copy of it.
    return parts if any(part is Ellipsis for part in parts) else (*parts, Ellipsis)


def _plain_part(part: Any) -> Any:
    if isinstance(part, (Tensor, np.ndarray, list)):
        array = part.numpy() if isinstance(part, Tensor) else np.asarray(part)
        if array.size == 0 and array.dtype.kind == "f":
            array = array.astype(np.int64)  # an empty list
        if array.dtype.kind not in "iub":
            raise TypeError(f"index: got a {array.dtype} array, expected integers or bools")
        return array.item() if array.ndim == 0 and array.dtype.kind != "b" else array
    if part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer, np.bool_)):
        return part
    raise TypeError(f"index: got {type(part).__name__}, expected integers, slices, None, ..., or arrays of them")


def _is_basic(index: tuple[Any, ...]) -> bool:
    return not any(isinstance(part, (np.ndarray, bool, np.bool_)) for part in index)


@op("... -> ...", types="any", public=False)
def take_index(k: Any, x: Array, index: tuple[Any, ...]) -> Array:
    """x[index]."""
    try:
        if _is_basic(index):
            return x.view(x.data[index])
        y = k.empty(np.empty(0).shape if x.data.size == 0 and not index else
                    np.broadcast_to(np.int8(0), x.data.shape)[index].shape, x.dtype)
        k.gather(y, x, index)
        return y
    except IndexError as error:
        raise IndexError(f"index: x has shape {x.shape}: {error}") from None


@take_index.vjp
def _(g: Tensor, x_shape: tuple[int, ...], index: tuple[Any, ...]) -> Tensor:
    return put_index(g, x_shape, index)


@op("... -> ...", types="any", public=False)
def put_index(k: Any, g: Array, shape: tuple[int, ...], index: tuple[Any, ...]) -> Array:
    """Zeros of `shape` with g added at [index]: the transpose of take_index."""
    y = k.zeros(shape, g.dtype)
    if _is_basic(index):  # no element twice: a copy into the view
        target = y.view(y.data[index])
        k.copy(target, g, k.layout(target, g))
    else:
        k.scatter_add(y, g, index)
    return y


@put_index.vjp
def _(g: Tensor, index: tuple[Any, ...]) -> Tensor:
    return take_index(g, index)


@op("..., ... -> ...", public=False)
def assign_index(k: Any, x: Array, value: Array, index: tuple[Any, ...]) -> Array:
    """A copy of x with x[index] = value."""
    y = k.empty_like(x)
    k.copy(y, x, k.layout(y, x))
    write_index(k, y, value, index)
    return y


@assign_index.vjp
def _(g: Tensor, x_shape: tuple[int, ...], index: tuple[Any, ...], needs: tuple[bool, ...]) -> Any:
    kept = assign_index(g, 0.0, index) if needs[0] else None
    return kept, take_index(g, index) if needs[1] else None


def write_index(k: Any, y: Array, value: Array, index: tuple[Any, ...]) -> None:
    """y[index] = value, in place."""
    try:
        k.scatter(y, value, index)
    except (IndexError, ValueError) as error:
        raise type(error)(f"index assignment: x has shape {y.shape}, value {value.shape}: {error}") from None


def _getitem(self: Tensor, index: Any) -> Tensor:
    return take_index(self, _plain(index))


def _setitem(self: Tensor, index: Any, value: Any) -> None:
    """x[index] = value, in place: see engine/ops/inplace.py for what that means inside a graph."""
    from engine.ops.inplace import rebind_or_write

    plain = _plain(index)
    if not isinstance(value, Tensor):  # numbers take x's type at once: by way of float32 a float64 would lose digits
        value = tensor(value, dtype=self.dtype, device=self.device)

    def write(k: Any, target: Array) -> None:
        write_index(k, target, value.array if value.dtype is self.dtype else cast(k, value.array, self.dtype), plain)

    rebind_or_write("index assignment", self, value, lambda x, v: assign_index(x, v, plain), write)


attach("__getitem__", _getitem)
attach("__setitem__", _setitem)


@op("vn, ... -> ...n", types="float!", fixed=("index",), reference=lambda weight, index: weight[index])
def embedding(k: Any, weight: Array, index: Array, sparse: bool = False) -> Array:
    """y = weight[index]: rows of a (vocabulary, n) table. Raises IndexError outside [0, vocabulary).

    sparse: the table's gradient is RowSparse, its touched rows only (dense on a device without this kernel, and with
    create_graph).
    """
    vocabulary, n = weight.shape
    where = checked_index(k, "embedding", index, vocabulary)
    y = k.empty((*index.shape, n), weight.dtype)
    k.embedding(y, k.contiguous(weight), where, where.size, vocabulary, n)
    return y


def checked_index(k: Any, name: str, index: Array, length: int) -> Array:
    """The index as dense int64, checked to lie in [0, length)."""
    where = k.contiguous(index if index.dtype is int64 else cast(k, index, int64))
    k.check_index(where, length, None, f"{name}: index holds {{}}, expected whole numbers in [0, {length})")
    return where


@embedding.kernel_vjp
def _(k: Any, g: Array, weight_shape: tuple[int, ...], index: Array, sparse: bool) -> Any:
    vocabulary, n = weight_shape
    where = k.contiguous(index if index.dtype is int64 else cast(k, index, int64))
    if sparse:
        rows = Tensor(g.reshaped((where.size, n)), k.device)
        return RowSparse(k.to_numpy(where).reshape(-1), rows, vocabulary), None
    dweight = k.empty(weight_shape, g.dtype)
    k.embedding_vjp(dweight, g, where, where.size, vocabulary, n)
    return dweight, None


@embedding.composition
def _(weight: Tensor, index: Tensor, sparse: bool = False) -> Tensor:
    length = weight.shape[0]
    checked_index(get_backend(index.device), "embedding", index.array, length)
    rows = weight[index.reshape(-1)]  # a copy; a single number would give a view
    return rows.reshape(*index.shape, weight.shape[1])


@composite("..., ... -> ...", reference=np.take_along_axis)
def take_along_axis(x: Tensor, index: Tensor, axis: int = -1) -> Tensor:
    """y[.., i, ..] = x[.., index[.., i, ..], ..] along `axis`; index has x's number of axes."""
    at = axis_index("take_along_axis", axis, x.ndim)
    if index.ndim != x.ndim:
        raise ValueError(f"take_along_axis: index has shape {index.shape}, expected {x.ndim} axes as in x {x.shape}")
    where = index.numpy()
    grid = np.ogrid[tuple(slice(n) for n in where.shape)]
    return x[tuple(where if i == at else grid[i] for i in range(x.ndim))]


@composite("..., n -> ...", reference=np.take)
def take(x: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    """The slices of x at the given indices along `axis`."""
    at = axis_index("take", axis, x.ndim)
    return x[(slice(None),) * at + (index,)]


@op("..., ... -> ...", public=False, types="same")
def add_at_index(k: Any, x: Array, value: Array, index: tuple[Any, ...]) -> Array:
    """A copy of x with value added at [index], once for every time an element is named."""
    y = k.empty_like(x)
    k.copy(y, x, k.layout(y, x))
    try:
        k.scatter_add(y, value, index)
    except (IndexError, ValueError) as error:
        raise type(error)(f"scatter_add: x has shape {x.shape}, value {value.shape}: {error}") from None
    return y


@add_at_index.vjp
def _(g: Tensor, index: tuple[Any, ...]) -> Any:
    return g, take_index(g, index)


@composite("..., n, ... -> ...", fixed=("index",))
def scatter_add(x: Tensor, index: Any, value: Tensor) -> Tensor:
    """A copy of x with `value` added at x[index]; an element named twice gets both, in order."""
    return add_at_index(x, value, _plain(index))


@op("... -> ...", types="any", public=False)
def argsort_values(k: Any, x: Array, axis: int, descending: bool) -> Array:
    y = k.empty(x.shape, int64)
    k.argsort(y, x, axis, descending)
    return y


@composite("... -> ...", method="argsort")
def argsort(x: Tensor, axis: int = -1, descending: bool = False, stable: bool = True) -> Tensor:
    """The indices (int64) that sort x along `axis`; equal elements always keep their order, NaN is the largest."""
    with autograd.no_grad():
        return argsort_values(x, axis_index("argsort", axis, x.ndim), descending)


@composite("... -> ...", method="sort")
def sort(x: Tensor, axis: int = -1, descending: bool = False, stable: bool = True) -> Tensor:
    """x sorted along `axis`."""
    return take_along_axis(x, argsort(x, axis, descending), axis)


@composite("... -> ...", method="topk")
def topk(x: Tensor, count: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The `count` largest along `axis`, largest first, and their indices (int64); of equal ones the first."""
    at = axis_index("topk", axis, x.ndim)
    if not 0 <= count <= x.shape[at]:
        raise ValueError(f"topk: count is {count!r}, expected a whole number in [0, {x.shape[at]}], "
                         f"the length of axis {at}")
    index = argsort(x, at, descending=True)[(slice(None),) * at + (slice(0, count),)]
    return take_along_axis(x, index, at), index


@composite("... -> ...", method="quantile",
           reference=lambda x, q, axis=None, keepdims=False: np.quantile(x, q, axis, keepdims=keepdims))
def quantile(x: Tensor, q: float, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The q-quantile along `axis` (None: of all), linear between neighbours: x₍ᵢ₎ at i = q (n − 1) of the sorted x."""
    if not 0 <= q <= 1:
        raise ValueError(f"quantile: q is {q!r}, expected a number in [0, 1]")
    flat = x.reshape(-1) if axis is None else x
    at = axis_index("quantile", 0 if axis is None else axis, flat.ndim)
    n = flat.shape[at]
    if not n:
        raise ValueError(f"quantile: axis {axis} of shape {x.shape} is empty, and a quantile of nothing is undefined")
    place = q * (n - 1)
    low = min(int(place), n - 1)
    ordered, before = sort(flat, at), (slice(None),) * at
    y = ordered[before + (slice(low, low + 1),)]
    if place > low:
        y = y + (ordered[before + (slice(low + 1, low + 2),)] - y) * (place - low)
    if axis is None:
        return y.reshape((1,) * x.ndim if keepdims else ())
    return y if keepdims else y.squeeze(at)


@composite("... -> ...", method="median",
           reference=lambda x, axis=None, keepdims=False: np.median(x, axis, keepdims=keepdims))
def median(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The middle element along `axis` of the sorted x (None: of all); the mean of the two of an even number."""
    return quantile(x, 0.5, axis, keepdims)


# ── results whose shape depends on the data: computed on the host, without gradients ──────────────────

def from_host(data: np.ndarray, like: Tensor) -> Tensor:
    return Tensor(get_backend(like.device).array(data), like.device)


@composite("... -> ...", reference=np.nonzero)
def nonzero(x: Tensor) -> tuple[Tensor, ...]:
    """For each axis, the indices (int64) of the elements that are not 0, in C order."""
    if not x.ndim:
        raise ValueError("nonzero: x is 0-d, expected at least one axis")
    return tuple(from_host(index, x) for index in np.nonzero(x.numpy()))


@composite("n, ... -> ...", reference=np.searchsorted)
def searchsorted(sorted_values: Tensor, x: Tensor, side: Any = "left", sorter: Tensor | None = None) -> Tensor:
    """Where each x would go in the ascending `sorted_values` (int64): before equal ones ("left") or after ("right").

    sorter: the indices that sort them (argsort), where they are not in order.
    """
    if side not in ("left", "right"):
        raise ValueError(f"searchsorted: side is {side!r}, expected 'left' or 'right'")
    if sorted_values.ndim != 1:
        raise ValueError(f"searchsorted: sorted_values has shape {sorted_values.shape}, expected one axis")
    if sorter is not None:
        sorted_values = take(sorted_values, sorter)
    return from_host(np.asarray(np.searchsorted(sorted_values.numpy(), x.numpy(), side)), x)
