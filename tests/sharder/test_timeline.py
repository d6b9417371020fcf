"""A history as a Chrome trace: every reaction, every message, every fault is in it, where and when it was."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import timeline as program
from sharder_problems import tiny
from test_priced import PATIENT, WORK, priced, stand_in

from engine.sharder.drivers.faults import Weather
from engine.sharder.drivers.program import Computed
from engine.sharder.drivers.timeline import SECOND, UNIT, timeline

WEATHER = Weather(latency=(1, 20), loss=0.1, duplication=0.2)


@pytest.fixture(scope="module")
def drawn():
    _, history = tiny(workers=3, shards=2, seed=5, weather=WEATHER, faults=[(30, "shard"), (50, "worker")], clocks=4)
    return history, json.loads(json.dumps(timeline(history)))["traceEvents"]


def named(events):
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


def test_a_row_for_each_machine(drawn):
    _, events = drawn
    assert set(named(events).values()) >= {"coordinator 0", "shard 0", "shard 1", "worker 0", "worker 1", "worker 2"}
    assert len(named(events)) == len(set(named(events).values()))


def test_every_event_is_on_its_row_at_its_time(drawn):
    history, events = drawn
    rows = named(events)
    found = Counter((rows[e["tid"]], e["name"], e["ts"]) for e in events if e.get("cat") == "event")
    assert found == Counter((f"{to[0]} {to[1]}", type(event).__name__, time * UNIT)
                            for time, to, event, _ in history.events if not isinstance(event, Computed))


def test_what_is_computed_ends_when_it_is_done(drawn):
    history, events = drawn
    ends = Counter(round(e["ts"] + e["dur"], 3) for e in events if e["name"] == "compute")
    assert ends == Counter(round(time * UNIT, 3) for time, _, event, _ in history.events if isinstance(event, Computed))


def test_every_message_has_an_arrow_from_its_sending_to_its_arrival(drawn):
    history, events = drawn
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    lost = [e for e in events if e["name"].endswith("is lost")]
    assert len(starts) == len(history.carried) == len(ends) + len(lost) and lost and ends.keys() < starts.keys()
    assert all(starts[i]["ts"] < end["ts"] and starts[i]["name"] == end["name"] for i, end in ends.items())
    arrived = Counter((e["tid"], e["name"], e["ts"]) for e in ends.values())
    reactions = Counter((e["tid"], e["name"], e["ts"]) for e in events if e.get("cat") == "event")
    over = max(e["ts"] for e in events if "ts" in e and e.get("cat") == "event")
    assert all(reactions[key] >= 1 for key in arrived if key[2] < over), "an arrow that ends where nothing happens"


def test_faults_and_clocks_are_shown(drawn):
    _, events = drawn
    shown = [e["name"] for e in events if e.get("cat") == "fault"]
    assert any("dies" in name for name in shown)
    clocks = [e["args"]["clocks"] for e in events if e["ph"] == "C"]
    assert clocks == [1, 2, 3, 4]


def test_a_priced_simulation_is_drawn_in_seconds_with_a_row_for_its_network():
    simulation = priced(2, 2)
    history = simulation.run(stand_in, 3, 0, weather=PATIENT)
    events = json.loads(json.dumps(timeline(history, SECOND)))["traceEvents"]
    assert "network 0" in named(events).values()
    clocks = [e["ts"] for e in events if e["ph"] == "C"]
    assert clocks == [time * 1e6 for time in history.committed_at] and len(clocks) == 3
    computed = [e["dur"] for e in events if e["name"] == "compute"]
    assert len(computed) == 6 and all(0 < dur <= WORK * 1e6 for dur in computed)


def test_the_program(tmp_path, monkeypatch, capsys):
    out = tmp_path / "trace.json"
    monkeypatch.setattr("sys.argv", ["timeline", "--consistency", "ssp:1", "--fault", "20:shard", "--out", str(out)])
    assert program.main() == 0 and "6 clocks in" in capsys.readouterr().out
    assert json.loads(out.read_text())["traceEvents"]
    monkeypatch.setattr("sys.argv", ["timeline", *"--backups 1 --zero 3 --save-every 1 --out".split(), str(out)])
    assert program.main() == 0
    assert "Choose(" in out.read_text() and "Saved(" in out.read_text()
    for wrong, error in ((["--backups", "4"], "backups is 4, expected fewer than the 4 microbatches"),
                         (["--zero", "4"], "zero is 4, expected 1, 2 or 3"),
                         (["--compress", "int8", "--backups", "1"], "compress is 'int8' and consistency has backups"),
                         (["--compress", "zip"], "compress is 'zip', expected fp16"),
                         (["--fault", "shard"], "got 'shard', expected an event number"),
                         (["--fault", "20:reshard:0"], "got '20:reshard:0', expected an event number"),
                         (["--loss", "1.5"], "Weather: loss is 1.5, expected a probability"),
                         (["--stalling", "nan"], "Weather: stalling is nan, expected a probability"),
                         (["--clocks", "-3"], "run: clocks is -3, expected a whole number"),
                         (["--out", str(tmp_path / "none" / "x.json")], "argument --out: there is no folder"),
                         (["--consistency", "bsq"], "consistency is 'bsq', expected bsp")):
        monkeypatch.setattr("sys.argv", ["timeline", *wrong])
        with pytest.raises(SystemExit):
            program.main()
        assert error in capsys.readouterr().err
