"""Attention: softmax(Q Kᵀ/√d + mask) V in tiles, and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from engine.backend import Array, get_backend
from engine.dtypes import DType, as_dtype, float32, int64
from engine.ops.creation import arange, masked_scale
from engine.ops.elementwise import where
from engine.ops.matmul import matmul
from engine.ops.movement import concat, matrix_transpose, permute_dims, repeat, stack
from engine.ops.normalization import softmax_rows
from engine.ops.reductions import any as any_over
from engine.ops.registry import cast, check_shapes, composite, op
from engine.precision import autocast
from engine.random import Generator, Key, default_generator
from engine.tensor import Tensor, default_device

NO_DRAW = Key(0, 0, 0, 0)


def _strides(k: Any, x: Array) -> Array:
    """x (batch, t, heads, d) with a dense last axis: itself, or a copy."""
    return x if x.data.strides[-1] == x.dtype.itemsize or x.shape[-1] == 1 else k.contiguous(x)


def _arguments(k: Any, q: Array, key: Array, value: Array, mask: Array | None, lengths: Array | None, scale: float,
               causal: bool, p: float, draw: Key, *, gradients: tuple[Array, ...] = ()) -> tuple[Any, ...]:
    """What the two attention kernels share: sizes, strides and scalars, in the order of kernels.h."""
    batch, t, heads, d = q.shape
    s, kv_heads = key.shape[1:3]
    size = q.dtype.itemsize
    strides = [x.data.strides[axis] // size for x in (q, key, value) for axis in (0, 2, 1)]
    if mask is not None:
        mask = mask.seen_as(np.broadcast_to(mask.data, (batch, heads, t, s)))
        strides += [n // size for n in mask.data.strides]
    else:
        strides += [0, 0, 0, 0]
    strides += [x.data.strides[1] // size for x in gradients]
    if lengths is not None:
        lengths = k.contiguous(lengths if lengths.dtype is int64 else cast(k, lengths, int64))
    record = _record(k, tuple(strides))
    return (q, key, value, mask, lengths, batch, heads, kv_heads, t, s, d, record, scale, int(causal), p, *draw)


@lru_cache(maxsize=1024)
def _record(k: Any, strides: tuple[int, ...]) -> Array:
    """Strides in the device's memory; tokens and layers share one, so nobody may write to it."""
    return k.array(np.array(strides, np.int64), int64)


def _forward(k: Any, q: Array, key: Array, value: Array, *rest: Any) -> Any:
    """The output, and what backward needs; `rest` as in _arguments."""
    out, lse = k.empty(q.shape, q.dtype), k.empty(q.shape[:3], q.dtype)
    k.attention(out, lse, *_arguments(k, q, key, value, *rest))
    return out, {"out": out, "lse": lse}


def _backward(k: Any, dq: Array, dk: Array, dv: Array, g: Array, out: Array, lse: Array, *operands: Any) -> None:
    """Fills dq, dk and dv, whose heads lie side by side; `operands` as in _arguments."""
    q, key, value, mask, lengths, *sizes = _arguments(k, *operands, gradients=(dq, dk))
    k.attention_vjp(dq, dk, dv, k.empty(lse.shape, lse.dtype), g, q, key, value, out, lse, mask, lengths, *sizes)


@op("bthd, bsgd, bsgd, ..., b -> bthd",
    types="float!", fixed=("lengths",), public=False, part_of="scaled_dot_product_attention")
def attention(k: Any, query: Array, key: Array, value: Array, mask: Array | None = None, lengths: Array | None = None,
              scale: float = 1.0, causal: bool = False, p: float = 0.0, draw: Key = NO_DRAW) -> Any:
    """Flash attention. Dao 2023, arXiv:2307.08691, algorithm 1: memory O(T), the scores are never stored.

    The heads of a token stand beside each other, as projections give and take them: nothing is moved on the way in or
    out, forward or backward.
    """
    return _forward(k, _strides(k, query), _strides(k, key), _strides(k, value), mask, lengths, scale, causal, p, draw)


@attention.kernel_vjp
def _(k: Any, g: Array, query: Array, key: Array, value: Array, mask: Array | None, lengths: Array | None,
      out: Array, lse: Array, scale: float, causal: bool, p: float, draw: Key) -> Any:
    q, key, value = _strides(k, query), _strides(k, key), _strides(k, value)
    dq, dk, dv = k.empty(q.shape, q.dtype), k.empty(key.shape, q.dtype), k.empty(value.shape, q.dtype)
    _backward(k, dq, dk, dv, g, out, lse, q, key, value, mask, lengths, scale, causal, p, draw)
    return dq, dk, dv, None, None


@attention.composition
@autocast("float32")  # as the kernel
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor | None, scale: float,
      causal: bool, p: float, draw: Key) -> Tensor:
    t, heads, (s, kv_heads) = query.shape[1], query.shape[2], key.shape[1:3]
    query, key, value = (turned(x) for x in (query, key, value))
    key, value = repeat(key, heads // kv_heads, 1), repeat(value, heads // kv_heads, 1)
    scores = matmul(query, matrix_transpose(key)) * scale
    at = arange(s, device=query.device)
    seen = at <= arange(s - t, s, device=query.device).expand_dims(1) if causal else at >= 0
    if lengths is not None:
        seen = seen & (at < lengths.reshape(-1, 1, 1, 1))
    if mask is not None:
        scores = scores + mask
    scores = where(seen, scores, -math.inf)
    # A row that sees nothing is all −∞: its softmax is NaN, its attention is 0.
    alive = any_over(scores > -math.inf, -1, keepdims=True)
    weights = where(alive, softmax_rows(where(alive, scores, 0.0)), 0.0)
    return turned(matmul(masked_scale(weights, p, draw) if p else weights, value))


def _split(x: Array, kv_heads: int) -> tuple[Array, Array, Array]:
    """Views of queries, keys and values that stand beside each other in (batch, T, heads + 2 kv_heads, d)."""
    heads = x.shape[2] - 2 * kv_heads
    return (x.view(x.data[:, :, :heads]), x.view(x.data[:, :, heads:-kv_heads]), x.view(x.data[:, :, -kv_heads:]))


@op("btnd, ..., b -> bt",
    types="float!", fixed=("lengths",), kernel="attention", public=False, part_of="scaled_dot_product_attention")
def self_attention(k: Any, joined: Array, mask: Array | None = None, lengths: Array | None = None, kv_heads: int = 1,
                   scale: float = 1.0, causal: bool = False, p: float = 0.0, draw: Key = NO_DRAW) -> Any:
    """attention whose queries, keys and values are one array, and so is their gradient: one projection makes them."""
    return _forward(k, *_split(_strides(k, joined), kv_heads), mask, lengths, scale, causal, p, draw)


@self_attention.kernel_vjp
def _(k: Any, g: Array, joined: Array, mask: Array | None, lengths: Array | None, out: Array, lse: Array,
      kv_heads: int, scale: float, causal: bool, p: float, draw: Key) -> Any:
    gradient = k.empty(joined.shape, joined.dtype)
    _backward(k, *_split(gradient, kv_heads), g, out, lse, *_split(_strides(k, joined), kv_heads), mask, lengths, scale,
              causal, p, draw)
    return gradient, None, None


@self_attention.composition
def _(joined: Tensor, mask: Tensor | None, lengths: Tensor | None, kv_heads: int, scale: float, causal: bool, p: float,
      draw: Key) -> Tensor:
    heads = joined.shape[2] - 2 * kv_heads
    parts = joined[:, :, :heads], joined[:, :, heads:-kv_heads], joined[:, :, -kv_heads:]
    return attention(*parts, mask, lengths, scale, causal, p, draw)


def turned(x: Tensor) -> Tensor:
    """(batch, T, heads, d) as (batch, heads, T, d), and back: a view."""
    return permute_dims(x, (0, 2, 1, 3))


@composite("...td, ...sd, ...sd -> ...td")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *,
                                 causal: bool = False, lengths: Tensor | None = None, scale: float | None = None,
                                 dropout: float = 0.0, generator: Generator | None = None) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V. Vaswani et al. 2017, arXiv:1706.03762, eq. 1.

    query (batch, heads, T, d); key, value (batch, kv_heads, S, d), heads a multiple of kv_heads (grouped-query
    attention, Ainslie et al. 2023, arXiv:2305.13245); or (..., T, d) and (..., S, d) with equal leading axes.
    mask:    broadcasts to (batch, heads, T, S): bool, true where a query may look, or floating, added to the scores
    causal:  query t sees keys up to t + S − T, so the last query sees every key
    lengths: (batch,), how many keys of each sequence are real (right padding)
    scale:   1/√d by default
    dropout: probability with which an attention weight is dropped
    A query that sees no key gives zeros. Raises ValueError for shapes that do not fit.
    """
    query, key, value, leading = _four_axes(query, key, value)
    check_shapes("scaled_dot_product_attention", "bhtd, bgsd, bgsd", ("query", "key", "value"),
                 (query.shape, key.shape, value.shape))  # as they came, not as the kernel has them
    out = turned(attend(turned(query), turned(key), turned(value), mask, causal=causal, lengths=lengths, scale=scale,
                        dropout=dropout, generator=generator))
    return out.reshape(*leading, *out.shape[2:]) if leading is not None else out


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False,
           lengths: Tensor | None = None, scale: float | None = None, dropout: float = 0.0,
           generator: Generator | None = None) -> Tensor:
    """scaled_dot_product_attention for query (batch, T, heads, d), key and value (batch, S, kv_heads, d)."""
    heads, kv_heads = query.shape[2], key.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"scaled_dot_product_attention: query has {heads} heads and key {kv_heads}, "
                         "expected a multiple")
    mask = None if mask is None else _bias(mask, query.dtype, (query.shape[0], heads, query.shape[1], key.shape[1]))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return attention(query, key, value, mask, lengths, scale, causal, dropout, _draw(dropout, generator))


def attend_joined(joined: Tensor, kv_heads: int, mask: Tensor | None = None, *, causal: bool = False,
                  lengths: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """attend for queries, keys and values side by side in (batch, T, heads + 2 kv_heads, d), with the same bits."""
    batch, t, heads, d = joined.shape
    mask = None if mask is None else _bias(mask, joined.dtype, (batch, heads - 2 * kv_heads, t, t))
    return self_attention(joined, mask, lengths, kv_heads, 1 / math.sqrt(d), causal, dropout, _draw(dropout, None))


Keep = Callable[[Array, Array], tuple[Array, Array]]
"""Takes keys and values (batch, T, kv_heads, d) of new positions, and gives those of all, (batch, S, kv_heads, d)."""


def attend_kept(joined: Tensor, heads: int, kv_heads: int, keep: Keep, rotary: tuple[Tensor, Tensor] | None = None, *,
                causal: bool = False, lengths: Tensor | None = None) -> Tensor:
    """attend for new positions, (batch, T, (heads + 2 kv_heads) · d) to (batch, T, heads · d), over all that are kept.

    For inference, where the kernels are, and on arrays: for one token a view made by an op costs as much as a kernel.
    """
    k, (batch, t, width) = get_backend(joined.device), joined.shape
    d = width // (heads + 2 * kv_heads)
    query, key, value = _split(joined.array.reshaped((batch, t, heads + 2 * kv_heads, d)), kv_heads)
    if rotary is not None:
        query, key = (turned(rope(turned(Tensor(x, k.device)), *rotary)).array for x in (query, key))
    keys, values = keep(key, value)  # which refuses all types but that of what it has, so now there is one
    out, _ = _forward(k, query, keys, values, None, None if lengths is None else lengths.array, 1 / math.sqrt(d),
                      causal, 0.0, NO_DRAW)
    return Tensor(out.reshaped((batch, t, heads * d)), joined.device)


def _draw(dropout: float, generator: Generator | None) -> Key:
    if not 0 <= dropout < 1:
        raise ValueError(f"scaled_dot_product_attention: dropout is {dropout!r}, expected a number in [0, 1)")
    return (generator or default_generator()).key() if dropout else NO_DRAW


def _bias(mask: Tensor, dtype: DType, expected: tuple[int, ...]) -> Tensor:
    """What a mask adds to the scores: itself, or 0 where it is true and −∞ elsewhere."""
    if mask.requires_grad:
        raise ValueError("scaled_dot_product_attention: mask requires grad, which the fused kernel does not "
                         "compute; write the attention with matmul and softmax")
    try:
        np.broadcast_shapes(mask.shape, expected)
    except ValueError:
        raise ValueError(f"scaled_dot_product_attention: mask has shape {mask.shape}, which does not "
                         f"broadcast to (batch, heads, T, S) = {expected}") from None
    return mask if mask.dtype.is_floating else where(mask, 0.0, -math.inf).to(dtype=dtype)


def _four_axes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
    """The operands as (batch, heads, length, d), and the leading axes to give back to the result if they differ."""
    if query.ndim == 4 and key.ndim == 4 and value.ndim == 4:
        return query, key, value, None
    if query.ndim < 2 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(f"scaled_dot_product_attention: query has shape {query.shape}, key {key.shape}, value "
                         f"{value.shape}; expected (batch, heads, length, d), or equal leading axes")
    leading = query.shape[:-2]
    query, key, value = (x.reshape(1, math.prod(leading), *x.shape[-2:]) for x in (query, key, value))
    return query, key, value, leading


# ── rotary positions ──────────────────────────────────────────────────────────────────────────────────

@op("...td, th, th -> ...td", types="float!", kernel="rope", public=False, part_of="rope")
def rotate_pairs(k: Any, x: Array, cosine: Array, sine: Array, interleaved: bool) -> Array:
    """Turn each pair of coordinates of position t by its angle."""
    x, cosine, sine = k.contiguous(x), k.contiguous(cosine), k.contiguous(sine)
    t, d = x.shape[-2:]
    y = k.empty_like(x)
    k.rope(y, x, cosine, sine, x.size // (t * d) if t * d else 0, t, d, int(interleaved))
    return y


@rotate_pairs.kernel_vjp
def _(k: Any, g: Array, cosine: Array, sine: Array, interleaved: bool) -> Any:
    cosine, back = k.contiguous(cosine), k.map("negative", sine)  # a rotation's transpose turns the other way
    t, d = g.shape[-2:]
    dx = k.empty_like(g)
    k.rope(dx, g, cosine, back, g.size // (t * d) if t * d else 0, t, d, int(interleaved))
    return dx, None, None


@rotate_pairs.composition
def _(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    half = x.shape[-1] // 2
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        pairs = stack([a * cosine - b * sine, b * cosine + a * sine], -1)
        return pairs.reshape(x.shape)
    a, b = x[..., :half], x[..., half:]
    return concat([a * cosine - b * sine, b * cosine + a * sine], -1)


@composite("...td, th, th -> ...td")
def rope(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding. Su et al. 2021, arXiv:2104.09864, eq. 34.

    x (..., T, d), d even; cosine and sine (T, d/2) of the angles (see rope_table). The pairs are (i, i + d/2) as in
    Llama's published weights, or (2i, 2i + 1) if interleaved, as in the paper.
    """
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"rope: x has shape {x.shape}, expected (..., T, d) with d even")
    if cosine.shape != (x.shape[-2], x.shape[-1] // 2) or sine.shape != cosine.shape:
        raise ValueError(f"rope: cosine has shape {cosine.shape} and sine {sine.shape}, expected "
                         f"{(x.shape[-2], x.shape[-1] // 2)} for x {x.shape}")
    return rotate_pairs(x, cosine, sine, interleaved)


def rope_table(positions: int, dim: int, base: float = 10000.0, *, start: int = 0, device: str | None = None,
               dtype: Any = None) -> tuple[Tensor, Tensor]:
    """cos and sin of t · base^(−2i/dim), each (positions, dim/2), for t from `start`; computed in float64."""
    angle = np.outer(np.arange(start, start + positions), base ** (-np.arange(0, dim, 2) / dim))
    kind = as_dtype(dtype or float32)
    k = get_backend(device or default_device())
    return Tensor(k.array(np.cos(angle), kind), k.device), Tensor(k.array(np.sin(angle), kind), k.device)
