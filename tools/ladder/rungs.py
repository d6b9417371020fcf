"""The rungs: found by their file names, compiled, called, and held against float64.

A rung is <family>_<number>_<idea>.c and defines one function, <family>_<idea>:

    gemm_<idea>(c, a, b, m, n, k)                    C = A B, dense rows
    attention_<idea>(out, q, k, v, heads, t, d)      causal softmax(Q Kᵀ/√d) V for each head

How far a result may be from the exact one. u = 2⁻²⁴ is the rounding of float32, γ_n = n u/(1 − n u) that of n
operations in a row (Higham 2002, "Accuracy and stability of numerical algorithms", chapter 3).

    A sum of k products, in whatever order, with or without fused multiply-adds:      |error| ≤ γ_k Σ_p |a_p| |b_p|

    Attention over n keys. A score has the error e ≤ γ_(d+2) Σ |q| |k| / √d: the sum, the scale, and its product.
    A weight is exp(x − m), or a chain exp(x − m₁) exp(m₁ − m₂) … as m grows: the differences are rounded by u times
    their size, which together is the distance R from x to the largest score; each of at most n exponentials is off by
    one unit in the last place, 2u; n products with them and n additions, a product with v and a division are off by u.
    So each weight, in the numerator and in the denominator, is off by a factor within exp(±η), and

        η = e + u R + (4n + 2) u/(1 − u)          |error| ≤ (exp(2η) − 1) Σ_s p_s |v_s|
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.backend import get_backend
from engine.backend.cpu import CpuBackend
from tools.build_kernels import FLAGS, KERNELS, BuildError, find_compiler, levels_here, newer, run

FOLDER = Path(__file__).resolve().parent
BUILD = FOLDER.parent.parent / "build" / "ladder"
POINTERS = {"gemm": 3, "attention": 4}  # arguments of a family's functions: arrays, output first, then three sizes
MARGIN = 67  # elements of NaN before and after each array of a check: odd, so that nothing is aligned to vectors

GEMM_SIZES = [(1, 1, 1), (3, 5, 7), (2, 3, 0), (1, 33, 9), (17, 1, 40), (64, 64, 64), (15, 31, 513), (67, 70, 300),
              (3, 1100, 80), (430, 5, 6)]
ATTENTION_SIZES = [(1, 1, 1), (2, 5, 3), (3, 64, 16), (1, 65, 33), (2, 130, 40), (1, 200, 64)]


class RungError(Exception):
    """A rung does not compute what it should; the message is one line that says where."""


@dataclass(frozen=True)
class Rung:
    family: str
    number: int
    idea: str
    source: Path

    @property
    def function(self) -> str:
        return f"{self.family}_{self.idea}"

    @property
    def title(self) -> str:
        return f"{self.number} {self.idea.replace('_', ' ')}"


def find_rungs(folder: Path = FOLDER) -> list[Rung]:
    """All rungs of a folder, each family from the bottom up."""
    found = []
    for family in POINTERS:
        for path in sorted(folder.glob(f"{family}_*.c")):
            number, _, idea = path.stem.removeprefix(f"{family}_").partition("_")
            found.append(Rung(family, int(number), idea, path))
    return found


# ── compiling and calling ─────────────────────────────────────────────────────────────────────────────

def compile_rungs(rungs: Sequence[Rung], build: Path = BUILD) -> list[Path]:
    """A shared library of each rung and the engine's team of threads, for the level that the engine runs at."""
    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        raise BuildError("the rungs are measured beside the engine's compiled kernels; run `make` first")
    build.mkdir(parents=True, exist_ok=True)
    command = [*find_compiler(), *FLAGS, "-fvisibility=default", *levels_here()[backend.level], "-DREAL_BITS=32",
               f"-I{KERNELS}"]
    team = {KERNELS / name: build / f"{name}.{backend.level}.o" for name in ("threads.c", "machine.c")}
    libraries = {rung.source: build / f"{rung.function}.{backend.level}.so" for rung in rungs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        stale = [source for source in team if not newer(team[source], source, *KERNELS.glob("*.h"))]
        list(pool.map(lambda source: run([*command, "-c", str(source), "-o", str(team[source])]), stale))
        list(pool.map(lambda source: run([*command, "-shared", str(source), *map(str, team.values()),
                                          "-o", str(libraries[source]), "-lm"]), libraries))
    return list(libraries.values())


class Loaded:
    """A compiled rung: call it with arrays, output first; the sizes follow from the first two."""

    def __init__(self, rung: Rung, library: Path):
        from cffi import FFI

        self.rung, self.ffi = rung, FFI()
        arrays = ", ".join(["float *"] + ["const float *"] * (POINTERS[rung.family] - 1))
        self.ffi.cdef(f"void {rung.function}({arrays}, int64_t, int64_t, int64_t); void threads_set(int n);")
        self.library = self.ffi.dlopen(str(library))
        self.function = getattr(self.library, rung.function)

    def set_threads(self, n: int) -> None:
        self.library.threads_set(n)

    def bind(self, *arrays: np.ndarray) -> Callable[[], None]:
        """The call on these arrays, with its pointers made once."""
        pointers = [self.ffi.from_buffer("float[]", x) for x in arrays]
        sizes = (*arrays[0].shape, arrays[1].shape[1]) if self.rung.family == "gemm" else arrays[0].shape
        return lambda: self.function(*pointers, *sizes)


def load_rungs(rungs: Sequence[Rung], build: Path = BUILD) -> list[Loaded]:
    return [Loaded(rung, library) for rung, library in zip(rungs, compile_rungs(rungs, build))]


# ── against float64 ───────────────────────────────────────────────────────────────────────────────────

def gamma(n: float, unit: float) -> float:
    return n * unit / (1 - n * unit)


def gemm_oracle(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A B in float64, and how far a float32 result may be from it; products of floats are exact in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    k = a.shape[1]
    return a @ b, (gamma(k, 2.0**-24) + gamma(k, 2.0**-53)) * (np.abs(a) @ np.abs(b))


def attention_oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention in float64, and how far a float32 result may be from it."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    t, d, unit = q.shape[1], q.shape[2], 2.0**-24
    hidden = ~np.tril(np.ones((t, t), bool))
    scores = np.where(hidden, -np.inf, q @ k.swapaxes(1, 2) / np.sqrt(d))
    below = scores - scores.max(-1, keepdims=True)
    p = np.exp(below)
    p /= p.sum(-1, keepdims=True)
    size = np.where(hidden, 0, np.abs(q) @ np.abs(k).swapaxes(1, 2) / np.sqrt(d)).max(-1, keepdims=True)
    distance = -np.where(hidden, 0, below).min(-1, keepdims=True)
    n = np.arange(1, t + 1)[:, None]
    eta = gamma(d + 2, unit) * size + unit * distance + (4 * n + 2) * unit / (1 - unit)
    return p @ v, np.expm1(2 * eta) * (p @ np.abs(v))


def operands(rng: np.random.Generator, family: str, sizes: tuple[int, int, int]) -> list[np.ndarray]:
    """Output and inputs: normal numbers between margins of NaN, the output NaN all over."""
    m, n, k = sizes
    shapes = [(m, n), (m, k), (k, n)] if family == "gemm" else [sizes] * 4
    arrays = []
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape))
        whole = np.full(size + 2 * MARGIN, np.nan, np.float32)
        inside = whole[MARGIN:MARGIN + size].reshape(shape)
        if number:
            inside[:] = rng.standard_normal(shape)
        arrays.append(inside)
    return arrays


def check(loaded: Loaded, sizes: tuple[int, int, int], threads: int = 1) -> np.ndarray:
    """Run a rung on random operands and return its result; RungError where it is wrong or out of bounds."""
    arrays: list[Any] = operands(np.random.default_rng(sum(sizes)), loaded.rung.family, sizes)
    loaded.set_threads(threads)
    loaded.bind(*arrays)()
    exact, allowed = (gemm_oracle if loaded.rung.family == "gemm" else attention_oracle)(*arrays[1:])
    where = f"{loaded.rung.source.name}: {'×'.join(map(str, sizes))}"
    wrong = ~(np.abs(arrays[0] - exact) <= allowed)  # a NaN is wrong
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise RungError(f"{where}: {wrong.sum()} of {wrong.size} elements wrong; {list(at)} is {arrays[0][at]:.8g}, "
                        f"expected {exact[at]:.8g} ± {allowed[at]:.1g}")
    for array in arrays:
        whole = array.base if array.base.ndim == 1 else array.base.base
        if not (np.isnan(whole[:MARGIN]).all() and np.isnan(whole[-MARGIN:]).all()):
            raise RungError(f"{where}: wrote outside of its arrays")
    return arrays[0]


def validate(loaded: Loaded, threads: int = 1) -> None:
    """Every size of the family, odd ones included."""
    for sizes in GEMM_SIZES if loaded.rung.family == "gemm" else ATTENTION_SIZES:
        check(loaded, sizes, threads)
