"""Optimizers against their papers' formulas in NumPy, the rules' promises to the bit, clipping."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine import optim
from engine.backend import get_backend
from engine.optim.clip import BLOCK, norm_of_blocks, sums_of_squares
from engine.testing.traces import adagrad, adam, adamw, rmsprop, sgd

DEVICES = ["cpu", "reference"]


# ── the rules ─────────────────────────────────────────────────────────────────────────────────────────

rates, decays, betas = st.floats(1e-4, 1), st.sampled_from([0.0, 0.1]), st.floats(0, 0.999)
eps = st.floats(1e-8, 1e-2)
FORMULAS: dict[str, Any] = {
    "sgd": (sgd, optim.SGDRule, {"momentum": st.sampled_from([0.0, 0.9]), "dampening": st.sampled_from([0.0, 0.3]),
                                 "nesterov": st.just(False)}),
    "nesterov": (sgd, optim.SGDRule, {"momentum": st.floats(0.1, 0.99), "dampening": st.just(0.0),
                                      "nesterov": st.just(True)}),
    "adam": (adam, optim.AdamRule, {"beta1": betas, "beta2": betas, "eps": eps}),
    "adamw": (adamw, optim.AdamWRule, {"beta1": betas, "beta2": betas, "eps": eps}),
    "adagrad": (adagrad, optim.AdagradRule, {"lr_decay": st.sampled_from([0.0, 0.1]), "eps": eps}),
    "rmsprop": (rmsprop, optim.RMSpropRule, {"alpha": betas, "eps": eps, "momentum": st.sampled_from([0.0, 0.9])}),
}
RULES = [optim.SGDRule(), optim.SGDRule(momentum=0.9), optim.AdamRule(), optim.AdamWRule(weight_decay=0.1),
         optim.AdagradRule(), optim.RMSpropRule(), optim.RMSpropRule(momentum=0.9)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(FORMULAS))
@given(data=st.data())
def test_rules_are_the_papers_formulas(device: str, name: str, data: st.DataObject) -> None:
    """Four steps in float64; each is some 20 roundings of 1.1e-16 relative to terms of at most 1e4 (with ε = 1e-8
    and a denominator near it, an update can be as large as lr · g/ε, but not with g of size 1: √v ≥ |g| √(1 − β₂))."""
    formula, rule, strategies = FORMULAS[name]
    hyper = {key: data.draw(value, key) for key, value in {"lr": rates, "weight_decay": decays, **strategies}.items()}
    k, random = get_backend(device), np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    expected = random.standard_normal(7)
    p, known = k.array(expected), {}
    state = rule(**hyper).init(k, 7, eg.float64)
    for t in range(1, 5):
        g = np.where(random.random(7) < 0.2, 0.0, random.standard_normal(7))
        expected = formula(expected, g, known, t, **hyper)
        rule().apply(k, p, state, p, state, k.array(g), t, **hyper)
        np.testing.assert_allclose(p.data, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{len(rule.slots)}")
@given(cut=st.integers(0, 1000), seed=st.integers(0, 99))
def test_an_elements_update_does_not_depend_on_its_neighbours(rule: optim.Rule, cut: int, seed: int) -> None:
    """The bits of a whole update are those of its two parts, wherever it is cut: so shards may own any range."""
    k, random = get_backend("cpu"), np.random.default_rng(seed)
    p, g = (random.standard_normal(1000).astype(np.float32) for _ in range(2))

    def updated(begin: int, end: int) -> bytes:
        part, state = k.array(p[begin:end]), rule.init(k, end - begin, eg.float32)
        for t in (1, 2):
            rule.apply(k, part, state, part, state, k.array(g[begin:end]), t)
        return part.data.tobytes() + b"".join(state[slot].data.tobytes() for slot in rule.slots)

    whole, left, right = updated(0, 1000), updated(0, cut), updated(cut, 1000)
    sizes = 4 * cut, 4 * (1000 - cut)
    joined = b"".join(left[i * sizes[0]:(i + 1) * sizes[0]] + right[i * sizes[1]:(i + 1) * sizes[1]]
                      for i in range(1 + len(rule.slots)))
    assert whole == joined


@pytest.mark.parametrize("dtype", [eg.float32, eg.float64])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{len(rule.slots)}")
@given(divisor=st.integers(1, 10**6), scale=st.floats(1e-6, 1.0), seed=st.integers(0, 99))
def test_a_rule_divides_and_scales_as_passes_of_their_own_would(rule: optim.Rule, dtype: eg.DType, divisor: int,
                                                                scale: float, seed: int) -> None:
    k, random = get_backend("cpu"), np.random.default_rng(seed)
    p, g = (random.standard_normal(37).astype(dtype.numpy) for _ in range(2))
    passes = k.map("multiply", k.map("divide", k.array(g), k.constant(divisor, dtype)), k.constant(scale, dtype))

    def updated(gradient: Any, *how: float) -> bytes:
        new, state = k.array(p), rule.init(k, 37, dtype)
        for t in (1, 2):
            rule.apply(k, new, state, new, state, gradient, t, *how)
        return new.data.tobytes() + b"".join(state[slot].data.tobytes() for slot in rule.slots)

    assert updated(k.array(g), divisor, scale) == updated(passes)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{len(rule.slots)}")
def test_out_of_place_leaves_the_old_alone(rule: optim.Rule) -> None:
    k, data = get_backend("cpu"), np.linspace(-1, 1, 37, dtype=np.float32)
    p, g, new = k.array(data), k.array(data[::-1]), k.zeros((37,), eg.float32)
    state, new_state = rule.init(k, 37, eg.float32), rule.init(k, 37, eg.float32)
    rule.apply(k, new, new_state, p, state, g, 1)
    assert np.array_equal(p.data, data) and not any(s.data.any() for s in state.values())
    rule.apply(k, p, state, p, state, g, 1)
    assert p.data.tobytes() == new.data.tobytes()
    assert all(state[slot].data.tobytes() == new_state[slot].data.tobytes() for slot in rule.slots)


@pytest.mark.parametrize("make, message", [
    (lambda: optim.SGDRule(lr=-1.0), r"SGDRule: lr is -1.0, expected a number in \[0, inf\)"),
    (lambda: optim.AdamRule(beta2=1.0), r"AdamRule: beta2 is 1.0, expected a number in \[0, 1.0\)"),
    (lambda: optim.AdamRule(eps=math.nan), "AdamRule: eps is nan"),
    (lambda: optim.RMSpropRule(alpha=-0.1), "RMSpropRule: alpha is -0.1"),
    (lambda: optim.SGDRule(nesterov=True), "nesterov with momentum 0.0"),
    (lambda: optim.SGDRule(nesterov=True, momentum=0.9, dampening=0.1), "no dampening"),
    (lambda: optim.AdamRule().with_(betas=1), "got a hyper-parameter 'betas', expected lr, weight_decay, beta1"),
])
def test_hyper_parameters_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ── optimizers ────────────────────────────────────────────────────────────────────────────────────────

OPTIMIZERS = [lambda p: optim.SGD(p, lr=0.1), lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
              lambda p: optim.Adam(p, lr=0.1), lambda p: optim.AdamW(p, lr=0.1, betas=(0.8, 0.9)),
              lambda p: optim.Adagrad(p, lr=0.5), lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5)]


def train(optimizer: optim.Optimizer, parameters: list[eg.Tensor], steps: int) -> float:
    """Steps towards the minimum of Σ (p − 1)²."""
    for _ in range(steps):
        loss = sum(((p - 1.0) ** 2).sum() for p in parameters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def weights(*shapes: Any, dtype: Any = eg.float32) -> list[eg.Tensor]:
    with eg.seed(0):
        return [eg.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_every_optimizer_goes_to_the_minimum(make: Any) -> None:
    parameters = weights((3, 2), ())
    start = train(make(parameters), parameters, 1)
    assert train(make(parameters), parameters, 50) < 0.1 * start


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_to_the_same_bits(make: Any) -> None:
    parameters = weights((3, 2), (4,))
    optimizer = make(parameters)
    train(optimizer, parameters, 3)
    saved, values = optimizer.state_dict(), [p.numpy().copy() for p in parameters]
    train(optimizer, parameters, 3)
    copies = [eg.tensor(value, requires_grad=True) for value in values]
    resumed = make(copies)
    resumed.load_state_dict(saved)
    train(resumed, copies, 3)
    for p, copy in zip(parameters, copies):
        assert np.array_equal(p.numpy(), copy.numpy())


def test_state_dict_is_plain_data_numbered_by_parameter() -> None:
    a, b, c = weights((2,), (3,), (1,))
    optimizer = optim.Adam([{"params": [a, b]}, {"params": c, "lr": 0.5}])
    a.grad, c.grad = eg.ones(2), eg.ones(1)
    optimizer.step()
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2]]
    assert [group["lr"] for group in state["param_groups"]] == [1e-3, 0.5]
    assert list(state["state"]) == [0, 2]  # b had no gradient
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"} and state["state"][0]["step"] == 1
    before = state["state"][0]["exp_avg"].copy()
    optimizer.step()
    assert np.array_equal(state["state"][0]["exp_avg"], before)  # a copy


def test_groups_have_hyper_parameters_of_their_own() -> None:
    a, b, c = weights((1,), (1,), (1,))
    optimizer = optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.25)
    optimizer.add_param_group({"params": c, "weight_decay": 1.0})
    old = [p.item() for p in (a, b, c)]
    for p in (a, b, c):
        p.grad = eg.ones(1)
    optimizer.step()
    expected = [old[0] - 0.5, old[1] - 0.25, old[2] - 0.25 * (1 + old[2])]
    assert [p.item() for p in (a, b, c)] == pytest.approx(expected, rel=1e-6)
    assert optim.Adam([{"params": [a], "betas": (0.1, 0.2)}]).param_groups[0]["beta2"] == 0.2
    assert repr(optim.SGD([a], lr=0.5)).startswith("SGD(params=1, lr=0.5")


def test_momentum_may_be_switched_on_later() -> None:
    (p,) = weights((2,))
    optimizer = optim.SGD([p], lr=0.1)
    train(optimizer, [p], 1)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, [p], 2)
    assert "momentum_buffer" in optimizer.state_dict()["state"][0]


def test_a_parameter_without_gradient_is_passed_over() -> None:
    a, b = weights((2,), (2,))
    before = b.numpy().copy()
    a.grad = eg.ones(2)
    optimizer = optim.AdamW([a, b])
    optimizer.step()
    assert np.array_equal(b.numpy(), before)
    b.grad = eg.ones(2)
    optimizer.step()
    assert [optimizer.state_dict()["state"][i]["step"] for i in (0, 1)] == [2, 1]


def test_a_step_is_seen_by_a_tape_that_saved_the_old_weights() -> None:
    (p,) = weights((3,))
    loss = (p * p).sum()
    p.grad = eg.ones(3)
    optim.SGD([p]).step()
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_a_parameter_may_be_a_transposed_view() -> None:
    base = eg.tensor(np.arange(6.0, dtype=np.float32).reshape(2, 3))
    p = base.T.detach().requires_grad_()
    p.grad = eg.ones(3, 2)
    optim.SGD([p], lr=1.0).step()
    assert np.array_equal(base.numpy(), np.arange(6.0).reshape(2, 3) - 1)


@pytest.mark.parametrize("make, error, message", [
    (lambda p: optim.SGD([]), ValueError, "SGD: got no parameters"),
    (lambda p: optim.SGD(p), TypeError, "SGD: params is Tensor, expected a list"),
    (lambda p: optim.SGD(eg.nn.Linear(2, 2)), TypeError, "SGD: params is Linear, expected a list"),
    (lambda p: optim.SGD([{"weights": [p]}]), ValueError, "a group has 'weights', expected 'params' and"),
    (lambda p: optim.Adam([p], betas=(0.9,)), ValueError, r"Adam: betas is \(0.9,\), expected two numbers"),
    (lambda p: optim.AdamW([p], betas=0.9), ValueError, "AdamW: betas is 0.9, expected two numbers"),
    (lambda p: optim.Adam([{"params": [p], "betas": "0.9"}]), ValueError, "Adam: betas is '0.9', expected two"),
    (lambda p: optim.Adam([p], lr="0.1"), ValueError, "AdamRule: lr is '0.1', expected a number"),
    (lambda p: optim.Adam([p], lr=True), ValueError, "AdamRule: lr is True, expected a number"),
    (lambda p: optim.SGD([p], momentum=0.9, nesterov=1), ValueError, "nesterov is 1, expected True or False"),
    (lambda p: optim.Adam([p, p]), ValueError, r"Adam: parameter 1 of shape \(2,\) is given more than once"),
    (lambda p: optim.Adam([p * 2]), ValueError, "parameter 0 .* was made by multiply, expected a leaf"),
    (lambda p: optim.Adam([eg.ones(2)]), ValueError, "does not require grad, expected a leaf"),
    (lambda p: optim.Adam([1.0]), TypeError, "Adam: parameter 0 is float, expected a tensor"),
    (lambda p: optim.Adam([p], lr=-1), ValueError, "AdamRule: lr is -1"),
    (lambda p: optim.Adam([{"params": [p], "momentum": 1}]), ValueError, "got a hyper-parameter 'momentum'"),
])
def test_what_cannot_be_optimized(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(weights((2,))[0])


def test_a_step_that_does_not_fit_says_so() -> None:
    (p,) = weights((2,))
    optimizer = optim.Adam([p])
    p.grad = eg.ones(3)
    with pytest.raises(ValueError, match=r"Adam.step: the gradient is float32 \(3,\) on cpu, expected float32 \(2,\)"):
        optimizer.step()
    p.grad = eg.ones(2)
    optimizer.step()
    converted = p.to("float64")
    p.array, p.grad = converted.array, eg.ones(2, dtype=eg.float64)
    with pytest.raises(ValueError, match=r"exp_avg of a parameter is float32 .*; make the optimizer after .to\(\)"):
        optimizer.step()
    (q,) = weights((2,))
    q.grad, q.array.data.flags.writeable = eg.ones(2), False
    with pytest.raises(ValueError, match="read-only; if it belongs to a parameter server, that updates it"):
        optim.SGD([q]).step()
    optimizer.param_groups[0]["lr"] = -1
    with pytest.raises(ValueError, match="AdamRule: lr is -1"):
        optimizer.step()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    a, b = weights((2,), (3,))
    optimizer, other = optim.Adam([a]), optim.Adam([a, b])
    with pytest.raises(ValueError, match=r"the saved groups have \[2\] parameters, expected \[1\]"):
        optimizer.load_state_dict(other.state_dict())
    b.grad = eg.ones(3)
    third = optim.Adam([b], lr=0.5)
    third.step()
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(3,\), expected \(2,\)"):
        optimizer.load_state_dict(third.state_dict())
    fitting = optim.Adam([a])
    a.grad = eg.ones(2)
    fitting.step()
    saved = fitting.state_dict()
    entry = saved["state"][0]
    for wrong, message in [
        (eg.nn.Linear(1, 1).state_dict(), "got 'weight', 'bias', expected 'state' and 'param_groups'"),
        ({**saved, "param_groups": [{"lr": 1.0}]}, "each with its 'params'"),
        ({**saved, "state": {"0": entry}}, "there is a state of '0', which is no parameter"),  # as JSON has it
        ({**saved, "state": {0: {k: v for k, v in entry.items() if k != "step"}}}, r"parameter 0 has .*, expected \['"),
        ({**saved, "state": {0: {k: v for k, v in entry.items() if k != "exp_avg_sq"}}}, "parameter 0 has"),
        ({**saved, "state": {0: {**entry, "momentum_buffer": entry["exp_avg"]}}}, "parameter 0 has .*'momentum_buf"),
    ]:
        with pytest.raises(ValueError, match="Adam.load_state_dict: .*" + message):
            optimizer.load_state_dict(wrong)
    assert optimizer.state_dict() == {"state": {}, "param_groups": [{**third.param_groups[0], "params": [0],
                                                                     "lr": 1e-3}]}


def test_momentum_may_come_and_go_between_steps() -> None:
    (p,) = weights((2,))
    for first, then in ((0.0, 0.9), (0.9, 0.0)):
        optimizer, other = optim.SGD([p], momentum=first), optim.SGD([p])
        p.grad = eg.ones(2)
        optimizer.step()
        optimizer.param_groups[0]["momentum"] = then
        other.load_state_dict(optimizer.state_dict())
        assert other.state_dict()["state"][0].keys() == optimizer.state_dict()["state"][0].keys()


# ── clipping ──────────────────────────────────────────────────────────────────────────────────────────

def with_gradients(*gradients: np.ndarray) -> list[eg.Tensor]:
    parameters = [eg.zeros(*g.shape, dtype=str(g.dtype), requires_grad=True) for g in gradients]
    for p, g in zip(parameters, gradients):
        p.grad = eg.tensor(g)
    return parameters


@given(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=4), st.floats(0.01, 1000), st.integers(0, 99))
def test_the_global_norm_is_clipped(sizes: list[int], most: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    gradients = [random.standard_normal(n).astype(np.float32) for n in sizes]
    parameters = with_gradients(*gradients)
    norm = optim.clip_grad_norm_(parameters, most)
    exact = math.sqrt(math.fsum(float(x) ** 2 for g in gradients for x in g))
    assert norm == pytest.approx(exact, rel=1e-13)  # double sums of at most 4·12288 squares
    clipped = np.concatenate([p.grad.numpy() for p in parameters]).astype(np.float64)
    if norm < most:
        assert all(np.array_equal(p.grad.numpy(), g) for p, g in zip(parameters, gradients))
    else:
        scale = most / (norm + 1e-6)
        np.testing.assert_allclose(clipped, np.concatenate(gradients) * scale, rtol=2**-22)  # two roundings of 2⁻²⁴


@given(st.lists(st.integers(1, 2 * BLOCK), min_size=1, max_size=5))
def test_the_norm_does_not_depend_on_who_owns_which_blocks(sizes: list[int]) -> None:
    """Cut between all blocks, as shards may be, the norm has the bits that clip_grad_norm_ has of whole parameters."""
    k, random = get_backend("cpu"), np.random.default_rng(0)
    gradients = [random.standard_normal(n).astype(np.float32) for n in sizes]
    pieces = [g[i:i + BLOCK] for g in gradients for i in range(0, g.size, BLOCK)]
    squares = np.concatenate([sums_of_squares(k, k.array(piece)).data for piece in pieces])
    assert norm_of_blocks(k, squares) == optim.clip_grad_norm_(with_gradients(*gradients), 1e9)


@given(size=st.integers(1, 3 * BLOCK), divisor=st.integers(1, 10**6))
def test_the_norm_of_a_mean_is_that_of_the_divided_gradients(size: int, divisor: int) -> None:
    k = get_backend("cpu")
    g = k.array(np.random.default_rng(size).standard_normal(size).astype(np.float32))
    mean = k.map("divide", g, k.constant(divisor, g.dtype))
    assert sums_of_squares(k, g, divisor).data.tobytes() == sums_of_squares(k, mean).data.tobytes()


@pytest.mark.parametrize("most", [0.5, 1e9, 1e-3])
def test_a_step_that_clips_has_the_bits_of_clipping_before_it(most: float) -> None:
    """For dense gradients, row-sparse ones and a parameter without any."""
    def stepped(clip: Any) -> tuple[list[np.ndarray], float]:
        parameters = weights((5, 4), (9, 2), (3,), (2, 2))
        optimizer = optim.AdamW([{"params": parameters[:2], "weight_decay": 0.5}, {"params": parameters[2:]}], lr=0.1)
        for seed in (1, 2):
            random = np.random.default_rng(seed)
            for p in parameters[:3]:
                p.grad = eg.tensor(random.standard_normal(p.shape).astype(np.float32))
            parameters[1].grad = eg.RowSparse([7, 1], eg.tensor(random.standard_normal((2, 2)).astype(np.float32)), 9)
            norm = clip(optimizer, parameters)
        return [p.numpy() for p in parameters], norm

    def before(optimizer: optim.Optimizer, parameters: list[eg.Tensor]) -> float:
        norm = optim.clip_grad_norm_(parameters, most)
        assert optimizer.step() is None
        return norm

    def within(optimizer: optim.Optimizer, parameters: list[eg.Tensor]) -> float | None:
        saved = [parameters[i].grad.numpy().copy() for i in (0, 2)]
        norm = optimizer.step(clip_norm=most)
        assert all(np.array_equal(parameters[i].grad.numpy(), g) for i, g in zip((0, 2), saved))
        return norm

    (one, norm), (other, same_norm) = stepped(before), stepped(within)
    assert norm == same_norm and all(a.tobytes() == b.tobytes() for a, b in zip(one, other))


def test_a_step_that_is_refused_changes_nothing() -> None:
    first, second = parameters = weights((3,), (4,))
    optimizer = optim.SGD(parameters, lr=0.1, momentum=0.9)
    saved = [p.numpy().copy() for p in parameters]
    first.grad, second.grad = eg.ones(3), eg.ones(5)
    with pytest.raises(ValueError, match=r"SGD\.step: the gradient is float32 \(5,\) on cpu, expected float32 \(4,\)"):
        optimizer.step()
    second.grad = eg.ones(4)
    with pytest.raises(ValueError, match=r"SGD\.step: clip_norm is 0, expected a positive number or None"):
        optimizer.step(clip_norm=0)
    optimizer.add_param_group({"params": weights((2,)), "lr": 0.1})
    optimizer.param_groups[1].update(lr=-1.0)
    with pytest.raises(ValueError, match=r"lr is -1\.0"):
        optimizer.step()
    assert all(np.array_equal(p.numpy(), old) for p, old in zip(parameters, saved)) and not optimizer.state
    optimizer.param_groups[1].update(lr=0.1)
    first.grad = second.grad = None
    assert optimizer.step(clip_norm=1.0) == 0.0


def test_a_norm_that_is_not_finite_is_seen() -> None:
    parameters = with_gradients(np.array([1.0, np.nan], np.float32), np.ones(3, np.float32))
    assert math.isnan(optim.clip_grad_norm_(parameters, 1.0))
    assert np.isnan(parameters[1].grad.numpy()).all()


def test_clipping_passes_over_parameters_without_gradient() -> None:
    (p,) = weights((2,))
    assert optim.clip_grad_norm_([p], 1.0) == 0.0 and p.grad is None
    optim.clip_grad_value_(p, 1.0)
    with pytest.raises(ValueError, match="clip_grad_norm_: max_norm is 0, expected a positive number"):
        optim.clip_grad_norm_([p], 0)
    with pytest.raises(ValueError, match="clip_grad_value_: clip_value is -1"):
        optim.clip_grad_value_([p], -1)


def test_values_are_clipped() -> None:
    (p,) = with_gradients(np.array([-5.0, -0.5, 0.0, 2.0, np.nan, np.inf], np.float32))
    optim.clip_grad_value_([p], 1.5)
    np.testing.assert_array_equal(p.grad.numpy(), [-1.5, -0.5, 0.0, 1.5, np.nan, 1.5])


# ── accumulation ──────────────────────────────────────────────────────────────────────────────────────

def test_microbatches_accumulate_to_the_gradient_of_the_whole_batch() -> None:
    """The mean over all tokens, not the mean of the microbatches' means. (The tree: tests/sharder.)"""
    (w,) = weights((4,), dtype=eg.float64)
    with eg.seed(1):
        x = eg.randn(10, 4, dtype=eg.float64)
    eg.mean((x @ w) ** 2).backward()
    whole, w.grad = w.grad, None
    accumulator = optim.Accumulator(3)
    for i, rows in enumerate((slice(0, 5), slice(5, 6), slice(6, 10))):
        loss = ((x[rows] @ w) ** 2).sum()
        loss.backward()
        accumulator.add(i, [w.grad], loss.item(), tokens=rows.stop - rows.start)
        w.grad = None
    mean_loss = accumulator.assign([w])
    assert mean_loss == pytest.approx(eg.mean((x @ w) ** 2).item(), rel=1e-14)
    np.testing.assert_allclose(w.grad.numpy(), whole.numpy(), rtol=1e-13)
