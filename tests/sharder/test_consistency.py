"""BSP, SSP, ASP and backup workers: what they promise on every driver, and what they buy when machines stall."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from curves import CALM, STALLS, clock_time
from sharder_problems import DRIVERS, assert_same_bits, make, plain, program

from engine.optim import SGDRule
from engine.sharder import Consistency, ParameterServer, inverse_staleness
from engine.sharder.drivers.faults import Weather
from engine.sharder.drivers.simulator import Simulation

CLOCKS = 4


@pytest.fixture(params=DRIVERS, ids=lambda driver: driver.__name__)
def driver(request):
    return request.param


@pytest.mark.parametrize("workers", [1, 3])
def test_ssp_of_staleness_0_has_the_bits_of_bsp(driver, workers):
    cluster = driver.make(consistency="ssp:0", workers=workers, shards=2, microbatches=3, clip_norm=1.0)
    driver.run(cluster, CLOCKS)
    assert_same_bits(cluster.state(), plain(False, 3, 1.0, CLOCKS)[0][CLOCKS])


@pytest.mark.parametrize("consistency", ["ssp:2", Consistency(backups=1), Consistency(staleness=1, backups=2), "asp"])
def test_every_clock_is_committed_within_its_bounds(driver, consistency):
    cluster = driver.make(consistency=consistency, workers=3, shards=2, microbatches=5)
    committed = driver.run(cluster, CLOCKS)
    assert [done.clock for done in committed] == list(range(CLOCKS)) and cluster.clock == CLOCKS
    rules = cluster.setup.consistency
    for done in committed:
        assert len(done.dropped) <= rules.backups
        assert rules.asynchronous or done.clock - rules.staleness <= done.version <= done.clock
    driver.run(cluster, 1, seed=1)  # and a run goes on where the last one ended
    assert cluster.clock == CLOCKS + 1


def test_a_state_saved_in_one_mode_loads_in_another(driver):
    states = plain(False, 3, None, CLOCKS)[0]
    first = driver.make(consistency="bsp", workers=2, shards=3, microbatches=3)
    driver.run(first, 2)
    for consistency in ("ssp:1", "asp"):
        other = driver.make(consistency=consistency, workers=2, shards=2, microbatches=3)
        other.load(first.state())
        assert other.clock == 2
        assert_same_bits(other.state(), states[2])
        driver.run(other, 1)
        assert other.clock == 3


def test_parameters_stand_still_between_two_clocks_of_ssp():
    server = make(ParameterServer, consistency="ssp:3", workers=2, shards=2, microbatches=4)
    for done in server.run(program, 12):
        before = server.state()
        assert before["clock"] == done.clock + 1
        assert_same_bits(server.state(), before)


def test_a_stride_lets_asp_run_ahead_and_is_finished_before_the_end():
    server = make(ParameterServer, consistency="asp", workers=2, shards=2, microbatches=2)
    for done in server.run(program, 12, stride=4):
        if done.clock % 4 != 3:
            with pytest.raises(RuntimeError, match="state: a clock is running"):
                server.state()
        if done.clock == 5:
            break
    assert server.clock == 8
    assert server.state()["clock"] == 8


def test_late_updates_have_a_smaller_learning_rate():
    """Two updates on version 0, one of them one update late: with lr 1 and gradient 1, w = −1 − damping(1)."""
    def step(damping):
        simulation = Simulation({"w": np.zeros(1, "float32")}, SGDRule(lr=1.0), consistency="ssp:1", damping=damping,
                                workers=2, shards=1, microbatches=1, device="reference")
        history = simulation.run(lambda *_: ({"w": np.ones(1, "float32")}, 0.0, 1.0), 2, 0, Weather(work=100))
        assert [done.version for done in history.committed] == [0, 0]
        return simulation.parameters()["w"].tolist()

    assert step(None) == [-2.0]
    assert step(lambda staleness: 0.25 if staleness == 1 else 1.0) == [-1.25]
    assert [inverse_staleness(late) for late in (0, 1, 2, 4)] == [1.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize(("text", "expected"), [
    ("bsp", Consistency()), ("asp", Consistency(asynchronous=True)), ("ssp:3", Consistency(staleness=3))])
def test_modes_have_names(text, expected):
    assert Consistency.parse(text) == expected


@pytest.mark.parametrize("text", ["ssp", "ssp:", "ssp:-1", "bsp:1", "asp:2", "", "SSP:1", "ssp:1.5"])
def test_other_names_get_one_line(text):
    with pytest.raises(ValueError, match=r"expected bsp, asp, or ssp: and a staleness bound"):
        Consistency.parse(text)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"consistency": "asp", "clip_norm": 1.0}, "clip_norm needs the whole gradient of a clock, which asp never sees"),
    ({"consistency": Consistency(backups=3)}, "backups is 3, expected fewer than the 3 microbatches"),
    ({"placement": "alphabet"}, "placement is 'alphabet', expected ranges or hashing"),
])
def test_what_does_not_go_together_gets_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(ParameterServer, microbatches=3, **arguments)


@pytest.mark.parametrize(("text", "updates"), [("bsp", 3), ("ssp:2", 3), ("asp", 12)])
def test_updates_of_three_clocks_of_four_microbatches(text, updates):
    assert Consistency.parse(text).updates(3, 4) == updates


def test_a_consistency_that_cannot_be_gets_one_line():
    with pytest.raises(ValueError, match="staleness is -1, expected a whole number of at least 0"):
        Consistency(staleness=-1)
    with pytest.raises(ValueError, match="asp has neither a staleness bound nor backups"):
        Consistency(asynchronous=True, backups=1)
    with pytest.raises(ValueError, match='durability "snapshot" is for BSP without backups'):
        make(Simulation, microbatches=3, durability="snapshot", consistency="ssp:1")


@pytest.mark.parametrize("driver_of", [ParameterServer, Simulation])
def test_hashing_has_the_bits_of_ranges(driver_of):
    cluster = make(driver_of, wide=True, placement="hashing", workers=2, shards=3, microbatches=4, clip_norm=0.5)
    {ParameterServer: DRIVERS[0], Simulation: DRIVERS[1]}[driver_of].run(cluster, 3)
    assert_same_bits(cluster.state(), plain(True, 4, 0.5, 3)[0][3])


# ── what they buy ─────────────────────────────────────────────────────────────────────────────────────

def test_ssp_hides_random_stalls():
    """8 workers, one microbatch in ten takes four times as long. A clock of BSP waits for the slowest of 8, so it takes
    1 + 3 (1 − 0.9⁸) = 2.71 microbatch times; with no waiting at all it would be 1.3."""
    assert clock_time("bsp", STALLS) > 1.6 * clock_time("ssp:3", STALLS)


def test_a_backup_worker_hides_a_slow_one():
    slow = replace(CALM, slow={7: 6})
    assert clock_time("bsp", slow, clocks=30) > 3 * clock_time(Consistency(backups=1), slow, clocks=30)
