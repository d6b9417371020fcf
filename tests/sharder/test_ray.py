"""The driver of Ray actors on three raylets of this machine: the conformance suite, actors and nodes that are lost, and
the ends of a run. `make test-ray` runs this; what needs no cluster is in test_ray_mail.py."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
import time
from functools import partial, wraps
from pathlib import Path
from random import Random

import pytest
import sharder_supervised as supervised
import test_conformance
from sharder_problems import Served, assert_plain_training, assert_same_bits, gradient, plain, program
from sharder_raylets import NODES, machines, one_less, raylets
from sharder_supervised import Breaking, expected, slow_program
from sharder_traces import check_trace

from engine.sharder.consistency import Consistency
from engine.sharder.drivers import ray_server
from engine.sharder.drivers.plain import Plain
from engine.sharder.drivers.ray_server import RayServer
from engine.sharder.drivers.supervisor import WorkFailed

SLOW = partial(slow_program, seconds=0.1)
server_of = partial(supervised.server_of, RayServer)


# ── on three raylets ──────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def cluster():
    with raylets() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """Neither folders of runs nor actors."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = machines()
    yield
    assert not list(tmp_path.glob("shardgrad-*"))
    end = time.monotonic() + 5
    while not (left := machines()) <= before and time.monotonic() < end:
        time.sleep(0.05)
    assert left <= before


class Rays(Served):
    kind = RayServer


@pytest.fixture
def driver(cluster):
    return Rays


def shared(test):
    """A test of the conformance suite, for this driver."""
    @pytest.mark.slow
    @wraps(test)
    def again(driver):
        test(driver)

    return again


test_a_state_loads_into_any_number_of_shards_and_workers = shared(
    test_conformance.test_a_state_loads_into_any_number_of_shards_and_workers)
test_runs_follow_one_another = shared(test_conformance.test_runs_follow_one_another)
test_no_clock_changes_nothing = shared(test_conformance.test_no_clock_changes_nothing)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "shards", "microbatches", "clip_norm"),
                         [(1, 1, 1, None), (2, 3, 3, 1.0), (3, 2, 4, 0.5), (4, 5, 6, None)])
def test_every_number_of_workers_and_shards_gives_the_bits_of_plain_training(cluster, workers, shards, microbatches,
                                                                             clip_norm):
    server = server_of(wide=True, workers=workers, shards=shards, microbatches=microbatches, clip_norm=clip_norm)
    assert_plain_training(server, list(server.run(program, 3)), microbatches, clip_norm, 3)


def program_in_the_store(client):
    """As program, on parameters that lie in the memory which Ray's processes share."""
    while client.clock():
        parameters = client.pull()
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "plasma" in line]
        shared = [range(*(int(end, 16) for end in span.split("-"))) for span, *_ in maps]
        assert all(any(value.ctypes.data in part for part in shared) for value in parameters.values()), maps
        assert not any(value.flags.writeable for value in parameters.values())
        for index in client.microbatches:
            client.push(index, *gradient(parameters, client.step, index))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc to see where memory comes from")
def test_what_is_pulled_is_read_where_it_lies_in_the_store(cluster):
    server = server_of(wide=True, shards=1, workers=3)
    list(server.run(program_in_the_store, 2))
    assert_same_bits(server.state(), plain(True, 3, None, 2)[0][2])


# ── lost ──────────────────────────────────────────────────────────────────────────────────────────────

class Killer(threading.Thread):
    """Kills actors at given moments, by turns with Ray's own call and with SIGKILL. plan: (seconds since the one
    before, kind of machine); what is not there yet is waited for."""

    def __init__(self, server, plan, choose):
        super().__init__(daemon=True)
        self.server, self.plan, self.choose = server, plan, choose
        self.killed, self.over = [], threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def run(self):
        import ray

        for number, (seconds, kind) in enumerate(self.plan):
            self.over.wait(seconds)
            while not (there := [a for a in self.server.actors().items() if a[0][0] == kind]):
                if self.over.wait(0.01):
                    return
            address, actor = self.choose.choice(there)
            with contextlib.suppress(ray.exceptions.RayActorError):  # it was dead already
                process = actor.process.options(concurrency_group="mail").remote()
                if number % 2:
                    os.kill(ray.get(process)[1], signal.SIGKILL)
                else:
                    ray.kill(actor, no_restart=False)
                self.killed.append(address)


@pytest.mark.slow
@pytest.mark.parametrize(("durability", "workers", "shards"), [("snapshot", 2, 2), ("log", 2, 3)])
def test_killed_at_any_moment_and_still_the_same_bits(cluster, durability, workers, shards):
    server = server_of(wide=True, durability=durability, workers=workers, shards=shards, microbatches=4, clip_norm=1.0)
    draw = Random(workers * 10 + shards)
    kinds = ("shard", "worker", "coordinator", "coordinator", "shard", "worker", "shard")
    plan = [(2.0, "shard")] + [(draw.uniform(0.0, 1.5), kind) for kind in kinds]
    killer = Killer(server, plan, draw)
    supervised.check_bits_when_machines_are_lost(server, SLOW, killer)
    assert len(killer.killed) >= 3


@pytest.mark.slow
def test_shards_come_and_go_as_actors(cluster, tmp_path):
    server, wanted, seen = server_of(), [3, 1, 2], set()
    path = tmp_path / "trace.json"
    with Killer(server, [(3.0, "shard"), (0.5, "coordinator")], Random(0)) as killer:
        for done in server.run(SLOW, 12, trace=path):
            seen.add(sum(kind == "shard" for kind, _ in server.actors()))
            if done.clock % 3 == 0 and wanted:
                server.reshard(wanted.pop(0))
            assert_same_bits(server.state(), plain(False, 3, None, 12)[0][done.clock + 1])
    assert killer.killed and seen >= {1, 3} and server.term.shards == 2
    found = check_trace(path, {"run 0", "coordinator 0", "worker 0", "worker 1", "shard 0", "shard 1", "shard 2"})
    assert sum(event["cat"] == "death" for own in found.values() for event in own) >= len(killer.killed)


@pytest.mark.slow
def test_what_workers_had_left_to_say_outlives_them(cluster):
    server = server_of(wide=True, microbatches=4, clip_norm=1.0, compress="int8")
    origin = server.checkpoint()
    with Killer(server, [(2.0, "worker"), (0.5, "shard"), (0.5, "worker")], Random(0)) as killer:
        list(server.run(SLOW, 6))
    right = Plain(server.setup, origin, gradient).after(tuple((clock, (0, 1, 2, 3)) for clock in range(6)))
    assert killer.killed
    assert_same_bits(server.checkpoint().parameters, right.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("consistency", ["ssp:1", Consistency(backups=1)])
def test_what_is_committed_stays_so_with_logs(cluster, consistency):
    server = server_of(consistency=consistency)
    plan = [(3.0, "shard"), (0.3, "coordinator"), (0.3, "worker"), (1.0, "shard")]
    supervised.check_course_when_machines_are_lost(server, SLOW, Killer(server, plan, Random(0)))


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["snapshot", "log"])
def test_a_node_that_is_gone_takes_its_actors_along_and_they_come_back_elsewhere(cluster, durability):
    server = server_of(durability=durability, workers=3, shards=3)
    with one_less(cluster) as node:
        for done in server.run(SLOW, 6):
            if done.clock == 1:
                before, places = server.actors(), {address: place for address, (place, _) in server.processes().items()}
                lost = {address for address, place in places.items() if place == node.node_id}
                assert {"shard", "worker"} <= {kind for kind, _ in lost} and len(set(places.values())) == NODES
                cluster.remove_node(node, allow_graceful=False)
            if done.clock > 1 and lost:  # it is noticed some time later; the run goes on until then
                time.sleep(0.5)
                lost = {address for address in lost if server.actors().get(address) is before[address]}
            assert_same_bits(server.state(), expected(done.clock + 1))
        assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["snapshot", "log"])
def test_actors_that_are_only_thought_to_be_dead_change_nothing(cluster, durability):
    """Their raylet is stopped, so Ray holds the node for dead; they go on beside those that have taken their places."""
    server, after = server_of(durability=durability, workers=3, shards=3), 0
    with one_less(cluster) as node:
        raylet = node.all_processes["raylet"][0].process.pid
        for done in server.run(SLOW):
            if done.clock == 1:
                before, places = server.actors(), server.processes()
                cut_off = {address: pid for address, (place, pid) in places.items() if place == node.node_id}
                os.kill(raylet, signal.SIGSTOP)
            elif done.clock > 1:
                after += all(server.actors().get(address) is not before[address] for address in cut_off)
            if after == 4:
                break
        alive = [address for address, pid in cut_off.items() if os.path.exists(f"/proc/{pid}")]
        os.kill(raylet, signal.SIGCONT)
        cluster.remove_node(node, allow_graceful=False)
    assert alive
    assert_same_bits(server.state(), plain(False, 3, None, done.clock + 1)[0][done.clock + 1])


@pytest.mark.slow
def test_the_default_model_on_three_raylets_ends_with_the_hash_of_training_in_process(cluster, tmp_path):
    """A node is removed in the middle of a step."""
    from tools.training.cache import open_cache
    from tools.training.corpus import open_corpus
    from tools.training.session import Session
    from tools.training.settings import Settings

    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {j} is {i * j}\n" for i in range(60) for j in range(60)))
    cache = open_cache(open_corpus(str(text)), tmp_path / "cache", None)
    threads, rays = (Session(Settings(steps=5, driver=driver, workers=2, shards=3, warmup=1), cache, {}, tmp_path)
                     for driver in ("threads", "ray"))
    list(threads.steps())
    with one_less(cluster) as node:
        for done in rays.steps():
            if done.clock == 0:
                first = rays.server.actors()
                places = {address: place for address, (place, _) in rays.server.processes().items()}
                timer = threading.Timer(0.3, cluster.remove_node, (node, False))
                timer.start()
            last = rays.server.actors()
        timer.join()
    assert {address for address, actor in last.items() if actor is not first[address]} >= {
        address for address, place in places.items() if place == node.node_id} != set()
    assert rays.digest() == threads.digest()


# ── a clean end ───────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_an_exception_in_a_worker_is_raised_in_the_caller_with_its_text(cluster):
    supervised.check_exception_in_a_worker(server_of())


@pytest.mark.slow
def test_an_exception_in_a_rule_is_raised_and_what_it_left_is_not_mistaken_for_a_state(cluster, monkeypatch):
    monkeypatch.setattr("engine.sharder.drivers.supervisor.STANDING", 1.0)
    supervised.check_exception_in_a_rule(server_of(rule=Breaking()))


@pytest.mark.slow
def test_what_dies_again_and_again_is_no_accident(cluster, monkeypatch):
    supervised.check_what_dies_again_and_again(
        server_of(), monkeypatch, 2, "as Ray says: The actor is dead because its worker process has died")


@pytest.mark.slow
def test_leaving_the_loop_ends_the_run_between_two_clocks_and_programs_clean_up(cluster, tmp_path):
    supervised.check_leaving_the_loop(server_of(), tmp_path)


@pytest.mark.slow
def test_an_interrupt_ends_the_run_at_the_end_of_its_clock(cluster):
    supervised.check_interrupt(server_of())


@pytest.mark.slow
def test_what_cannot_be_sent_or_computed_there_is_one_line(cluster, tmp_path, monkeypatch):
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"^RayServer: the program cannot be pickled for other processes: .*lock"):
        list(server_of().run(lambda client: lock, 1))
    with pytest.raises(ValueError, match=r"^RayServer: the rule or the hyper-parameters cannot be pickled"):
        list(server_of(hyper=lambda step, name: {"lr": 1.0 if lock else 0.0}).run(program, 1))
    with pytest.raises(ValueError, match=r"^RayServer: options of shard are {'num_cpu': 1}: Invalid option keyword"):
        list(server_of(options={"shard": {"num_cpu": 1}}).run(program, 1))
    (tmp_path / "only_here.py").write_text("def program(client):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WorkFailed, match=r"^worker \d: its actor cannot be made: ModuleNotFoundError: .*'only_here'$"):
        list(server_of().run(importlib.import_module("only_here").program, 1))
    monkeypatch.setattr(ray_server, "arithmetic", lambda k: "cpu v2 0123")
    with pytest.raises(WorkFailed, match=r"^Foreign: \w+ \d computes with reference .*, and the run with cpu v2 0123: "
                                         r"results would have other bits\n"):
        list(server_of().run(program, 1))


@pytest.mark.slow
def test_a_folder_that_the_nodes_do_not_see_is_one_line(cluster, monkeypatch):
    """The run's folder is another one for the actors, as on a computer that does not share it."""
    kept = ray_server.replace
    monkeypatch.setattr(ray_server, "replace", lambda order, **changes: kept(order, folder=Path("/nowhere"), **changes))
    with pytest.raises(WorkFailed, match=r"^FileNotFoundError: there is no folder /nowhere of this run on .*; expected "
                                         r"one in a file system that every computer of the run sees\n"):
        list(server_of().run(program, 1))
    monkeypatch.undo()
    monkeypatch.setattr(ray_server._Actors, "_nodes", lambda self: [{"NodeManagerAddress": name} for name in "ab"])
    with pytest.raises(ValueError, match=r"^RayServer: folder is None, and the cluster has 2 computers; "):
        list(server_of().run(program, 1))


@pytest.mark.slow
def test_train_runs_on_a_cluster_of_its_own_and_leaves_nothing(tmp_path, monkeypatch):
    """To the hash of the threads; and Ctrl-C, which a terminal sends to Ray's processes too, ends it likewise."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    pytest.importorskip("ray", reason="needs Ray: pip install 'shardgrad[cluster]'")
    from test_tools_train import SMALL, result, start

    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {j} is {i * j}\n" for i in range(20) for j in range(10)))
    common = ["--cache", str(tmp_path / "cache"), "--data", str(text), *SMALL]
    for driver in ("threads", "ray"):
        run = start("--run", str(tmp_path / driver), *common, "--driver", driver)
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    assert result(tmp_path / "ray") == result(tmp_path / "threads")
    endless = ["--steps", "100000", "--checkpoint-every", "100000", "--validate-every", "100000", "--driver", "ray"]
    run = start("--run", str(tmp_path / "stopped"), *common, *endless, start_new_session=True)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "the checkpoint is written" in errors and "Traceback" not in errors, errors
    assert not list(tmp_path.glob("*/shardgrad-*"))
