"""Row-sparse updates: an optimizer that postpones what rows without gradient need has the bits of the dense one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparse_rows import HEIGHT, WIDTH, bits, indices, rows_of, table, weighted

import engine as eg
from engine import optim
from engine.backend import observers
from engine.optim.postponed import Postponed

MAKERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd decayed": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.1),
    "adam decayed": lambda p: optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adam eps 0": lambda p: optim.Adam(p, lr=0.1, eps=0.0),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.1),
    "adagrad decayed": lambda p: optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1),
    "rmsprop momentum": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5),
}


class Pair:
    """The same training twice, with dense and with row-sparse gradients; `same` compares all there is."""

    def __init__(self, make: Callable[[Any], optim.Optimizer], schedule: optim.Schedule | None = None):
        self.make, self.schedule = make, schedule
        self.tables = [table(), table()]
        self._optimizers([make([p]) for p in self.tables])

    def _optimizers(self, optimizers: list[optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.schedulers = [optim.Scheduler(o, self.schedule) for o in optimizers] if self.schedule else []

    def step(self, g: eg.RowSparse) -> None:
        for p, gradient, optimizer in zip(self.tables, (g.dense(), g), self.optimizers):
            p.grad = gradient
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def look_up(self, index: list[int]) -> None:
        """What a forward pass reads is the same, although the other rows are not up to date."""
        where = eg.tensor(np.asarray(index, np.int64))
        with eg.no_grad():
            assert len({bits(eg.embedding(p, where)) for p in self.tables}) == 1

    def same(self) -> None:
        assert len({bits(p) for p in self.tables}) == 1
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        assert len({(i, name, bits(value)) for state in states for i, entry in state.items()
                    for name, value in entry.items()}) == sum(map(len, states[0].values()))

    def reload(self, crossed: bool = False) -> None:
        """Save and load all state; crossed: each side goes on from what the other one saved."""
        states = [optimizer.state_dict() for optimizer in self.optimizers][::-1 if crossed else 1]
        updates = [scheduler.state_dict() for scheduler in self.schedulers]
        self.tables = [eg.tensor(p.numpy(), requires_grad=True) for p in self.tables]
        self._optimizers([self.make([p]) for p in self.tables])
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(copy.deepcopy(state))
        for scheduler, state in zip(self.schedulers, updates):
            scheduler.load_state_dict(state)


@pytest.fixture(autouse=True)
def nothing_waits_afterwards() -> Iterator[None]:
    yield
    gc.collect()
    eg.exp(eg.ones(1))  # an observer whose tables are all gone finds out at the next launch
    assert not [o for o in observers if o.__module__ == "engine.optim.postponed"]


events = st.lists(st.one_of(
    st.tuples(st.just("step"), indices), st.tuples(st.just("step"), indices), st.tuples(st.just("look up"), indices),
    st.tuples(st.just("dense step"), indices), st.tuples(st.sampled_from(["read", "reload", "exchange"]), st.just([]))),
    max_size=25)


@pytest.mark.parametrize("name", list(MAKERS))
@given(events=events, scheduled=st.booleans())
def test_sparse_updates_have_the_dense_bits(name: str, events: list[tuple[str, list[int]]], scheduled: bool) -> None:
    pair = Pair(MAKERS[name], optim.warmup_cosine(0.1, 3, 20) if scheduled else None)
    for number, (what, index) in enumerate(events):
        if what == "step":
            pair.step(rows_of(index, number))
        elif what == "look up":
            pair.look_up(index)
        elif what == "dense step":
            for p, optimizer in zip(pair.tables, pair.optimizers):
                p.grad = rows_of(index, number).dense()
                optimizer.step()
        elif what == "read":
            pair.same()
        else:
            pair.reload(crossed=what == "exchange")
    pair.same()


@pytest.mark.parametrize("name", ["adam", "adam decayed", "adamw", "momentum"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_thousand_steps(name: str, scheduled: bool) -> None:
    """Zipf's law: a few rows in every batch, most rows once in a while, some never."""
    random = np.random.default_rng(7)
    pair = Pair(MAKERS[name], optim.warmup_cosine(0.05, 100, 1000) if scheduled else None)
    for step in range(1000):
        index = (random.zipf(1.3, 3) % (2 * HEIGHT)).tolist()
        index = [i for i in index if i < HEIGHT - 1]
        pair.look_up(index)
        pair.step(rows_of(index, step))
        if step in (333, 666):
            pair.reload(crossed=step == 666)
    pair.same()


def test_changed_hyper_parameters_are_those_of_the_missed_steps() -> None:
    pair = Pair(lambda p: optim.SGD(p, lr=0.1))
    changes: dict[int, dict[str, float]] = {3: {"momentum": 0.9}, 5: {"lr": 0.01}, 8: {"weight_decay": 0.1},
                                            11: {"weight_decay": 0.0, "momentum": 0.0}, 14: {"momentum": 0.5}}
    for step in range(18):
        for optimizer in pair.optimizers:
            optimizer.param_groups[0].update(changes.get(step, {}))
        pair.step(rows_of([step % 5], step))
        if step == 12:
            pair.optimizers[1].settle()
    pair.same()


READERS: dict[str, Callable[[eg.Tensor], Any]] = {
    "numpy": lambda p: p.numpy(), "an op": lambda p: p + 0, "a view": lambda p: p[2:9] * 1.0, "item": lambda p: p[3, 0],
    "take": lambda p: p[eg.tensor([3, 4])], "detach": lambda p: p.detach().numpy(), "repr": repr,
    "pickle": lambda p: copy.deepcopy(p).numpy(), "matmul": lambda p: p @ p.T,
    "dlpack": lambda p: np.from_dlpack(p.detach()),
    "to": lambda p: p.to("float64"), "norm": lambda p: (p * p).sum(),
}


@pytest.mark.parametrize("name", list(READERS))
def test_whoever_reads_sees_all_updates(name: str) -> None:
    pair = Pair(MAKERS["adam"])
    for step in range(4):
        pair.step(rows_of([step, step + 1], step))
    with eg.no_grad():
        dense, sparse = (READERS[name](p) for p in pair.tables)
    assert dense == sparse if name == "repr" else bits(dense) == bits(sparse)


def test_a_view_taken_earlier_sees_them_too() -> None:
    pair = Pair(MAKERS["adam"])
    views = [p.detach()[1:] for p in pair.tables]
    for step in range(4):
        pair.step(rows_of([step], step))
    assert len({bits(view) for view in views}) == 1


@pytest.mark.parametrize("write", [
    lambda p: p.copy_(eg.ones(HEIGHT, WIDTH)), lambda p: p.zero_(),
    lambda p: p.__setitem__((slice(2, 5),), 7.0), lambda p: p.__imul__(2.0)])
def test_whoever_writes_writes_over_them(write: Any) -> None:
    pair = Pair(MAKERS["adam"])
    for step in range(8):
        pair.step(rows_of([step, step + 1], step))
        if step == 4:
            with eg.no_grad():
                for p in pair.tables:
                    write(p)
    pair.same()


def test_loading_a_model_writes_over_them() -> None:
    layers = [eg.nn.Embedding(HEIGHT, WIDTH, sparse=sparse) for sparse in (False, True)]
    first = {"weight": table(1)}
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [optim.Adam(layer.parameters(), lr=0.1) for layer in layers]
    for step in range(6):
        for layer, optimizer in zip(layers, optimizers):
            optimizer.zero_grad()
            weighted(layer(eg.tensor([step, 2]))).backward()
            optimizer.step()
            if step == 3:
                layer.load_state_dict(first)
    assert bits(layers[0].weight) == bits(layers[1].weight)


def test_two_optimizers_on_one_table() -> None:
    pair = Pair(MAKERS["adam"])
    others = [optim.SGD([p], lr=0.1, momentum=0.9) for p in pair.tables]
    for step in range(6):
        pair.step(rows_of([step], step))
        g = rows_of([step + 1], step)
        for p, gradient, other in zip(pair.tables, (g.dense(), g), others):
            p.grad = gradient
            other.step()
    pair.same()


def test_a_table_in_other_memory() -> None:
    pair = Pair(MAKERS["momentum"])
    for step in range(6):
        pair.step(rows_of([step], step))
        if step == 2:
            for p in pair.tables:
                p.array = eg.ones(HEIGHT, WIDTH).array
    pair.same()


def test_a_step_is_seen_by_a_tape_that_saved_the_old_rows() -> None:
    p = table()
    loss = (p * p).sum()
    p.grad = rows_of([1])
    optim.Adam([p]).step()
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_a_transposed_table_takes_the_dense_way() -> None:
    tables = [eg.tensor(np.arange(12.0, dtype=np.float32).reshape(3, 4)).T.detach().requires_grad_() for _ in range(2)]
    g = rows_of([1, 3], height=4, width=3)
    for p, gradient in zip(tables, (g.dense(), g)):
        p.grad = gradient
        optim.Adam([p]).step()
    assert bits(tables[0]) == bits(tables[1])


def test_rows_of_other_ranks() -> None:
    for shape in ((HEIGHT,), (HEIGHT, 2, 3)):
        tables = [eg.ones(*shape, requires_grad=True) for _ in range(2)]
        optimizers = [optim.Adam([p], lr=0.1) for p in tables]
        for step in range(4):
            with eg.seed(step):
                g = eg.RowSparse([step, 2], eg.randn(2, *shape[1:]), HEIGHT)
            for p, gradient, optimizer in zip(tables, (g.dense(), g), optimizers):
                p.grad = gradient
                optimizer.step()
        assert bits(tables[0]) == bits(tables[1])


def test_only_touched_rows_cost() -> None:
    """What is launched for a step has the size of the touched rows; rows that were never touched cost nothing."""
    sizes: list[int] = []
    p = table(height=1000)
    optimizer = optim.Adam([p], lr=0.1)
    p.grad = rows_of([3, 4], height=1000)
    optimizer.step()

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        sizes.extend(arguments[7] for _ in [0] if name == "adam")

    observers.append(note)
    try:
        for _ in range(3):
            optimizer.step()
        assert sizes == [2 * WIDTH] * 3
        p.numpy()
        assert sizes == [2 * WIDTH] * 3
        p.grad = rows_of([4], height=1000)
        optimizer.step()
        p.numpy()
        assert sizes == [2 * WIDTH] * 3 + [WIDTH, WIDTH]
    finally:
        observers.remove(note)


def test_plain_sgd_postpones_nothing() -> None:
    p = table()
    p.grad = rows_of([3])
    optimizer = optim.SGD([p], lr=0.1)
    scheduler = optim.Scheduler(optimizer, optim.cosine(0.1, 9))
    for _ in range(9):
        optimizer.step()
        scheduler.step()
    assert not [o for o in observers if o.__module__ == Postponed.__module__]
    assert len(optimizer.postponed[id(p)].rules) == 1  # whatever the learning rate was, rows without gradient stay


# ── lazy ──────────────────────────────────────────────────────────────────────────────────────────────

def test_lazy_adam_leaves_other_rows_alone() -> None:
    p = table()
    before = p.numpy().copy()
    optimizer = optim.LazyAdam([p], lr=0.1, weight_decay=0.1)
    for step in range(3):
        p.grad = rows_of([1, 4], step)
        optimizer.step()
    changed = (p.numpy() != before).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [1, 4]
    assert not optimizer.state_dict()["state"][0]["exp_avg"][[0, 2, 3]].any()


def test_lazy_adam_sees_what_another_optimizer_postponed() -> None:
    found = []
    for read_first in (True, False):
        p = eg.ones(4, 2, requires_grad=True)
        # Decay makes the order of two updates show.
        adam, lazy = optim.AdamW([p], lr=0.1, weight_decay=0.5), optim.LazyAdam([p], lr=0.1)
        for optimizer, row in ((adam, 1), (adam, 2), (adam, 2), (lazy, 1)):
            p.grad = eg.RowSparse(np.array([row]), eg.ones(1, 2), 4)
            if read_first:
                p.numpy()
            optimizer.step()
        found.append(p.numpy().tobytes())
    assert found[0] == found[1]


def test_lazy_adam_of_rows_touched_in_every_step_is_adam() -> None:
    tables = [table(), table()]
    for make, p in zip((optim.LazyAdam, optim.Adam), tables):
        optimizer = make([p], lr=0.1)
        for step in range(5):
            p.grad = rows_of([1, 4], step)
            optimizer.step()
    assert bits(tables[0]) == bits(tables[1])


def test_lazy_adam_is_torchs_sparse_adam() -> None:
    """PyTorch adds ε to √v before the bias correction and we add it after: ε = 10⁻³⁰ is neither. Each step differs by
    roundings, of which there are fewer than 10 of 2⁻²⁴ relative to a step of size lr (|m̂| ≤ √v̂ holds for a row's first
    steps, and later within 1/√(1 − β₂) = 32); so 50 steps differ by at most 50 · 10 · 2⁻²⁴ · 32 lr."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(3)
    ours = table()
    theirs = torch.tensor(ours.numpy().copy(), requires_grad=True)
    lazy, sparse = optim.LazyAdam([ours], lr=0.1, eps=1e-30), torch.optim.SparseAdam([theirs], lr=0.1, eps=1e-30)
    for step in range(50):
        g = rows_of(random.integers(0, HEIGHT, 3), step)
        ours.grad = g
        theirs.grad = torch.sparse_coo_tensor(torch.from_numpy(g.rows[None]), torch.from_numpy(g.values.numpy()),
                                              ours.shape, check_invariants=True)
        lazy.step()
        sparse.step()
    np.testing.assert_allclose(ours.numpy(), theirs.detach().numpy(), rtol=0, atol=50 * 10 * 2.0**-24 * 32 * 0.1)
