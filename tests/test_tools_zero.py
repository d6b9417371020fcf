"""tools/zero.py: each stage holds less than the one before, by the formulas, and ends with the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.backend import get_backend

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/zero.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


@pytest.mark.skipif(not hasattr(get_backend("cpu"), "pool"), reason="the NumPy backend has no pool")
def test_each_stage_holds_less_than_the_one_before() -> None:
    result = run("--layers", "4", "--width", "128", "--workers", "1", "--shards", "8")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("stage ")]
    parameters, gradients = ([float(row[column]) for row in rows] for column in (2, 5))
    formulas = [[float(row[column]) for row in rows] for column in (4, 7)]
    assert parameters[0] == parameters[1] == formulas[0][0] and gradients[0] <= 1.2 * formulas[1][0]
    assert parameters[2] <= 1.5 * formulas[0][2] < 0.4 * parameters[0]  # a parameter across two shards is joined
    assert max(gradients[1:]) <= 1.6 * formulas[1][1] < 0.5 * gradients[0]
    assert "the same bits at every stage" in result.stdout


def test_what_cannot_be_gets_one_line() -> None:
    result = run("--width", "100")
    assert result.returncode == 2 and "--width is 100, expected a multiple of 64" in result.stderr
