"""Directional derivatives of a function by central differences, each with an estimate of its own error.

    D₄ = [8 (f₁ − f₋₁) − (f₂ − f₋₂)] / 12h                    error h⁴ f⁽⁵⁾/30
    D₆ = [45 (f₁ − f₋₁) − 9 (f₂ − f₋₂) + (f₃ − f₋₃)] / 60h    error h⁶ f⁽⁷⁾/140,   fᵢ = f(x + i h v)

|D₆ − D₄| is D₄'s error but for terms smaller by h², so it bounds that of D₆, which is what is returned. Beside
truncation there is rounding: an error ε in each f(x) is amplified by Σ|weights|/h = 11/6h. The displaced values differ
from f(x) by i h J v; where f loses k roundings, they lose k u i h |J v| more or less than f(x) did, which the weights
make into 2.2 k u |J v| (Σ i |weight of i| = 2.2). The stencil itself costs two roundings a term, and those of its
partial sums, whose weights are 8, 37, 8, 1 and 0 sixtieths: 2.5 of its largest value by the same 11/6h, taken as 4.

Where f is analytic and its NumPy takes complex numbers, Im f(x + i h v) / h has truncation h² f‴/6, which is nothing
for h = 2⁻¹⁰⁰, and no difference to amplify rounding: what remains is that of a derivative computed forwards.

OWN = 64 u is what is allowed for either: an assumption, that k is at most 29, and that a derivative computed forwards
passes through at most eight functions of 4 ULPs (8 u) each, without cancelling. A formula beyond that gives a false
alarm, not a miss: of a J v that is wrong, 64 u hide no more than 7·10⁻¹⁵ of its size.

Squire, Trapp 1998, "Using complex variables to estimate derivatives of real functions".
Fornberg 1988, "Generation of finite difference formulas on arbitrarily spaced grids", table 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

FOURTH = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}
SIXTH = {-3: -1 / 60, -2: 9 / 60, -1: -45 / 60, 1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
AMPLIFICATION = sum(abs(w) for w in SIXTH.values())
OWN = 64 * 2.0**-53
STENCIL = 4 * 2.0**-53
STEP = 2.0**-9
REACH = 3 * STEP  # how far from x the function is evaluated, in units of v

Function = Callable[..., np.ndarray]


def _moved(xs: Sequence[np.ndarray], *directions: tuple[Sequence[np.ndarray], float]) -> list[np.ndarray]:
    moved = [np.asarray(x, np.float64) for x in xs]
    for vs, distance in directions:
        moved = [np.asarray(x + distance * v) for x, v in zip(moved, vs)]
    return moved


def _weighted(values: dict[int, np.ndarray], weights: dict[int, float], h: float) -> np.ndarray:
    terms = [weights[i] / h * values[i] for i in weights]
    return np.sum(terms, axis=0)


def directional(f: Function, xs: Sequence[np.ndarray], vs: Sequence[np.ndarray], rounding: np.ndarray | float,
                h: float = STEP) -> tuple[np.ndarray, np.ndarray]:
    """(J v, its error bound), J the Jacobian of f at xs; `rounding` bounds the error of one evaluation of f."""
    values = {i: np.asarray(f(*_moved(xs, (vs, i * h)))) for i in SIXTH}
    best = _weighted(values, SIXTH, h)
    noise = rounding + STENCIL * np.max(np.abs([*values.values()]), axis=0)
    return best, np.abs(best - _weighted(values, FOURTH, h)) + AMPLIFICATION / h * noise + OWN * np.abs(best)


def complex_step(f: Function, xs: Sequence[np.ndarray], vs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(J v, its error bound) by a step along the imaginary axis; f must be analytic at xs. The bound is 64 roundings of
    the largest element: those of a formula of a few operations that does not cancel."""
    h = 2.0**-100
    moved = np.asarray(f(*[np.asarray(x, np.float64) + 1j * h * v for x, v in zip(xs, vs)]))
    if moved.dtype.kind != "c":
        raise TypeError(f"complex_step: f gave {moved.dtype} for complex arguments, expected complex numbers")
    jv = moved.imag / h
    return jv, OWN * (np.abs(jv) + np.max(np.abs(jv), initial=0.0))


def second_directional(f: Function, xs: Sequence[np.ndarray], vs: Sequence[np.ndarray], ws: Sequence[np.ndarray],
                       rounding: np.ndarray | float, h: float = 2.0**-8) -> tuple[np.ndarray, np.ndarray]:
    """(∂ₜ∂ₛ f(x + t v + s w) at 0, its error bound): the same stencils, one in each direction."""
    values = {i: {j: np.asarray(f(*_moved(xs, (vs, i * h), (ws, j * h)))) for j in SIXTH} for i in SIXTH}
    best = _weighted({i: _weighted(row, SIXTH, h) for i, row in values.items()}, SIXTH, h)
    less = _weighted({i: _weighted(row, FOURTH, h) for i, row in values.items()}, FOURTH, h)
    noise = rounding + STENCIL * np.max(np.abs([y for row in values.values() for y in row.values()]), axis=0)
    return best, np.abs(best - less) + (AMPLIFICATION / h) ** 2 * noise + OWN * np.abs(best)
