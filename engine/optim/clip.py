"""Clipping of gradients, by their global norm or by value.

The norm of all gradients is summed block by block: each parameter is cut into blocks of 4096 elements, the last of
which may be short, Σg² of every block is taken in double precision, and the sums of all blocks, in the order of the
parameters, are added in an order that depends on their number alone. A shard of a parameter server owns whole blocks
(sharder/partition.py), so the norm has the same bits for every number of shards, and here.

Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", arXiv:1211.5063, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from engine.backend import Array, Backend, get_backend
from engine.dtypes import float64
from engine.tensor import Tensor

BLOCK = 4096  # elements


def sums_of_squares(k: Backend, gradient: Array) -> Array:
    """Σg² of each block of a dense gradient, float64."""
    blocks = k.empty((-(-gradient.size // BLOCK),), float64)
    k.sum_squares(blocks, gradient, gradient.size)
    return blocks


def norm_of_blocks(k: Backend, squares: np.ndarray) -> float:
    """√Σ over the Σg² of all blocks, in the order of the parameters."""
    total = k.empty((), float64)
    k.sum(total, k.from_numpy(squares), 1, squares.size, 1)
    return math.sqrt(total.data[()])


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
    found = _with_gradients(parameters)
    if not found:
        return 0.0
    k = get_backend(found[0].device)
    gradients = [k.contiguous(p.grad.array) for p in found]  # type: ignore[union-attr]
    norm = norm_of_blocks(k, np.concatenate([k.to_numpy(sums_of_squares(k, g)) for g in gradients]))
    scale = clip_scale(norm, max_norm)
    if scale != 1.0:
        for p, g in zip(found, gradients):
            p.grad = Tensor(k.map("multiply", g, k.constant(scale, g.dtype)), p.device)
    return norm


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Bring every element of the gradients into [−clip_value, clip_value]; NaN stays NaN."""
    if not clip_value >= 0:
        raise ValueError(f"clip_grad_value_: clip_value is {clip_value!r}, expected a number of at least 0")
    for p in _with_gradients(parameters):
        k, g = get_backend(p.device), p.grad.array  # type: ignore[union-attr]
        low, high = k.constant(-float(clip_value), g.dtype), k.constant(float(clip_value), g.dtype)
        p.grad = Tensor(k.map("minimum", k.map("maximum", g, low), high), p.device)


def _with_gradients(parameters: Any) -> list[Tensor]:
    several = (parameters,) if isinstance(parameters, Tensor) else parameters
    return [p for p in several if p.grad is not None]
