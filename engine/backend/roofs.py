"""The two roofs of this machine, measured: no kernel computes faster than the one or reads faster than the other.

A kernel that does F flops on B bytes takes at least max(F/peak, B/bandwidth) seconds (Williams, Waterman,
Patterson 2009, "Roofline"). Both are measured on the calling thread's kernel team.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.backend import get_backend
from engine.backend.cpu import CpuBackend
from engine.dtypes import float32

BYTES_READ = 1 << 28  # more than the caches hold


def _fastest(run: Callable[..., object], *arguments: object, repeats: int = 5) -> float:
    """Seconds of the fastest run: on a machine with other work, that is the one least disturbed."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(*arguments)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_flops(repeats: int = 5) -> float | None:
    """float32 flops per second of independent fused multiply-adds in registers; None without compiled kernels."""
    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        return None
    run, iterations = backend.lib.peak_flops_run, 1 << 16
    while _fastest(run, iterations, repeats=1) < 0.004:  # long beside the start of the team
        iterations *= 2
    return run(iterations) / _fastest(run, iterations, repeats=repeats)


def read_bandwidth() -> float | None:
    """Bytes per second of reading an array larger than the caches; None without compiled kernels."""
    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        return None
    x = backend.full((BYTES_READ // 4,), 1.0, float32)
    seconds = _fastest(backend.lib.read_bandwidth_run, x.ptr, BYTES_READ // 4)
    del x
    backend.pool.trim()  # nobody else needs a block of this size
    return BYTES_READ / seconds


def copy_bandwidth(size: int = BYTES_READ, repeats: int = 5) -> float | None:
    """Bytes read and written per second of copying `size` bytes past the caches; None without compiled kernels."""
    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        return None
    x, y = (backend.full((size // 4,), 1.0, float32) for _ in range(2))
    return 2 * size / _fastest(backend.lib.copy_bandwidth_run, y.ptr, x.ptr, size // 4, repeats=repeats)
