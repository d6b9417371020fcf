"""Error feedback: what a codec leaves out of a gradient is kept, and added to the next one.

With e = 0 at first, and for each gradient g of a microbatch

    x = g + e          what there is to say
    p = write(x)       what is said: bytes
    e ← x − read(p)    what is left to say

so the sum of what was said follows the sum of the gradients, one residual behind. x = read(p) + e holds exactly, in x's
own number type (for 1bit to half an ulp of e), since codecs send numbers that make the difference exact
(backend/codec_rows.py), and read(p) is computed here as the receiver computes it.

The residual e is remembered by microbatch (shelves.py), and is what this costs: two numbers a parameter and microbatch,
and more where training may go back.

An element that is not finite is sent as one that is not (1bit: all of its sign in its block), and leaves no residual:
the server sees that training has failed, and nothing of it stays behind.

Seide, Fu, Droppo, Li, Yu 2014, "1-Bit Stochastic Gradient Descent", section 3; Karimireddy, Rebjock, Stich, Jaggi 2019,
arXiv:1901.09847, algorithm 1 and why it converges.
"""

from __future__ import annotations

from engine.backend import Array, Backend
from engine.dtypes import DType, bool_
from engine.optim.rules import AdagradRule, AdamRule, RMSpropRule, Rule
from engine.sharder.codecs import Codec, OneBit, Payload, codec_of
from engine.sharder.partition import Piece
from engine.sharder.shelves import Remembered, Shelf


def codec_for(text: str, rule: Rule) -> Codec:
    """The codec that `text` names. Raises ValueError, with the reason, if the update rule cannot work with it."""
    codec = codec_of(text)
    if isinstance(codec, OneBit) and isinstance(rule, (AdamRule, AdagradRule, RMSpropRule)):
        raise ValueError(f"compress is '1bit' and the rule {type(rule).__name__}: all elements of a block arrive with "
                         "one size, so √v no longer tells them apart and Adam diverges (Tang et al. 2021, "
                         "arXiv:2102.02888), as may what else divides by √v; expected SGD with momentum, or another "
                         "codec")
    return codec


class Compression(Remembered):
    """A codec, and what it has left to say of each microbatch of each parameter."""

    def __init__(self, k: Backend, codec: Codec, dtype: DType, staleness: int = 0, every: int | None = None,
                 shelf: Shelf | None = None):
        super().__init__("residual", k, dtype, staleness, every, shelf)
        self.codec = codec

    def encode(self, clock: int, microbatch: int, piece: Piece, gradient: Array, term: int = 0,
               floor: int = 0) -> Payload:
        """What to send of the gradient, flat, of a piece of a parameter. floor: no term will begin before this version.
        """
        k = self.k
        e = self.before(clock, microbatch, piece)
        x = gradient if e is None else k.map("add", gradient, e)
        payload = self.codec.write(k, x)
        if e is not None:  # else nobody waits for this
            left = k.map("subtract", x, payload.decode(k, x.size, x.dtype))
            finite, zero = k.map("isfinite", left, dtype=bool_), k.constant(0.0, x.dtype)
            kept = k.empty_like(left)
            k.where(kept, finite, left, zero, k.layout(kept, finite, left, zero))
            self.keep(clock, microbatch, piece, kept, term, floor)
        return payload
