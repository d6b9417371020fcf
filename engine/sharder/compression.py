"""Error feedback: what a codec leaves out of a gradient is kept, and added to the next one.

With e = 0 at first, and for each gradient g of a microbatch

    x = g + e          what there is to say
    p = write(x)       what is said: bytes
    e ← x − read(p)    what is left to say

so the sum of what was said follows the sum of the gradients, one residual behind. x = read(p) + e holds exactly, in x's
own number type (for 1bit to half an ulp of e), since codecs send numbers that make the difference exact
(backend/codec_rows.py), and read(p) is computed here as the receiver computes it.

The residual e belongs to a microbatch of a parameter, not to a worker or a shard, so results have the same bits for any
number of either; a microbatch that is computed again, in a clock that is not settled yet, is sent as it was; and e is
part of a checkpoint. It is also what this costs: two numbers a parameter and microbatch, and more where training may go
back.

Residuals lie on a Shelf, which lasts as long as the run does: in memory where workers are threads, in files where they
may die (drivers/residual_files.py). Each is marked by the clock after which it is what is left, and by the term in
which that clock was computed. For clock c the one of the newest clock before c counts, and of those the one of the
newest term:

    it is whole    c begins once every shard has all pushes of this microbatch before (in SSP the coordinator sees to
                   that), and what a push leaves is on the shelf before the push is sent
    it is right    gradients are a function of clock and microbatch, so whoever computes a clock again, in this term or
                   a later one, by chance or because all went back, puts the same bits in the same place

An element that is not finite is sent as one that is not (1bit: all of its sign in its block), and leaves no residual:
the server sees that training has failed, and nothing of it stays behind.

Seide, Fu, Droppo, Li, Yu 2014, "1-Bit Stochastic Gradient Descent", section 3; Karimireddy, Rebjock, Stich, Jaggi 2019,
arXiv:1901.09847, algorithm 1 and why it converges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType, bool_
from engine.optim.rules import AdagradRule, AdamRule, RMSpropRule, Rule
from engine.sharder.codecs import Codec, OneBit, Payload, codec_of
from engine.sharder.partition import Parameter, Piece
from engine.sharder.setup import Setup


def codec_for(text: str, rule: Rule) -> Codec:
    """The codec that `text` names. Raises ValueError, with the reason, if the update rule cannot work with it."""
    codec = codec_of(text)
    if isinstance(codec, OneBit) and isinstance(rule, (AdamRule, AdagradRule, RMSpropRule)):
        raise ValueError(f"compress is '1bit' and the rule {type(rule).__name__}: all elements of a block arrive with "
                         "one size, so √v no longer tells them apart and Adam diverges (Tang et al. 2021, "
                         "arXiv:2102.02888), as may what else divides by √v; expected SGD with momentum, or another "
                         "codec")
    return codec


Mark = tuple[int, int]  # the clock after which it is left, and the term of that clock


class Shelf(Protocol):
    """Where residuals are kept: by microbatch and parameter, and by mark."""

    def all(self) -> Iterable[tuple[int, str]]:
        """Every microbatch and parameter name of which there are any."""

    def marks(self, microbatch: int, parameter: Parameter) -> Iterable[Mark]: ...
    def read(self, microbatch: int, piece: Piece, mark: Mark) -> Array | None:
        """None: it was removed, since later clocks are running."""

    def write(self, microbatch: int, piece: Piece, mark: Mark, left: Array) -> None:
        """It is there, whatever happens to this process, when this returns."""

    def remove(self, microbatch: int, parameter: Parameter, mark: Mark) -> None:
        """One that there may be."""


class InMemory:
    """The shelf of a process that everything ends with."""

    def __init__(self, k: Backend, dtype: DType):
        self.k, self.dtype = k, dtype
        self.left: dict[tuple[int, str], dict[Mark, Array]] = {}  # whole parameters, flat

    def all(self) -> list[tuple[int, str]]:
        return [key for key, own in tuple(self.left.items()) if own]

    def marks(self, microbatch: int, parameter: Parameter) -> tuple[Mark, ...]:
        return tuple(self.left.get((microbatch, parameter.name), ()))

    def read(self, microbatch: int, piece: Piece, mark: Mark) -> Array:
        whole = self.left[microbatch, piece.parameter.name][mark]
        return whole.view(whole.data[piece.start:piece.stop])

    def write(self, microbatch: int, piece: Piece, mark: Mark, left: Array) -> None:
        own = self.left.setdefault((microbatch, piece.parameter.name), {})
        if mark not in own:
            own[mark] = self.k.zeros((piece.parameter.size,), self.dtype)  # some pieces of it may never come
        self.k.cast(self.read(microbatch, piece, mark), left)

    def remove(self, microbatch: int, parameter: Parameter, mark: Mark) -> None:
        del self.left[microbatch, parameter.name][mark]


class Compression:
    """A codec, and what it has left to say of each microbatch of each parameter.

    staleness: of clocks in which a microbatch may still be computed again, so that what was left before them is kept
    every:     so many clocks lie between the versions that all may go back to; 0: there is but the term's first;
               None: nobody goes back
    """

    def __init__(self, k: Backend, codec: Codec, dtype: DType, staleness: int = 0, every: int | None = None,
                 shelf: Shelf | None = None):
        self.k, self.codec, self.dtype, self.staleness, self.every = k, codec, dtype, staleness, every
        self.shelf: Shelf = shelf or InMemory(k, dtype)

    def encode(self, clock: int, microbatch: int, piece: Piece, gradient: Array, term: int = 0,
               floor: int = 0) -> Payload:
        """What to send of the gradient, flat, of a piece of a parameter. floor: no term will begin before this version.
        """
        k = self.k
        marks = tuple(self.shelf.marks(microbatch, piece.parameter))
        before = _newest(marks, clock)
        e = k.zeros((piece.size,), self.dtype) if before is None else self.shelf.read(microbatch, piece, before)
        x = gradient if e is None else k.map("add", gradient, e)
        payload = self.codec.write(k, x)
        left = k.map("subtract", x, payload.decode(k, x.size, x.dtype))
        finite, zero = k.map("isfinite", left, dtype=bool_), k.constant(0.0, x.dtype)
        kept = k.empty_like(left)
        k.where(kept, finite, left, zero, k.layout(kept, finite, left, zero))
        if e is not None and not any(mark[::-1] > (term, clock) for mark in marks):  # else there is, or was, no need
            self.shelf.write(microbatch, piece, (clock, term), kept)
            needed = self._needed(clock, floor)
            for mark in marks:
                if mark[0] not in needed and mark != before:  # which the parameter's other pieces still begin with
                    self.shelf.remove(microbatch, piece.parameter, mark)
        return payload

    def _needed(self, clock: int, floor: int) -> set[int]:
        """The clocks after which what is left may be asked for again, by whoever computes this clock or goes back."""
        needed = set(range(clock - 1 - self.staleness, clock + 1))
        if self.every is not None:
            needed.add(floor - 1)
        if self.every:
            needed |= {version - 1 for version in range(floor - floor % self.every + self.every, clock + 1, self.every)}
        return needed

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────

    def state(self, parameters: Mapping[str, Parameter], clock: int) -> dict[str, np.ndarray]:
        """"residual.<microbatch>/<parameter>" -> e, flat, as it is before a clock; copies."""
        found = {}
        for microbatch, name in sorted(self.shelf.all()):
            mark = _newest(self.shelf.marks(microbatch, parameters[name]), clock)  # workers may be ahead, and add some
            left = None if mark is None else self.shelf.read(microbatch, _whole(parameters[name]), mark)
            if left is not None:
                found[f"residual.{microbatch}/{name}"] = np.array(self.k.to_numpy(left))
        return found

    def load(self, parameters: Mapping[str, Parameter], state: Mapping[str, Any], clock: int) -> None:
        """Go on with a clock from a state(). Raises ValueError with one line, changing nothing, if it does not fit."""
        left = {}
        for key, value in state.items():
            microbatch, _, name = key.removeprefix("residual.").partition("/")
            if not (key.startswith("residual.") and microbatch.isdecimal() and name in parameters):
                raise ValueError(f"load: {key!r} is not expected")
            expected = (parameters[name].size,)
            if np.shape(value) != expected or np.asarray(value).dtype != self.dtype.numpy:
                raise ValueError(f"load: {key!r} is {np.asarray(value).dtype} {np.shape(value)}, "
                                 f"expected {self.dtype} {expected}")
            left[int(microbatch), name] = self.k.array(value, self.dtype)
        for index, name in self.shelf.all():
            for mark in self.shelf.marks(index, parameters[name]):
                self.shelf.remove(index, parameters[name], mark)
        for (index, name), value in left.items():
            self.shelf.write(index, _whole(parameters[name]), (clock - 1, 0), value)


def expect_repeatable(driver: str, setup: Setup) -> None:
    """Raise ValueError, with one line, if a driver in which workers die would have residuals that depend on it."""
    consistency = setup.consistency
    if setup.compress is not None and (consistency.asynchronous or consistency.backups):
        which = "asp" if consistency.asynchronous else "has backups"
        raise ValueError(f"{driver}: compress is {setup.compress!r} and consistency {which}: what a microbatch has "
                         "left to say would depend on who died when; expected bsp or ssp, without backups")


def compression_of(setup: Setup, goes_back: bool, shelf: Shelf | None = None) -> Compression | None:
    """As the setup says; None: gradients travel as they are. Raises ValueError as codec_for does.

    goes_back: whether a shard that is lost takes all back to a snapshot
    """
    if setup.compress is None:
        return None
    codec, every = codec_for(setup.compress, setup.rule), setup.save_every if goes_back else None
    return Compression(setup.k, codec, setup.dtype, setup.consistency.staleness, every, shelf)


def _newest(marks: Iterable[Mark], clock: int) -> Mark | None:
    """The mark of what is left before a clock."""
    return max((mark for mark in marks if mark[0] < clock), default=None)


def _whole(parameter: Parameter) -> Piece:
    """A parameter as one piece."""
    return Piece(parameter, 0, parameter.size, 0)
