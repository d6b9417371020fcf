"""Row-sparse gradients: made, added, clipped and accumulated with the bits of dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparse_rows import HEIGHT, WIDTH, bits, indices, rows_of, sparse_gradients, table, weighted

import engine as eg
from engine import optim
from engine.backend import get_backend
from engine.optim.clip import BLOCK, sums_of_squares
from engine.rowsparse import add_gradients


def gradients(index: Any, how: Callable[[eg.Tensor, eg.Tensor, bool], eg.Tensor], seed: int = 0) -> list[Any]:
    """The table's gradient, dense and row-sparse, for a loss of it and an index."""
    found = []
    for sparse in (False, True):
        weight = table(seed)
        how(weight, eg.tensor(np.asarray(index, np.int64)), sparse).backward()
        found.append(weight.grad)
    return found


# ── the gradient itself ───────────────────────────────────────────────────────────────────────────────

@sparse_gradients
@given(index=indices, rank=st.integers(1, 2))
def test_the_gradient_of_an_embedding(index: list[int], rank: int) -> None:
    shaped = np.reshape(np.asarray(index, np.int64), (-1,) if rank == 1 else (1, -1))
    dense, sparse = gradients(shaped, lambda w, i, sparse: weighted(eg.embedding(w, i, sparse=sparse)))
    assert isinstance(sparse, eg.RowSparse) and isinstance(dense, eg.Tensor)
    assert sparse.rows.tolist() == sorted(set(index)) and sparse.shape == dense.shape
    assert bits(sparse) == bits(dense) == bits(sparse.dense())


def test_rows_in_any_order_are_summed_as_they_come() -> None:
    big, small = 1e8, 1.0
    values = eg.tensor(np.array([[big], [small], [-big], [small]], np.float32))
    g = eg.RowSparse([3, 1, 3, 3], values, 5)
    assert g.rows.tolist() == [1, 3]
    assert g.values.numpy().tolist() == [[1.0], [1.0]]  # (big − big) + small, and not big + (small − big)
    assert repr(g) == "RowSparse(2 rows of (5, 1), float32)"
    assert not np.shares_memory(eg.RowSparse([0, 1, 2, 3], values, 4).values.numpy(), values.numpy())
    assert bits(eg.RowSparse([2], eg.tensor([[-0.0]]), 3)) == bits(np.zeros((3, 1), np.float32))  # 0 + −0


@sparse_gradients
@given(first=indices, second=indices, seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_backward_twice_adds(first: list[int], second: list[int], seeds: tuple[int, int]) -> None:
    def grads(sparse: bool) -> Any:
        weight = table()
        for index, seed in zip((first, second), seeds):
            y = eg.embedding(weight, eg.tensor(np.asarray(index, np.int64)), sparse=sparse)
            with eg.seed(seed):
                (y * eg.randn(*y.shape)).sum().backward()
        return weight.grad

    assert isinstance(grads(True), eg.RowSparse)
    assert bits(grads(True)) == bits(grads(False))


def test_sums_keep_the_sign_of_zero_as_dense_sums_do() -> None:
    a, b = (g.map(lambda v: get_backend("cpu").map("negative", v)) for g in
            (eg.RowSparse(rows, eg.zeros(2, 1), 4) for rows in ([0, 1], [1, 2])))
    assert np.signbit(a.numpy())[:2].all()
    p = eg.zeros(4, 1, requires_grad=True)
    p.grad = a
    assert bits(add_gradients(a, b)) == bits(a.numpy() + b.numpy()) == bits(add_gradients(a, b.dense()))


@pytest.mark.parametrize("how", [
    lambda w, i, sparse: weighted(eg.embedding(w, i, sparse=sparse) @ w.T),                        # tied weights
    lambda w, i, sparse: weighted(eg.embedding(w * 2.0, i, sparse=sparse)),                       # not a leaf
    lambda w, i, sparse: weighted(eg.embedding(w, i, sparse=sparse)) + weighted(w[2:4]),
    lambda w, i, sparse: weighted(w[2:4]) + weighted(eg.embedding(w, i, sparse=sparse)),
    lambda w, i, sparse: weighted(eg.embedding(w.to("float64"), i, sparse=sparse)),
])
def test_meeting_a_dense_gradient(how: Any) -> None:
    dense, sparse = gradients([3, 1, 3], how)
    assert isinstance(sparse, eg.Tensor)
    assert bits(sparse) == bits(dense)


@sparse_gradients
def test_two_lookups_in_one_graph_stay_sparse() -> None:
    dense, sparse = gradients([3, 1, 3], lambda w, i, sparse: weighted(
        eg.embedding(w, i, sparse=sparse) * eg.embedding(w, i + 2, sparse=sparse)))
    assert isinstance(sparse, eg.RowSparse) and sparse.rows.tolist() == [1, 3, 5]
    assert bits(sparse) == bits(dense)


@sparse_gradients
def test_checkpointing() -> None:
    dense, sparse = gradients([3, 1, 3], lambda w, i, sparse: weighted(
        eg.checkpoint(lambda w: eg.exp(eg.embedding(w, i, sparse=sparse)), w)))
    assert isinstance(sparse, eg.RowSparse) and bits(sparse) == bits(dense)


@sparse_gradients
def test_hooks_see_and_replace_it() -> None:
    weight, seen = table(), []
    weight.register_hook(lambda g: seen.append(g))
    remove = weight.register_hook(lambda g: g * 0.5)
    eg.embedding(weight, eg.tensor([4, 4]), sparse=True).sum().backward()
    assert isinstance(seen[0], eg.RowSparse)
    assert isinstance(weight.grad, eg.RowSparse) and weight.grad.values.tolist() == [[1.0] * WIDTH]
    remove()
    weight.register_hook(lambda g: g.dense() + 1)
    eg.embedding(weight, eg.tensor([4]), sparse=True).sum().backward()
    assert isinstance(weight.grad, eg.Tensor) and weight.grad.numpy()[3:5, 0].tolist() == [1.0, 3.0]


@sparse_gradients
def test_grad_and_retained_gradients() -> None:
    weight = table()
    double = weight * 2.0
    double.retain_grad()
    y = eg.embedding(double, eg.tensor([4, 4]), sparse=True).sum()
    found = eg.grad(y, [double, weight], retain_graph=True)
    assert isinstance(found[0], eg.RowSparse) and isinstance(found[1], eg.Tensor)
    for _ in range(2):
        y.backward(retain_graph=True)
    assert isinstance(double.grad, eg.RowSparse)
    assert double.grad.values.tolist() == [[4.0] * WIDTH]  # eg.grad leaves it alone
    (again,) = eg.grad((eg.embedding(weight, eg.tensor([1]), sparse=True) ** 3).sum(), [weight], create_graph=True)
    assert isinstance(again, eg.Tensor) and again.requires_grad


@sparse_gradients
def test_zero_grad_and_moving() -> None:
    layer = eg.nn.Embedding(HEIGHT, WIDTH, sparse=True)
    assert repr(layer).startswith("Embedding(13, 5, sparse=True)")
    layer(eg.tensor([1, 2])).sum().backward()
    layer.to("float64")
    assert layer.weight.grad.dtype is eg.float64 and isinstance(layer.weight.grad, eg.RowSparse)
    layer.zero_grad()
    assert layer.weight.grad is None


def test_where_there_is_no_kernel_the_gradient_is_dense() -> None:
    with eg.device("reference"):
        weight = eg.ones(4, 2, requires_grad=True)
        eg.embedding(weight, eg.tensor([1, 1]), sparse=True).sum().backward()
    assert isinstance(weight.grad, eg.Tensor) and weight.grad.numpy()[1].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("rows, values, error, message", [
    ([0, 13], (2, 5), ValueError, r"RowSparse: rows hold 13, expected whole numbers in \[0, 13\)"),
    ([-1, 3], (2, 5), ValueError, "RowSparse: rows hold -1"),
    ([0.5, 1.0], (2, 5), TypeError, "RowSparse: rows are float64, expected whole numbers"),
    ([0, 1, 2], (2, 5), ValueError, r"rows have shape \(3,\) and values \(2, 5\), expected one row number for each"),
    ([[0], [1]], (2, 5), ValueError, r"rows have shape \(2, 1\)"),
])
def test_what_is_no_gradient(rows: Any, values: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eg.RowSparse(rows, eg.ones(*values), HEIGHT)


@sparse_gradients
def test_shapes_must_agree() -> None:
    p = table()
    p.grad = rows_of([1], width=3)
    with pytest.raises(ValueError, match=r"RowSparse: gradients of shapes \(13, 3\) and \(13, 5\) do not add"):
        eg.embedding(p, eg.tensor([1]), sparse=True).sum().backward()
    with pytest.raises(ValueError, match=r"Adam.step: the gradient is float32 \(13, 3\) on cpu, expected .*\(13, 5\)"):
        optim.Adam([p]).step()
    with pytest.raises(ValueError, match="copy=False was asked for"):
        np.asarray(p.grad, copy=False)


# ── clipping and accumulation ─────────────────────────────────────────────────────────────────────────

@given(height=st.integers(1, 40), width=st.sampled_from([1, 3, 100, 768, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]),
       seed=st.integers(0, 99), share=st.floats(0, 1))
def test_the_norm_has_the_dense_bits(height: int, width: int, seed: int, share: float) -> None:
    rows = np.flatnonzero(np.random.default_rng(seed).random(height) < share)
    g, k = rows_of(rows, seed, height, width), get_backend("cpu")
    assert bits(sums_of_squares(k, g).data) == bits(sums_of_squares(k, g.dense().array).data)


@given(index=indices, clip=st.sampled_from([0.01, 1.0, 100.0]))
def test_clipping(index: list[int], clip: float) -> None:
    results = []
    for sparse in (False, True):
        p, q = table(), table(1)
        g = rows_of(index)
        p.grad, q.grad = g if sparse else g.dense(), eg.ones(HEIGHT, WIDTH)
        norm = optim.clip_grad_norm_([p, q], clip)
        assert isinstance(p.grad, eg.RowSparse) == sparse
        clipped = bits(p.grad)
        optim.clip_grad_value_([p, q], 0.125)
        results.append((norm, clipped, bits(p.grad), bits(q.grad)))
    assert results[0] == results[1]


@given(batches=st.lists(st.tuples(indices, st.booleans()), min_size=1, max_size=7), order=st.randoms())
def test_accumulation(batches: list[tuple[list[int], bool]], order: Any) -> None:
    """The tree's sum is that of dense gradients, sparse where all are, in any order of arrival."""
    results = []
    for sparse in (False, True):
        accumulator = optim.Accumulator(len(batches))
        numbered = list(enumerate(batches))
        order.shuffle(numbered)
        for i, (index, dense_too) in numbered:
            g = rows_of(index, i)
            accumulator.add(i, [g if sparse and not dense_too else g.dense()], float(i), 3)
        p = table()
        loss = accumulator.assign([p])
        results.append((loss, bits(p.grad)))
        assert isinstance(p.grad, eg.RowSparse) == (sparse and not any(dense for _, dense in batches))
    assert results[0] == results[1]
