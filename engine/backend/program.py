"""A program: recorded launches as an array of numbers that one C loop runs, with all temporaries in one arena.

A launch is {number of its kernel, number of its arguments, arguments ...}: what Python hands over through cffi, one
launch at a time, the loop reads from memory (tools/build_kernels.py writes it from kernels.h). A launch that runs a
NumPy row is a step of its own between two runs of the loop. Every pointer is an offset from a base:

    given    one of the given Arrays           its address is filled in before each run
    made     a block that holds a result       fresh memory for each run: results never change afterwards
    ARENA    a block that holds none           a place in the arena, while launches mention the block
    FIXED    memory that was there before      kept alive, and read and written where it is
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.backend.arena import Lifetime, place
from engine.backend.array import Array, Storage
from engine.backend.recording import Launch, Pointer, Recording

FIXED, ARENA = -2, -1  # bases; from 0 on the given Arrays, then the made blocks

Key = tuple[int, int, int, int]  # of a draw: seed, step, microbatch, site


class View(NamedTuple):
    """An array that begins `offset` bytes after its base; `data` is the array itself if its base is FIXED."""

    base: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    data: np.ndarray | None

    def over(self, buffer: Any) -> np.ndarray:
        return np.ndarray(self.shape, self.dtype, buffer, self.offset, self.strides)


class Row(NamedTuple):
    """A launch that runs a NumPy row, with Views for the arrays that are others in each run."""

    run: Callable[..., None]
    arguments: list[Any]


class Program:
    """The launches of a recording, and its results. key: of the draw that was to be next when it began.

    memory: the bytes of the arena; lifetimes: what lies in it, and when; launches: how many there are
    """

    def __init__(self, recording: Recording, results: Sequence[Array], key: Key = (0, 0, 0, 0)):
        self.k, self.launches, self._key = recording.k, len(recording.launches), key
        self._layout = _Layout(recording, results)
        self.lifetimes = self._layout.lifetimes
        self.memory = place(self.lifetimes)
        self._arena = self.k.pool.allocate(max(self.memory, 1))
        self._numbers: list[int] = []
        self._number_bases: list[int] = []
        self._steps: list[Any] = []  # Rows, and ranges of numbers that one C loop runs
        self._rows: list[Any] = []  # what tells rows apart
        self._draws: list[int] = []  # where keys stand among the numbers
        self._keep: list[Any] = []  # what FIXED pointers point to
        for each in recording.launches:
            self._add(each)
        self.results = [self._view(Pointer(self.k.address_of(y), y.data)) for y in results]
        self._link()

    # ── making it ───────────────────────────────────────────────────────────────────────────────────

    def _add(self, launch: Launch) -> None:
        if launch.function is None:
            arguments = [self._view(a) if a.__class__ is Pointer else a for a in launch.arguments]
            assert launch.row is not None
            self._rows.append([a[:5] if a.__class__ is View else repr(a) for a in (launch.row, *arguments)])
            self._steps.append(Row(launch.row, arguments))
            return
        start = len(self._numbers)
        kernel, kinds = self.k.prototype(launch.function)
        self._number(FIXED, kernel)
        self._number(FIXED, len(kinds))
        for kind, argument in zip(kinds, launch.arguments):
            self._argument(kind, argument)
        if kinds.endswith("#") and not (launch.function.startswith("attention") and launch.arguments[-5] == 0):
            self._draws.append(len(self._numbers) - 4)
        if self._steps and isinstance(self._steps[-1], range):
            start = self._steps.pop().start
        self._steps.append(range(start, len(self._numbers)))

    def _number(self, base: int, value: int) -> None:
        self._numbers.append(value if value < 1 << 63 else value - (1 << 64))
        self._number_bases.append(base)

    def _argument(self, kind: str, argument: Any) -> None:
        if argument.__class__ is Pointer:
            self._number(*self._view(argument)[:2])
        elif argument is None:
            self._number(FIXED, 0)
        elif kind == "d":
            self._number(FIXED, struct.unpack("q", struct.pack("d", argument))[0])
        elif kind in "i#":
            self._number(FIXED, int(argument))
        else:  # a layout, in memory of cffi's
            self._keep.append(argument)
            self._number(FIXED, self.k.integer(argument))

    def _view(self, pointer: Pointer) -> View:
        base, offset = self._layout.find(pointer)
        if base == FIXED:
            self._keep.append(pointer.data)
        data = pointer.data  # kept where it is FIXED: the rest of what was recorded is to be freed
        return View(base, offset, data.shape, data.strides, data.dtype, data if base == FIXED else None)

    def _link(self) -> None:
        """Pointers into the arena as addresses, and which numbers change from run to run."""
        arena = np.frombuffer(self._arena, np.uint8)
        bases = np.array(self._number_bases, np.int64)
        self._program = np.array(self._numbers, np.int64)
        self._program[bases == ARENA] += self.k.integer(self._arena.pointer)
        self._where = np.flatnonzero(bases >= 0)
        self._which, self._from = bases[self._where], self._program[self._where]
        at = np.array(self._draws, np.int64)
        self._stream = at[:, None] + np.arange(3)
        self._sites, self._site_offsets = at + 3, self._program[at + 3] - self._key[3]
        self._moving = np.zeros(0, np.int64)
        self._address = self.k.ffi.cast("int64_t *", self._program.ctypes.data)
        for step in self._steps:
            if step.__class__ is Row:
                for i, a in enumerate(step.arguments):
                    if a.__class__ is View and a.base < 0:
                        step.arguments[i] = a.data if a.base == FIXED else a.over(arena)

    def goes_on(self, second: Program, third: Program) -> bool:
        """Whether three programs, recorded one place after the other, differ by the same step in every number that
        differs: then this one can be run any number of places on, and from now on knows how.

        A place is what sizes and distances from fixed memory grow by, as the length of a cache of keys and values.
        """
        first, after, last = (np.array(p._numbers, np.int64) for p in (self, second, third))
        if not (self._frame() == second._frame() == third._frame()):
            return False
        step = after - first
        moving = np.flatnonzero(step)
        if (last - after != step).any() or (np.array(self._number_bases)[moving] != FIXED).any():
            return False
        self._moving, self._moving_from, self._moving_by = moving, first[moving], step[moving]
        return True

    def _frame(self) -> Any:
        """All of a program but its numbers."""
        return (self._number_bases, self._draws, self._layout.made, self.memory, self._rows,
                [y[:5] for y in self.results])

    # ── running it ──────────────────────────────────────────────────────────────────────────────────

    def run(self, given: Sequence[Array], key: Key = (0, 0, 0, 0), places: int = 0) -> list[Array]:
        """The results of the launches on Arrays of the shapes, types and (dense) layouts of those that were recorded.

        key:    of the next draw
        places: how far to go on from where it was recorded (goes_on)
        Not to be run by two threads at once. Raises what a row raises, as for an index out of its range.
        """
        k = self.k
        if len(self._moving):
            self._program[self._moving] = self._moving_from + places * self._moving_by
        made = [k.pool.allocate(size) for size in self._layout.made]
        if len(self._where):
            addresses = [*map(k.address_of, given), *(k.integer(block.pointer) for block in made)]
            self._program[self._where] = self._from + np.array(addresses, np.int64)[self._which]
        if self._draws:
            seed, step, microbatch, site = key
            self._program[self._stream] = (seed if seed < 1 << 63 else seed - (1 << 64), step, microbatch)
            self._program[self._sites] = site + self._site_offsets
        buffers = [*(x.data for x in given), *made]
        for part in self._steps:
            if part.__class__ is Row:
                with np.errstate(all="ignore"):
                    part.run(*[a.over(buffers[a.base]) if a.__class__ is View else a for a in part.arguments])
            else:
                k.lib.run_program(self._address + part.start, len(part))
        storages = [Storage() for _ in made]
        for storage, held in zip(storages, self._layout.results):
            storage.has_views = held > 1
        return [self._result(y, buffers, given, storages) for y in self.results]

    def _result(self, y: View, buffers: list[Any], given: Sequence[Array], storages: list[Storage]) -> Array:
        if y.data is not None:
            return self.k.map("copy", Array(y.data))
        if y.base < len(given):
            return given[y.base].view(y.over(buffers[y.base]))
        return Array(y.over(buffers[y.base]), storage=storages[y.base - len(given)])


class _Layout:
    """Which memory a pointer points into, and how long each block lives.

    made: the bytes of each block that holds a result; results: how many it holds
    """

    def __init__(self, recording: Recording, results: Sequence[Array]):
        memory, given = recording.memory(), len(recording.given)
        self._starts = sorted((start, i) for i, (start, size) in enumerate(memory) if size)
        self._sizes = [size for _, size in memory]
        self._bases = [*range(given), *[FIXED] * (len(memory) - given)]
        self._places: dict[int, Lifetime] = {}
        for number, launch in enumerate(recording.launches):
            for pointer, written in launch.pointers():
                self._mention(number, pointer, written)
        self.made: list[int] = []
        self.results: list[int] = []  # how many results each of these holds
        for y in results:
            piece, _ = self._piece(Pointer(recording.k.address_of(y), y.data)) or (None, 0)
            if piece is None or piece < given:
                continue
            if self._bases[piece] == ARENA or piece not in self._places:
                self._bases[piece] = given + len(self.made)
                self.made.append(self._sizes[piece])
                self.results.append(0)
            if self._bases[piece] != FIXED:
                self.results[self._bases[piece] - given] += 1
        self.lifetimes = [life for piece, life in self._places.items() if self._bases[piece] == ARENA]

    def _mention(self, number: int, pointer: Pointer, written: bool) -> None:
        """A block that a launch begins with by writing to it is a temporary; into another one somebody has written."""
        found = self._piece(pointer)
        if found is not None and self._bases[found[0]] < 0:
            life = self._places.get(found[0])
            if life is None:
                life = self._places[found[0]] = Lifetime(self._sizes[found[0]], number, number)
                self._bases[found[0]] = ARENA if written else FIXED
            life.last = number

    def _piece(self, pointer: Pointer) -> tuple[int, int] | None:
        """The given Array or block that a pointer points into, by its number, and how far; None if into neither."""
        at = bisect_right(self._starts, (pointer.address, len(self._starts))) - 1
        if at < 0 or not pointer.data.size:
            return None
        start, piece = self._starts[at]
        distance = pointer.address - start
        return (piece, distance) if distance < self._sizes[piece] else None

    def find(self, pointer: Pointer) -> tuple[int, int]:
        """(base, offset) of a pointer; of a FIXED one the offset is the address."""
        found = self._piece(pointer)
        if found is None or self._bases[found[0]] == FIXED:
            return FIXED, pointer.address
        piece, distance = found
        life = self._places.get(piece) if self._bases[piece] == ARENA else None
        return self._bases[piece], distance + (life.offset if life is not None else 0)
