"""A training problem without a model, and plain single-process training of it: what every driver is held against."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import strategies as st

from engine.backend import get_backend
from engine.optim import clip
from engine.optim.accumulator import Accumulator
from engine.sharder import ParameterServer
from engine.sharder.consistency import Consistency, inverse_staleness
from engine.sharder.drivers.faults import FAULTS, Weather
from engine.sharder.drivers.plain import Plain
from engine.sharder.drivers.processes import ProcessServer
from engine.sharder.drivers.simulator import Simulation

DEVICE = "reference"
SMALL = {"w": (3, 5), "b": (7,), "scale": (), "nothing": (0, 4), "v": (11,), "u": (2, 2, 2), "t": (9,)}
WIDE = {"matrix": (130, 100), "bias": (3,), "deep": (2, 5000), "scale": ()}  # parameters of several blocks


class Momentum:
    """velocity ← 0.9 velocity + g;  p ← p − lr · velocity"""

    slots = ("velocity",)
    lr = 0.125

    def init(self, k, n, dtype):
        return {"velocity": k.zeros((n,), dtype)}

    def apply(self, k, new_param, new_state, param, state, grad, step, divisor=1.0, scale=1.0, lr=lr):
        grad = k.map("divide", grad, k.constant(divisor, grad.dtype))
        grad = k.map("multiply", grad, k.constant(scale, grad.dtype))
        k.add(new_state["velocity"], k.map("multiply", state["velocity"], k.constant(0.9, grad.dtype)), grad, None)
        move = k.map("multiply", new_state["velocity"], k.constant(lr / step, grad.dtype))
        k.subtract(new_param, param, move, None)


def start(shapes):
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype("float32") for name, shape in shapes.items()}


def gradient(parameters, clock, microbatch):
    """Gradients that depend on everything they may depend on, of sizes far enough apart to feel any reordering."""
    random = np.random.default_rng((clock, microbatch))
    size = np.float32(10.0 ** (microbatch % 3))
    gradients = {name: np.asarray(p * np.float32(0.25) + size * random.standard_normal(p.shape).astype("float32"))
                 for name, p in parameters.items()}
    return gradients, float(random.random()), 2 + microbatch % 3


def program(client):
    while client.clock():
        parameters = client.pull()
        for index in client.microbatches:
            client.push(index, *gradient(parameters, client.step, index))


# ── a problem so small that thousands of whole histories can be looked at ────────────────────────────

TINY = {"a": np.array([1.0, 2.0], "float32"), "b": np.array([0.3, 0.1, -1.0], "float32")}
MODES = {  # name: (durability, consistency)
    "bsp, snapshots": ("snapshot", "bsp"),
    "bsp, logs": ("log", "bsp"),
    "bsp, replicas": ("backup", "bsp"),
    "ssp, logs": ("log", "ssp:2"),
    "ssp, replicas": ("backup", "ssp:1"),
    "backup workers, logs": ("log", Consistency(backups=1)),
    "ssp with backup workers, replicas": ("backup", Consistency(staleness=1, backups=1)),
    "asp, logs": ("log", "asp"),
    "asp, replicas": ("backup", "asp"),
}
WEATHERS = [
    Weather(),
    Weather(latency=(1, 50), duplication=0.3, timeout=150),
    Weather(latency=(1, 20), loss=0.1, duplication=0.2),
    Weather(stalling=0.3),
    Weather(crashing=0.004, absence=25, giving_up=0.2),
]
SKIES = [Weather(latency=(1, 20), loss=0.05, duplication=0.1, stalling=0.2, crashing=0.002), *WEATHERS[:2]]
HISTORIES = 10_000  # drawn in every test run
STRIKES = (*FAULTS, "reshard:1", "reshard:2", "reshard:3")


def strike(number):
    """(event, fault) of a drawn number."""
    return 1 + number // len(STRIKES), STRIKES[number % len(STRIKES)]


strikes = st.lists(st.integers(0, 160 * len(STRIKES) - 1).map(strike), max_size=5)


def tiny_gradient(parameters, clock, microbatch):
    """Gradients of sizes far enough apart to feel any reordering, without the cost of random numbers."""
    size = np.float32(10.0 ** (microbatch % 3) * (clock + 1.1))
    noise = size * np.float32(0.1 + 0.37 * microbatch)
    gradients = {name: np.float32(0.25) * value + noise for name, value in parameters.items()}
    loss = 0.1 * (microbatch + 1) * (clock + 0.3) + float(next(iter(parameters.values()))[0])
    return gradients, loss, 2 + microbatch % 3


MANY = {f"p{i}": np.array([1.0, i], "float32") for i in range(7)}  # a piece for each of 7 shards


def tiny_simulation(mode="bsp, logs", workers=2, shards=2, microbatches=3, clip_norm=None, many=False, **arguments):
    durability, consistency = MODES[mode]
    return Simulation(MANY if many else TINY, Momentum(), durability=durability, consistency=consistency,
                      workers=workers, shards=shards, microbatches=microbatches, clip_norm=clip_norm, device=DEVICE,
                      **arguments)


_PLAINS = {}  # by mode, microbatches, clip_norm: what is right is computed once


def tiny(mode="bsp, logs", workers=2, shards=2, microbatches=3, clip_norm=None, seed=0, faults=(), weather=None,
         clocks=3, stride=1, **arguments):
    """A history of the tiny problem, every invariant checked at every event: (simulation, history)."""
    simulation = tiny_simulation(mode, workers, shards, microbatches, clip_norm, **arguments)
    key = (mode, microbatches, clip_norm, *sorted(arguments.items()))
    if key not in _PLAINS:
        _PLAINS[key] = Plain(simulation.setup, simulation.checkpoint(), tiny_gradient)
    weather = WEATHERS[seed % len(WEATHERS)] if weather is None else weather
    history = simulation.run(tiny_gradient, clocks, seed, weather, faults, 6_000, stride, _PLAINS[key])
    return simulation, history


def tiny_drawn(mode, seed, workers, shards, faults):
    """One draw: what is left open follows from the seed."""
    clip_norm = 1.0 if seed % 2 and "asp" not in mode else None
    clocks = 3 if "ssp" in mode or seed % 8 == 0 else 2
    return tiny(mode, workers, shards, (2, 3, 3, 4, 2)[seed // 5 % 5], clip_norm, seed, faults, clocks=clocks,
                stride=3 if seed % 7 == 0 else 1, save_every=1 + (seed % 8 < 5),
                zero=1 + seed // 2 % (2 if "asp" in mode else 3),
                damping=inverse_staleness if seed // 3 % 2 and not mode.startswith("bsp") else None)


def arrays(values, k):
    return [k.array(value.reshape(-1)) for value in values.values()]


def by_name(shapes, flat):
    return {name: array.data.reshape(shape) for (name, shape), array in zip(shapes.items(), flat)}


@cache
def plain(wide, microbatches, clip_norm, clocks):
    """Training in one loop, without the sharder: (states by version, losses, norms)."""
    shapes = WIDE if wide else SMALL
    k, rule = get_backend(DEVICE), Momentum()
    parameters = arrays(start(shapes), k)
    slots = [rule.init(k, p.size, p.dtype) for p in parameters]
    states, losses, norms = [], [], []
    for step in range(1, clocks + 2):
        states.append({"clock": step - 1,
                       **{f"parameters/{n}": v for n, v in by_name(shapes, parameters).items()},
                       **{f"velocity/{n}": v.copy() for n, v in
                          by_name(shapes, [s["velocity"] for s in slots]).items()}})
        accumulator = Accumulator(microbatches, k)
        for index in range(microbatches):
            gradients, loss, tokens = gradient(by_name(shapes, parameters), step - 1, index)
            accumulator.add(index, arrays(gradients, k), loss, tokens)
        mean = accumulator.mean()
        losses.append((mean.loss, mean.tokens))
        gradients = list(mean.gradients)
        norms.append(clipped(k, gradients, clip_norm) if clip_norm else None)
        new = [k.empty_like(p) for p in parameters]
        for n, s, p, g in zip(new, slots, parameters, gradients):
            rule.apply(k, n, s, p, s, g, step)
        parameters = new
    return states, losses, norms


def clipped(k, gradients, clip_norm):
    norm = clip.norm_of_blocks(k, np.concatenate([clip.sums_of_squares(k, g).data for g in gradients]))
    scale = clip.clip_scale(norm, clip_norm)
    gradients[:] = [k.map("multiply", g, k.constant(scale, g.dtype)) for g in gradients]
    return norm


def make(kind, wide=False, rule=None, **arguments):
    """A ParameterServer or a Simulation of the problem."""
    return kind(start(WIDE if wide else SMALL), rule or Momentum(), device=DEVICE, **arguments)


def assert_same_bits(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert np.asarray(state[name]).tobytes() == np.asarray(value).tobytes(), name


def assert_plain_training(cluster, committed, microbatches, clip_norm, clocks):
    """After a run of so many clocks of the wide problem: the state, and what was told of each clock."""
    states, losses, norms = plain(True, microbatches, clip_norm, clocks)
    assert_same_bits(cluster.state(), states[clocks])
    assert [c.clock for c in committed] == list(range(clocks))
    assert [(c.loss, c.tokens) for c in committed] == losses[:clocks]
    assert [c.norm for c in committed] == norms[:clocks]


class Served:
    """A driver of real programs, under the suite's interface. kind: its server"""

    @classmethod
    def make(cls, **arguments):
        return make(cls.kind, **arguments)

    @staticmethod
    def run(cluster, clocks, seed=0):
        return list(cluster.run(program, clocks))


class Threads(Served):
    kind = ParameterServer


class Processes(Served):
    kind = ProcessServer


class Simulator(Served):
    """It has no programs, but what they compute."""

    kind = Simulation

    @staticmethod
    def run(cluster, clocks, seed=0):
        return cluster.run(gradient, clocks, seed).committed


DRIVERS = [Threads, Simulator, Processes]
