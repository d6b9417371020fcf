"""The device "cuda" for tests: a real GPU if one was asked for, else the stand-in for CuPy with emulated kernels.

    ENGINE_TEST_GPU=1 pytest tests/cuda_emulation      (make test-gpu)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy_stand_in
import numpy as np
import pytest

import engine as eg
from engine.backend import get_backend
from engine.testing import opspec, rounded

REAL = bool(os.environ.get("ENGINE_TEST_GPU"))


@contextmanager
def cuda() -> Iterator[str]:
    """The device, and what is needed while it is used. Yields a line that says what it is."""
    with pytest.MonkeyPatch.context() as patch:
        if not REAL:
            for name, module in cupy_stand_in.make().items():
                patch.setitem(sys.modules, name, module)
        # NumPy's functions, and CUDA's (Programming Guide, "Mathematical Functions"), are good to 4 units; the bounds
        # of the C kernels are tighter.
        for module in (rounded, opspec):
            patch.setattr(module, "function_ulps", lambda name, dtype: 0.5 if name == "sqrt" else rounded.NUMPY_ULPS)
        patch.setattr(opspec, "as_tensor", as_tensor)
        try:
            get_backend("cuda")  # one backend lives as long as the process, so there is one kind of it in a process
        except RuntimeError as error:
            pytest.exit(f"no GPU to run on: {error}", returncode=1)  # only where a GPU was asked for
        yield description()


def as_tensor(x: Any, requires_grad: bool = False) -> Any:
    """An operand on the default device; anything but a NumPy array as it is."""
    return eg.tensor(x, requires_grad=requires_grad) if isinstance(x, np.ndarray) else x


def description() -> str:
    """The device in words."""
    if not REAL:
        return "NumPy stand-in for CuPy, emulated kernels"
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return f"{found['name'].decode()}, compute capability {found['major']}.{found['minor']}, CuPy {cupy.__version__}"
