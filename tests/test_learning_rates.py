"""Schedules of the learning rate, and who sets it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine import optim


def test_schedules_at_known_updates() -> None:
    assert optim.constant(0.3)(99) == 0.3
    line = optim.linear(1.0, 4, 0.2)
    assert [line(t) for t in (1, 3, 5, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    wave = optim.cosine(1.0, 4, 0.2)
    assert [wave(t) for t in (1, 2, 3, 5, 9)] == pytest.approx([1.0, 0.6 + 0.4 * math.cos(math.pi / 4), 0.6, 0.2, 0.2])
    assert [optim.step_decay(1.0, 3, 0.5)(t) for t in (1, 3, 4, 7)] == [1.0, 1.0, 0.5, 0.25]
    assert [optim.exponential(2.0, 0.5)(t) for t in (1, 2, 4)] == [2.0, 1.0, 0.25]
    both = optim.warmup_cosine(1.0, 10, 20)
    assert [both(t) for t in (1, 5, 10, 11, 16)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5])
    assert 0 < both(20) < 0.03  # no update is wasted
    cycle = optim.one_cycle(1.0, 10)
    assert [cycle(t) for t in (1, 4)] == pytest.approx([1 / 25, 1.0]) and cycle(11) == pytest.approx(1 / 250_000)


@given(st.floats(1e-6, 10), st.integers(0, 50), st.integers(1, 200))
def test_warm_up_rises_and_the_cosine_falls(peak: float, warm: int, steps: int) -> None:
    rate = optim.warmup_cosine(peak, warm, steps)
    values = [rate(t) for t in range(1, max(steps, warm) + 1)]
    assert all(0 < value <= peak * (1 + 1e-15) for value in values)
    assert values[:warm] == sorted(values[:warm]) and values[warm:] == sorted(values[warm:], reverse=True)


def test_scheduler_sets_the_coming_updates_rate() -> None:
    a, b = (eg.ones(1, requires_grad=True) for _ in range(2))
    optimizer = optim.SGD([{"params": [a]}, {"params": [b]}], lr=9.0)
    scheduler = optim.Scheduler(optimizer, [optim.exponential(1.0, 0.5), optim.constant(3.0)])
    assert scheduler.last_lr == [1.0, 3.0]
    scheduler.step()
    assert scheduler.last_lr == [0.5, 3.0]
    again = optim.Scheduler(optimizer, optim.exponential(1.0, 0.1))
    assert scheduler.last_lr == [1.0, 1.0]
    again.load_state_dict(scheduler.state_dict())
    assert again.last_lr == [0.1, 0.1]
    with pytest.raises(ValueError, match="got 1 schedules, expected one for each of the 2 groups"):
        optim.Scheduler(optimizer, [optim.constant(1.0)])
    for wrong in ({}, {"updates": "2"}, {"updates": -1}, {"updates": 1, "lr": 2}):
        with pytest.raises(ValueError, match=r"Scheduler\.load_state_dict: got .*, expected a number of updates"):
            again.load_state_dict(wrong)
    assert again.updates == 1
    optimizer.add_param_group({"params": [eg.ones(3, requires_grad=True)]})
    with pytest.raises(ValueError, match="the optimizer has 3 groups by now, expected 2"):
        again.step()


@pytest.mark.parametrize("make", [lambda: optim.cosine(1.0, 0), lambda: optim.linear(1.0, 0),
                                  lambda: optim.step_decay(1.0, 0), lambda: optim.one_cycle(1.0, 0),
                                  lambda: optim.one_cycle(1.0, 9, rise=1.0)])
def test_schedules_check_their_arguments(make: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()
