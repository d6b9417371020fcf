"""The op suite at every instruction-set level of this machine, each in a process of its own: ENGINE_ISA is read once.

Here only with a few examples each; `make test-isa` runs the whole of tests/ops at every level.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.backend import get_backend
from engine.backend.cpu import LEVELS, CpuBackend, built_levels

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = ["tests/ops/test_forward.py::test_forward", "tests/ops/test_forward.py::test_special_values",
          "tests/ops/test_gradients.py::test_kernel_vjp", "tests/ops/test_bits.py::test_batch_invariance",
          "tests/ops/test_bits.py::test_position", "tests/ops/test_large.py"]
backend = get_backend("cpu")


def other_levels() -> list[str]:
    """The levels that are built and run here, but for the one that this process runs."""
    if not isinstance(backend, CpuBackend):
        return []
    return [level for level in built_levels() if level != backend.level and backend.lib.level_supported(LEVELS[level])]


@pytest.mark.parametrize("level", other_levels())
def test_the_ops_at_another_level(level: str) -> None:
    environment = {**os.environ, "ENGINE_ISA": level, "HYPOTHESIS_PROFILE": "quick", "ENGINE_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CHOSEN], cwd=ROOT,
                         env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"ENGINE_ISA={level}:\n{run.stdout[-4000:]}{run.stderr[-1000:]}"
    assert " passed" in run.stdout


def test_an_unknown_level_is_refused_in_one_line() -> None:
    if not built_levels():
        pytest.skip("no compiled kernels")
    environment = {**os.environ, "ENGINE_ISA": "v9", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", "import engine as eg; eg.ones(1)"], cwd=ROOT, env=environment,
                         capture_output=True, text=True, timeout=60)
    assert run.returncode and "ENGINE_ISA: got 'v9', expected one of" in run.stderr.splitlines()[-1]
