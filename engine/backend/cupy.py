"""The GPU backend: CuPy's memory and operations, and the CUDA kernels of kernels/cuda for what is fused.

A kernel is looked for first among the .cu files, then in the table of CuPy rows (cupy_rows.py). CUDA kernels are
compiled by CuPy at their first call (NVRTC, no compiler needed) and kept on disk by it. Work is queued on CuPy's
current stream and runs while Python goes on; it is waited for where elements are read (`.numpy()`, `.item()`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.backend import cuda_source
from engine.backend.array import Array
from engine.backend.cpu import merge_axes
from engine.backend.cuda_source import Parameter, Prototype
from engine.backend.cupy_rows import cupy_rows
from engine.backend.launch import Backend, Kernel
from engine.dtypes import DType, float32, float64

THREADS = 256  # of a block: common.cuh's
BLOCKS = 8  # of a grid, for each multiprocessor: 8 · 256 threads are all that one can hold
BITS = {float32: 32, float64: 64}


def load_cupy() -> Any:
    """CuPy, on a machine where it can work. Raises RuntimeError with one line that says what is missing."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"cuda: CuPy cannot be imported ({error}); pip install 'shardgrad[gpu]' for CUDA 12, "
                           "cupy-cuda13x for CUDA 13") from None
    runtime = cupy.cuda.runtime
    if not runtime.driverGetVersion():
        raise RuntimeError("cuda: no NVIDIA driver (libcuda.so.1); install one, `nvidia-smi` then shows the devices")
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if "InsufficientDriver" in str(error):
            raise RuntimeError("cuda: the NVIDIA driver is older than this CuPy's CUDA; update it, or install the "
                               "CuPy wheel of its CUDA version") from None
        count = 0
    if not count:
        raise RuntimeError("cuda: the NVIDIA driver shows no device; nvidia-smi lists them, CUDA_VISIBLE_DEVICES "
                           "hides them")
    return cupy


class CupyBackend(Backend):
    """Kernels in CUDA for float32 and float64, CuPy rows for the rest, CuPy's memory pool."""

    device = "cuda"

    def __init__(self) -> None:
        super().__init__()
        self.cupy = load_cupy()
        self.rows = cupy_rows(self.cupy, self._scatter_sums)
        self.prototypes = cuda_source.kernels()
        self._module, self._function = cache(self._compile), cache(self._look_up)
        self._record = lru_cache(maxsize=4096)(self._device_record)
        self.blocks = BLOCKS * self.cupy.cuda.Device().attributes["MultiProcessorCount"]

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        return Array(self.cupy.empty(shape, dtype.numpy), dtype)

    def to_numpy(self, array: Array) -> np.ndarray:
        return self.cupy.asnumpy(array.data)

    def from_numpy(self, data: np.ndarray) -> Array:
        return Array(self.cupy.asarray(data))

    # ── kernels ─────────────────────────────────────────────────────────────────────────────────────

    def has_fused(self, name: str) -> bool:
        return name in self.prototypes or name == "gemm"

    def bind(self, name: str) -> Kernel:
        row, prototype = self.rows.get(name), self.prototypes.get(name)
        if prototype is None:
            if row is None:
                raise AttributeError(f"no kernel {name!r}: not in kernels/cuda and not among the CuPy rows")

            def run_row(*arguments: Any) -> None:
                row(*[a.data if a.__class__ is Array else a for a in arguments])

            return run_row
        convert, which = [self._converter(p) for p in prototype.parameters], prototype.selector

        def run(*arguments: Any) -> None:
            bits = BITS.get(arguments[which].dtype) if prototype.typed else 32
            if bits is None:
                if row is None:
                    raise TypeError(f"{name}: no kernel for {arguments[which].dtype}, expected float32 or float64")
                row(*[a.data if a.__class__ is Array else a for a in arguments])
            else:
                self._function(prototype, bits)((self.blocks,), (THREADS,), tuple(
                    [f(a) for f, a in zip(convert, arguments)]))

        return run

    def _compile(self, path: Path, bits: int) -> Any:
        return self.cupy.RawModule(code=cuda_source.program(path), options=cuda_source.defines(bits))

    def _look_up(self, prototype: Prototype, bits: int) -> Any:
        return self._module(cuda_source.sources()[prototype.name], bits).get_function(prototype.symbol(bits))

    def _converter(self, parameter: Parameter) -> Callable[[Any], Any]:
        """How an argument is handed to a CUDA kernel: arrays by address, numbers in the parameter's type."""
        if parameter.name == "layout":
            return self._layout_record
        if parameter.is_pointer:
            return lambda array: None if array is None else array.data
        return {"int64_t": np.int64, "uint64_t": np.uint64, "int": np.int32, "uint32_t": np.uint32,
                "double": np.float64}[parameter.type]

    def _scatter_sums(self, sums: Any, g: Any, index: Any) -> None:
        """sums[i] = Σ g[j] over the j with index[j] = i, in ascending j."""
        self.embedding_vjp(Array(sums), Array(g), Array(index), index.size, sums.size, 1)

    # ── layouts ─────────────────────────────────────────────────────────────────────────────────────

    def layout(self, out: Array, *inputs: Array) -> tuple[Array, ...]:
        return (out, *inputs)  # few kernels want the record of kernels.h; those have it made by _layout_record

    def _layout_record(self, operands: Sequence[Array]) -> Any:
        shape = operands[0].data.shape
        return self._record(shape, tuple([
            (0,) * (len(shape) - x.data.ndim)
            + tuple([0 if n == 1 else s // x.dtype.itemsize for n, s in zip(x.data.shape, x.data.strides)])
            for x in operands]))

    def _device_record(self, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Any:
        shape, strides = merge_axes(shape, strides)
        return self.cupy.asarray(np.array([len(shape), *shape, *[s for one in strides for s in one]], np.int64))
