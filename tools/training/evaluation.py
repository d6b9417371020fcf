"""How well a model predicts a text: bits per byte and perplexity.

Every token but the first is predicted once, from up to `context` tokens before it. With windows that begin
`stride` tokens apart, a window scores only its last `stride` predictions, so each but the first window's has at
least context − stride tokens to look back on: a smaller stride costs more and predicts better.

    bits per byte = Σ −log2 p(token | before) / bytes of the predicted tokens     compares across tokenizers
    perplexity    = 2^(Σ −log2 p(token | before) / predicted tokens)              does not
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, log
from typing import Any

import numpy as np

import engine as eg
from tools.training.errors import ProgramError


@dataclass(frozen=True)
class Score:
    """The sum over a text: information in bits, predicted tokens, and the bytes they stand for."""

    bits: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes

    @property
    def perplexity(self) -> float:
        """Infinite where a float64 cannot hold it."""
        bits = self.bits / self.tokens
        return 2.0**bits if bits < 1024 else inf


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int]]:
    """(begin, scored): window [begin, begin + context) of the inputs scores its last `scored` predictions.

    length counts predictions; the last window is moved back to end with the text.
    """
    begin, done = 0, 0
    while done < length:
        end = min(begin + context, length)
        yield max(0, end - context), end - done
        done, begin = end, begin + stride


def score(model: Any, tokens: np.ndarray, byte_lengths: np.ndarray, context: int, stride: int | None = None,
          batch: int = 16, progress: Callable[[int, int], None] | None = None) -> Score:
    """Score a model on one row of tokens. stride None: context, that is windows side by side."""
    stride = context if stride is None else stride
    if len(tokens) < 2:
        raise ProgramError(f"the text has {len(tokens)} tokens; at least 2 are needed to predict one from another")
    if not 1 <= stride <= context:
        raise ProgramError(f"--stride is {stride}, expected 1 to {context}, the model's context")
    places = list(windows(len(tokens) - 1, context, stride))
    return score_places(model, tokens, byte_lengths, places, min(context, len(tokens) - 1), batch, progress)


def sampled_score(model: Any, tokens: np.ndarray, byte_lengths: np.ndarray, context: int, count: int) -> Score:
    """A quick estimate: `count` windows, evenly spread over the text and the same each time, each scored whole."""
    width = min(context, len(tokens) - 1)
    starts = np.linspace(0, len(tokens) - 1 - width, count).astype(int)
    return score_places(model, tokens, byte_lengths, [(int(start), width) for start in starts], width)


def score_places(model: Any, tokens: np.ndarray, byte_lengths: np.ndarray, places: list[tuple[int, int]], width: int,
                 batch: int = 16, progress: Callable[[int, int], None] | None = None) -> Score:
    """Sum over windows (begin, scored), each `width` tokens long; in float64, in the order of the text."""
    bits, count, size = 0.0, 0, 0
    for first in range(0, len(places), batch):
        rows = places[first:first + batch]
        text = np.stack([tokens[begin:begin + width + 1] for begin, _ in rows]).astype(np.int64)
        inputs, targets = np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])
        with eg.no_grad():
            losses = eg.cross_entropy(model(eg.tensor(inputs)), eg.tensor(targets), reduction="none").numpy()
        is_scored = np.arange(width) >= width - np.array([[scored] for _, scored in rows])
        bits += float(losses.reshape(is_scored.shape)[is_scored].sum(dtype=np.float64)) / log(2)
        count += int(is_scored.sum())
        size += int(byte_lengths[targets[is_scored]].sum())
        if progress is not None:
            progress(min(first + batch, len(places)), len(places))
    return Score(bits, count, size)
