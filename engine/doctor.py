"""python -m engine doctor: what is active on this machine, its measured limits, and a numeric self-test.

Each check of the self-test compares a result in float32 with the same mathematics in NumPy's float64. The
bounds are the textbook's (Higham 2002, "Accuracy and Stability of Numerical Algorithms"): u = 2⁻²⁴ is the unit
roundoff, and a sum or product chain of n roundings is wrong by at most n·u of the sum of magnitudes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable

import numpy as np

import engine as eg
from engine.backend import devices, get_backend, get_num_threads, set_num_threads
from engine.backend.cpu import LEVELS, CpuBackend, built_levels
from engine.backend.roofs import peak_flops, read_bandwidth

U = 2.0**-24
EXP_ULP = 4  # of an ulp-accurate exponential; an ulp is at most 2u of the value

# ── what is active ────────────────────────────────────────────────────────────────────────────────────


def runnable_levels() -> list[str]:
    """The instruction-set levels that were built and that this processor runs, best first."""
    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        return []
    return [level for level in built_levels() if backend.lib.level_supported(LEVELS[level])]


def compiler_here() -> str:
    """The C compiler that a build on this machine would find."""
    for candidate in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = candidate and shutil.which(shlex.split(candidate)[0])
        if found:
            return found
    return "none"


def gpu() -> str:
    """The GPU that is used, or every reason why none is. Asks the driver, never imports CuPy."""
    missing = []
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            missing.append("the NVIDIA driver shows no device")
    except OSError:
        missing.append("no NVIDIA driver (libcuda.so.1)")
    if importlib.util.find_spec("cupy") is None:
        missing.append("CuPy is not installed (pip install 'shardgrad[gpu]')")
    others = [device for device in devices() if device not in ("cpu", "reference")]
    if not others:
        missing.append("this version has no GPU backend")
    return f"not used: {'; '.join(missing)}" if missing else f"device {others[0]!r}, {count.value} found"


def report() -> dict[str, str]:
    """Each row of the report: what it is about, and what is so here."""
    backend = get_backend("cpu")
    rows = {"shardgrad": f"{eg.__version__}, Python {platform.python_version()}, NumPy {np.__version__}, "
                         f"{platform.system()} {platform.machine()}"}
    if isinstance(backend, CpuBackend):
        built_by = backend.ffi.string(backend.lib.compiler()).decode()
        rows["backend"] = "C kernels"
        rows["level"] = (f"{backend.level}, {8 * backend.lib.vector_bytes()}-bit vectors "
                         f"(built: {' '.join(built_levels())}; this processor runs: {' '.join(runnable_levels())})")
        rows["bfloat16"] = f"products by {backend.bf16_unit}"
        rows["compiler"] = f"{built_by} made the kernels (on the PATH now: {compiler_here()})"
        rows["pool"] = str(backend.pool.figures())
    else:
        rows["backend"] = "NumPy reference: correct, but slow"
        rows["level"] = "none: no compiled kernels"
        rows["compiler"] = f"on the PATH now: {compiler_here()}"
        rows["pool"] = "none: memory is NumPy's own"
    rows["threads"] = f"{get_num_threads()} of {os.cpu_count()} processors"
    rows["GPU"] = gpu()
    flops, bandwidth = peak_flops(), read_bandwidth()
    rows["peak"] = f"{flops / 1e9:,.1f} GFLOP/s, float32 multiply-add" if flops else "not measured without C kernels"
    rows["read"] = f"{bandwidth / 1e9:,.1f} GB/s from memory" if bandwidth else "not measured without C kernels"
    return rows


# ── the self-test: each check returns its worst error as a share of its bound ─────────────────────────


def drawn(*shape: int, scale: float = 1.0) -> np.ndarray:
    """Uniform numbers in [−scale, scale), the same ones every time."""
    return np.random.default_rng(shape).uniform(-scale, scale, shape).astype(np.float32)


def worst(found: np.ndarray, exact: np.ndarray, bound: np.ndarray) -> float:
    return float(np.max(np.abs(found - exact) / bound, initial=0.0)) if np.all(np.isfinite(found)) else np.inf


def softmax(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(softmax over the last axis in float64, bound on the relative error of the same in float32).

    x − max is rounded once, which the exponential turns into a relative error of |x − max|·u; numerator and
    denominator are exponentials, the denominator a sum of n, and the quotient is rounded once.
    """
    shifted = x - x.max(axis=-1, keepdims=True)
    e = np.exp(shifted)
    bound = (2 * np.abs(shifted).max(axis=-1, keepdims=True) + 4 * EXP_ULP + x.shape[-1] + 1) * U
    return e / e.sum(axis=-1, keepdims=True), bound


def check_gemm() -> float:
    a, b = drawn(65, 300), drawn(300, 67)
    found = eg.matmul(eg.tensor(a), eg.tensor(b)).numpy()
    a, b = a.astype(np.float64), b.astype(np.float64)
    return worst(found, a @ b, 300 * U * (np.abs(a) @ np.abs(b)))


def check_exp() -> float:
    x = drawn(4099, scale=87.0)  # results are normal numbers: e^±87 is within float32's range
    exact = np.exp(x.astype(np.float64))
    return worst(eg.exp(eg.tensor(x)).numpy(), exact, 2 * EXP_ULP * U * exact)


def check_softmax() -> float:
    x = drawn(33, 257, scale=20.0)
    exact, bound = softmax(x.astype(np.float64))
    return worst(eg.softmax(eg.tensor(x)).numpy(), exact, bound * exact)


def check_adam() -> float:
    """One step of AdamW from a state in mid-training; every number of the update is rounded at most 16 times."""
    n, lr, beta1, beta2, eps, decay, step = 1000, 1e-2, 0.9, 0.999, 1e-8, 0.1, 7
    k = get_backend("cpu")
    p, m, g = drawn(n), drawn(n, 1)[:, 0], drawn(1, n)[0]
    v = np.square(drawn(n, 2)[:, 0])
    new_p, new_m, new_v = (k.empty((n,), eg.float32) for _ in range(3))
    k.adam(new_p, new_m, new_v, *[k.array(x) for x in (p, m, v, g)], n, 1, 1, lr, beta1, beta2, eps, decay, 1, step)
    p, m, v, g = (x.astype(np.float64) for x in (p, m, v, g))
    moment, square = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    rate = lr / (1 - beta1**step) / (np.sqrt(square / (1 - beta2**step)) + eps)
    exact = p * (1 - lr * decay) - rate * moment
    magnitude = np.abs(p) + rate * (beta1 * np.abs(m) + (1 - beta1) * np.abs(g))
    return max(worst(new_p.data, exact, 16 * U * magnitude), worst(new_v.data, square, 16 * U * square))


def check_backward() -> float:
    """The gradient of cross-entropy of a linear layer against its closed form Xᵀ(softmax(XW) − onehot)/rows."""
    rows, width, classes = 48, 64, 19
    x, w = drawn(rows, width), drawn(width, classes)
    target = np.arange(rows) % classes
    weight = eg.tensor(w, requires_grad=True)
    eg.cross_entropy(eg.matmul(eg.tensor(x), weight), eg.tensor(target)).backward()
    if weight.grad is None:
        return np.inf
    x, w = x.astype(np.float64), w.astype(np.float64)
    p, relative = softmax(x @ w)
    relative = relative + 2 * width * U * (np.abs(x) @ np.abs(w)).max(axis=-1, keepdims=True)  # of the logits
    error = p - np.eye(classes)[target]
    bound = np.abs(x).T @ (relative * p + (rows + 4) * U * np.abs(error)) / rows
    return worst(weight.grad.numpy(), x.T @ error / rows, bound)


def check_threads() -> float:
    """Softmax of a product must have the same bits whatever the number of threads."""
    a, b, before = eg.tensor(drawn(129, 512)), eg.tensor(drawn(512, 130)), get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            set_num_threads(threads)
            found.append(eg.softmax(eg.matmul(a, b)).numpy().tobytes())
    finally:
        set_num_threads(before)
    return 0.0 if found[0] == found[1] == found[2] else np.inf


CHECKS: dict[str, Callable[[], float]] = {
    "matrix product": check_gemm, "exp": check_exp, "softmax": check_softmax, "adam step": check_adam,
    "backward": check_backward, "bits by threads": check_threads,
}


def self_test() -> bool:
    """Run and print every check; whether all passed."""
    passed, start = True, time.perf_counter()
    for name, check in CHECKS.items():
        try:
            error = check()
            result = f"{'passed' if error <= 1 else 'FAILED'}, error {error:.0%} of its bound"
        except Exception as fault:  # a report names what is broken, and goes on
            error, result = np.inf, f"FAILED: {type(fault).__name__}: {fault}"
        passed = passed and error <= 1
        print(f"    {name:<18}{result}")
    print(f"self-test {'passed' if passed else 'FAILED'} in {time.perf_counter() - start:.1f} s")
    return passed


def main(levels_only: bool = False) -> int:
    """The program; returns its exit code: 1 if a check failed, or if ENGINE_ISA names what cannot run."""
    try:
        get_backend("cpu")
    except ImportError as error:
        print(f"engine: {error}", file=sys.stderr)
        return 1
    if levels_only:
        print(*runnable_levels())
        return 0
    for name, text in report().items():
        print(f"{name:<12}{text}", flush=True)
    return 0 if self_test() else 1
