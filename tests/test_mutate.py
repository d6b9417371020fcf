"""The tool that plants bugs: its records fit the tree, and on a small tree it tells what is tested from what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.mutants import MUTANTS, Mutant
from tools.mutate import Copy, MutationError, check_record, killer_of, run
from tools.mutate_server import OUT_OF_TIME

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name) for m in MUTANTS])
def test_every_record_fits_the_tree(mutant: Mutant) -> None:
    check_record(mutant, ROOT)
    assert mutant.what and "\n" not in mutant.what


def test_there_are_enough_in_c_and_in_python() -> None:
    in_c = [m for m in MUTANTS if m.file.startswith("kernels/")]
    in_python = [m for m in MUTANTS if m.file.endswith(".py")]
    assert len(MUTANTS) >= 120 and len(in_c) >= 60 and len(in_python) >= 60
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert len({(m.file, m.new) for m in MUTANTS}) == len(MUTANTS)


# ── a tree of one function ────────────────────────────────────────────────────────────────────────────

MATHS = """
def add(a, b):
    return a + b

def sign(a):
    return 1 if a > 0 else -1
"""
TESTS = """
from engine.maths import add, sign

def test_add():
    assert add(2, 3) == 5

def test_sign():
    assert sign(4) == 1
"""


PROGRAMS = """
from hypothesis import given, strategies as st
from engine.maths import sign

class Failure(AssertionError):
    def __init__(self, nodes):
        self.nodes = nodes

def test_one():
    if sign(4) != 1:
        raise Failure(1)

@given(st.integers(2, 8))
def test_random_programs(n):
    if sign(n) != 1:
        raise Failure(n)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "engine").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "engine" / "__init__.py").write_text("")
    (root / "engine" / "maths.py").write_text(MATHS)
    (root / "tests" / "test_maths.py").write_text(TESTS)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\naddopts = '-ra'\n")
    return root


def record(name: str, old: str, new: str, tests: str = "tests/test_maths.py::test_add") -> Mutant:
    return Mutant(name, "engine/maths.py", old, new, "a mistake", tests)


MINUS = record("minus", "a + b", "a - b")
UNSEEN = record("unseen", "a > 0", "a >= 0")
WIDER = record("only the wider suite", "a > 0", "a > 9")


def test_what_is_tested_is_caught_and_what_is_not_survives(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = tree / "build" / "mutate.json"
    before = (tree / "engine" / "maths.py").read_bytes()
    assert run([MINUS, WIDER, UNSEEN], tree, ledger) == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("killed") and "minus" in rows[0] and rows[0].endswith("tests/test_maths.py::test_add")
    assert rows[1].startswith("killed") and rows[1].endswith("tests/test_maths.py::test_sign")
    assert rows[2].startswith("SURVIVED") and "unseen" in rows[2]
    assert rows[3:6] == ["SURVIVED  unseen, engine/maths.py", "  - a > 0", "  + a >= 0"]
    assert rows[-1] == "2 of 3 planted bugs caught; not: unseen"
    assert (tree / "engine" / "maths.py").read_bytes() == before
    assert len(json.loads(ledger.read_text())) == 3


def test_verdicts_are_kept_until_something_changes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = tree / "build" / "mutate.json"
    ran: list[list[str]] = []
    real = Copy.test

    def counted(self: Copy, arguments: list[str], stop: bool = True, **options: Any) -> tuple[int, str]:
        if stop:
            ran.append(list(arguments))
        return real(self, arguments, stop, **options)

    monkeypatch.setattr(Copy, "test", counted)
    assert run([MINUS], tree, ledger) == 0 and len(ran) == 1
    assert run([MINUS], tree, ledger) == 0 and len(ran) == 1
    assert run([MINUS], tree, ledger, fresh=True) == 0 and len(ran) == 2
    tests = tree / "tests" / "test_maths.py"
    tests.write_text(tests.read_text() + "\n\ndef test_zero():\n    assert add(0, 0) == 0\n")
    assert run([MINUS], tree, ledger) == 0 and len(ran) == 3


def test_a_test_that_fails_anyway_catches_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = tree / "tests" / "test_maths.py"
    tests.write_text(tests.read_text().replace("== 5", "== 6"))
    assert run([MINUS], tree, tree / "build" / "mutate.json") == 1
    assert "fails without the bug too" in capsys.readouterr().out


def test_a_kill_by_a_test_that_is_gone_counts_for_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An automatic mutant's kill stands until its lines change, and so may outlive the test."""
    automatic, ledger, tests = MINUS._replace(then=()), tree / "build" / "mutate.json", tree / "tests" / "test_maths.py"
    text = tests.read_text()
    tests.write_text("import pytest\n\n" + text.replace(
        "def test_add(", "@pytest.mark.parametrize('kind', ['old kind'])\ndef test_add(kind"))
    assert run([automatic], tree, ledger) == 0
    tests.write_text(tests.read_text().replace("old kind", "new kind"))
    gone = automatic._replace(tests="tests/test_maths.py")
    assert run([gone], tree, ledger) == 1
    assert "which is there no more" in capsys.readouterr().out
    assert run([gone], tree, ledger) == 0


def test_tests_that_cannot_run_decide_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mutant = record("case", "a + b", "a - b", "tests/test_maths.py::test_add[3]")
    assert run([mutant, MINUS], tree, tree / "build" / "mutate.json") == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("UNDECIDED") and rows[1].startswith("killed") and rows[-1].endswith("not: case")


def test_what_shows_a_bug_is_shrunk_and_counted(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The test that caught it says how many ops it takes, and so does the random program that it shrinks to."""
    (tree / "tests" / "test_programs.py").write_text(PROGRAMS)
    mutant = record("sign", "a > 0", "a > 9", "tests/test_programs.py")
    assert run([mutant], tree, tree / "mutate.json", sizes=True) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].endswith("::test_one, shrunk of 1 nodes, program of 2 nodes")
    assert "of random programs: 1 shrunk, median 2, at most 2" in rows[3]


def test_a_copy_is_as_it_was_after_a_bug(tree: Path, tmp_path: Path) -> None:
    copy = Copy(tree, tmp_path / "copy")
    path = copy.folder / "engine" / "maths.py"
    before = path.stat().st_mtime_ns, path.read_bytes()
    with copy.plant(MINUS):
        assert "a - b" in path.read_text()
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_the_sources_that_read_a_header(tree: Path, tmp_path: Path) -> None:
    copy = Copy(tree, tmp_path / "copy")
    folder = copy.folder / "kernels"
    folder.mkdir()
    for name, text in {"a.h": "", "b.h": '#include "a.h"\n', "one.c": '#include "b.h"\n', "two.c": '#include "a.h"\n',
                       "three.c": "#include <math.h>\n"}.items():
        (folder / name).write_text(text)
    assert [p.name for p in copy.readers("kernels/a.h")] == ["one.c", "two.c"]
    assert [p.name for p in copy.readers("kernels/b.h")] == ["one.c"]
    assert [p.name for p in copy.readers("kernels/three.c")] == ["three.c"]


@pytest.mark.parametrize(("mutant", "message"), [
    (record("gone", "a * b", "a"), "stands 0 times"),
    (record("twice", "return", "yield"), "stands 2 times"),
    (record("same", "a + b", "a + b"), "are the same"),
    (record("test", "a + b", "a", "tests/test_nothing.py"), "there is no test tests/test_nothing.py"),
    (record("function", "a + b", "a", "tests/test_maths.py::test_nothing"), "there is no test"),
    (MINUS._replace(file="engine/none.py"), "there is no file"),
])
def test_a_record_that_does_not_fit_is_refused_in_one_line(tree: Path, mutant: Mutant, message: str) -> None:
    with pytest.raises(MutationError) as caught:
        run([mutant], tree, tree / "ledger.json")
    assert message in str(caught.value) and "\n" not in str(caught.value) and mutant.name in str(caught.value)


def test_how_a_run_of_the_tests_is_read() -> None:
    assert killer_of(0, "3 passed") is None
    assert killer_of(1, "x\nFAILED tests/a.py::f[b: c] - Error: - d\n1 failed") == "tests/a.py::f[b: c]"
    assert killer_of(2, "ERROR tests/a.py - ImportError: x") == "tests/a.py"
    report = "WARNING: ThreadSanitizer: data race (pid=3)\nFAILED tests/a.py::f"
    assert killer_of(66, report) == "ThreadSanitizer: data race"
    assert killer_of(-11, "") == "crash: SIGSEGV"
    assert killer_of(134, "") == "crash: SIGABRT"
    assert str(killer_of(OUT_OF_TIME, "")).startswith("time")
    assert killer_of(4, "ImportError while loading conftest") == "import: the engine cannot be imported"
    with pytest.raises(MutationError, match="status 5"):
        killer_of(5, "no tests ran")
