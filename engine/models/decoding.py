"""Decoding: one token after the other, as a program.

A token's launches are those of the token before it, one place further in the cache of keys and values: the same kernels
on the same weights, with some pointers and lengths a step larger. So three tokens are recorded, and if every number of
their programs goes on in equal steps, all others are the first one's program moved on (backend/program.py): the same
bits, without Python's share of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.backend import finishers, get_backend, observers
from engine.backend.program import Program
from engine.backend.recording import Recording, recording
from engine.nn.attention import GROWS
from engine.precision import product_format
from engine.tensor import Tensor

if TYPE_CHECKING:
    from engine.models.transformer import Cache, Transformer

ATTEMPTS = 6  # tokens that are recorded at most; the first may still make what is made once, as records of strides


class Decoding:
    """What a decoder expects next, token by token: a model, its cache, and an encoder's result where there is one."""

    def __init__(self, model: Transformer, cache: Cache, context: Tensor | None = None,
                 context_lengths: Tensor | None = None):
        self.model, self.cache, self.context, self.context_lengths = model, cache, context, context_lengths
        self._parameters = list(model.parameters())
        self._known = self._state()
        self._forget()

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocabulary) of what follows tokens (batch, time), which are added to the cache."""
        known = self._state()
        if known != self._known:
            self._known = known
            self._forget()
        if (tokens.shape[1] != 1 or self._attempts > ATTEMPTS or recording() is not None or observers or finishers
                or not get_backend(tokens.device).records):
            return self._plainly(tokens)
        return self._record(tokens) if self._program is None else self._go_on(self._program, tokens)

    def _forget(self) -> None:
        self._program: Program | None = None
        self._last: list[Program] = []  # of the last tokens, up to three, one after the other
        self._start = self._attempts = 0  # how much the cache held before the first of them; how many were recorded

    def _state(self) -> Any:
        """What a program depends on besides its tokens and the cache: modes, and where the parameters lie."""
        return product_format.get(), self.model.training, [id(p.array) for p in self._parameters]

    def _plainly(self, tokens: Tensor) -> Tensor:
        hidden = self.model.decode(tokens, self.context, context_lengths=self.context_lengths, cache=self.cache)
        return self.model.logits(hidden[:, -1])

    def _record(self, tokens: Tensor) -> Tensor:
        length = self.cache.length
        if length != self._start + len(self._last):
            self._last, self._start = [], length
        elif len(self._last) == 3:
            del self._last[0]
            self._start += 1
        with Recording(get_backend(tokens.device), [tokens.array], allowed=(GROWS, "writing")) as launches:
            logits = self._plainly(tokens)
        self._last.append(Program(launches, [logits.array]))
        self._attempts += 1
        if len(self._last) == 3 and self._last[0].goes_on(*self._last[1:]):
            self._program, self._last = self._last[0], []
        return logits

    def _go_on(self, program: Program, tokens: Tensor) -> Tensor:
        [logits] = program.run([tokens.array], places=self.cache.length - self._start)
        for layer in self.cache.layers:
            layer.own.length += 1
        return Tensor(logits, tokens.device)
