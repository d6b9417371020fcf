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
part of a checkpoint. It is also what this costs: two numbers a parameter and microbatch.

An element that is not finite is sent as one that is not (1bit: all of its sign in its block), and leaves no residual:
the server sees that training has failed, and nothing of it stays behind.

Seide, Fu, Droppo, Li, Yu 2014, "1-Bit Stochastic Gradient Descent", section 3; Karimireddy, Rebjock, Stich, Jaggi 2019,
arXiv:1901.09847, algorithm 1 and why it converges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType, bool_
from engine.optim.rules import AdamRule, Rule
from engine.sharder.codecs import Codec, OneBit, Payload, codec_of
from engine.sharder.partition import Parameter, Piece


def codec_for(text: str, rule: Rule) -> Codec:
    """The codec that `text` names. Raises ValueError, with the reason, if the update rule cannot work with it."""
    codec = codec_of(text)
    if isinstance(codec, OneBit) and isinstance(rule, AdamRule):
        raise ValueError(f"compress is '1bit' and the rule {type(rule).__name__}: all elements of a block arrive with "
                         "one size, so √v no longer tells them apart and Adam diverges (Tang et al. 2021, "
                         "arXiv:2102.02888); expected SGD with momentum, or another codec")
    return codec


class Compression:
    """A codec, and what it has left to say of each microbatch of each parameter.

    staleness: of clocks in which a microbatch may still be computed again, so that what was left before them is kept
    """

    def __init__(self, k: Backend, codec: Codec, dtype: DType, staleness: int = 0):
        self.k, self.codec, self.dtype, self.kept = k, codec, dtype, staleness + 2
        self.left: dict[tuple[int, str], dict[int, Array]] = {}  # by microbatch and parameter: e after each clock, flat

    def encode(self, clock: int, microbatch: int, piece: Piece, gradient: Array) -> Payload:
        """What to send of the gradient, flat, of a piece of a parameter."""
        k = self.k
        before, after = (whole.view(whole.data[piece.start:piece.stop])
                         for whole in self._around(clock, microbatch, piece.parameter))
        x = k.map("add", gradient, before)
        payload = self.codec.write(k, x)
        left = k.map("subtract", x, payload.decode(k, x.size, x.dtype))
        finite, zero = k.map("isfinite", left, dtype=bool_), k.constant(0.0, x.dtype)
        k.where(after, finite, left, zero, k.layout(after, finite, left, zero))
        return payload

    def _around(self, clock: int, microbatch: int, parameter: Parameter) -> tuple[Array, Array]:
        """e before a clock, and where to write e after it."""
        clocks = self.left.setdefault((microbatch, parameter.name), {})
        if clock not in clocks:
            for later in [c for c in clocks if c > clock]:  # training went back, and these will not have been
                del clocks[later]
            if not clocks:
                clocks[clock - 1] = self.k.zeros((parameter.size,), self.dtype)
            clocks[clock] = self.k.empty((parameter.size,), self.dtype)
            for old in sorted(clocks)[:-self.kept]:
                del clocks[old]
        return clocks[max(c for c in clocks if c < clock)], clocks[clock]

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────

    def state(self, clock: int) -> dict[str, np.ndarray]:
        """"residual.<microbatch>/<parameter>" -> e, flat, as it is before a clock; copies."""
        settled = {key: max((c for c in tuple(clocks) if c < clock), default=None)  # workers may be ahead, and add some
                   for key, clocks in sorted(self.left.items())}
        return {f"residual.{microbatch}/{name}": np.array(self.k.to_numpy(self.left[microbatch, name][last]))
                for (microbatch, name), last in settled.items() if last is not None}

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
            left[int(microbatch), name] = {clock - 1: self.k.array(value, self.dtype)}
        self.left = left
