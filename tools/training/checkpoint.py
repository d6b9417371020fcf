"""Checkpoints that a crash, a full disk or a second run cannot damage.

A checkpoint is a folder step-000400/ with

    model.safetensors       the parameters                config.json     the model's configuration
    optimizer.safetensors   the optimizer's state         tokenizer.json  the tokenizer, unless it is bytes
    training.json           step, flags, data position and generator, versions, and the SHA-256 of the files above

It is written under a hidden temporary name, every file and the folder are flushed to the disk (fsync), and only
then it is renamed. So a folder with the right name is complete, whatever happened while it was made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import sync_folder, write_durably
from tools.training.errors import ProgramError, json_object, require
from tools.training.tokens import TOKENIZER_FILE, Tokenizer

Arrays = dict[str, np.ndarray]
FACTS = "training.json"


@dataclass
class Checkpoint:
    """What one folder holds."""

    model: Arrays
    optimizer: Arrays
    config: dict[str, Any]
    facts: dict[str, Any]  # training.json

    @property
    def step(self) -> int:
        return int(self.facts["step"])


def arrays_digest(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and bytes in the order of names: equal for equal bits, and only then."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        total.update(array.tobytes())
    return total.hexdigest()


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────

def save(parent: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, keep: int) -> Path:
    """Write step-<n> below parent, then remove all but the newest `keep` checkpoints.

    Raises ProgramError with one line when the disk is full or cannot be written; older checkpoints stay as they are.
    """
    to_bytes = require("safetensors.numpy", "writing a checkpoint").save
    final = parent / f"step-{checkpoint.step:06d}"
    temporary = parent / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_durably(temporary / "model.safetensors", to_bytes(contiguous(checkpoint.model), {"format": "np"}))
        write_durably(temporary / "optimizer.safetensors", to_bytes(contiguous(checkpoint.optimizer)))
        write_durably(temporary / "config.json", json.dumps(checkpoint.config, indent=1).encode())
        tokenizer.save(temporary)
        hashes = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
        facts = {**checkpoint.facts, "sha256": hashes}
        write_durably(temporary / FACTS, json.dumps(facts, indent=1).encode())
        sync_folder(temporary)
        if final.exists():
            discard(final)
        os.replace(temporary, final)
        sync_folder(parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = steps(parent)
        rest = f"the checkpoint of step {kept[-1]} is intact" if kept else "no checkpoint was written before"
        raise ProgramError(f"cannot write the checkpoint {final}: {error.strerror}; {rest}") from error
    for step in steps(parent)[:-keep]:
        discard(parent / f"step-{step:06d}")
    return final


def contiguous(arrays: Arrays) -> Arrays:
    """The library writes an array's memory as it lies, so strided views are copied first."""
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def discard(folder: Path) -> None:
    """Remove a checkpoint. It loses its name first, so a half-removed one is never taken for a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────

def steps(parent: Path) -> list[int]:
    """The steps of the checkpoints below parent, oldest first."""
    try:
        names = [path.name for path in parent.iterdir()]
    except OSError:
        return []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name)))


def locate(path: Path) -> Path:
    """The checkpoint folder that a person means: itself, or the newest of a run or of a checkpoints folder."""
    for parent in (path, path / "checkpoints"):
        if (parent / FACTS).is_file():
            return parent
        if found := steps(parent):
            return parent / f"step-{found[-1]:06d}"
    raise ProgramError(f"{path}: no checkpoint here; expected a run folder, or a folder step-<n> with a {FACTS}")


def read(folder: Path, optimizer: bool = False) -> Checkpoint:
    """Load a checkpoint folder, its files held against their SHA-256. The optimizer's state only if asked for."""
    from_bytes = require("safetensors.numpy", "reading a checkpoint").load
    damage = require("safetensors", "reading a checkpoint").SafetensorError
    try:
        facts = json_object((folder / FACTS).read_bytes())
        check_facts(facts)
        hashes = facts["sha256"]

        def checked(name: str) -> bytes:
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != hashes.get(name):
                raise ProgramError(f"the checkpoint {folder} is damaged: {name} is not what was written; "
                                   "remove this folder to go on from the one before")
            return data

        if TOKENIZER_FILE in hashes or (folder / TOKENIZER_FILE).exists():  # without one, tokens are bytes
            checked(TOKENIZER_FILE)
        return Checkpoint(model=from_bytes(checked("model.safetensors")),
                          optimizer=from_bytes(checked("optimizer.safetensors")) if optimizer else {},
                          config=json_object(checked("config.json")), facts=facts)
    except (OSError, ValueError, KeyError, TypeError, damage) as error:
        raise ProgramError(f"cannot read the checkpoint {folder}: {error}") from error


def check_facts(facts: dict[str, Any]) -> None:
    """Raise ValueError unless training.json has what a run that goes on takes from it."""
    kinds: dict[str, Any] = {"step": int, "seconds": (int, float), "settings": dict, "corpus": dict, "sha256": dict,
                             "kernels": str}
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind) or isinstance(facts[name], bool):
            raise ValueError(f"{FACTS}: {name} is {facts.get(name)!r}")
    data, sha256 = facts["corpus"].get("data"), facts["corpus"].get("sha256")
    if not isinstance(data, (str, type(None))) or not isinstance(sha256, str):
        raise ValueError(f"{FACTS}: corpus is {facts['corpus']!r}")


# ── one run at a time ─────────────────────────────────────────────────────────────────────────────────

@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder. The lock belongs to the process, so it ends with it, also when it is killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ProgramError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(lock, 20).decode().strip() or "unknown"
            raise ProgramError(f"another run (process {holder}) is writing to {folder}; wait for it, stop it, "
                               "or choose another folder with --run") from None
        try:
            os.truncate(lock, 0)
            os.write(lock, f"{os.getpid()}\n".encode())
        except OSError as error:
            raise ProgramError(f"cannot write to the run folder {folder}: {error.strerror}") from error
        yield
    finally:
        os.close(lock)
