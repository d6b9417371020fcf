"""Everything that reads files, on a few hundred damaged ones; and that the fuzzer notices what a reader does wrong."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from limited import limited_memory

from tools import fuzz
from tools.fuzz import Finding, changed, changed_json, plain, taken

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from tools.fuzz_targets import TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_taken_or_refused(name: str, tmp_path: Path) -> None:
    """Also, the seeds are right: they are taken."""
    target, counts = TARGETS[name], [0, 0]
    if name != "wire":  # its seeds are changed messages
        assert all(taken(target, seed, tmp_path) for seed in target.seeds(tmp_path))

    def report(data: bytes, found: bool | None) -> None:
        if found is not None:
            counts[found] += 1

    plain(target, tmp_path, 0, report, inputs=200)
    assert sum(counts) == 200 and (counts[0] > 9 or not target.refusals)


def reading(read: Callable[[bytes, Path], Any]) -> Target:
    return Target("mine", lambda folder: [b'{"a": [1, "x"]}'], read, (ValueError,))


def two_lines(data: bytes, folder: Path) -> None:
    raise ValueError("one\ntwo")


def long_line(data: bytes, folder: Path) -> None:
    raise ValueError("x" * (fuzz.LINE + 1))


def no_words(data: bytes, folder: Path) -> None:
    raise ValueError


def greedy(data: bytes, folder: Path) -> None:
    bytearray(2 << 30)


def endless(data: bytes, folder: Path) -> None:
    while True:
        try:
            time.sleep(0)
        except Exception:  # what a careless reader does
            pass


def late(data: bytes, folder: Path) -> None:
    """What takes too long and says so to nobody."""
    try:
        endless(data, folder)
    except BaseException:
        pass


@pytest.mark.parametrize(("read", "words"), [
    (lambda data, folder: data["x"], "TypeError"), (lambda data, folder: "x".encode("no code"), "LookupError"),
    (lambda data, folder: b"\xff".decode(), "UnicodeDecodeError"), (two_lines, "not one line"),
    (long_line, "not one line"), (no_words, "not one line"),
    pytest.param(greedy, "MemoryError", marks=limited_memory),
    (lambda data, folder: sys.exit(), "SystemExit"), (endless, "_Hang: more than 0.2 seconds"),
    (late, "^more than 0.2 seconds")])
def test_what_a_reader_does_wrong_is_found(read: Any, words: str, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass of a type is another type: UnicodeDecodeError says nothing of the file."""
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    with pytest.raises(Finding, match=words):
        plain(reading(read), tmp_path, 0, lambda data, found: None, inputs=1)


def test_coverage_is_of_every_reader() -> None:
    """libFuzzer is led by the branches of all that the targets import."""
    lines = Path(fuzz.__file__).with_name("fuzz_targets.py").read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1] for line in lines if line.startswith(("from engine.", "from tools."))}
    assert len(imported) > 10
    assert {name for name in imported if not name.startswith((*fuzz.READERS, *fuzz.TARGETS_OF))} == set()
    for name in TARGETS:
        assert TARGETS[name].read.__module__ in fuzz.TARGETS_OF


def test_changes_reach_every_entry_and_head() -> None:
    random, seen = Random(0), set()
    for _ in range(300):
        seen.add(json.dumps(changed_json(random, {"a": [1, "x"], "b": {"c": 2.5}})))
    assert len(seen) > 100 and '{"b": {"c": 2.5}}' in seen and '{"a": [1, "x"], "b": {}}' in seen
    head = b'{"w":{"shape":[2]}}'
    data = len(head).to_bytes(8, "little") + head + b"12345678"
    found = [changed(random, data, data) for _ in range(200)]
    heads = [int.from_bytes(x[:8], "little") for x in found]
    assert sum(x.endswith(b"12345678") and 8 + n + 8 == len(x) and n != len(head) for n, x in zip(heads, found)) > 20


@pytest.mark.parametrize("crash", [False, True])
def test_a_run_and_its_line(crash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies is a finding, and the input that it died of is kept."""
    monkeypatch.setattr(fuzz, "ROOT", tmp_path)

    def read(data: bytes, folder: Path) -> None:
        if crash and b"x" not in data:
            faulthandler.disable()  # or the child's stack lies among what pytest prints
            os.abort()

    monkeypatch.setitem(TARGETS, "mine", reading(read))
    line = fuzz.run("mine", 3, 1.0, coverage=False)
    assert line["target"] == "mine" and line["seed"] == 3 and line["taken"] > 0 and line["refused"] == 0
    kept = list((tmp_path / "build" / "fuzz" / "mine").glob("finding-*"))
    assert len(kept) == int(crash) and bool(line["finding"]) == crash
    if crash:
        assert kept[0].name in line["finding"] and b"x" not in kept[0].read_bytes()
    row = fuzz.table([line], ["mine"]).splitlines()[1].split()
    assert row[0] == "mine" and row[1] == f"{line['taken']:,}" and row[-1] == str(int(crash))
