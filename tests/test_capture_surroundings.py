"""Captured functions, and what is there besides their arguments: closures, gradients, buffers, modes, observers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from captured import agree, bits, mlp, numbers

import engine as eg
from engine import nn, optim
from engine.backend import observers

pytestmark = pytest.mark.usefixtures("unwatched")

# ── what is read and written besides arguments ────────────────────────────────────────────────────────

def test_a_closure_is_not_the_argument_that_was_recorded() -> None:
    x, other = numbers((3,), 0), numbers((3,), 1)
    times = eg.capture(lambda a: a * x)
    for a in (x, x, other, x, other):
        assert bits(times(a)) == bits(a * x)
    whole = numbers((5, 3), 2)
    against_mean = eg.capture(lambda row: row - whole.sum(0))
    for row in (whole[0], whole[0], other, whole[4]):
        assert bits(against_mean(row)) == bits(row - whole.sum(0))


def test_a_part_of_what_it_reads_and_more_than_that() -> None:
    w, whole = numbers((4, 3), 0), numbers((4, 3), 1)
    part = eg.capture(lambda x: w[1] * x, [w])
    for call in range(4):
        w.array = numbers((4, 3), call).array
        assert bits(part(whole[0])) == bits(w[1] * whole[0])
    more = eg.capture(lambda x: whole * x, [whole[:2]])
    more(whole[0])
    with pytest.raises(RuntimeError, match="capture: multiply takes more of an array than what is given of it"):
        more(whole[0])


def gradients_are_handled(change: Callable[[eg.Tensor, Any], Any]) -> None:
    """Hold a function that does something with .grad against itself, with and without gradients that are there."""
    found = []
    for capture in (False, True):
        w = numbers((3,), 0).requires_grad_()

        def function(x: eg.Tensor, w: eg.Tensor = w) -> Any:
            return change(w, lambda: (w * w * x).sum().backward())

        run, kept = eg.capture(function, [w]) if capture else function, []
        for call in range(8):
            if call % 4 == 2:
                w.grad = None
            kept.append(bits(run(numbers((3,), call))))
            kept.append(bits(w.grad))
        found.append(kept)
    assert found[0] == found[1]


@pytest.mark.parametrize("change", [
    lambda w, backward: backward(),
    lambda w, backward: [setattr(w, "grad", None), backward()][1],
    lambda w, backward: [backward(), setattr(w, "grad", w.grad * 0.5)][1],
    lambda w, backward: [backward(), w.grad * 1, setattr(w, "grad", None)][1],
    lambda w, backward: [backward(), optim.clip_grad_value_([w], 0.1)][1],
    lambda w, backward: [w * 1 if w.grad is None else w.grad * 2, backward()][0].detach(),
    lambda w, backward: [backward(), backward()][1],
    lambda w, backward: [backward(), w.grad][1]], ids=range(8))
def test_functions_that_handle_gradients(change: Any) -> None:
    gradients_are_handled(change)


def test_one_tensor_in_several_places() -> None:
    w = numbers((33,), 0).requires_grad_()

    def slope(a: eg.Tensor, b: eg.Tensor) -> None:
        ((a * a * b).sum() + (a * b * b).sum() + (a * w).sum()).backward()

    captured, x, y = eg.capture(slope, [w]), numbers((33,), 1), numbers((33,), 2)
    for run_first in (captured, slope):
        for a, b in ((x, x), (x, y), (w, x), (w, w)) * 3:
            found = []
            for run in (run_first, slope):
                for t in (w, x, y):
                    t.grad = None
                    t.requires_grad_()
                run(a, b)
                found.append(bits([w.grad, x.grad, y.grad]))
            assert found[0] == found[1]


def test_buffers_and_replaced_parameters() -> None:
    model: Any = mlp()
    model.register_buffer("offset", numbers((3,), 0))
    captured, x = eg.capture(lambda x: (model(x) + model.offset).detach(), model), numbers((2, 6), 1)
    for call in range(8):
        if call == 3:
            model.offset.array = numbers((3,), 5).array
        if call == 4:
            model.offset = numbers((3,), 6)
        if call == 5:
            model.to("float64").to("float32")
            model.offset.copy_(numbers((3,), 7))
        if call == 6:
            model.last.weight = nn.Parameter(numbers((3, 16), 8))
        with eg.no_grad():
            assert bits(captured(x)) == bits(model(x) + model.offset)


def test_equal_is_not_identical() -> None:
    with eg.no_grad():
        sign = eg.capture(lambda x, y: x * y)
        for y in (0.0, -0.0, 0, False, float("nan"), 1, True, 1.0) * 3:
            x = numbers((3,), 0)
            assert bits(sign(x, y)) == bits(x * y)
        assert len(sign.programs) == 8
        scaled = eg.capture(lambda x, pair: x.to("int64") * pair[0])
        for pair in ((2,), (2.0,)) * 3:
            assert bits(scaled(x, pair)) == bits(x.to("int64") * pair[0])


def test_further_kinds_of_calls_take_the_place_of_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["engine.capture"], "KEPT", 3)
    captured = eg.capture(lambda x, n: x * n)
    for n in (1, 2, 3, 4, 5):
        for _ in range(2):
            captured(numbers((2,), 0), n)
    assert len(captured.programs) == 3


# ── what happens again besides launches ───────────────────────────────────────────────────────────────

def test_checks_of_elements_happen_again() -> None:
    table = numbers((5, 2), 0)
    look_up = eg.capture(lambda i: eg.embedding(table, i))
    loss = eg.capture(lambda x, t: eg.cross_entropy(x, t))
    for _ in range(3):
        look_up(eg.tensor([0, 4]))
        loss(table, eg.tensor([1, 0, 1, -100, 0]))
    with pytest.raises(IndexError, match=r"embedding: index holds 5, expected whole numbers in \[0, 5\)"):
        look_up(eg.tensor([0, 5]))
    with pytest.raises(IndexError, match=r"cross_entropy: target holds 2, expected classes in \[0, 2\)"):
        loss(table, eg.tensor([1, 0, 1, 2, 0]))
    assert bits(look_up(eg.tensor([1, 2]))) == bits(table[1:3])


def test_while_kernels_are_observed_it_is_called_as_it_is() -> None:
    captured, seen = eg.capture(lambda x: eg.exp(x)), []
    for call in range(3):
        captured(numbers((3,), call))
    x = numbers((3,), 9)
    observers.append(lambda name, _: seen.append(name))
    try:
        captured(x)
    finally:
        observers.pop()
    assert seen == ["exp"]


def test_captured_inside_captured() -> None:
    inner = eg.capture(lambda x: eg.exp(x) * 2)
    agree(lambda x: inner(x) + inner(x + 1), (4,))


def test_other_devices_are_called_as_they_are() -> None:
    captured = eg.capture(lambda x: eg.exp(x))
    for _ in range(3):
        assert captured(eg.tensor([0.0], device="reference")).device == "reference"
    assert captured.programs == []
