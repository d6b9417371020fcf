"""What workers keep of each microbatch from clock to clock: on shelves, marked, whatever happens.

What is kept belongs to a microbatch of a parameter, not to a worker or a shard, so results have the same bits for any
number of either; a microbatch that is computed again, in a clock that is not settled yet, begins with what it began
with before; and it is part of a checkpoint.

A Shelf lasts as long as the run does: in memory where workers are threads, in files where they may die
(drivers/residual_files.py). What lies on it is marked by the clock after which it is what is kept, and by the term in
which that clock was computed. For clock c the one of the newest clock before c counts, and of those the one of the
newest term:

    it is whole    c begins once every shard has all pushes of this microbatch before (in SSP the coordinator sees to
                   that), and what a clock leaves is on the shelf before its push is sent
    it is right    gradients are a function of clock and microbatch, so whoever computes a clock again, in this term or
                   a later one, by chance or because all went back, puts the same bits in the same place
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType
from engine.sharder.partition import Parameter, Piece

Mark = tuple[int, int]  # the clock after which it is kept, and the term of that clock


class Shelf(Protocol):
    """Where arrays are kept: by microbatch and parameter, and by mark."""

    def all(self) -> Iterable[tuple[int, str]]:
        """Every microbatch and parameter name of which there are any."""

    def marks(self, microbatch: int, parameter: Parameter) -> Iterable[Mark]: ...
    def read(self, microbatch: int, piece: Piece, mark: Mark) -> Array | None:
        """None: it was removed, since later clocks are running."""

    def write(self, microbatch: int, piece: Piece, mark: Mark, kept: Array) -> None:
        """It is there, whatever happens to this process, when this returns."""

    def remove(self, microbatch: int, parameter: Parameter, mark: Mark) -> None:
        """One that there may be."""


class InMemory:
    """The shelf of a process that everything ends with."""

    def __init__(self, k: Backend, dtype: DType):
        self.k, self.dtype = k, dtype
        self.kept: dict[tuple[int, str], dict[Mark, Array]] = {}  # whole parameters, flat

    def all(self) -> list[tuple[int, str]]:
        return [key for key, own in tuple(self.kept.items()) if own]

    def marks(self, microbatch: int, parameter: Parameter) -> tuple[Mark, ...]:
        return tuple(self.kept.get((microbatch, parameter.name), ()))

    def read(self, microbatch: int, piece: Piece, mark: Mark) -> Array:
        whole = self.kept[microbatch, piece.parameter.name][mark]
        return whole.view(whole.data[piece.start:piece.stop])

    def write(self, microbatch: int, piece: Piece, mark: Mark, kept: Array) -> None:
        own = self.kept.setdefault((microbatch, piece.parameter.name), {})
        if mark not in own:
            own[mark] = self.k.zeros((piece.parameter.size,), self.dtype)  # some pieces of it may never come
        self.k.cast(self.read(microbatch, piece, mark), kept)

    def remove(self, microbatch: int, parameter: Parameter, mark: Mark) -> None:
        del self.kept[microbatch, parameter.name][mark]


class Remembered:
    """One array of each microbatch of each parameter, zeros at first, from clock to clock.

    name:      by which a state() knows it, and a shelf
    staleness: of clocks in which a microbatch may still be computed again, so that what was kept before them stays
    every:     so many clocks lie between the versions that all may go back to; 0: there is but the term's first;
               None: nobody goes back
    """

    def __init__(self, name: str, k: Backend, dtype: DType, staleness: int = 0, every: int | None = None,
                 shelf: Shelf | None = None):
        self.name, self.k, self.dtype, self.staleness, self.every = name, k, dtype, staleness, every
        self.shelf: Shelf = shelf or InMemory(k, dtype)

    def before(self, clock: int, microbatch: int, piece: Piece) -> Array | None:
        """What a clock begins with, flat, of a piece of a parameter; not to be written to. None: it was removed, since
        later clocks are running."""
        mark = _newest(self.shelf.marks(microbatch, piece.parameter), clock)
        return self.k.zeros((piece.size,), self.dtype) if mark is None else self.shelf.read(microbatch, piece, mark)

    def keep(self, clock: int, microbatch: int, piece: Piece, kept: Array, term: int = 0, floor: int = 0) -> None:
        """What a clock leaves; what nobody will ask for goes. floor: no term will begin before this version."""
        marks = tuple(self.shelf.marks(microbatch, piece.parameter))
        if any(mark[::-1] > (term, clock) for mark in marks):
            return  # it is there, or was, and nobody needs it
        self.shelf.write(microbatch, piece, (clock, term), kept)
        # A clock may have left nothing; then what the one before it left is what counts after it, too.
        needed = {_newest(marks, after + 1) for after in self._needed(clock, floor)}
        for mark in marks:
            if mark[0] != clock and mark not in needed:
                self.shelf.remove(microbatch, piece.parameter, mark)

    def _needed(self, clock: int, floor: int) -> set[int]:
        """The clocks after which what is kept may be asked for again, by whoever computes this clock or goes back."""
        needed = set(range(clock - 1 - self.staleness, clock + 1))
        if self.every is not None:
            needed.add(floor - 1)
        if self.every:
            needed |= {version - 1 for version in range(floor - floor % self.every + self.every, clock + 1, self.every)}
        return needed

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────

    def state(self, parameters: Mapping[str, Parameter], clock: int) -> dict[str, np.ndarray]:
        """"<name>.<microbatch>/<parameter>" -> what a clock begins with, flat; copies."""
        found = {}
        for microbatch, name in sorted(self.shelf.all()):
            mark = _newest(self.shelf.marks(microbatch, parameters[name]), clock)  # workers may be ahead, and add some
            kept = None if mark is None else self.shelf.read(microbatch, whole(parameters[name]), mark)
            if kept is not None:
                found[f"{self.name}.{microbatch}/{name}"] = np.array(self.k.to_numpy(kept))
        return found

    def owns(self, key: str) -> bool:
        """Whether a key of a state is one of these."""
        return key.startswith(f"{self.name}.")

    def checked(self, parameters: Mapping[str, Parameter], state: Mapping[str, Any]) -> dict[tuple[int, str], Array]:
        """The arrays of a state(). Raises ValueError with one line for what does not fit."""
        kept = {}
        for key, value in state.items():
            microbatch, _, name = key.removeprefix(f"{self.name}.").partition("/")
            if not (self.owns(key) and microbatch.isdecimal() and name in parameters):
                raise ValueError(f"load: {key!r} is not expected")
            expected = (parameters[name].size,)
            if np.shape(value) != expected or np.asarray(value).dtype != self.dtype.numpy:
                raise ValueError(f"load: {key!r} is {np.asarray(value).dtype} {np.shape(value)}, "
                                 f"expected {self.dtype} {expected}")
            kept[int(microbatch), name] = self.k.array(value, self.dtype)
        return kept

    def load(self, parameters: Mapping[str, Parameter], state: Mapping[str, Any], clock: int) -> None:
        """Go on with a clock from a state(). Raises ValueError as checked() does, and changes nothing then."""
        self.replace(parameters, self.checked(parameters, state), clock)

    def replace(self, parameters: Mapping[str, Parameter], kept: Mapping[tuple[int, str], Array], clock: int) -> None:
        """Go on with a clock from what checked() gave."""
        for index, name in self.shelf.all():
            for mark in self.shelf.marks(index, parameters[name]):
                self.shelf.remove(index, parameters[name], mark)
        for (index, name), value in kept.items():
            self.shelf.write(index, whole(parameters[name]), (clock - 1, 0), value)


def _newest(marks: Iterable[Mark], clock: int) -> Mark | None:
    """The mark of what is kept before a clock."""
    return max((mark for mark in marks if mark[0] < clock), default=None)


def whole(parameter: Parameter) -> Piece:
    """A parameter as one piece."""
    return Piece(parameter, 0, parameter.size, 0)
