"""What holds on every driver: the bits of plain training for all workers and shards, stopped and resumed."""

from __future__ import annotations

import pytest
from sharder_problems import DRIVERS, Processes, assert_plain_training, assert_same_bits, plain

CLOCKS = 3


@pytest.fixture(params=DRIVERS, ids=lambda driver: driver.__name__)
def driver(request):
    return request.param


# Processes take 20 ms each to begin and end: half of the numbers, and one case of each.
GRID = [(driver, workers, shards) for driver in DRIVERS for workers in range(1, 5) for shards in range(1, 6)
        if driver is not Processes or (workers + shards) % 2]


@pytest.mark.parametrize(("driver", "workers", "shards"), GRID, ids=lambda item: getattr(item, "__name__", str(item)))
def test_every_number_of_workers_and_shards_gives_the_bits_of_plain_training(driver, workers, shards):
    cases = ((1, None), (3, 1.0), (4, 0.5), (6, None))
    for microbatches, clip_norm in (cases[(workers + 2 * shards) % 4],) if driver is Processes else cases:
        cluster = driver.make(wide=True, workers=workers, shards=shards, microbatches=microbatches, clip_norm=clip_norm)
        committed = driver.run(cluster, CLOCKS, seed=workers * 10 + shards)
        assert_plain_training(cluster, committed, microbatches, clip_norm, CLOCKS)


def test_clipping_does_clip_here():
    _, _, norms = plain(True, 3, 1.0, CLOCKS)
    assert min(norms) > 1.0


def test_a_state_loads_into_any_number_of_shards_and_workers(driver):
    states, _, _ = plain(True, 4, 0.5, 5)
    first = driver.make(wide=True, workers=2, shards=3, microbatches=4, clip_norm=0.5)
    driver.run(first, 2)
    saved = first.state()
    for shards, workers in ((5, 1), (1, 4), (2, 3)):
        resumed = driver.make(wide=True, workers=workers, shards=shards, microbatches=4, clip_norm=0.5)
        resumed.load(saved)
        assert resumed.clock == 2
        driver.run(resumed, 3)
        assert_same_bits(resumed.state(), states[5])


def test_runs_follow_one_another(driver):
    states, _, _ = plain(False, 3, None, 4)
    cluster = driver.make(workers=2, shards=2, microbatches=3)
    for clock in range(1, 5):
        driver.run(cluster, 1, seed=clock)
        assert_same_bits(cluster.state(), states[clock])


def test_shards_are_added_and_removed_between_runs(driver):
    states, _, _ = plain(False, 3, None, 4)
    cluster = driver.make(workers=2, shards=2, microbatches=3)
    for clock, shards in enumerate((3, 1, 5), 1):
        driver.run(cluster, 1, seed=clock)
        cluster.reshard(shards)
        assert cluster.partition.shards == shards
        assert_same_bits(cluster.state(), states[clock])
    with pytest.raises(ValueError, match=r"^reshard: shards is 0, expected a whole number of at least 1$"):
        cluster.reshard(0)
    driver.run(cluster, 1)
    assert_same_bits(cluster.state(), states[4])


def test_no_clock_changes_nothing(driver):
    cluster = driver.make(workers=2, shards=2, microbatches=3)
    before = cluster.state()
    assert list(driver.run(cluster, 0)) == []
    assert_same_bits(cluster.state(), before)


def test_a_state_shares_no_memory_with_the_server(driver):
    cluster = driver.make(workers=1, shards=2, microbatches=1)
    saved = cluster.state()
    kept = {name: value if name == "clock" else value.copy() for name, value in saved.items()}
    driver.run(cluster, 2)
    assert_same_bits(saved, kept)


def test_load_names_what_does_not_fit_and_changes_nothing(driver):
    cluster = driver.make(workers=1, shards=2, microbatches=1)
    before = cluster.state()
    good = cluster.state()
    missing = {name: value for name, value in good.items() if name != "velocity/w"}
    with pytest.raises(ValueError, match=r"load: 'velocity/w' is missing.*clock and parameters, velocity"):
        cluster.load(missing)
    with pytest.raises(ValueError, match=r"load: 'parameters/z' is not expected"):
        cluster.load({**good, "parameters/z": good["parameters/w"]})
    with pytest.raises(ValueError, match=r"load: 'parameters/w' is float32 \(15,\), expected float32 \(3, 5\)"):
        cluster.load({**good, "parameters/w": good["parameters/w"].reshape(-1)})
    with pytest.raises(ValueError, match=r"load: 'velocity/b' is float64 \(7,\), expected float32"):
        cluster.load({**good, "velocity/b": good["velocity/b"].astype("float64")})
    assert_same_bits(cluster.state(), before)
