"""feed_forward and self-attention in one product: the bits of their parts, and when they stand for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine import nn
from engine.backend import get_backend, observers
from engine.ops.attention import attend, attend_joined
from engine.ops.feed_forward import ACTIVATIONS
from engine.ops.matmul import joined_linear


def normal(seed: int, *shapes: tuple[int, ...] | None, dtype: str = "float32") -> list[Any]:
    """Values of size 1 after a sum over the last axis."""
    rng = np.random.default_rng(seed)
    return [None if shape is None else eg.tensor(rng.standard_normal(shape) / math.sqrt(shape[-1]), dtype=dtype,
                                                 requires_grad=True) for shape in shapes]


def results(f: Any, operands: list[Any], g: Any) -> list[np.ndarray]:
    """The output, and the gradients of the operands."""
    y = f(*operands)
    wanted = [x for x in operands if x is not None]
    return [y.numpy(), *(d.numpy() for d in eg.grad(y, wanted, g))]


def assert_same(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.tobytes() == other.tobytes()


def launched(f: Any) -> list[str]:
    seen: list[str] = []

    def observe(name: str, _arguments: Any) -> None:
        seen.append(name)

    observers.append(observe)
    try:
        f()
    finally:
        observers.remove(observe)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "inputs", "hidden", "outputs"), [
    (1, 5, 3, 2), (8, 300, 33, 7), (9, 4, 40, 31), (70, 20, 410, 16), (29, 600, 65, 300), (0, 3, 4, 2), (3, 0, 4, 2)])
def test_it_has_the_bits_of_its_three_parts(dtype, activation, rows, inputs, hidden, outputs, told_threads) -> None:
    """Few rows and many, one block of the depth and several, whole vectors and not, and one thread and three."""
    operands = normal(1, (rows, inputs or 1), (hidden, inputs or 1), (outputs, hidden), (hidden,), (outputs,),
                      dtype=dtype)
    if not inputs:
        operands[:2] = [eg.zeros(rows, 0, dtype=dtype, requires_grad=True),
                        eg.zeros(hidden, 0, dtype=dtype, requires_grad=True)]
    [g] = normal(2, (rows, outputs), dtype=dtype)
    f = ACTIVATIONS[activation]
    want = results(lambda x, up, down, b, c: eg.linear(f(eg.linear(x, up, b)), down, c), operands, g)
    for threads in (1, 3):
        eg.set_num_threads(threads)
        assert_same(results(lambda *o: eg.feed_forward(*o, activation), operands, g), want)
        with eg.no_grad():
            assert_same([eg.feed_forward(*operands, activation).numpy()], want[:1])


def test_relu_keeps_what_is_hidden_hidden() -> None:
    """Where x < 0 its gradient is 0 even for an infinite g, as in relu by itself."""
    x, one = eg.tensor([[-1.0]], requires_grad=True), eg.ones(1, 1)
    dx = eg.grad(eg.feed_forward(x, one, one, activation="relu"), x, eg.tensor([[-math.inf]])).numpy()
    assert dx[0, 0] == 0 and not np.signbit(dx[0, 0])


@pytest.mark.parametrize(("wanted", "products", "slopes"), [(4, 0, 0), (3, 0, 1), (2, 1, 0), (1, 1, 1), (0, 1, 1)])
def test_what_nobody_wants_is_not_computed(wanted: int, products: int, slopes: int) -> None:
    operands = normal(3, (4, 6), (8, 6), (5, 8), (8,), (5,))
    for i, x in enumerate(operands):
        x.requires_grad_(i == wanted)
    y = eg.feed_forward(*operands)
    seen = launched(lambda: y.backward(eg.ones(4, 5)))
    assert (seen.count("gemm"), seen.count("linear_activation_vjp")) == (products, slopes)
    assert operands[wanted].grad is not None


def test_without_a_gradient_nothing_is_kept_beside_the_result() -> None:
    operands = normal(4, (64, 32), (4096, 32), (32, 4096))
    k = get_backend("cpu")

    def peak() -> int:
        k.pool.reset_peak()
        before = k.pool.figures().live
        with eg.no_grad():
            eg.feed_forward(*operands)
        return k.pool.figures().peak - before

    assert peak() < 1.5 * 64 * 4096 * 4


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_joined_maps_are_three(seed: int, biased: bool) -> None:
    rng = np.random.default_rng(seed)
    rows, inputs, q, kv = rng.integers(1, (20, 300, 70, 40))
    biases = [(q,), (kv,), (kv,)] if biased else [None] * 3
    operands = normal(seed, (rows, inputs), (q, inputs), (kv, inputs), (kv, inputs), *biases)
    [g] = normal(seed + 1, (rows, q + 2 * kv))

    def apart(x: Any, *maps: Any) -> Any:
        return eg.concat([eg.linear(x, weight, bias) for weight, bias in zip(maps[:3], maps[3:])], -1)

    got, want = results(joined_linear, operands, g), results(apart, operands, g)
    assert_same([got[0], *got[2:]], [want[0], *want[2:]])
    wide = [x if x is None else x.to(dtype="float64").detach().requires_grad_() for x in operands]
    exact = results(apart, wide, g.to(dtype="float64"))[1]  # dx is one sum here and three there
    bound = (q + 2 * kv + 3) * 2.0**-24 * (np.abs(g.numpy()) @ np.concatenate([np.abs(w.numpy())
                                                                             for w in operands[1:4]]))
    assert np.all(np.abs(got[1] - exact) <= bound)


@pytest.mark.parametrize("case", ["plain", "causal", "lengths", "mask", "dropout"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (4, 2, 5), (3, 1, 16)])
@pytest.mark.parametrize("t", [3, 140])
def test_attention_over_one_array_has_the_bits_of_attention_over_three(case, heads, kv_heads, width, t) -> None:
    """Forward, and the gradient, whose parts lie in one array: for few tokens and for several tiles."""
    [joined, g] = normal(t, (2, t, heads + 2 * kv_heads, width), (2, t, heads, width))
    mask = eg.tensor(np.random.default_rng(5).random((heads, t, t)) < 0.8) if case == "mask" else None
    options = {"causal": case == "causal", "dropout": 0.3 if case == "dropout" else 0.0,
               "lengths": eg.tensor([t, t - 2]) if case == "lengths" else None}
    with eg.seed(7):
        got = results(lambda x: attend_joined(x, kv_heads, mask, **options), [joined], g)
    parts = [joined[:, :, :heads], joined[:, :, heads:-kv_heads], joined[:, :, -kv_heads:]]
    with eg.seed(7):
        want = results(lambda q, k, v: attend(q, k, v, mask, **options),
                       [part.detach().requires_grad_() for part in parts], g)
    assert_same(got, [want[0], np.concatenate(want[1:], 2)])


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"dropout is 1.5, expected a number in \[0, 1\)"):
        nn.MultiHeadAttention(4, 2, dropout=1.5)(eg.ones(1, 3, 4))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 3\).*\(2, 1, 4, 4\)"):
        attend_joined(eg.zeros(2, 4, 3, 5), 1, eg.zeros(3, 3))


class Doubled(nn.Linear):
    """A map that is more than its weight."""

    def forward(self, x: eg.Tensor) -> eg.Tensor:
        return super().forward(x) * 2.0


@pytest.mark.parametrize("replaced", [None, "query", "value"])
def test_self_attention_is_one_product_unless_a_map_is_replaced(replaced: str | None) -> None:
    layer, x = nn.MultiHeadAttention(8, 2), eg.rand(2, 3, 8)
    with eg.no_grad():
        plain = layer(x).numpy()  # three products
    assert launched(lambda: layer(x)).count("gemm") == 2
    assert layer(x).numpy().tobytes() == plain.tobytes()
    layer.key.bias = None
    assert launched(lambda: layer(x)).count("gemm") == 4  # they are not alike any more
    with eg.no_grad():
        plain = layer(x).numpy()
    assert layer(x).numpy().tobytes() == plain.tobytes()
    layer = nn.MultiHeadAttention(8, 2)
    plain = layer(x).numpy()
    if replaced is not None:
        map_ = Doubled(8, 8)
        map_.load_state_dict(getattr(layer, replaced).state_dict())
        setattr(layer, replaced, map_)
        assert launched(lambda: layer(x)).count("gemm") == 4
        assert not np.array_equal(layer(x).numpy(), plain)


def test_the_network_is_one_op_unless_a_map_is_replaced() -> None:
    layer, x = nn.FeedForward(8, 16), eg.rand(2, 3, 8)
    before = layer(x).numpy()
    assert "linear_activation" in launched(lambda: layer(x))
    layer.up = Doubled(8, 16)
    assert "linear_activation" not in launched(lambda: layer(x))
    assert not np.array_equal(layer(x).numpy(), before)
