"""The tree over microbatches: its shape is a function of their number, its bits are independent of arrival."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as eg
from engine.backend import get_backend
from engine.optim.accumulator import Accumulator

K = get_backend("reference")


def tree(leaves):
    """The definition: split n leaves at the largest power of two below n."""
    if len(leaves) == 1:
        return leaves[0]
    middle = 1
    while 2 * middle < len(leaves):
        middle *= 2
    return tree(leaves[:middle]) + tree(leaves[middle:])


@settings(deadline=None)
@given(st.integers(1, 17).flatmap(lambda n: st.permutations(range(n))), st.integers(0, 100))
def test_any_order_of_arrival_gives_the_tree_of_the_definition(order, seed):
    n = len(order)
    random = np.random.default_rng(seed)
    gradients = (random.standard_normal((n, 5)) * 10.0 ** random.integers(-6, 6, (n, 1))).astype("float32")
    losses, tokens = random.standard_normal(n), random.integers(1, 9, n)
    accumulator = Accumulator(n, K)
    for i in order:
        assert not accumulator.complete and i not in accumulator
        accumulator.add(i, [K.array(gradients[i])], losses[i], int(tokens[i]))
        assert i in accumulator
    mean = accumulator.mean()
    assert mean.gradients[0].data.tobytes() == (tree(list(gradients)) / np.float32(tokens.sum())).tobytes()
    assert mean.loss == tree(list(losses)) and mean.tokens == tokens.sum()


def test_it_keeps_at_most_one_finished_subtree_a_level():
    accumulator = Accumulator(64, K)
    for i in range(64):
        accumulator.add(i, [K.zeros((1,), eg.float32)])
        assert len(accumulator._finished) == (i + 1).bit_count()


def test_the_gradients_given_are_not_written_to():
    given_arrays = [K.full((3,), i, eg.float32) for i in range(4)]
    accumulator = Accumulator(4, K)
    for i, array in enumerate(given_arrays):
        accumulator.add(i, [array])
    accumulator.mean()
    assert [array.data[0] for array in given_arrays] == [0, 1, 2, 3]


def test_assign_gives_tensors_their_mean_gradient_and_returns_the_mean_loss():
    parameter = eg.tensor([1.0, 2.0], requires_grad=True)
    accumulator = Accumulator(2)
    accumulator.add(1, [eg.tensor([3.0, 5.0])], loss=6.0, tokens=1)
    accumulator.add(0, [eg.tensor([1.0, 1.0])], loss=2.0, tokens=3)
    assert accumulator.assign([parameter]) == 2.0
    assert parameter.grad.tolist() == [1.0, 1.5]


def test_what_does_not_fit_the_parameters_is_assigned_to_none():
    accumulator = Accumulator(1)
    accumulator.add(0, [eg.ones(2), eg.ones(3)])
    a, b = (eg.zeros(n, requires_grad=True) for n in (2, 3))
    for wrong in ([a], [a, b, b], [a, a]):
        with pytest.raises(ValueError, match=r"assign: the parameters have shapes .*, expected \[\(2,\), \(3,\)\]"):
            accumulator.assign(wrong)
        assert a.grad is None
    accumulator.assign([a, b])
    assert b.grad.tolist() == [1.0] * 3


def test_errors_are_one_clear_line():
    with pytest.raises(ValueError, match="microbatches is 0, expected at least 1"):
        Accumulator(0)
    accumulator = Accumulator(3, K)
    one = [K.zeros((1,), eg.float32)]
    accumulator.add(1, one, tokens=0)
    with pytest.raises(ValueError, match="microbatch 1 was added before"):
        accumulator.add(1, one)
    with pytest.raises(ValueError, match=r"index is 3, expected one in \[0, 3\)"):
        accumulator.add(3, one)
    with pytest.raises(ValueError, match=r"microbatches \[0, 2\] of 3 are missing"):
        accumulator.mean()
    for wrong, message in [([], "microbatch 0 has 0 gradients, expected 1 as before"),
                           ([*one, *one], "microbatch 0 has 2 gradients"),
                           ([None], "gradient 0 of microbatch 0 is None"),
                           ([K.zeros((1, 1), eg.float32)], r"is float32 \(1, 1\), expected float32 \(1,\)"),
                           ([K.zeros((1,), eg.float64)], r"is float64 \(1,\), expected float32 \(1,\)")]:
        with pytest.raises(ValueError, match=message):
            accumulator.add(0, wrong)
        assert 0 not in accumulator
    accumulator.add(0, one, tokens=0)
    accumulator.add(2, one, tokens=0)
    with pytest.raises(ValueError, match="sum to 0, expected > 0"):
        accumulator.mean()
