"""Local rules: microbatches that walk by themselves, to the bits of a plain loop, whatever happens to the workers."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharder_problems import MODES, SKIES, TINY, WIDE, assert_same_bits, gradient, start, strikes, tiny_gradient
from sharder_supervised import killing

import engine as eg
from engine import nn, optim
from engine.sharder import ParameterServer, ProcessServer
from engine.sharder.consistency import Consistency
from engine.sharder.drivers.plain import Plain
from engine.sharder.drivers.simulator import Simulation

OUTER, LOCAL = optim.SGDRule(lr=1.5, momentum=0.5), optim.AdamWRule(lr=0.01)
CODECS = [None, "int8", "topk:0.05", "1bit"]


def falling(step, name):
    return {"lr": 0.01 / step, "weight_decay": 0.1 if name == "matrix" else 0.0}


def program(client, seconds=0.0):
    while client.clock():
        client.pull()
        for index in client.microbatches:
            time.sleep(seconds)
            client.push(index, *gradient(client.localize(index), client.step, index))


def server(compress, kind=ParameterServer, **arguments):
    arguments = {"workers": 2, "shards": 2, "microbatches": 3, "clip_norm": 1.0, "hyper": falling, "local": LOCAL,
                 **arguments}
    return kind(start(WIDE), OUTER, compress=compress, **arguments)


def run(cluster, clocks, program=program):
    list(cluster.run(program, clocks))
    return cluster.state()


# ── the bits ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_are_those_of_a_plain_loop_of_learners(codec, clip_norm):
    one = server(codec, workers=1, shards=1, clip_norm=clip_norm)
    plain = Plain(one.setup, one.checkpoint(), gradient)
    expected = plain.after(tuple((version, (0, 1, 2)) for version in range(4)))
    states = [run(server(codec, workers=workers, shards=shards, placement=placement, clip_norm=clip_norm), 4)
              for workers, shards, placement in ((1, 1, "ranges"), (3, 5, "ranges"), (2, 4, "hashing"))]
    for state in states:
        assert_same_bits(state, states[0])
        for name in WIDE:
            assert state[f"parameters/{name}"].tobytes() == expected.parameters[name].tobytes()
            assert state[f"momentum_buffer/{name}"].tobytes() == expected.slots["momentum_buffer"][name].tobytes()


def test_by_hand():
    """θ = 8, two microbatches whose losses are p and 3 p, plain SGD inside (η 2) and outside (η 1), no codec: the mean
    step is (2 + 6) / 2, whatever the numbers of tokens are, which only make the gradients means."""
    cluster = ParameterServer({"w": np.array([8.0], "float32")}, optim.SGDRule(lr=1.0), microbatches=2,
                              local=optim.SGDRule(lr=2.0))

    def walk(client):
        while client.clock():
            client.pull()
            for index in client.microbatches:
                assert client.localize(index)["w"] == 8.0 - 4 * client.step
                tokens = (4, 2)[index]
                client.push(index, {"w": np.array([(1, 3)[index] * tokens], "float32")}, 0.0, tokens)

    for done in cluster.run(walk, 3):
        assert cluster.parameters()["w"] == 8.0 - 4 * (done.clock + 1)


@pytest.mark.parametrize("codec", ["topk:0.05", "int8", "1bit"])
def test_one_microbatch_walks_as_the_local_rule_alone(codec):
    """Where it stands is a multiple of 2⁻⁸ below 2⁶ for topk, which has no rounding: the bits are those of the rule.
    Other codecs round: p = θ − e, d = p − p′, d + e and θ − q, four roundings a clock, at sizes of at most 64."""
    clocks, size, rule = 20, 5000, optim.SGDRule(lr=2.0**-8, momentum=0.5)
    random = np.random.default_rng(0)
    first = random.integers(-8, 8, size).astype("float32")
    gradients = random.integers(-4, 5, (clocks, size)).astype("float32")
    if codec == "topk:0.05":
        rule = optim.SGDRule(lr=2.0**-8)
    alone = {"w": eg.tensor(first.copy(), requires_grad=True)}
    optimizer = optim.SGD([alone["w"]], lr=rule.lr, momentum=rule.momentum)
    stood = []

    def walk(client):
        while client.clock():
            client.pull()
            place = client.localize(0)
            stood.append(place["w"].copy())
            client.push(0, {"w": gradients[client.step].copy()}, 0.0, 1)

    cluster = ParameterServer({"w": first}, optim.SGDRule(lr=1.0), microbatches=1, shards=2, compress=codec, local=rule)
    list(cluster.run(walk, clocks))
    bound = 0.0 if codec == "topk:0.05" else 4 * 64 * 2.0**-24
    behind = 0.0
    for clock in range(clocks):
        assert np.abs(stood[clock] - alone["w"].numpy()).max() <= clock * bound
        alone["w"].grad = eg.tensor(gradients[clock])
        optimizer.step()
        behind = max(behind, np.abs(cluster.parameters()["w"] - alone["w"].numpy()).max())
    assert behind > 0  # the server's are others: what was not sent is missing there


def test_row_sparse_gradients_are_those_of_every_row():
    table = {"table": np.random.default_rng(0).standard_normal((300, 4)).astype("float32")}

    def walk(client, sparse):
        while client.clock():
            client.pull()
            for index in client.microbatches:
                values = client.localize(index)["table"][[5, 299]] * np.float32(0.25)
                rows = eg.RowSparse(np.array([5, 299]), eg.tensor(values), 300)
                client.push(index, {"table": rows if sparse else rows.dense().numpy()}, 1.0, 1)

    states = []
    for sparse in (True, False):
        cluster = ParameterServer(table, OUTER, microbatches=2, shards=2, compress="topk:0.05", local=LOCAL)
        states.append(run(cluster, 3, partial(walk, sparse=sparse)))
    assert_same_bits(*states)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(eg.tensor(np.linspace(-1, 1, 40, dtype="float32").reshape(8, 5)))


@pytest.mark.parametrize("zero", [1, 2])
def test_a_replica_is_where_its_microbatch_stands(zero):
    """backward() of a module gives the bits of push() of what it should be."""
    cluster = ParameterServer(Line(), OUTER, microbatches=2, workers=2, shards=2, local=LOCAL, compress="topk:0.1",
                              zero=zero)
    right = ParameterServer(Line(), OUTER, microbatches=2, local=LOCAL, compress="topk:0.1")

    def train(client):
        replica = Line()
        while client.clock():
            pulled = client.pull(replica)
            for index in client.microbatches:
                place = client.localize(index, replica)
                assert np.array_equal(replica.weight.numpy(), place["weight"])
                assert client.step == 0 or not np.array_equal(place["weight"], pulled["weight"])
                loss = eg.sum(replica.weight * replica.weight) * 0.5
                client.backward(index, replica, loss, 1 + index)
                assert replica.weight.grad is None

    def by_hand(client):
        while client.clock():
            client.pull()
            for index in client.microbatches:
                place = client.localize(index)
                client.push(index, {"weight": place["weight"].copy()}, 0.0, 1 + index)

    assert_same_bits(run(cluster, 4, train), run(right, 4, by_hand))


def test_hyper_is_of_the_local_rule_and_damping_of_the_others():
    seen = []

    def hyper(step, name):
        seen.append(step)
        return {"lr": 0.5}

    def walk(client):
        while client.clock():
            client.pull()
            client.localize(0)
            client.push(0, {"w": np.ones(3, "float32")}, 0.0, 1)

    cluster = ParameterServer({"w": np.zeros(3, "float32")}, optim.SGDRule(lr=4.0), microbatches=1, hyper=hyper,
                              local=optim.SGDRule(lr=1.0), damping=lambda staleness: 0.25)
    list(cluster.run(walk, 3))
    assert seen == [1, 2, 3] and cluster.parameters()["w"].tolist() == 3 * [-3 * (4.0 * 0.25) * 0.5]
    with pytest.raises(ValueError, match="SGDRule: got a hyper-parameter 'beta1'"):
        ParameterServer({"w": np.zeros(3, "float32")}, optim.AdamRule(), microbatches=1, hyper={"beta1": 0.5},
                        local=optim.SGDRule())


def test_a_microbatch_without_tokens_stays_where_it_is():
    cluster = ParameterServer({"w": np.ones(3, "float32")}, optim.SGDRule(lr=1.0), microbatches=2, clip_norm=1.0,
                              local=optim.AdamWRule(lr=0.5, weight_decay=0.1))

    def walk(client):
        while client.clock():
            client.pull()
            for index in client.microbatches:
                client.localize(index)
                client.push(index, {"w": np.ones(3, "float32")}, 0.0, index)

    list(cluster.run(walk, 1))
    state = cluster.state()
    assert not any(key.startswith("local_exp_avg.0/") for key in state)
    assert np.isfinite(state["parameters/w"]).all() and (state["parameters/w"] < 1).all()


# ── from clock to clock ───────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("codec", CODECS)
def test_a_saved_state_goes_on_to_the_same_bits(codec):
    whole = run(server(codec), 5)
    first = server(codec)
    saved = run(first, 2)
    assert sum(key.startswith("residual.") for key in saved) == (3 * len(WIDE) if codec else 0)
    assert sum(key.startswith("local_exp_avg_sq.") for key in saved) == 3 * len(WIDE)
    resumed = server(codec, workers=3, shards=4)
    resumed.load(saved)
    assert_same_bits(run(resumed, 3), whole)
    assert_same_bits(run(first, 3), whole)


def test_states_that_do_not_fit():
    saved, cluster = run(server("int8"), 1), server("int8")
    before = run(cluster, 2)
    with pytest.raises(ValueError, match=r"load: 'local_exp_avg.0/bias' is not expected"):
        server("int8", local=None).load(saved)
    with pytest.raises(ValueError, match=r"load: 'local_exp_avg_sq.2/none' is not expected"):
        cluster.load({**saved, "local_exp_avg_sq.2/none": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=r"'local_exp_avg_sq.0/bias' is float32 \(2,\), expected float32 \(3,\)"):
        cluster.load({**saved, "local_exp_avg_sq.0/bias": np.zeros(2, np.float32)})
    assert_same_bits(cluster.state(), before)  # residuals, too, are as they were


@pytest.mark.parametrize("mode", ["bsp, snapshots", "bsp, logs", "bsp, replicas", "ssp, logs", "ssp, replicas"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), faults=strikes)
def test_whatever_dies_comes_late_or_goes_back(mode, seed, faults):
    durability, consistency = MODES[mode]
    simulation = Simulation(TINY, OUTER, durability=durability, consistency=consistency, workers=3, shards=2,
                            microbatches=3, compress=("topk:0.5", None)[seed % 2], save_every=seed % 4, local=LOCAL,
                            clip_norm=(1.0, None)[seed // 2 % 2])
    simulation.run(tiny_gradient, 5, seed, SKIES[seed % 3], faults, 20_000)  # held against plain training


@pytest.mark.process
@pytest.mark.parametrize(("durability", "save_every"), [("snapshot", 2), ("log", 3)])
def test_processes_that_are_killed_have_the_bits_of_threads(durability, save_every):
    cluster = server("topk:0.05", ProcessServer, durability=durability, save_every=save_every, workers=3)
    kinds = ("worker", "shard", "worker", "coordinator", "worker")
    with killing(cluster, kinds, save_every) as killer:
        states = [cluster.state() for _ in cluster.run(partial(program, seconds=0.01), 6)]
    assert killer.killed
    threads = server("topk:0.05")
    for state, _ in zip(states, threads.run(program, 6)):
        assert_same_bits(state, threads.state())
    assert_same_bits(run(cluster, 2), run(threads, 2))


# ── what cannot be ────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("arguments", "which"), [
    ({"consistency": "asp", "clip_norm": None}, "asp"), ({"consistency": Consistency(backups=1)}, "with backups"),
    ({"zero": 3}, "with zero 3")])
def test_where_steps_would_be_lost_it_is_refused(arguments, which):
    with pytest.raises(ValueError, match=f"^ParameterServer: local is AdamWRule.* and the training {which}; expected"):
        server(None, **arguments)


def test_a_rule_is_expected():
    with pytest.raises(ValueError, match=r"^ParameterServer: local is 2\.0, expected an update rule, as optim"):
        server(None, local=2.0)


def test_programs_that_forget_a_place_are_told():
    def forgetful(client):
        client.clock()
        with pytest.raises(RuntimeError, match="localize: microbatch 0 before the parameters of this clock were"):
            client.localize(0)
        client.pull()
        with pytest.raises(ValueError, match=r"localize: microbatch 7 in clock 0, expected one of \(0, 1, 2\)"):
            client.localize(7)
        client.localize(1)
        for index in (0, 1):  # what was localized before another pull is so no longer
            with pytest.raises(RuntimeError, match=rf"push of microbatch {index}, which has a place of its own, "
                                                   rf"expected client\.localize\({index}, replica\) before its loss"):
                client.push(index, *gradient(client.pull(), 0, index))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(server("int8", workers=1), 1, forgetful)


def test_without_a_local_rule_it_is_where_the_server_is():
    def train(client):
        while client.clock():
            pulled = client.pull()
            for index in client.microbatches:
                assert client.localize(index) is pulled
                client.push(index, *gradient(pulled, client.step, index))

    run(server("int8", local=None, hyper=None), 2, train)
