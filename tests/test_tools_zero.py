"""tools/zero.py: each stage holds less than the one before, by the formulas, and ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.backend import get_backend
from engine.sharder.partition import BLOCK

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, kernels: Path | None = None) -> subprocess.CompletedProcess[str]:
    """kernels: a folder to take them from"""
    environment = os.environ if kernels is None else {**os.environ, "ENGINE_KERNELS": str(kernels)}
    return subprocess.run([sys.executable, "tools/zero.py", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=120)


# Without compiled kernels memory is NumPy's: there is no count of it, and the program says so (below).
@pytest.mark.skipif(not hasattr(get_backend("cpu"), "pool"), reason="the NumPy backend has no pool")
@pytest.mark.process
def test_each_stage_holds_less_than_the_one_before() -> None:
    result = run("--layers", "4", "--width", "128", "--workers", "1", "--shards", "8")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("stage ")]
    parameters, gradients = ([float(row[column]) for row in rows] for column in (2, 5))
    formulas = [[float(row[column]) for row in rows] for column in (4, 7)]
    assert parameters[0] == parameters[1] == formulas[0][0] and gradients[0] <= 1.2 * formulas[1][0]
    across = 4 * 128 * 128 * 4 / 1e6  # the largest parameter: one that lies across two shards is joined, or kept, whole
    uneven = 2 * BLOCK * 4 / 1e6  # two shards, which own whole blocks
    assert parameters[2] <= formulas[0][2] + across + uneven + 0.1 < 0.4 * parameters[0]  # 0.1: two numbers are rounded
    assert max(gradients[1:]) <= 1.25 * formulas[1][1] + across < 0.5 * gradients[0]  # 1.25: the pool's classes
    assert "the same bits at every stage" in result.stdout


def test_what_cannot_be_gets_one_line(tmp_path: Path) -> None:
    result = run("--width", "100")
    assert result.returncode == 2 and "--width is 100, expected a multiple of 64" in result.stderr
    result = run(kernels=tmp_path)
    assert result.returncode == 2 and "without compiled kernels nothing counts memory" in result.stderr
