"""Guard zones: 64 painted bytes on both sides of every buffer, looked at after every launch.

A kernel that writes a little outside its output is seen at once, and named, where a sanitizer sees only the ends of
the slabs that buffers are cut from. `make test-asan` and `make test-ubsan` run the suite with both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.backend import Array, finishers
from engine.backend.pool import ALIGNMENT, Block, Pool

ZONE = ALIGNMENT  # bytes on either side; the buffer in between stays aligned
PAINT = 0xA5


class GuardedPool(Pool):
    """A pool whose blocks lie between two painted zones."""

    def allocate(self, size: int) -> Block:
        whole = super().allocate(size + 2 * ZONE)
        whole[...] = PAINT
        inner = np.ndarray.__new__(Block, (size,), np.uint8, whole, ZONE)  # keeps `whole` alive as its base
        inner.space = (whole.space[0][ZONE:ZONE + size], self._pointer_at(whole.pointer, ZONE))
        return inner


def _block_of(array: Array) -> Block | None:
    """The block that an Array lies in, or None for memory of somebody else."""
    base: Any = array.data
    while base is not None and not (isinstance(base, Block) and isinstance(base.base, Block)):
        base = getattr(base, "base", None)
    return base


def check(name: str, arguments: tuple[Any, ...], _seconds: float = 0.0) -> None:
    """Raise MemoryError, naming the kernel and the argument, if a zone beside one of its buffers was written to."""
    for position, array in enumerate(arguments):
        if not isinstance(array, Array):
            continue
        block = _block_of(array)
        if block is None:
            continue
        whole = np.asarray(block.base)
        end = ZONE + block.size
        for side, zone in (("before", whole[:ZONE]), ("after", whole[end:end + ZONE])):
            wrong = np.flatnonzero(zone != PAINT)
            if wrong.size:
                raise MemoryError(f"{name}: wrote {wrong.size} of the {ZONE} bytes {side} argument {position} "
                                  f"{array.shape} {array.dtype}, the nearest at byte {wrong[0]} of that zone")


def install(backend: Any) -> None:
    """Guard everything that `backend` (the CPU's) allocates from here on, and look after every launch."""
    backend.pool = GuardedPool(backend.pool._reserve, backend.pool._pointer_at)
    finishers.append(check)
