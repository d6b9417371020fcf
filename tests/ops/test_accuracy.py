"""The stated accuracy of every unary float32 kernel, over 17.1 million floats each: every 251st bit pattern.

251 is prime to the powers of two, so that all mantissas and exponents take their turn. `make exhaustive` takes all 2³².
"""

from __future__ import annotations

import pytest

from engine.backend import get_backend
from engine.backend.cpu import CpuBackend
from tools.accuracy import FUNCTIONS
from tools.exhaustive import BOUNDS, sweep

STRIDE = 251


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_251st_float(name: str) -> None:
    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        pytest.skip("no compiled kernels: NumPy's functions have no stated accuracy here")
    error, argument = sweep(name, {backend.level: backend}, 0, 2**32, STRIDE)[backend.level]
    assert 0 < error <= BOUNDS[name], f"{name}: {error} units at {argument!r}"
