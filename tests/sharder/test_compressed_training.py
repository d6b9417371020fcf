"""Compressed and row-sparse pushes on the drivers: the bits of a plain loop that compresses, whatever happens."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharder_problems import (
    MODES,
    SKIES,
    TINY,
    WIDE,
    assert_same_bits,
    gradient,
    program,
    start,
    strikes,
    tiny_gradient,
)
from sharder_supervised import killing, slow_program

import engine as eg
from engine import nn, optim
from engine.backend import get_backend
from engine.sharder import ParameterServer, ProcessServer
from engine.sharder.codecs import codec_of
from engine.sharder.compression import Compression
from engine.sharder.consistency import Consistency
from engine.sharder.drivers import child
from engine.sharder.drivers.plain import Plain
from engine.sharder.drivers.residual_files import InFiles, shelves_of
from engine.sharder.drivers.simulator import Simulation
from engine.sharder.drivers.supervisor import Team
from engine.sharder.partition import Partition, Piece

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


def parameters_of(state):
    return {key: value for key, value in state.items() if not key.startswith("residual.")}


@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_are_those_of_a_plain_loop_with_error_feedback(codec):
    one = server(codec, workers=1, shards=1)
    plain = Plain(one.setup, one.checkpoint(), gradient)
    expected = plain.after(tuple((version, (0, 1, 2)) for version in range(4)))
    states = [run(server(codec, workers=workers, shards=shards, placement=placement), 4)
              for workers, shards, placement in ((1, 1, "ranges"), (3, 5, "ranges"), (2, 4, "hashing"))]
    for state in states:
        assert_same_bits(state, states[0])
        for name in WIDE:
            assert state[f"parameters/{name}"].tobytes() == expected.parameters[name].tobytes()
    assert any(np.any(states[0][key]) for key in states[0] if key.startswith("residual."))


@pytest.mark.parametrize("codec", ["int8", "topk:0.05"])
def test_a_gradient_that_is_sparse_in_some_clocks_leaves_its_residual_for_the_others(codec):
    """It is sent as it is then, so its residual is older than the clock before when it is needed again."""
    table = {"table": np.random.default_rng(0).standard_normal((3000, 4)).astype("float32")}

    def train(client):
        while client.clock():
            for index in client.microbatches:
                random = np.random.default_rng((client.step, index))
                if client.step in (1, 2):
                    rows = eg.tensor(random.standard_normal((2, 4)).astype("float32"))
                    gradient = eg.RowSparse(np.array([5, 2999]), rows, 3000)
                else:
                    gradient = random.standard_normal((3000, 4)).astype("float32")
                client.push(index, {"table": gradient}, 1.0, 1)

    states = []
    for shards in (1, 2, 3):
        cluster = ParameterServer(table, RULE, microbatches=2, shards=shards, compress=codec)
        for _ in cluster.run(train, clocks=5):
            pass
        states.append(cluster.state())
    for state in states:
        assert_same_bits(state, states[0])


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
        expected = cluster.learners.state(cluster.partition.parameters, clock) if clock >= 3 else None
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


HISTORIES = ["bsp, snapshots", "bsp, logs", "bsp, replicas", "ssp, logs", "ssp, replicas"]


@pytest.mark.parametrize("mode", HISTORIES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), faults=strikes)
def test_whatever_dies_comes_late_or_goes_back(mode, seed, faults):
    """Workers die and others compute their microbatches, some are overtaken, shards are added, all go back to a
    snapshot: what was left to say is always what it was."""
    durability, consistency = MODES[mode]
    simulation = Simulation(TINY, RULE, durability=durability, consistency=consistency, workers=3, shards=2,
                            microbatches=3, compress="topk:0.5", save_every=seed % 4)
    simulation.run(tiny_gradient, 5, seed, SKIES[seed % 3], faults, 20_000)  # held against plain training


# ── in processes ──────────────────────────────────────────────────────────────────────────────────────

def processes(compress, **arguments):
    return ProcessServer(start(WIDE), RULE, compress=compress,
                         **{"workers": 2, "shards": 2, "microbatches": 3, "clip_norm": 1.0, **arguments})


@pytest.mark.parametrize("codec", CODECS)
def test_processes_have_the_bits_of_threads(codec):
    threads, cluster = server(codec), processes(codec, workers=3, save_every=2)
    for states in zip(told(threads, 3), told(cluster, 3)):
        assert_same_bits(*states)
    resumed = processes(codec, shards=1)
    resumed.load(cluster.state())
    assert_same_bits(run(resumed, 2), run(threads, 2))
    assert_same_bits(run(cluster, 2), threads.state())  # and without loading
    assert cluster.pushed.sent == threads.pushed.sent and cluster.pushed.dense == threads.pushed.dense


def told(cluster, clocks):
    """The states that the caller sees: between the clocks, and after them."""
    return [*(cluster.state() for _ in cluster.run(program, clocks)), cluster.state()]


@pytest.mark.parametrize(("durability", "save_every"), [("snapshot", 2), ("snapshot", 0), ("log", 3)])
def test_processes_that_are_killed_have_the_bits_of_threads(durability, save_every):
    cluster = processes("int8", durability=durability, save_every=save_every, workers=3)
    kinds = ("worker", "shard", "worker", "coordinator", "worker")
    with killing(cluster, kinds, save_every) as killer:
        list(cluster.run(partial(slow_program, seconds=0.01), 6))
    assert killer.killed
    assert_same_bits(cluster.state(), run(server("int8"), 6))


def test_ssp_in_processes_is_a_plain_loop_along_its_course():
    cluster = processes("int8", consistency="ssp:2", clip_norm=None)
    origin = cluster.checkpoint()
    with killing(cluster, ("worker", "shard", "worker"), 0) as killer:
        done = list(cluster.run(partial(slow_program, seconds=0.01), 6))
    right = Plain(cluster.setup, origin, gradient).after(tuple((c.version, (0, 1, 2)) for c in done))
    assert killer.killed
    assert_same_bits(cluster.checkpoint().parameters, right.parameters)


@pytest.mark.parametrize(("consistency", "which"), [("asp", "asp"), (Consistency(backups=1), "has backups")])
def test_what_is_computed_again_to_other_bits_is_refused_where_workers_may_die(consistency, which):
    with pytest.raises(ValueError, match=f"^ProcessServer: compress is 'int8' and consistency {which}: .*expected bsp "
                                         "or ssp, without backups$"):
        processes("int8", consistency=consistency, clip_norm=None)


# ── the shelf of files ────────────────────────────────────────────────────────────────────────────────

def test_pieces_written_by_several_workers_are_one_residual(tmp_path):
    partition = Partition({"a": (3,), "deep/w": (10_000,)}, 3)
    parameter = partition.parameters["deep/w"]
    own = [piece for pieces in partition.pieces for piece in pieces if piece.parameter is parameter]
    values = np.random.default_rng(0).standard_normal(10_000).astype("float32")
    shelves = [InFiles(tmp_path / "shelf", list(partition.parameters), K, eg.float32, bool(n)) for n in range(2)]
    assert len(own) == 3 and shelves[0].all() == shelves[0].marks(5, parameter) == []
    for number, piece in enumerate((*own, own[0])):
        shelves[number % 2].write(5, piece, (-1, 2), K.array(values[piece.start:piece.stop]))
    assert shelves[0].all() == [(5, "deep/w")] and shelves[1].marks(5, parameter) == [(-1, 2)]
    for piece in (*own, Piece(parameter, 4096, 10_000, 0)):
        assert shelves[0].read(5, piece, (-1, 2)).data.tobytes() == values[piece.start:piece.stop].tobytes()
    for shelf in shelves:  # who comes second finds it removed
        shelf.remove(5, parameter, (-1, 2))
    assert shelves[0].read(5, own[0], (-1, 2)) is None and shelves[1].marks(5, parameter) == []


@pytest.mark.process
@pytest.mark.parametrize("computers", [False, True])
def test_residuals_are_on_the_disk_before_a_push_leaves_where_a_computer_may_be_lost(computers, tmp_path, monkeypatch):
    def shelves(*arguments):
        made = shelves_of(*arguments)
        (tmp_path / f"{os.getpid()} {made('residual').synchronised}").touch()
        return made

    monkeypatch.setattr(child, "shelves_of", shelves)
    monkeypatch.setattr(Team, "computers", computers)
    list(processes("int8").run(program, 1))
    assert [path.name.split()[1] for path in tmp_path.iterdir()] == 2 * [str(computers)]


def test_a_synchronised_residual_is_written_to_the_disk_at_once(tmp_path, monkeypatch):
    partition, written = Partition({"w": (100,)}, 1), []
    monkeypatch.setattr(os, "fsync", lambda file: written.append(os.fstat(file).st_size))
    for synchronised in (False, True):
        InFiles(tmp_path, ["w"], K, eg.float32, synchronised).write(0, partition.pieces[0][0], (0, 0),
                                                                    K.full((100,), 1.0, eg.float32))
        assert written == synchronised * [400]


def test_the_folder_of_a_run_that_is_over_does_not_come_back(tmp_path):
    """Workers may still be writing when another process of a run whose caller was killed removes it."""
    piece = Partition({"w": (100,)}, 1).pieces[0][0]
    shelf = InFiles(tmp_path / "run" / "residuals", ["w"], K, eg.float32)
    with pytest.raises(FileNotFoundError):
        shelf.write(0, piece, (0, 0), K.full((100,), 1.0, eg.float32))
    assert not list(tmp_path.iterdir())


def test_who_finds_that_a_residual_was_removed_leaves_nothing_behind(tmp_path):
    partition = Partition({"w": (100,)}, 1)
    piece, shelf = partition.pieces[0][0], InFiles(tmp_path, ["w"], K, eg.float32)
    compression = Compression(K, codec_of("int8"), eg.float32, shelf=shelf)
    compression.encode(0, 0, piece, K.full((100,), 1.0, eg.float32))
    shelf.marks = lambda *_: [(0, 0), (-1, 0)]  # as it was when it looked
    shelf.remove(0, piece.parameter, (0, 0))
    compression.encode(1, 0, piece, K.full((100,), 1.0, eg.float32))
    assert not list((tmp_path / "0-0").iterdir())


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
