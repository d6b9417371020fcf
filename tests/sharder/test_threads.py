"""The driver of threads: no copies, no torn reads, and a clean end whatever goes wrong."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest
from sharder_problems import Momentum, assert_same_bits, gradient, make, plain, program

import engine as eg
from engine.backend import get_backend
from engine.optim import SGDRule
from engine.sharder import ParameterServer, take_gradients


def server_of(**arguments):
    return make(ParameterServer, **{"workers": 2, "shards": 2, "microbatches": 3, **arguments})


def expected(clock):
    return plain(False, 3, None, 8)[0][clock]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    left = [t.name for t in threading.enumerate() if t.name.split()[0] in ("coordinator", "shard", "worker")]
    assert not left


# ── a clean end ───────────────────────────────────────────────────────────────────────────────────────

def failing(worker, step, error):
    def failing_program(client):
        while client.clock():
            parameters = client.pull()
            for index in client.microbatches:
                if (client.worker, client.step) == (worker, step):
                    raise error
                client.push(index, *gradient(parameters, client.step, index))
    return failing_program


def test_an_exception_in_a_worker_is_raised_in_the_caller_with_its_traceback():
    server = server_of()
    done = []
    with pytest.raises(ZeroDivisionError, match="by worker 1") as caught:
        for committed in server.run(failing(1, 2, ZeroDivisionError("by worker 1")), clocks=5):
            done.append(committed.clock)
    assert done == [0, 1]
    assert "failing_program" in [entry.name for entry in caught.traceback]
    assert_same_bits(server.state(), expected(2))
    list(server.run(program, clocks=2))  # and the server is as good as before
    assert_same_bits(server.state(), expected(4))


@pytest.mark.parametrize("shards", [1, 2])
def test_an_exception_in_a_rule_is_raised_and_what_it_left_is_not_mistaken_for_a_state(shards):
    class Rule(Momentum):
        broken = True

        def apply(self, k, new_param, new_state, param, state, grad, step, *how, **hyper):
            if self.broken and step == 3 and param.size == 9:  # the last parameter: all but the last shard succeed
                raise FloatingPointError("in the rule")
            super().apply(k, new_param, new_state, param, state, grad, step, *how)

    server = server_of(rule=Rule(), shards=shards)
    saved = None
    with pytest.raises(FloatingPointError, match="in the rule"):
        for _ in server.run(program, clocks=5):
            saved = server.state()
    with pytest.raises(RuntimeError, match=r"the update of clock 2 failed before every shard.*load\(\) a saved"):
        server.state()
    with pytest.raises(RuntimeError, match="failed before every shard"):
        next(server.run(program))
    Rule.broken = False
    server.load(saved)
    list(server.run(program, clocks=1))
    assert_same_bits(server.state(), expected(3))


def test_a_program_that_returns_too_early_is_an_error():
    server = server_of()
    with pytest.raises(RuntimeError, match=r"worker \d: its program returned in clock -1.*while client.clock\(\)"):
        list(server.run(lambda client: None, clocks=1))


def test_an_exception_after_the_last_clock_is_raised_too():
    def late(client):
        program(client)
        raise LookupError("afterwards")

    with pytest.raises(LookupError, match="afterwards"):
        list(server_of().run(late, clocks=1))


def test_a_program_that_calls_again_while_it_is_being_stopped_does_not_hang():
    def clinging(client):
        try:
            program(client)
        finally:
            client.clock()

    server = server_of()
    next(server.run(clinging))  # the run is dropped at once, and so ended
    assert_same_bits(server.state(), expected(1))


def test_leaving_the_loop_ends_the_run_between_two_clocks():
    server = server_of()
    for committed in server.run(program):
        if committed.clock == 2:
            break
    assert_same_bits(server.state(), expected(3))


def test_an_exception_in_the_loop_ends_the_run_between_two_clocks():
    server = server_of()
    with pytest.raises(KeyError):
        for _ in server.run(program):
            raise KeyError
    assert_same_bits(server.state(), expected(1))


def interrupting(step, interrupt):
    """A program that calls interrupt(client) in the middle of a clock, before it has pushed anything."""
    def interrupting_program(client):
        while client.clock():
            parameters = client.pull()
            for index in client.microbatches:
                if client.step == step and index == 0:
                    interrupt(client)
                client.push(index, *gradient(parameters, client.step, index))
    return interrupting_program


def send_interrupt(client=None):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_an_interrupt_ends_the_run_at_the_end_of_its_clock():
    server = server_of()
    done = []
    with pytest.raises(KeyboardInterrupt):
        for committed in server.run(interrupting(2, send_interrupt), clocks=6):
            done.append(committed.clock)
    assert done == [0, 1, 2]
    assert_same_bits(server.state(), expected(3))
    list(server.run(program, clocks=1))
    assert_same_bits(server.state(), expected(4))


class Deaf(threading.Semaphore):
    """Signals end none of its waits, as those that come between Python's last look for them and the wait do not."""

    def acquire(self, blocking=True, timeout=None):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().acquire(blocking, timeout)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("semaphore", [threading.Semaphore, Deaf])
def test_a_second_interrupt_ends_it_at_once(semaphore, monkeypatch):
    monkeypatch.setattr(threading, "Semaphore", semaphore)

    def twice(client):
        send_interrupt()
        team, end = run.gi_frame.f_locals["team"], time.monotonic() + 20
        while not team.interrupted:  # two signals sent at once may be taken for one
            assert time.monotonic() < end, "nobody heeds the interrupt"
            time.sleep(0.001)
        send_interrupt()
        while True:  # until the end of the run ends this program
            client.pull()
            assert time.monotonic() < end, "nobody heeds the second interrupt"
            time.sleep(0.001)

    server = server_of()
    run = server.run(interrupting(2, twice), clocks=6)
    done = []
    with pytest.raises(KeyboardInterrupt):
        for committed in run:
            done.append(committed.clock)
    assert done == [0, 1]
    assert_same_bits(server.state(), expected(2))


def test_a_program_whose_data_end_says_so():
    data = iter([1])

    def train(client):
        while client.clock():
            next(data)
            parameters = client.pull()
            for index in client.microbatches:
                client.push(index, *gradient(parameters, client.step, index))

    with pytest.raises(RuntimeError, match="run: a program raised StopIteration: an iterator had nothing more"):
        list(server_of(workers=1).run(train, clocks=3))


def test_an_interrupt_while_the_loop_is_being_left_is_raised():
    left = threading.Event()

    def wait(client):
        assert left.wait(20)
        time.sleep(0.1)  # until close() waits for the clocks that are granted
        send_interrupt()

    server = server_of()
    run = server.run(interrupting(3, wait), clocks=12, stride=6)
    next(run)
    left.set()
    with pytest.raises(KeyboardInterrupt):
        run.close()
    assert_same_bits(server.state(), expected(6))


def test_an_interrupt_while_a_shard_ends_leaves_no_thread(monkeypatch):
    """It comes while a shard is still busy; the workers are told all the same."""
    busy, join, raised = threading.Event(), threading.Thread.join, []

    class Slow(Momentum):
        def apply(self, *arguments, **hyper):
            busy.set()
            time.sleep(0.2)
            super().apply(*arguments, **hyper)

    def interrupted(thread, timeout=None):
        if thread.name.startswith("shard") and not raised:
            raised.append(thread.name)
            raise KeyboardInterrupt
        join(thread, timeout)

    def failing_meanwhile(client):
        while client.clock():
            if client.worker == 1 and client.step == 1:
                raise ZeroDivisionError
            parameters = client.pull()
            for index in client.microbatches:
                client.push(index, *gradient(parameters, client.step, index))

    server = server_of(rule=Slow())
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(server.run(failing_meanwhile, clocks=3))
    assert raised and busy.is_set() and not server.active
    monkeypatch.undo()
    assert server.clock == 1
    list(server.run(program, clocks=1))


def test_what_would_disturb_a_run_is_refused():
    server = server_of()
    run = server.run(program, clocks=3)
    next(run)
    with pytest.raises(RuntimeError, match="run: training is running already"):
        next(server.run(program))
    with pytest.raises(RuntimeError, match="load: training is running"):
        server.load(server.state())
    assert len(list(run)) == 2

    def asks_in_between(client):
        while client.clock():
            server.state()

    with pytest.raises(RuntimeError, match="state: a clock is running"):
        list(server.run(asks_in_between, clocks=1))


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────

def test_nothing_is_copied_and_nothing_pulled_ever_changes():
    server = server_of(workers=3, shards=5)
    pulled = []

    def keep(client):
        while client.clock():
            parameters = client.pull()
            pulled.append((parameters, {name: value.tobytes() for name, value in parameters.items()}))
            for index in client.microbatches:
                client.push(index, *gradient(parameters, client.step, index))

    list(server.run(keep, clocks=6))
    assert server.copied.bytes == 0
    assert len(pulled) >= 6
    for parameters, bits in pulled:
        assert all(value.tobytes() == bits[name] for name, value in parameters.items())


def test_a_pull_is_a_read_only_view_of_the_shared_memory():
    server = server_of(workers=1)

    def look(client):
        while client.clock():
            parameters = client.pull()
            flat = server.memories[0].versions.current.flat.data
            for value in parameters.values():
                assert np.shares_memory(value, flat) or not value.size
                with pytest.raises(ValueError, match="read-only"):
                    value[...] = 0
            client.push(0, *gradient(parameters, client.step, 0))
            client.push(1, *gradient(parameters, client.step, 1))
            client.push(2, *gradient(parameters, client.step, 2))

    list(server.run(look, clocks=2))


def test_a_gradient_that_is_not_dense_is_copied_and_counted():
    server = ParameterServer({"w": np.zeros((4, 3), "float32")}, Momentum(), microbatches=1, device="reference")

    def transposed(client):
        while client.clock():
            client.push(0, {"w": np.ones((3, 4), "float32").T})

    list(server.run(transposed, clocks=2))
    assert server.copied.bytes == 2 * 4 * 3 * 4


@pytest.mark.skipif(not hasattr(get_backend("cpu"), "pool"), reason="the NumPy backend has no pool")
def test_versions_circulate_through_a_few_buffers_of_the_pool():
    server = ParameterServer({"w": np.zeros(50_000, "float32")}, SGDRule(lr=0.1), workers=2, shards=3, microbatches=2)
    addresses, aligned = set(), True

    def train(client):
        while client.clock():
            w = client.pull()["w"]
            for index in client.microbatches:
                client.push(index, {"w": np.ones(50_000, "float32")})
            del w

    for _ in server.run(train, clocks=30):
        address = server.memories[0].versions.current.flat.data.__array_interface__["data"][0]
        addresses.add(address)
        aligned &= address % 64 == 0
    assert aligned
    assert len(addresses) <= 4  # the current, the next, and one for each worker that still holds an older one


def test_parameters_of_the_caller_are_copied_in():
    mine = {"w": np.zeros(3, "float32")}
    server = ParameterServer(mine, Momentum(), microbatches=1, device="reference")
    mine["w"][...] = 7
    assert server.parameters()["w"].tolist() == [0, 0, 0]


# ── the use of it ─────────────────────────────────────────────────────────────────────────────────────

def replica_of(values):
    return {name: eg.tensor(np.array(value), requires_grad=True) for name, value in values.items()}


def test_a_bound_replica_has_the_servers_memory_and_gives_up_its_gradients():
    server = ParameterServer({"w": np.full((2, 3), 2, "float32")}, SGDRule(lr=0.5), microbatches=2)

    def train(client):
        replica = replica_of({"w": np.zeros((2, 3), "float32")})
        while client.clock():
            client.pull(replica)
            assert np.shares_memory(replica["w"].numpy(), server.parameters()["w"])
            for index in client.microbatches:
                loss = (replica["w"] * replica["w"]).sum()
                loss.backward()
                client.push(index, take_gradients(replica), loss.item(), tokens=6)
                assert replica["w"].grad is None

    committed = list(server.run(train, clocks=1))
    assert committed[0].loss == 48.0 and committed[0].tokens == 12 and committed[0].mean_loss == 4.0
    # the mean gradient is 2 · (2 w) / 12 = 2/3
    np.testing.assert_allclose(server.parameters()["w"], 2 - 0.5 * 2 / 3, rtol=1e-6)


def test_hyper_parameters_follow_the_step_and_the_name():
    seen = set()

    def hyper(step, name):
        seen.add((step, name))
        return {"lr": 1.0 if name == "fast" else 0.0}

    values = {name: np.zeros(2, "float32") for name in ("fast", "frozen")}
    server = ParameterServer(values, SGDRule(), microbatches=1, hyper=hyper)

    def train(client):
        while client.clock():
            client.push(0, {name: np.ones(2, "float32") for name in values})

    list(server.run(train, clocks=2))
    assert server.parameters()["fast"].tolist() == [-2, -2] and server.parameters()["frozen"].tolist() == [0, 0]
    assert seen == {(step, name) for step in (1, 2) for name in values}


def test_each_thread_has_its_share_of_the_kernel_threads_and_the_callers_context():
    before = eg.get_num_threads()
    seen = []

    class Rule(Momentum):
        def apply(self, *arguments, **hyper):
            seen.append(("shard", eg.get_num_threads()))
            super().apply(*arguments, **hyper)

    def look(client):
        while client.clock():
            seen.append(("worker", eg.get_num_threads()))
            seen.append(("context", eg.is_grad_enabled(), eg.default_generator().seed))
            for index in client.microbatches:
                client.push(index, {name: np.zeros_like(value) for name, value in client.pull().items()})

    try:
        eg.set_num_threads(6)
        total = eg.get_num_threads()  # 1 where no kernels were compiled
        with eg.no_grad(), eg.seed(5):
            list(server_of(rule=Rule(), workers=2, shards=3).run(look, clocks=1))
    finally:
        eg.set_num_threads(before)
    assert set(seen) == {("worker", max(1, total // 2)), ("shard", max(1, total // 3)), ("context", False, 5)}


def test_snapshots_are_for_drivers_that_keep_any():
    assert [done.clock for done in server_of(save_every=1).run(program, clocks=4)] == [0, 1, 2, 3]
