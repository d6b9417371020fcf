"""Largest error of the float32 functions, in units in the last place, over evenly spread bit patterns of all floats.

    python tools/accuracy.py                     every 1009th of the 2³² floats, some minutes
    python tools/accuracy.py --stride 251 exp log

The reference is NumPy's (for erf and the GELUs the C library's) float64, whose own error is below 2⁻²⁸ float32 units.
A unit is the distance between neighbouring floats at the exact result: 2⁻¹⁴⁹ among the subnormals. NumPy's float32
functions are measured beside ours, and PyTorch's if it is installed. Of pow, which has two arguments, one is held.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import engine as eg
from engine.backend import get_backend
from tools.training.errors import run_program

Function = Callable[[np.ndarray], np.ndarray]
CHUNK = 1 << 20
TAIL = {"silu": 1e-36, "gelu": 1e-36, "gelu_tanh": 1e-36}  # below, x > −104 multiplies a subnormal probability,
FLOOR = 1.5e-43  # which is off by up to 2⁻¹⁴⁹: 104 · 2⁻¹⁴⁹ = 1.46 · 10⁻⁴³
SERIES, SATURATED = 2.0**-9, 28.0  # where the series is exact to float64; where erfc is 0 and erf 1


# ── the references ────────────────────────────────────────────────────────────────────────────────────

def _erf_series(x: np.ndarray) -> np.ndarray:
    """2/√π x (1 − x²/3 + x⁴/10): below 2⁻⁹ the first term left out, x⁷/42, is less than 2⁻⁵⁹ x."""
    square = x * x
    return 2 / math.sqrt(math.pi) * x * (1 - square * (1 / 3 - square / 10))


def _by_library(function: Callable[[float], float]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of the C library in place of `y` where neither the series nor the limits hold: it is slow."""
    vectorized = np.vectorize(function, otypes=[float])

    def fill(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        between = (np.abs(x) >= SERIES) & (np.abs(x) < SATURATED)
        y[between] = vectorized(x[between])
        return np.where(np.isnan(x), x, y)
    return fill


_fill_erf, _fill_erfc = _by_library(math.erf), _by_library(math.erfc)


def _erf(x: np.ndarray) -> np.ndarray:
    return _fill_erf(x, np.where(np.abs(x) < SERIES, _erf_series(x), np.sign(x)))


def _erfc(x: np.ndarray) -> np.ndarray:
    return _fill_erfc(x, np.where(np.abs(x) < SERIES, 1 - _erf_series(x), np.where(x > 0, 0.0, 2.0)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


class Row(NamedTuple):
    """A function of one float: its float64 reference, the engine's, NumPy's, and PyTorch's, given the module."""

    reference: Function
    ours: Function
    numpy: Function | None
    torch: Callable[[Any, Any], Any]


def _row(name: str, reference: Function, numpy: Function | None = None,
         torch: Callable[[Any, Any], Any] | None = None) -> Row:
    return Row(reference, lambda x: getattr(eg, name)(eg.tensor(x)).numpy(), numpy,
               torch or (lambda torch, x: getattr(torch, name)(x)))


FUNCTIONS: dict[str, Row] = {
    **{name: _row(name, getattr(np, name), getattr(np, name))
       for name in ("exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "sqrt")},
    "sigmoid": _row("sigmoid", _sigmoid), "rsqrt": _row("rsqrt", lambda x: 1 / np.sqrt(x)), "erf": _row("erf", _erf),
    "softplus": _row("softplus", lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
                     torch=lambda torch, x: torch.nn.functional.softplus(x)),
    "silu": _row("silu", lambda x: x * _sigmoid(x), torch=lambda torch, x: torch.nn.functional.silu(x)),
    "gelu": _row("gelu", lambda x: x * _erfc(-x * math.sqrt(0.5)) / 2,
                 torch=lambda torch, x: torch.nn.functional.gelu(x)),
    "gelu_tanh": _row("gelu_tanh", lambda x: x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
                      torch=lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh")),
}
"""The unary kernels whose results are not always the nearest floats, and √."""


def _power(base: float | None, exponent: float | None) -> Row:
    """pow with the one of the two that is given held, as a float32."""
    def held(power: Callable[[Any, Any], Any], x: Any, like: Callable[[Any, float], Any] = np.full_like) -> Any:
        return power(*(x if value is None else like(x, float(np.float32(value))) for value in (base, exponent)))

    return Row(partial(held, np.power), partial(held, lambda x, y: eg.pow(eg.tensor(x), eg.tensor(y)).numpy()),
               partial(held, np.power), lambda torch, x: held(torch.pow, x, torch.full_like))


POWERS: dict[str, Row] = {**{f"pow(x, {y:g})": _power(None, y) for y in (2, -3, 0.5, 1.7, 33.25)},
                          **{f"pow({x:g}, y)": _power(x, None) for x in (2, 0.999)}}


ROWS = {**FUNCTIONS, **POWERS}


def pytorchs(row: Row) -> Function | None:
    """PyTorch's function, of NumPy arrays; None if it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return lambda x: row.torch(torch, torch.from_numpy(x)).numpy()


# ── the errors ────────────────────────────────────────────────────────────────────────────────────────

def units(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """|got − want| in units in the last place of want as a float32; 0 where both are the same special value.

    An exact result beyond the largest float rounds to infinity: got is held against that. A zero with the other sign
    is infinitely wrong.
    """
    rounded = want.astype(np.float32)
    with np.errstate(all="ignore"):
        exponent = np.maximum(np.frexp(np.abs(want))[1] - 24, -149)
        error = np.abs(got.astype(np.float64) - want) / np.ldexp(1.0, exponent)
    special = ~np.isfinite(rounded) | ~np.isfinite(got)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    error = np.where(special, np.where(same, 0.0, np.inf), error)
    return np.where(wrong_zeros(got, want), np.inf, error)


def wrong_zeros(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Where a result is a zero of the other sign than the exact result, which may be a zero or round to one."""
    return (got == 0) & (np.signbit(got) != np.signbit(want)) & ~np.isnan(want)


def allow_floor(name: str, got: np.ndarray, want: np.ndarray, error: np.ndarray) -> None:
    """Set to 0 what the floor of a function allows: results below TAIL that are within FLOOR of the exact ones."""
    if name in TAIL:
        error[np.isfinite(error) & (np.abs(want) < TAIL[name]) & (np.abs(got - want) <= FLOOR)] = 0.0


def worst(name: str, compute: Function, stride: int) -> tuple[float, float]:
    """(largest error in units, the argument it is at) over the floats whose bits are multiples of `stride`; of what the
    function's floor allows, none."""
    largest, argument = 0.0, 0.0
    for start in range(0, 2**32, stride * CHUNK):
        patterns = np.arange(start, min(start + stride * CHUNK, 2**32), stride, dtype=np.uint64).astype(np.uint32)
        x = patterns.view(np.float32)
        with np.errstate(all="ignore"):
            want, got = ROWS[name].reference(x.astype(np.float64)), compute(x)
            error = units(got, want)
            allow_floor(name, got, want, error)
        at = int(np.argmax(error))
        if error[at] > largest:
            largest, argument = float(error[at]), float(x[at])
    return largest, argument


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", metavar="FUNCTION", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--stride", type=int, default=1009, help="take every N-th float (default: 1009)")
    arguments = parser.parse_args()
    unknown = set(arguments.functions) - set(ROWS)
    if unknown or arguments.stride < 1:
        parser.error(f"got {', '.join(sorted(unknown))}, expected functions among {', '.join(ROWS)}" if unknown
                     else f"--stride is {arguments.stride}, expected at least 1")
    level = getattr(get_backend("cpu"), "level", "numpy")
    print(f"level {level}, every {arguments.stride}th float; NumPy {np.__version__}"
          + (f", PyTorch {sys.modules['torch'].__version__}" if pytorchs(ROWS["exp"]) else ""))
    print(f"{'function':<14}{'ours':>8}{'NumPy':>8}{'PyTorch':>11}   worst argument of ours")
    for name in arguments.functions or ROWS:
        row = ROWS[name]
        error, argument = worst(name, row.ours, arguments.stride)
        numpy, torch = (f"{worst(name, peer, arguments.stride)[0]:.4g}" if peer else ""
                        for peer in (row.numpy, pytorchs(row)))
        print(f"{name:<14}{error:8.4g}{numpy:>8}{torch:>11}   {np.float32(argument)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("accuracy", main))
