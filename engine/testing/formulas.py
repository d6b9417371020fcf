"""The equations of the fused ops and their gradients, in plain array notation: each op's oracle, beside the engine.

They are written once more here, not taken from the ops' compositions, so that a wrong composition is found as well.
Every function takes float64 arrays, or Rounded ones, and then gives its error bound too (rounded.py). Gradients are
those of the textbooks: for y = f(x) and cotangent g, gᵀ ∂f/∂x.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine.testing.rounded import (
    Number,
    Rounded,
    absolute,
    exp,
    gather,
    join,
    largest,
    log,
    matmul,
    maximum,
    mean,
    minimum,
    normal_cdf,
    plain,
    rsqrt,
    sigmoid,
    softplus,
    sqrt,
    swap,
    total,
    where,
)

# ── activations ───────────────────────────────────────────────────────────────────────────────────────


def relu(x: Number) -> Number:
    return maximum(x, 0.0)


def relu_vjp(g: Number, x: Number) -> Number:
    return where(plain(x) > 0, g, 0.0)


def silu(x: Number) -> Number:
    return x * sigmoid(x)


def silu_vjp(g: Number, x: Number) -> Number:
    s = sigmoid(x)
    return g * (s * (1.0 + x * sigmoid(-x)))


def gelu(x: Number) -> Number:
    return x * normal_cdf(x)


def gelu_vjp(g: Number, x: Number) -> Number:
    return g * (normal_cdf(x) + x * (exp(-(x * x) * 0.5) * (1 / math.sqrt(2 * math.pi))))


def gelu_tanh(x: Number) -> Number:
    # (1 + tanh z)/2 = σ(2z), without the cancellation
    return x * sigmoid(_inner(x) * 2.0)


def gelu_tanh_vjp(g: Number, x: Number) -> Number:
    s, other = sigmoid(_inner(x) * 2.0), sigmoid(-_inner(x) * 2.0)
    slope = (1.0 + x * x * (3 * 0.044715)) * (2 * math.sqrt(2 / math.pi))
    return g * (s + x * (s * other * slope))


def _inner(x: Number) -> Number:
    return (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)


ACTIVATIONS = {"relu": (relu, relu_vjp), "silu": (silu, silu_vjp), "gelu": (gelu, gelu_vjp),
               "gelu_tanh": (gelu_tanh, gelu_tanh_vjp)}


# ── softmax and norms over the last axis ──────────────────────────────────────────────────────────────

def logsumexp(x: Number, axis: Any = None, keepdims: bool = False) -> Number:
    if not x.size:
        return np.log(total(plain(x), axis, keepdims))
    top = largest(x, axis, True)
    top = where(np.isfinite(plain(top)), top, 0.0)
    y = log(total(exp(x - top), axis, True)) + top
    if keepdims:
        return y
    shape = plain(x).sum(axis=axis).shape
    return y.reshape(shape)


def softmax(x: Number, axis: int = -1) -> Number:
    if not x.size or not x.ndim:
        return exp(x - x) if not x.ndim else x
    e = exp(x - largest(x, axis, True))
    return e / total(e, axis, True)


def log_softmax(x: Number, axis: int = -1) -> Number:
    if not x.size or not x.ndim:
        return x - x if not x.ndim else x
    d = x - largest(x, axis, True)
    return d - log(total(exp(d), axis, True))


def softmax_vjp(g: Number, x: Number, axis: int = -1) -> Number:
    y = softmax(x, axis)
    return y * (g - total(g * y, axis, True)) if x.ndim else (g - g) * y


def log_softmax_vjp(g: Number, x: Number, axis: int = -1) -> Number:
    return g - exp(log_softmax(x, axis)) * total(g, axis, True) if x.ndim else g - g


def normalized(x: Number, eps: float) -> tuple[Number, Number]:
    """(x − μ)/√(σ² + ε) and 1/√(σ² + ε)."""
    d = x - mean(x, -1, True)
    rstd = rsqrt(mean(d * d, -1, True) + eps)
    return d * rstd, rstd


def layer_norm(x: Number, weight: Number, bias: Number, eps: float = 1e-5) -> Number:
    return weight * normalized(x, eps)[0] + bias


def layer_norm_vjp(g: Number, x: Number, weight: Number, bias: Number, eps: float = 1e-5) -> tuple[Number, ...]:
    h, rstd = normalized(x, eps)
    gw = g * weight
    dx = (gw - mean(gw, -1, True) - h * mean(gw * h, -1, True)) * rstd
    rows = tuple(range(x.ndim - 1))
    return dx, total(g * h, rows), total(g, rows)


def rms_norm(x: Number, weight: Number, eps: float = 1e-6) -> Number:
    return weight * x * rsqrt(mean(x * x, -1, True) + eps)


def rms_norm_vjp(g: Number, x: Number, weight: Number, eps: float = 1e-6) -> tuple[Number, ...]:
    rstd = rsqrt(mean(x * x, -1, True) + eps)
    h, gw = x * rstd, g * weight
    return (gw - h * mean(gw * h, -1, True)) * rstd, total(g * h, tuple(range(x.ndim - 1)))


# ── products ──────────────────────────────────────────────────────────────────────────────────────────

def matrix_product(a: Number, b: Number) -> Number:
    """NumPy's matmul, 1-d operands included."""
    left = a if a.ndim > 1 else a[None, :]
    right = b if b.ndim > 1 else b[:, None]
    c = matmul(left, right)
    c = c if a.ndim > 1 else c[..., 0, :]
    return c if b.ndim > 1 else c[..., 0]


def linear(x: Number, weight: Number, bias: Number | None = None) -> Number:
    y = matrix_product(x, swap(weight))
    return y if bias is None else y + bias


def linear_vjp(g: Number, x: Number, weight: Number, bias: Number | None = None) -> tuple[Number | None, ...]:
    rows = math.prod(x.shape[:-1])
    flat_g, flat_x = g.reshape(rows, weight.shape[0]), x.reshape(rows, weight.shape[1])
    return (matrix_product(g, weight), matmul(swap(flat_g), flat_x),
            None if bias is None else total(flat_g, 0))


def feed_forward(x: Number, up: Number, down: Number, up_bias: Number | None = None,
                 down_bias: Number | None = None, activation: str = "gelu") -> Number:
    return linear(ACTIVATIONS[activation][0](linear(x, up, up_bias)), down, down_bias)


def feed_forward_vjp(g: Number, x: Number, up: Number, down: Number, up_bias: Number | None = None,
                     down_bias: Number | None = None, activation: str = "gelu") -> tuple[Number | None, ...]:
    f, f_vjp = ACTIVATIONS[activation]
    z = linear(x, up, up_bias)
    dh, ddown, ddown_bias = linear_vjp(g, f(z), down, down_bias)
    dx, dup, dup_bias = linear_vjp(f_vjp(dh, z), x, up, up_bias)
    return dx, dup, ddown, dup_bias, ddown_bias


def tensordot(a: Number, b: Number, axes: Any = 2) -> Number:
    """Through one matrix product, as Einstein would write it: free axes outside, summed ones inside."""
    if isinstance(axes, int):
        axes = (list(range(a.ndim - axes, a.ndim)), list(range(axes)))
    left, right = ([i % n for i in side] for side, n in zip(axes, (a.ndim, b.ndim)))
    free_a = [i for i in range(a.ndim) if i not in left]
    free_b = [i for i in range(b.ndim) if i not in right]
    inner = math.prod(a.shape[i] for i in left)
    rows, columns = [a.shape[i] for i in free_a], [b.shape[i] for i in free_b]

    def flat(x: Number, order: list[int], shape: tuple[int, int]) -> Number:
        def f(v: np.ndarray) -> np.ndarray:
            return v.transpose(order).reshape(shape)
        return x.moved(f) if isinstance(x, Rounded) else f(np.asarray(x))

    c = matmul(flat(a, free_a + left, (math.prod(rows), inner)), flat(b, right + free_b, (inner, math.prod(columns))))
    return c.reshape(tuple(rows + columns))


# ── attention ─────────────────────────────────────────────────────────────────────────────────────────

def _spread_heads(x: Number, heads: int) -> Number:
    """(batch, kv_heads, s, d) with each head repeated for its group of queries."""
    def f(v: np.ndarray) -> np.ndarray:
        return np.repeat(v, heads // v.shape[1], axis=1)
    return f(x) if isinstance(x, np.ndarray) else x.moved(f)


def _weights(query: Number, key: Number, mask: Any, causal: bool, lengths: Any, scale: float | None) -> Number:
    """softmax(scale Q Kᵀ + mask), with rows of zeros for queries that see nothing."""
    t, s = query.shape[-2], key.shape[-2]
    scores = matmul(query, swap(key)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    seen = np.ones((t, s), bool)
    if causal:
        seen = np.arange(s) <= np.arange(t)[:, None] + (s - t)
    if lengths is not None:
        seen = seen & (np.arange(s) < np.asarray(lengths).reshape(-1, 1, 1, 1))
    if mask is not None and np.asarray(mask).dtype == bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    seen = np.broadcast_to(seen, scores.shape) & (plain(scores) > -math.inf)
    alive = seen.any(-1, keepdims=True)
    scores = where(seen, scores, np.where(alive, -math.inf, 0.0))
    return where(alive, softmax(scores) if s else scores, 0.0)


def attention(query: Number, key: Number, value: Number, mask: Any = None, *, causal: bool = False, lengths: Any = None,
              scale: float | None = None, keep: Any = 1.0) -> Number:
    """softmax(scale Q Kᵀ + mask) V; keep is what dropout multiplies the weights by."""
    if query.ndim == 4:
        key, value = _spread_heads(key, query.shape[1]), _spread_heads(value, query.shape[1])
    return matmul(_weights(query, key, mask, causal, lengths, scale) * keep, value)


def attention_vjp(g: Number, query: Number, key: Number, value: Number, mask: Any = None, *, causal: bool = False,
                  lengths: Any = None, scale: float | None = None, keep: Any = 1.0) -> tuple[Number, ...]:
    """dV = Pᵀ g, dP = g Vᵀ, dS = P (dP − Σ P dP), dQ = dS K, dK = dSᵀ Q; groups of heads are summed."""
    groups, heads = key.shape[1], query.shape[1]
    wide_key, wide_value = _spread_heads(key, heads), _spread_heads(value, heads)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    p = _weights(query, wide_key, mask, causal, lengths, scale)
    dp = matmul(g, swap(wide_value)) * keep
    ds = p * (dp - total(p * dp, -1, True)) * scale

    def summed(x: Number) -> Number:
        b, _, s, d = x.shape
        return total(x.reshape(b, groups, heads // groups, s, d), 2)

    return matmul(ds, wide_key), summed(matmul(swap(ds), query)), summed(matmul(swap(p * keep), g))


def rope(x: Number, cosine: Number, sine: Number, interleaved: bool = False) -> Number:
    """Each pair (a, b) becomes (a cos − b sin, b cos + a sin)."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = [a * cosine - b * sine, b * cosine + a * sine]
    if not interleaved:
        return join(turned, -1)
    return join([t.reshape(*t.shape, 1) for t in turned], -1).reshape(*x.shape)


def rope_vjp(g: Number, x: Number, cosine: Number, sine: Number, interleaved: bool = False) -> tuple[Number, ...]:
    return rope(g, cosine, -sine, interleaved), None, None


def dropout_scale(shape: tuple[int, ...], p: float, seed: int, dtype: str) -> np.ndarray:
    """What dropout multiplies by in the first draw of Generator(seed): 1/(1 − p) where u ≥ p, else 0.

    u has 24 bits of one word for float32, 53 of two for float64; the words are Philox's (tests/test_random.py holds
    them against the published answers).
    """
    from engine.backend.numpy_rows import random_words

    n = math.prod(shape)
    if np.dtype(dtype).itemsize == 4:
        u = (random_words(n, seed, 0, 0, 0) >> 8) * 2.0**-24
    else:
        words = random_words(2 * n, seed, 0, 0, 0).astype(np.uint64).reshape(n, 2)
        u = ((words[:, 0] * np.uint64(2**32) + words[:, 1]) // np.uint64(2**11)) * 2.0**-53
    return np.where(u >= p, 1 / (1 - p) if p < 1 else 0.0, 0.0).reshape(shape)


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────

def reduced(loss: Number, reduction: str, count: float | None = None) -> Number:
    if reduction == "none":
        return loss
    y = total(loss)
    if reduction == "sum":
        return y
    with np.errstate(all="ignore"):
        return y / (float(plain(loss).size) if count is None else count)


def cross_entropy(logits: Number, target: Any, weight: Number | None = None, *, ignore_index: int = -100,
                  label_smoothing: float = 0.0, reduction: str = "mean") -> Number:
    """ln Σ eˣ − (1 − s) x[target] − s mean x, or its weighted form; the mean is over what counts."""
    target = np.asarray(target)
    counted = target != ignore_index
    safe = np.where(counted, target, 0)
    if weight is None:
        loss = logsumexp(logits, -1) - gather(logits, safe) * (1 - label_smoothing)
        loss = loss - mean(logits, -1) * label_smoothing if label_smoothing else loss
        return reduced(where(counted, loss, 0.0), reduction, float(counted.sum()))
    logp = log_softmax(logits)
    share = where(counted, weight.moved(lambda w: w[safe]) if not isinstance(weight, np.ndarray) else weight[safe], 0.0)
    loss = -(share * gather(logp, safe)) * (1 - label_smoothing)
    if label_smoothing:
        everywhere = total(logp * weight, -1) * (label_smoothing / logits.shape[-1])
        loss = loss - where(counted, everywhere, 0.0)
    return total(loss) / total(share) if reduction == "mean" else reduced(loss, reduction)


def cross_entropy_vjp(g: Number, logits: Number, target: Any, *, ignore_index: int = -100,
                      label_smoothing: float = 0.0) -> tuple[Number, None]:
    """g (softmax x − (1 − s) one-hot − s/n), for reduction "none"."""
    target = np.asarray(target)
    classes = logits.shape[-1]
    counted = (target != ignore_index)[..., None]
    hot = np.arange(classes) == target[..., None]
    p = exp(logits - logsumexp(logits, -1, True))
    d = p - (hot * (1 - label_smoothing) + label_smoothing / classes)
    return where(counted, g.reshape(*g.shape, 1) * d, 0.0), None


def linear_cross_entropy(x: Number, weight: Number, target: Any, bias: Number | None = None, **options: Any) -> Number:
    return cross_entropy(linear(x, weight, bias), target, **options)


def mse_loss(x: Number, target: Number, reduction: str = "mean") -> Number:
    d = x - target
    return reduced(d * d, reduction)


def huber_loss(x: Number, target: Number, delta: float = 1.0, reduction: str = "mean") -> Number:
    d = absolute(x - target)
    near = minimum(d, np.full(d.shape, delta))
    return reduced(near * (d - near * 0.5), reduction)


def binary_cross_entropy(p: Number, target: Number, reduction: str = "mean") -> Number:
    kept, lost = maximum(log(p), -100.0), maximum(log(1.0 - p), -100.0)
    return reduced(-(target * kept + (1.0 - target) * lost), reduction)


def binary_cross_entropy_with_logits(x: Number, target: Number, reduction: str = "mean") -> Number:
    return reduced(softplus(x) - x * target, reduction)


def kl_div(log_p: Number, target: Number, reduction: str = "mean") -> Number:
    safe = where(plain(target) > 0, target, 1.0)
    return reduced(where(plain(target) > 0, target * log(safe), 0.0) - target * log_p, reduction)


# ── statistics ────────────────────────────────────────────────────────────────────────────────────────

def variance(x: Number, axis: Any = None, correction: float = 0.0, keepdims: bool = False) -> Number:
    d = x - mean(x, axis, True)
    squares = total(d * d, axis, keepdims)
    with np.errstate(all="ignore"):
        return squares / max(x.size / max(squares.size, 1) - correction, 0.0)


def deviation(x: Number, axis: Any = None, correction: float = 0.0, keepdims: bool = False) -> Number:
    return sqrt(variance(x, axis, correction, keepdims))
