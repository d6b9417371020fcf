"""Versioned parameters: readers hold old ones while the next are written.

Parameters update out of place. Each version lies in a flat buffer of its own, and committing it is one store of one
reference, so a reader sees the version before or the version after and never a mixture. A view keeps its buffer
alive; when no view of an old version is left, the engine's memory pool takes the buffer back and hands the same
memory out again for a later version. So the versions of a run circulate through a small ring of buffers (the current,
the next, as many as clocks still compute on, and what slow readers hold), with no bookkeeping here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType
from engine.sharder.partition import Parameter, Partition, Piece


class Version:
    """The parameters after `number` updates: all of them (shared), or the pieces of one shard."""

    __slots__ = ("flat", "number", "shared")

    def __init__(self, number: int, shared: bool, flat: Array):
        self.number, self.shared, self.flat = number, shared, flat

    def _start(self, piece: Piece) -> int:
        return piece.offset if self.shared else piece.local

    def piece(self, piece: Piece) -> Array:
        """What the update rule reads or writes: a flat Array over the piece."""
        start = self._start(piece)
        return self.flat.view(self.flat.data[start:start + piece.size])

    def read(self, piece: Piece) -> np.ndarray:
        """The piece, flat and read-only."""
        start = self._start(piece)
        return _read_only(self.flat.data[start:start + piece.size])

    def whole(self, parameter: Parameter) -> np.ndarray:
        """A parameter in its shape, read-only; of a shared version."""
        return _read_only(self.flat.data[parameter.offset:parameter.offset + parameter.size].reshape(parameter.shape))

    def __repr__(self) -> str:
        return f"Version({self.number}, {self.flat.size} elements)"


def _read_only(view: np.ndarray) -> np.ndarray:
    view.flags.writeable = False
    return view


class Versions:
    """The current version, the `older` ones before it, and the next one while `writers` write it.

    Shards that share an address space share one Versions: each writes its own pieces of the next version, and the
    version is current from the moment the last of them commits. A shard that is alone has one to itself.
    """

    def __init__(self, k: Backend, size: int, dtype: DType, number: int = 0, writers: int = 1, shared: bool = False,
                 older: int = 0):
        self.k, self.dtype, self.writers, self.shared = k, dtype, writers, shared
        self.current = Version(number, shared, k.empty((size,), dtype))
        self._kept: deque[Version] = deque([self.current], maxlen=older + 1)
        self._next: Version | None = None
        self._commits = 0
        self._lock = threading.Lock()

    def at(self, number: int) -> Version:
        """Version `number`, or the current one if there is none of that number (yet, or any more)."""
        current = self.current
        if number >= current.number:
            return current
        with self._lock:
            return next((version for version in self._kept if version.number == number), current)

    def reserve(self) -> Version:
        """Where the next version is to be written: the same buffer for every writer."""
        with self._lock:
            if self._next is None:
                flat = self.k.empty((self.current.flat.size,), self.dtype)
                self._next = Version(self.current.number + 1, self.shared, flat)
            return self._next

    def commit(self) -> None:
        """One writer has written its pieces; with the last one's call the next version becomes the current."""
        with self._lock:
            self._commits += 1
            if self._commits == self.writers:
                assert self._next is not None
                self._kept.append(self._next)
                self.current, self._next, self._commits = self._next, None, 0

    def discard(self) -> None:
        """Forget a next version that an interrupted run left half written."""
        with self._lock:
            self._next, self._commits = None, 0

    def kept(self) -> tuple[Version, ...]:
        """The current version and the older ones, oldest first."""
        with self._lock:
            return tuple(self._kept)

    def reset(self, kept: tuple[Version, ...]) -> None:
        """Go back to what kept() gave."""
        self.discard()
        self._kept.clear()
        self._kept.extend(kept)
        self.current = kept[-1]


class Counter:
    """Bytes that were copied because an array was not where or how it was needed. Of threads, in BSP and SSP, it stays
    at 0: there a parameter lies in one place."""

    def __init__(self) -> None:
        self.bytes = 0

    def copied(self, size: int) -> None:
        self.bytes += size


class Traffic:
    """Bytes that gradients took to be pushed, and what dense ones would have taken; how many pushes and pulls were sent
    again, since no answer came."""

    def __init__(self) -> None:
        self.sent = self.dense = self.again = 0
        self._lock = threading.Lock()

    def count(self, pieces: Sequence[Piece], gradients: Sequence[Any], itemsize: int) -> None:
        """One push: a gradient, an Array or a payload, for each piece."""
        self.add(sum(memoryview(gradient.data).nbytes for gradient in gradients),
                 sum(piece.size * itemsize for piece in pieces))

    def add(self, sent: int, dense: int, again: int = 0) -> None:
        with self._lock:
            self.sent += sent
            self.dense += dense
            self.again += again


def assemble(partition: Partition, values: Sequence[Version], k: Backend, counter: Counter) -> dict[str, np.ndarray]:
    """Every parameter in its shape, read-only, of `values` (one a shard): a view where it lies in one place, or a copy.
    """
    of_shards, dtype = dict(enumerate(values)), values[0].flat.dtype
    return {name: assemble_one(partition, name, of_shards, dtype, k, counter) for name in partition.parameters}


def assemble_one(partition: Partition, name: str, values: Mapping[int, Version], dtype: DType, k: Backend,
                 counter: Counter) -> np.ndarray:
    """One parameter, as assemble() has it, of the `values` of at least the shards that own it."""
    parameter = partition.parameters[name]
    parts = [(piece, values[s]) for s, piece in partition.parts[name]]
    if parts and parts[0][1].shared:
        return parts[0][1].whole(parameter)
    if len(parts) == 1:
        piece, version = parts[0]
        return version.read(piece).reshape(parameter.shape)
    whole = k.empty((parameter.size,), dtype)
    for piece, version in parts:
        k.cast(whole.view(whole.data[piece.start:piece.stop]), version.piece(piece))
    counter.copied(whole.data.nbytes)
    return _read_only(whole.data.reshape(parameter.shape))
