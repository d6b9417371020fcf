"""Gradients that leave while the backward pass goes on: when, for whom, once, and what is left when it fails."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from sharder_machines import machines
from sharder_problems import Processes, Threads, assert_same_bits

import engine as eg
from engine import autograd
from engine.optim import AdamWRule
from engine.sharder.client import Client
from engine.sharder.events import ClockRequested, Send
from engine.sharder.messages import Begin, Moved, Pushed, Term
from engine.sharder.overlap import Departure
from engine.tensor import Tensor

# ── when a leaf's gradient is final ───────────────────────────────────────────────────────────────────


def leaf(*shape):
    return eg.tensor(np.arange(1, 1 + np.prod(shape), dtype="float32").reshape(shape), requires_grad=True)


def completions(loss, **leaves):
    """(name, gradient) of the leaves in the order in which they were said to be complete."""
    names, seen = {id(t): name for name, t in leaves.items()}, []
    autograd.backward([loss], [None], completed=lambda t: seen.append((names[id(t)], t.grad.numpy().tobytes())))
    return seen


def test_a_leaf_is_complete_once_and_with_its_whole_gradient():
    first, last = leaf(3), leaf(3)
    loss = ((first * last).exp() * last + first).sum()  # both are used twice
    seen = completions(loss, first=first, last=last)
    assert sorted(name for name, _ in seen) == ["first", "last"]
    assert dict(seen) == {"first": first.grad.numpy().tobytes(), "last": last.grad.numpy().tobytes()}


def test_later_layers_are_complete_before_earlier_ones_are_begun():
    weights = {f"w{i}": leaf(2, 2) for i in range(4)}
    x = eg.tensor(np.ones((1, 2), "float32"))
    for w in weights.values():
        x = (x @ w).tanh()
    begun = []
    autograd.watchers.append(lambda node, what: begun.append(node) if what == "backward" else None)
    try:
        at = []
        autograd.backward([x.sum()], [None], completed=lambda t: at.append((id(t), len(begun))))
    finally:
        autograd.watchers.pop()
    assert [key for key, _ in at] == [id(w) for w in reversed(weights.values())]
    assert len({count for _, count in at}) == 4  # between two of them, rules ran


def test_a_gradient_that_is_taken_and_dropped_is_freed_while_backward_goes_on():
    weights = [leaf(2, 2) for _ in range(3)]
    x = eg.tensor(np.ones((1, 2), "float32"))
    for w in weights:
        x = (x @ w).tanh()
    alive, left = weakref.WeakSet(), []

    def take(t):
        alive.add(t.grad)
        t.grad = None

    def look(node, what):
        left.append(len(alive))

    gc.disable()
    autograd.watchers.append(look)
    try:
        autograd.backward([x.sum()], [None], completed=take)
    finally:
        autograd.watchers.remove(look)
        gc.enable()
    assert len(left) > 6 and set(left) == {0}  # before each rule runs


# ── who is sent what, and when ────────────────────────────────────────────────────────────────────────

SHAPES = {"a": (4096,), "b": (2, 4096), "c": (4096,), "d": (4096,)}  # blocks 0 | 1 2 | 3 | 4


class Port:
    """Acknowledges what is sent when the worker listens; holds back what `deaf` says."""

    def __init__(self, log):
        self.log, self.inbox, self.waits = log, [], 0

    def send(self, send: Send):
        self.log.append(("push", send.to[1], send.message))
        self.inbox.append(Pushed(send.message.identity, send.to[1]))

    def receive(self, wait=True):
        self.waits += wait
        return self.inbox.pop(0) if self.inbox and wait else None


def client_of(shards=5, microbatches=(0, 1), zero=2, encode=None, shapes=SHAPES):
    """A client of one worker in its first clock, its port, and what happened."""
    cluster, _, _, (worker, *_) = machines(parameters_of=shapes, shards=shards, zero=zero)
    log = []
    port = Port(log)
    client = Client(cluster, worker, port)
    worker.step(ClockRequested())
    worker.step(Begin(0, 0, 1, worker.term, 0, 0, microbatches))
    worker.encode = encode
    return client, port, log


def model(parameters=None):
    parameters = parameters or {name: eg.tensor(np.full(shape, 0.5, "float32"), requires_grad=True)
                                for name, shape in SHAPES.items()}
    x = parameters["a"] * 1.0
    x = (x + parameters["b"].sum(axis=0)) * parameters["c"]
    return parameters, (x * parameters["d"] + x * parameters["d"]).sum()


@pytest.mark.parametrize("zero", [1, 2])
def test_a_parameter_without_elements_is_no_shards_and_needs_a_gradient_all_the_same(zero):
    client, _, log = client_of(zero=zero, shapes={**SHAPES, "empty": (0, 3)})
    parameters, loss = model()
    parameters["empty"] = empty = eg.tensor(np.zeros((0, 3), "float32"), requires_grad=True)
    with pytest.raises(ValueError, match="push: 'empty' has no gradient"):
        client.backward(0, parameters, loss, 3)
    _, loss = model(parameters)
    client.backward(0, parameters, loss + empty.sum(), 3)
    assert sorted(shard for _, shard, _ in log) == [0, 1, 2, 3, 4]


def test_each_shard_is_sent_its_part_when_all_of_it_is_final():
    client, _, log = client_of()
    parameters, loss = model()
    client.backward(0, parameters, loss, 3)
    order = [shard for _, shard, _ in log]
    assert order[:2] == [4, 3] and sorted(order) == [0, 1, 2, 3, 4]
    assert {p.identity for _, _, p in log} == {log[0][2].identity}
    assert all(p.grad is None for p in parameters.values())
    again, expected = model()
    expected.backward()
    for _, shard, push in log:
        for piece, part in zip(client.partition.pieces[shard], push.gradients):
            whole = again[piece.parameter.name].grad.numpy().reshape(-1)
            assert part.data.tobytes() == whole[piece.start:piece.stop].tobytes()
        assert (push.loss, push.tokens) == (expected.item(), 3)


def test_at_most_one_part_is_on_its_way_while_the_next_is_computed():
    client, port, log = client_of()
    on_their_way = []
    original = port.send

    def send(message):
        on_their_way.append(len(client._machine.pushes))
        original(message)

    port.send = send
    parameters, loss = model()
    client.backward(0, parameters, loss)
    assert max(on_their_way) <= 2  # this one, and the one before
    assert len(log) == 5


def test_with_zero_1_everything_leaves_when_backward_is_over():
    client, _, log = client_of(zero=1)
    parameters, loss = model()
    complete = parameters["a"].register_hook(lambda g: log.append(("last gradient", None, None)))
    client.backward(0, parameters, loss)
    complete()
    assert [what for what, _, _ in log] == ["last gradient"] + ["push"] * 5


# ── what fails ────────────────────────────────────────────────────────────────────────────────────────

def fails(parameters):
    def fail(_):
        raise FloatingPointError("in backward")
    return parameters["a"].register_hook(fail)


def test_a_microbatch_that_is_given_up_is_due_and_what_left_is_not_sent_again():
    client, _, log = client_of()
    parameters, loss = model()
    remove = fails(parameters)
    with pytest.raises(FloatingPointError, match="in backward"):
        client.backward(0, parameters, loss)
    left = [shard for _, shard, _ in log]
    assert left and 0 not in left
    assert all(p.grad is None for p in parameters.values()) and client._machine.due == {0, 1}
    remove()
    client.backward(0, *model())
    assert sorted(shard for _, shard, _ in log) == [0, 1, 2, 3, 4]
    assert len({push.identity for _, _, push in log}) == 1 and client._machine.due == {1}
    client.backward(1, *model())
    assert len({push.identity for _, _, push in log}) == 2


def test_a_failed_pass_leaves_no_gradients_with_zero_1_either():
    client, _, log = client_of(zero=1)
    parameters, loss = model()
    remove = fails(parameters)
    with pytest.raises(FloatingPointError):
        client.backward(0, parameters, loss)
    remove()
    assert all(p.grad is None for p in parameters.values()) and not log


def test_a_microbatch_that_was_given_up_may_be_pushed_as_a_whole():
    client, _, log = client_of()
    parameters, loss = model()
    remove = fails(parameters)
    with pytest.raises(FloatingPointError):
        client.backward(0, parameters, loss)
    remove()
    parameters, loss = model()
    loss.backward()
    client.push(0, {name: p.grad for name, p in parameters.items()}, loss.item())
    assert sorted(shard for _, shard, _ in log) == [0, 1, 2, 3, 4]


def test_a_parameter_without_a_gradient_is_the_error_that_it_is_to_push():
    client, _, _ = client_of()
    parameters, _ = model()
    with pytest.raises(ValueError, match="push: 'a' has no gradient; every parameter of the server needs one"):
        client.backward(0, parameters, (parameters["b"] * parameters["c"]).sum() + parameters["d"].sum())
    assert client._machine.due == {0, 1}


def test_what_does_not_belong_here_gets_one_line():
    client, _, _ = client_of()
    parameters, loss = model()
    with pytest.raises(ValueError, match="push: the server has no parameter 'z'; it has a, b, c, d"):
        client.backward(0, {**parameters, "z": leaf(2)}, loss)
    with pytest.raises(ValueError, match=r"push of microbatch 7 in clock 0, expected one of \[0, 1\]"):
        client.backward(7, parameters, loss)


def test_a_new_term_in_the_middle_of_a_backward_pass_makes_the_rest_void():
    client, port, log = client_of()
    parameters, loss = model()
    parameters["c"].register_hook(lambda g: port.inbox.insert(0, Moved(0, 0, Term(2, 2, 0))))
    client.backward(0, parameters, loss)
    assert [shard for _, shard, _ in log][0] == 4 and len(log) < 5
    assert client._machine.term.number == 2 and client._machine.due == {1} and not client._machine.pushes
    assert not client._machine.leaving


def test_parts_that_are_encoded_are_encoded_once():
    encoded = []

    def encode(clock, microbatch, piece, gradient, *_):
        encoded.append((clock, microbatch, piece.parameter.name, piece.start))
        return gradient

    client, _, _ = client_of(encode=encode)
    parameters, loss = model()
    remove = fails(parameters)
    with pytest.raises(FloatingPointError):
        client.backward(0, parameters, loss)
    remove()
    client.backward(0, *model())
    assert len(encoded) == len(set(encoded)) == 5


# ── training ──────────────────────────────────────────────────────────────────────────────────────────

class Tied(eg.nn.Module):
    """Its first parameter is used first and last, sparsely or not; the middle ones once."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = eg.nn.Embedding(300, 32, sparse=sparse)
        self.up, self.down = eg.nn.Linear(32, 300), eg.nn.Linear(300, 32)
        self.tied = not sparse

    def forward(self, tokens):
        x = self.down(self.up(self.embedding(tokens)).tanh())
        return x @ self.embedding.weight.T if self.tied else x


def make_model(sparse):
    with eg.seed(3):
        return Tied(sparse)


class Work:
    """give_up: whether each microbatch is first given up in the middle of its backward pass."""

    def __init__(self, sparse=False, give_up=False):
        self.sparse, self.give_up = sparse, give_up

    def __call__(self, client):
        replica = make_model(self.sparse)
        while client.clock():
            client.pull(replica)
            for index in client.microbatches:
                if self.give_up:
                    remove = fails({"a": replica.embedding.weight})
                    with pytest.raises(FloatingPointError):
                        client.backward(index, replica, self.loss(client, index, replica), 8)
                    remove()
                client.backward(index, replica, self.loss(client, index, replica), 8)

    def loss(self, client, index, replica):
        tokens = np.random.default_rng((client.step, index)).integers(0, 300, (2, 4))
        return (replica(eg.tensor(tokens)) ** 2).sum()


def trained(kind, work, **arguments):
    server = kind(make_model(work.sparse), AdamWRule(lr=1e-2), microbatches=3, clip_norm=1.0, **arguments)
    losses = [done.mean_loss for done in server.run(work, clocks=3)]
    return server.state(), losses


@pytest.mark.parametrize("kind", [Threads.kind, Processes.kind])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("give_up", [False, True])
def test_the_bits_are_those_of_gradients_that_leave_at_the_end(kind, sparse, give_up):
    expected, losses = trained(Threads.kind, Work(sparse), zero=1)
    for workers, shards in ((1, 1), (2, 3), (3, 6)):
        state, found = trained(kind, Work(sparse, give_up), zero=2, workers=workers, shards=shards)
        assert_same_bits(state, expected)
        assert found == losses


def test_a_stage_that_is_none_is_refused():
    with pytest.raises(ValueError, match="zero is 4, expected 1, 2 or 3"):
        Threads.make(microbatches=1, zero=4)


def test_a_departure_ignores_leaves_of_others():
    client, _, log = client_of()
    parameters, loss = model()
    other: Tensor = leaf(1)
    Departure(client, 0, parameters, 0.0, 1).backward(loss + other.sum(), True)
    assert other.grad is not None and len(log) == 5
