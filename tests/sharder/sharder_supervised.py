"""What holds of every supervised server, whatever its machines run in: losses, and the ends of a run.

A check is given a server that was just made, of the small problem with 3 microbatches unless it says otherwise. lost: a
context manager in which machines are killed; its `killed` says which. Programs are the functions of a module that every
process can import.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from random import Random

import pytest
from kills import Killer
from sharder_problems import Momentum, assert_plain_training, assert_same_bits, gradient, make, plain, program

from engine.sharder.drivers.plain import Plain
from engine.sharder.drivers.supervisor import WorkFailed
from engine.sharder.memory import Checkpoint

CLOCKS = 6  # of a run in which machines are lost


def server_of(kind, **arguments):
    return make(kind, **{"workers": 2, "shards": 2, "microbatches": 3, "save_every": 2, **arguments})


def expected(clock):
    return plain(False, 3, None, 8)[0][clock]


def killing(cluster, kinds, seed):
    """A context in which machines of these kinds are killed, one every 1 to 30 ms."""
    draw = Random(seed)
    return Killer(cluster, [(draw.uniform(0.001, 0.03), kind) for kind in kinds], draw)


def slow_program(client, seconds):
    """As program, with time for something to be lost in."""
    while client.clock():
        parameters = client.pull()
        for index in client.microbatches:
            time.sleep(seconds)
            client.push(index, *gradient(parameters, client.step, index))


def failing_program(client):
    while client.clock():
        parameters = client.pull()
        for index in client.microbatches:
            if (client.worker, client.step) == (1, 2):
                raise ZeroDivisionError("by worker 1")
            client.push(index, *gradient(parameters, client.step, index))


def interrupting_program(client, caller):
    while client.clock():
        parameters = client.pull()
        for index in client.microbatches:
            if (client.step, index) == (2, 0):
                os.kill(caller, signal.SIGINT)
                time.sleep(0.5)  # the signal is there before the clock ends
            client.push(index, *gradient(parameters, client.step, index))


def tidy_program(client, folder):
    try:
        program(client)
    finally:
        (folder / f"tidy {client.worker}").touch()


class Breaking(Momentum):
    def apply(self, k, new_param, new_state, param, state, grad, step, *how):
        if step == 3:
            raise FloatingPointError("in the rule")
        super().apply(k, new_param, new_state, param, state, grad, step, *how)


# ── lost ──────────────────────────────────────────────────────────────────────────────────────────────

def check_bits_when_machines_are_lost(server, work, lost):
    """server: of the wide problem, 4 microbatches, clip_norm 1."""
    with lost:
        done = list(server.run(work, CLOCKS))
    assert_plain_training(server, done, 4, 1.0, CLOCKS)


def check_course_when_machines_are_lost(server, work, lost):
    """The state is that of plain training along the course that was taken."""
    origin = server.checkpoint()
    with lost:
        done = list(server.run(work, CLOCKS))
    course = tuple((c.version, tuple(i for i in range(3) if i not in c.dropped)) for c in done)
    right = Plain(server.setup, Checkpoint(0, origin.parameters, dict.fromkeys(origin.slots)), gradient).after(course)
    assert_same_bits(server.checkpoint().parameters, right.parameters)
    assert_same_bits(server.checkpoint().slots["velocity"], right.slots["velocity"])
    assert lost.killed


def check_what_dies_again_and_again(server, monkeypatch, deaths, last):
    monkeypatch.setattr("engine.sharder.drivers.supervisor.DEATHS", deaths)
    error = rf"worker \d: its process died {deaths} times in clock 0, the last time {last}"
    with pytest.raises(WorkFailed, match=error):
        list(server.run(lambda client: os.kill(os.getpid(), signal.SIGKILL), clocks=1))


# ── the ends of a run ─────────────────────────────────────────────────────────────────────────────────

def check_exception_in_a_worker(server):
    """It is raised in the caller with its text, after the clocks before it, and the server can go on."""
    done = []
    with pytest.raises(WorkFailed, match=r"(?s)ZeroDivisionError: by worker 1.*in failing_program"):
        for committed in server.run(failing_program, clocks=5):
            done.append(committed.clock)
    assert done == [0, 1]
    assert_same_bits(server.state(), expected(2))
    list(server.run(program, clocks=2))
    assert_same_bits(server.state(), expected(4))


def check_exception_in_a_rule(server):
    """What it left is not mistaken for a state. server: with the rule Breaking."""
    with pytest.raises(WorkFailed, match="FloatingPointError: in the rule"):
        for _ in server.run(program, clocks=5):
            saved = server.state()
    with pytest.raises(RuntimeError, match=r"load\(\) a saved"):
        server.state()
    server.load(saved)
    assert server.clock == 2


def check_leaving_the_loop(server, folder):
    """It ends the run between two clocks, by break and by an exception, and programs clean up."""
    for committed in server.run(partial(tidy_program, folder=folder)):
        if committed.clock == 2:
            break
    assert_same_bits(server.state(), expected(3))
    assert len(list(folder.glob("tidy *"))) == 2
    with pytest.raises(KeyError):
        for _ in server.run(program):
            raise KeyError
    assert_same_bits(server.state(), expected(4))


def check_interrupt(server):
    """It ends the run at the end of its clock."""
    done = []
    with pytest.raises(KeyboardInterrupt):
        for committed in server.run(partial(interrupting_program, caller=os.getpid()), clocks=CLOCKS):
            done.append(committed.clock)
    assert done == [0, 1, 2]
    assert_same_bits(server.state(), expected(3))
