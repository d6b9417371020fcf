"""The memory pool: 64-byte aligned blocks in size classes, reused without going back to the system.

A fresh 200 MB buffer costs the kernel 50,000 page faults, which is ten times what filling it costs; a reused
one costs none. So freed blocks stay on a list of their size class until `trim()`. The size classes are four
to every power of two, so at most a fifth of a block is padding.

Who frees a block? NumPy's own reference counts: a block is handed out as an array of bytes whose class has a
`__del__`. Every view, however deep, has that array as its base, so the block comes back exactly when the last
view of it, ours or the user's, is gone. (The memory itself is kept as a memoryview: NumPy shortens a chain of
bases as long as they are plain arrays, and would skip the block if there were one behind it.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

ALIGNMENT = 64
SLAB = 1 << 20  # small blocks are cut from slabs of this size
SMALL = 1 << 16  # up to here


@lru_cache(maxsize=4096)
def size_class(size: int) -> int:
    """The smallest class that holds `size` bytes: multiples of 64 to 256, then four to a power of two."""
    if size <= 4 * ALIGNMENT:
        return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


@dataclass(frozen=True)
class PoolFigures:
    """Bytes: in use now, in use at most so far, taken from the system; and the share of the last lying free."""

    live: int
    peak: int
    reserved: int
    blocks_live: int
    allocations: int

    @property
    def fragmentation(self) -> float:
        return 1 - self.live / self.reserved if self.reserved else 0.0

    def __str__(self) -> str:
        mb = 1 / 2**20
        return (f"live {self.live * mb:.1f} MiB in {self.blocks_live} blocks, peak {self.peak * mb:.1f} MiB, "
                f"reserved {self.reserved * mb:.1f} MiB, {self.fragmentation:.0%} of it free")


class Block(np.ndarray):
    """One block, as an array of bytes. When its last view is gone, its memory goes back to the pool."""

    __slots__ = ("pool", "space")
    pool: Pool
    space: tuple[memoryview, Any]  # (bytes, address), as it lies on its list when it is free

    @property
    def pointer(self) -> Any:
        return self.space[1]

    def __del__(self) -> None:
        pool = getattr(self, "pool", None)  # a view of a block belongs to it and not to the pool
        if pool is not None:
            pool._release(self)


class Pool:
    """Blocks by size class. `reserve(bytes)` gives 64-byte aligned memory as (memoryview of bytes, address).

    Thread-safe without a lock: the free lists change only through list.append and list.pop, which are atomic,
    and `__del__` may run in any thread at any time. The counters are approximate under threads, by a few
    blocks at most.
    """

    def __init__(self, reserve: Callable[[int], tuple[memoryview, Any]], pointer_at: Callable[[Any, int], Any]):
        self._reserve = reserve
        self._pointer_at = pointer_at
        self._free: dict[int, list[tuple[memoryview, Any]]] = {}
        self.allocated: list[Block] | None = None  # where somebody keeps what is allocated: none of it is used again
        self._live = self._peak = self._reserved = self._blocks = self._allocations = 0

    def allocate(self, size: int) -> Block:
        """A block of at least `size` bytes; `.pointer` is its address. Raises MemoryError when there is none."""
        size = size_class(size)
        free = self._free.get(size)
        if free is None:
            free = self._free.setdefault(size, [])
        try:
            space = free.pop()
        except IndexError:
            space = self._more(size, free)
        block = np.ndarray.__new__(Block, (size,), np.uint8, space[0])
        block.space, block.pool = space, self
        if self.allocated is not None:
            self.allocated.append(block)
        self._blocks += 1
        self._allocations += 1
        self._live += size
        if self._live > self._peak:
            self._peak = self._live
        return block

    def _more(self, size: int, free: list[tuple[memoryview, Any]]) -> tuple[memoryview, Any]:
        """Take memory from the system: one block, or a slab of small ones of which one is returned."""
        count = max(1, SLAB // size) if size <= SMALL else 1
        memory, pointer = self._reserve(count * size)
        self._reserved += count * size
        pieces = [(memory[i * size:(i + 1) * size], self._pointer_at(pointer, i * size)) for i in range(count)]
        free.extend(pieces[1:])
        return pieces[0]

    def _release(self, block: Block) -> None:
        size = block.nbytes
        self._live -= size
        self._blocks -= 1
        self._free[size].append(block.space)

    def trim(self) -> None:
        """Give free large blocks back to the system (slabs of small ones are kept)."""
        for size, free in self._free.items():
            if size > SMALL:
                while free:
                    free.pop()
                    self._reserved -= size

    def reset_peak(self) -> None:
        self._peak = self._live

    def figures(self) -> PoolFigures:
        return PoolFigures(self._live, self._peak, self._reserved, self._blocks, self._allocations)
