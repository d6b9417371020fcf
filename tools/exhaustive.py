"""Every float32 there is, through every unary float32 kernel, at every instruction-set level: the proof of the bounds.

    python tools/exhaustive.py                     all functions (some minutes each); exit status 1 if a bound fails
    python tools/exhaustive.py exp log --minutes 10
    python tools/exhaustive.py --table             print what has been proved so far and compute nothing

All 2³² bit patterns are taken, a segment at a time, the levels side by side on one reference, so that the reference is
computed once. What is done is kept in a ledger (build/exhaustive.json) under a hash of all that the function is made of
in C (c_parts.py), the flags and the compiler; stopped, the run goes on at the next segment.

The reference is float64 (accuracy.py), wrong by at most 4 of its own units: 4 · 2⁻²⁹ = 2⁻²⁷ of float32's. A result
whose error is nearer to its bound than DOUBT is decided with 80 digits (mpmath).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from engine.backend.cpu import CpuBackend, load_level
from engine.files import replace_file
from engine.testing.rounded import FLOAT32_ULPS
from tools.accuracy import FUNCTIONS, Function, allow_floor, units, wrong_zeros
from tools.build_kernels import FLAGS, FLAGS_OF, find_compiler, levels_here
from tools.c_parts import definitions, needed
from tools.training.errors import run_program

ROOT = Path(__file__).resolve().parent.parent
SEGMENTS, CHUNK = 64, 1 << 17  # a chunk and what is computed from it stay in the second-level cache
DOUBT = 2.0**-20
BOUNDS = {**FLOAT32_ULPS, "sqrt": 0.5, "silu": 4.0, "gelu": 4.0, "gelu_tanh": 4.0}
EXACT: dict[str, Callable[[Any], Any]] = {}  # filled by exact()


class ExhaustiveError(Exception):
    """The run cannot go on; the message is one line that says why."""


def exact(name: str, x: float) -> Any:
    """The function at x to 80 digits."""
    try:
        import mpmath as mp
    except ImportError:
        raise ExhaustiveError(f"{name} at {x!r} is too near its bound for float64: pip install mpmath") from None
    mp.mp.dps = 80
    if not EXACT:
        def gelu_tanh(v: Any) -> Any:
            return v / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (v + mp.mpf("0.044715") * v**3)))
        EXACT.update({n: getattr(mp, n) for n in ("exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "sqrt", "erf")},
                     sigmoid=lambda v: 1 / (1 + mp.exp(-v)), rsqrt=lambda v: 1 / mp.sqrt(v),
                     softplus=lambda v: mp.log1p(mp.exp(v)), silu=lambda v: v / (1 + mp.exp(-v)),
                     gelu=lambda v: v * mp.erfc(-v / mp.sqrt(2)) / 2, gelu_tanh=gelu_tanh)
    return EXACT[name](mp.mpf(x))


def exact_units(name: str, x: float, got: float) -> float:
    """|got − f(x)| in units in the last place of f(x), to 80 digits."""
    want = exact(name, x)
    exponent = max(math.frexp(abs(float(want)))[1] - 24, -149)
    return float(abs(want - float(got)) / 2 ** (exponent if exponent >= 0 else 0) * 2 ** max(-exponent, 0))


# ── one chunk ─────────────────────────────────────────────────────────────────────────────────────────

def scale_of(want: np.ndarray) -> np.ndarray:
    """1 / unit in the last place, as a float32, of float64 numbers that are normal floats: a power of two by its bits.

    A number in [2ᵉ, 2ᵉ⁺¹) has the unit 2ᵉ⁻²³; the least unit is 2⁻¹⁴⁹.
    """
    biased = (want.view(np.int64) >> 52) & 0x7FF  # e + 1023
    return ((2046 + 23 - np.maximum(biased, 1023 - 126)) << 52).view(np.float64)


def errors(got: np.ndarray, want: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """|got − want| in units; where a result is special by accuracy.units, which is slower."""
    error = got - want  # float64
    np.abs(error, out=error)
    error *= scale
    if np.isfinite(error.max()):
        error[wrong_zeros(got, want)] = np.inf
        return error
    rounded = want.astype(np.float32)
    if not np.isfinite(rounded).any() and np.array_equal(got, rounded, equal_nan=True):
        return np.zeros(got.shape)
    return units(got, want)


def largest(name: str, x: np.ndarray, got: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """(largest error, its argument), with those that float64 cannot tell from the bound decided exactly."""
    at = int(np.argmax(error))
    if error[at] > BOUNDS[name] - DOUBT:
        for i in np.flatnonzero(np.abs(error - BOUNDS[name]) < DOUBT):
            error[i] = exact_units(name, float(x[i]), float(got[i]))
        at = int(np.argmax(error))
    return float(error[at]), float(x[at])


def sweep(name: str, backends: dict[str, CpuBackend], first: int, last: int,
          stride: int = 1) -> dict[str, tuple[float, float]]:
    """For each level, the largest error and its argument over every stride-th bit pattern in [first, last)."""
    reference: Function = FUNCTIONS[name].reference
    found = dict.fromkeys(backends, (-1.0, 0.0))
    for start in range(first, last, CHUNK * stride):
        patterns = np.arange(start, min(start + CHUNK * stride, last), stride, dtype=np.uint64)
        x = patterns.astype(np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            want = np.asarray(reference(x.astype(np.float64)))
            scale = scale_of(want)
            seen: dict[bytes, tuple[float, float]] = {}  # levels with the same bits are judged once
            for level, k in backends.items():
                got = k.map(name, k.from_numpy(x)).data
                bits = got.tobytes()
                if bits not in seen:
                    error = errors(got, want, scale)
                    allow_floor(name, got, want, error)
                    seen[bits] = largest(name, x, got, error)
                found[level] = max(found[level], seen[bits])
    return found


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────

def levels() -> dict[str, CpuBackend]:
    """A backend for each level that this machine runs."""
    made = {}
    before = os.environ.get("ENGINE_ISA")
    for level in ("v2", "v3", "v4", "neon"):
        os.environ["ENGINE_ISA"] = level
        try:
            load_level()
        except ImportError:
            continue
        made[level] = CpuBackend()
    if before is None:
        os.environ.pop("ENGINE_ISA")
    else:
        os.environ["ENGINE_ISA"] = before
    if not made:
        raise ExhaustiveError("no compiled kernels: run make first")
    return made


def sources(name: str = "elementwise.c") -> dict[str, bytes]:
    """The texts that a kernel's source is compiled from: it, and what it includes, directly or not."""
    found, names = {}, [name]
    for name in names:  # grows while it is walked
        found[name] = (ROOT / "kernels" / name).read_bytes()
        included = re.findall(r'^#include "(.+)"', found[name].decode(), flags=re.M)
        names += [other for other in dict.fromkeys(included) if other not in names]
    return found


def digests(chosen: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """What each proof holds for: all that the kernel is made of, the flags of these levels, the compiler."""
    flags = levels_here()
    version = subprocess.run([*find_compiler(), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    around = [FLAGS, FLAGS_OF, {level: flags.get(level) for level in chosen}, version]
    parts = definitions(text.decode() for text in sources().values())
    made_of = {name: sorted((*part.when, part.text) for part in needed(parts, name)) for name in names}
    return {name: hashlib.sha256(repr([own, *around]).encode()).hexdigest()[:16] for name, own in made_of.items()}


def run(names: list[str], backends: dict[str, CpuBackend], ledger: Path, seconds: float) -> dict[str, Any]:
    """Go on with every function until all segments are done or the time is over; returns the ledger's entries."""
    known = json.loads(ledger.read_text()) if ledger.exists() else {}
    done: dict[str, Any] = {}
    size, start = 2**32 // SEGMENTS, time.monotonic()
    for name, key in digests(backends, names).items():
        fresh = {"segments": 0, "worst": {level: [-1.0, 0.0] for level in backends}}
        entry = done[name] = known.setdefault(key, {}).setdefault(name, fresh)
        while entry["segments"] < SEGMENTS and time.monotonic() - start < seconds:
            at = entry["segments"]
            for level, found in sweep(name, backends, at * size, (at + 1) * size).items():
                entry["worst"][level] = list(max(tuple(entry["worst"][level]), found))
            entry["segments"] = at + 1
            ledger.parent.mkdir(parents=True, exist_ok=True)
            replace_file(ledger, json.dumps(known, indent=1).encode())
        print(line(name, entry), flush=True)
    return done


def line(name: str, entry: dict[str, Any]) -> str:
    """A function's row: each level's largest error and the argument that has it."""
    share = "all 2³²" if entry["segments"] == SEGMENTS else f"{entry['segments'] / SEGMENTS:.0%}"
    cells = [f"{error:.4f} at {np.float32(x)!s}" for error, x in entry["worst"].values()]
    return f"| {name} | {BOUNDS[name]} | {' | '.join(cells)} | {share} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", metavar="FUNCTION", help=f"of {', '.join(FUNCTIONS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; the next run goes on")
    parser.add_argument("--ledger", type=Path, default=ROOT / "build" / "exhaustive.json", help="where proofs are kept")
    parser.add_argument("--table", action="store_true", help="print what the ledger has and compute nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.functions) - set(FUNCTIONS):
        parser.error(f"got {', '.join(sorted(unknown))}, expected functions among {', '.join(FUNCTIONS)}")
    try:
        backends = levels()
        print(f"| function | bound | {' | '.join(backends)} | of the floats |\n|---|---|{'---|' * (len(backends) + 1)}")
        done = run(arguments.functions or list(FUNCTIONS), backends, arguments.ledger,
                   0.0 if arguments.table else arguments.minutes * 60)
    except ExhaustiveError as error:
        print(f"exhaustive: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("exhaustive: stopped; the next run goes on", file=sys.stderr)
        return 130
    wrong = [f"{name} at {level}" for name, entry in done.items() for level, (error, _) in entry["worst"].items()
             if not error <= BOUNDS[name]]
    if wrong:
        print(f"exhaustive: beyond its bound: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_program("exhaustive", main))
