"""The tape and the walk: order, memory, errors, in-place writes, hooks, checkpoints, transforms."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import engine as eg
from engine import autograd
from engine.backend import get_backend


def leaf(*values: float) -> eg.Tensor:
    return eg.tensor(list(values), dtype="float64", requires_grad=True)


# ── gradients ─────────────────────────────────────────────────────────────────────────────────────────

def test_a_diamond_is_summed_and_each_node_runs_once() -> None:
    x = leaf(0.3, -0.7)
    y = eg.exp(x)
    calls: list[int] = []
    y.register_hook(lambda g: calls.append(1))
    z = y * y + y
    z.backward(eg.tensor([1.0, 2.0], dtype="float64"))
    e = np.exp(x.numpy())
    np.testing.assert_allclose(x.grad.numpy(), np.array([1.0, 2.0]) * (2 * e + 1) * e, rtol=4e-16)
    assert calls == [1]


def test_gradients_accumulate_over_calls() -> None:
    x = leaf(2.0)
    for expected in (4.0, 8.0, 12.0):
        (x * x).sum().backward()
        assert x.grad.item() == expected


def test_broadcast_gradients_are_summed_back_to_every_shape() -> None:
    g = np.arange(24.0).reshape(2, 3, 4) + 1
    for shape in ((), (1,), (4,), (3, 1), (1, 4), (2, 1, 1), (1, 3, 4), (2, 3, 4)):
        x = eg.ones(*shape, dtype="float64", requires_grad=True)
        (x + eg.zeros(2, 3, 4, dtype="float64")).backward(eg.tensor(g))
        padded = (1,) * (3 - len(shape)) + shape
        axes = tuple(i for i in range(3) if padded[i] == 1)
        np.testing.assert_array_equal(x.grad.numpy(), g.sum(axes, keepdims=True).reshape(shape))


def test_no_two_gradients_share_memory() -> None:
    a, b, c = leaf(1.0, 2.0), leaf(3.0, 4.0), leaf(5.0, 6.0)
    g = eg.tensor([1.0, 1.0], dtype="float64")
    (a + b + c.reshape(2, 1).reshape(2)).backward(g)
    grads = [t.grad.numpy() for t in (a, b, c)] + [g.numpy()]
    for i, one in enumerate(grads):
        for other in grads[i + 1:]:
            assert not np.shares_memory(one, other)
    given = eg.grad(a + b, [a, b], g)
    assert not np.shares_memory(given[0].numpy(), given[1].numpy())


def test_a_gradient_that_is_copied_keeps_its_bits() -> None:
    a, b = leaf(-0.0), leaf(-0.0)
    (a + b).backward(eg.tensor([-0.0], dtype="float64"))
    assert np.signbit(a.grad.numpy()).all() and np.signbit(b.grad.numpy()).all()


def test_a_chain_of_100_000_nodes_neither_recurses_nor_stays() -> None:
    gc.collect()
    pool = get_backend("cpu").pool
    before = pool.figures().blocks_live
    x = eg.ones(3, requires_grad=True)
    y = x
    for _ in range(100_000):
        y = y * 1.0
    tape = pool.figures().blocks_live - before
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), np.ones(3))
    del y
    assert pool.figures().blocks_live - before <= 3, f"{tape} blocks were live before backward"


def test_the_tape_goes_without_a_garbage_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        x = eg.ones(4, requires_grad=True)
        y = eg.tanh(x)  # its rule keeps its own output
        node = weakref.ref(y.node)
        z = (y * y).sum()
        del y
        assert node() is not None
        del z
        assert node() is None
    finally:
        gc.enable()


def test_backward_frees_what_nodes_saved() -> None:
    x = eg.ones(1000, requires_grad=True)
    y = eg.exp(eg.exp(x))
    z = y.sum()
    inner = y.node.edges[0]
    z.backward()
    assert inner.saved is None and y.node.saved is None


def test_bits_do_not_depend_on_when_the_graph_was_walked() -> None:
    rng = np.random.default_rng(0)
    x = eg.tensor(rng.standard_normal(50).astype("float32"), requires_grad=True)

    def total() -> eg.Tensor:
        parts = [x * float(i) * 0.37 for i in range(1, 9)]
        y = parts[0]
        for part in parts[1:]:
            y = y + eg.sin(part)
        return (y * y).sum()

    first = eg.grad(total(), x).numpy()
    for _ in range(3):
        np.testing.assert_array_equal(eg.grad(total(), x).numpy(), first)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────

def test_a_second_backward_says_that_the_graph_is_gone() -> None:
    x = leaf(1.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="freed; pass retain_graph=True"):
        y.backward()
    z = (x * x).sum()
    z.backward(retain_graph=True)
    z.backward()


def test_backward_needs_one_element_or_a_gradient_of_the_right_shape() -> None:
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match=r"output 0 has shape \(2,\)"):
        (x * x).backward()
    with pytest.raises(ValueError, match=r"gradient of output 0 has shape \(3,\), expected \(2,\)"):
        (x * x).backward(eg.ones(3, dtype="float64"))
    with pytest.raises(RuntimeError, match="does not require grad"):
        eg.ones(1).backward()


def test_grad_names_an_input_that_is_not_used() -> None:
    x, y = leaf(1.0), leaf(2.0)
    with pytest.raises(RuntimeError, match="do not depend on input 1"):
        eg.grad((x * x).sum(), [x, y])
    a, b = eg.grad((x * x).sum(), [x, y], allow_unused=True)
    assert a.item() == 2.0 and b is None and x.grad is None


def test_only_floating_leaves_require_grad() -> None:
    with pytest.raises(TypeError, match="dtype int64, expected a floating"):
        eg.tensor([1, 2], requires_grad=True)
    with pytest.raises(RuntimeError, match="only a leaf"):
        (leaf(1.0) * 2).requires_grad_(False)


# ── grad mode and hooks ───────────────────────────────────────────────────────────────────────────────

def test_no_grad_records_nothing_and_nests() -> None:
    x = leaf(1.0)
    with eg.no_grad():
        assert not (x * 2).requires_grad
        with eg.enable_grad():
            assert (x * 2).requires_grad
        assert not eg.is_grad_enabled()
    assert (x * 2).requires_grad

    @eg.no_grad()
    def f(t: eg.Tensor) -> eg.Tensor:
        return t * 2

    assert not f(x).requires_grad
    with pytest.raises(ZeroDivisionError), eg.no_grad():
        raise ZeroDivisionError
    assert eg.is_grad_enabled()


def test_hooks_see_the_whole_gradient_may_replace_it_and_can_be_removed() -> None:
    x = leaf(3.0)
    y = x * 2
    remove = y.register_hook(lambda g: g * 10)
    (y + y).sum().backward(retain_graph=True)
    assert x.grad.item() == 40.0  # the hook saw 2, not 1 twice
    remove()
    x.grad = None
    (y + y).sum().backward()
    assert x.grad.item() == 4.0
    seen: list[float] = []
    x.register_hook(lambda g: seen.append(g.item()))
    (x * 5).sum().backward()
    assert seen == [5.0]


def test_retain_grad_keeps_an_intermediate_gradient_and_no_cycle() -> None:
    x = leaf(1.0, 2.0)
    y = x * 3
    y.retain_grad()
    (y * y).sum().backward()
    np.testing.assert_array_equal(y.grad.numpy(), 2 * y.numpy())
    gone = weakref.ref(y)
    del y
    assert gone() is None


# ── in place ──────────────────────────────────────────────────────────────────────────────────────────

def test_writing_over_what_backward_needs_is_caught_with_both_versions() -> None:
    x = leaf(1.0, 2.0)
    w = eg.tensor([3.0, 4.0], dtype="float64")
    y = x * w
    w += 1.0
    with pytest.raises(RuntimeError, match=r"multiply: its b was modified in place .* \(version 1, saved at 0\)"):
        y.sum().backward()


def test_a_view_shares_the_version_of_its_base() -> None:
    x, w = leaf(1.0, 2.0), eg.tensor([[3.0, 4.0]], dtype="float64")
    y = x * w[0]
    w[0, 1] = 9.0
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


def test_an_optimizer_like_write_between_forward_and_backward_is_caught() -> None:
    w = leaf(1.0, 2.0)
    loss = (w * w).sum()
    with eg.no_grad():
        w -= 0.1
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_in_place_inside_a_graph_rebinds_and_is_differentiated() -> None:
    x = leaf(1.0, 2.0)
    y = eg.exp(x)
    kept = y.node
    y *= 3.0
    y[0] = 7.0
    assert y.node is not kept and y.numpy()[0] == 7.0
    y.sum().backward()  # exp's saved output was not touched
    np.testing.assert_allclose(x.grad.numpy(), [0.0, 3 * np.exp(2.0)], rtol=2e-16)


def test_in_place_where_it_would_go_unseen_raises() -> None:
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match="a leaf that requires grad"):
        x += 1.0
    y = x * 2
    view = y[:1]
    with pytest.raises(RuntimeError, match="shares its memory with a view"):
        y += 1.0
    with pytest.raises(RuntimeError, match="shares its memory with a view"):
        view += 1.0
    with pytest.raises(ValueError, match=r"result has shape \(3, 2\), which does not fit"):
        z = eg.ones(2)
        z += eg.ones(3, 2)


def test_in_place_outside_a_graph_writes_to_shared_memory() -> None:
    x = eg.zeros(2, 3)
    row = x[1]
    row += 5.0
    x[0, 1:] = eg.tensor([1.0, 2.0])
    np.testing.assert_array_equal(x.numpy(), [[0, 1, 2], [5, 5, 5]])
    with pytest.raises(ValueError, match="read-only"):
        eg.ones(1).broadcast_to((4,))[...] = 2.0


# ── checkpoint ────────────────────────────────────────────────────────────────────────────────────────

def test_checkpoint_has_the_same_bits_with_dropout_inside_and_keeps_nothing() -> None:
    w = eg.randn(8, 8, generator=eg.Generator(1), requires_grad=True)
    x = eg.randn(4, 8, generator=eg.Generator(2), requires_grad=True)

    def f(t: eg.Tensor) -> eg.Tensor:
        for _ in range(3):
            t = eg.dropout(eg.gelu(eg.linear(t, w)), 0.3)
        return t

    def gradients(run) -> list[np.ndarray]:
        with eg.seed(5):
            y = run(f, x) if run is eg.checkpoint else f(x)
            after = eg.rand(2)  # the cursor stands at the same place afterwards
            total = (y * y).sum() + after.sum()
        return [y.numpy().copy(), after.numpy(), *(g.numpy() for g in eg.grad(total, [x, w]))]

    for plain, again in zip(gradients(None), gradients(eg.checkpoint)):
        np.testing.assert_array_equal(plain, again)

    pool = get_backend("cpu").pool
    big = eg.ones(256, 256, requires_grad=True)

    def deep(t: eg.Tensor) -> eg.Tensor:
        for _ in range(20):
            t = eg.tanh(t)
        return t

    start = pool.figures().live
    kept = deep(big)
    plain_bytes = pool.figures().live - start
    del kept
    kept = eg.checkpoint(deep, big)
    assert pool.figures().live - start <= plain_bytes / 8
    kept.sum().backward()


def test_a_checkpoint_computes_again_from_what_it_was_given() -> None:
    """Although its argument is bound to other elements by then: y += 1 inside a graph is a new node."""
    x = leaf(1.0, 2.0)
    y = x * 2.0
    z = eg.checkpoint(lambda t, scale: t * t * scale, y, scale=y)
    y += 10.0
    z.sum().backward()
    assert np.array_equal(x.grad.numpy(), 24.0 * x.numpy() ** 2)


def test_checkpoints_nest_and_refuse_changed_inputs() -> None:
    x = leaf(0.5)
    nested = eg.checkpoint(lambda t: eg.checkpoint(lambda u: eg.exp(u) * u, t) * t, x)
    plain = leaf(0.5)
    (eg.exp(plain) * plain * plain).sum().backward()
    nested.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), plain.grad.numpy())
    w = eg.ones(1, dtype="float64")
    y = eg.checkpoint(lambda t, v: eg.exp(t) * v, leaf(1.0), w)
    w += 1.0
    with pytest.raises(RuntimeError, match="checkpoint: its input 1 was modified"):
        y.sum().backward()


def test_a_checkpoint_refuses_a_weight_that_changed_and_bears_what_f_changes() -> None:
    w = leaf(2.0)
    y = eg.checkpoint(lambda t: t * w, leaf(1.0))
    with eg.no_grad():
        w *= 3.0
    with pytest.raises(RuntimeError, match=r"an array of shape \(.*\) that f closes over was modified in place"):
        y.sum().backward()

    def f(t: eg.Tensor) -> eg.Tensor:
        z = eg.exp(t)
        z += t
        return z * z * w

    x, plain = leaf(0.5), leaf(0.5)
    for run, at in ((eg.checkpoint, x), (lambda g, t: g(t), plain)):
        w.grad = None
        run(f, at).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), plain.grad.numpy())


# ── transforms and higher orders ──────────────────────────────────────────────────────────────────────

def test_vjp_and_jvp_of_a_known_jacobian() -> None:
    a = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    x, v, u = np.array([0.1, 0.2, 0.3]), np.array([1.0, -1.0, 2.0]), np.array([3.0, -2.0])

    def f(t: eg.Tensor) -> eg.Tensor:
        return eg.sin(eg.matmul(eg.tensor(a), t))

    jacobian = np.cos(a @ x)[:, None] * a
    out, pull = eg.vjp(f, eg.tensor(x))
    np.testing.assert_allclose(pull(eg.tensor(u))[0].numpy(), u @ jacobian, rtol=1e-14)
    np.testing.assert_allclose(pull(eg.tensor(2 * u))[0].numpy(), 2 * u @ jacobian, rtol=1e-14)  # again
    value, tangent = eg.jvp(f, [eg.tensor(x)], [eg.tensor(v)])
    np.testing.assert_allclose(tangent.numpy(), jacobian @ v, rtol=1e-14)
    np.testing.assert_array_equal(value.numpy(), out.numpy())


def test_jvp_of_what_does_not_depend_on_its_input_is_zero() -> None:
    _, tangent = eg.jvp(lambda t: eg.ones(3, dtype="float64"), [leaf(1.0)], [leaf(1.0)])
    np.testing.assert_array_equal(tangent.numpy(), np.zeros(3))
    _, linear = eg.jvp(lambda t: t * 3.0, [leaf(1.0)], [eg.tensor([2.0], dtype="float64")])
    assert linear.item() == 6.0
    with pytest.raises(ValueError, match="2 primals and 1 tangents"):
        eg.jvp(lambda a, b: a, [leaf(1.0), leaf(1.0)], [leaf(1.0)])


def test_third_derivative() -> None:
    x = leaf(0.7)
    y = eg.exp(x * 2.0).sum()
    for expected in (2, 4, 8):
        y = eg.grad(y, x, create_graph=True).sum()
        np.testing.assert_allclose(y.item(), expected * np.exp(1.4), rtol=1e-14)


def test_a_replayed_composition_stops_at_its_inputs() -> None:
    """Where one input of a fused op is computed from another, its second-order graph must not count that path."""
    x = eg.tensor(np.linspace(-1, 1, 6).reshape(2, 3), requires_grad=True)
    y = eg.layer_norm(x, x[0] * 2.0, x[1])
    (first,) = eg.grad(y.square().sum(), [x], create_graph=True)
    (again,) = eg.grad(eg.layer_norm(x, x[0] * 2.0, x[1]).square().sum(), [x])
    np.testing.assert_allclose(first.numpy(), again.numpy(), rtol=1e-12, atol=1e-14)


def test_watchers_are_told_of_nodes_in_order() -> None:
    seen: list[tuple[str, str]] = []

    def watch(node: autograd.Node, event: str) -> None:
        seen.append((node.op.name, event))

    autograd.watchers.append(watch)
    try:
        (eg.exp(leaf(1.0)) * 2.0).sum().backward()
    finally:
        autograd.watchers.remove(watch)
    made = [name for name, event in seen if event == "made"]
    walked = [name for name, event in seen if event == "backward"]
    assert made[:3] == ["exp", "multiply", "sum"] and walked == ["sum", "multiply", "exp"]


def test_each_leaf_is_told_once_when_its_gradient_is_final() -> None:
    x, y = leaf(2.0), leaf(3.0)
    told: list[tuple[eg.Tensor, float]] = []
    autograd.backward([(eg.exp(x * y) * x).sum()], [None], completed=lambda t: told.append((t, t.grad.item())))
    assert len(told) == 2 and {id(t) for t, _ in told} == {id(x), id(y)}
    assert all(t.grad is not None and t.grad.item() == seen for t, seen in told)
