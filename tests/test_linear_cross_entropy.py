"""linear_cross_entropy: the bits of the two ops, chunk by chunk, in the memory of a chunk."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as eg
from engine.backend import get_backend, observers

module = importlib.import_module("engine.ops.linear_cross_entropy")  # engine.ops has the op under this name


def operands(rows: int, inputs: int, classes: int, bias: bool, dtype: str, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    x, w, b = (rng.standard_normal(shape) for shape in ((rows, inputs), (classes, inputs), (classes,)))
    target = rng.integers(0, classes, rows)
    target[1::5] = -100
    leaves = [eg.tensor(a, dtype=dtype, requires_grad=True) for a in (x, w, b)]
    return [leaves[0], leaves[1], eg.tensor(target), leaves[2] if bias else None]


def gradients(function: Any, given_: list[Any], **options: Any) -> list[np.ndarray]:
    x, w, target, b = given_
    leaves = [t for t in (x, w, b) if t is not None]
    loss = function(x, w, target, b, **options)
    return [loss.detach().numpy(), *[g.numpy() for g in eg.grad(loss, leaves)]]


def two_ops(x: eg.Tensor, w: eg.Tensor, target: eg.Tensor, b: eg.Tensor | None, **options: Any) -> eg.Tensor:
    return eg.cross_entropy(eg.linear(x, w, b), target, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=25, deadline=None)
@given(rows=st.sampled_from([1, 2, 255, 256, 257, 511, 512, 700, 1025]), inputs=st.integers(1, 40),
       classes=st.integers(1, 50), smoothing=st.sampled_from([0.0, 0.1]), reduction=st.sampled_from(["mean", "sum"]),
       threads=st.sampled_from([1, 2, 3]))
def test_the_bits_of_the_two_ops(dtype: str, rows: int, inputs: int, classes: int, smoothing: float, reduction: str,
                                 threads: int) -> None:
    given_ = operands(rows, inputs, classes, False, dtype, rows + classes)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    want, before = gradients(two_ops, given_, **options), eg.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_ONCE", 0)
        eg.set_num_threads(threads)
        try:
            got = gradients(eg.linear_cross_entropy, given_, **options)
        finally:
            eg.set_num_threads(before)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_the_gradient_of_the_bias_is_the_sum_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = operands(600, 7, 11, True, "float32")
    want = gradients(two_ops, [None if t is None else t.to(dtype="float64") if t.dtype.is_floating else t
                               for t in given_])
    monkeypatch.setattr(module, "AT_ONCE", 0)
    got = gradients(eg.linear_cross_entropy, given_)
    # Σ of 600 terms of at most 1/600, each from a logit of 7 products: n + 64 roundings of numbers below 1
    np.testing.assert_allclose(got[3], want[3], rtol=0, atol=(600 + 64) * 2.0**-24)


def test_nothing_as_large_as_the_logits_is_allocated() -> None:
    rows, inputs, classes = 2048, 8, 5000
    given_ = operands(rows, inputs, classes, True, "float32")
    logits = rows * classes * 4

    def peak(function: Any) -> int:
        pool = get_backend("cpu").pool
        pool.reset_peak()
        before = pool.figures().live
        gradients(function, given_)
        return int(pool.figures().peak - before)

    assert peak(two_ops) > 2 * logits
    assert peak(eg.linear_cross_entropy) < logits / 4


@pytest.mark.parametrize(("needing", "products"), [((0,), 2), ((1,), 2), ((0, 1), 3), ((), 1)])
def test_only_the_gradients_that_somebody_wants_are_computed(needing: tuple[int, ...], products: int) -> None:
    given_ = operands(8, 3, 5, False, "float32")
    given_ = [t.detach().requires_grad_() if i in needing else t.detach() for i, t in enumerate(given_[:3])]
    seen: list[str] = []

    def observe(name: str, _arguments: tuple[object, ...]) -> None:
        seen.append(name)

    observers.append(observe)
    try:
        eg.linear_cross_entropy(*given_)
    finally:
        observers.remove(observe)
    assert seen.count("gemm") == products
    with eg.no_grad():
        observers.append(observe)
        seen.clear()
        eg.linear_cross_entropy(*given_)
        observers.remove(observe)
    assert seen.count("gemm") == 1


def test_backward_twice_and_a_gradient_that_is_not_one() -> None:
    x, w, target, _ = operands(300, 4, 6, False, "float64")
    loss = eg.linear_cross_entropy(x, w, target)
    (3.0 * loss).backward(retain_graph=True)
    once = w.grad.numpy().copy()
    np.testing.assert_array_equal(once, 3.0 * gradients(eg.linear_cross_entropy, [x, w, target, None])[2])
    (3.0 * loss).backward()
    np.testing.assert_array_equal(w.grad.numpy(), 2 * once)


def test_rows_that_do_not_count_and_no_rows_at_all() -> None:
    x, w, *_ = operands(4, 3, 5, False, "float32")
    for given_ in ([x, w, eg.full((4,), -100), None], operands(0, 3, 5, False, "float32")):
        got, want = gradients(eg.linear_cross_entropy, given_), gradients(two_ops, given_)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.isnan(got[0])
