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
from engine.ops.registry import registry
from engine.testing.rounded import function_ulps
from tools.accuracy import FUNCTIONS, POWERS, ROWS, worst
from tools.exhaustive import BOUNDS, sweep

STRIDE, STRIDE_OF_POWERS = 251, 1009


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_251st_float(name: str) -> None:
    backend = get_backend("cpu")
    compiled = isinstance(backend, CpuBackend)
    if not compiled and registry[name].fused:  # (1 + erf)/2 cancels: a GELU has no digit left in its tail
        pytest.skip("no compiled kernels: the composition runs, whose accuracy is not stated")
    error, argument = sweep(name, {"": backend}, 0, 2**32, STRIDE)[""]
    allowed = BOUNDS[name] if compiled else function_ulps(name, "float32")
    assert 0 < error <= allowed, f"{name}: {error} units at {argument!r}"


@pytest.mark.parametrize("name", POWERS)
def test_every_1009th_float_with_a_base_or_an_exponent(name: str) -> None:
    error, argument = worst(name, ROWS[name].ours, STRIDE_OF_POWERS)
    assert 0 < error <= function_ulps("pow", "float32"), f"{name}: {error} units at {argument!r}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["expm1", "log1p", "sin", "tanh", "sqrt", "erf", "silu", "gelu", "gelu_tanh"])
def test_the_sign_of_zero(name: str, device: str, dtype: str) -> None:
    """f(±0) = ±0 in every lane of a vector, where f crosses zero there."""
    x = np.where(np.arange(67) % 3 == 0, -0.0, 0.0).astype(dtype)
    y = getattr(eg, name)(eg.tensor(x, device=device)).numpy()
    assert (y == 0).all() and np.array_equal(np.signbit(y), np.signbit(x))
