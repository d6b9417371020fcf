"""Largest error of the float32 functions, in units in the last place, over evenly spread bit patterns of all floats.

    python tools/accuracy.py                     every 1009th of the 2³² floats, a few minutes
    python tools/accuracy.py --stride 251 exp log

The reference is NumPy's (for erf and the GELUs the C library's) float64, whose own error is below 2⁻²⁸ float32 units.
A unit is the distance between neighbouring floats at the exact result: 2⁻¹⁴⁹ among the subnormals. NumPy's float32
functions are measured beside ours, where it has them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import engine as eg
from engine.backend import get_backend

Function = Callable[[np.ndarray], np.ndarray]
CHUNK = 1 << 20
TAIL = {"silu": 1e-36, "gelu": 1e-36, "gelu_tanh": 1e-36}  # below, x times a rounded subnormal: 10⁻⁴³ absolute
SERIES, SATURATED = 2.0**-9, 28.0  # where the series is exact to float64; where erfc is 0 and erf 1


def _erf_series(x: np.ndarray) -> np.ndarray:
    """2/√π (x − x³/3 + x⁵/10): below 2⁻⁹ the first term left out, x⁷/42, is less than 2⁻⁵⁹ x."""
    square = x * x
    return 2 / math.sqrt(math.pi) * (x - x * square * (1 / 3 - square / 10))


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


FUNCTIONS: dict[str, tuple[Function, Function | None]] = {  # float64 reference, NumPy's float32 function
    "exp": (np.exp, np.exp), "expm1": (np.expm1, np.expm1), "log": (np.log, np.log), "log1p": (np.log1p, np.log1p),
    "sin": (np.sin, np.sin), "cos": (np.cos, np.cos), "tanh": (np.tanh, np.tanh), "sigmoid": (_sigmoid, None),
    "sqrt": (np.sqrt, np.sqrt), "rsqrt": (lambda x: 1 / np.sqrt(x), None), "erf": (_erf, None),
    "softplus": (lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), None),
    "silu": (lambda x: x * _sigmoid(x), None), "gelu": (lambda x: x * _erfc(-x * math.sqrt(0.5)) / 2, None),
    "gelu_tanh": (lambda x: x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)), None),
}


def units(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """|got − want| in units in the last place of want as a float32; 0 where both are the same special value.

    An exact result beyond the largest float rounds to infinity: got is held against that.
    """
    rounded = want.astype(np.float32)
    with np.errstate(all="ignore"):
        exponent = np.maximum(np.frexp(np.abs(want))[1] - 24, -149)
        error = np.abs(got.astype(np.float64) - want) / np.ldexp(1.0, exponent)
    special = ~np.isfinite(rounded) | ~np.isfinite(got)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    return np.where(special, np.where(same, 0.0, np.inf), error)


def worst(compute: Function, reference: Function, stride: int, tail: float = 0.0) -> tuple[float, float]:
    """(largest error in units, the argument it is at) over the floats whose bits are multiples of `stride`, but for
    results smaller than `tail`."""
    largest, argument = 0.0, 0.0
    for start in range(0, 2**32, stride * CHUNK):
        patterns = np.arange(start, min(start + stride * CHUNK, 2**32), stride, dtype=np.uint64).astype(np.uint32)
        x = patterns.view(np.float32)
        with np.errstate(all="ignore"):
            want = reference(x.astype(np.float64))
            error = np.where(np.abs(want) < tail, 0.0, units(compute(x), want))
        at = int(np.argmax(error))
        if error[at] > largest:
            largest, argument = float(error[at]), float(x[at])
    return largest, argument


def ours(name: str) -> Function:
    return lambda x: getattr(eg, name)(eg.tensor(x)).numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", metavar="FUNCTION", help=f"of {', '.join(FUNCTIONS)} (default: all)")
    parser.add_argument("--stride", type=int, default=1009, help="take every N-th float (default: 1009)")
    arguments = parser.parse_args()
    unknown = set(arguments.functions) - set(FUNCTIONS)
    if unknown or arguments.stride < 1:
        parser.error(f"got {', '.join(sorted(unknown))}, expected functions among {', '.join(FUNCTIONS)}" if unknown
                     else f"--stride is {arguments.stride}, expected at least 1")
    level = getattr(get_backend("cpu"), "level", "numpy")
    print(f"level {level}, every {arguments.stride}th float; NumPy {np.__version__}")
    print(f"{'function':<10}{'ours':>8}{'NumPy':>8}   worst argument of ours")
    for name in arguments.functions or FUNCTIONS:
        reference, peer = FUNCTIONS[name]
        error, argument = worst(ours(name), reference, arguments.stride, TAIL.get(name, 0.0))
        theirs = f"{worst(peer, reference, arguments.stride)[0]:8.3f}" if peer else f"{'':8}"
        print(f"{name:<10}{error:8.3f}{theirs}   {np.float32(argument)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
