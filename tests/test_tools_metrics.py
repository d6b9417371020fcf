"""Metrics, the progress line and the picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import engine as eg
from engine.sharder import Committed
from tools.training.errors import ProgramError, require, run_program
from tools.training.metrics import Metrics, read_metrics
from tools.training.plot import plot_losses, smooth
from tools.training.progress import Progress, duration
from tools.training.status import Status

ROOT = Path(__file__).resolve().parent.parent


def test_lines_survive_a_cut_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(1, 5):
        metrics.write(step, bits_per_byte=8.0 / step)
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 5, "bits_per_')  # killed in the middle of a line
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    resumed = Metrics(path, resume_step=2)
    resumed.write(3, bits_per_byte=1.0)
    resumed.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    Metrics(path).close()
    assert read_metrics(path) == []
    assert read_metrics(tmp_path / "none") == []


def test_durations() -> None:
    assert [duration(s) for s in (0, 9.6, 90, 3700)] == ["0:00", "0:10", "1:30", "1:01:40"]


def test_progress_prints_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    progress = Progress(first_step=0, steps=2, tokens_per_step=1000, flops_per_token=1e6, peak_flops=4e9)
    now = 101.0
    progress.update(1, bits_per_byte=5.0)
    assert capsys.readouterr().err == ""
    now = 102.0
    progress.update(2, bits_per_byte=4.0, status="staleness 2")
    assert capsys.readouterr().err == ("step 2/2  4.900 bits/byte, 1,000 tokens/s, 1.0 GFLOP/s (25% of peak), "
                                       "staleness 2, ETA 0:00\n")
    progress.close()


def test_the_status_is_what_the_server_counts() -> None:
    server = eg.sharder.ParameterServer({"w": np.zeros(250_000, "float32")}, eg.optim.SGDRule(lr=0.1), microbatches=2,
                                        consistency="ssp:3")
    server.pushed.sent = 5_000_000  # of an earlier run
    status = Status(server)
    server.pushed.sent += 2 * 2_000_000
    assert status(Committed(1, 1.0, 1.0, None, version=0)) == "staleness 1, 2.0 MB pushed a step"
    server.pushed.again, server.returns = 3, 1
    assert status(Committed(3, 1.0, 1.0, None, version=3, dropped=(1,))) == (
        "staleness 0, 1.0 MB pushed a step, 1 left out, 3 retries, 1 came back")
    plain = Status(eg.sharder.ParameterServer({"w": np.zeros(1, "float32")}, eg.optim.SGDRule(), microbatches=1))
    assert plain(Committed(0, 1.0, 1.0, None)) == "0.0 MB pushed a step"


def test_smoothing_starts_without_bias() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0], rel=1e-12)


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": 1, "bits_per_byte": 7.0}, {"step": 2, "bits_per_byte": 6.0, "validation_bits_per_byte": 6.1}]
    plot_losses(records, {"3-gram": 2.5}, "a run", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot_losses([], {}, "nothing yet", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_missing_extra_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ProgramError, match=r"the loss curve needs the package 'matplotlib'.*pip install 'shardgrad"):
        require("matplotlib", "the loss curve")

    def broken() -> int:
        raise ProgramError("one line")

    assert run_program("train", broken) == 1
    assert capsys.readouterr().err == "train: one line\n"


def test_a_reader_that_has_gone_ends_a_program_without_a_word() -> None:
    """As `| head` does. What is printed waits in a buffer until the end, so it is the last flush that fails."""
    command = [sys.executable, str(ROOT / "tools" / "lines.py")]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")
