"""Residuals in files, where they outlive the worker that wrote them: a shelf (shelves.py) for workers that may die.

    <folder>/<microbatch>-<parameter>/<clock>-<term>       the elements, as they lie in memory

What local rules keep lies beside them in the same way, in a folder for each slot.

parameter is its number in the order of all. A worker writes what a push leaves before it sends the push, into its place
in the file and over whatever is there, since nothing else than the same bits can be. So there is no moment at which a
residual is neither to be had nor to be made again, and none at which two workers disturb each other. When a process is
killed, the system still has what it wrote; only where the computer may be lost is it synchronised, too.

On one computer this costs a write and a read of memory. It is memory that would be lost with a worker otherwise, so it
has to leave the worker, uncompressed, by whatever way; the other ways are dearer. Sent along with the push, it would
take the bytes that compression saves, on the very links that it saves them on. To save it only now and then, and to
have all go back when a worker dies, would make the loss of a worker, which costs one microbatch, as dear as that of a
shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType
from engine.sharder.partition import Parameter, Piece
from engine.sharder.setup import Setup
from engine.sharder.shelves import Mark

KEPT = "kept"  # by workers, in a run's folder


def shelves_of(folder: Path, setup: Setup, synchronised: bool = False) -> Callable[[str], InFiles]:
    """By name, the shelves of a run, in its folder."""
    return lambda name: InFiles(folder / f"{KEPT}-{name}", list(setup.shapes), setup.k, setup.dtype, synchronised)


class InFiles:
    """A shelf in a folder. synchronised: whether what is written is on the disk at once, not only with the system."""

    def __init__(self, folder: Path, parameters: Sequence[str], k: Backend, dtype: DType, synchronised: bool = False):
        self.folder, self.k, self.dtype, self.synchronised = folder, k, dtype, synchronised
        self.names, self.numbers = parameters, {name: number for number, name in enumerate(parameters)}

    def _folder(self, microbatch: int, parameter: Parameter) -> Path:
        return self.folder / f"{microbatch}-{self.numbers[parameter.name]}"

    def _path(self, microbatch: int, parameter: Parameter, mark: Mark) -> Path:
        return self._folder(microbatch, parameter) / f"{mark[0]}-{mark[1]}"

    def all(self) -> list[tuple[int, str]]:
        pairs = (name.split("-") for name in _listed(self.folder))
        return [(int(microbatch), self.names[int(number)]) for microbatch, number in pairs]

    def marks(self, microbatch: int, parameter: Parameter) -> list[Mark]:
        return [_mark(name) for name in _listed(self._folder(microbatch, parameter))]

    def read(self, microbatch: int, piece: Piece, mark: Mark) -> Array | None:
        try:
            found = np.fromfile(self._path(microbatch, piece.parameter, mark), self.dtype.numpy, piece.size,
                                offset=piece.start * self.dtype.itemsize)
        except FileNotFoundError:
            return None
        return self.k.from_numpy(found)

    def write(self, microbatch: int, piece: Piece, mark: Mark, left: Array) -> None:
        path = self._path(microbatch, piece.parameter, mark)
        for folder in (self.folder, path.parent):  # not its parents: a run's folder that was removed does not come back
            folder.mkdir(exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            data, end = self.k.to_numpy(left).view(np.uint8).data, piece.start * self.dtype.itemsize
            while data:
                written = os.pwrite(file, data, end)
                data, end = data[written:], end + written
            if self.synchronised:
                os.fsync(file)
        finally:
            os.close(file)

    def remove(self, microbatch: int, parameter: Parameter, mark: Mark) -> None:
        self._path(microbatch, parameter, mark).unlink(missing_ok=True)


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _mark(name: str) -> Mark:
    clock, _, term = name.rpartition("-")
    return int(clock), int(term)
