"""Clipping of gradients, by their global norm or by value.

The norm of all gradients is summed block by block: each parameter is cut into blocks of 4096 elements, the last of
which may be short, Σg² of every block is taken in double precision, and the sums of all blocks, in the order of the
parameters, are added in an order that depends on their number alone. A shard of a parameter server owns whole blocks
(sharder/partition.py), so the norm has the same bits for every number of shards, and here.

Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", arXiv:1211.5063, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from engine.backend import Array, Backend, get_backend
from engine.dtypes import float64
from engine.rowsparse import Gradient, RowSparse, put_rows
from engine.tensor import Tensor

BLOCK = 4096  # elements


def sums_of_squares(k: Backend, gradient: Array | RowSparse, divisor: float = 1.0) -> Array:
    """Σ(g/divisor)² of each block of a contiguous gradient, float64. A row-sparse one has the sums of the dense one."""
    if isinstance(gradient, RowSparse):
        return _sparse_sums(k, gradient, divisor)
    blocks = k.empty((-(-gradient.size // BLOCK),), float64)
    k.sum_squares(blocks, gradient, gradient.size, divisor)
    return blocks


def _sparse_sums(k: Backend, gradient: RowSparse, divisor: float) -> Array:
    """The blocks that hold touched rows are laid end to end and summed as they are; all others sum to 0.

    A row begins and ends in blocks that are touched, as are all between: so it lies in one piece there too.
    """
    n = math.prod(gradient.shape[1:])
    sums = k.zeros((-(-gradient.shape[0] * n // BLOCK),), float64)
    if not len(gradient.rows) * n:
        return sums
    starts = gradient.rows * n
    reach = np.arange((n - 1) // BLOCK + 2)  # a row of n elements lies in so many blocks at most
    touched = np.unique(np.minimum(starts[:, None] // BLOCK + reach, (starts[:, None] + n - 1) // BLOCK))
    laid = k.zeros((BLOCK * len(touched),), gradient.dtype)  # of a short last block, the zeros behind it add nothing
    places = BLOCK * np.searchsorted(touched, starts // BLOCK) + starts % BLOCK
    k.scatter_runs(laid, k.contiguous(gradient.values.array).reshaped((len(starts), n)), k.array(places))
    found = k.empty((len(touched),), float64)
    k.sum_squares(found, laid, laid.size, divisor)
    put_rows(k, sums, touched, found)
    return sums


def norm_of_blocks(k: Backend, squares: np.ndarray) -> float:
    """√Σ over the Σg² of all blocks, in the order of the parameters."""
    total = k.empty((), float64)
    k.sum(total, k.from_numpy(squares), 1, squares.size, 1)
    return math.sqrt(k.to_numpy(total)[()])


def clip_scale(norm: float, max_norm: float) -> float:
    """What clips a gradient of this norm to max_norm: max_norm / (norm + 10⁻⁶), at most 1. NaN for a norm of NaN."""
    scale = max_norm / (norm + 1e-6)
    return 1.0 if scale >= 1 else scale


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale the gradients of all parameters together so that their global norm √Σg² is at most max_norm.

    Returns the norm before clipping. A norm that is not finite leaves gradients that are not finite, to be seen.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: max_norm is {max_norm!r}, expected a positive number")
    found = with_gradients(parameters)
    norm = norm_of_gradients([g for _, g in found])
    scale = clip_scale(norm, max_norm)
    if scale != 1.0:
        for p, g in found:
            p.grad = scaled(g, scale)
    return norm


def norm_of_gradients(gradients: Sequence[Gradient]) -> float:
    """√Σg² over all of them; 0 of none."""
    if not gradients:
        return 0.0
    k = get_backend(gradients[0].device)
    flat = [g if isinstance(g, RowSparse) else k.contiguous(g.array) for g in gradients]
    return norm_of_blocks(k, np.concatenate([k.to_numpy(sums_of_squares(k, g)) for g in flat]))


def scaled(gradient: Gradient, scale: float) -> Gradient:
    """scale · gradient."""
    k = get_backend(gradient.device)
    return _mapped(gradient, lambda values: k.map("multiply", values, k.constant(scale, values.dtype)))


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Bring every element of the gradients into [−clip_value, clip_value]; NaN stays NaN."""
    if not clip_value >= 0:
        raise ValueError(f"clip_grad_value_: clip_value is {clip_value!r}, expected a number of at least 0")
    for p, g in with_gradients(parameters):
        p.grad = _mapped(g, partial(_clipped, get_backend(g.device), float(clip_value)))


def _clipped(k: Backend, limit: float, g: Array) -> Array:
    low, high = k.constant(-limit, g.dtype), k.constant(limit, g.dtype)
    return k.map("minimum", k.map("maximum", g, low), high)


def _mapped(gradient: Gradient, function: Callable[[Array], Array]) -> Gradient:
    """function(gradient), for a function of each element that takes 0 to 0."""
    if isinstance(gradient, RowSparse):
        return gradient.map(function)
    return Tensor(function(gradient.array), gradient.device)


def with_gradients(parameters: Tensor | Iterable[Tensor]) -> list[tuple[Tensor, Gradient]]:
    """The parameters that have a gradient, each with it."""
    several = (parameters,) if isinstance(parameters, Tensor) else parameters
    return [(p, p.grad) for p in several if p.grad is not None]
