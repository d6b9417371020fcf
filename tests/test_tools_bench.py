"""tools/bench.py: what it computes from given turns, what it refuses, and one row of each table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.backend import get_backend
from engine.backend.cpu import CpuBackend
from tools.benchmarks.contest import OURS, Contest, Machine, Result, measure
from tools.benchmarks.peers import Peers, prepare_environment
from tools.benchmarks.report import table

ROOT = Path(__file__).resolve().parent.parent
MACHINE = Machine(2, 1e9, 1e9, 1e9)


def nothing() -> None:
    pass


def given(**seconds: list[float]) -> Result:
    """A result whose turns are known: 10⁶ flops on a machine of 10⁹ flops/s, so at best a millisecond."""
    contest = Contest("row", dict.fromkeys(seconds, nothing), flops=1e6, work=10, unit="things/s", streams=False)
    return Result(contest, seconds, bounds=[1e-3, 1e-3, 1e-3])


def test_the_ratio_is_the_median_of_turns_against_the_best_peer() -> None:
    result = given(engine=[1.0, 2.0, 4.0], fast=[2.0, 2.0, 2.0], slow=[9.0, 9.0, 9.0])
    assert result.best_peer == "fast"
    assert result.ratio == 1.0  # of 2, 1 and 1/2
    assert result.of_bound == 1e-3 / 2
    assert result.shown(OURS) == 5.0  # ten things in two seconds
    assert "| 5 | 5 | 1.11 |" in table("title", MACHINE, [result])


def test_without_peers_there_is_no_ratio() -> None:
    assert given(engine=[1.0, 1.0, 1.0]).ratio is None


def test_contestants_take_turns() -> None:
    order: list[str] = []
    contest = Contest("row", {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, flops=1.0, streams=False)
    probed: list[str] = []
    result = measure(contest, 0.0, (lambda: probed.append("peak") or 1.0, lambda: probed.append("copy") or 1.0), 2)
    kept = [who for who, before in zip(order, [None, *order]) if who != before]
    assert kept == ["a", "b", "a", "b", "a", "b"]  # once to choose the number of calls, then two turns each
    assert probed == ["peak", "peak"] and len(result.bounds) == len(result.seconds["a"]) == 2


def test_a_setting_that_changes_a_peer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    with pytest.raises(SystemExit, match="OPENBLAS_CORETYPE set in the environment"):
        prepare_environment(1)


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(SystemExit, match="--peers names cuda, expected some of torch"):
        Peers(["cuda"], 1)


@pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend), reason="measures the compiled kernels")
@pytest.mark.parametrize(("name", "only"), [("gemm", "NN 64×64×64"), ("kernels", "exp 64×1024")])
def test_one_row(name: str, only: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")}
    run = subprocess.run([sys.executable, "tools/bench.py", name, "--peers", "openblas", "--threads", "1", "--seconds",
                          "0.01", "--only", only, "--json", str(tmp_path / "rows.json")], cwd=ROOT, env=environment,
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert f"| {only} |" in run.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())[name]["rows"]
    assert [row["name"] for row in rows] == [only] and min(rows[0]["seconds"][OURS]) > 0
