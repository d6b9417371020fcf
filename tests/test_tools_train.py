"""The programs end to end on a small text: train, stop in every way, go on to the same bits, generate, evaluate."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from tools import evaluate, generate, train
from tools.training.checkpoint import run_lock, steps
from tools.training.errors import run_program
from tools.training.session import Session

ROOT = Path(__file__).parent.parent
STEPS = 12
SMALL = ["--layers", "1", "--heads", "2", "--width", "16", "--hidden", "32", "--context", "16", "--batch", "2",
         "--microbatches", "4", "--dropout", "0.1", "--steps", str(STEPS), "--warmup", "2", "--validate-windows", "4",
         "--samples", "1", "--sample-length", "20", "--checkpoint-every", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {j} is {i * j}, äöü\n" for i in range(20) for j in range(10)))
    return path


def flags(run: Path, text: Path, *more: str) -> list[str]:
    return ["--run", str(run), "--cache", str(text.parent / "cache"), "--data", str(text), *more]


def call(program: Any, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """A program's main in this process, as the command line would call it."""
    name = program.__name__.rpartition(".")[2]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return run_program(name, program.main)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(ROOT / "tools" / "train.py"), *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "ENGINE_NUM_THREADS": "1"}, **options)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has a checkpoint of this step or a later one, or has ended."""
    deadline = time.monotonic() + 60
    while max(steps(run / "checkpoints"), default=0) < step and process.poll() is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.002)


def result(run: Path) -> str:
    return str(json.loads((run / "report.json").read_text())["result_sha256"])


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing interrupted: its folder and what it printed."""
    run = tmp_path_factory.mktemp("finished")
    process = start(*flags(run, text, *SMALL))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return run, output


def test_a_run_leaves_everything_that_was_promised(finished: tuple[Path, str]) -> None:
    run, output = finished
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert steps(run / "checkpoints") == [STEPS - 2, STEPS - 1, STEPS]
    report = json.loads((run / "report.json").read_text())
    assert set(report["baselines"]) == {"1-gram", "3-gram", "4-gram", "5-gram", "lzma"}
    assert len(report["samples"]) == 1 and report["steps_done"] == STEPS
    markdown = (run / "report.md").read_text()
    for row in ("this Transformer", "4-gram", "lzma"):
        assert row in output and row in markdown
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(r["bits_per_byte"] > 0 and r["gradient_norm"] > 0 for r in records)
    assert records[0]["lr"] < max(r["lr"] for r in records) > records[-1]["lr"]
    assert any("validation_bits_per_byte" in r for r in records)


@pytest.mark.parametrize("workers, shards, zero", [(1, 1, 1), (3, 5, 3)])
def test_workers_shards_and_stages_do_not_change_a_bit(finished: tuple[Path, str], text: Path, tmp_path: Path,
                                                        workers: int, shards: int, zero: int,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--workers", str(workers), "--shards", str(shards), "--zero", str(zero)]
    assert call(train, *flags(tmp_path, text, *SMALL, *more), monkeypatch=monkeypatch) == 0
    assert result(tmp_path) == result(finished[0])


@pytest.mark.parametrize("more", [["--placement", "hashing"], *[
    pytest.param(["--driver", "processes", *more], marks=pytest.mark.process)
    for more in (["--durability", "log"], ["--save-every", "2"])]])
def test_neither_do_placement_and_what_is_kept(finished: tuple[Path, str], text: Path, tmp_path: Path, more: list[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    made = watched(monkeypatch)
    assert call(train, *flags(tmp_path, text, *SMALL, *more), monkeypatch=monkeypatch) == 0
    assert result(tmp_path) == result(finished[0])
    (server,) = made
    wanted = dict(zip(more[::2], more[1::2]))
    assert server.setup.placement == wanted.get("--placement", "ranges")
    assert getattr(server, "durability", None) == (
        wanted.get("--durability", "snapshot") if "--driver" in wanted else None)
    assert server.setup.save_every == int(wanted.get("--save-every", 10 if "--driver" in wanted else 0))


def test_precision_reaches_the_workers(finished: tuple[Path, str], text: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run than in float32, and with the same bits for another number of workers."""
    found = []
    for workers in ("1", "2"):
        more = ["--precision", "bfloat16", "--workers", workers]
        assert call(train, *flags(tmp_path / workers, text, *SMALL, *more), monkeypatch=monkeypatch) == 0
        found.append(result(tmp_path / workers))
    assert found[0] == found[1] != result(finished[0])


@pytest.mark.parametrize("how", [[], ["--outer-lr", "1.5"]])
def test_the_memories_of_adamw_reach_its_rule(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              how: list[str]) -> None:
    """On the server, and in each microbatch: a value of its own for either of them makes a run of its own."""
    found = []
    for number, more in enumerate((["--beta1", "0.9", "--beta2", "0.95"], ["--beta1", "0.5"], ["--beta2", "0.5"], [])):
        run = tmp_path / str(number)
        assert call(train, *flags(run, text, *SMALL, "--steps", "3", *how, *more), monkeypatch=monkeypatch) == 0
        found.append(result(run))
    assert found[3] == found[0] and len(set(found)) == 3


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The servers that runs will make."""
    made: list[Any] = []

    def init(self: Any, *arguments: Any, original: Any = Session.__init__) -> None:
        original(self, *arguments)
        made.append(self.server)

    monkeypatch.setattr(Session, "__init__", init)
    return made


def test_asp_trains_without_a_norm_and_damped(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = watched(monkeypatch)
    more = ["--consistency", "asp", "--clip", "none", "--damping", "inverse"]
    assert call(train, *flags(tmp_path, text, *SMALL, *more), monkeypatch=monkeypatch) == 0
    (server,) = made
    assert server.setup.damping(4) == 0.25 and server.memories[0].version == 4 * STEPS
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == STEPS and all(record["gradient_norm"] is None for record in records)
    rates = [record["lr"] for record in records]
    assert rates.index(max(rates)) == 1 and rates[-1] < 0.1 * max(rates)  # a warm-up of two steps; then to zero


@pytest.mark.process
@pytest.mark.parametrize("how", [["--compress", "int8"], ["--compress", "topk:0.05", "--outer-lr", "1.5"]])
def test_a_compressed_run_goes_on_with_what_it_had_left_to_say(finished: tuple[Path, str], text: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch, how: list[str]) -> None:
    assert call(train, *flags(tmp_path, text, *SMALL, *how), monkeypatch=monkeypatch) == 0
    whole = result(tmp_path)
    assert whole != result(finished[0])
    (tmp_path / "report.json").unlink()
    for step in (STEPS, STEPS - 1):
        shutil.rmtree(next((tmp_path / "checkpoints").glob(f"*{step}")))
    more = ["--resume", "--workers", "3", "--shards", "1", "--driver", "processes"]
    assert call(train, *flags(tmp_path, text, *more), monkeypatch=monkeypatch) == 0
    assert result(tmp_path) == whole


def test_killed_at_any_step_and_resumed_it_ends_with_the_same_bits(finished: tuple[Path, str], text: Path,
                                                                   tmp_path: Path) -> None:
    killed = 0
    for kill_at, more in ((1, []), (5, ["--workers", "1"]), (8, ["--shards", "3"])):
        process = start(*flags(tmp_path, text, *SMALL, "--resume", *more))
        wait_for_step(tmp_path, kill_at, process)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed  # a slow machine may see the last of them end before it is killed, but not all
    process = start(*flags(tmp_path, text, "--resume"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert result(tmp_path) == result(finished[0])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to find the processes of a run")
def test_processes_of_a_run_may_be_killed(finished: tuple[Path, str], text: Path, tmp_path: Path) -> None:
    run = start(*flags(tmp_path, text, *SMALL, "--driver", "processes", "--trace", str(tmp_path / "trace.json")))
    for step, which in ((2, 0), (4, 1), (6, -1)):  # a coordinator, a shard, a worker: the order of their birth
        wait_for_step(tmp_path, step, run)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        os.kill(int(children.read_text().split()[which]), signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert result(tmp_path) == result(finished[0])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event.get("cat") == "death"] == 3 * ["dies by signal 9"]


def test_interrupt_saves_and_says_how_to_go_on(text: Path, tmp_path: Path) -> None:
    more = ["--steps", "100000", "--checkpoint-every", "100000", "--validate-every", "100000"]
    process = start(*flags(tmp_path, text, *SMALL, *more))
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    (saved,) = steps(tmp_path / "checkpoints")
    assert f"stopped at step {saved} of 100000; the checkpoint is written" in errors and "--resume" in errors


def test_a_time_limit_ends_in_a_report(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--steps", "100000", "--validate-every", "100000", "--minutes", "0.001", "--vocab", "270"]
    assert call(train, *flags(tmp_path, text, *SMALL, *more), monkeypatch=monkeypatch) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [report["steps_done"]] == steps(tmp_path / "checkpoints")[-1:]
    assert report["steps_done"] < 1000
    assert report["validation"]["bytes"] > report["validation"]["tokens"]  # byte pairs: tokens of several bytes


def test_a_finished_run_is_not_done_again(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, text: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = finished
    before = (run / "report.md").stat().st_mtime_ns
    assert call(train, *flags(run, text, "--resume"), monkeypatch=monkeypatch) == 0
    assert "this run is finished" in capsys.readouterr().err
    assert (run / "report.md").stat().st_mtime_ns == before


def test_a_disk_that_takes_no_more_is_one_line(text: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the same place, in the same way."""
    process = start(*flags(tmp_path, text, *SMALL, "--keep", "1"))
    wait_for_step(tmp_path, 2, process)
    process.kill()
    process.communicate()
    before = steps(tmp_path / "checkpoints")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    process = start(*flags(tmp_path, text, "--resume"), preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert f"the checkpoint of step {before[-1]} is intact" in errors.splitlines()[-1]
    assert steps(tmp_path / "checkpoints") == before


def test_what_has_diverged_takes_no_checkpoint_along(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps that learn, and then one that makes NaN of the parameters, whose loss nobody has seen yet."""
    def schedule(settings: Any) -> Any:
        return lambda step, name: {"lr": 1e-3 if step < 3 else 1e38, "weight_decay": 0.0}

    monkeypatch.setattr("tools.training.session.schedule", schedule)
    assert call(train, *flags(tmp_path, text, *SMALL, "--clip", "none", "--keep", "1"), monkeypatch=monkeypatch) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite after step 3: training has diverged; the last checkpoint is of step 2;" in last
    assert steps(tmp_path / "checkpoints") == [2]


def test_two_runs_in_one_folder_are_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    with run_lock(tmp_path):
        assert call(train, *flags(tmp_path, text, *SMALL), monkeypatch=monkeypatch) == 1
    assert f"another run (process {os.getpid()}) is writing" in capsys.readouterr().err


@pytest.mark.parametrize("more, message", [
    (["--width", "17"], "--width is 17, expected a multiple of twice --heads"),
    (["--layers", "0"], "--layers is 0, expected at least 1"),
    (["--seed", str(2**64)], "expected a whole number in [0, 2**63)"),
    (["--trace", "/nowhere/run.json"], "No such file or directory: '/nowhere/run.json'"),
    (["--lr", "-1"], "--lr is -1.0, expected a positive number"),
    (["--dropout", "1"], "--dropout is 1.0, expected a number from 0 to below 1"),
    (["--beta1", "1"], "--beta1 is 1.0, expected a number from 0 to below 1"),
    (["--driver", "mpi"], "--driver is mpi, expected threads, processes or ray"),
    (["--driver", "ray", "--compress", "int8", "--backups", "1"], "--compress is int8, expected none with --backups 1"),
    (["--zero", "4"], "--zero is 4, expected 1, 2 or 3"),
    (["--clip", "0"], "--clip is 0.0, expected a positive number"),
    (["--consistency", "asp"], "--consistency is asp, expected bsp or ssp, or --clip none"),
    (["--consistency", "asp", "--clip", "none", "--zero", "3"], "--zero is 3, expected 1 or 2 with --consistency asp"),
    (["--consistency", "asp", "--clip", "none", "--driver", "processes", "--compress", "int8"],
     "--compress is int8, expected none with --consistency asp and --driver processes"),
    (["--precision", "int8"], "--precision is int8, expected float32 or bfloat16"),
    (["--damping", "half"], "--damping is half, expected none or inverse"),
    (["--damping", "inverse"], "--damping is inverse, expected none with --consistency bsp"),
    (["--placement", "random"], "--placement is random, expected ranges or hashing"),
    (["--durability", "disk"], "--durability is disk, expected snapshot or log"),
    (["--durability", "snapshot", "--driver", "processes", "--consistency", "ssp:1"], "--durability is snapshot, "
     "expected log unless"),
    (["--durability", "log"], "--durability is log, expected --driver processes or ray with it"),
    (["--save-every", "2"], "--save-every is 2, expected --driver processes or ray with it"),
    (["--driver", "processes", "--save-every", "-1"], "--save-every is -1, expected at least 0"),
    (["--workers", "5"], "--workers is 5, expected at most --microbatches (4)"),
    (["--outer-lr", "0"], "--outer-lr is 0.0, expected a positive number"),
    (["--outer-lr", "2", "--zero", "3"], "--outer-lr is 2.0, expected none with --zero 3: every step"),
    (["--outer-lr", "2", "--backups", "1"], "--outer-lr is 2.0, expected none with --backups 1: every step"),
    (["--outer-lr", "2", "--consistency", "asp", "--clip", "none"], "--outer-lr is 2.0, expected none with --cons"),
    (["--compress", "zip"], "--compress is 'zip', expected fp16, bf16, int8"),
    (["--compress", "1bit"], "--compress is '1bit' and the rule AdamWRule"),
    (["--kv-heads", "3"], "--kv-heads is 3, expected a divisor of --heads"),
    (["--context", "4000"], "a context of 4000 needs at least 8001"),
    (["--data", "/nowhere"], "--data /nowhere: no such file or folder"),
    (["--minutes", "0"], "--minutes is 0.0, expected a positive number"),
])
def test_wrong_flags_are_one_line(text: Path, tmp_path: Path, more: list[str], message: str,
                                  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(train, *flags(tmp_path, text, *SMALL, *more), monkeypatch=monkeypatch) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: ") and message in last


def test_resume_refuses_what_would_change_the_result(finished: tuple[Path, str], text: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = finished
    assert call(train, *flags(run, text, "--resume", "--width", "32"), monkeypatch=monkeypatch) == 1
    assert "--width is 32, but the run to resume has 16" in capsys.readouterr().err
    assert call(train, *flags(run, text, *SMALL), monkeypatch=monkeypatch) == 1
    assert "already holds a run, at step 12; go on with --resume" in capsys.readouterr().err
    original = text.read_bytes()
    try:
        text.write_bytes(original + b"one more line\n")
        assert call(train, *flags(run, text, "--resume"), monkeypatch=monkeypatch) == 1
    finally:
        text.write_bytes(original)
    assert "the corpus has changed since the checkpoint" in capsys.readouterr().err


def test_generate_writes_the_same_text_for_the_same_seed(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    def written(*more: str) -> str:
        command = [str(finished[0]), "--prompt", "12 times", "--max-new-tokens", "40", *more]
        assert call(generate, *command, monkeypatch=monkeypatch) == 0
        return capsys.readouterr().out

    one = written("--top-k", "5", "--top-p", "0.9", "--repetition-penalty", "1.1")
    assert one.startswith("12 times") and len(one) > 20
    assert one == written("--top-k", "5", "--top-p", "0.9", "--repetition-penalty", "1.1")
    assert written("--temperature", "0") == written("--temperature", "0", "--seed", "5")
    several = written("--num-samples", "2")
    assert "sample 2 of 2" in several
    first = several.partition("\n")[2].partition("\n──")[0]
    assert written("--stop", first[12:14]) == first[:first.index(first[12:14], 8)] + "\n"
    assert call(generate, str(finished[0]), "--top-p", "0", monkeypatch=monkeypatch) == 1
    assert "--top-p is 0.0, expected a number above 0 and at most 1" in capsys.readouterr().err
    for program in (generate, evaluate):  # of width 16
        assert call(program, str(finished[0]), "--quantize", "q8_0", monkeypatch=monkeypatch) == 1
        assert "--quantize q8_0: for_inference: embedding: quantize: weight has shape" in capsys.readouterr().err
    assert call(generate, "/nowhere", monkeypatch=monkeypatch) == 1
    assert "no checkpoint here" in capsys.readouterr().err


def test_evaluate_agrees_with_the_report(finished: tuple[Path, str], text: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())["validation"]
    stride = str(report["stride"])
    assert call(evaluate, str(finished[0]), "--stride", stride, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == report
    other = tmp_path / "other.txt"
    other.write_bytes(b"3 times 3 is 9\n" * 4)
    assert call(evaluate, str(finished[0]), "--data", str(other), monkeypatch=monkeypatch) == 0
    assert "on 59 tokens (59 bytes)" in capsys.readouterr().out
    assert call(evaluate, str(finished[0]), "--stride", "17", monkeypatch=monkeypatch) == 1
    assert "--stride is 17, expected 1 to 16" in capsys.readouterr().err
