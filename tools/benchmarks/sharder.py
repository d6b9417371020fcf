"""The parameter server in one process beside a plain loop: as many workers as threads, against as many kernel threads.

Both make the same step to the last bit: the same microbatches, summed by the same tree, clipped to a norm of 1, AdamW.
What differs is who computes. In the loop all threads share each kernel; on the server each worker has one thread, and
a microbatch of its own.

The last rows have no model. Gradients that lie ready are pushed, and parameters pulled: what is left is the server's
own work. At least it reads the gradients of all microbatches and the old parameters and moments, and writes the
new ones; a pull moves nothing. To clip, it must have read every gradient before the first parameter changes, so that
they pass a second time: as they are, or as their sum, written once and read once. That many bytes are held against the
copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

import engine as eg
from engine.models import Transformer
from engine.sharder import Client, Committed, ParameterServer
from tools.benchmarks import train
from tools.benchmarks.contest import OURS, Contest
from tools.benchmarks.peers import Peers
from tools.training.session import configuration
from tools.training.settings import Settings

PLAIN = "plain loop"
CLIP = 1.0
RULE = eg.optim.AdamWRule(lr=1e-4)
VOCABULARY = 4096  # of the default model
ELEMENTS = 32_000_000  # of the rows without a model, in MATRICES matrices: far more than the caches hold
MATRICES = 16
ENDLESS = 10**9  # clocks: as many as the contest asks for

Batch = tuple[np.ndarray, np.ndarray]


def contests(peers: Peers) -> Iterator[tuple[str, Callable[[], Contest]]]:
    workers = peers.threads
    gpt2 = replace(next(size for size in train.SIZES if size.name == "gpt2"), batch=1)
    for name, build in (("default model", default_model), ("GPT-2 124M", partial(of_size, gpt2))):
        yield name, partial(training, name, build, workers)
    for clip_norm in (None, CLIP):
        name = "push, update, pull" + (", clipped" if clip_norm else "")
        yield name, partial(update, name, clip_norm, workers)


def default_model() -> tuple[Callable[[], Transformer], Batch]:
    """What `make train` trains, and random tokens for a microbatch of its size."""
    settings = Settings()
    config = configuration(settings, VOCABULARY)
    text = np.random.default_rng(0).integers(0, VOCABULARY, (settings.batch, settings.context + 1))
    return partial(Transformer, config), (np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:]))


def of_size(size: train.Size) -> tuple[Callable[[], Transformer], Batch]:
    return partial(train.engine_model, size), size.tokens()


def training(name: str, build: Callable[[], tuple[Callable[[], Transformer], Batch]], workers: int) -> Contest:
    """One microbatch a worker; each contestant has a model of its own."""
    make_model, batch = build()
    model = seeded(make_model)
    runs = {OURS: server_step(make_model, batch, workers), PLAIN: loop_step(model, batch, workers)}
    tokens = workers * batch[0].size
    return Contest(name, runs, model.flops_per_token(batch[0].shape[1]) * tokens, work=tokens, unit="tokens/s")


def seeded(make_model: Callable[[], Transformer]) -> Transformer:
    """The model that both begin with."""
    with eg.seed(0):
        return make_model()


def gradients(model: Transformer, batch: Batch) -> float:
    """Leaves the gradients of the loss sum in the parameters; returns that sum."""
    loss = model.loss(*(eg.tensor(x) for x in batch), reduction="sum")
    loss.backward()
    return loss.item()


def server_step(make_model: Callable[[], Transformer], batch: Batch, workers: int) -> Callable[[], Committed]:
    server = ParameterServer(seeded(make_model), RULE, workers=workers, microbatches=workers, clip_norm=CLIP)

    def work(client: Client) -> None:
        replica = make_model()
        while client.clock():
            client.pull(replica)
            for index in client.microbatches:
                client.push(index, replica, gradients(replica, batch), batch[1].size)

    steps = server.run(work, clocks=ENDLESS)
    return lambda: next(steps)


def loop_step(model: Transformer, batch: Batch, microbatches: int) -> Callable[[], float]:
    parameters = list(model.parameters())
    optimizer = eg.optim.AdamW(parameters, lr=RULE.lr)

    def step() -> float:
        accumulator = eg.optim.Accumulator(microbatches)
        for index in range(microbatches):
            optimizer.zero_grad()
            loss = gradients(model, batch)
            accumulator.add(index, [p.grad for p in parameters if p.grad is not None], loss, batch[1].size)
        loss = accumulator.assign(parameters)
        optimizer.step(clip_norm=CLIP)
        return loss

    return step


def update(name: str, clip_norm: float | None, workers: int) -> Contest:
    """A clock of gradients that lie ready."""
    shape = (ELEMENTS // MATRICES,)
    values = {f"matrix {i}": np.zeros(shape, np.float32) for i in range(MATRICES)}
    server = ParameterServer(values, RULE, workers=workers, microbatches=workers, shards=workers, clip_norm=clip_norm)

    def work(client: Client) -> None:
        ready = {key: np.full(shape, client.worker + 1, np.float32) for key in values}
        while client.clock():
            client.pull()
            for index in client.microbatches:
                client.push(index, ready)

    steps = server.run(work, clocks=ENDLESS)
    again = 0 if clip_norm is None else min(workers, 2)  # the second pass of the gradients
    moved = 4.0 * ELEMENTS * (workers + again + 6)  # p, m, v, in and out
    return Contest(name, {OURS: lambda: next(steps)}, bytes=moved, work=moved / 1e9, unit="GB/s")
