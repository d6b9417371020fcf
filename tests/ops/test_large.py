"""Values of examples that are larger than one block, tile or piece of a kernel.

The drawn examples of test_forward.py and test_gradients.py are small, and test_bits.py compares large ones only with
themselves. Here large ones meet their references.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from table import rows

import engine as eg
from engine.testing import OpSpec, Seeded, specs, sum_bound
from engine.testing.opspec import Case
from engine.testing.row_checks import forward, kernel_vjp

LONG = 3 * 65536 + 5  # three pieces of a reduction (kernels/reduce.c) and a tail


def large_case(spec: OpSpec) -> Case:
    return spec.example(Seeded(11, "float32"), spec.large)


@rows(lambda spec: spec.large)
def test_large(spec: OpSpec) -> None:
    forward(spec, large_case(spec))


@rows(lambda spec: spec.large and spec.gradient)
def test_large_gradients(spec: OpSpec) -> None:
    kernel_vjp(spec, large_case(spec), seed=5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["sum", "prod", "max", "min", "argmax", "argmin", "logsumexp", "cumulative_sum"])
def test_long_axes(name: str, axis: int) -> None:
    """Along an axis of several pieces, as rows (its elements side by side) and as columns."""
    rng = np.random.default_rng(3)
    shape = (2, LONG) if axis else (LONG, 3)
    x = np.exp(rng.uniform(-1e-3, 1e-3, shape)) if name == "prod" else rng.uniform(-4, 4, shape)
    case = Case([x.astype("float32")], {"axis": axis}, np.dtype("float32"))
    forward(specs[name], case)


def test_every_piece_counts() -> None:
    """Exact: sums of whole numbers, with a mark in each piece and in the tail that no rounding bound could hide."""
    for axis in (0, 1):
        x = np.zeros((2, LONG) if axis else (LONG, 3), "float32")
        x[(slice(None), slice(7, None, 16384)) if axis else slice(7, None, 16384)] = 1
        x[(slice(None), -1) if axis else -1] = 1
        assert np.array_equal(eg.tensor(x).sum(axis=axis).numpy(), x.sum(axis))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 15, 17, 127, 128, 129, 143, 144, 1000])
def test_columns_of_any_length(rows: int) -> None:
    """Exact: whole numbers, all negative, so that nothing that was not there (a 0, say) could be the largest."""
    for columns in (2, 17, 64, 255, 257, 390):
        x = -np.random.default_rng(rows).integers(1, 5, (2, rows, columns)).astype("float32")
        for name in ("sum", "max", "min"):
            assert np.array_equal(getattr(eg, name)(eg.tensor(x), axis=1).numpy(), getattr(x, name)(1)), columns


def test_the_norm_of_a_gradient_counts_every_element() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 2 * 4096 + 13).astype("float32")
    p = eg.tensor(x, requires_grad=True)
    p.grad = eg.tensor(x)
    square = np.square(x.astype("float64"))
    found = eg.optim.clip_grad_norm_([p], 1e9) ** 2
    assert abs(found - square.sum()) <= sum_bound(square, "float64") + 1e-14 * found


@pytest.mark.parametrize("name", ["max", "min"])
def test_ties_share_the_gradient(name: str) -> None:
    x = eg.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], requires_grad=True)
    y: Any = getattr(x if name == "max" else -x, name)(axis=1)
    grad = eg.grad(y.sum(), x)
    sign = 1 if name == "max" else -1
    assert np.allclose(sign * grad.numpy(), [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6, atol=0)


def test_running_statistics() -> None:
    """batch_norm's running mean and variance move by `momentum` towards those of the batch (n − 1 in the variance)."""
    x = np.random.default_rng(1).uniform(-1, 1, (10, 3)).astype("float32")
    mean, var = eg.full((3,), 2.0), eg.full((3,), 5.0)
    eg.batch_norm(eg.tensor(x), eg.ones(3), eg.zeros(3), mean, var, momentum=0.1)
    wide = x.astype("float64")
    assert np.allclose(mean.numpy(), 0.9 * 2 + 0.1 * wide.mean(0), rtol=1e-6, atol=0)
    assert np.allclose(var.numpy(), 0.9 * 5 + 0.1 * wide.var(0, ddof=1), rtol=1e-6, atol=0)
