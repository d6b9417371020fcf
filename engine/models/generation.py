"""Generation: continue a text by drawing one token after the other from what the model expects next.

What is drawn from follows from the logits in this order, in float64 on the host:

    repetition penalty θ   x ← x/θ if x > 0 else x·θ, for tokens that occurred    Keskar et al. 2019, arXiv:1909.05858
    temperature T          p = softmax(x / T); T = 0 takes the largest x
    top_k                  only the k most probable tokens                        Fan et al. 2018, arXiv:1805.04833
    top_p                  only the most probable tokens that together have p     Holtzman et al. 2019, arXiv:1904.09751

Keskar et al. divide every x by θ, which would make a token of negative x more probable; so those are multiplied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import ops
from engine.autograd import no_grad
from engine.dtypes import float64, int64
from engine.models.decoding import Decoding
from engine.random import Generator, default_generator
from engine.tensor import Tensor, tensor

if TYPE_CHECKING:
    from engine.models.transformer import Cache, Transformer


def generate(model: Transformer, prompt: Any, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
             num_samples: int | None = None, stop: int | Collection[int] = (), generator: Generator | None = None,
             source: Tensor | None = None, source_lengths: Tensor | None = None) -> Iterator[Any]:
    """Continue a prompt, yielding each token as soon as it is drawn.

        for token in model.generate(prompt, 100, temperature=0.8, top_p=0.95): ...                 ints
        for tokens in model.generate(prompt, 100, num_samples=3): ...                              tuples of 3

    prompt:      token ids: a list, or an integer array or tensor (time,) or (1, time)
    num_samples: draw so many continuations side by side: each step yields a tuple of one token each, None for those
                 that have ended. A sample is the same whether it is drawn alone or among others.
    stop:        a token or several: a sample ends with the first of them (which is still yielded)
    generator:   where the draws come from (default: the default generator); one key a step
    source:      (1, source time), what an encoder-decoder's encoder reads; source_lengths as in forward

    The model sees at most context_length tokens. When they are full, it goes on from the last half of them, which
    from then on stand at positions 0, 1 ...: so a step costs the same however long the text, and its prediction looks
    back on at least half a context.

    Nothing is prepared behind this call. Who wants more than some ten tokens asks for it once: model.for_inference()
    has the same weights in panels, and writes the same text sooner; for_inference("q8_0") has fewer bits to read.

    Raises ValueError at the call, with one line, for arguments outside their range.
    """
    text = _prompt(prompt)
    stops = _stops(stop)
    samples = 1 if num_samples is None else num_samples
    config = model.config
    rules = [("max_new_tokens", max_new_tokens, _whole(max_new_tokens) and max_new_tokens >= 0,
              "a whole number of at least 0"),
             ("temperature", temperature, 0 <= temperature < np.inf, "a number of at least 0"),
             ("top_k", top_k, top_k is None or (_whole(top_k) and top_k >= 1), "a whole number of at least 1, or None"),
             ("top_p", top_p, top_p is None or 0 < top_p <= 1, "a number in (0, 1], or None"),
             ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < np.inf, "a positive number"),
             ("num_samples", num_samples, _whole(samples) and samples >= 1, "a whole number of at least 1, or None"),
             ("the prompt's length", text.size, 1 <= text.size <= config.context_length,
              f"1 to context_length = {config.context_length}"),
             ("source", getattr(source, "shape", source), _source_fits(config.kind, source),
              "(1, source time) for an encoder-decoder, None for a decoder"),
             ("model.training", True, not (model.training and config.dropout), "False: call model.eval() first")]
    if model.decoder is None:
        raise ValueError("generate: a model of kind 'encoder' does not generate")
    for name, value, holds, expected in rules:
        if not holds:
            raise ValueError(f"generate: {name} is {value!r}, expected {expected}")
    if text.min() < 0 or text.max() >= config.vocab_size:
        raise ValueError(f"generate: the prompt holds tokens from {text.min()} to {text.max()}, "
                         f"expected [0, {config.vocab_size})")
    steps = _Continuation(model, np.tile(text, (samples, 1)), source, source_lengths)
    draw = _Draw(temperature, top_k, top_p, repetition_penalty, generator or default_generator())
    tokens = _stream(steps, draw, max_new_tokens, stops)
    return (token for token, in tokens) if num_samples is None else tokens


def _source_fits(kind: str, source: Any) -> bool:
    if kind == "decoder":
        return source is None
    return isinstance(source, Tensor) and source.ndim == 2 and source.shape[0] == 1


def _whole(x: Any) -> bool:
    return isinstance(x, (int, np.integer))


def _stops(stop: Any) -> frozenset[Any]:
    tokens = np.asarray(list(stop) if isinstance(stop, (set, frozenset)) else stop)
    if tokens.size and tokens.dtype.kind not in "iu":
        raise ValueError(f"generate: stop is {stop!r:.100}, expected a token or several, which are whole numbers")
    return frozenset(tokens.reshape(-1).tolist())


def _prompt(prompt: Any) -> np.ndarray:
    tokens = np.asarray(prompt)
    if tokens.size and (tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2) or tokens.size != tokens.shape[-1]):
        raise ValueError(f"generate: the prompt is {tokens.dtype} {tokens.shape}, "
                         "expected integers (time,) or (1, time)")
    return tokens.reshape(-1).astype(np.int64)


def _stream(steps: _Continuation, draw: _Draw, max_new_tokens: int, stops: frozenset[Any]) -> Iterator[tuple[Any, ...]]:
    alive = np.ones(len(steps.text), bool)
    for _ in range(max_new_tokens):
        tokens = draw(steps.next_logits(), steps.text)
        yield tuple(int(token) if here else None for token, here in zip(tokens, alive))
        alive &= ~np.isin(tokens, list(stops))
        if not alive.any():
            return
        steps.append(tokens)


class _Continuation:
    """Texts that grow token by token, (samples, time), and the model's view of them."""

    def __init__(self, model: Transformer, text: np.ndarray, source: Tensor | None, source_lengths: Tensor | None):
        self.model, self.text = model, text
        self.new = text  # what the model has not seen yet
        samples = len(text)
        context: Tensor | None = None
        context_lengths: Tensor | None = None
        if source is not None:
            with no_grad():
                context = ops.repeat(model.encode(source, source_lengths), samples, 0)
                if source_lengths is not None:
                    context_lengths = ops.repeat(source_lengths, samples, 0)
        self.cache: Cache = model.make_cache(samples, source_length=0 if source is None else source.shape[1])
        self.decoding = Decoding(model, self.cache, context, context_lengths)

    def next_logits(self) -> np.ndarray:
        """The logits of the token that comes next, (samples, vocabulary)."""
        if self.cache.length + self.new.shape[1] > self.cache.capacity:
            self.cache.clear()
            self.new = self.text[:, -max(1, self.cache.capacity // 2):]
        with no_grad():  # not across a yield, where the caller's code runs
            tokens = tensor(self.new, dtype=int64, device=self.model.embedding.weight.device)
            return self.decoding.logits(tokens).numpy()

    def append(self, tokens: np.ndarray) -> None:
        self.new = tokens[:, None]
        self.text = np.concatenate([self.text, self.new], axis=1)


class _Draw:
    """The settings of sampling, and where its random numbers come from."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float,
                 generator: Generator):
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.repetition_penalty, self.generator = repetition_penalty, generator

    def __call__(self, logits: np.ndarray, text: np.ndarray) -> np.ndarray:
        """One token for each row of logits (samples, vocabulary), int64."""
        with np.errstate(over="ignore"):
            logits = penalized(logits.astype(np.float64), text, self.repetition_penalty)
        largest = logits.max(axis=1)
        if not np.isfinite(largest).all():
            raise ValueError(f"generate: the largest logit is {largest[~np.isfinite(largest)][0]}, expected a finite "
                             "number to draw by")
        if self.temperature == 0:
            return logits.argmax(axis=1)
        cumulative = distribution(logits, self.temperature, self.top_k, self.top_p).cumsum(axis=1)
        # One number a sample, which depends on the step's key and the sample's index alone.
        u = ops.rand(len(logits), dtype=float64, generator=self.generator).numpy()
        # The first token whose cumulative probability is above u: the total, which rounding moves, is divided out.
        return (cumulative / cumulative[:, -1:] <= u[:, None]).sum(axis=1)


def penalized(logits: np.ndarray, text: np.ndarray, penalty: float) -> np.ndarray:
    """Logits (samples, vocabulary) after the repetition penalty for the tokens of text (samples, time)."""
    if penalty == 1:
        return logits
    occurred = np.zeros(logits.shape, bool)
    np.put_along_axis(occurred, text, True, axis=1)
    return np.where(occurred, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None) -> np.ndarray:
    """What is drawn from, (samples, vocabulary) in float64: zero outside top_k and top_p, the rest sums to 1.

    Among equal logits the token with the smaller index counts as the more probable.
    """
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    if top_k is None and top_p is None:
        p = np.exp(scaled)
        return p / p.sum(axis=1, keepdims=True)
    order = np.argsort(-scaled, axis=1, kind="stable")
    p = np.exp(np.take_along_axis(scaled, order, axis=1))  # the most probable first
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        share = p / p.sum(axis=1, keepdims=True)
        p[share.cumsum(axis=1) - share >= top_p] = 0  # what comes before it is enough
    result = np.empty_like(p)
    np.put_along_axis(result, order, p / p.sum(axis=1, keepdims=True), axis=1)
    return result
