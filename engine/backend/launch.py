"""The one launch point: every piece of compute, on every device, is `k.<kernel>(outputs, inputs, sizes, scalars)`.

    k = get_backend("cpu")
    k.layer_norm(y, mean, rstd, x, weight, bias, rows, n, eps)

The arguments are Arrays, numbers and None, in the order of kernels/kernels.h. What a device adds is only how a
kernel's name becomes a callable (`Backend.bind`) and where memory comes from (`Backend.empty`). Whoever wants to
see, count or record the work (profiler, capture, memory planner, tests) appends to `observers` or `finishers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np

from engine.backend.array import Array, walkable
from engine.dtypes import DType, as_dtype

Kernel = Callable[..., None]

observers: list[Callable[[str, tuple[Any, ...]], None]] = []
"""Each is called as observer(kernel name, arguments) before the kernel runs."""

finishers: list[Callable[[str, tuple[Any, ...], float], None]] = []
"""Each is called as finisher(kernel name, arguments, seconds) when the kernel has run."""


readers: list[Callable[[Array], None]] = []
"""Each is called as reader(array) before its elements are read on the host."""


class Backend:
    """A device: memory, and kernels by name. Subclasses give `bind` and `empty`."""

    device: str = ""
    records: bool = False  # whether launches can be recorded and run again (recording.py)

    def __init__(self) -> None:
        self._constants: dict[tuple[Any, ...], Array] = {}

    # ── what a device provides ──────────────────────────────────────────────────────────────────────

    def bind(self, name: str) -> Kernel:
        """The callable that runs kernel `name` on Arrays; raises AttributeError if there is none."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """An Array of uninitialised memory."""
        raise NotImplementedError

    def has_fused(self, name: str) -> bool:
        """Whether fused op `name` has kernels here; if not, its composition of primitive ops runs instead."""
        return False

    def layout(self, out: Array, *inputs: Array) -> Any:
        """The layout record of an elementwise launch (kernels.h), or None where kernels do not need one."""
        return None

    def panel_width(self, dtype: DType) -> int:
        """How many rows of a matrix stand side by side in a panel that pack_weight makes."""
        return 32

    @property
    def identity(self) -> str:
        """What computes here: results have the same bits on machines where this is the same."""
        return f"numpy {np.__version__}"

    def set_num_threads(self, n: int) -> None:
        """Let kernels called from this Python thread use n threads; a device without threads of its own ignores it."""

    def get_num_threads(self) -> int:
        return 1

    def to_numpy(self, array: Array) -> np.ndarray:
        """The elements as a NumPy array: a view where the device's memory is the host's, else a copy."""
        for reader in tuple(readers):
            reader(array)
        return array.data

    def from_numpy(self, data: np.ndarray) -> Array:
        """An Array over a NumPy array: shares its memory where kernels can walk it, else a copy."""
        return Array(data if walkable(data) else data.copy())

    # ── the launch ──────────────────────────────────────────────────────────────────────────────────

    def __getattr__(self, name: str) -> Kernel:
        """k.<name>: made on first use, then an ordinary attribute."""
        if name.startswith("_"):
            raise AttributeError(name)
        run = self.bind(name)

        def launch(*arguments: Any) -> None:
            if observers:
                for observer in tuple(observers):
                    observer(name, arguments)
            if not finishers:
                run(*arguments)
                return
            start = perf_counter()
            run(*arguments)
            seconds = perf_counter() - start
            for finisher in tuple(finishers):
                finisher(name, arguments, seconds)

        setattr(self, name, launch)
        return launch

    # ── conveniences built on it ────────────────────────────────────────────────────────────────────

    def empty_like(self, x: Array) -> Array:
        return self.empty(x.data.shape, x.dtype)

    def full(self, shape: tuple[int, ...], value: Any, dtype: DType) -> Array:
        y = self.empty(shape, dtype)
        self.fill(y, value)
        return y

    def zeros(self, shape: tuple[int, ...], dtype: DType) -> Array:
        return self.full(shape, 0, dtype)

    def array(self, data: Any, dtype: DType | None = None) -> Array:
        """A copy of `data` (anything NumPy understands) in this device's memory."""
        source = np.asarray(data, dtype=None if dtype is None else dtype.numpy)
        y = self.empty(source.shape, dtype or as_dtype(source.dtype))
        self.cast(y, self.from_numpy(source))
        return y

    def constant(self, value: bool | int | float, dtype: DType) -> Array:
        """A 0-d Array that holds a Python number; the same one is given out again, so nobody may write to it."""
        key = (value, type(value), dtype, math.copysign(1.0, value))
        found = self._constants.get(key)
        if found is None:
            if len(self._constants) > 4096:  # a loop over a schedule must not grow without end
                self._constants.clear()
            with np.errstate(over="ignore"):
                found = self._constants[key] = self.array(np.asarray(value).astype(dtype.numpy))
        return found

    def contiguous(self, x: Array) -> Array:
        """x itself if its elements are dense in C order, else a dense copy."""
        if x.data.flags.c_contiguous:
            return x
        return self.map("copy", x)

    def map(self, name: str, *inputs: Array, dtype: DType | None = None) -> Array:
        """One elementwise kernel over broadcast inputs, into a new Array of `dtype` (default: the last input's).

        Raises ValueError if the shapes do not broadcast.
        """
        shape = broadcast_shapes(name, *[x.data.shape for x in inputs])
        y = self.empty(shape, dtype or inputs[-1].dtype)
        getattr(self, name)(y, *inputs, self.layout(y, *inputs))
        return y


@lru_cache(maxsize=4096)
def broadcast_shapes(name: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """NumPy's broadcasting rule, with an error that names the op."""
    if all(s == shapes[0] for s in shapes):
        return shapes[0]
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        shown = " and ".join(str(s) for s in shapes)
        raise ValueError(f"{name}: shapes {shown} do not broadcast; axes must be equal or 1, "
                         "counted from the last") from None
