"""Training steps: forward, backward and AdamW of the same GPT, in tokens a second.

Every contestant trains the model of "Language Models are Unsupervised Multitask Learners" (pre-norm, learned positions,
tanh GELU) on the same random tokens; models of peers are in train_peers.py. In rows of bfloat16 those that have an
autocast use it. Forward and backward of ours are captured (eg.capture), and beside it as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

import engine as eg
from engine.models import Transformer, TransformerConfig
from tools.benchmarks import train_peers
from tools.benchmarks.contest import EAGER, OURS, Contest
from tools.benchmarks.peers import Peers

LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    name: str
    layers: int
    heads: int
    width: int
    time: int
    batch: int
    vocabulary: int
    tied: bool = False
    dtype: str = "float32"  # of autocast

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        text = np.random.default_rng(0).integers(0, self.vocabulary, (self.batch, self.time + 1))
        return np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])


SIZES = (Size("tiny", 4, 4, 128, 64, 12, 65), Size("char", 6, 6, 384, 256, 12, 65),
         Size("gpt2", 12, 12, 768, 256, 4, 50257, tied=True),
         Size("char bfloat16", 6, 6, 384, 256, 12, 65, dtype="bfloat16"),
         Size("gpt2 bfloat16", 12, 12, 768, 256, 4, 50257, tied=True, dtype="bfloat16"))


def engine_model(size: Size) -> Transformer:
    return Transformer(TransformerConfig(
        vocab_size=size.vocabulary, context_length=size.time, layers=size.layers, heads=size.heads, width=size.width,
        activation="gelu_tanh", positions="learned", norm="layer_norm", tie_weights=size.tied))


def engine_step(size: Size, captured: bool = True) -> tuple[Callable[[], object], float]:
    """Our step, with forward and backward captured or not, and the flops of one."""
    with eg.seed(0):
        model = engine_model(size)
    optimizer = eg.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    tokens, targets = (eg.tensor(x) for x in size.tokens())

    def gradients(tokens: eg.Tensor, targets: eg.Tensor) -> eg.Tensor:
        with eg.autocast(size.dtype):
            loss = model.loss(tokens, targets)
        loss.backward()
        return loss

    compute = eg.capture(gradients, model) if captured else gradients

    def step() -> object:
        optimizer.zero_grad()
        loss = compute(tokens, targets)
        optimizer.step()
        return loss

    return step, model.flops_per_token(size.time) * size.batch * size.time


def contests(peers: Peers) -> Iterator[tuple[str, Callable[[], Contest]]]:
    for size in SIZES:
        yield size.name, partial(contest, size, peers)


def contest(size: Size, peers: Peers) -> Contest:
    step, flops = engine_step(size)
    runs = {OURS: step, EAGER: engine_step(size, captured=False)[0]}
    if peers.torch:
        runs["torch"] = train_peers.torch_step(peers.torch, size, LEARNING_RATE)
    if "torch.compile" in peers:
        runs["torch.compile"] = train_peers.torch_step(peers.torch, size, LEARNING_RATE, compiled=True)
    if peers.jax and size.dtype == "float32":
        runs["jax"] = train_peers.jax_step(peers.jax, size, LEARNING_RATE)
    return Contest(size.name, runs, flops, work=size.batch * size.time, unit="tokens/s", streams=False)
