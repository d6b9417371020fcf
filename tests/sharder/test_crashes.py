"""One crash at every event boundary of a whole history, for every kind of machine: the result has the same bits.

`make test` takes a sample of the numbers of workers and shards, `make test-crashes` all of 1..8 x 1..7, with a reshard
at every boundary as well; stopped, it goes on where it stopped (build/crashes.jsonl, a line for each that passed). What
passed counts for as long as nothing changes that decides it: the sources in DECIDES.
"""

from __future__ import annotations

import time
from hashlib import sha256
from pathlib import Path

import pytest
from sharder_problems import tiny

from engine.sharder.drivers.faults import CRASHES, Weather
from tools.nightly import Ledger

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "build" / "crashes.jsonl"
DECIDES = ("engine/sharder/**/*.py", "engine/optim/*.py", "engine/backend/*.py", "engine/dtypes.py",
           "tests/sharder/sharder_problems.py", "tests/sharder/test_crashes.py")

WEATHER = Weather(latency=(1, 6), timeout=30, absence=12)
SAMPLE = [(1, 1), (2, 2), (3, 1), (1, 3), (4, 2)]
GRID = [(workers, shards) for workers in range(1, 9) for shards in range(1, 8)]


def decisive(root=ROOT):
    """A hash of the names and the text of all that decides."""
    found = sha256()
    for path in sorted(path for pattern in DECIDES for path in root.glob(pattern)):
        found.update(f"{path.relative_to(root).as_posix()}\0{sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


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


def test_what_passed_counts_until_a_source_changes(tmp_path):
    for name in ("engine/sharder/shard.py", "engine/sharder/drivers/run.py", "engine/sharder/README.md",
                 "engine/optim/clip.py", "tests/sharder/test_crashes.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert len({str(path) for pattern in DECIDES for path in ROOT.glob(pattern)}) > 40
    seen = [decisive(tmp_path)]
    (tmp_path / "engine/sharder/README.md").write_text("another word")
    assert decisive(tmp_path) == seen[0]
    for name in ("engine/sharder/drivers/run.py", "engine/optim/clip.py", "engine/sharder/new.py"):
        (tmp_path / name).write_text("another line")
        seen.append(decisive(tmp_path))
    assert len(set(seen)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "shards"), GRID)
@pytest.mark.parametrize("mode", ["bsp, snapshots", "bsp, logs", "bsp, replicas"])
def test_every_crash_for_every_number_of_workers_and_shards(mode, workers, shards):
    ledger, start = Ledger(LEDGER), time.monotonic()
    what = {"mode": mode, "workers": workers, "shards": shards, "decisive": decisive()}
    if any(what.items() <= line.items() for line in ledger.lines):  # a history follows from its sources and its seed
        pytest.skip("passed before, on the same sources")
    # A shard is added where the number of workers is even, and removed where it is odd; 7 become 1, and 1 becomes 7.
    kinds = (*CRASHES, f"reshard:{(shards % 7 if workers % 2 == 0 else (shards - 2) % 7) + 1}")
    events = crash_everywhere(mode, workers, shards, kinds, microbatches=max(3, workers))
    ledger.add({**what, "events": events, "histories": events * len(kinds),
                "seconds": round(time.monotonic() - start, 1)})
