"""Error feedback: what a codec leaves out of a gradient is kept, and added to the next one.

With e = 0 at first, and for each gradient g of a microbatch

    x = g + e          what there is to say
    p = write(x)       what is said: bytes
    e ← x − read(p)    what is left to say

so the sum of what was said follows the sum of the gradients, one residual behind. x = read(p) + e holds exactly, in x's
own number type (for 1bit to half an ulp of e), since codecs send numbers that make the difference exact
(backend/codec_rows.py), and read(p) is computed here as the receiver computes it.

The residual e belongs to a microbatch of a parameter, not to a worker or a shard, so results have the same bits for any
number of either; and a microbatch that is computed again within its clock is sent as it was. e is part of a checkpoint.

An element that is not finite is sent as one that is not (1bit: all of its sign in its block), and leaves no residual:
the server sees that training has failed, and nothing of it stays behind.

Seide, Fu, Droppo, Li, Yu 2014, "1-Bit Stochastic Gradient Descent", section 3; Karimireddy, Rebjock, Stich, Jaggi 2019,
arXiv:1901.09847, algorithm 1 and why it converges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType, bool_
from engine.optim.rules import AdamRule, Rule
from engine.sharder.codecs import Codec, OneBit, Payload
from engine.sharder.partition import Parameter, Piece


def check_rule(codec: Codec, rule: Rule) -> None:
    """Raise ValueError with the reason if the update rule cannot work with what the codec sends."""
    if isinstance(codec, OneBit) and isinstance(rule, AdamRule):
        raise ValueError(f"compress is '1bit' and the rule {type(rule).__name__}: all elements of a block arrive with "
                         "one size, so √v no longer tells them apart and Adam diverges (Tang et al. 2021, "
                         "arXiv:2102.02888); expected SGD with momentum, or another codec")


@dataclass
class Traffic:
    """Bytes that gradients took on their way, and what they would have taken as they are."""

    sent: int = 0
    dense: int = 0


class Compression:
    """A codec, and what it has left to say of each microbatch of each parameter."""

    def __init__(self, k: Backend, codec: Codec, dtype: DType):
        self.k, self.codec, self.dtype = k, codec, dtype
        self.residuals: dict[tuple[int, str], Array] = {}  # by microbatch and parameter: flat
        self.said: dict[tuple[int, str, int], tuple[int, Payload]] = {}  # by piece of it: clock, what was sent
        self.traffic = Traffic()

    def encode(self, clock: int, microbatch: int, piece: Piece, gradient: Array) -> Payload:
        """What to send of the gradient, flat, of a piece of a parameter."""
        key = microbatch, piece.parameter.name, piece.start
        said_at, payload = self.said.get(key, (-1, None))
        if payload is None or said_at != clock:
            payload = self._say(self._residual(microbatch, piece), gradient)
            self.said[key] = clock, payload
        self.traffic.sent += len(payload.data)
        self.traffic.dense += gradient.data.nbytes
        return payload

    def _residual(self, microbatch: int, piece: Piece) -> Array:
        """The part of a residual that belongs to a piece."""
        key = microbatch, piece.parameter.name
        if key not in self.residuals:
            self.residuals[key] = self.k.zeros((piece.parameter.size,), self.dtype)
        whole = self.residuals[key]
        return whole.view(whole.data[piece.start:piece.stop])

    def _say(self, residual: Array, gradient: Array) -> Payload:
        k = self.k
        x = k.map("add", gradient, residual)
        payload = self.codec.write(k, x)
        left = k.map("subtract", x, payload.decode(k, x.size, x.dtype))
        finite, zero = k.map("isfinite", left, dtype=bool_), k.constant(0.0, x.dtype)
        k.where(residual, finite, left, zero, k.layout(residual, finite, left, zero))
        return payload

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────

    def state(self) -> dict[str, np.ndarray]:
        """"residual.<microbatch>/<parameter>" -> what is left to say of it, flat; copies."""
        return {f"residual.{microbatch}/{name}": np.array(self.k.to_numpy(residual))
                for (microbatch, name), residual in sorted(self.residuals.items())}

    def load(self, parameters: Mapping[str, Parameter], state: Mapping[str, Any]) -> None:
        """Go on from a state(). Raises ValueError with one line, and changes nothing, if it does not fit."""
        residuals = {}
        for key, value in state.items():
            microbatch, _, name = key.removeprefix("residual.").partition("/")
            if not (key.startswith("residual.") and microbatch.isdecimal() and name in parameters):
                raise ValueError(f"load: {key!r} is not expected")
            expected = (parameters[name].size,)
            if np.shape(value) != expected or np.asarray(value).dtype != self.dtype.numpy:
                raise ValueError(f"load: {key!r} is {np.asarray(value).dtype} {np.shape(value)}, "
                                 f"expected {self.dtype} {expected}")
            residuals[int(microbatch), name] = self.k.array(value, self.dtype)
        self.residuals, self.said = residuals, {}
