"""Random programs against their meaning in float64; a planted bug is found and shrinks to a few instructions."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

import engine as eg
from engine.ops import registry
from engine.ops.indexing import assign_index, take_index
from engine.testing import CheckFailure, rounded
from engine.testing import strategies as st_eg
from engine.testing.forms import FORMS, Form, add_form
from engine.testing.programs import Input, Interpreter, Program, Step, build, check_program

QUICK = settings(max_examples=1500, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                 phases=[Phase.generate, Phase.shrink], derandomize=True)


@settings(max_examples=4 * settings.default.max_examples)
@given(program=st_eg.programs())
def test_random_programs(program: Program) -> None:
    check_program(program, second_order=len(program.steps) % 4 == 3)


# ── what a program is ─────────────────────────────────────────────────────────────────────────────────

DIAMOND = Program((Input((3,), 0), Input((2, 3), 1, False)), (
    Step("tanh", (0,), 2), Step("multiply", (2, 0), 3), Step("add", (3, 2), 4), Step("row", (1,), 5, {}),
    Step("iadd", (4, 5), 4), Step("detach", (4,), 6), Step("multiply", (4, 6), 7)), ((1, 2),))


def run_source(source: str, names: dict[str, Any]) -> None:
    exec(compile(source, "program", "exec"), names)


def test_the_source_is_a_program_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    source = DIAMOND.source()
    names: dict[str, Any] = {}
    run_source(source, names)
    assert "eg.checkpoint(block1, v2, v0)" in source and "v4 += v5" in source
    assert "tensor(" in capsys.readouterr().out and len(names["ys"]) == 1
    check_program(DIAMOND, second_order=True)


def test_the_interpreter_by_hand() -> None:
    """Its meaning written out once more: a diamond, a write in place, and detach."""
    x, c = np.random.default_rng(0).integers(-64, 65, 3) / 32, np.random.default_rng(1).integers(-64, 65, (2, 3)) / 32
    y = np.tanh(x) * x + np.tanh(x) + c[0]
    found = Interpreter(DIAMOND).run(DIAMOND.points())
    assert len(found) == 1 and np.array_equal(found[0], y * y)


def test_every_form_is_drawn_and_the_printed_program_is_evaluable() -> None:
    used: set[str] = set()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        steps = [tuple(int(v) for v in (rng.integers(0, len(FORMS) + 4), *rng.integers(0, 6, 3))) for _ in range(12)]
        kinds = [(int(k), int(s), bool(g)) for k, s, g in rng.integers(0, (8, 50, 2), (4, 3))]
        program = build((int(rng.integers(2, 5)), 3), kinds, steps)
        used |= {step.form for step in program.steps}
        used |= {"checkpoint"} if program.blocks else set()
        assert eval(repr(program), {"Program": Program, "Input": Input, "Step": Step}) == program
    assert used == {*FORMS, "checkpoint"}


def test_a_program_of_chosen_forms() -> None:
    program = find(st_eg.programs(["sin", "multiply"]), lambda p: len(p.steps) == 3, settings=QUICK)
    assert {step.form for step in program.steps} <= {"sin", "multiply"}
    with pytest.raises(ValueError, match="there is no form 'sine'"):
        st_eg.programs(["sine"])


def test_ones_own_instruction_joins() -> None:
    """A form of the user's: its text runs in the engine, its formula is the meaning; here they disagree."""
    add_form(Form("cube", "{0} * {0} * {0}", lambda x: x * x * x * 1.0001))
    try:
        with pytest.raises(CheckFailure, match="running error analysis"):
            check_program(build((2, 2), [(0, 0, True)], [(0, 0, 0, 0)], ["cube"]))
        with pytest.raises(ValueError, match="cube"):
            add_form(FORMS["cube"])
    finally:
        del FORMS["cube"]


def test_a_checkpoint_that_ends_in_a_write() -> None:
    """Its result is what was written to; what else was made inside is seen without the checkpoint only."""
    steps = (Step("tanh", (0,), 1), Step("tanh", (1,), 2), Step("tanh", (1,), 3), Step("iadd", (1, 3), 1))
    program = Program((Input((1,), 0),), steps, ((0, 3),))
    assert program.outputs() == [1] and Program(program.inputs, steps).outputs() == [2]
    check_program(program)


def test_decisions_are_held_and_doubtful_ones_left_out() -> None:
    """relu at an exact 0 has slope 0; at what is 0 but for rounding, no gradient is asked for."""
    exact = Program((Input((4,), 3),), (Step("subtract", (0, 0), 1), Step("relu", (1,), 2)))
    check_program(exact)
    assert Interpreter(exact, "float64").certain
    doubtful = Program((Input((4,), 3),), (Step("sin", (0,), 1), Step("subtract", (1, 1), 2), Step("relu", (2,), 3)))
    meaning = Interpreter(doubtful, "float64")
    meaning.run(doubtful.points())
    assert not meaning.certain and meaning.jumps_certain
    check_program(doubtful)


# ── planted bugs ──────────────────────────────────────────────────────────────────────────────────────

def without_args(x: Any) -> Any:
    return x


def wrong_assign(g: Any, x_shape: Any, index: Any, needs: Any) -> Any:
    return g if needs[0] else None, take_index(g, index) if needs[1] else None


BUGS: dict[str, tuple[Any, str, Any, list[str]]] = {  # what is changed, to what, and the forms to look among
    "a rule wrong by 1 in 100,000": (registry["sin"], "rule", lambda g, x: g * eg.cos(x) * 1.00001,
                                     ["sin", "multiply", "sum"]),
    "a rule for one operand twice": (registry["multiply"], "rule", lambda g, a, b, needs: (g * b, g * b),
                                     ["tanh", "add", "multiply", "transpose"]),
    "ties go to nobody": (registry["maximum"], "rule",
                          lambda g, a, b: (eg.where(b < a, g, 0.0), eg.where(a < b, g, 0.0)),
                          ["tanh", "add", "maximum"]),
    "what is overwritten keeps its gradient": (assign_index, "rule", wrong_assign, ["add", "tanh", "set row", "row"]),
    "a checkpoint that computes from what came after": (
        sys.modules["engine.checkpoint"], "_as_it_is", without_args, ["tanh", "iadd", "multiply"]),
}


@pytest.mark.parametrize("name", list(BUGS))
def test_a_planted_bug_shrinks_to_a_few_instructions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, attribute, wrong, forms = BUGS[name]
    monkeypatch.setattr(target, attribute, wrong)

    def fails(program: Program) -> bool:
        try:
            check_program(program)
        except CheckFailure:
            return True
        return False

    program = find(st_eg.programs(forms, max_nodes=8), fails, settings=QUICK)
    assert len(program.steps) <= 3, program
    with pytest.raises(CheckFailure) as caught:
        check_program(program)
    with pytest.raises(CheckFailure, match=re.escape(caught.value.check)):
        run_source(caught.value.reproduction, {})


def test_a_program_that_fails_in_its_second_derivative_is_printed_so() -> None:
    """A form with the right gradient, which is a constant to whoever differentiates twice."""
    add_form(Form("sine", "eg.sin({0}).detach() + eg.cos({0}).detach() * ({0} - {0}.detach())", rounded.sin))
    try:
        program = Program((Input((3,), 0),), (Step("sine", (0,), 1),))
        check_program(program)
        with pytest.raises(CheckFailure, match="check_second_order") as caught:
            check_program(program, second_order=True, seed=5)
        assert "seed=5" in caught.value.reproduction
        with pytest.raises(CheckFailure, match="check_second_order"):
            run_source(caught.value.reproduction, {})
    finally:
        del FORMS["sine"]


def test_an_error_of_the_engine_is_a_failure_with_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(g: Any, y: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(registry["tanh"], "rule", broken)
    program = Program((Input((2,), 0),), (Step("tanh", (0,), 1),))
    with pytest.raises(CheckFailure, match="no such thing") as caught:
        check_program(program)
    assert "v1 = eg.tanh(v0)" in caught.value.reproduction


