"""Automatic mutants: what is mutated and what is left alone, that the sample is stable, and how they are judged."""

from __future__ import annotations

import importlib.util
import resource
from pathlib import Path

import pytest
from limited import limited_memory

from tools.mutants import Mutant
from tools.mutants.automatic import code_of, edit, places, sample, stages, users_of
from tools.mutants.equivalent import EQUIVALENT, changed_lines
from tools.mutate import LIMITS, check_record, run

needs_mutmut = pytest.mark.skipif(importlib.util.find_spec("mutmut") is None, reason=(
    "mutmut is of the mutation extra: some 40 MB with what it needs, which every `make` would fetch were it in dev"))
ROOT = Path(__file__).resolve().parent.parent
SOURCE = '''"""Doc 1 + 1."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT = 7

__all__ = ["helper", "total"]
Shape = int | tuple


def helper(x: int | None = 3) -> int | str:
    """Doc 2 + 2."""
    if x is None:
        raise ValueError(f"x is {x + 4}, expected {5}")
    return x


def total(x: int) -> int:
    words = f"{6 + 6} + 6"
    while x < 100:
        x = helper(x) + 8
    return x
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "engine").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "engine" / "__init__.py").write_text("")
    (root / "engine" / "sums.py").write_text(SOURCE)
    (root / "tests" / "test_sums.py").write_text(
        "from engine.sums import total\n\ndef test_total():\n    assert total(3) == 107\n")
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\naddopts = '-ra'\n")
    return root


@needs_mutmut
def test_what_is_mutated_and_what_is_left_alone() -> None:
    import libcst as cst

    found = places("engine/sums.py", cst.parse_module(SOURCE))
    assert [(place.within, code_of(place.node).strip()) for place in found] == [
        ("helper", "3"), ("helper", "is"),  # the condition of the raise
        ("total", 'words = f"{6 + 6} + 6"'), ("total", "< 100"), ("total", "100"), ("total", "x = helper(x) + 8"),
        ("total", "helper(x) + 8"), ("total", "helper(x)"), ("total", "8")]


@needs_mutmut
def test_a_sample_is_of_distinct_edits_and_stands_still(tree: Path) -> None:
    """The same for the same seed; another for another; and an edit of one function leaves the others' mutants."""
    files = ("engine/sums.py",)
    mutants = sample(tree, 100, 0, files)
    assert len({m.new for m in mutants}) == len(mutants) == len({m.name for m in mutants}) >= 8
    assert sample(tree, 5, 0, files) == mutants[:5] and sample(tree, 5, 1, files) != mutants[:5]
    for mutant in mutants:
        assert (tree / mutant.file).read_text().count(mutant.old) == 1 and mutant.old != mutant.new
    path = tree / "engine" / "sums.py"
    path.write_text(SOURCE.replace("    return x\n\n\n", "    return x * 9\n\n\n"))
    kept = {changed_lines(m) for m in mutants if "return x" not in m.old.splitlines()[0]}
    assert kept <= {changed_lines(m) for m in sample(tree, 100, 0, files)}


@pytest.mark.parametrize(("before", "after"), [
    ("a\nb\nc\n", "a\nB\nc\n"), ("a\nb\na\nc\n", "a\nb\nA\nc\n"), ("a\na\na\n", "a\na\n"),
    ("x\ny\nx\ny\n", "x\ny\nx\nz\n"), ("a\n(b,\nc)\nd\n", "a\nNone\nd\n")])
def test_an_edit_is_unique_and_gives_the_text(before: str, after: str) -> None:
    old, new, line = edit(before, after)
    assert before.count(old) == 1 and before.replace(old, new) == after
    assert line == next((i for i, (x, y) in enumerate(zip(before.splitlines(), after.splitlines())) if x != y),
                        min(len(before.splitlines()), len(after.splitlines()))) + 1


@needs_mutmut
def test_the_tests_are_those_of_the_ops_that_use_it() -> None:
    import libcst as cst

    module = cst.parse_module((ROOT / "engine/ops/reductions.py").read_text())
    assert users_of("_spread", module, {"sum", "prod", "max", "min", "mean", "logsumexp"}) >= {"sum", "prod"}
    assert users_of("std", module, {"std", "sum"}) == {"std"}
    first, *then = stages("engine/ops/reductions.py", {"sum"})
    assert "--ops=sum" in first and "quick" in first
    assert any("--ops=sum" in stage and "quick" not in stage for stage in then)
    assert "test_autograd" in stages("engine/autograd.py", set())[0]


def test_the_table_of_equivalent_mutants_fits_the_tree() -> None:
    for (file, old, new), reason in EQUIVALENT.items():
        lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
        wanted = old.splitlines()
        assert any(lines[i:i + len(wanted)] == wanted for i in range(len(lines))), f"{file} no longer has: {old}"
        assert old != new and reason and "\n" not in reason


# ── judging ───────────────────────────────────────────────────────────────────────────────────────────

def record(old: str, new: str) -> Mutant:
    return Mutant(old, "engine/sums.py", old, new, "a mistake", "tests/test_sums.py --hypothesis-profile=default",
                  then=("tests/test_sums.py",))


def test_the_equivalent_are_named_and_not_run(tree: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    alike, unseen = record("x < 100", "x <= 99"), record("= 3)", "= 4)")
    monkeypatch.setitem(EQUIVALENT, changed_lines(alike), "whole numbers")
    assert run([alike, unseen, record("+ 8", "+ 9")], tree, tree / "ledger.json") == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("equivalent") and rows[0].endswith("whole numbers")
    assert rows[1].startswith("SURVIVED") and rows[2].startswith("killed")
    assert rows[3:6] == ["SURVIVED  = 3), engine/sums.py", "  - = 3)", "  + = 4)"]
    assert rows[-1] == "1 of 2 planted bugs caught, 1 equivalent left out; not: = 3)"


@limited_memory
def test_an_endless_loop_runs_out_of_time(tree: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    endless = record("helper(x) + 8", "helper(x) - 8")
    check_record(endless, tree)
    assert run([endless], tree, tree / "ledger.json", limits={**LIMITS, resource.RLIMIT_CPU: 3}) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("killed") and "seconds of the processor" in rows[0]
    assert "1 by running out of time" in rows[1]
