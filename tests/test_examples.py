"""Every script in tools/examples runs as a user would run it, checks its own result, and is at most 60 lines long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limited import SLOWNESS

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "tools" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120 * SLOWNESS)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
