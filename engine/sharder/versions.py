"""Versioned parameters: readers hold old ones while the next are written.

Parameters update out of place. Each version lies in a flat buffer of its own, and committing it is one store of one
reference, so a reader sees the version before or the version after and never a mixture. A view keeps its buffer
alive; when no view of an old version is left, the engine's memory pool takes the buffer back and hands the same
memory out again for a later version. So the versions of a run circulate through a small ring of buffers (two, plus
what slow readers hold), with no bookkeeping here.
"""

from __future__ import annotations

import threading

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType
from engine.sharder.partition import Parameter, Partition, Piece


class Version:
    """Elements [begin, begin + size) of the flat parameters after `number` clocks."""

    __slots__ = ("begin", "flat", "number")

    def __init__(self, number: int, begin: int, flat: Array):
        self.number = number
        self.begin = begin
        self.flat = flat

    def piece(self, piece: Piece) -> Array:
        """What the update rule reads or writes: a flat Array over the piece."""
        start = piece.offset - self.begin
        return self.flat.view(self.flat.data[start:start + piece.size])

    def read(self, piece: Piece) -> np.ndarray:
        """The piece, flat and read-only."""
        start = piece.offset - self.begin
        return _read_only(self.flat.data[start:start + piece.size])

    def holds(self, parameter: Parameter) -> bool:
        """Whether the whole parameter lies in here."""
        return self.begin <= parameter.offset and parameter.offset + parameter.size <= self.begin + self.flat.size

    def parameter(self, parameter: Parameter) -> np.ndarray:
        """The whole parameter in its shape, read-only."""
        start = parameter.offset - self.begin
        return _read_only(self.flat.data[start:start + parameter.size].reshape(parameter.shape))

    def __repr__(self) -> str:
        return f"Version({self.number}, elements {self.begin}..{self.begin + self.flat.size})"


def _read_only(view: np.ndarray) -> np.ndarray:
    view.flags.writeable = False
    return view


class Versions:
    """The current version of flat elements [begin, begin + size), and the next one while `writers` write it.

    Shards that share an address space share one Versions: each writes its own range of the next version, and the
    version is current from the moment the last of them commits. A shard that is alone has one to itself.
    """

    def __init__(self, k: Backend, begin: int, size: int, dtype: DType, number: int = 0, writers: int = 1):
        self.k, self.dtype, self.writers = k, dtype, writers
        self.current = Version(number, begin, k.empty((size,), dtype))
        self._next: Version | None = None
        self._commits = 0
        self._lock = threading.Lock()

    def reserve(self) -> Version:
        """Where the next version is to be written: the same buffer for every writer."""
        with self._lock:
            if self._next is None:
                begin, size = self.current.begin, self.current.flat.size
                self._next = Version(self.current.number + 1, begin, self.k.empty((size,), self.dtype))
            return self._next

    def commit(self) -> None:
        """One writer has written its range; with the last one's call the next version becomes the current."""
        with self._lock:
            self._commits += 1
            if self._commits == self.writers:
                assert self._next is not None
                self.current, self._next, self._commits = self._next, None, 0


    def discard(self) -> None:
        """Forget a next version that an interrupted run left half written."""
        with self._lock:
            self._next, self._commits = None, 0


class Counter:
    """Bytes that were copied because an array was not where or how it was needed. In one process it stays at 0."""

    def __init__(self) -> None:
        self.bytes = 0

    def copied(self, size: int) -> None:
        self.bytes += size


def assemble(partition: Partition, values: tuple[Version, ...], k: Backend, counter: Counter) -> dict[str, np.ndarray]:
    """Every parameter in its shape, read-only: a view where one of `values` (one a shard) holds it whole, or a copy."""
    held = {piece.parameter.name: version
            for pieces, version in zip(partition.pieces, values) for piece in pieces if version.holds(piece.parameter)}
    return {name: held[name].parameter(p) if name in held else _gather(partition, p, values, k, counter)
            for name, p in partition.parameters.items()}


def _gather(partition: Partition, parameter: Parameter, values: tuple[Version, ...], k: Backend,
            counter: Counter) -> np.ndarray:
    whole = k.empty((parameter.size,), values[0].flat.dtype)
    for pieces, version in zip(partition.pieces, values):
        for piece in pieces:
            if piece.parameter is parameter:
                k.cast(whole.view(whole.data[piece.start:piece.stop]), version.piece(piece))
    counter.copied(whole.data.nbytes)
    return _read_only(whole.data.reshape(parameter.shape))
