"""Writing in place, and views: what shares memory, what advances the version, what raises instead of being wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import engine as eg
from engine.testing import check_adjoint, check_errors, check_grads


def leaf(*values: float) -> eg.Tensor:
    return eg.tensor(np.array(values), requires_grad=True)


@pytest.mark.parametrize("write", [
    lambda w: w.zero_(), lambda w: w.copy_(2.0), lambda w: w.__setitem__(0, 5.0), lambda w: w.__itruediv__(2.0),
    lambda w: w[:1].__iadd__(1.0), lambda w: w[1].__isub__(1.0), lambda w: w.reshape(2, 1).zero_(),
    lambda w: w.detach().__imul__(2.0)])
def test_every_way_of_writing_advances_the_version(write: Callable[[eg.Tensor], Any]) -> None:
    """Through the tensor, a view of it, or a detached one: they share memory, and the version with it."""
    x, w = leaf(1.0, 2.0), eg.tensor([3.0, 4.0], dtype="float64")
    y = x * w
    write(w)
    check_errors(lambda: y.sum().backward(), RuntimeError, "multiply", "modified in place", "version 1, saved at 0")


def test_a_write_to_what_no_rule_needs_does_no_harm() -> None:
    x, w = leaf(1.0, 2.0), eg.tensor([3.0, 4.0], dtype="float64")
    y = x + w
    w += 1.0
    y.sum().backward()
    assert np.array_equal(x.grad.numpy(), [1.0, 1.0])


def test_inside_a_graph_a_write_is_a_new_node() -> None:
    def f(x: eg.Tensor) -> eg.Tensor:
        y = x * 2.0
        z = y * y
        y += x
        y *= 3.0
        y -= x * x
        y /= x
        y[0] = x[1] * 10.0
        return (y * y).sum() + z.sum()

    def by_hand(x: np.ndarray) -> np.ndarray:
        y = x * 2.0
        z = y * y
        y = ((y + x) * 3.0 - x * x) / x
        y[0] = x[1] * 10.0
        return np.asarray((y * y).sum() + z.sum())

    check_adjoint(f, np.array([0.5, -1.25, 2.0]), reference=by_hand)


def test_a_view_that_is_gone_forbids_nothing() -> None:
    """What a kernel sees for one launch, or a view that was dropped, cannot miss the change."""
    x = eg.tensor(np.arange(4.0).reshape(2, 2), requires_grad=True)
    y = x * 2.0
    z = y @ eg.ones(2, 3, dtype="float64")
    s = y.reshape(4).sum()
    y += 1.0
    (y.sum() + z.sum() + s).backward()
    assert np.array_equal(x.grad.numpy(), np.full((2, 2), 2.0 + 6.0 + 2.0))


def test_a_tensor_outside_the_graph_joins_it_when_a_tracked_value_is_written() -> None:
    x = leaf(1.0, 2.0)
    y = eg.zeros(2, 2, dtype="float64")
    y[1] = x * 3.0
    y.sum().backward()
    assert np.array_equal(x.grad.numpy(), [3.0, 3.0])


def test_what_cannot_be_right_raises() -> None:
    x = leaf(1.0, 2.0)
    check_errors(lambda: x.__iadd__(1.0), RuntimeError, "__iadd__", "leaf", "no_grad")
    y = x * 2.0
    view = y[0:1]
    check_errors(lambda: y.__iadd__(1.0), RuntimeError, "__iadd__", "view")
    check_errors(lambda: view.__iadd__(1.0), RuntimeError, "__iadd__", "view")
    plain = eg.zeros(2, 3)
    check_errors(lambda: plain.__iadd__(eg.ones(4, 2, 3)), ValueError, "__iadd__", "(4, 2, 3)", "(2, 3)")
    check_errors(lambda: plain.broadcast_to((2, 2, 3)).zero_(), ValueError, "read-only")
    check_errors(lambda: plain.__iadd__(eg.ones(2, 3, device="reference")), ValueError, "cpu", "reference")
    with eg.no_grad():
        x += 1.0
    assert np.array_equal(x.numpy(), [2.0, 3.0]) and x.requires_grad and x.is_leaf


def test_a_write_keeps_memory_and_type() -> None:
    x = eg.tensor([1, 2, 3])
    data = x.numpy()
    x += 1.7
    assert x.dtype is eg.int64 and np.array_equal(data, [2, 3, 4]) and np.shares_memory(data, x.numpy())
    x[eg.tensor([0, 0])] = eg.tensor([8, 9])
    assert data[0] == 9


def test_a_write_whose_source_overlaps_its_target() -> None:
    """x[1:] = x[:-1] reads what was there before it writes."""
    want = np.arange(100.0)
    x = eg.tensor(want)
    x[1:] = x[:-1]
    want[1:] = want[:-1].copy()
    assert np.array_equal(x.numpy(), want)
    x += x.flip(0)
    assert np.array_equal(x.numpy(), want + want[::-1])
    x[...] = x.flip(0)
    assert np.array_equal(x.numpy(), (want + want[::-1])[::-1])


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("f, shapes", [
    (eg.linear, [(2, 3), (4, 3)]), (eg.softmax, [(2, 3)]), (lambda x: eg.softmax(x, 0), [(2, 3)]),
    (lambda x, w: eg.linear_cross_entropy(x, w, eg.tensor([0, 1])), [(2, 3), (4, 3)]),
    (lambda x, w: eg.einsum("ij,kj->ik", x, w), [(2, 3), (4, 3)]), (eg.conv1d, [(1, 2, 5), (3, 2, 2)]),
    (eg.scaled_dot_product_attention, [(1, 2, 3, 4)] * 3)])
def test_a_view_that_an_op_made_for_itself_forbids_nothing(f: Callable[..., eg.Tensor], shapes: list[tuple[int, ...]],
                                                          device: str) -> None:
    """The tape keeps it, and with it the elements as they were; nobody else sees it."""
    found = []
    with eg.device(device):
        for change in (False, True):
            leaves = [eg.ones(*shape, dtype="float64", requires_grad=True) for shape in shapes]
            operands = [eg.tanh(x) for x in leaves]
            y = f(*operands)
            for x in operands if change else ():
                x += 1.0
            found.append([g.numpy() for g in eg.grad((y * y).sum(), leaves)])
    for plain, changed in zip(*found):
        np.testing.assert_array_equal(plain, changed)


def test_a_view_that_an_op_gives_is_seen() -> None:
    """Ops that are made of others may give a view of their operand."""
    for view_of in (eg.flatten, eg.squeeze, lambda x: eg.swapaxes(x, 0, 1), lambda x: eg.split(x, 2, 1)[0]):
        x = eg.tanh(eg.ones(1, 4, requires_grad=True))
        view = view_of(x)
        assert np.shares_memory(view.numpy(), x.numpy())
        check_errors(lambda x=x: x.__iadd__(1.0), RuntimeError, "__iadd__", "view")


def test_views_share_memory_and_pass_gradients() -> None:
    x = eg.tensor(np.arange(6.0).reshape(2, 3))
    for view in (x[1], x[:, ::2], x.T, x.mT, x.reshape(3, 2), x.flip(0), x.expand_dims(0), x.broadcast_to((2, 2, 3)),
                 x[1, 2], x.squeeze(), x.swapaxes(0, 1), *x.split(3, 1), x.detach()):
        assert np.shares_memory(view.numpy(), x.numpy())
    x[0, 0] = 7.0
    assert x.reshape(-1)[0].item() == 7.0
    check_grads(lambda t: (t[1:] * t[:-1]).T.reshape(-1).flip(0)[::2], np.arange(12.0).reshape(4, 3))
