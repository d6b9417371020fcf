"""What the README shows is what happens: its Python blocks run, its op example is short, its commands exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import op_table
import pytest

from engine.ops.registry import registry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    known = set(registry)
    try:
        exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {"__name__": "readme"})
    finally:
        for name in set(registry) - known:  # the example's op is not one of the engine's
            del registry[name]
    assert capsys.readouterr().out


def test_the_op_example_is_short() -> None:
    block = next(b for b in BLOCKS if "@op(" in b)
    assert len(block.splitlines()) < 40


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"train", "test", "help", "lines"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_its_table_of_ops_is_the_registry() -> None:
    assert op_table.replaced(README, op_table.table()) == README, "python tools/op_table.py --write"


def test_a_gpu_run_on_record_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "hardware.json"
    record.write_text(json.dumps({"device": "GPU X", "date": "2026-01-02", "ops": ["exp", "log"], "kernels": ["relu"]}))
    monkeypatch.setattr(op_table, "HARDWARE", record)
    shown = op_table.table()
    assert "On a real GPU, GPU X (2026-01-02): 2 ops and 1 of" in shown
    elementwise = [op for op in registry.values() if op.forward.__module__ == "engine.ops.elementwise"]
    assert f"| 2 of {len(elementwise)} |" in shown
    assert "has run on a real GPU yet" not in shown


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), f"README links to {link}"
