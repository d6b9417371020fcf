"""Generation with a cache of keys and values, greedily, one text at a time: tokens a second.

    prefill   PROMPT tokens at once: matrix products, bound by the FMA units
    decode    NEW tokens one by one after them: every weight is read for each token, so memory is the bound

Ours multiplies by matrices that are only read (Transformer.for_inference): packed float32, bfloat16, quantised ones.
Beside them llama.cpp has weights of the same bits, and PyTorch float32, bfloat16, or dynamic quantisation to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

import engine as eg
from engine.models import Decoding
from tools.benchmarks import generate_peers, llama_peer
from tools.benchmarks.contest import OURS, Contest
from tools.benchmarks.peers import Peers
from tools.benchmarks.train import SIZES, Size, engine_model

PROMPT, NEW = 128, 16
FORMS = {"packed": 32.0, "bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
"""How our weights are kept, and their bits."""


def contests(peers: Peers) -> Iterator[tuple[str, Callable[[], Contest]]]:
    for size in SIZES:
        if size.time >= PROMPT + NEW and size.dtype == "float32":
            for form in FORMS:
                for part in ("prefill", "decode"):
                    yield name_of(part, size, form), partial(contest, part, size, peers, form)


def name_of(part: str, size: Size, form: str) -> str:
    return f"{part} {size.name}" + ("" if form == "packed" else f" {form}")


def prompt_of(size: Size) -> np.ndarray:
    return np.random.default_rng(0).integers(0, size.vocabulary, (1, PROMPT))


def engine_runs(size: Size, form: str) -> tuple[dict[str, Callable[[], object]], float]:
    """Ours, and how many weights are multiplied for a token."""
    with eg.seed(0):
        model = engine_model(size).for_inference(form)
    cache, prompt = model.make_cache(1), eg.tensor(prompt_of(size))

    def prefill() -> object:
        cache.clear()
        with eg.no_grad():
            return model.logits(model.hidden(prompt, cache=cache)[:, -1:])

    decoding = Decoding(model, cache)

    def decode() -> object:
        """NEW tokens, and the cache as it was before."""
        with eg.no_grad():
            token = prompt[:, :1]
            for _ in range(NEW):
                token = eg.argmax(decoding.logits(token), axis=-1, keepdims=True)
        for layer in cache.layers:
            layer.own.length = PROMPT
        return token

    prefill()
    return {"prefill": prefill, "decode": decode}, model.flops_per_token(1) / 6


def contest(part: str, size: Size, peers: Peers, form: str) -> Contest:
    ours, weights = engine_runs(size, form)
    runs, name = {OURS: ours[part]}, name_of(part, size, form)
    if peers.torch:
        made = generate_peers.torch_runs(peers.torch, size, prompt_of(size), NEW, form)
        runs[{"packed": "torch", "bf16": "torch bf16"}.get(form, "torch int8")] = made[part]
    if peers.llama_cpp:
        made = llama_peer.llama_runs(peers.llama_cpp, peers.gguf, size, prompt_of(size), NEW, form, peers.threads)
        runs["llama.cpp"] = made[part]
    if part == "prefill":
        return Contest(name, runs, flops=2 * weights * PROMPT, work=PROMPT, unit="tokens/s", streams=False)
    return Contest(name, runs, bytes=FORMS[form] / 8 * weights * NEW, work=NEW, unit="tokens/s")
