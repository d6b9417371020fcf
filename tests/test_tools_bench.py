"""tools/bench.py: what it computes from given turns, what it refuses, and one row of each table."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from limited import counted

import engine as eg
from engine.backend import get_backend, get_num_threads, set_num_threads
from engine.backend.cpu import CpuBackend
from tools.benchmarks import gemm, generate, goals, kernels, memory, overhead, sharder, sweep, train
from tools.benchmarks.contest import OURS, Contest, Machine, Result, measure
from tools.benchmarks.kernels import Maker
from tools.benchmarks.peers import Peers, prepare_environment
from tools.benchmarks.report import rows, table

ROOT = Path(__file__).resolve().parent.parent
MACHINE = Machine(2, 1e9, 1e9, 1e9)
compiled = pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend), reason=(
    "bench refuses to measure without kernels, which test_without_kernels_there_is_one_line holds it to"))


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program on one thread, in a process whose settings change no peer."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")}
    return subprocess.run([sys.executable, "tools/bench.py", *arguments, "--threads", "1"], cwd=ROOT,
                          env={**kept, **environment}, capture_output=True, text=True, timeout=120)


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


@pytest.mark.parametrize(("bound", "text"), [
    (9e-4, "1.25 ×, 0.5 of bound ✓"), (5e-4, "1.25 ×, 0.5 of bound [1]"), (None, "1.25 ×, 0.5 of bound")])
def test_a_goal_is_met_or_its_limit_is_said(monkeypatch: pytest.MonkeyPatch, bound: float | None, text: str) -> None:
    known = goals.Goal("title", "other", 9.0), goals.Goal("title", "row", 1.25, 0.5, limit="Why.")
    monkeypatch.setattr(goals, "GOALS", known)
    result = given(engine=[1.6e-3, 1.6e-3, 1.6e-3], torch=[2e-3, 2e-3, 2e-3])
    result.bounds = [bound] * 3 if bound else []
    shown = table("title", MACHINE, [result])
    assert shown.splitlines()[4].endswith(f"| {text} |")
    assert ("[1] Why." in shown) == ("[1]" in text)
    assert rows("title", [result])[0]["met"] is {"✓": True, "]": False, "d": None}[text[-1]]
    slower = given(engine=[1e-2, 1e-2, 1e-2], torch=[2e-3, 2e-3, 2e-3])
    assert goals.goal_of("title", slower).met(slower) is False  # whatever the bound
    assert table("elsewhere", MACHINE, [result]).splitlines()[4].endswith("|  |")


def test_every_goal_speaks_of_a_row_and_says_what_limits_it() -> None:
    peers = with_torch()
    names = {name: [row for row, _ in module.contests(peers)] for name, module in
             (("gemm", gemm), ("kernels", kernels), ("train", train), ("generate", generate), ("sharder", sharder))}
    for goal in goals.GOALS:
        assert any(re.fullmatch(goal.rows, row) for row in names[goal.table]), goal
        assert goal.limit.endswith((".", ")")) and (goal.ratio or goal.share)


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


def test_nobody_is_measured_beside_a_thread_that_still_spins() -> None:
    spinning = threading.Thread()
    beside: list[bool] = []

    def spin() -> None:
        until = time.perf_counter() + 0.1
        while time.perf_counter() < until:
            pass

    def leave_a_thread_behind() -> None:
        nonlocal spinning
        if not spinning.is_alive():
            spinning = threading.Thread(target=spin)
            spinning.start()

    def witness() -> float:
        beside.append(spinning.is_alive())
        return 1.0

    runs = {"first": leave_a_thread_behind, "witness": witness, "before the probe": leave_a_thread_behind}
    measure(Contest("row", runs, flops=1.0, streams=False), 0.0, (witness, witness), 2)
    assert beside and not any(beside)


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
@compiled
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


@pytest.mark.parametrize("name", ["gemm", "memory"])
def test_without_kernels_there_is_one_line(name: str, tmp_path: Path) -> None:
    run = bench(name, "--peers", "openblas", ENGINE_KERNELS=str(tmp_path))
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.splitlines()[-1] == "bench: no compiled kernels to measure; run `make` first"
    assert "Traceback" not in run.stderr


@compiled
@pytest.mark.parametrize(("name", "only"), [("gemm", "NN 64×64×64"), ("kernels", "exp 64×1024"),
                                            ("generate", "decode char q8_0"), ("overhead", "x < y")])
def test_one_row(name: str, only: str, tmp_path: Path) -> None:
    run = bench(name, "--peers", "openblas", "--seconds", "0.01", "--only", only, "--json", str(tmp_path / "rows.json"))
    assert run.returncode == 0, run.stderr
    assert f"| {only} |" in run.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())[name]["rows"]
    assert [row["name"] for row in rows] == [only] and min(rows[0]["seconds"][OURS]) > 0


@compiled
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


@compiled
def test_memory_of_a_step(tmp_path: Path) -> None:
    run = bench("memory", "--peers", "", "--only", "tiny engine", "--json", str(tmp_path / "rows.json"))
    assert run.returncode == 0, run.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["memory"]["rows"]
    assert row["name"] == "tiny engine"
    size = memory.size_of("tiny")
    matrices = 12 * size.layers * size.width**2  # of attention 4, of the feed-forward 2 that are 4 times as large
    assert 16 * matrices < row["state"] < 1.1 * 16 * matrices  # embeddings, norms and biases are little beside them
    assert row["state"] < row["pool"] < 20 * row["state"]  # the activations of 768 tokens stand beside it
    assert row["growth"] > row["state"]


@compiled
@counted
def test_memory_and_faults_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the steps that count: what the first steps take more of is not in them."""
    made: list[bool] = []
    mebibyte, pages = 1 << 20, 500

    def step() -> None:
        warm = len(made) < memory.WARM_UP
        made.append(warm)
        eg.empty((64 if warm else 16) * mebibyte // 4)
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as fresh:
            for page in range(pages):
                fresh[page * mmap.PAGESIZE] = 1

    monkeypatch.setattr(memory.train, "engine_step", lambda size: (step, None))
    used = get_backend("cpu").pool.figures().live
    found = memory.measure_here("tiny", OURS, 1)
    assert len(made) == memory.WARM_UP + memory.STEPS
    assert 16 * mebibyte <= found["pool"] - used < 64 * mebibyte
    assert pages <= found["faults"] < 2 * pages


def test_workers_and_the_loop_make_the_same_steps() -> None:
    """Every loss has the bits of the other's, so the parameters before it have."""
    make_model, batch = sharder.of_size(train.Size("small", 1, 2, 16, 8, 2, 11))
    model = sharder.seeded(make_model)
    served, plain = sharder.server_step(make_model, batch, 2), sharder.loop_step(model, batch, 2)
    losses = [(served().mean_loss, plain()) for _ in range(4)]
    assert all(one == other for one, other in losses) and losses[0] != losses[3]


@pytest.mark.parametrize("clip_norm, streams", [(None, 2 + 6), (1.0, 2 + 2 + 6)])
def test_gradients_that_lie_ready_are_pushed(clip_norm: float | None, streams: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """At least: two gradients read, to clip them twice, and p, m and v read and written."""
    monkeypatch.setattr(sharder, "ELEMENTS", 16 * 5000)
    contest = sharder.update("rest", clip_norm, 2)
    first, second = (contest.contestants[OURS]() for _ in range(2))
    assert (first.clock, second.clock) == (0, 1) and contest.bytes == 4 * 80_000 * streams
