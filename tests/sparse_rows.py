"""What the tests of row-sparse gradients and of row-sparse updates share: a table, gradients of some of its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import engine as eg
from engine.backend import get_backend

# The tests of what backward gives; those of a RowSparse that is made by hand run on every backend.
sparse_gradients = pytest.mark.skipif(
    not get_backend("cpu").has_fused("embedding"),
    reason="without its kernel an embedding is x[index], whose gradient is dense (FusedOp runs the composition)")

HEIGHT, WIDTH = 13, 5
indices = st.lists(st.integers(0, HEIGHT - 1), max_size=8)


def bits(x: Any) -> bytes:
    return np.ascontiguousarray(np.asarray(x)).tobytes()


def table(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> eg.Tensor:
    with eg.seed(seed):
        return eg.randn(height, width, requires_grad=True)


def rows_of(rows: Any, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> eg.RowSparse:
    with eg.seed(seed):
        return eg.RowSparse(rows, eg.randn(len(rows), width), height)


def weighted(y: eg.Tensor) -> eg.Tensor:
    """Σ c y with c of both signs and many magnitudes: so an order of additions shows."""
    with eg.seed(99):
        return (y * eg.randn(*y.shape) * eg.exp(3 * eg.randn(*y.shape))).sum()
