"""The driver of processes: whatever is killed, the bits are those of plain training, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from random import Random

import kills
import numpy as np
import pytest
import sharder_supervised as supervised
from kills import Killer
from sharder_problems import Momentum, assert_same_bits, gradient, program
from sharder_supervised import Breaking, expected, slow_program
from sharder_traces import check_trace

from engine.optim import SGDRule
from engine.sharder.consistency import Consistency
from engine.sharder.drivers import child, post
from engine.sharder.drivers.plain import Plain
from engine.sharder.drivers.processes import ProcessServer
from engine.sharder.drivers.supervisor import WorkFailed
from engine.sharder.wire import Hello, arithmetic

TESTS = Path(__file__).parent
SLOW = partial(slow_program, seconds=0.01)
server_of = partial(supervised.server_of, ProcessServer)


def children():
    """The processes that this one bore and that live."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        found |= set(path.read_text().split())
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, shared = children(), set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    yield
    assert children() <= before
    assert not list(tmp_path.glob("shardgrad-*"))
    assert not shared or set(os.listdir("/dev/shm")) <= shared


# ── killed ────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("durability", "workers", "shards"), [("snapshot", 2, 2), ("log", 2, 3), ("snapshot", 3, 1)])
def test_killed_at_any_moment_and_still_the_same_bits(durability, workers, shards):
    server = server_of(wide=True, durability=durability, workers=workers, shards=shards, microbatches=4, clip_norm=1.0)
    draw = Random(workers * 10 + shards)
    plan = [(draw.uniform(0.001, 0.03), kind) for kind in ("shard", "worker", "coordinator", "shard", "coordinator")]
    killer = Killer(server, plan, draw)
    supervised.check_bits_when_machines_are_lost(server, SLOW, killer)
    assert killer.killed


def test_what_workers_push_is_counted_and_who_came_back():
    """Every worker says how much it was, all of it each time; a second run goes on counting."""
    size = sum(4 * p.size for p in server_of().partition.parameters.values())
    server = server_of()
    for runs in (1, 2):
        list(server.run(program, 2))
        assert server.pushed.sent == server.pushed.dense == runs * 2 * 3 * size
        assert server.returns == 0
    with Killer(server, [(0.02, "shard")], Random(0)) as killer:
        list(server.run(SLOW, 6))
    assert server.returns == len(killer.killed) == 1


@pytest.mark.parametrize("consistency", ["ssp:1", Consistency(backups=1)])
def test_what_is_committed_stays_so_with_logs(consistency):
    server = server_of(consistency=consistency)
    plan = [(0.05, "shard"), (0.03, "coordinator"), (0.03, "worker"), (0.03, "shard")]
    supervised.check_course_when_machines_are_lost(server, SLOW, Killer(server, plan, Random(0)))


def test_asp_takes_every_push_once():
    """Gradients that do not depend on the parameters, and a rule that adds them: the sum shows each of them."""
    server = server_of(consistency="asp", rule=Adding(), microbatches=4)
    before = server.parameters()["v"]
    plan = [(0.04, "worker"), (0.02, "shard"), (0.03, "coordinator"), (0.03, "shard")]
    with Killer(server, plan, Random(0)) as killer:
        list(server.run(ones_program, 5, stride=5))
    difference = server.parameters()["v"] - before  # 20 sums, each rounded by at most 2^-20 where they are below 32
    assert killer.killed and (abs(difference - 20) <= 20 * 2.0 ** -20).all()


class Adding(Momentum):
    slots = ()
    lr = 1.0

    def init(self, k, n, dtype):
        return {}

    def apply(self, k, new_param, new_state, param, state, grad, step, divisor, scale, **hyper):
        k.add(new_param, param, grad, None)


def ones_program(client):
    while client.clock():
        parameters = client.pull()
        for index in client.microbatches:
            time.sleep(0.002)
            client.push(index, {name: value * 0 + 1 for name, value in parameters.items()}, 0.0, 1)


def test_state_between_two_clocks_while_shards_die():
    server = server_of()
    for done in server.run(program, 4):
        for address, pid in server.processes().items():
            if address == ("shard", done.clock % 2):
                os.kill(pid, signal.SIGKILL)
        assert_same_bits(server.state(), expected(done.clock + 1))
    assert_same_bits(server.state(), expected(4))


def test_the_program_that_kills_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    ledger = tmp_path / "ledger"
    for count in (1, 1, 9):
        monkeypatch.setattr("sys.argv", ["kills", "--kills", str(count), "--ledger", str(ledger)])
        assert kills.main() == 0
        assert "every run has the bits of plain training" in capsys.readouterr().out
    assert len(ledger.read_text().splitlines()) == 2
    monkeypatch.setattr("sys.argv", ["kills", "--kills", "99", "--ledger", str(ledger)])
    monkeypatch.setattr(kills.Plain, "update", lambda self, before, *_: before)
    assert kills.main() == 1 and "other bits or clocks with seed 2" in capsys.readouterr().out


def test_an_answer_that_comes_late_is_not_mistaken_for_the_present_state():
    server, late = server_of(), []
    for done in server.run(program, 3):
        server._team.mail._messages += late  # private: nobody can be made to answer late
        assert_same_bits(server.state(), expected(done.clock + 1))
        late = [child.Standing(shard, part) for shard, part in server._team.parts.items()]


# ── more shards, or fewer ─────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("durability", "compress"), [("snapshot", None), ("log", None), ("snapshot", "int8")])
def test_shards_come_and_go_as_processes_while_others_are_killed(durability, compress):
    """After every clock the caller wants another number of shards, and right then somebody dies."""
    server = server_of(wide=True, durability=durability, microbatches=4, clip_norm=1.0, compress=compress)
    right = Plain(server.setup, server.checkpoint(), gradient)
    seen, wanted, draw = set(), [3, 1, 4, 4, 2, 5, 1, 2], Random(7)
    for done in server.run(SLOW, 9):
        alive = server.processes()
        seen.add(sum(kind == "shard" for kind, _ in alive))
        if done.clock < len(wanted):
            server.reshard(wanted[done.clock])
            kind = ("worker", "shard", "coordinator", "shard")[done.clock % 4]
            os.kill(alive[draw.choice([address for address in alive if address[0] == kind])], signal.SIGKILL)
        expected = right.after(tuple((clock, (0, 1, 2, 3)) for clock in range(done.clock + 1)))
        if done.clock % 3 == 2:
            assert_same_bits(server.checkpoint().parameters, expected.parameters)
    assert_same_bits(server.checkpoint().parameters, expected.parameters)
    assert_same_bits(server.checkpoint().slots["velocity"], expected.slots["velocity"])
    assert server.term.shards == 2 and len(seen) >= 3


@pytest.mark.parametrize("consistency", ["bsp", "ssp:1", "asp"])
def test_a_removed_shards_process_ends_and_a_new_one_serves(consistency):
    server = server_of(consistency=consistency, shards=3)
    count = 0
    for done in server.run(SLOW, 200, stride=2):
        of_now = {number for kind, number in server.processes() if kind == "shard"}
        if done.clock == 0:
            server.reshard(1)
        elif of_now == {0} and not count:
            count = 1
            server.reshard(4)
        elif count and of_now == {0, 1, 2, 3}:
            break
    assert count and done.clock < 199
    assert server.term.shards == 4


def test_a_wish_from_another_thread_in_the_middle_of_a_clock(tmp_path):
    server, path = server_of(), tmp_path / "trace.json"
    timer = threading.Timer(0.05, server.reshard, (3,))
    for done in server.run(partial(slow_program, seconds=0.03), 8, trace=path):
        if done.clock == 0:
            timer.start()
    timer.join()
    found = check_trace(path, {"run 0", "coordinator 0", "worker 0", "worker 1", "shard 0", "shard 1", "shard 2"})
    assert {"Restore", "Push"} <= {event["name"] for event in found["shard 2"]}
    assert server.term.shards == 3
    assert_same_bits(server.state(), expected(8))


def test_a_wish_that_comes_too_late_is_fulfilled_afterwards():
    server = server_of()
    for done in server.run(program, 3):
        if done.clock == 2:
            server.reshard(5)
    assert server.term.shards == 5
    assert_same_bits(server.state(), expected(3))
    list(server.run(program, 1))
    assert_same_bits(server.state(), expected(4))


# ── a clean end ───────────────────────────────────────────────────────────────────────────────────────

def test_an_exception_in_a_worker_is_raised_in_the_caller_with_its_text():
    supervised.check_exception_in_a_worker(server_of())


def test_an_exception_in_a_rule_is_raised_and_what_it_left_is_not_mistaken_for_a_state():
    supervised.check_exception_in_a_rule(server_of(rule=Breaking()))


@pytest.mark.parametrize(("end", "error"), [
    (lambda client: None, "its program returned in clock -1, before the end"),
    (lambda client: sys.exit("enough"), "SystemExit: enough"),
    (lambda client: os._exit(7), r"worker \d: its process ended with exit code 7"),
])
def test_a_program_that_ends_too_early_is_an_error(end, error):
    with pytest.raises(WorkFailed, match=error):
        list(server_of().run(end, clocks=1))


def test_leaving_the_loop_ends_the_run_between_two_clocks_and_programs_clean_up(tmp_path):
    supervised.check_leaving_the_loop(server_of(), tmp_path)


def test_an_interrupt_ends_the_run_at_the_end_of_its_clock():
    supervised.check_interrupt(server_of())


def test_what_dies_again_and_again_is_no_accident(monkeypatch):
    supervised.check_what_dies_again_and_again(server_of(), monkeypatch, 3, "by signal 9")


ORPHANS = """
import sys, time
sys.path[:0] = {paths!r}
from sharder_problems import make, program
from engine.sharder.drivers.processes import ProcessServer
server = make(ProcessServer, workers=2, shards=2, microbatches=3, start={start!r}, folder={folder!r})
if __name__ == "__main__":
    for done in server.run(program):
        print(*server.processes().values(), flush=True)
        time.sleep({pause})
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("start", "end"), [("fork", signal.SIGKILL), ("spawn", signal.SIGKILL),
                                            ("fork", signal.SIGINT)])
def test_no_child_outlives_its_run(tmp_path, start, end):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS.format(paths=[str(TESTS), str(TESTS.parents[1])], start=start, folder=str(tmp_path),
                                     pause=0.01 if end == signal.SIGINT else 60))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 5 and all(map(alive, pids))
        run.send_signal(end)
        run.communicate(timeout=30)
    wait = time.monotonic() + 20
    while (any(map(alive, pids)) or list(tmp_path.glob("shardgrad-*"))) and time.monotonic() < wait:
        time.sleep(0.01)
    assert not any(map(alive, pids)) and not list(tmp_path.glob("shardgrad-*"))


def test_a_folder_goes_while_others_write_to_it(tmp_path):
    """As residuals are written: a file comes into a folder that is made when it is not there."""
    folder = tmp_path / "run"
    folder.mkdir()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def write():
        ours.close()  # else the watcher's end would not be the last
        end = time.monotonic() + 5
        try:
            while time.monotonic() < end:
                for number in range(50):
                    (folder / str(number)).mkdir(exist_ok=True)
                    (folder / str(number) / "left").write_bytes(b"")
        except OSError:
            pass  # it is gone

    def watch():
        ours.close()
        child._watch(theirs, folder)

    processes = [fork.Process(target=target) for target in (write, watch)]
    for process in processes:
        process.start()
    time.sleep(0.1)
    theirs.close()
    ours.close()
    for process in processes:
        process.join(20)
        assert not process.is_alive()
    assert not list(tmp_path.iterdir())


def test_hyper_parameters_are_those_of_the_beginning_for_those_who_come_back_too():
    hyper = {"lr": 0.5}
    server = ProcessServer({"w": np.ones(2, "float32")}, SGDRule(), microbatches=1, hyper=hyper)
    hyper["lr"] = 100.0
    assert server.recipe.hyper == {"lr": 0.5}


RAISES = ORPHANS.replace("time.sleep({pause})", "raise KeyError('by the caller')")


def test_a_caller_that_ends_without_leaving_the_loop_leaves_nothing(tmp_path):
    script = tmp_path / "raises.py"
    script.write_text(RAISES.format(paths=[str(TESTS), str(TESTS.parents[1])], start="fork", folder=str(tmp_path)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("KeyError: 'by the caller'"), done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 5 and not any(map(alive, pids)) and not list(tmp_path.glob("shardgrad-*"))


# ── who may take part ─────────────────────────────────────────────────────────────────────────────────

def test_a_worker_with_other_arithmetic_is_refused_by_one_line(monkeypatch, capfd):
    def other(k):
        return "cpu v2 0123" if multiprocessing.current_process().name == "worker 1" else arithmetic(k)

    monkeypatch.setattr(child, "arithmetic", other)
    with pytest.raises(WorkFailed, match=r"^worker 1: its process ended with exit code 1; wire: worker 1 computes with "
                                         r"cpu v2 0123, and run 0 with reference .*: results would have other bits$"):
        list(server_of().run(program, 1))


def test_strangers_at_the_socket_change_nothing(caplog, monkeypatch):
    server, sockets = server_of(), []
    for done in server.run(program, 4):
        for name in ("shard-0", "coordinator-0", "run-0"):
            stranger = socket.socket(socket.AF_UNIX)
            monkeypatch.chdir(next(Path(tempfile.gettempdir()).glob("shardgrad-*")))  # its path may be too long
            stranger.connect(f"{name}.socket")
            stranger.sendall([b"GET / HTTP/1.1\r\n\r\n" * 20, os.urandom(300), b"shgH" + bytes(60)][done.clock % 3])
            sockets.append(stranger)
    assert_same_bits(server.state(), expected(4))
    assert any("wire: begins with b'GET ', expected b'shgH'" in record.message for record in caplog.records)
    for stranger in sockets:
        stranger.close()


@pytest.mark.parametrize(("arguments", "error"), [
    ({"durability": "backup"}, "durability is 'backup', expected snapshot or log"),
    ({"durability": "snapshot", "consistency": "asp"}, "durability is 'snapshot', expected log, the only one"),
    ({"start": "thread"}, "start is 'thread', expected fork or spawn"),
    ({"shards": 0}, "shards is 0"),
])
def test_what_cannot_be_configured(arguments, error):
    with pytest.raises(ValueError, match=f"^(ProcessServer|ParameterServer): {error}"):
        server_of(**arguments)


@pytest.mark.parametrize("descriptors", [post.DESCRIPTORS, "/nowhere"], ids=["this system", "one without /proc"])
def test_a_folder_deeper_than_the_name_of_a_socket_is_long(tmp_path, monkeypatch, descriptors):
    """A run goes on there where folders are known by their descriptors, and is refused by one line elsewhere."""
    monkeypatch.setattr(post, "DESCRIPTORS", descriptors)
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    server = server_of(folder=deep)
    if os.path.isdir(descriptors):
        list(server.run(program, 1))
        assert_same_bits(server.state(), expected(1))
    else:
        with pytest.raises(ValueError, match=r"^ProcessServer: folder is .*xx'\), where no run can be: the path of a "
                                             r"socket has \d+ bytes there, expected at most 103$"):
            list(server.run(program, 1))
    assert not list(deep.iterdir())


def test_a_socket_with_a_longer_name_than_the_runs_own_is_thought_of(tmp_path, monkeypatch):
    """The coordinator's: where it does not fit, the run would begin, and its child die of it."""
    monkeypatch.setattr(post, "DESCRIPTORS", "/nowhere")
    monkeypatch.chdir(tmp_path)
    fits = post.NAME - len("/coordinator-0.socket")
    folders = [Path("x" * length) for length in (fits, fits + 1)]
    for folder in folders:
        folder.mkdir()
    for kind in post.RANKS:
        post.Post(Hello(kind, 0, 0, "cpu"), folders[0], bytes(32)).close()
        free = lowest_free_descriptor()
        with pytest.raises(OSError, match="the path of a socket has 104 bytes there, expected at most 103"):
            post.Post(Hello(kind, 0, 0, "cpu"), folders[1], bytes(32))
        assert lowest_free_descriptor() == free


def lowest_free_descriptor():
    found = os.dup(0)
    os.close(found)
    return found


def test_a_folder_in_which_no_run_can_be(tmp_path):
    server = server_of(folder=tmp_path / "missing")
    with pytest.raises(ValueError, match=r"ProcessServer: folder is .*missing.*, where no run can be: .*No such file"):
        list(server.run(program, 1))
    server.folder = None
    list(server.run(program, 1))
    assert_same_bits(server.state(), expected(1))
