"""A real model on the parameter server: the bits of a plain training loop, whatever the number of workers and shards.

The plain loop is what a script without the server would write: optim.Accumulator, clip_grad_norm_, Optimizer.step().
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from sharder_problems import assert_same_bits

import engine as eg
from engine import models, optim
from engine.sharder import ParameterServer

STEPS, CONTEXT, SEQUENCES, VOCABULARY = 2, 8, 2, 160
OPTIMIZERS = {
    "sgd": (optim.SGDRule(lr=0.05, momentum=0.9), lambda p: optim.SGD(p, lr=0.05, momentum=0.9)),
    "adamw": (optim.AdamWRule(lr=1e-2, weight_decay=0.1), lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
}
CLIP_NORM = 0.05  # below every norm of this problem, so that clipping happens


def make_model():
    """Its tied embedding has 5120 elements: two blocks, so a shard boundary can fall into a parameter."""
    with eg.seed(1):
        return models.Transformer(models.TransformerConfig(
            vocab_size=VOCABULARY, context_length=CONTEXT, layers=1, heads=2, width=32, hidden=48, dropout=0.1,
            positions="rotary", norm="rms_norm", activation="swiglu", bias=False, tie_weights=True))


def loss_of(model, step, index):
    """(loss sum, tokens) of a microbatch; the last microbatch of each step has fewer tokens."""
    random = np.random.default_rng((step, index))
    windows = random.integers(0, VOCABULARY, (SEQUENCES - (index == 2), CONTEXT + 1))
    with eg.seed(eg.Generator(7).at(step, index)):  # dropout is a function of the step and the microbatch
        logits = model(eg.tensor(windows[:, :-1]))
    return eg.cross_entropy(logits, eg.tensor(windows[:, 1:]), reduction="sum"), windows[:, 1:].size


@cache
def plain(optimizer_name, microbatches, clip_norm):
    """state, as the server reports it, and the mean losses of a loop without a server."""
    model = make_model()
    names, parameters = zip(*model.named_parameters())
    optimizer = OPTIMIZERS[optimizer_name][1](parameters)
    losses = []
    for step in range(STEPS):
        accumulator = optim.Accumulator(microbatches)
        for index in range(microbatches):
            optimizer.zero_grad()
            loss, tokens = loss_of(model, step, index)
            loss.backward()
            accumulator.add(index, [p.grad for p in parameters], loss.item(), tokens)
        losses.append(accumulator.assign(parameters))
        if clip_norm is not None:
            assert optim.clip_grad_norm_(parameters, clip_norm) > clip_norm
        optimizer.step()
    state = {"clock": STEPS, **{f"parameters/{name}": p.numpy() for name, p in zip(names, parameters)}}
    for i, slots in optimizer.state_dict()["state"].items():
        state.update({f"{slot}/{names[i]}": value for slot, value in slots.items() if slot != "step"})
    return state, losses


def program(client):
    model = make_model()
    while client.clock():
        client.pull(model)
        for index in client.microbatches:
            loss, tokens = loss_of(model, client.step, index)
            loss.backward()
            client.push(index, model, loss.item(), tokens)


@pytest.mark.parametrize("clip_norm", [None, CLIP_NORM], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("microbatches", [1, 3, 4, 6])
@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
def test_training_on_the_server_has_the_bits_of_plain_training(optimizer_name, microbatches, clip_norm):
    state, losses = plain(optimizer_name, microbatches, clip_norm)
    for workers in range(1, 5):
        for shards in range(1, 6):
            server = ParameterServer(make_model(), OPTIMIZERS[optimizer_name][0], workers=workers, shards=shards,
                                     microbatches=microbatches, clip_norm=clip_norm)
            committed = list(server.run(program, clocks=STEPS))
            assert_same_bits(server.state(), state)
            assert [c.mean_loss for c in committed] == losses
            assert server.copied.bytes == 0


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one():
    arguments = {"microbatches": 3, "clip_norm": CLIP_NORM}
    whole = ParameterServer(make_model(), OPTIMIZERS["adamw"][0], workers=2, shards=2, **arguments)
    list(whole.run(program, clocks=4))
    first = ParameterServer(make_model(), OPTIMIZERS["adamw"][0], workers=2, shards=3, **arguments)
    for committed in first.run(program):
        if committed.clock == 1:
            break
    resumed = ParameterServer(make_model(), OPTIMIZERS["adamw"][0], workers=3, shards=5, **arguments)
    resumed.load(first.state())
    list(resumed.run(program, clocks=2))
    assert_same_bits(resumed.state(), whole.state())
