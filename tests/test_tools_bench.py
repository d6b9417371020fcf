"""tools/bench.py: what it computes from given turns, what it refuses, and one row of each table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.backend import get_backend, get_num_threads, set_num_threads
from engine.backend.cpu import CpuBackend
from tools.benchmarks import overhead, sweep
from tools.benchmarks.contest import OURS, Contest, Machine, Result, measure
from tools.benchmarks.kernels import Maker
from tools.benchmarks.peers import Peers, prepare_environment
from tools.benchmarks.report import table

ROOT = Path(__file__).resolve().parent.parent
MACHINE = Machine(2, 1e9, 1e9, 1e9)


def nothing() -> None:
    pass


def with_torch() -> Peers:
    peers = Peers([], 1)
    peers.torch = "any"  # a case is made later
    return peers


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


def test_a_case_of_the_sweep_depends_on_its_number_alone() -> None:
    def names(shapes: int, first: int) -> list[str]:
        return [name for name, _ in sweep.contests(with_torch(), shapes, 7, first)]

    whole = names(60, 0)
    assert names(20, 40) == whole[40:]
    assert len(set(whole)) > 50
    assert whole != [name for name, _ in sweep.contests(with_torch(), 60, 8)]


def test_the_sweep_draws_from_one_element_to_a_hundred_millions() -> None:
    sizes = [rows * n for rows, n in (sweep.Draw(0, number).rows(2) for number in range(500))]
    assert min(sizes) <= 2 and 5e7 < max(sizes) <= sweep.ELEMENTS
    for number in range(200):
        m, n, k = sweep.Draw(1, number).product()
        assert 2 * m * n * k <= sweep.FLOPS


class Small(sweep.Draw):
    """The same kinds of shapes, of a few elements."""

    def size(self, most: float, least: int = 1) -> int:
        return min(super().size(most, least), 5)


@pytest.mark.parametrize("work", sweep.WORKS, ids=lambda work: f"{work.level} {work.name}")
@pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend), reason="launches the compiled kernels")
def test_every_kind_of_case_runs(work: sweep.Work) -> None:
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    row = work.make(Maker(torch), *work.shape(Small(0, 3)))
    row.ours()
    if row.torch is not None:
        row.torch()
    assert (row.torch is not None) == (torch is not None)


def test_the_sweep_lists_the_slowest_first() -> None:
    text = sweep.slowest([given(engine=[1.0, 1.0], torch=[2.0, 2.0]), given(engine=[1.0, 1.0], torch=[0.5, 0.5]),
                          given(engine=[1.0, 1.0], torch=[0.95, 0.95])])
    assert text.startswith("1 of 3 cases take more than 1.1 times as long")
    assert [line.split(" | ")[-1] for line in text.splitlines()[4:]] == ["0.50 |", "0.95 |", "2.00 |"]


def test_the_sweep_needs_torch() -> None:
    with pytest.raises(SystemExit, match="sweep compares with torch"):
        next(sweep.contests(Peers([], 1), 1, 0))


@pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend), reason="measures the compiled kernels")
@pytest.mark.parametrize(("name", "only"), [("gemm", "NN 64×64×64"), ("kernels", "exp 64×1024"),
                                            ("generate", "decode char"), ("overhead", "x < y")])
def test_one_row(name: str, only: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")}
    run = subprocess.run([sys.executable, "tools/bench.py", name, "--peers", "openblas", "--threads", "1", "--seconds",
                          "0.01", "--only", only, "--json", str(tmp_path / "rows.json")], cwd=ROOT, env=environment,
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert f"| {only} |" in run.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())[name]["rows"]
    assert [row["name"] for row in rows] == [only] and min(rows[0]["seconds"][OURS]) > 0


@pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend), reason="measures the compiled kernels")
def test_what_a_team_of_threads_costs() -> None:
    assert overhead.team_results(Peers([], 1)) == []
    before = get_num_threads()
    try:
        results = overhead.team_results(Peers([], 2), turns=1)
    finally:
        set_num_threads(before)
    assert [result.contest.name for result in results] == [
        f"2 threads {job}, {state}" for job in ("in registers", "over memory") for state in ("spinning", "asleep")]
    assert all(len(result.seconds[OURS]) == overhead.JOBS and min(result.seconds[OURS]) > 0 for result in results)


@pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend), reason="measures the pool")
def test_memory_of_a_step(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")}
    run = subprocess.run([sys.executable, "tools/bench.py", "memory", "--peers", "", "--threads", "1", "--only",
                          "tiny engine", "--json", str(tmp_path / "rows.json")], cwd=ROOT, env=environment,
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["memory"]["rows"]
    assert row["name"] == "tiny engine"
    assert row["state"] < row["pool"] < 20 * row["state"]  # the activations of 768 tokens stand beside it
    assert row["growth"] > row["state"]
