"""The CPU backend: C kernels through cffi, memory from the pool.

The same C sources are compiled once per instruction-set level; the best level that this processor supports
is chosen here, or the one that the environment variable ENGINE_ISA names. Element types without a C kernel
(integers, bool) run their NumPy row, behind the same launch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.backend.array import Array
from engine.backend.launch import Backend, Kernel
from engine.backend.numpy_rows import numpy_rows
from engine.backend.pool import Pool
from engine.dtypes import DType, float32, float64

BF16_UNITS = ("fma", "dot", "amx")  # by kernels.h's numbers
LEVELS = {"v4": 4, "v3": 3, "v2": 2, "neon": 1}  # best first; the numbers are kernels.h's


def built_levels() -> list[str]:
    """The levels whose modules are there, best first."""
    found = []
    for level in LEVELS:
        if importlib.util.find_spec(f"engine._kernels.cpu_{level}"):
            found.append(level)
    return found


def load_level() -> tuple[str, Any]:
    """Choose a level and import its module: (level, module with .ffi and .lib).

    Raises ImportError with one line when no module was built, and when ENGINE_ISA asks for a level that
    was not built or that this processor does not have.
    """
    built = built_levels()
    if not built:
        raise ImportError("no compiled kernels: install a C compiler, then run `make` in a checkout or repeat "
                          "`pip install` with --force-reinstall --no-deps --no-cache-dir")
    # Any module can be asked what the processor supports; the lowest level is safe to load anywhere.
    probe = importlib.import_module(f"engine._kernels.cpu_{built[-1]}").lib
    runs = [level for level in built if probe.level_supported(LEVELS[level])]
    wanted = os.environ.get("ENGINE_ISA")
    if wanted and wanted not in runs:
        raise ImportError(f"ENGINE_ISA: got {wanted!r}, expected one of {', '.join(runs) or 'none'} "
                          f"(built: {', '.join(built)}; supported by this processor: {', '.join(runs)})")
    if not runs:
        raise ImportError(f"this processor supports none of the built levels ({', '.join(built)})")
    level = wanted or runs[0]
    return level, importlib.import_module(f"engine._kernels.cpu_{level}")


class CpuBackend(Backend):
    """Kernels in C for float32 and float64, NumPy rows for the other types, pooled memory."""

    device = "cpu"
    records = True

    def __init__(self) -> None:
        super().__init__()
        self.level, module = load_level()
        self.lib, self.ffi, self._module = module.lib, module.ffi, module.__file__
        self.rows = numpy_rows(np)
        self.pool = Pool(self._reserve, lambda pointer, offset: self.ffi.cast("void *", self._char(pointer) + offset))
        self._functions = set(dir(self.lib))
        self._choices: dict[str, tuple[dict[DType | None, Any], int | None, Any]] = {}
        self.bf16_unit = self._choose_bf16_unit()
        threads = os.environ.get("ENGINE_NUM_THREADS")
        if threads:
            if not threads.isdigit() or not int(threads):
                raise ImportError(f"ENGINE_NUM_THREADS: got {threads!r}, expected a positive whole number")
            self.lib.threads_set(int(threads))

    def _choose_bf16_unit(self) -> str:
        """What multiplies bfloat16 (kernels/gemm_bf16.c): the fastest that is here, or what ENGINE_BF16 names."""
        wanted = os.environ.get("ENGINE_BF16")
        unit = BF16_UNITS[self.lib.bf16_unit(BF16_UNITS.index(wanted) if wanted in BF16_UNITS else -1)]
        if wanted and wanted != unit:
            has = BF16_UNITS[:1 + self.lib.bf16_unit(len(BF16_UNITS))]
            raise ImportError(f"ENGINE_BF16: got {wanted!r}, expected one of {', '.join(has)}, which this processor "
                              f"has at level {self.level}")
        return unit

    @property
    def instructions(self) -> str:
        """What decides the bits of products in bfloat16: the level, and the unit if it is not that of float32."""
        return self.level if self.bf16_unit == BF16_UNITS[0] else f"{self.level} {self.bf16_unit}"

    @cached_property
    def identity(self) -> str:
        """The instructions, and a digest of the compiled kernels."""
        return f"{self.instructions} {hashlib.sha256(Path(self._module).read_bytes()).hexdigest()[:12]}"

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────

    def _char(self, pointer: Any) -> Any:
        return self.ffi.cast("char *", pointer)

    def _reserve(self, size: int) -> tuple[memoryview, Any]:
        pointer = self.lib.memory_reserve(size)
        if pointer == self.ffi.NULL:
            raise MemoryError(f"cpu: the system refused {size:,} bytes ({self.pool.figures()})")
        owner = self.ffi.gc(pointer, lambda p: self.lib.memory_release(p, size), size)
        return memoryview(self.ffi.buffer(owner, size)), pointer

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        block = self.pool.allocate(math.prod(shape) * dtype.itemsize)
        return Array(np.ndarray(shape, dtype.numpy, block), dtype, block.pointer)

    def address(self, array: Array) -> Any:
        """The Array's pointer, computed once for a view."""
        array.ptr = self.ffi.cast("void *", array.data.__array_interface__["data"][0])
        return array.ptr

    def integer(self, pointer: Any) -> int:
        """A cffi pointer as a number."""
        return int(self.ffi.cast("intptr_t", pointer))

    def address_of(self, array: Array) -> int:
        """The address of an Array's first element."""
        return self.integer(array.ptr or self.address(array))

    # ── threads ─────────────────────────────────────────────────────────────────────────────────────

    def set_num_threads(self, n: int) -> None:
        self.lib.threads_set(n)

    def get_num_threads(self) -> int:
        return self.lib.threads_get()

    # ── kernels ─────────────────────────────────────────────────────────────────────────────────────

    def has_fused(self, name: str) -> bool:
        return f"{name}_f32" in self._functions

    def panel_width(self, dtype: DType) -> int:
        return 2 * self.lib.vector_bytes() // dtype.itemsize

    def bind(self, name: str) -> Kernel:
        typed: dict[DType | None, Any] = {None: getattr(self.lib, name)} if name in self._functions else {}
        which = None
        if not typed:
            typed, which = self._typed(name)
        row = self.rows.get(name)
        if row is None and not typed:
            raise AttributeError(f"no kernel {name!r}: not in kernels.h and not among the NumPy rows")
        null, address = self.ffi.NULL, self.address
        self._choices[name] = typed, which, row

        def run(*arguments: Any) -> None:
            function = typed.get(arguments[which].dtype if which is not None else None)
            if function is None:
                if row is None:
                    raise TypeError(f"{name}: no kernel for {arguments[which or 0].dtype}, expected float32 or float64")
                with np.errstate(all="ignore"):  # as the C kernels: IEEE results, no warnings
                    row(*[a.data if a.__class__ is Array else a for a in arguments])
            else:
                function(*[(a.ptr or address(a)) if a.__class__ is Array else null if a is None else a
                           for a in arguments])

        return run

    def chosen(self, name: str, arguments: tuple[Any, ...]) -> tuple[str | None, Any]:
        """What a launch runs: the name of a C function, or None and the row."""
        typed, which, row = self._choices[name]
        dtype = arguments[which].dtype if which is not None else None
        if dtype not in typed:
            return None, row
        return name if dtype is None else f"{name}_f{8 * dtype.itemsize}", None

    @lru_cache(maxsize=1024)
    def prototype(self, function: str) -> tuple[int, str]:
        """The number of a C function in a program, and a letter for each parameter: p a pointer, w one that is written
        through, d a double, i a whole number, and # those of a draw's key, which are the last four."""
        number = self.lib.kernel_number(function.encode())
        return number, self.ffi.string(self.lib.kernel_prototype(number)).decode()

    def _typed(self, name: str) -> tuple[dict[DType | None, Any], int | None]:
        """The C functions of a typed kernel by element type, and which argument's type selects among them."""
        if f"{name}_f32" not in self._functions:
            return {}, 0
        single = getattr(self.lib, f"{name}_f32")
        of_element = (self.ffi.typeof("float *"), self.ffi.typeof("float const *"))
        which = next(i for i, kind in enumerate(self.ffi.typeof(single).args) if kind in of_element)
        return {float32: single, float64: getattr(self.lib, f"{name}_f64")}, which

    def layout(self, out: Array, *inputs: Array) -> Any:
        shape = out.data.shape
        for x in inputs:
            if x.data.shape != shape or not x.data.flags.c_contiguous:
                break
        else:
            if out.data.flags.c_contiguous:
                return self._dense_layout(out.data.size, len(inputs) + 1)
        strides = []
        for x in (out, *inputs):
            missing = len(shape) - x.data.ndim
            strides.append((0,) * missing + tuple(
                0 if n == 1 and m != 1 else s // x.dtype.itemsize
                for n, m, s in zip(x.data.shape, shape[missing:], x.data.strides)))
        return self._strided_layout(shape, tuple(strides))

    @lru_cache(maxsize=4096)
    def _dense_layout(self, size: int, operands: int) -> Any:
        return self.ffi.new("int64_t[]", [1, size] + [1] * operands)

    @lru_cache(maxsize=4096)
    def _strided_layout(self, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Any:
        shape, strides = merge_axes(shape, strides)
        return self.ffi.new("int64_t[]", [len(shape), *shape, *[s for operand in strides for s in operand]])


def merge_axes(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> tuple[Any, Any]:
    """Drop axes of length 1; merge neighbours that every operand walks as one: stride[i] = stride[i+1]·shape[i+1]."""
    merged: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for axis, n in enumerate(shape):
        if n == 1:
            continue
        if merged and all(walk[-1] == operand[axis] * n for walk, operand in zip(walks, strides)):
            merged[-1] *= n
            for walk, operand in zip(walks, strides):
                walk[-1] = operand[axis]
        else:
            merged.append(n)
            for walk, operand in zip(walks, strides):
                walk.append(operand[axis])
    return tuple(merged), tuple(tuple(walk) for walk in walks)
