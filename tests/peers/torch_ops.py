"""Each op of the registry as PyTorch has it: a function of torch tensors and the attributes of the op's row.

A key is an op's name, or a row's ("topk: indices") where rows of one op are called differently. NO_PEER names the ops
that PyTorch has no counterpart of, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from engine.testing import blocks

T = torch.Tensor

NO_PEER = {"dropout": "PyTorch draws from another generator; the formula is tested in tests/ops",
           "nextafter": "a neighbour is one in its own type: the wide result says nothing of it"}

# Of equal elements PyTorch takes any, so the gradient goes to one of them and ours perhaps to another.
ANY_OF_EQUAL = {"median", "quantile"}
# Operands through which PyTorch gives no gradient: the weights of classes.
NO_GRADIENT = {"cross_entropy": (2,)}
# Roundings of size 1 by which PyTorch's own formula cancels: (1 − t) x + softplus(−x) has up to four of size |x| ≤ 9.
CANCELS = {"binary_cross_entropy_with_logits": 36.0}


def dims(x: T, axis: Any) -> tuple[int, ...]:
    """An `axis` argument as the axes it names; PyTorch takes an empty tuple for all."""
    return tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)


def over(f: Callable[..., T]) -> Callable[..., T]:
    """A reduction over several axes; over none it is x."""
    def reduce(x: T, axis: Any = None, keepdims: bool = False, **more: Any) -> T:
        axes = dims(x, axis)
        return f(x, dim=axes, keepdim=keepdims, **more) if axes or not x.ndim else x
    return reduce


def spread(f: Callable[..., T]) -> Callable[..., T]:
    """Divided by n unless a correction is given; there by n − 1."""
    return lambda x, axis=None, keepdims=False, correction=0.0: over(f)(x, axis, keepdims, correction=correction)


def truth(f: Callable[..., T]) -> Callable[..., T]:
    return over(lambda x, dim, keepdim: f(x.bool(), dim=dim, keepdim=keepdim) if x.ndim else x.bool())


def truth_of(f: Callable[..., T]) -> Callable[..., T]:
    """any and all give bool where they reduce nothing, too."""
    return lambda x, axis=None, keepdims=False: truth(f)(x, axis, keepdims).bool()


def prod(x: T, dim: tuple[int, ...], keepdim: bool) -> T:
    if not x.ndim:
        return x
    for axis in sorted((d % x.ndim for d in dim), reverse=True):
        x = torch.prod(x, axis, keepdim)
    return x


def argsort(x: T, axis: int, descending: bool = False) -> T:
    return torch.argsort(x, stable=True, dim=axis, descending=descending)


def index_of(f: Callable[..., T]) -> Callable[..., T]:
    """argmax, argmin: the first of equal ones, which PyTorch does not promise; a stable sort does."""
    def find(x: T, axis: int | None = None, keepdims: bool = False) -> T:
        flat = x.reshape(-1) if axis is None else x
        found = argsort(flat, -1 if axis is None else axis, f is torch.argmax)
        found = found.select(0 if axis is None else axis, 0)
        if axis is None:
            return found.reshape([1] * x.ndim) if keepdims else found
        return found.unsqueeze(axis % x.ndim) if keepdims else found
    return find


def clip(x: T, min: float | None, max: float | None) -> T:
    return x if min is None and max is None else torch.clamp(x, min, max)


def pad(x: T, widths: Sequence[tuple[int, int]], value: float) -> T:
    return F.pad(x, [n for pair in reversed(widths) for n in pair], value=value)


def split(x: T, sections: Any, axis: int) -> T:
    """The pieces end to end, as the row has them."""
    sizes = [x.shape[axis] // sections] * sections if isinstance(sections, int) else list(sections)
    return torch.cat([piece.reshape(-1) for piece in torch.split(x, sizes, axis)])


def squeeze(x: T, axis: Any) -> T:
    return torch.squeeze(x) if axis is None else torch.squeeze(x, axis)


def take(x: T, index: T, axis: int) -> T:
    return torch.index_select(x, axis, index % x.shape[axis])


def quantile(x: T, q: float = 0.5, axis: int | None = None, keepdims: bool = False) -> T:
    y = torch.quantile(x.reshape(-1) if axis is None else x, q, None if axis is None else axis,
                       keepdim=keepdims and axis is not None)
    return y.reshape([1] * x.ndim) if keepdims and axis is None else y


def batch_norm(x: T, weight: T, bias: T, eps: float, mean: Any = None, variance: Any = None) -> T:
    """Channels come last here, second there."""
    running = [None if r is None else torch.as_tensor(r, dtype=x.dtype) for r in (mean, variance)]
    return F.batch_norm(x.reshape(-1, x.shape[-1]), *running, weight, bias, mean is None, eps=eps).reshape(x.shape)


def cross_entropy(x: T, target: T, weight: T | None = None, reduction: str = "none", label_smoothing: float = 0.0) -> T:
    loss = F.cross_entropy(x.reshape(-1, x.shape[-1]), target.reshape(-1), weight, reduction=reduction,
                           label_smoothing=label_smoothing)
    return loss.reshape(target.shape) if reduction == "none" else loss


def quantized_linear(x: T, weight: T, bias: T | None = None, *, scheme: str) -> T:
    """With the weights that the blocks stand for."""
    meant = blocks.decoded(blocks.encoded(weight.numpy(), scheme), scheme)
    return F.linear(x, torch.as_tensor(meant, dtype=x.dtype), bias)


def feed_forward(x: T, up: T, down: T, up_bias: T | None = None, down_bias: T | None = None, *,
                 activation: str = "gelu") -> T:
    f = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[activation]
    return F.linear(f(F.linear(x, up, up_bias)), down, down_bias)


def linear_cross_entropy(x: T, weight: T, target: T, bias: T | None = None, reduction: str = "none",
                         label_smoothing: float = 0.0) -> T:
    return cross_entropy(F.linear(x, weight, bias), target, None, reduction, label_smoothing)


def attention(query: T, key: T, value: T, mask: T | None = None, *, causal: bool = False, lengths: Any = None,
              scale: float | None = None, **unused: Any) -> T:
    """All ways of masking as one bias; a query that may look nowhere gives 0 here and NaN there."""
    t, s = query.shape[-2], key.shape[-2]
    bias = torch.zeros((), dtype=query.dtype)
    never = torch.tensor(-torch.inf, dtype=query.dtype)
    if mask is not None:
        bias = bias + (torch.where(mask, 0.0, never) if mask.dtype is torch.bool else mask)
    if causal:
        bias = bias + torch.where(torch.arange(s) > torch.arange(t)[:, None] + s - t, never, 0.0)
    if lengths is not None:
        bias = bias + torch.where(torch.arange(s) >= torch.as_tensor(lengths)[:, None, None, None], never, 0.0)
    if query.ndim == 4:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    bias = torch.broadcast_to(bias, (*query.shape[:-1], s))
    nowhere = torch.isneginf(bias).all(-1, keepdim=True)
    y = F.scaled_dot_product_attention(query, key, value, torch.where(nowhere, 0.0, bias), scale=scale)
    return torch.where(nowhere, 0.0, y)


def rope(x: T, cosine: T, sine: T, interleaved: bool) -> T:
    """As a product of complex numbers: (a + i b)(cos + i sin)."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = torch.complex(a, b) * torch.complex(cosine, sine)
    parts = turned.real, turned.imag
    return torch.stack(parts, -1).reshape(x.shape) if interleaved else torch.cat(parts, -1)


def tensordot(a: T, b: T, axes: Any) -> T:
    return torch.tensordot(a, b, axes)


def largest(f: Callable[..., T]) -> Callable[..., T]:
    """The first of what is sorted in descending order: topk itself takes any of equal ones."""
    return lambda x, count, axis: f(x, axis, True).narrow(axis, 0, count)


def sort(x: T, axis: int, descending: bool) -> T:
    return torch.sort(x, dim=axis, descending=descending, stable=True)[0]


def running(f: Callable[..., T], first: float) -> Callable[..., T]:
    def run(x: T, axis: int, include_initial: bool = False) -> T:
        y = f(x, axis)
        return torch.cat([torch.full_like(y.narrow(axis, 0, 1), first), y], axis) if include_initial else y
    return run


def first_places(inverse: T) -> T:
    """Where each number first occurs."""
    found = [int(torch.argmax((inverse == i).to(torch.int8))) for i in range(len(torch.unique(inverse)))]
    return torch.tensor(found, dtype=torch.int64)


def dtype_of(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


ELEMENTWISE: dict[str, Callable[..., T]] = {
    "abs": torch.abs, "add": torch.add, "bitwise_and": torch.bitwise_and,
    "bitwise_left_shift": torch.bitwise_left_shift, "bitwise_not": torch.bitwise_not, "bitwise_or": torch.bitwise_or,
    "bitwise_right_shift": torch.bitwise_right_shift, "bitwise_xor": torch.bitwise_xor, "ceil": torch.ceil,
    "clip": clip, "cos": torch.cos, "divide": torch.divide, "equal": torch.eq, "erf": torch.erf, "exp": torch.exp,
    "expm1": torch.expm1, "floor": torch.floor, "floor_divide": torch.floor_divide, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "greater": torch.gt, "greater_equal": torch.ge,
    "isfinite": torch.isfinite, "isinf": torch.isinf, "isnan": torch.isnan, "less": torch.lt, "less_equal": torch.le,
    "log": torch.log, "log1p": torch.log1p, "logical_and": torch.logical_and, "logical_not": torch.logical_not,
    "logical_or": torch.logical_or, "logical_xor": torch.logical_xor, "maximum": torch.maximum,
    "minimum": torch.minimum, "multiply": torch.multiply, "negative": torch.negative, "not_equal": torch.ne,
    "pow": torch.pow, "reciprocal": torch.reciprocal, "relu": F.relu, "remainder": torch.remainder,
    "round": torch.round, "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid, "sign": torch.sign, "silu": F.silu,
    "sin": torch.sin, "softplus": lambda x: F.softplus(x, threshold=700), "sqrt": torch.sqrt, "square": torch.square,
    "subtract": torch.subtract, "tanh": torch.tanh, "where": torch.where,
    **{name: getattr(torch, name) for name in (
        "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "copysign", "cosh", "hypot", "log10", "log2",
        "logaddexp", "signbit", "sinh", "tan", "trunc")},
    "positive": torch.clone,
}

MOVEMENT: dict[str, Callable[..., T]] = {
    "astype": lambda x, dtype: x.to(dtype_of(dtype)), "broadcast_to": lambda x, shape: torch.broadcast_to(x, shape),
    "broadcast_arrays": lambda xs: torch.stack(torch.broadcast_tensors(*xs)),
    "concat": lambda arrays, axis: torch.cat(arrays, axis), "expand_dims": lambda x, axis: torch.unsqueeze(x, axis),
    "flatten": torch.flatten, "flip": lambda x, axis: torch.flip(x, dims(x, axis)),
    "matrix_transpose": lambda x: x.mT,
    "meshgrid": lambda xs, indexing: torch.stack(torch.meshgrid(*xs, indexing=indexing)),
    "moveaxis": lambda x, source, destination: torch.moveaxis(x, source, destination), "pad": pad,
    "permute_dims": lambda x, axes: torch.permute(x, axes),
    "repeat": lambda x, repeats, axis: torch.repeat_interleave(x, torch.as_tensor(repeats), axis),
    "reshape": lambda x, shape: torch.reshape(x, shape), "roll": lambda x, shift, axis: torch.roll(x, shift, axis),
    "split": split, "squeeze": squeeze, "stack": lambda arrays, axis: torch.stack(arrays, axis),
    "swapaxes": lambda x, a, b: torch.swapaxes(x, a, b), "tile": lambda x, repetitions: torch.tile(x, repetitions),
    "tril": lambda x, k: torch.tril(x, k), "triu": lambda x, k: torch.triu(x, k),
    "unstack": lambda x, axis: torch.stack(torch.unbind(x, axis)),
}

REDUCTIONS: dict[str, Callable[..., T]] = {
    "all": truth_of(torch.all), "any": truth_of(torch.any), "argmax": index_of(torch.argmax),
    "argmin": index_of(torch.argmin), "cumulative_prod": running(torch.cumprod, 1.0),
    "cumulative_sum": running(torch.cumsum, 0.0), "diff": lambda x, axis, n: torch.diff(x, n, axis),
    "diff: between": lambda x, before, behind, axis: torch.diff(x, 1, axis, before, behind),
    "count_nonzero": lambda x, axis=None, keepdims=False: over(torch.sum)(x != 0, axis, keepdims).to(torch.int64),
    "logsumexp": over(torch.logsumexp), "max": over(torch.amax), "mean": over(torch.mean),
    "median": quantile, "min": over(torch.amin), "prod": over(prod), "quantile": quantile, "std": spread(torch.std),
    "sum": over(torch.sum), "var": spread(torch.var),
}

INDEXING: dict[str, Callable[..., T]] = {
    "argsort": argsort,
    "embedding": lambda weight, index: F.embedding(index, weight),
    "nonzero": lambda x: torch.stack(torch.nonzero(x, as_tuple=True)),
    "scatter_add": lambda x, value, index: torch.index_add(x, 0, torch.as_tensor(index), value),
    "searchsorted": lambda ordered, x, side: torch.searchsorted(ordered, x, side=side),
    "searchsorted: sorter": lambda values, x, sorter, side: torch.searchsorted(values, x, side=side, sorter=sorter),
    "sort": sort, "take": take,
    "take_along_axis": lambda x, index, axis: torch.take_along_dim(x, index, axis),
    "topk": largest(sort), "topk: indices": largest(argsort),
    "unique_values": torch.unique, "unique_counts": lambda x: torch.unique(x, return_counts=True)[1],
    "unique_inverse": lambda x: torch.unique(x, return_inverse=True)[1], "unique_inverse: put back": torch.clone,
    "unique_all": lambda x: first_places(torch.unique(x, return_inverse=True)[1].reshape(-1)),
    "unique_all: counts": lambda x: torch.unique(x, return_counts=True)[1],
    "isin": lambda x, values, invert: torch.isin(x, values, invert=invert),
}

FUSED: dict[str, Callable[..., T]] = {
    "batch_norm": batch_norm, "binary_cross_entropy": F.binary_cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "conv1d": F.conv1d, "cross_entropy": cross_entropy,
    "einsum": lambda operands, subscripts: torch.einsum(subscripts, *operands), "feed_forward": feed_forward,
    "huber_loss": F.huber_loss,
    "kl_div": F.kl_div, "layer_norm": lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
    "linear": F.linear, "linear: quantized": quantized_linear, "linear_cross_entropy": linear_cross_entropy,
    "log_softmax": lambda x, axis: F.log_softmax(x, axis), "matmul": torch.matmul,
    "mse_loss": F.mse_loss, "outer": torch.outer,
    "rms_norm": lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps), "rope": rope,
    "scaled_dot_product_attention": attention, "softmax": lambda x, axis: F.softmax(x, axis), "tensordot": tensordot,
    "vecdot": lambda a, b, axis: torch.linalg.vecdot(a, b, dim=axis),
}

TORCH: dict[str, Callable[..., Any]] = {**ELEMENTWISE, **MOVEMENT, **REDUCTIONS, **INDEXING, **FUSED}


def counterpart(row: str) -> Callable[..., Any]:
    """The row's own entry, or its op's."""
    return TORCH.get(row) or TORCH[row.split(":")[0]]


def as_torch(x: Any, dtype: str, requires_grad: bool = False) -> Any:
    """An operand: floats in this type, the rest as it is."""
    if isinstance(x, list):
        return [as_torch(part, dtype, requires_grad) for part in x]
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind == "f":
        return torch.tensor(x, dtype=dtype_of(dtype), requires_grad=requires_grad)
    return torch.tensor(x)
