"""One crash at every event boundary of a whole history, for every kind of machine: the result has the same bits.

`make test` takes a sample of the numbers of workers and shards, `make test-crashes` all of 1..8 x 1..7, with a reshard
at every boundary as well; stopped, it goes on where it stopped (build/crashes.jsonl, a line for each that passed).
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from sharder_problems import tiny

from engine.sharder.drivers.faults import CRASHES, Weather
from tools.nightly import Ledger, commit

LEDGER = Path(__file__).resolve().parents[2] / "build" / "crashes.jsonl"

WEATHER = Weather(latency=(1, 6), timeout=30, absence=12)
SAMPLE = [(1, 1), (2, 2), (3, 1), (1, 3), (4, 2)]
GRID = [(workers, shards) for workers in range(1, 9) for shards in range(1, 8)]


def crash_everywhere(mode, workers, shards, kinds, microbatches=3):
    """Run one history, then one more for each of its events and each kind, with the fault there. The simulator holds
    every version on every shard against plain training, bit for bit."""
    arguments = {"workers": workers, "shards": shards, "microbatches": microbatches, "weather": WEATHER, "clocks": 2,
                 "clip_norm": None if "asp" in mode else 1.0, "save_every": 1, "many": shards > 2}
    simulation, calm = tiny(mode, **arguments)
    expected = simulation.state()
    for number in range(1, len(calm.events) + 1):
        for kind in kinds:
            simulation, _ = tiny(mode, faults=[(number, kind)], **arguments)
            if mode.startswith("bsp"):
                state = simulation.state()
                assert all(state[name].tobytes() == value.tobytes() for name, value in expected.items()
                           if name != "clock"), (mode, workers, shards, number, kind)
    return len(calm.events)


@pytest.mark.parametrize(("workers", "shards"), SAMPLE)
@pytest.mark.parametrize("mode", ["bsp, snapshots", "bsp, logs"])
def test_a_crash_at_every_event_boundary(mode, workers, shards):
    assert crash_everywhere(mode, workers, shards, CRASHES) > 30


@pytest.mark.parametrize("mode", ["bsp, replicas", "ssp, logs", "backup workers, logs", "asp, logs"])
def test_a_crash_at_every_event_boundary_in_the_other_modes(mode):
    crash_everywhere(mode, 2, 2, CRASHES)


def test_a_reshard_at_every_event_boundary():
    crash_everywhere("bsp, logs", 2, 2, ("reshard:3", "reshard:1"))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "shards"), GRID)
@pytest.mark.parametrize("mode", ["bsp, snapshots", "bsp, logs", "bsp, replicas"])
def test_every_crash_for_every_number_of_workers_and_shards(mode, workers, shards):
    ledger, start = Ledger(LEDGER), time.monotonic()
    what = {"mode": mode, "workers": workers, "shards": shards, "commit": commit()}
    if any(what.items() <= line.items() for line in ledger.lines):
        pytest.skip("passed on this commit before")
    kinds = (*CRASHES, f"reshard:{shards % 7 + 1}")
    events = crash_everywhere(mode, workers, shards, kinds, microbatches=max(3, workers))
    ledger.add({**what, "events": events, "histories": events * len(kinds),
                "seconds": round(time.monotonic() - start, 1)})
