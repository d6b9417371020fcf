"""Damaged, foreign and hostile files for everything that reads files: each is taken or refused, in one line.

    python tools/fuzz.py                          every target for a minute; goes on with new inputs each time
    python tools/fuzz.py checkpoint wire --minutes 30    targets whose name contains a word, so long each
    python tools/fuzz.py --table                  what the ledger says, and run nothing

What must hold of every input of a target (tools/fuzz_targets.py):

    it is taken, or refused by an error of exactly the types that the target names, with one line
    it costs no more than SECONDS of the processor, and no more memory than LIMIT

Inputs are right files, changed: bits, cuts, splices, lengths, and, where they are JSON or have a JSON head, entries of
other types, sizes and names. Where atheris is installed (the fuzz extra) libFuzzer changes them too, led by coverage,
with a corpus that is kept (build/fuzz/<target>/corpus); --plain does without. A finding's input is kept beside it.

The ledger (build/fuzz.jsonl) has one line a run: target, seed, inputs taken and refused, seconds, commit, finding.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from tools.training.errors import run_program

if TYPE_CHECKING:
    from tools.fuzz_targets import Target

ROOT = Path(__file__).resolve().parent.parent
SECONDS, LIMIT, LINE = 10, 1 << 30, 1000  # of processor time an input; bytes of a run; letters of a refusal
READERS = ("engine.models", "engine.sharder", "tools.planning", "tools.training")  # whose branches lead libFuzzer
TARGETS_OF = ("tools.fuzz_targets", "tools.fuzz_wire")


class Finding(Exception):
    """What should not be."""


class _Hang(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


# ── what must hold ────────────────────────────────────────────────────────────────────────────────────

def taken(target: Target, data: bytes, folder: Path) -> bool:
    """Whether the target takes the input. Raises Finding unless it does, or refuses it as it should."""
    rung: list[_Hang] = []
    try:
        with _timer(rung):
            target.read(data, folder)
        found = True
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if type(error) not in target.refusals:
            raise Finding(f"{type(error).__name__}: {error}") from error
        line = str(error)
        if not line or "\n" in line or len(line) > LINE:
            raise Finding(f"not one line: {line!r}") from error
        found = False
    if rung:
        raise Finding(str(rung[0]))
    return found


@contextlib.contextmanager
def _timer(rung: list[_Hang]) -> Iterator[None]:
    """Raises _Hang when the time is over, and puts it into `rung`, for a reader may swallow it."""
    def hang(*_: Any) -> None:
        rung.append(_Hang(f"more than {SECONDS} seconds of the processor"))
        raise rung[0]

    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """No more than LIMIT beyond what the process has now."""
    before, pages = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if pages.exists():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ── changes ───────────────────────────────────────────────────────────────────────────────────────────

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 1.5, 1e999, -1e999, 1 << 31, 1 << 63, 10**30, -(10**30), "", "x", "\n", "\0",
    "\ud800", "../x", "x" * 5000, [], {}, [1], {"x": 1}, [[]], "F32", "uint8", "object", "f4")
BLOBS = (b"", b"[" * 100_000, b'{"a":' * 50_000, b"\xff" * 20, b"9" * 5000, b'"\\ud800"')


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def changed_json(random: Random, value: Any) -> Any:
    """The value with one entry replaced, removed, renamed, nested or added."""
    path = random.choice(list(_paths(value)))
    if not path:
        return random.choice(ODD) if random.random() < 0.2 else value
    parent, key = value, path[-1]
    for step in path[:-1]:
        parent = parent[step]
    how = random.randrange(6)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[random.choice([str(odd) for odd in ODD] + [str(key) + "x"])] = parent.pop(key)
    elif how == 2:
        parent[key] = [parent[key]] if random.random() < 0.5 else {"x": parent[key]}
    elif how == 3 and isinstance(parent[key], int):
        parent[key] += random.choice((-1, 1, 7, 1 << 20))
    else:
        parent[key] = random.choice(ODD)
    return value


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def changed(random: Random, data: bytes, other: bytes) -> bytes:
    """A few changes: of a JSON text, of a JSON head with its length before it (safetensors), or of bytes."""
    from tools.fuzz_wire import changed as changed_bytes

    how = random.random()
    head = int.from_bytes(data[:8], "little")
    with contextlib.suppress(ValueError, RecursionError):
        if how < 0.03:
            return random.choice((*BLOBS, random.randbytes(40)))
        if how < 0.6:
            found = json.loads(data)
            for _ in range(random.choice((1, 1, 2, 4))):
                found = changed_json(random, found)
            return _dumped(found)
    with contextlib.suppress(ValueError, RecursionError):
        if how < 0.6 and 8 + head <= len(data):
            text = _dumped(changed_json(random, json.loads(data[8:8 + head])))
            return len(text).to_bytes(8, "little") + text + data[8 + head:]
    return changed_bytes(random, data, other)


# ── two ways to make inputs ───────────────────────────────────────────────────────────────────────────

Report = Callable[[bytes, bool | None], None]


def plain(target: Target, folder: Path, seed: int, report: Report, inputs: float = float("inf"),
          seconds: float = float("inf")) -> None:
    """Seeds, then changed seeds and changes of what was taken; report(input, None) goes before each check."""
    random, pool, end, count = Random(seed), target.seeds(folder), time.monotonic() + seconds, 0
    with bounded_memory():
        while count < inputs and time.monotonic() < end:
            other = random.choice(pool)
            data = pool[count] if count < len(pool) and count < 3 else changed(random, random.choice(pool), other)
            report(data, None)
            found = taken(target, data, folder)
            report(data, found)
            if found and len(pool) < 1000 and random.random() < 0.1:
                pool.append(data)
            count += 1


def led_by_coverage(name: str, folder: Path, seed: int, report: Report, seconds: float) -> None:
    """libFuzzer, by way of atheris, which instruments what it imports. Ends the process."""
    import atheris

    for module in [module for module in sys.modules if module.startswith((*READERS, *TARGETS_OF))]:
        del sys.modules[module]  # so that they are imported once more
    with atheris.instrument_imports(include=[*READERS, *TARGETS_OF]):
        from tools.fuzz_targets import TARGETS
    target, corpus = TARGETS[name], place_of(name) / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in target.seeds(folder):
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)

    def one_input(data: bytes) -> None:
        report(data, None)
        report(data, taken(target, data, folder))

    def mutate(data: bytes, limit: int, number: int) -> bytes:
        random = Random(number)
        return changed(random, data, data)[:limit] if random.random() < 0.5 else atheris.Mutate(data, limit)

    options = {"max_total_time": max(1, int(seconds)), "seed": seed + 1, "max_len": 1 << 16, "timeout": 30 * SECONDS,
               "rss_limit_mb": LIMIT >> 19, "verbosity": 0, "artifact_prefix": "/dev/null"}
    atheris.Setup(["fuzz", str(corpus), *(f"-{name}={value}" for name, value in options.items())], one_input,
                  custom_mutator=mutate)
    atheris.Fuzz()


# ── a run, in a process of its own, and the ledger ────────────────────────────────────────────────────

def place_of(name: str) -> Path:
    return ROOT / "build" / "fuzz" / name.replace("/", "-")


def run(name: str, seed: int, seconds: float, coverage: bool) -> dict[str, Any]:
    """Fuzz a target for a while, and give the ledger's line. A crash is a finding like any other."""
    context = multiprocessing.get_context("fork")
    counts, start = context.Array("q", 2), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as path:
        folder = Path(path)
        last, message = folder / "last-input", folder / "finding"

        def report(data: bytes, found: bool | None) -> None:
            if found is None:
                last.write_bytes(data)
            else:
                counts[int(found)] += 1

        def work() -> None:
            try:
                inner = folder / "work"
                inner.mkdir()
                if coverage:
                    led_by_coverage(name, inner, seed, report, seconds)
                else:
                    from tools.fuzz_targets import TARGETS
                    plain(TARGETS[name], inner, seed, report, seconds=seconds)
            except Finding as finding:
                message.write_text(str(finding), errors="replace")
                os._exit(1)

        child = context.Process(target=work)
        child.start()
        child.join()
        text = message.read_text() if message.exists() else f"exit status {child.exitcode}" if child.exitcode else ""
        if text and last.exists():
            place_of(name).mkdir(parents=True, exist_ok=True)
            kept = place_of(name) / f"finding-{hashlib.sha1(last.read_bytes()).hexdigest()[:12]}"
            kept.write_bytes(last.read_bytes())
            text += f"; input {kept.relative_to(ROOT)}"
    return {"target": name, "seed": seed, "taken": counts[1], "refused": counts[0], "coverage": coverage,
            "seconds": round(time.monotonic() - start, 1), "finding": text}


def table(lines: list[dict[str, Any]], names: list[str]) -> str:
    text = [f"{'target':34}{'inputs':>12}{'taken':>12}{'refused':>12}{'minutes':>9}{'findings':>10}"]
    for name in names:
        own = [line for line in lines if line["target"] == name]
        accepted, refused = sum(line["taken"] for line in own), sum(line["refused"] for line in own)
        text.append(f"{name:34}{accepted + refused:12,}{accepted:12,}{refused:12,}"
                    f"{sum(line['seconds'] for line in own) / 60:9.1f}{sum(bool(line['finding']) for line in own):10}")
    return "\n".join(text)


def main() -> int:
    from tools.fuzz_targets import TARGETS
    from tools.nightly import Ledger, commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="WORD", help=f"parts of names: {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each target")
    parser.add_argument("--plain", action="store_true", help="without libFuzzer, even where atheris is installed")
    parser.add_argument("--table", action="store_true", help="print what the ledger says and run nothing")
    parser.add_argument("--ledger", type=Path, default=ROOT / "build" / "fuzz.jsonl")
    arguments = parser.parse_args()
    chosen = [name for name in TARGETS if not arguments.names or any(word in name for word in arguments.names)]
    if not chosen:
        parser.error(f"no target's name contains {' or '.join(arguments.names)}; there are {', '.join(TARGETS)}")
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes}, expected a positive number")
    ledger, findings = Ledger(arguments.ledger), 0
    coverage = not arguments.plain and importlib.util.find_spec("atheris") is not None
    with contextlib.suppress(KeyboardInterrupt):
        for name in [] if arguments.table else chosen:
            seed = sum(line["target"] == name for line in ledger.lines)
            line = {**run(name, seed, 60 * arguments.minutes, coverage), "commit": commit()}
            ledger.add(line)
            findings += bool(line["finding"])
            if line["finding"]:
                print(f"{name}, seed {seed}: {line['finding']}", flush=True)
    print(table(ledger.lines, chosen))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(run_program("fuzz", main))
