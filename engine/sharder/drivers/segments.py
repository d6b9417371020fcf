"""Memory that processes share and that has no name: it is gone with the last process that holds it, however that ends.

A Segment is written once, sealed, and then handed from process to process over their socket. A sealed one can neither
be written nor shortened by anybody, so whoever is given it may read it where it is, for as long as it likes: a pulled
parameter and a pushed gradient are views of it. Whoever has made it lets go of it when its array is no more; the kernel
counts. Only Linux has such memory (memfd_create, 3.17); elsewhere arrays travel within their frames.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from engine.sharder.encoding import FAR_ALIGNMENT, WireError

try:
    import fcntl

    SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    AVAILABLE = hasattr(os, "memfd_create")
except (ImportError, AttributeError):
    AVAILABLE = False

KEPT = 32  # segments that are kept to be sent again


class Segment:
    """The elements of some arrays, end to end, each at a multiple of FAR_ALIGNMENT."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.descriptor = os.memfd_create("shardgrad", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        end = 0
        for array in arrays:
            end += -end % FAR_ALIGNMENT
            data = array.reshape(-1).view(np.uint8).data
            while data:
                written = os.pwrite(self.descriptor, data, end)
                data, end = data[written:], end + written
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)


def opened(descriptor: int) -> memoryview:
    """The memory of a segment that was received, which is mapped here; the descriptor is closed. Raises WireError for
    one that could still change."""
    try:
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
        size = os.fstat(descriptor).st_size
        if seals & SEALS != SEALS or not size:
            raise WireError(f"wire: a segment of {size} bytes with seals {seals:#x}, expected {SEALS:#x}")
        return memoryview(mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0),
                                    prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)


Made = TypeVar("Made")


class Segments(Generic[Made]):
    """What `make` makes of arrays, by the arrays that are in it, so that what is sent twice, or to several, is written
    once."""

    def __init__(self, make: Callable[[Sequence[np.ndarray]], Made]) -> None:
        self.make = make
        self._kept: list[tuple[list[weakref.ref[np.ndarray]], Made]] = []

    def clear(self) -> None:
        self._kept.clear()

    def of(self, arrays: Sequence[np.ndarray]) -> Made:
        """Arrays that nobody changes any more."""
        self._kept = [(own, made) for own, made in self._kept if all(ref() is not None for ref in own)]
        for own, made in self._kept:
            if len(own) == len(arrays) and all(ref() is array for ref, array in zip(own, arrays)):
                return made
        new = self.make(arrays)
        self._kept = [*self._kept[1 - KEPT:], ([weakref.ref(array) for array in arrays], new)]
        return new
