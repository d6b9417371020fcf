"""Parameters that come when they are needed and go when others are: which shards are asked, when, and what is held."""

from __future__ import annotations

import gc
from random import Random

import numpy as np
import pytest
from kills import Killer
from sharder_machines import machines
from sharder_problems import Processes, Threads, assert_plain_training, assert_same_bits, make, program

import engine as eg
from engine.optim import AdamWRule
from engine.sharder import ParameterServer, ProcessServer
from engine.sharder.client import Client
from engine.sharder.events import ClockRequested, PullRequested, Received
from engine.sharder.late import HELD
from engine.sharder.messages import Begin, Moved, Parameters, Pull, Pushed, Term

WIDTH = 4096
SHAPES = {f"w{i}": (1, WIDTH) for i in range(6)}  # a block, and so a shard, each


class Port:
    """Answers pulls from the shards' memory when the worker listens. asked: the shards, in order."""

    def __init__(self, cluster):
        self.cluster, self.asked, self.inbox = cluster, [], []

    def send(self, send):
        message, shard = send.message, send.to[1]
        if isinstance(message, Pull):
            self.asked.append(shard)
            values = self.cluster.memories[shard].versions.at(message.version)
            self.inbox.append(Parameters(0, 0, shard, message.term, message.version, values))
        else:
            self.inbox.append(Pushed(message.identity, shard))

    def receive(self, wait=True):
        return self.inbox.pop(0) if wait else None


def client_of(zero=3, shards=6, parameters_of=SHAPES, **arguments):
    """A client of one worker in its first clock, and its port."""
    cluster, _, _, (worker, *_) = machines(parameters_of=parameters_of, shards=shards, zero=zero, **arguments)
    client = Client(cluster, worker, Port(cluster))
    worker.step(ClockRequested())
    worker.step(Begin(0, 0, 1, worker.term, 0, 0, (0, 1)))
    client.step = 0
    return client, client._port


def replica_of(shapes=SHAPES):
    return {name: eg.tensor(np.zeros(shape, "float32"), requires_grad=True) for name, shape in shapes.items()}


def forward(replica, order=range(6)):
    x = eg.tensor(np.ones((1, WIDTH), "float32"))
    for i in order:
        x = (x * replica[f"w{i}"]).tanh()
    return x.sum()


def test_parameters_are_gathered_on_use_forward_and_again_in_backward():
    client, port = client_of()
    replica = replica_of()
    client.pull(replica)
    assert port.asked == []
    loss = forward(replica)
    assert port.asked == [0, 1, 2, 3, 4, 5]
    client.backward(0, replica, loss)
    assert port.asked == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]  # those that were held are not asked for again
    client._close()
    assert client.most_held == HELD * WIDTH * 4


def test_what_is_released_is_held_by_nobody_not_even_by_the_tape():
    client, _ = client_of()
    replica = replica_of()
    late = client.pull(replica)
    seen = []
    original = type(late)._gather

    def gather(self, name):
        original(self, name)
        gc.collect()
        seen.append(sum(isinstance(t, eg.Tensor) and "array" in held(t) for t in replica.values()))

    def held(tensor):
        try:
            return {"array": eg.Tensor.__dict__["array"].__get__(tensor)}
        except AttributeError:
            return {}

    type(late)._gather = gather
    try:
        client.backward(0, replica, forward(replica))
    finally:
        type(late)._gather = original
    assert max(seen) < HELD and len(late.arrays) <= HELD and len(late.shards) == HELD


def test_the_tape_keeps_names_in_place_of_arrays_and_of_their_views():
    client, port = client_of(parameters_of={"w": (64, 64), "v": (64, 64), "u": (64, 64), "t": (64, 64)}, shards=4)
    shapes = dict.fromkeys("wvut", (64, 64))
    replica, plain = replica_of(shapes), replica_of(shapes)
    values = port.cluster.parameters()
    for name, tensor in plain.items():
        tensor.array = eg.tensor(np.array(values[name])).array

    def loss_of(p):
        x = eg.tensor(np.ones((64, 64), "float32"))
        x = x @ p["w"].T  # a view of a parameter is saved
        x = x[:, 1:] @ p["v"][1:, ::2]
        return ((x @ p["u"][:32]) @ p["t"] * 1e-4).tanh().sum()

    client.pull(replica)
    pushes = []
    client._port.send = lambda send, original=client._port.send: (pushes.append(send), original(send))[1]
    client.backward(0, replica, loss_of(replica))
    expected = loss_of(plain)
    expected.backward()
    found = {}
    for send in pushes:
        if not isinstance(send.message, Pull):
            for piece, part in zip(client.partition.pieces[send.to[1]], send.message.gradients):
                found[piece.parameter.name] = part.data.tobytes()
    assert found == {name: tensor.grad.numpy().tobytes() for name, tensor in plain.items()}


def test_a_late_pull_asks_everybody_at_once_and_waits_for_what_is_used():
    client, port = client_of(zero=2)
    replica = replica_of()
    client.pull(replica, late=True)
    assert port.asked == [0, 1, 2, 3, 4, 5] and len(port.inbox) == 6
    np.asarray(replica["w1"])
    assert len(port.inbox) == 4  # those of shards 0 and 1 were taken
    client.backward(0, replica, forward(replica))
    assert port.asked == [0, 1, 2, 3, 4, 5]


def test_an_answer_that_nobody_waited_for_is_not_taken_for_work():
    client, port = client_of(zero=2)
    client.pull(late=True)
    for index in (0, 1):
        client.push(index, {name: np.ones(shape, "float32") for name, shape in SHAPES.items()})
    worker = client._machine
    worker.step(ClockRequested())
    assert all(worker.step(message) == [] for message in port.inbox)


def test_after_its_clock_a_parameter_says_so():
    client, _ = client_of()
    replica = replica_of()
    late = client.pull(replica)
    np.asarray(replica["w0"])
    client._close()
    with pytest.raises(RuntimeError, match=r"pull: 'w0' of clock 0 is not here any more; .*so pull again"):
        replica["w0"].numpy()
    with pytest.raises(KeyError):
        late["z"]


def test_a_replica_that_does_not_fit_gets_one_line():
    client, _ = client_of()
    with pytest.raises(ValueError, match="bind: the server has no parameter 'v'; it has w0, w1"):
        client.pull(replica_of({"v": (3,)}))
    with pytest.raises(ValueError, match=r"bind: 'w0' is float32 \(2,\) in the replica, and float32 \(1, 4096\) on"):
        client.pull(replica_of({"w0": (2,)}))


def test_a_new_term_with_other_shards_is_gathered_anew():
    client, port = client_of(shards=2)
    late = client.pull()
    late["w0"], late["w5"]
    saved = port.cluster.checkpoint()
    port.cluster.term = Term(2, 1, 0)
    port.cluster._place(saved)
    client._machine.step(Moved(0, 0, Term(2, 1, 0)))
    port.asked.clear()
    assert late["w1"].tobytes() == saved.parameters["w1"].tobytes() and port.asked == [0] and len(late.shards) == 1


def test_a_worker_hands_over_each_shard_as_it_answers():
    _, _, shards, (worker, _) = machines(zero=3)
    worker.step(ClockRequested())
    worker.step(Begin(0, 0, 1, worker.term, 0, 0, (0,)))
    names = tuple(worker.partition.parameters)
    for send in worker.step(PullRequested(names)):
        answer = shards[send.to[1]].step(send.message)[0].message
        assert worker.step(answer) == [Received(send.to[1], answer.values)]
        assert worker.step(answer) == [] and not worker.values
    one = names[0]
    assert [send.to[1] for send in worker.step(PullRequested((one,)))] == list(worker.partition.owners[one])


# ── training ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("kind", [Threads, Processes])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (2, 3), (3, 5)])
def test_every_stage_has_the_bits_of_plain_training(kind, zero, workers, shards):
    cluster = make(kind.kind, wide=True, workers=workers, shards=shards, microbatches=3, clip_norm=1.0, zero=zero)
    assert_plain_training(cluster, list(cluster.run(program, 3)), 3, 1.0, 3)


CONFIG = eg.models.TransformerConfig(vocab_size=128, context_length=8, layers=4, heads=2, width=64, tie_weights=True,
                                     dropout=0.1)


class Work:
    def __init__(self, late=False, recompute=False):
        self.late, self.recompute, self.most = late, recompute, 0

    def __call__(self, client):
        replica = eg.models.Transformer(CONFIG)
        while client.clock():
            client.pull(replica, late=self.late)
            for index in client.microbatches:
                tokens = np.random.default_rng((client.step, index)).integers(0, 128, (2, 9))
                with eg.seed(client.step * 10 + index):
                    loss = self.loss(replica, eg.tensor(tokens[:, :-1]), eg.tensor(tokens[:, 1:]))
                client.backward(index, replica, loss, 16)
        self.most = client.most_held

    def loss(self, replica, tokens, targets):
        if self.recompute:
            return eg.checkpoint(replica.loss, tokens, targets, reduction="sum")
        return replica.loss(tokens, targets, reduction="sum")


def trained(kind, work, clocks=2, **arguments):
    with eg.seed(0):
        model = eg.models.Transformer(CONFIG)
    server = kind(model, AdamWRule(lr=1e-3), microbatches=2, clip_norm=1.0, **arguments)
    for _ in server.run(work, clocks=clocks):
        pass
    return server.state()


@pytest.mark.parametrize("kind", [ParameterServer, Processes.kind])
def test_a_transformer_has_the_same_bits_at_every_stage(kind):
    expected = trained(ParameterServer, Work(), zero=1)
    for zero in (2, 3):
        assert_same_bits(trained(kind, Work(), workers=2, shards=6, zero=zero), expected)
    assert_same_bits(trained(kind, Work(late=True), workers=2, shards=6), expected)
    assert_same_bits(trained(kind, Work(recompute=True), workers=1, shards=6, zero=3), expected)


@pytest.mark.process
@pytest.mark.parametrize(("durability", "zero"), [("snapshot", 2), ("snapshot", 3), ("log", 3)])
def test_machines_are_killed_while_gradients_leave_and_parameters_come(durability, zero):
    expected = trained(ParameterServer, Work(), clocks=6)
    draw = Random(zero)
    with eg.seed(0):
        model = eg.models.Transformer(CONFIG)
    server = ProcessServer(model, AdamWRule(lr=1e-3), microbatches=2, clip_norm=1.0, workers=2, shards=4,
                           durability=durability, save_every=2, zero=zero)
    plan = [(draw.uniform(0.01, 0.05), kind) for kind in ("worker", "shard", "shard", "worker", "coordinator")]
    with Killer(server, plan, draw) as killer:
        assert len(list(server.run(Work(), clocks=6))) == 6
    assert killer.killed
    assert_same_bits(server.state(), expected)


def test_asp_has_no_third_stage():
    with pytest.raises(ValueError, match="zero is 3, and what is pulled again for the backward pass must be what"):
        Threads.make(microbatches=1, zero=3, consistency="asp")
