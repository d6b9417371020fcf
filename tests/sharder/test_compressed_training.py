"""Compressed and row-sparse pushes on the drivers: the bits of a plain loop that compresses, whatever happens."""

from __future__ import annotations

import numpy as np
import pytest
from sharder_problems import TINY, WIDE, assert_same_bits, gradient, program, start, tiny_gradient

import engine as eg
from engine import nn, optim
from engine.backend import get_backend
from engine.sharder import ParameterServer, ProcessServer
from engine.sharder.codecs import codec_of
from engine.sharder.compression import Compression
from engine.sharder.drivers.faults import Weather
from engine.sharder.drivers.plain import Plain
from engine.sharder.drivers.simulator import Simulation
from engine.sharder.partition import Partition

CODECS = ["fp16", "bf16", "int8", "topk:0.05", "1bit"]
K = get_backend("cpu")
RULE = optim.SGDRule(lr=0.1, momentum=0.9)


def server(compress, **arguments):
    arguments = {"workers": 2, "shards": 2, "microbatches": 3, "clip_norm": 1.0, **arguments}
    return ParameterServer(start(WIDE), RULE, compress=compress, **arguments)


def run(cluster, clocks):
    for _ in cluster.run(program, clocks):
        pass
    return cluster.state()


def compressed(codec, shapes, gradient):
    """The gradients as they arrive: a plain loop's own error feedback, parameter by parameter."""
    feedback = Compression(K, codec_of(codec), eg.float32, 9)
    pieces = {piece.parameter.name: piece for piece in Partition(shapes, 1).pieces[0]}

    def arriving(parameters, clock, microbatch):
        gradients, loss, tokens = gradient(parameters, clock, microbatch)
        for name, piece in pieces.items():
            payload = feedback.encode(clock, microbatch, piece, K.array(gradients[name].reshape(-1)))
            gradients[name] = payload.decode(K, piece.size, eg.float32).data.reshape(shapes[name])
        return gradients, loss, tokens

    return arriving


def parameters_of(state):
    return {key: value for key, value in state.items() if not key.startswith("residual.")}


@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_are_those_of_a_plain_loop_with_error_feedback(codec):
    one = server(codec, workers=1, shards=1)
    plain = Plain(one.setup, one.checkpoint(), compressed(codec, WIDE, gradient))
    expected = plain.after(tuple((version, (0, 1, 2)) for version in range(4)))
    states = [run(server(codec, workers=workers, shards=shards, placement=placement), 4)
              for workers, shards, placement in ((1, 1, "ranges"), (3, 5, "ranges"), (2, 4, "hashing"))]
    for state in states:
        assert_same_bits(state, states[0])
        for name in WIDE:
            assert state[f"parameters/{name}"].tobytes() == expected.parameters[name].tobytes()
    assert any(np.any(states[0][key]) for key in states[0] if key.startswith("residual."))


@pytest.mark.parametrize("codec", CODECS)
def test_a_saved_state_goes_on_to_the_same_bits(codec):
    whole = run(server(codec), 5)
    first = server(codec)
    saved = run(first, 2)
    assert sum(key.startswith("residual.") for key in saved) == 3 * len(WIDE)
    resumed = server(codec, workers=3, shards=4)
    resumed.load(saved)
    assert_same_bits(run(resumed, 3), whole)
    assert_same_bits(run(first, 3), whole)  # and without loading


def test_ssp_states_have_no_residual_of_later_clocks():
    """Workers run ahead of the clock at which the caller looks."""
    cluster, found = server("int8", consistency="ssp:2", workers=3), []
    for _ in cluster.run(program, 6):
        found.append(cluster.state())
    for clock, state in enumerate(found, 1):
        expected = cluster.compression.state(clock) if clock >= 3 else None
        own = {key: value for key, value in state.items() if key.startswith("residual.")}
        assert len(own) == 3 * len(WIDE)
        assert expected is None or all(np.array_equal(own[key], expected[key]) for key in own)


def test_states_that_do_not_fit():
    saved = run(server("int8"), 1)
    with pytest.raises(ValueError, match=r"load: 'residual.0/bias' is not expected"):
        server(None).load(saved)
    server("int8").load(parameters_of(saved))  # nothing is left to say
    with pytest.raises(ValueError, match=r"load: 'residual.0/bias' is float32 \(2,\), expected float32 \(3,\)"):
        server("int8").load({**saved, "residual.0/bias": np.zeros(2, np.float32)})


def test_one_bit_is_refused_for_adam_when_it_is_configured():
    with pytest.raises(ValueError, match=r"compress is .1bit. and the rule AdamWRule: .*2102\.02888"):
        ParameterServer(start(WIDE), optim.AdamWRule(), microbatches=2, compress="1bit")
    with pytest.raises(ValueError, match="compress is 'zip', expected fp16"):
        ParameterServer(start(WIDE), optim.AdamWRule(), microbatches=2, compress="zip")


def test_bytes_are_counted():
    size = sum(value.nbytes for value in start(WIDE).values())
    for codec, least in ((None, 1), ("fp16", 1.99), ("int8", 3.8), ("topk:0.01", 40)):
        cluster = server(codec)
        run(cluster, 2)
        assert cluster.pushed.dense == 2 * 3 * size
        assert cluster.pushed.dense >= least * cluster.pushed.sent and (codec or cluster.pushed.sent == 6 * size)


@pytest.mark.parametrize("consistency", ["bsp", "ssp:1"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_lost_repeated_or_computed_again(consistency, seed):
    """Workers die and their microbatches are computed by others; shards come back by their logs. The residuals are the
    cluster's: as in one process, they are not lost."""
    weather = [Weather(latency=(1, 50), duplication=0.3, timeout=150), Weather(latency=(1, 20), loss=0.1),
               Weather(crashing=0.004, absence=25), Weather(stalling=0.3)][seed]
    simulation = Simulation(TINY, RULE, durability="log", consistency=consistency, workers=2, shards=2,
                            microbatches=3, compress="topk:0.5")
    shapes = {name: value.shape for name, value in TINY.items()}
    plain = Plain(simulation.setup, simulation.checkpoint(), compressed("topk:0.5", shapes, tiny_gradient))
    simulation.run(tiny_gradient, 4, seed, weather, (), 6_000, 1, plain)  # every version is held against it


# ── row-sparse pushes ─────────────────────────────────────────────────────────────────────────────────

class Tags(nn.Module):
    """A table of 300 × 40, of which a microbatch looks up a few rows."""

    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(300, 40, sparse=sparse)
        self.out = nn.Linear(40, 3)

    def forward(self, index):
        return self.out(self.table(index)).square().sum()


def tags(sparse):
    with eg.seed(0):
        return Tags(sparse)


def trained_on_rows(sparse, shards=2, compress=None, kind=ParameterServer):
    cluster = kind(tags(sparse), optim.AdamWRule(), shards=shards, workers=2, microbatches=4, clip_norm=1.0,
                   compress=compress)

    def work(client):
        model = tags(sparse)
        while client.clock():
            client.pull(model)
            for index in client.microbatches:
                tokens = eg.tensor(np.random.default_rng((client.step, index)).integers(0, 300, 20))
                loss = model(tokens)
                loss.backward()
                assert isinstance(model.table.weight.grad, eg.RowSparse) == sparse
                client.push(index, model, loss.item(), 20)

    for _ in cluster.run(work, 4):
        pass
    return cluster


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_pushed_rows_train_as_pushed_tables_do(shards):
    dense, sparse = trained_on_rows(False, shards), trained_on_rows(True, shards)
    assert_same_bits(dense.state(), sparse.state())
    rows = sum(len(np.unique(np.random.default_rng((clock, index)).integers(0, 300, 20)))
               for clock in range(4) for index in range(4))
    others = 16 * 4 * (3 * 40 + 3)
    assert sparse.pushed.sent - others <= 1.1 * 4 * 40 * rows
    assert dense.pushed.sent == dense.pushed.dense == sparse.pushed.dense


def test_workers_in_processes_push_rows_too_and_tell_how_many_bytes():
    threads, processes = (trained_on_rows(True, kind=kind) for kind in (ParameterServer, ProcessServer))
    assert_same_bits(threads.state(), processes.state())
    assert (processes.pushed.sent, processes.pushed.dense) == (threads.pushed.sent, threads.pushed.dense)


def test_rows_are_sent_as_they_are_beside_compressed_ones():
    cluster = trained_on_rows(True, compress="int8")
    assert {key.split("/")[1] for key in cluster.state() if key.startswith("residual.")} == {"out.weight", "out.bias"}


def test_rows_that_do_not_fit():
    cluster = ParameterServer({"w": np.zeros((4, 2), "float32")}, optim.SGDRule(), microbatches=1)

    def work(client):
        client.clock()
        client.push(0, {"w": eg.RowSparse([1], eg.ones(1, 3), 4)})

    with pytest.raises(ValueError, match=r"push: the gradient of 'w' is float32 \(4, 3\), expected float32 \(4, 2\)"):
        list(cluster.run(work, 1))
