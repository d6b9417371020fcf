"""Graphs of several ops: sums over paths in a fixed order, several outputs, higher orders, checkpoints; against
differences and by hand. The single ops are in tests/ops/test_gradients.py, the tape itself in test_autograd.py."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import engine as eg
from engine.backend import get_backend
from engine.testing import check_adjoint, check_errors, check_grads


def leaf(*values: float) -> eg.Tensor:
    return eg.tensor(np.array(values), requires_grad=True)


def ones(*shape: int) -> eg.Tensor:
    return eg.ones(shape, dtype="float64")


def test_diamonds_and_repeated_use() -> None:
    """x is reached along many paths of different lengths; each node runs once, when all its consumers have."""
    def f(x: eg.Tensor) -> eg.Tensor:
        a = x * x
        b = a + x
        c = a * b
        return c + a * x + b * b + x
    check_grads(f, np.array([0.3, -1.2, 2.0]))


def test_the_order_of_accumulation_is_fixed() -> None:
    """Later-made consumers come first, ((g₃ + g₂) + g₁): for these numbers another order gives another sum."""
    big = 2.0**60
    x = leaf(1.0)
    parts = x * 1.0, x * big, x * -big
    (parts[0] + parts[1] + parts[2]).backward(ones(1))
    assert x.grad.item() == (-big + big) + 1.0 == 1.0
    x = leaf(1.0)
    parts = x * big, x * 1.0, x * -big
    (parts[2] + parts[0] + parts[1]).backward(ones(1))
    assert x.grad.item() == (-big + 1.0) + big == 0.0


def test_several_outputs_and_inner_inputs() -> None:
    x = leaf(1.0, 2.0)
    a, b = x * 3.0, x * x
    got = eg.grad([a, b], x, [ones(2), eg.tensor([1.0, 10.0], dtype="float64")])
    assert np.array_equal(got.numpy(), [3 + 2, 3 + 40])
    inner = x * 2.0
    got = eg.grad([inner, inner.sum()], inner, [ones(2), None])
    assert np.array_equal(got.numpy(), [2.0, 2.0])
    assert x.grad is None, "eg.grad leaves .grad alone"


def test_derivatives_of_derivatives() -> None:
    x = leaf(1.5)
    y = x**4.0
    for want in (4 * 1.5**3, 12 * 1.5**2, 24 * 1.5, 24.0):
        y = eg.grad(y, x, ones(1), create_graph=True)
        assert abs(y.item() - want) <= 64 * 2.0**-53 * want  # a handful of roundings each


def test_create_graph_through_backward() -> None:
    x = leaf(2.0)
    (x * x * x).backward(ones(1), create_graph=True)
    g = x.grad
    assert g.requires_grad and g.item() == 12.0
    x.grad = None
    g.backward(ones(1))
    assert x.grad.item() == 12.0


def test_vjp_and_jvp_agree_with_differences_and_each_other() -> None:
    def f(x: eg.Tensor, w: eg.Tensor) -> eg.Tensor:
        return eg.softmax(x @ w).tanh()

    rng = np.random.default_rng(0)
    x, w = rng.uniform(-1, 1, (3, 4)), rng.uniform(-1, 1, (4, 2))
    vx, vw, u = rng.uniform(-1, 1, (3, 4)), rng.uniform(-1, 1, (4, 2)), rng.uniform(-1, 1, (3, 2))
    y, pull = eg.vjp(f, eg.tensor(x), eg.tensor(w))
    gx, gw = pull(eg.tensor(u))
    assert np.array_equal(gx.numpy(), pull(eg.tensor(u))[0].numpy()), "pull may be called twice"
    same, jv = eg.jvp(f, [eg.tensor(x), eg.tensor(w)], [eg.tensor(vx), eg.tensor(vw)])
    assert np.array_equal(y.numpy(), same.numpy())
    left, right = np.sum(jv.numpy() * u), np.sum(gx.numpy() * vx) + np.sum(gw.numpy() * vw)
    assert abs(left - right) <= 256 * 2.0**-53  # sums of 26 terms below 1, each of a dozen roundings
    check_adjoint(f, x, w)


def test_a_transformer_block_against_differences() -> None:
    """Attention, norms, feed-forward and residuals together, first and second order."""
    rng = np.random.default_rng(3)

    def f(x: eg.Tensor, w: eg.Tensor, scale: eg.Tensor, v: eg.Tensor) -> eg.Tensor:
        h = eg.rms_norm(x, scale)
        heads = (eg.linear(h, part).reshape(1, 3, 2, 2).permute_dims((0, 2, 1, 3)) for part in eg.split(w, 3))
        q, k, values = heads
        a = eg.scaled_dot_product_attention(q, k, values, causal=True).permute_dims((0, 2, 1, 3)).reshape(3, 4)
        h = x + a
        return h + eg.silu(eg.linear(eg.layer_norm(h, scale, scale), v))

    check_grads(f, rng.uniform(-1, 1, (3, 4)), rng.uniform(-1, 1, (12, 4)), rng.uniform(0.5, 1.5, 4),
                rng.uniform(-1, 1, (4, 4)))


def test_grad_mode_belongs_to_its_thread() -> None:
    seen: list[bool] = []
    with eg.no_grad():
        thread = threading.Thread(target=lambda: seen.append(eg.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_a_rule_that_raises_leaves_the_grad_mode_as_it_was() -> None:
    x, w = leaf(1.0, 2.0), eg.tensor([3.0, 4.0], dtype="float64")
    y = x * w
    w += 1.0
    with pytest.raises(RuntimeError):
        y.sum().backward()
    assert eg.is_grad_enabled()


def test_backward_frees_each_node_as_it_leaves_it() -> None:
    """A chain that keeps 1 MiB a node: when backward is at its end, what it has left is free again."""
    backend = get_backend("cpu")
    if not hasattr(backend, "pool"):
        pytest.skip("the pool belongs to the compiled backend")
    y, live = eg.ones(1 << 18, requires_grad=True), []
    for _ in range(20):
        y = y.exp() * 0.0
        y.register_hook(lambda g: live.append(backend.pool.figures().live))
    y.sum().backward()
    assert len(live) == 20
    assert live[-1] < live[0] - 12 * (1 << 20)


def test_dropping_a_long_graph_without_backward_does_not_recurse() -> None:
    x, one = eg.ones(1, requires_grad=True), eg.ones(1)
    y = x
    for _ in range(30_000):
        y = y + one
    del y
    gc.collect()
    assert x.grad is None


def block(x: eg.Tensor, w: eg.Tensor) -> eg.Tensor:
    return eg.dropout(eg.gelu(eg.linear(x, w)).softmax(), 0.3) * x


@pytest.mark.parametrize("create_graph", [False, True])
def test_checkpoint_gives_the_same_bits_to_second_order(create_graph: bool) -> None:
    rng = np.random.default_rng(0)
    data, weight = rng.uniform(-1, 1, (5, 4)).astype(np.float32), rng.uniform(-1, 1, (4, 4)).astype(np.float32)

    def run(checkpointed: bool) -> list[np.ndarray]:
        x, w = eg.tensor(data, requires_grad=True), eg.tensor(weight, requires_grad=True)
        with eg.seed(7):
            y = x
            for _ in range(3):
                y = eg.checkpoint(block, y, w) if checkpointed else block(y, w)
            draws = eg.rand(3)  # the generator goes on as if nothing had been computed twice
        grads = eg.grad(y.sum(), [x, w], create_graph=create_graph)
        if create_graph:
            grads = (*grads, *eg.grad((grads[0] * grads[0]).sum(), [x, w]))
        return [t.numpy() for t in (y, draws, *grads)]

    for a, b in zip(run(False), run(True)):
        assert np.array_equal(a, b)


def test_checkpoint_notices_a_function_that_does_something_else_the_second_time() -> None:
    calls: list[int] = []

    def fickle(a: eg.Tensor) -> eg.Tensor:
        calls.append(1)
        return a.exp() if len(calls) == 1 else a.exp().exp()

    z = eg.checkpoint(fickle, leaf(1.0, 2.0))
    check_errors(lambda: z.sum().backward(), RuntimeError, "checkpoint", "1 arrays", "2 the second")
