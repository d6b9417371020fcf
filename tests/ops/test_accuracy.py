"""The stated accuracy of every unary float32 kernel, over 17.1 million floats each: every 251st bit pattern; of pow,
over 30 million pairs; and the sign of zero.

251 is prime to the powers of two, so that all mantissas and exponents take their turn. `make exhaustive` takes all 2³².
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import engine as eg
from engine.backend import get_backend
from engine.backend.cpu import CpuBackend
from engine.ops.registry import registry
from engine.testing import formulas
from engine.testing.rounded import Rounded, erf, function_ulps
from tools.accuracy import FUNCTIONS, POWERS, ROWS, worst
from tools.exhaustive import BOUNDS, sweep

STRIDE, STRIDE_OF_POWERS = 251, 1009


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_251st_float(name: str) -> None:
    backend = get_backend("cpu")
    compiled = isinstance(backend, CpuBackend)
    if not compiled and registry[name].fused:
        return within_the_bound_of_its_formula(name)
    error, argument = sweep(name, {"": backend}, 0, 2**32, STRIDE)[""]
    allowed = BOUNDS[name] if compiled else function_ulps(name, "float32")
    assert 0 < error <= allowed, f"{name}: {error} units at {argument!r}"


# The compositions that run without compiled kernels. No count of units holds for them: in 1 + erf(x/√2) an erf of
# −1 + 10⁻⁸ is −1, so below −5.6 a GELU has no digit left; and σ(2z) has |2z| times the relative error of z.
COMPOSITIONS = {"silu": formulas.silu, "gelu_tanh": formulas.gelu_tanh,
                "gelu": lambda x: x * ((erf(x * math.sqrt(0.5)) + 1.0) * 0.5)}


def within_the_bound_of_its_formula(name: str) -> None:
    """Running error analysis says what is left: |x| (4 + …) 2⁻²⁴ of a GELU, and so on."""
    for start in range(0, 2**32, STRIDE << 20):
        patterns = np.arange(start, min(start + (STRIDE << 20), 2**32), STRIDE, dtype=np.uint64)
        x = patterns.astype(np.uint32).view(np.float32)
        x = x[np.isfinite(x)]
        with np.errstate(all="ignore"):
            want = COMPOSITIONS[name](Rounded(x, dtype="float32"))
        got = getattr(eg, name)(eg.from_numpy(x)).numpy()
        wrong = ~(np.abs(got - want.value) <= want.tolerance)
        assert not wrong.any(), f"{name}: {got[wrong][0]!r} at {x[wrong][0]!r}, expected {want.value[wrong][0]!r}"


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
