"""Matrix products. One kernel, gemm, serves them all: operands go by strides, so a transpose costs nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.backend import Array
from engine.backend.launch import broadcast_shapes
from engine.ops.movement import concat, matrix_transpose, pad, permute_dims, reshape
from engine.ops.registry import axes_tuple, axis_index, composite, op
from engine.precision import product_format
from engine.tensor import Tensor


def _batch_stride(k: Any, x: Array, batch: tuple[int, ...]) -> tuple[Array, int]:
    """x (..., i, j) as one batch axis of constant stride (in elements) over the broadcast `batch`, or a copy."""
    own = x.data.shape[:-2]
    if math.prod(own) == 1:
        return x, 0
    if own != batch:
        x = x.seen_as(np.broadcast_to(x.data, (*batch, *x.data.shape[-2:])))
    strides = [(n, s) for n, s in zip(batch, x.data.strides[:-2]) if n != 1]
    if all(s == n2 * s2 for (_, s), (n2, s2) in itertools.pairwise(strides)):
        return x, (strides[-1][1] // x.dtype.itemsize if strides else 0)
    x = k.contiguous(x)
    return x, x.data.shape[-1] * x.data.shape[-2]


def gemm(k: Any, a: Array, b: Array, bias: Array | None = None, out: Array | None = None,
         accumulate: bool = False) -> Array:
    """a (..., m, k) times b (..., k, n), leading axes broadcast, plus bias (n,), plus what is in out (..., m, n) if
    accumulate: one launch. The elements of a and b are rounded to the format of eg.autocast (precision.py)."""
    (m, inner), n = a.data.shape[-2:], b.data.shape[-1]
    batch = broadcast_shapes("matmul", a.data.shape[:-2], b.data.shape[:-2])
    c = k.empty((*batch, m, n), a.dtype) if out is None else out
    if math.prod(b.data.shape[:-2]) == 1 and a.data.flags.c_contiguous and batch == a.data.shape[:-2]:
        rows, count, a_step, b_step = math.prod(batch) * m, 1, 0, 0  # one tall product instead of a batch
        a = a.seen_as(a.data.reshape(rows, inner))  # a stride of an axis of length 1 may be anything; these are not
    else:
        rows, count = m, math.prod(batch)
        (a, a_step), (b, b_step) = _batch_stride(k, a, batch), _batch_stride(k, b, batch)
    size = a.dtype.itemsize
    (a_row, a_col), (b_row, b_col) = a.data.strides[-2:], b.data.strides[-2:]
    k.gemm(c, a, b, bias, count, rows, n, inner, a_step, a_row // size, a_col // size,
           b_step, b_row // size, b_col // size, rows * n, n, int(accumulate), product_format.get())
    return c


@op("...ij, ...jk -> ...ik", public=False, part_of="matmul")
def matrix_product(k: Any, a: Array, b: Array) -> Array:
    """C = A B over the last two axes, the others broadcast."""
    return gemm(k, a, b)


@matrix_product.vjp
def _(g: Tensor, a: Tensor, b: Tensor, needs: tuple[bool, ...]) -> Any:
    return (matrix_product(g, matrix_transpose(b)) if needs[0] else None,
            _transposed_product(a, g, b.ndim) if needs[1] else None)


def _transposed_product(a: Tensor, g: Tensor, columns: int) -> Tensor:
    """Aᵀ G (..., j, k). Where B was one matrix for all of a batch, the sum over the batch is one tall product."""
    if columns == 2 and a.ndim > 2 and a.ndim == g.ndim and a.shape[:-2] == g.shape[:-2]:
        rows = math.prod(a.shape[:-1])
        a, g = reshape(a, (rows, a.shape[-1])), reshape(g, (rows, g.shape[-1]))
    return matrix_product(matrix_transpose(a), g)


@composite("...ij, ...jk -> ...ik", reference=np.matmul, method="__matmul__")
def matmul(a: Any, b: Any) -> Tensor:
    """C = A B over the last two axes, the others broadcast; a 1-d operand is a row (left) or a column (right).

    Shapes (..., m, k) and (..., k, n) give (..., m, n). Raises ValueError for 0-d operands and unequal k.
    """
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"matmul: got shapes {a.shape} and {b.shape}, expected at least 1 axis each")
    if a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul: a has shape {a.shape} and b has shape {b.shape}: the last axis of a, "
                         f"{a.shape[-1]}, must equal the {'second last' if b.ndim > 1 else 'only'} axis of b, "
                         f"{b.shape[-2 if b.ndim > 1 else 0]}")
    left = a if a.ndim > 1 else a.expand_dims(0)
    right = b if b.ndim > 1 else b.expand_dims(1)
    c = matrix_product(left, right)
    if a.ndim == 1:
        c = c.squeeze(-2)
    return c.squeeze(-1) if b.ndim == 1 else c


@op("...i, oi, o -> ...o", types="float!", kernel="gemm")
def linear(k: Any, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y = x Wᵀ + b, W (out, in): a matrix product with the bias added as it is written."""
    bias = None if bias is None else k.contiguous(bias)
    if x.data.ndim == 1:
        y = gemm(k, x.seen_as(x.data[None, :]), transposed(weight), bias)
        return y.seen_as(y.data[0])
    return gemm(k, x, transposed(weight), bias)


def transposed(x: Array) -> Array:
    return Array(x.data.T, x.dtype, x.ptr, x.storage)


@linear.kernel_vjp
def _(k: Any, g: Array, x: Array, weight: Array, needs: tuple[bool, ...]) -> Any:
    flat_g, flat_x = as_rows(k, g), as_rows(k, x)
    dx = shaped(gemm(k, flat_g, weight), x.shape) if needs[0] else None
    dweight = gemm(k, transposed(flat_g), flat_x) if needs[1] else None
    return dx, dweight, column_sums(k, flat_g) if needs[2] else None


def as_rows(k: Any, x: Array) -> Array:
    """x (..., n), made dense, as (rows, n), for launches."""
    return shaped(k.contiguous(x), (math.prod(x.shape[:-1]), x.shape[-1]))


def shaped(x: Array, shape: tuple[int, ...]) -> Array:
    """x, dense, under another shape: still a result of its own, of which no other tensor is a view."""
    return x.seen_as(x.data.reshape(shape))


def column_sums(k: Any, x: Array) -> Array:
    """Σ over the rows of x (rows, n), dense: the gradient of a bias."""
    y = k.empty(x.shape[1:], x.dtype)
    k.sum(y, x, 1, *x.shape)
    return y


@linear.composition
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = matmul(x, matrix_transpose(weight))
    return y if bias is None else y + bias


@op("...i, qi, ki, vi, q, k, v -> ...", types="float!", kernel="gemm", public=False, part_of="linear")
def joined_linear(k: Any, x: Array, query: Array, key: Array, value: Array, query_bias: Array | None = None,
                  key_bias: Array | None = None, value_bias: Array | None = None) -> Array:
    """[x W_qᵀ + b_q, x W_kᵀ + b_k, x W_vᵀ + b_v], side by side: three maps of one x, in one product.

    x is packed once, and backward its gradient is one sum. W_q, W_k and W_v put together are a small copy, made again
    for backward.
    """
    biases = [bias for bias in (query_bias, key_bias, value_bias) if bias is not None]
    return gemm(k, x, transposed(_stacked(k, [query, key, value])), _stacked(k, biases) if biases else None)


def _stacked(k: Any, parts: Sequence[Array]) -> Array:
    """The parts one above the other."""
    whole = k.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    for here, part in zip(_rows(whole, parts), parts):
        k.copy(here, part, k.layout(here, part))
    return whole


def _rows(x: Array, parts: Sequence[Array]) -> list[Array]:
    """x cut into as many rows as each of the parts has: views."""
    ends = list(itertools.accumulate(part.shape[0] for part in parts))
    return [x.view(x.data[end - part.shape[0]:end]) for end, part in zip(ends, parts)]


@joined_linear.kernel_vjp
def _(k: Any, g: Array, x: Array, query: Array, key: Array, value: Array, needs: tuple[bool, ...]) -> Any:
    weights, flat_g, flat_x = (query, key, value), as_rows(k, g), as_rows(k, x)
    dx = shaped(gemm(k, flat_g, _stacked(k, weights)), x.shape) if needs[0] else None
    dweights = [gemm(k, part, flat_x) if wanted else None
                for part, wanted in zip(_rows(transposed(flat_g), weights), needs[1:4])]
    dbiases = [k.contiguous(part) if wanted else None
               for part, wanted in zip(_rows(column_sums(k, flat_g), weights), needs[4:])] if any(needs[4:]) else ()
    return (dx, *dweights, *dbiases, *[None] * (3 - len(dbiases)))


@joined_linear.composition
def _(x: Tensor, query: Tensor, key: Tensor, value: Tensor, query_bias: Tensor | None = None,
      key_bias: Tensor | None = None, value_bias: Tensor | None = None) -> Tensor:
    return concat([linear(x, query, query_bias), linear(x, key, key_bias), linear(x, value, value_bias)], -1)


@composite("bct, ock, o -> bot")
def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0,
           dilation: int = 1, groups: int = 1) -> Tensor:
    """y[b, o, t] = Σ_c Σ_i w[o, c, i] x[b, c, t·stride + i·dilation − padding] + bias[o]: a cross-correlation.

    x (batch, channels, T), weight (out, channels/groups, k);
    T_out = ⌊(T + 2 padding − dilation(k − 1) − 1)/stride⌋ + 1.
    Computed as one matrix product over windows that are gathered side by side (im2col). Raises ValueError for shapes
    that do not fit and for a window longer than the padded x.
    """
    if (groups < 1 or x.ndim != 3 or weight.ndim != 3 or x.shape[1] != weight.shape[1] * groups
            or weight.shape[0] % groups):
        raise ValueError(f"conv1d: x has shape {x.shape} and weight {weight.shape}, expected (batch, channels, T) and "
                         f"(out, channels/{groups}, k) with out a multiple of {groups}")
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(f"conv1d: stride is {stride}, dilation {dilation} and padding {padding}, expected at least "
                         "1, 1 and 0")
    batch, channels, length = x.shape
    outputs, _, width = weight.shape
    steps = (length + 2 * padding - dilation * (width - 1) - 1) // stride + 1
    if steps < 1:
        raise ValueError(f"conv1d: a window of {dilation * (width - 1) + 1} does not fit x of length {length} with "
                         f"padding {padding} (stride {stride}, dilation {dilation})")
    x = pad(x, ((0, 0), (0, 0), (padding, padding))) if padding else x
    at = np.arange(steps)[:, None] * stride + np.arange(width) * dilation
    windows = x[:, :, at].reshape(batch, groups, channels // groups, steps, width)
    columns = reshape(permute_dims(windows, (0, 1, 3, 2, 4)), (batch, groups, steps, channels // groups * width))
    filters = reshape(weight, (groups, outputs // groups, channels // groups * width))
    y = matmul(columns, matrix_transpose(filters))  # (batch, groups, steps, out / groups)
    y = reshape(permute_dims(y, (0, 1, 3, 2)), (batch, outputs, steps))
    return y if bias is None else y + bias.expand_dims(-1)


@composite("...n, ...n -> ...")
def vecdot(a: Tensor, b: Tensor, axis: int = -1) -> Tensor:
    """y = Σ a b along `axis`, the others broadcast. Raises ValueError where the lengths along `axis` differ."""
    if not a.ndim or not b.ndim or a.shape[axis] != b.shape[axis]:
        raise ValueError(f"vecdot: a has shape {a.shape} and b has shape {b.shape}, expected equal lengths along axis "
                         f"{axis}")
    product = a * b
    return product.sum(axis, dtype=product.dtype)


@composite("m, n -> mn", reference=np.outer)
def outer(a: Tensor, b: Tensor) -> Tensor:
    """y[i, j] = a[i] b[j]."""
    return a.reshape(-1, 1) * b.reshape(1, -1)


@composite("..., ... -> ...", reference=np.tensordot)
def tensordot(a: Tensor, b: Tensor, axes: int | tuple[Sequence[int], Sequence[int]] = 2) -> Tensor:
    """Σ over pairs of axes: the last `axes` of a with the first of b, or the two given lists of axes."""
    if isinstance(axes, int):
        left, right = list(range(a.ndim - axes, a.ndim)), list(range(axes))
    else:
        left = [axis_index("tensordot", i, a.ndim) for i in axes[0]]
        right = [axis_index("tensordot", i, b.ndim) for i in axes[1]]
    lengths = [a.shape[i] for i in left]
    if lengths != [b.shape[i] for i in right]:
        raise ValueError(f"tensordot: axes {left} of a are {lengths}, axes {right} of b are "
                         f"{[b.shape[i] for i in right]}; expected equal lengths")
    axes_tuple("tensordot", left, a.ndim), axes_tuple("tensordot", right, b.ndim)
    free_a, free_b = ([i for i in range(n) if i not in used] for n, used in ((a.ndim, left), (b.ndim, right)))
    summed = math.prod(lengths)
    rows, columns = [a.shape[i] for i in free_a], [b.shape[i] for i in free_b]
    flat_a = reshape(permute_dims(a, free_a + left), (math.prod(rows), summed))
    flat_b = reshape(permute_dims(b, right + free_b), (summed, math.prod(columns)))
    return reshape(matmul(flat_a, flat_b), (*rows, *columns))
