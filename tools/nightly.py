"""The long run of the laboratory: thousands of examples a check, in slices, with a ledger; goes on where it stopped.

    python tools/nightly.py                    until everything is done (a night and more)
    python tools/nightly.py --minutes 30       what fits; those that have had the fewest examples first
    python tools/nightly.py --only softmax     jobs whose check or op contains a word
    python tools/nightly.py --table            what the ledger says, and run nothing

| job | examples |
|---|---|
| each check of each row (engine/testing/row_checks.py) | 10,000, or all there are |
| random programs | 20,000 |
| traces of optimizers | 10,000 |
| lives of tensors, of 100 steps | 125 |

The ledger (build/nightly.jsonl) has one line a slice: check, op, examples, seed, commit, seconds, failures, and whether
there were no more examples to draw. Work counts for the commit that it was done on, or with --any-commit for all. A job
that failed is not run again on that commit. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

import engine.testing.rows  # noqa: F401  (registers the engine's rows)
from engine.testing import specs
from engine.testing.programs import check_program
from engine.testing.row_checks import CHECKS, RowCheck
from engine.testing.strategies import EngineMachine, optim_traces, programs, row_examples
from engine.testing.traces import check_trace
from tools.training.errors import run_program

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, PROGRAMS, LIVES, STEPS = 10_000, 20_000, 125, 100


@dataclass(frozen=True)
class Job:
    """run(settings, seed) draws as many examples as the settings say; it counts them by calling tick."""

    check: str
    op: str
    target: int
    slice: int
    run: Callable[[Any, int, Callable[[], None]], None]

    @property
    def key(self) -> tuple[str, str]:
        return self.check, self.op


# ── what there is to do ───────────────────────────────────────────────────────────────────────────────

def _drawn(strategy: Any, body: Callable[[Any], None]) -> Callable[[Any, int, Callable[[], None]], None]:
    """A job that gives body what the strategy draws."""
    def run(chosen: Any, number: int, tick: Callable[[], None]) -> None:
        def example(drawn: Any) -> None:
            tick()
            body(drawn)
        seed(number)(chosen(given(strategy)(example)))()
    return run


def _row(check: RowCheck, spec: Any) -> Job:
    return Job(check.name, spec.name, EXAMPLES, 200,
               _drawn(row_examples(check, spec), lambda drawn: check.run(spec, drawn)))


def _lives(chosen: Any, number: int, tick: Callable[[], None]) -> None:
    class Life(EngineMachine):
        def __init__(self) -> None:
            tick()
            super().__init__()

    seed(number)(Life)
    run_state_machine_as_test(Life, settings=settings(chosen, stateful_step_count=STEPS))


def jobs() -> list[Job]:
    traces = st.tuples(optim_traces(), st.sampled_from(["float32", "float64"]), st.sampled_from(["cpu", "reference"]))
    return [
        Job("programs", "", PROGRAMS, 100,
            _drawn(st.tuples(programs(), st.integers(0, 99)),
                   lambda drawn: check_program(drawn[0], second_order=drawn[1] % 4 == 3, seed=drawn[1]))),
        Job("optimizers", "", EXAMPLES, 200, _drawn(traces, lambda drawn: check_trace(*drawn))),
        Job("lives", "", LIVES, 5, _lives),
        *[_row(check, spec) for spec in specs.values() for check in CHECKS.values() if check.applies(spec)]]


# ── one slice ─────────────────────────────────────────────────────────────────────────────────────────

def run_slice(job: Job, number: int, examples: int) -> dict[str, Any]:
    """Run a slice, and give its line of the ledger. Failures are texts, each with its shrunk reproduction."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    chosen = settings(max_examples=examples, database=None, deadline=None, print_blob=False,
                      phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    start, failures = time.monotonic(), []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            job.run(chosen, number, tick)
    except Exception as error:  # whatever it is, it is the finding
        failures = ["\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])]
    return {"check": job.check, "op": job.op, "examples": min(count, examples), "seed": number, "commit": commit(),
            "seconds": round(time.monotonic() - start, 2), "failures": failures,
            "exhausted": not failures and count < examples}


_commit: list[str] = []


def commit() -> str:
    """The commit of the checkout, with a + if something is not committed."""
    if not _commit:
        def git(*words: str) -> str:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else ""
        changed = git("status", "--porcelain", "--untracked-files=no")
        _commit.append((git("rev-parse", "--short=12", "HEAD") or "none") + ("+" if changed else ""))
    return _commit[0]


# ── the ledger ────────────────────────────────────────────────────────────────────────────────────────

class Ledger:
    """Lines of JSON; a line that was cut off by a stop counts for nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                self.lines.append(json.loads(line))

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut and self.path.stat().st_size else "") + json.dumps(line, ensure_ascii=False) + "\n")

    def of(self, job: Job, any_commit: bool) -> list[dict[str, Any]]:
        return [line for line in self.lines if (line["check"], line["op"]) == job.key
                and (any_commit or line["commit"] == commit())]

    def left(self, job: Job, any_commit: bool) -> int:
        """Examples that a job still has to run; 0 also where there are no more, or it has failed here."""
        lines = self.of(job, any_commit)
        if any(line["exhausted"] for line in lines) or any(line["failures"] for line in self.of(job, False)):
            return 0
        return max(0, job.target - sum(line["examples"] for line in lines))

    def seed(self, job: Job) -> int:
        """One that this job has not had."""
        return len(self.of(job, True))


def table(ledger: Ledger, chosen: Iterable[Job], any_commit: bool) -> str:
    """Per check: jobs, how many are done, examples, seconds, failures; and the whole."""
    rows: dict[str, list[float]] = {}
    for job in chosen:
        lines = ledger.of(job, any_commit)
        row = rows.setdefault(job.check, [0, 0, 0, 0, 0])
        failed = sum(len(line["failures"]) for line in lines)
        more = [1, not ledger.left(job, any_commit), sum(line["examples"] for line in lines),
                sum(line["seconds"] for line in lines), failed]
        rows[job.check] = [a + b for a, b in zip(row, more)]
    text = [f"{'check':20}{'jobs':>6}{'done':>6}{'examples':>12}{'minutes':>9}{'failures':>10}"]
    rows["all"] = [sum(column) for column in zip(*rows.values())]
    for name, (count, done, examples, seconds, failures) in rows.items():
        text.append(f"{name:20}{count:6.0f}{done:6.0f}{examples:12,.0f}{seconds / 60:9.1f}{failures:10.0f}")
    total = sum(line["examples"] for line in ledger.lines)
    commits = len({line["commit"] for line in ledger.lines})
    return "\n".join([*text, f"{total:,} examples in the ledger, of {commits} commits; this is {commit()}"])


def run(chosen: list[Job], ledger: Ledger, minutes: float, any_commit: bool = False) -> int:
    """Slices of the jobs with the smallest share done, until time is up or all is done. The number of failures."""
    end, failures = time.monotonic() + 60 * minutes, 0
    left = {job: ledger.left(job, any_commit) for job in chosen}
    while time.monotonic() < end:
        open_jobs = [job for job in chosen if left[job]]
        if not open_jobs:
            break
        job = max(open_jobs, key=lambda j: left[j] / j.target)
        line = run_slice(job, ledger.seed(job), min(job.slice, left[job]))
        ledger.add(line)
        left[job] = ledger.left(job, any_commit)
        for failure in line["failures"]:
            failures += 1
            print(f"{job.check} {job.op}, seed {line['seed']}: {failure}\n", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--only", metavar="WORD", action="append", help="jobs whose check or op contains it")
    parser.add_argument("--any-commit", action="store_true", help="what was done on other commits counts as well")
    parser.add_argument("--table", action="store_true", help="print the ledger's table and run nothing")
    parser.add_argument("--ledger", type=Path, default=ROOT / "build" / "nightly.jsonl")
    arguments = parser.parse_args()
    chosen = [job for job in jobs()
              if not arguments.only or any(word in f"{job.check} {job.op}" for word in arguments.only)]
    if not chosen:
        parser.error(f"--only: no check or op contains {' or '.join(arguments.only)}")
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes}, expected a positive number")
    ledger = Ledger(arguments.ledger)
    failures = 0
    with contextlib.suppress(KeyboardInterrupt):
        failures = 0 if arguments.table else run(chosen, ledger, arguments.minutes, arguments.any_commit)
    print(table(ledger, chosen, arguments.any_commit))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_program("nightly", main))
