"""Generation with a cache of keys and values, greedily, one text at a time: tokens a second.

    prefill   PROMPT tokens at once: matrix products, bound by the FMA units
    decode    NEW tokens one by one after them: every weight is read for each token, so memory is the bound
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

import engine as eg
from tools.benchmarks import generate_peers
from tools.benchmarks.contest import OURS, Contest
from tools.benchmarks.peers import Peers
from tools.benchmarks.train import SIZES, Size, engine_model

PROMPT, NEW = 128, 16


def contests(peers: Peers) -> Iterator[tuple[str, Callable[[], Contest]]]:
    for size in SIZES:
        if size.time >= PROMPT + NEW:
            for part in ("prefill", "decode"):
                yield f"{part} {size.name}", partial(contest, part, size, peers)


def prompt_of(size: Size) -> np.ndarray:
    return np.random.default_rng(0).integers(0, size.vocabulary, (1, PROMPT))


def engine_runs(size: Size) -> tuple[dict[str, Callable[[], object]], float]:
    """Ours, and how many weights are multiplied for a token."""
    with eg.seed(0):
        model = engine_model(size).eval()
    cache, prompt = model.make_cache(1), eg.tensor(prompt_of(size))

    def prefill() -> object:
        cache.clear()
        with eg.no_grad():
            return model.logits(model.hidden(prompt, cache=cache)[:, -1:])

    def decode() -> object:
        """NEW tokens, and the cache as it was before."""
        with eg.no_grad():
            token = prompt[:, :1]
            for _ in range(NEW):
                token = eg.argmax(model(token, cache=cache), axis=-1)
        for layer in cache.layers:
            layer.own.length = PROMPT
        return token

    prefill()
    return {"prefill": prefill, "decode": decode}, model.flops_per_token(1) / 6


def contest(part: str, size: Size, peers: Peers) -> Contest:
    ours, weights = engine_runs(size)
    runs = {OURS: ours[part]}
    if peers.torch:
        runs["torch"] = generate_peers.torch_runs(peers.torch, size, prompt_of(size), NEW)[part]
    name = f"{part} {size.name}"
    if part == "prefill":
        return Contest(name, runs, flops=2 * weights * PROMPT, work=PROMPT, unit="tokens/s", streams=False)
    return Contest(name, runs, bytes=4 * weights * NEW, work=NEW, unit="tokens/s")
