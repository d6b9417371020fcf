"""The reference backend: NumPy, every element type, one row a kernel. It is the oracle of the tests, and what runs
when no kernels were compiled. Fused ops run as their compositions here.
"""

from __future__ import annotations

import numpy as np

from engine.backend.array import Array
from engine.backend.launch import Backend, Kernel
from engine.backend.numpy_rows import numpy_rows
from engine.dtypes import DType


class ReferenceBackend(Backend):
    """Kernels are NumPy rows; memory is NumPy's own."""

    def __init__(self, device: str = "reference"):
        super().__init__()
        self.device = device
        self.rows = numpy_rows(np)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        return Array(np.empty(shape, dtype.numpy), dtype)

    def bind(self, name: str) -> Kernel:
        row = self.rows.get(name)
        if row is None:
            raise AttributeError(f"no NumPy row for kernel {name!r}; a fused op runs its composition instead")

        def run(*arguments: object) -> None:
            with np.errstate(all="ignore"):  # as the C kernels: IEEE results, no warnings
                row(*[a.data if isinstance(a, Array) else a for a in arguments])

        return run
