"""Checkpoints: what is read is what was written, and no failed write damages the last one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.training import checkpoint
from tools.training.checkpoint import Checkpoint, arrays_digest, locate, read, run_lock, save, steps
from tools.training.errors import ProgramError
from tools.training.tokens import TOKENIZER_FILE, BPETokenizer, ByteTokenizer

pytest.importorskip("safetensors")


def example(step: int) -> Checkpoint:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3) + step
    return Checkpoint(model={"w": weights.T, "b": np.zeros(0, np.float32)}, optimizer={"exp_avg": weights * 2},
                      config={"width": 3}, facts={"step": step, "seed": 7, "seconds": 1.5, "settings": {},
                                                    "corpus": {"data": None, "sha256": "0" * 64},
                                                    "kernels": "v4"})


def store(folder: Path, step: int, keep: int = 3) -> Path:
    return save(folder, example(step), ByteTokenizer(), keep)


def test_round_trip_and_keep_last(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        store(tmp_path, step, keep=2)
    assert steps(tmp_path) == [3, 10]
    loaded = read(locate(tmp_path), optimizer=True)
    assert loaded.step == 10 and loaded.facts["seed"] == 7 and loaded.config == {"width": 3}
    assert arrays_digest(loaded.model) == arrays_digest(example(10).model)
    assert arrays_digest(loaded.optimizer) == arrays_digest(example(10).optimizer)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert locate(tmp_path / "step-000003") == tmp_path / "step-000003"


def test_digest_sees_every_bit() -> None:
    arrays = example(0).model
    same = {name: array.copy() for name, array in reversed(arrays.items())}
    assert arrays_digest(arrays) == arrays_digest(same)
    same["w"] = same["w"].copy()
    same["w"][0, 0] = -0.0  # equal to 0.0, and another bit pattern
    assert arrays_digest(arrays) != arrays_digest(same)


@pytest.mark.parametrize("failing_call", range(5))
def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, failing_call: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 1)
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        if calls == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        calls += 1
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    with pytest.raises(ProgramError, match=r"step-000002: No space left on device; the checkpoint of step 1 is intact"):
        store(tmp_path, 2)
    monkeypatch.undo()
    assert steps(tmp_path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert read(locate(tmp_path)).step == 1


def test_a_write_that_was_killed_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    store(tmp_path, 1)
    half = tmp_path / ".step-000002.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half of it")
    assert steps(tmp_path) == [1]
    store(tmp_path, 2)
    assert steps(tmp_path) == [1, 2] and not half.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damage_is_noticed(tmp_path: Path, name: str) -> None:
    folder = store(tmp_path, 4)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ProgramError, match=f"step-000004 is damaged: {name} is not what was written"):
        read(folder)


def test_a_tokenizer_that_is_missing_or_changed_is_noticed(tmp_path: Path) -> None:
    """Without one, tokens would be taken for bytes."""
    pytest.importorskip("tokenizers")
    folder = save(tmp_path, example(4), BPETokenizer.train([b"ab ab cd\n" * 9], 260), 3)
    path = folder / TOKENIZER_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b" ")
    with pytest.raises(ProgramError, match=r"is damaged: tokenizer\.json is not what was written"):
        read(folder)
    path.unlink()
    with pytest.raises(ProgramError, match=r"cannot read the checkpoint .*tokenizer\.json"):
        read(folder)
    path.write_bytes(whole)
    assert read(folder).step == 4
    store(tmp_path, 5)
    (tmp_path / "step-000005" / TOKENIZER_FILE).write_bytes(whole)  # another run's
    with pytest.raises(ProgramError, match=r"is damaged: tokenizer\.json"):
        read(tmp_path / "step-000005")


def test_missing_checkpoints_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="no checkpoint here"):
        locate(tmp_path / "nothing")
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(ProgramError, match="cannot read the checkpoint"):
        read(locate(tmp_path))


def test_the_lock_is_for_one_process_and_ends_with_it(tmp_path: Path) -> None:
    program = ("import sys, time; from pathlib import Path; from tools.training.checkpoint import run_lock\n"
               "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ProgramError, match=f"another run .process {holder.pid}. is writing"), run_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with run_lock(tmp_path):
        pass
