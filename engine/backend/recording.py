"""Recording: what one thread launches, to run it again (program.py).

    with Recording(k, given) as recording: ...

While it records no block of memory is used twice, so addresses tell blocks apart. Only launches are seen. What else
would have to happen again, or give other launches the next time, is refused with one line as soon as it is tried:

    reading elements on the host                 what follows from them would stay as it is
    writing to memory that is neither given      it would be written to again, and nobody would know
    nor made since
    what calls `refuse`                          an optimizer's step, a cache that grows, a scaler's state
    what `watcher` refuses                       draws from other generators, gradients of other leaves (capture.py)
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.backend import launch
from engine.backend.array import Array

_local, _one = threading.local(), threading.Lock()


def recording() -> Recording | None:
    """The recording that this thread is in."""
    return getattr(_local, "recording", None)


def refuse(what: str) -> None:
    """Raise RuntimeError while this thread records: `what` is more than launches, and would not happen again."""
    now = recording()
    if now is not None and what not in now.allowed:
        raise RuntimeError(f"capture: {what} would not happen again when the launches do; call it outside of what is "
                           "captured")


class Pointer(NamedTuple):
    """An Array as an argument. It is kept by its data: a reference to its storage would be taken for a user's."""

    address: int
    data: np.ndarray

    def extent(self) -> tuple[int, int]:
        """The bytes that it reaches: from here, to before there."""
        if not self.data.size:
            return self.address, self.address
        reach = [(n - 1) * stride for n, stride in zip(self.data.shape, self.data.strides)]
        return (self.address + sum(r for r in reach if r < 0),
                self.address + sum(r for r in reach if r > 0) + self.data.itemsize)


class Launch(NamedTuple):
    """A launch as it was seen: the name of its C function, or else its row, and its arguments; which of them it writes
    to."""

    function: str | None
    row: Callable[..., None] | None
    arguments: list[Any]
    written: frozenset[int]

    def pointers(self) -> Iterator[tuple[Pointer, bool]]:
        """Its Arrays that have elements, and whether it writes to them."""
        for i, argument in enumerate(self.arguments):
            if argument.__class__ is Pointer and argument.data.size:
                yield argument, i in self.written


def _written(k: Any, name: str, function: str | None) -> frozenset[int]:
    """Outputs come first: of a row the first argument, unless it has none; of a C function what its prototype says."""
    if function is None:
        return frozenset() if name in CHECKS else frozenset({0})
    return frozenset(i for i, letter in enumerate(k.prototype(function)[1]) if letter == "w")


CHECKS = ("check_index",)
"""Rows without a result."""


class Recording:
    """The launches of this thread while it is entered, on the CPU; one at a time in a process, others wait.

    given:   dense Arrays that are others the next time
    allowed: what is not to be refused, since who runs the program sees to it; "writing" to any memory among it
    watcher: is asked about draws and gradients, by autograd.py and random.py
    """

    def __init__(self, k: Any, given: Sequence[Array] = (), allowed: Collection[str] = (), watcher: Any = None):
        self.k, self.allowed, self.watcher = k, allowed, watcher
        self.given = [(k.address_of(x), x.data.nbytes) for x in given]
        self._given = sorted((start, start + size) for start, size in self.given if size)
        self.blocks: list[Any] = []
        self.launches: list[Launch] = []

    def __enter__(self) -> Recording:
        refuse("a recording")
        _one.acquire()
        _local.recording, self.k.pool.allocated = self, self.blocks
        launch.observers.append(self._launched)
        launch.readers.append(self._read)
        return self

    def __exit__(self, *_: Any) -> None:
        launch.observers.remove(self._launched)
        launch.readers.remove(self._read)
        _local.recording = self.k.pool.allocated = None
        _one.release()

    def memory(self) -> list[tuple[int, int]]:
        """(address, bytes): of what was given, then of every block that was allocated since."""
        return [*self.given, *((self.k.integer(block.pointer), block.nbytes) for block in self.blocks)]

    def made_here(self, pointer: Pointer) -> bool:
        """Whether a pointer points into a block that was allocated since."""
        start, end = pointer.extent()
        return any(first <= start and end <= first + block.nbytes for block in reversed(self.blocks)
                   for first in (self.k.integer(block.pointer),))

    def _launched(self, name: str, arguments: tuple[Any, ...]) -> None:
        if recording() is not self:
            return
        function, row = self.k.chosen(name, arguments)
        kept = [Pointer(self.k.address_of(a), a.data) if a.__class__ is Array else a for a in arguments]
        seen = Launch(function, row, kept, _written(self.k, name, function))
        for pointer, written in seen.pointers():
            self._check(name, pointer, written)
        self.launches.append(seen)

    def _check(self, name: str, pointer: Pointer, written: bool) -> None:
        start, end = pointer.extent()
        at = bisect_right(self._given, (start, end))  # a piece that begins here and is as long comes before
        near = [piece for piece in self._given[max(0, at - 1):at + 1] if piece[0] < end and start < piece[1]]
        if any(start < first or last < end for first, last in near):
            raise RuntimeError(f"capture: {name} takes more of an array than what is given of it; pass all of it, or a "
                               "copy")
        if written and not near and "writing" not in self.allowed and not self.made_here(pointer):
            raise RuntimeError(f"capture: {name} writes to memory that is neither given nor made inside; pass it, or "
                               "name it in reads")

    def _read(self, array: Array) -> None:
        if recording() is self:
            raise RuntimeError("capture: elements are read on the host, and what follows from them would stay as it "
                               "is; read them outside of what is captured")
