"""Sets: the different elements of a tensor. The results' shapes depend on the data: computed on the host, no gradients.

As the array API standard has it, −0 equals 0, and a NaN equals nothing, so each is an element of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engine.ops.indexing import from_host
from engine.ops.registry import composite
from engine.tensor import Tensor


class UniqueAll(NamedTuple):
    """What unique_all gives."""

    values: Tensor
    indices: Tensor
    inverse_indices: Tensor
    counts: Tensor


class UniqueCounts(NamedTuple):
    """What unique_counts gives."""

    values: Tensor
    counts: Tensor


class UniqueInverse(NamedTuple):
    """What unique_inverse gives."""

    values: Tensor
    inverse_indices: Tensor


def _unique(x: np.ndarray) -> tuple[np.ndarray, ...]:
    return np.unique(x, return_index=True, return_inverse=True, return_counts=True, equal_nan=False)


@composite("... -> ...", reference=lambda x: np.unique(x, equal_nan=False))
def unique_values(x: Tensor) -> Tensor:
    """The different elements of x in ascending order."""
    return from_host(_unique(x.numpy())[0], x)


@composite("... -> ...")
def unique_counts(x: Tensor) -> Any:
    """(values, counts): the different elements in ascending order, and how often each is there (int64)."""
    values, _, _, counts = _unique(x.numpy())
    return UniqueCounts(from_host(values, x), from_host(counts, x))


@composite("... -> ...")
def unique_inverse(x: Tensor) -> Any:
    """(values, inverse_indices): the different elements in ascending order, and which of them each of x is."""
    values, _, inverse, _ = _unique(x.numpy())
    return UniqueInverse(from_host(values, x), from_host(inverse.reshape(x.shape), x))


@composite("... -> ...")
def unique_all(x: Tensor) -> Any:
    """(values, indices, inverse_indices, counts), indices being where in the flattened x each first occurs."""
    values, indices, inverse, counts = _unique(x.numpy())
    return UniqueAll(from_host(values, x), from_host(indices, x), from_host(inverse.reshape(x.shape), x),
                     from_host(counts, x))


@composite("..., ... -> ...", reference=np.isin)
def isin(x: Tensor, values: Tensor, invert: bool = False) -> Tensor:
    """Whether each element of x is (invert: is not) among `values`."""
    return from_host(np.isin(x.numpy(), values.numpy(), invert=invert), x)
