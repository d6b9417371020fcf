"""Predictions beside this machine: three numbers are measured with one worker, and two workers are predicted.

    t      the time of a microbatch, computed alone on one kernel thread
    L, A   the latency and the memory bandwidth that explain how much longer than M t a step of one worker takes, of a
           small model and of a large one:  step − M t = 7 L + (last sum + update) / A,  two equations

Then 2 workers are predicted with those, and run. Python's global lock, which threads share, is not in the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

import numpy as np

import engine as eg
from engine.backend import set_num_threads
from tools.planning.cost_model import ITEM, OPTIMIZERS, Plan
from tools.planning.models import PRESETS, parameters_of
from tools.planning.predict import predict

MICROBATCHES, ROWS = 4, 2
MESSAGES = 7  # that follow one another in a step (cost_model.py)
WARM_UP = 2  # steps
SMALL = eg.models.TransformerConfig(vocab_size=256, context_length=64, layers=2, heads=4, width=64)
MODELS = {"small": (SMALL, 40), "default": (PRESETS["default"], 10)}  # and how many steps are timed
DRIVERS = {"threads": eg.sharder.ParameterServer, "processes": eg.sharder.ProcessServer}


@dataclass(frozen=True)
class Measured:
    """Seconds."""

    model: str
    driver: str
    microbatch: float
    one: float
    predicted: float
    two: float

    @property
    def error(self) -> float:
        return self.predicted / self.two - 1


def measured() -> Iterator[Measured]:
    """Every model with every driver."""
    set_num_threads(1)
    alone = {name: microbatch_time(config, steps) for name, (config, steps) in MODELS.items()}
    for driver in DRIVERS:
        one = {name: step_time(driver, config, 1, steps) for name, (config, steps) in MODELS.items()}
        rest = {name: (touched(config), one[name] - MICROBATCHES * alone[name])
                for name, (config, _) in MODELS.items()}
        latency, memory = explained(*rest.values())
        for name, (config, steps) in MODELS.items():
            plan = Plan(parameters_of(config), 2, alone[name], microbatches=MICROBATCHES, latency=latency,
                        memory=memory)
            yield Measured(name, driver, alone[name], one[name], predict(plan).step,
                           step_time(driver, config, 2, steps))


def touched(config: Any) -> int:
    """Bytes that the last sum and the update of a step read and write (cost_model.py)."""
    return (3 + 3 + 2 * OPTIMIZERS["adam"]) * ITEM * parameters_of(config)


def explained(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """Latency and memory bandwidth, from (bytes, seconds) of two models; 0 and inf where noise says less than that."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(0.0, small[1] - slope * small[0]) / MESSAGES, 1 / slope if slope else inf


def _loss(config: Any) -> Callable[[Any, int], Any]:
    """loss(replica, microbatch)"""
    text = np.random.default_rng(0).integers(0, config.vocab_size, (MICROBATCHES, ROWS, config.context_length + 1))

    def loss(replica: Any, index: int) -> Any:
        tokens, targets = text[index, :, :-1], text[index, :, 1:]
        return replica.loss(eg.tensor(tokens), eg.tensor(targets), reduction="sum")

    return loss


def microbatch_time(config: Any, steps: int) -> float:
    replica, loss, times = eg.models.Transformer(config), _loss(config), []
    for i in range(MICROBATCHES * (steps + WARM_UP)):
        replica.zero_grad()
        start = time.perf_counter()
        total = loss(replica, i % MICROBATCHES)
        total.backward()
        total.item()
        times.append(time.perf_counter() - start)
    return median(times[MICROBATCHES * WARM_UP:])


def step_time(driver: str, config: Any, workers: int, steps: int) -> float:
    """The median time of a step of a real run."""
    loss = _loss(config)

    def work(client: Any) -> None:
        set_num_threads(1)
        replica = eg.models.Transformer(config)
        while client.clock():
            client.pull(replica)
            for index in client.microbatches:
                client.backward(index, replica, loss(replica, index), ROWS * config.context_length)

    server = DRIVERS[driver](eg.models.Transformer(config), eg.optim.AdamWRule(lr=1e-3), workers=workers, shards=1,
                             microbatches=MICROBATCHES)
    ends = [time.perf_counter() for _ in server.run(work, clocks=steps + WARM_UP)]
    return median(b - a for a, b in zip(ends[WARM_UP - 1:], ends[WARM_UP:]))
