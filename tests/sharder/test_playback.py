"""The trace of a real run: what its machines did, when, what they said to each other, and who died."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sharder_problems import Processes, Threads, assert_same_bits, program
from sharder_supervised import expected, slow_program
from sharder_traces import check_trace, read_trace, spans

from engine.backend import Array
from engine.sharder.drivers import child, processes, tape
from engine.sharder.drivers.playback import Recording, playback
from engine.sharder.drivers.tape import Tape, read, weight
from engine.sharder.encoding import decode, encode
from engine.sharder.messages import Identity, Push

CLOCKS, SHARDS, WORKERS, MICROBATCHES = 3, 2, 2, 3
MACHINES = {"run 0", "coordinator 0", *(f"shard {s}" for s in range(SHARDS)), *(f"worker {w}" for w in range(WORKERS))}


def server_of(driver):
    return driver.make(workers=WORKERS, shards=SHARDS, microbatches=MICROBATCHES)


@pytest.mark.parametrize("driver", [Threads, Processes])
def test_everything_that_is_done_and_said_is_in_the_trace(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "PATIENCE", (60.0, 60.0))  # else what is answered late is sent again
    server, path = server_of(driver), tmp_path / "trace.json"
    list(server.run(partial(slow_program, seconds=0.001), CLOCKS, trace=path))
    assert_same_bits(server.state(), expected(CLOCKS))
    found = check_trace(path, MACHINES)
    done = {name: Counter(event["name"] for event in events if event["ph"] == "X") for name, events in found.items()}
    for shard in range(SHARDS):
        taken = [event["args"] for event in found[f"shard {shard}"] if (event["ph"], event["name"]) == ("X", "Push")]
        assert {(of["clock"], of["microbatch"]) for of in taken} == set(product(range(CLOCKS), range(MICROBATCHES)))
        assert done[f"shard {shard}"]["Apply"] >= CLOCKS
    of_workers = done["worker 0"] + done["worker 1"]
    assert of_workers["push"] == CLOCKS * MICROBATCHES and of_workers["over"] == WORKERS
    assert of_workers["wait"] == WORKERS * (CLOCKS + 1) and of_workers["pull"] == WORKERS * CLOCKS
    assert [event["args"]["clocks"] for event in read_trace(path) if event["ph"] == "C"] == [1, 2, 3]
    size = sum(4 * p.size for p in server.partition.parameters.values())
    pushed = [e["args"]["bytes"] for events in found.values() for e in events if (e["ph"], e["name"]) == ("s", "Push")]
    assert len(pushed) == sum(done[f"shard {s}"]["Push"] for s in range(SHARDS))  # what a new connection repeats too
    assert sum(pushed) > CLOCKS * MICROBATCHES * size


def test_computing_is_where_the_time_goes(tmp_path):
    """0.02 s of each microbatch are slept: they are in what a worker computes, and the shards' rows know nothing of it.
    """
    server, path = server_of(Threads), tmp_path / "trace.json"
    list(server.run(partial(slow_program, seconds=0.02), CLOCKS, trace=path))
    found = check_trace(path, MACHINES)
    computed = sum(until - since for w in range(WORKERS) for since, until, name in spans(found[f"worker {w}"])
                   if name == "compute")
    assert computed >= CLOCKS * MICROBATCHES * 0.02e9


@pytest.mark.process
def test_a_killed_worker_shows(tmp_path, monkeypatch):
    """Also if the supervisor is interrupted between a birth and whatever it does next."""
    def bear(self, order, original=processes._Processes.bear):
        original(self, order)
        time.sleep(0.1)

    monkeypatch.setattr(processes._Processes, "bear", bear)
    server, path = server_of(Processes), tmp_path / "trace.json"
    for done in server.run(partial(slow_program, seconds=0.01), CLOCKS, trace=path):
        if done.clock == 0:
            os.kill(server.processes()["worker", 1], signal.SIGKILL)
    assert_same_bits(server.state(), expected(CLOCKS))
    own = check_trace(path, MACHINES)["worker 1"]
    (death,) = [event for event in own if event["cat"] == "death"]
    assert death["name"] == "dies by signal 9"
    births = [event["ts"] for event in own if event["cat"] == "birth"]
    assert len(births) == 2 and births[0] < death["ts"] <= births[1]
    lives = {event["args"]["incarnation"]: event for event in own if event["ph"] == "X"}
    assert lives.keys() == {0, 1}
    for event in own:
        if event["ph"] == "X":
            first = event["args"]["incarnation"] == 0
            assert event["ts"] + event["dur"] <= death["ts"] + 1e-3 if first else event["ts"] >= births[1]


@pytest.mark.process
def test_a_run_that_fails_leaves_its_trace(tmp_path):
    def failing(client):
        client.clock()
        raise ZeroDivisionError

    for driver in (Threads, Processes):
        path = tmp_path / f"{driver.__name__}.json"
        with pytest.raises((ZeroDivisionError, RuntimeError), match=r"ZeroDivisionError|^$"):
            list(server_of(driver).run(failing, 1, trace=path))
        check_trace(path, MACHINES)


@pytest.mark.process
def test_nothing_is_recorded_unless_it_is_asked_for(monkeypatch):
    def refuse(*_):
        raise AssertionError("recorded")

    monkeypatch.setattr(tape.Tape, "__init__", refuse)
    for driver in (Threads, Processes):
        list(server_of(driver).run(program, 1))


@pytest.mark.process
def test_a_file_that_cannot_be_written_is_one_line_before_anything_begins(tmp_path):
    for driver in (Threads, Processes):
        server = server_of(driver)
        with pytest.raises(ValueError, match=r"^run: trace is '.*none/t\.json', which cannot be written: No such file"):
            list(server.run(program, 1, trace=tmp_path / "none" / "t.json"))
        list(server.run(program, 1))


@pytest.mark.process
def test_a_trace_that_cannot_be_written_any_more_leaves_ctrl_c_as_it_was(tmp_path, monkeypatch):
    def full(self, folder=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Recording, "write", full)
    for driver in (Threads, Processes):
        with pytest.raises(OSError, match="No space left"):
            list(server_of(driver).run(program, 1, trace=tmp_path / "t.json"))
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# ── tapes ─────────────────────────────────────────────────────────────────────────────────────────────

@given(sequence=st.integers(0, 9), loss=st.sampled_from([0, 1, 2.5]), size=st.sampled_from([1, 3, 5000]))
def test_a_mark_is_the_messages_own_on_both_ends(sequence, loss, size):
    """Also where numbers were written as floats; and it costs no pass over what is large."""
    def push(sequence, value=1.0):
        array = Array(np.full(size, value, np.float32))
        return Push(Identity(0, 0, sequence), 1, 0, 0, 0, loss, 3, (array,))

    body = b"".join(encode(push(sequence)))
    assert weight(push(sequence)) == weight(decode(body)) and weight(push(sequence))[0] == len(body)
    assert weight(push(sequence))[1] != weight(push(sequence + 1))[1]
    assert (weight(push(sequence))[1] == weight(push(sequence, 2.0))[1]) == (size == 5000)


def of(kind, number, *entries, computer="here", since=0, wall=1000, incarnation=0):
    return [["tape", kind, number, incarnation, computer, since, wall], *map(list, entries)]


def flows(trace):
    return [(e["ph"], e["id"], e["ts"]) for e in trace["traceEvents"] if e["ph"] in "sf"]


def test_a_line_that_was_not_finished_is_left_out(tmp_path):
    written = Tape(("shard", 1), 2, tmp_path / "tape")
    with written.span("snapshot"):
        pass
    with (tmp_path / "tape").open("ab") as file:
        file.write(b'["begin", 12')
    assert [entry[0] for entry in read(tmp_path / "tape")] == ["tape", "begin", "end"]


def test_other_computers_are_moved_to_our_time():
    """Theirs was started 5000 ns later, by the wall clocks."""
    here = of("run", 0, ["turn", 10, "waits", {}], ["send", 20_000, "worker", 0, "Stop", 7, 2])
    there = of("worker", 0, ["turn", 1000, "over", {}], ["hear", 16_000, "Stop", 7], computer="there", wall=6000)
    assert flows(playback([here, there])) == [("s", 1, 20.0), ("f", 1, 21.0)]


@pytest.mark.parametrize(("left", "came", "arrows"), [
    ((1, 5), (2, 6), ((1, 2), (5, 6))),
    ((1, 5), (6,), ((5, 6),)),  # the first was lost
    ((1, 5), (2,), ((1, 2),)),  # the second
    ((1, 2), (3, 4), ((1, 3), (2, 4))),
    ((1, 2, 9), (3,), ((2, 3),)),
    ((1, 2, 3, 9), (5, 6, 7), ((1, 5), (2, 6), (3, 7))),
    ((1,), (), ()),
])
def test_a_question_that_is_asked_again_and_lost(left, came, arrows):
    source = of("worker", 0, ["turn", 0, "wait", {}], *(["send", t, "shard", 0, "Pull", 7, 2] for t in left))
    shard = of("shard", 0, *(["hear", t, "Pull", 7] for t in came))
    trace = playback([source, shard])
    times = [1000 * time for _, _, time in flows(trace)]
    assert list(zip(times[::2], times[1::2])) == list(arrows)
    unheard = [e for e in trace["traceEvents"] if e["name"] == "Pull to shard 0 is not taken up"]
    assert len(unheard) == len(left) - len(arrows)


def test_who_died_before_it_noted_anything_has_a_row():
    run = of("run", 0, ["birth", 10, "coordinator", 0, "incarnation 0"], ["death", 50, "coordinator", 0, "dies"],
             ["turn", 90, "stop", {}])
    trace = playback([run])["traceEvents"]
    row = {e["tid"] for e in trace if e["name"] in ("incarnation 0", "dies")}
    assert len(row) == 1 and {e["args"]["name"] for e in trace if e["name"] == "thread_name" and e["tid"] in row} \
        == {"coordinator 0"}


def test_what_never_ended_ends_with_the_death_and_what_came_after_is_not_drawn():
    run = of("run", 0, ["death", 50, "shard", 0, "dies"], ["turn", 90, "stop", {}])
    first = of("shard", 0, ["begin", 10, "Apply", {}], ["begin", 20, "snapshot", {}], ["end", 60], ["end", 70])
    second = of("shard", 0, ["begin", 65, "Restore", {}], ["end", 80], since=60, incarnation=1)
    drawn = {e["name"]: (round(1000 * e["ts"]), round(1000 * (e["ts"] + e["dur"])))
             for e in playback([run, first, second])["traceEvents"] if e["ph"] == "X"}
    assert drawn == {"Apply": (10, 50), "snapshot": (20, 50), "Restore": (65, 80), "stop": (90, 90)}
