"""The long run: slices, the ledger, going on after a stop, and that a failure is kept with its reproduction."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from engine.testing import CheckFailure
from tools import nightly
from tools.nightly import Job, Ledger


def small(seen: list[Any], fails_at: int = 10**9) -> Job:
    def body(x: int) -> None:
        seen.append(x)
        if x >= fails_at:
            raise CheckFailure("small", got=x, want="less", reproduction="print(1)")
    return Job("small", "op", 50, 20, nightly._drawn(st.integers(0, 10**6), body))


def test_slices_add_up_and_a_new_run_goes_on(tmp_path: Path) -> None:
    seen: list[int] = []
    job, path = small(seen), tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.add(nightly.run_slice(job, ledger.seed(job), 20))
    assert len(seen) == 20 and ledger.left(job, False) == 30
    path.write_text(path.read_text() + '{"check": "small", "op": "op", "exam')  # a stop in the middle of a line
    assert nightly.run([job], Ledger(path), minutes=5) == 0
    lines = Ledger(path).lines
    assert [line["examples"] for line in lines] == [20, 20, 10] and [line["seed"] for line in lines] == [0, 1, 2]
    assert all(line["commit"] == nightly.commit() and line["failures"] == [] for line in lines)
    assert len(set(seen[:20]) & set(seen[20:40])) < 15, "another seed draws other examples"
    assert nightly.run([job], Ledger(path), minutes=5) == 0 and len(seen) == 50
    assert "50" in nightly.table(Ledger(path), [job], False)


def test_a_failure_is_kept_shrunk_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, ledger = small([], fails_at=1000), Ledger(tmp_path / "ledger.jsonl")
    assert nightly.run([job], ledger, minutes=5) == 1
    assert "small op, seed 0: CheckFailure: small: got 1000" in capsys.readouterr().out
    assert "print(1)" in json.loads(ledger.path.read_text())["failures"][0]
    assert ledger.left(job, False) == 0 and nightly.run([job], ledger, minutes=5) == 0


def test_other_commits_count_when_asked_for(tmp_path: Path) -> None:
    job, ledger = small([]), Ledger(tmp_path / "ledger.jsonl")
    ledger.add({**nightly.run_slice(job, 0, 20), "commit": "another"})
    assert ledger.left(job, False) == 50 and ledger.left(job, True) == 30 and ledger.seed(job) == 1


def test_what_is_exhausted_is_done(tmp_path: Path) -> None:
    job, ledger = Job("few", "", 50, 20, nightly._drawn(st.booleans(), lambda x: None)), Ledger(tmp_path / "l.jsonl")
    assert nightly.run([job], ledger, minutes=5) == 0
    assert len(ledger.lines) == 1 and ledger.lines[0]["exhausted"] and ledger.lines[0]["examples"] == 2


def test_every_job_runs(tmp_path: Path) -> None:
    """One example of a few of each kind; there are jobs for every row."""
    every = nightly.jobs()
    assert len(every) > 500 and len({job.key for job in every}) == len(every)
    for job in [*every[:3], next(j for j in every if j.check == "batch_invariance")]:
        line = nightly.run_slice(job, 0, 2)
        assert line["failures"] == [] and line["examples"] >= 1, line


@pytest.mark.parametrize(("words", "message"), [(["--only", "no such op"], "no check or op contains"),
                                                (["--minutes", "0"], "expected a positive number")])
def test_bad_arguments_give_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["nightly.py", *words])
    with pytest.raises(SystemExit):
        nightly.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
