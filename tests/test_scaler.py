"""Loss scaling: what float16 would lose is kept, an overflow costs a step, and else nothing shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import engine as eg
from engine import nn


def test_scaling_saves_gradients_that_float16_loses() -> None:
    """A gradient of 2⁻³⁰ is 0 in float16; times 2¹⁶ it is one of its numbers, and divided again it is exact."""
    w = eg.tensor([[1.0]], requires_grad=True)
    x = eg.tensor([[2.0]])

    def gradient(scaler: Any) -> float:
        w.grad = None
        with eg.autocast("float16"):
            y = eg.matmul(x, w)
        scaler.scale(y.sum() * 2.0**-30).backward()
        scaler.unscale_(optimizer)
        return float(w.grad.numpy()[0, 0])

    optimizer = eg.optim.SGD([w], lr=1.0)
    assert gradient(eg.optim.GradScaler(init_scale=1.0)) == 0
    assert gradient(eg.optim.GradScaler()) == 2.0**-29


def step_with(scaler: Any, optimizer: Any, p: Any, value: float) -> Any:
    p.grad = eg.tensor([value, 1.0]) * scaler.scale_factor
    result = scaler.step(optimizer)
    scaler.update()
    return result


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_an_overflow_costs_a_step_and_nothing_else(bad: float) -> None:
    p = eg.tensor([1.0, 2.0], requires_grad=True)
    optimizer, scaler = eg.optim.Adam([p], lr=0.5), eg.optim.GradScaler(init_scale=8.0, growth_interval=2)
    step_with(scaler, optimizer, p, 1.0)
    before, state = p.numpy().copy(), repr(optimizer.state_dict())
    assert "step" in state
    step_with(scaler, optimizer, p, bad)
    assert p.numpy().tobytes() == before.tobytes() and repr(optimizer.state_dict()) == state
    assert (scaler.scale_factor, scaler.skipped_steps, scaler.good_steps) == (4.0, 1, 0)
    for expected in (4.0, 8.0, 8.0, 16.0):  # twice as large after every second good step
        step_with(scaler, optimizer, p, 1.0)
        assert scaler.scale_factor == expected


def test_scaled_steps_have_the_bits_of_plain_ones() -> None:
    """s is a power of two: nothing is rounded on the way there and back. With clipping too."""
    rng = np.random.default_rng(9)
    x, g = (eg.tensor(rng.standard_normal(shape).astype(np.float32)) for shape in ((12, 8), (12, 3)))
    found = []
    for enabled in (False, True):
        with eg.seed(3):
            model = nn.Linear(8, 3)
        optimizer = eg.optim.AdamW(model.parameters(), lr=0.01)
        scaler = eg.optim.GradScaler(enabled=enabled)
        norms = []
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale((model(x) * g).sum()).backward()
            norms.append(scaler.step(optimizer, clip_norm=0.5))
            scaler.update()
        found.append((norms, [p.numpy().tobytes() for p in model.parameters()]))
    assert found[0] == found[1]


def test_the_scaler_goes_on_from_its_state() -> None:
    p = eg.tensor([1.0, 2.0], requires_grad=True)
    optimizer, scaler = eg.optim.SGD([p], lr=0.1), eg.optim.GradScaler(growth_interval=3)
    for value in (1.0, np.inf, 1.0, 1.0):
        step_with(scaler, optimizer, p, value)
    other = eg.optim.GradScaler(growth_interval=3)
    other.load_state_dict(scaler.state_dict())
    for s in (scaler, other):
        step_with(s, optimizer, p, 1.0)
    assert scaler.state_dict() == other.state_dict() == {"scale": 65536.0, "good_steps": 3, "skipped_steps": 1}
    state = other.state_dict()
    for wrong, message in (({"scale": 1.0}, "expected scale, good_steps and skipped_steps"),
                           ({**state, "scale": np.nan}, "scale is nan, expected a power of two"),
                           ({**state, "scale": 3.0}, "scale is 3.0, expected a power of two"),
                           ({**state, "good_steps": "2"}, "good_steps is '2', expected a whole number"),
                           ({**state, "scale": 2.0, "skipped_steps": -1}, "skipped_steps is -1, expected a whole")):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(wrong)
        assert other.state_dict() == state


def test_a_loaded_scaler_has_divided_nothing_yet() -> None:
    p = eg.tensor([1.0, 2.0], requires_grad=True)
    optimizer, scaler = eg.optim.SGD([p], lr=0.1), eg.optim.GradScaler()
    state = scaler.state_dict()
    step_with(scaler, optimizer, p, 1.0)
    p.grad = eg.ones(2)
    scaler.unscale_(optimizer)
    scaler.load_state_dict(state)
    assert scaler.unscale_(optimizer)


def test_gradients_of_a_few_rows_are_scaled_too() -> None:
    p = eg.ones(9, 4, requires_grad=True)
    optimizer, scaler = eg.optim.SGD([p], lr=1.0), eg.optim.GradScaler()
    rows = eg.tensor([[2.0] * 4, [1.0] * 4]) * scaler.scale_factor
    p.grad = eg.RowSparse(np.array([2, 5]), rows, 9)
    scaler.step(optimizer)
    assert isinstance(p.grad, eg.RowSparse)
    want = np.ones((9, 4), np.float32)
    want[[2, 5]] -= [[2], [1]]
    np.testing.assert_array_equal(p.numpy(), want)


def test_the_scaler_refuses_what_it_cannot_do() -> None:
    for wrong in ({"init_scale": 3.0}, {"init_scale": 0.0}, {"init_scale": np.inf}, {"growth": 1.0}, {"growth": 1.5}):
        with pytest.raises(ValueError, match=r"GradScaler: (init_scale|growth) is .* expected a power of two"):
            eg.optim.GradScaler(**wrong)
    with pytest.raises(ValueError, match="growth_interval is 0"):
        eg.optim.GradScaler(growth_interval=0)
    p = eg.tensor([1.0], requires_grad=True)
    optimizer, scaler = eg.optim.SGD([p], lr=0.1), eg.optim.GradScaler()
    with pytest.raises(RuntimeError, match="no step was made"):
        scaler.update()
    p.grad = eg.tensor([1.0])
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscaled already"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)  # does not divide again
    assert p.numpy()[0] == np.float32(1 - 0.1 / 65536.0)
    with pytest.raises(RuntimeError, match="has made a step already"):
        scaler.step(optimizer)  # on gradients that nobody would have divided
    scaler.update()
    assert scaler.good_steps == 1
