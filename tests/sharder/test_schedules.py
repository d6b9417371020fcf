"""Histories drawn by Hypothesis: whatever is lost, repeated, reordered, slow, dead, cut off, added or removed, the
invariants hold after every event (the simulator checks them), and training ends with the bits of plain training.

A draw is a seed and a list of (event, fault): a full state machine would cost more to draw than a history to run.
10,000 histories take 50 seconds of two quiet cores, twice that of busy ones, and `make test` runs them.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sharder_problems import (
    HISTORIES,
    MODES,
    WEATHERS,
    Simulator,
    assert_same_bits,
    gradient,
    plain,
    strikes,
    tiny,
    tiny_drawn,
    tiny_gradient,
    tiny_simulation,
)

from engine.sharder.drivers.faults import FAULTS, Weather
from engine.sharder.drivers.invariants import Violated
from engine.sharder.drivers.plain import Plain
from engine.sharder.versions import Versions

CLOCKS = 3


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=-(-HISTORIES // len(MODES)), deadline=None)
@given(seed=st.integers(0, 2**20), workers=st.integers(1, 3), shards=st.integers(1, 3), faults=strikes)
@example(seed=40122, workers=3, shards=1, faults=[(35, "shard"), (63, "suspect")])  # "ssp, replicas" failed on it once
@example(seed=455120, workers=3, shards=3,  # "asp, replicas": a dead shard is suspected as it returns
         faults=[(44, "repeat"), (32, "lose"), (122, "suspect"), (110, "shard"), (71, "leave")])
def test_every_invariant_holds_in_every_history(mode, seed, workers, shards, faults):
    tiny_drawn(mode, seed, workers, shards, faults)


def log(seed, **arguments):
    return tiny("bsp, logs", 3, 3, seed=seed, **arguments)[1]


@pytest.mark.parametrize("mode", MODES)
def test_one_seed_is_one_history_to_the_byte(mode):
    faults = [(20, "shard"), (33, "worker"), (41, "coordinator"), (50, "reshard:2"), (70, "cut"), (90, "join")]
    first, again, other = (tiny(mode, seed=seed, faults=faults, weather=Weather(loss=0.05, duplication=0.1))[1]
                           for seed in (11, 11, 12))
    assert "\n".join(first.log).encode() == "\n".join(again.log).encode()
    assert first.faults == again.faults and first.time == again.time
    assert first.log != other.log


def test_the_weathers_have_everything_in_them():
    faults = sum((log(seed, clocks=5).faults for seed in range(10 * len(WEATHERS))), start=log(1).faults)
    assert all(faults[kind] >= 2 for kind in ("lose", "repeat", "worker", "shard", "coordinator"))


@pytest.mark.parametrize("kind", [*FAULTS, "reshard:3"])
def test_faults_strike_the_event_they_name(kind):
    calm = tiny("bsp, replicas", 3, 3, weather=Weather())[1]
    number = next(n for n, line in enumerate(calm.log, 1) if " shard 1 Push(" in line)
    history = tiny("bsp, replicas", 3, 3, weather=Weather(), faults=[(number, kind)])[1]
    assert history.faults[kind.partition(":")[0]] == 1
    assert history.log[:number - 1] == calm.log[:number - 1]
    assert history.log[number - 1].startswith(calm.log[number - 1] + " [")


def test_in_calm_weather_every_push_is_sent_once():
    history = log(1, weather=Weather(timeout=10_000))
    pushes = [line for line in history.log if " Push(" in line]
    assert len(pushes) == 3 * 3 * 3 and len(set(pushes)) == len(pushes)


def test_a_history_that_does_not_end_is_reported_with_its_last_events():
    cluster = Simulator.make(workers=1, shards=1, microbatches=1)
    with pytest.raises(Violated, match=r"(?s)training has not ended by virtual time 500\n.*the last of \d+ events"):
        cluster.run(lambda *_: None, 1, 0, Weather(loss=1.0), limit=500)


def test_an_oracle_that_differs_in_one_bit_is_noticed():
    class Wrong(Plain):
        def _next(self, before, course):
            state = super()._next(before, course)
            if len(course) == 2:
                state.slots["velocity"]["b"].view("uint32")[1] ^= 1
            return state

    simulation = tiny_simulation()
    wrong = Wrong(simulation.setup, simulation.checkpoint(), tiny_gradient)
    with pytest.raises(Violated, match="shard 1, version 2: velocity/b has other bits than plain training"):
        simulation.run(tiny_gradient, 3, 0, plain=wrong)


@pytest.mark.parametrize("zero", [1, 3])
def test_parameters_that_change_while_somebody_holds_them_are_noticed(zero, monkeypatch):
    """Of a clock that is over: no bit of the training depends on them any more. Pulled whole, or shard by shard."""
    def commit(self, original=Versions.commit):
        before = self.current
        original(self)
        before.flat.data[...] = 0

    monkeypatch.setattr(Versions, "commit", commit)
    with pytest.raises(Violated, match="parameters of version 0 have changed while workers hold them"):
        tiny("bsp, logs", zero=zero, weather=Weather())


def test_the_oracle_is_plain_training():
    """Plain, which the invariants compare with, against the loop that test_conformance.py compares with."""
    simulation = Simulator.make(workers=1, shards=1, microbatches=4, clip_norm=0.5)
    course = tuple((clock, (0, 1, 2, 3)) for clock in range(CLOCKS))
    found = Plain(simulation.setup, simulation.checkpoint(), gradient).after(course)
    kinds = {"parameters": found.parameters, **found.slots}
    state = {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in values.items()}
    assert_same_bits({"clock": found.clock, **state}, plain(False, 4, 0.5, CLOCKS)[0][CLOCKS])
