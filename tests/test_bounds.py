"""Units in the last place, and the bounds that tolerances are made of, against known numbers and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import fails

from engine.testing import (
    Rounded,
    assert_ulp,
    check_close,
    dot_bound,
    gamma,
    matmul_bound,
    sum_bound,
    ulp_distance,
    ulp_error,
)
from engine.testing import strategies as st_eg
from engine.testing.rounded import exp, matmul, total


def test_ulp_distance_counts_floats() -> None:
    one = np.float32(1)
    assert ulp_distance(one, np.nextafter(one, np.float32(2))) == 1
    assert ulp_distance(np.float32(-0.0), np.float32(0.0)) == 0
    tiny = np.float32(1.4e-45)
    assert ulp_distance(tiny, -tiny) == 2 and ulp_distance(np.float64(1), np.float64(2)) == 2**52
    assert ulp_distance(np.float32(np.nan), np.float32(np.nan)) == 0
    assert ulp_distance(np.float32(np.nan), one) == np.iinfo(np.int64).max
    assert ulp_distance(np.float32(np.inf), np.finfo(np.float32).max) == 1
    assert ulp_distance(np.float32(-np.inf), np.float32(np.inf)) == 2 * 0x7F800000
    with pytest.raises(TypeError):
        ulp_distance(one, np.float64(1))


@given(x=st_eg.floats("float32"), y=st_eg.floats("float32"))
def test_ulp_distance_is_a_metric_with_neighbours_one_apart(x: float, y: float) -> None:
    a, b = np.float32(x), np.float32(y)
    assert ulp_distance(a, b) == ulp_distance(b, a) and ulp_distance(a, a) == 0
    if np.isfinite(a):
        assert ulp_distance(a, np.nextafter(a, np.float32(np.inf))) == 1


def test_ulp_error_is_in_units_of_the_exact_result() -> None:
    assert ulp_error(np.float32(1), 1 + 2.0**-24) == 0.5
    assert ulp_error(np.float32(0), 2.0**-149) == 1.0, "subnormals are as far apart as the smallest ones"
    assert ulp_error(np.float32(np.inf), 1e39) == 0.0 and ulp_error(np.float32(np.inf), 1.0) == np.inf
    assert_ulp(np.float32([1, np.nan, np.inf]), [1, np.nan, np.inf], 0)
    failure = fails(lambda: assert_ulp(np.float32([1, 1]), [1, 1 + 2.0**-22], 1), "assert_ulp at (1,)", "2 ULP apart")
    assert failure.index == (1,) and failure.ulps == 2.0


def exact_sum(x: np.ndarray) -> Fraction:
    return sum((Fraction(float(v)) for v in x), Fraction(0))


@given(seed=st.integers(0, 2**16), n=st.integers(1, 200))
def test_bounds_hold_for_every_order(seed: int, n: int) -> None:
    """A float32 sum and dot product, one element at a time, against exact rational arithmetic."""
    rng = np.random.default_rng(seed)
    x, y = ((rng.uniform(-1, 1, n) * 10.0 ** rng.integers(-3, 4, n)).astype(np.float32) for _ in range(2))
    s = np.float32(0)
    for v in x:
        s = np.float32(s + v)
    assert abs(Fraction(float(s)) - exact_sum(x)) <= Fraction(float(sum_bound(x, "float32"))) * Fraction(1 + 2**-40)
    d = np.float32(0)
    for a, b in zip(x, y):
        d = np.float32(d + np.float32(a * b))
    exact = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, y)), Fraction(0))
    assert abs(Fraction(float(d)) - exact) <= Fraction(float(dot_bound(x, y, "float32"))) * Fraction(1 + 2**-40)


def test_gamma() -> None:
    assert gamma(1, 2.0**-24) == 2.0**-24 / (1 - 2.0**-24)
    with pytest.raises(ValueError):
        gamma(2**24, 2.0**-24)
    a, b = np.ones((2, 3)), np.ones((3, 4))
    assert matmul_bound(a, b, "float64").shape == (2, 4)
    tiny = np.full(4, 2.0**-76, np.float32)
    lost = 4 * 2.0**-152  # each product underflows to 0
    assert float(sum(tiny * tiny)) == 0 and lost <= dot_bound(tiny, tiny, "float32")


@given(seed=st.integers(0, 2**16))
def test_rounded_bounds_what_float32_does(seed: int) -> None:
    """A formula in float32 NumPy, against the same over Rounded: inside the bound, and the bound is not absurd."""
    rng = np.random.default_rng(seed)
    x, w = rng.uniform(-2, 2, (3, 7)).astype(np.float32), rng.uniform(-2, 2, (7, 4)).astype(np.float32)

    def f(a: Any, b: Any) -> Any:
        z = matmul(a, b)
        e = exp(z * 0.3 - 0.1)
        return e / total(e, -1, True) + z * z

    y = f(Rounded(x, dtype="float32"), Rounded(w, dtype="float32"))
    got = f(x, w)
    assert got.dtype == np.float32
    check_close(got, y.value, y.tolerance)
    assert np.all(y.tolerance <= 1e-4 * (1 + np.abs(y.value)))
