"""How far apart two floating-point results may be: ULPs, and bounds derived from the operations that made them.

u is the unit roundoff, half the spacing of floats at 1: 2⁻²⁴ (float32), 2⁻⁵³ (float64). The standard model says
fl(a ∘ b) = (a ∘ b)(1 + δ) + η, |δ| ≤ u, with η at most half the smallest subnormal and 0 for + and −. A chain of k
roundings gives Π(1 + δᵢ) = 1 + θ with |θ| ≤ γ_k = k u / (1 − k u).

Higham 2002, "Accuracy and Stability of Numerical Algorithms", 2nd ed., sections 2.2, 3.1 and 3.5.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.dtypes import as_dtype


def unit_roundoff(dtype: Any) -> float:
    """u: half the distance from 1 to the next float."""
    return float(np.finfo(as_dtype(dtype).numpy).eps) / 2


def smallest_subnormal(dtype: Any) -> float:
    """The distance between neighbours near 0: what one rounding may lose to underflow, and more."""
    return float(np.finfo(as_dtype(dtype).numpy).smallest_subnormal)


def gamma(k: float, u: float) -> float:
    """γ_k = k u / (1 − k u): a bound on what k roundings in a row do, relatively. Higham lemma 3.1; needs k u < 1."""
    if not 0 <= k * u < 1:
        raise ValueError(f"gamma: k u is {k * u}, expected a number in [0, 1)")
    return k * u / (1 - k * u)


def sum_bound(x: np.ndarray, dtype: Any, axis: Any = None) -> np.ndarray:
    """|fl(Σx) − Σx| ≤ γ_(n−1) Σ|x| for any order of the n − 1 additions (Higham 4.4); sums do not underflow."""
    size = np.abs(np.asarray(x, np.float64))
    total = size.sum(axis=axis)
    n = size.size // max(total.size, 1)
    return gamma(max(n - 1, 0), unit_roundoff(dtype)) * total


def dot_bound(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """|fl(aᵀb) − aᵀb| ≤ γ_n |a|ᵀ|b| + n η, any order, with or without fused multiply-add (Higham 3.5)."""
    return matmul_bound(np.asarray(a)[None, :], np.asarray(b)[:, None], dtype)[0, 0]


def matmul_bound(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """|fl(AB) − AB| ≤ γ_k |A||B| + k η elementwise, k the inner length, η the smallest subnormal (Higham 3.13).

    Each element passes through at most one rounding of its product and k − 1 of sums, in any order.
    """
    k = a.shape[-1]
    size = np.matmul(np.abs(np.asarray(a, np.float64)), np.abs(np.asarray(b, np.float64)))
    return gamma(k, unit_roundoff(dtype)) * size + k * smallest_subnormal(dtype)


# ── ULPs ──────────────────────────────────────────────────────────────────────────────────────────────

def spacing(x: Any, dtype: Any) -> np.ndarray:
    """The distance between floats of `dtype` at |x| (x in float64): the unit in the last place of the binade of x."""
    kind = np.finfo(as_dtype(dtype).numpy)
    exponent = np.frexp(np.abs(np.asarray(x, np.float64)))[1]  # |x| in [2^(e−1), 2^e)
    return np.ldexp(1.0, np.maximum(exponent - 1, kind.minexp) - kind.nmant)


def ulp_error(got: Any, want: Any, dtype: Any = None) -> np.ndarray:
    """|got − want| in units in the last place of want, which may be more exact than got's type.

    Two NaNs, or two equal infinities, are 0 apart; anything else with one of them is infinitely far.
    """
    got = np.asarray(got)
    dtype = dtype or got.dtype
    a, b = got.astype(np.float64), np.asarray(want, np.float64)
    with np.errstate(all="ignore"):
        error = np.abs(a - b) / spacing(np.where(np.isfinite(b), b, 1.0), dtype)
        past = np.isinf(a) & (np.abs(b) >= np.finfo(as_dtype(dtype).numpy).max)  # it rounds to infinity
    same = (np.isnan(a) & np.isnan(b)) | (a == b) | (past & (np.sign(a) == np.sign(b)))
    return np.where(same, 0.0, np.where(np.isfinite(a) & np.isfinite(b), error, np.inf))


def ulp_distance(a: Any, b: Any) -> np.ndarray:
    """How many floats lie between a and b, of one floating type: 0 if equal (−0 = +0), 1 for neighbours.

    Two NaNs are 0 apart, a NaN and a number the largest int64. Measured on the line of all floats in order, which the
    integers behind the bits count, mirrored for negative numbers.
    """
    x, y = np.asarray(a), np.asarray(b)
    if x.dtype != y.dtype or x.dtype.kind != "f":
        raise TypeError(f"ulp_distance: got {x.dtype} and {y.dtype}, expected one floating type")
    bits = np.dtype(f"i{x.dtype.itemsize}")

    def place(v: np.ndarray) -> np.ndarray:
        i = np.atleast_1d(np.ascontiguousarray(v)).view(bits).reshape(v.shape)
        return np.where(i < 0, np.iinfo(bits).min - i, i).astype(np.int64)

    p, q = place(x), place(y)
    with np.errstate(over="ignore"):  # it wraps to the right number
        unsigned = np.maximum(p, q).astype(np.uint64) - np.minimum(p, q).astype(np.uint64)
    distance = np.minimum(unsigned, np.uint64(np.iinfo(np.int64).max)).astype(np.int64)
    nan_x, nan_y = np.isnan(x), np.isnan(y)
    distance = np.where(nan_x ^ nan_y, np.iinfo(np.int64).max, np.where(nan_x & nan_y, 0, distance))
    return distance if x.shape or y.shape else np.int64(distance)


def assert_ulp(got: Any, want: Any, limit: float, dtype: Any = None, origin: str = "the stated accuracy") -> None:
    """Raise CheckFailure unless got is within `limit` ULPs of want everywhere (see ulp_error)."""
    from engine.testing.failure import CheckFailure, called

    got = np.asarray(got)
    error = ulp_error(got, want, dtype)
    if error.size and not bool((error <= limit).all()):
        at = np.unravel_index(int(np.argmax(error)), error.shape)
        expected = np.broadcast_to(np.asarray(want, np.float64), error.shape)
        raise CheckFailure("assert_ulp", index=at, got=got[at], want=expected[at], ulps=float(error[at]),
                           bound=f"{limit} ULP", origin=origin,
                           reproduction=called("assert_ulp", got[at], expected[at], limit,
                                               dtype=dtype and as_dtype(dtype).name))
