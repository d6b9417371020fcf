"""The stated accuracy of every unary float32 kernel, over 17.1 million floats each: every 251st bit pattern; of pow,
over 30 million pairs; and the sign of zero.

251 is prime to the powers of two, so that all mantissas and exponents take their turn. `make exhaustive` takes all 2³².
"""

from __future__ import annotations

import numpy as np
import pytest

import engine as eg
from engine.backend import get_backend
from engine.backend.cpu import CpuBackend
from tools.accuracy import FUNCTIONS, POWERS, ROWS, worst
from tools.exhaustive import BOUNDS, sweep

STRIDE, STRIDE_OF_POWERS = 251, 1009


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_251st_float(name: str) -> None:
    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        pytest.skip("no compiled kernels: NumPy's functions have no stated accuracy here")
    error, argument = sweep(name, {backend.level: backend}, 0, 2**32, STRIDE)[backend.level]
    assert 0 < error <= BOUNDS[name], f"{name}: {error} units at {argument!r}"


@pytest.mark.parametrize("name", POWERS)
def test_every_1009th_float_with_a_base_or_an_exponent(name: str) -> None:
    if not isinstance(get_backend("cpu"), CpuBackend):
        pytest.skip("no compiled kernels: NumPy's functions have no stated accuracy here")
    error, argument = worst(name, ROWS[name].ours, STRIDE_OF_POWERS)
    assert 0 < error <= BOUNDS["pow"], f"{name}: {error} units at {argument!r}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["expm1", "log1p", "sin", "tanh", "sqrt", "erf", "silu", "gelu", "gelu_tanh"])
def test_the_sign_of_zero(name: str, device: str, dtype: str) -> None:
    """f(±0) = ±0 in every lane of a vector, where f crosses zero there."""
    x = np.where(np.arange(67) % 3 == 0, -0.0, 0.0).astype(dtype)
    y = getattr(eg, name)(eg.tensor(x, device=device)).numpy()
    assert (y == 0).all() and np.array_equal(np.signbit(y), np.signbit(x))
