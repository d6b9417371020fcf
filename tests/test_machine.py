"""Random lives of tensors against the naive model, and that the machine notices what is wrong.

Here 25 lives of 30 steps; the nightly run has 125 of 100 (tools/nightly.py).
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import engine as eg
from engine import autograd
from engine.testing import CheckFailure
from engine.testing.strategies import EngineMachine

LIFE = settings(settings.default, stateful_step_count=30)


def test_random_lives() -> None:
    run_state_machine_as_test(EngineMachine, settings=LIFE)


def unchecked(self: Any, op: str, name: str) -> Any:
    return self.array


def strong(x: Any) -> Callable[[], Any]:
    return lambda: x


BUGS: dict[str, tuple[Any, str, Any]] = {
    "a write goes unseen by what kept the old elements": (autograd.Saved, "get", unchecked),
    "a write goes unseen by a view": (sys.modules["engine.ops.inplace"], "ALONE", 10**9),
    "backward frees nothing": (autograd.Node, "release", lambda self: None),
    "a node keeps its own output alive": (sys.modules["engine.tensor"], "weakref", SimpleNamespace(ref=strong)),
    "no_grad records": (eg, "no_grad", contextlib.nullcontext),
    "a gradient is handed out twice": (autograd, "_unaliased", lambda cotangents, create_graph: lambda g: g),
}


@pytest.fixture
def cycles_stay() -> Iterator[None]:
    """What a bug ties into cycles of references is not freed at a moment that nobody chose."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", list(BUGS))
def test_a_planted_bug_is_noticed(name: str, cycles_stay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    target, attribute, wrong = BUGS[name]
    monkeypatch.setattr(target, attribute, wrong)
    search = settings(derandomize=True, max_examples=3000, stateful_step_count=50, database=None, deadline=None,
                      phases=[Phase.generate], report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
    with pytest.raises((CheckFailure, RuntimeError)) as caught:
        run_state_machine_as_test(EngineMachine, settings=search)
    if isinstance(caught.value, CheckFailure):
        assert caught.value.bound and "model" in caught.value.origin and "Hypothesis" in caught.value.reproduction


def test_retain_grad_is_backwards_business() -> None:
    """eg.grad leaves .grad alone; backward puts there what hooks left, in memory of its own."""
    x = eg.tensor([1.0, 2.0], requires_grad=True)
    y = x * 3.0
    y.retain_grad()
    y.register_hook(lambda g: g * 2.0)
    eg.grad(y.sum(), x, retain_graph=True)
    assert y.grad is None
    y.sum().backward()
    assert y.grad.tolist() == [2.0, 2.0] and x.grad.tolist() == [6.0, 6.0]
    y.grad += 1.0
    assert x.grad.tolist() == [6.0, 6.0]
