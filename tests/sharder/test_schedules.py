"""Histories drawn by Hypothesis: whatever is lost, repeated, reordered, slow or dead, the invariants hold after every
event (the simulator checks them), and training ends with the bits of plain training."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharder_problems import Simulator, assert_same_bits, gradient, make, oracle, plain

from engine.sharder.drivers.invariants import Violated
from engine.sharder.drivers.simulator import FAULTS, Simulation, Weather

CLOCKS = 3

weathers = st.builds(
    Weather,
    latency=st.sampled_from([(1, 1), (1, 10), (1, 100)]),
    loss=st.sampled_from([0.0, 0.1, 0.4]),
    duplication=st.sampled_from([0.0, 0.1, 0.5]),
    stalling=st.sampled_from([0.0, 0.2]),
    crashing=st.sampled_from([0.0, 0.01]),
    timeout=st.sampled_from([15, 60, 300]),
)
strikes = st.lists(st.tuples(st.integers(1, 250), st.sampled_from(FAULTS)), max_size=12)


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), weather=weathers, faults=strikes, workers=st.integers(1, 4),
       shards=st.integers(1, 5), microbatches=st.sampled_from([1, 3, 4, 6]), clip_norm=st.sampled_from([None, 1.0]))
def test_every_history_ends_with_the_bits_of_plain_training(seed, weather, faults, workers, shards, microbatches,
                                                            clip_norm):
    cluster = make(Simulation, workers=workers, shards=shards, microbatches=microbatches, clip_norm=clip_norm)
    history = cluster.run(gradient, CLOCKS, seed, weather, faults, oracle(False, microbatches, clip_norm, CLOCKS))
    states, losses, norms = plain(False, microbatches, clip_norm, CLOCKS)
    assert_same_bits(cluster.state(), states[CLOCKS])
    assert [(c.clock, (c.loss, c.tokens), c.norm) for c in history.committed] == list(zip(range(CLOCKS), losses, norms))


STORM = Weather(latency=(1, 60), loss=0.2, duplication=0.2, stalling=0.2, crashing=0.005)


def log(seed, weather=STORM):
    return make(Simulation, workers=3, shards=3, microbatches=4).run(gradient, CLOCKS, seed, weather)


def test_one_seed_is_one_history_to_the_byte():
    first, again = log(11), log(11)
    assert "\n".join(first.log).encode() == "\n".join(again.log).encode()
    assert first.faults == again.faults and first.time == again.time
    assert first.log != log(12).log


def test_the_storm_has_everything_in_it():
    faults = sum((log(seed).faults for seed in range(5)), start=log(5).faults)
    assert all(faults[kind] >= 2 for kind in ("lose", "repeat", "crash"))


def test_faults_strike_the_event_they_name():
    calm = log(3, Weather())
    number = next(n for n, line in enumerate(calm.log, 1) if "Push(" in line)
    for kind in FAULTS:
        cluster = make(Simulation, workers=3, shards=3, microbatches=4)
        history = cluster.run(gradient, CLOCKS, 3, Weather(), [(number, kind)])
        assert history.faults == {kind: 1}
        assert history.log[:number - 1] == calm.log[:number - 1]
        assert "[" in history.log[number - 1].removeprefix(calm.log[number - 1])


def test_in_calm_weather_every_push_is_sent_once():
    history = log(1, Weather(timeout=10_000))
    pushes = [line for line in history.log if " Push(" in line]
    assert len(pushes) == 3 * 4 * CLOCKS and len(set(pushes)) == len(pushes)


def test_a_history_that_does_not_end_is_reported_with_its_last_events():
    cluster = Simulator.make(workers=1, shards=1, microbatches=1)
    with pytest.raises(Violated, match=r"(?s)training has not ended by virtual time 500\n.*the last of \d+ events"):
        cluster.run(gradient, 1, 0, Weather(loss=1.0), limit=500)


def test_an_oracle_that_differs_in_one_bit_is_noticed():
    right = oracle(False, 3, None, CLOCKS)

    def wrong(version):
        values = {name: value.copy() for name, value in right(version).items()}
        if version == 2:
            values["v"].view("uint32")[4] ^= 1
        return values

    with pytest.raises(Violated, match="version 2: 'v' has other bits than plain training"):
        make(Simulation, workers=2, shards=3, microbatches=3).run(gradient, CLOCKS, 0, Weather(), oracle=wrong)
