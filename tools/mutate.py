"""Plant bugs one by one and see that the tests catch each: the test of the tests.

    python tools/mutate.py                     all records of tools/mutants; exit status 1 if one survives
    python tools/mutate.py --only gemm         those whose name or file contains a word
    python tools/mutate.py --list              what there is
    python tools/mutate.py --sizes             shrink what shows each bug and count its ops, in the test that caught
                                               it and in random programs
    python tools/mutate.py --fresh             forget the verdicts of earlier runs (build/mutate.json)
    python tools/mutate.py --automatic 300 --seed 0    a sample of the mutants that a library can make of the ops and
                                               of autograd (tools/mutants/automatic.py); goes on where it stopped

A bug is planted in a copy of the tree in a temporary folder. Of the kernels one level is built, the best that this
machine has, and after a bug in C only the objects that read the changed file. The tests that the record names run
first, then, if those notice nothing, the wider suite. At the end every test that caught something runs once
more on the tree without bugs: one that fails there too has caught nothing.

A verdict is kept under a hash of the record, of the file it changes, and of the tests that it names; that of an
automatic mutant under a hash of the lines that it changes. These run under limits of memory and processor time, which
do not depend on what else the machine does; those that cannot be noticed stand, with the reason, in
tools/mutants/equivalent.py, and are not run.

DeMillo, Lipton, Sayward 1978, "Hints on Test Data Selection".
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from engine.files import replace_file
from tools.mutants import MUTANTS, Mutant
from tools.mutants.automatic import sample
from tools.mutants.equivalent import changed_lines, why_equivalent
from tools.mutate_server import OUT_OF_TIME
from tools.training.errors import run_program

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("engine", "kernels", "tests", "tools", "pyproject.toml")
# The wider suite: not what builds trees, runs programs, looks at records and prose, or at how examples shrink.
WIDER = ["tests", *(f"--ignore-glob=tests/{name}" for name in (
    "test_packaging.py", "test_tools_*.py", "test_examples.py", "test_readme.py", "test_mutate.py", "test_testing.py",
    "test_row_checks.py", "test_strategies.py"))]
SECONDS_ALLOWED = 900  # a bug that makes the tests hang is caught by this
SANITIZERS = {"thread": ("libtsan.so", "ThreadSanitizer")}  # the library to load first, and how its reports begin
LIMITS = {resource.RLIMIT_CPU: 240, resource.RLIMIT_AS: 8 << 30}  # seconds, bytes: of the tests of an automatic mutant
KILLED, SURVIVED, UNDECIDED, EQUIVALENT = "killed", "SURVIVED", "UNDECIDED", "equivalent"


class MutationError(Exception):
    """The run cannot go on; the message is one line that says why."""


# ── records ───────────────────────────────────────────────────────────────────────────────────────────

def check_record(mutant: Mutant, root: Path) -> None:
    """Raise MutationError unless the old text stands in the file exactly once and the new text differs from it."""
    path = root / mutant.file
    if not path.is_file():
        raise MutationError(f"{mutant.name}: there is no file {mutant.file}")
    count = path.read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        raise MutationError(f"{mutant.name}: the old text stands {count} times in {mutant.file}, expected once: "
                            f"{mutant.old.strip().splitlines()[0]!r}")
    if mutant.old == mutant.new:
        raise MutationError(f"{mutant.name}: the old text and the new text are the same")
    for argument in named_tests(mutant):
        tests, _, function = argument.partition("[")[0].partition("::")
        path = root / tests
        if not path.exists() or (function and not re.search(rf"^(def {function}\(|{function} = )",
                                                            path.read_text(encoding="utf-8"), flags=re.M)):
            raise MutationError(f"{mutant.name}: there is no test {argument}")


def named_tests(mutant: Mutant) -> list[str]:
    """The tests that a record names first, without pytest's options."""
    return [argument for argument in shlex.split(mutant.tests) if not argument.startswith("-")]


def key_of(mutant: Mutant, root: Path) -> str:
    """What a kill depends on: the record, the file that it changes, and the files of its first tests.

    An automatic one has tests by the thousand: a kill stands until the lines that it changes do not.
    """
    if mutant.then is not None:
        return hashlib.sha256(repr((changed_lines(mutant), mutant.name.split()[-1])).encode()).hexdigest()[:16]
    digest = hashlib.sha256(repr(tuple(mutant)).encode())
    for name in (mutant.file, *sorted({a.partition("::")[0] for a in named_tests(mutant)})):
        for path in sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# ── the copy ──────────────────────────────────────────────────────────────────────────────────────────

class Copy:
    """A copy of the tree at `root` in `folder`, with compiled kernels where the tree has some, for bugs to live in."""

    def __init__(self, root: Path, folder: Path, limits: Mapping[int, int] | None = None):
        self.root, self.folder, self.limits = root, folder, limits or {}
        self.servers: dict[str, subprocess.Popen[str]] = {}
        self.level = self._best_level()
        unwanted = shutil.ignore_patterns("*.so", "*.tmp", ".*")
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=unwanted)
            elif (root / name).exists():
                shutil.copy2(root / name, folder / name)
        if self.level:
            self._copy_objects()
            self.build()

    def _best_level(self) -> str | None:
        """The level that the engine chooses here; None for a tree without kernels."""
        if not (self.root / "kernels").is_dir():
            return None
        code = "from engine.backend.cpu import load_level; print(load_level()[0])"
        done = subprocess.run([sys.executable, "-c", code], cwd=self.root, capture_output=True, text=True)
        if done.returncode:
            raise MutationError(f"no compiled kernels: run make first ({done.stderr.strip().splitlines()[-1]})")
        return done.stdout.strip()

    # Objects are older than their sources or not: copies keep the times, so that only what changes is compiled.

    def _copy_objects(self) -> None:
        built, (_, work) = self.root / "build" / "kernels", self.places()
        work.mkdir(parents=True)
        for path in [*built.glob(f"{self.level}_*"), *built.glob(f"cpu_{self.level}.*"), *built.glob("flags")]:
            shutil.copy2(path, work)
        flags = work / "flags"
        if flags.exists():  # they name the folder of the kernels, which is another here; nothing else differs
            times = flags.stat()
            flags.write_text(flags.read_text().replace(str(self.root), str(self.folder)))
            os.utime(flags, ns=(times.st_atime_ns, times.st_mtime_ns))

    def build(self, sanitizer: str = "") -> None:
        """Bring the kernels of the one level up to date, perhaps those with a sanitizer."""
        into, work = self.places(sanitizer)
        command = [sys.executable, "tools/build_kernels.py", "--levels", str(self.level), "--into", str(into),
                   "--work", str(work), "--flags", f"-fsanitize={sanitizer} -g" if sanitizer else ""]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise MutationError(f"the kernels do not compile: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")

    def places(self, sanitizer: str = "") -> tuple[Path, Path]:
        """Where modules and objects lie; those with a sanitizer have folders of their own."""
        if not sanitizer:
            return self.folder / "engine" / "_kernels", self.folder / "build" / "kernels"
        return self.folder / "build" / f"{sanitizer}-modules", self.folder / "build" / f"{sanitizer}-objects"

    def readers(self, file: str) -> list[Path]:
        """The C sources that are, or include, directly or not, the file."""
        folder = self.folder / "kernels"
        names = {Path(file).name}
        while True:
            more = {path.name for path in folder.glob("*.[ch]")
                    if any(f'#include "{name}"' in path.read_text() for name in names)}
            if more <= names:
                return sorted(folder / name for name in names if name.endswith(".c"))
            names |= more

    def plant(self, mutant: Mutant) -> Planted:
        return Planted(self, mutant)

    # ── tests ───────────────────────────────────────────────────────────────────────────────────────

    def test(self, arguments: Sequence[str], stop: bool = True, sanitizer: str = "") -> tuple[int, str]:
        """(exit status, output) of pytest in the copy; the status is negative for a signal, or OUT_OF_TIME."""
        if sanitizer not in self.servers:
            self.servers[sanitizer] = self._server(sanitizer)
        server, output = self.servers[sanitizer], self.folder.parent / "output"
        assert server.stdin is not None and server.stdout is not None
        drawn = ["-p_hypothesis_pytestplugin"] if importlib.util.find_spec("hypothesis") else []
        order = {"folder": str(self.folder), "output": str(output), "seconds": SECONDS_ALLOWED,
                 "limits": list(self.limits.items()) if stop else [],
                 "arguments": [*(["-x"] if stop else []), "-q", "-p", "no:cacheprovider", *drawn, "-pmutate_plugin",
                               "--tb=no", *(["-s"] if sanitizer else []), *arguments]}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return status, output.read_text(encoding="utf-8", errors="replace")

    def _server(self, sanitizer: str) -> subprocess.Popen[str]:
        """The process that runs the tests. It has no threads of its own, so that it can fork."""
        environment = {**os.environ, "ENGINE_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1",
                       "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OPENBLAS_NUM_THREADS": "1",
                       "PYTHONPATH": str(ROOT / "tools")}
        for name in ("ENGINE_ISA", "ENGINE_KERNELS", "PYTEST_PLUGINS"):
            environment.pop(name, None)
        if sanitizer:
            library = subprocess.run([os.environ.get("CC", "cc"), f"-print-file-name={SANITIZERS[sanitizer][0]}"],
                                     capture_output=True, text=True).stdout.strip()
            environment.update(LD_PRELOAD=library, ENGINE_KERNELS=str(self.places(sanitizer)[0]),
                               TSAN_OPTIONS="halt_on_error=1")
        return subprocess.Popen([sys.executable, str(ROOT / "tools" / "mutate_server.py")], env=environment, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        for server in self.servers.values():
            server.communicate()


class Planted:
    """A context in which a bug is in the copy; afterwards the copy is as it was, times included."""

    def __init__(self, copy: Copy, mutant: Mutant):
        self.copy, self.mutant = copy, mutant
        self.path = copy.folder / mutant.file
        self.kept = Path(tempfile.mkdtemp(dir=copy.folder.parent))

    def _touched(self) -> list[Path]:
        """The changed file, and what is compiled from it."""
        if not self.mutant.file.startswith("kernels/"):
            return [self.path]
        readers, (into, work) = self.copy.readers(self.mutant.file), self.copy.places(self.mutant.sanitizer)
        objects = [o for source in readers for o in work.glob(f"{self.copy.level}_{source.stem}_[36][24].o")]
        return list(dict.fromkeys([self.path, *readers, *objects, into / f"cpu_{self.copy.level}.abi3.so"]))

    def __enter__(self) -> None:
        self.touched = self._touched()
        for i, path in enumerate(self.touched):
            shutil.copy2(path, self.kept / str(i))
        times = self.path.stat()
        text = self.path.read_text(encoding="utf-8")
        self.path.write_text(text.replace(self.mutant.old, self.mutant.new), encoding="utf-8")
        if not self.mutant.file.startswith("kernels/"):
            return
        if self.path.suffix == ".h":  # every object depends on every header: let only those that read it be stale
            os.utime(self.path, ns=(times.st_atime_ns, times.st_mtime_ns))
            for source in self.copy.readers(self.mutant.file):
                source.touch()
        self.copy.build(self.mutant.sanitizer)

    def __exit__(self, *_: Any) -> None:
        for i, path in enumerate(self.touched):
            shutil.copy2(self.kept / str(i), path)
        shutil.rmtree(self.kept)


# ── verdicts ──────────────────────────────────────────────────────────────────────────────────────────

def killer_of(status: int, output: str) -> str | None:
    """The test or the sanitizer that noticed, from pytest's exit status and output; None if none did."""
    if status == 0:
        return None
    if status == OUT_OF_TIME:
        return f"time: more than {SECONDS_ALLOWED} seconds"
    for _, report in SANITIZERS.values():
        if race := re.search(rf"WARNING: {report}: ([\w ]+)", output):
            return f"{report}: {race[1].strip()}"
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, flags=re.M)
    if found:
        return found[1]
    if status in (-signal.SIGXCPU, -signal.SIGKILL):  # the soft limit, the hard one
        return f"time: more than {LIMITS[resource.RLIMIT_CPU]} seconds of the processor"
    if status < 0 or status > 128:
        return f"crash: {signal.Signals(-status if status < 0 else status - 128).name}"
    if "ImportError" in output or "Error while loading conftest" in output:
        return "import: the engine cannot be imported"
    raise MutationError(f"pytest ended with status {status}: {output.strip().splitlines()[-1] if output else ''}")


def judge(copy: Copy, mutant: Mutant) -> dict[str, Any]:
    """Plant one bug and run the tests."""
    start = time.monotonic()
    verdict, by = SURVIVED, ""
    try:
        if mutant.sanitizer:
            copy.build(mutant.sanitizer)
            if copy.test(shlex.split(mutant.tests), sanitizer=mutant.sanitizer)[0]:
                raise MutationError(f"the {mutant.sanitizer} sanitizer reports something without the bug too")
        with copy.plant(mutant):
            then = [WIDER] if mutant.then is None else [shlex.split(stage) for stage in mutant.then]
            for arguments in (shlex.split(mutant.tests), *([] if mutant.sanitizer else then)):
                killer = killer_of(*copy.test(arguments, sanitizer=mutant.sanitizer))
                if killer is not None:
                    verdict, by = KILLED, killer
                    break
    except MutationError as error:  # it does not compile, or no test can run: the others are judged all the same
        verdict, by = UNDECIDED, str(error)
    return {"name": mutant.name, "file": mutant.file, "verdict": verdict, "by": by,
            "seconds": round(time.monotonic() - start, 1)}


PROGRAMS = "tests/test_programs.py::test_random_programs"


def sizes_of(copy: Copy, mutant: Mutant, killer: str) -> list[int | None]:
    """How many ops it takes to show a bug, in the test that caught it and in a random program; None where not known."""
    found = []
    with copy.plant(mutant):
        for test in (killer, PROGRAMS):
            _, output = copy.test([test, "--shrink"]) if ".py::" in test else (0, "")
            nodes = re.search(r"^SHRUNK to (\d+) nodes", output, flags=re.M)
            found.append(int(nodes[1]) if nodes else None)
    return found


def confirm(copy: Copy, verdicts: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Which tests, of those that caught something, have caught nothing, and why: they fail without any bug too, or are
    there no more, where a ledger is older than the name of a test."""
    tests = {v["by"] for v in verdicts if v["verdict"] == KILLED and ".py" in v["by"]}
    if not tests:
        return {}
    status, output = copy.test(sorted(tests), stop=False)
    lost = re.findall(r"^ERROR: not found: (.+)$", output, flags=re.M)  # without their parameters
    missing = {test for test in tests if any(name.endswith(test.partition("[")[0]) for name in lost)}
    unfit = dict.fromkeys(missing, "which is there no more")
    if missing == tests:
        return unfit
    if missing:  # and so nothing has run
        status, output = copy.test(sorted(tests - missing), stop=False)
    if status != 0:
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, flags=re.M)
        unfit.update(dict.fromkeys(failed or tests - missing, "which fails without the bug too"))
    return unfit


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────

def show(verdict: dict[str, Any]) -> None:
    sizes = "".join(f", {what} of {n} nodes" for what, n in zip(("shrunk", "program"), verdict.get("nodes", ())) if n)
    print(f"{verdict['verdict']:9}  {verdict['seconds']:6.1f} s  {verdict['name']:28}  {verdict['file']:32}  "
          f"{verdict['by']}{sizes}", flush=True)


def run(mutants: Sequence[Mutant], root: Path, ledger: Path, fresh: bool = False,
        limits: Mapping[int, int] | None = None, sizes: bool = False) -> int:
    """Judge every mutant, print the table, keep the ledger. The exit status: 1 if one survives."""
    for mutant in mutants:
        check_record(mutant, root)
    known: dict[str, Any] = {}
    if ledger.exists() and not fresh:
        known = json.loads(ledger.read_text())
    judged = [mutant for mutant in mutants if not why_equivalent(mutant)]
    keys = {mutant.name: key_of(mutant, root) for mutant in judged}
    with (tempfile.TemporaryDirectory(prefix="mutate-") as folder,
          contextlib.closing(Copy(root, Path(folder) / "tree", limits)) as copy):
        for mutant in mutants:
            if reason := why_equivalent(mutant):
                show({"name": mutant.name, "file": mutant.file, "verdict": EQUIVALENT, "by": reason, "seconds": 0})
                continue
            key = keys[mutant.name]
            if known.get(key, {}).get("verdict") != KILLED:  # a survivor is tried again: the tests may have grown
                known[key] = judge(copy, mutant)
                write(ledger, known)
            if sizes and known[key]["verdict"] == KILLED and not mutant.sanitizer and "nodes" not in known[key]:
                known[key]["nodes"] = sizes_of(copy, mutant, known[key]["by"])
                write(ledger, known)
            show(known[key])
        verdicts = [known[keys[mutant.name]] for mutant in judged]
        unfit = confirm(copy, verdicts)
    for verdict in verdicts:
        if verdict["by"] in unfit:
            verdict.update(verdict=SURVIVED, by=f"{verdict['by']}, {unfit[verdict['by']]}")
            show(verdict)
    write(ledger, known)
    return report(mutants, verdicts)


def write(ledger: Path, known: dict[str, Any]) -> None:
    ledger.parent.mkdir(parents=True, exist_ok=True)
    replace_file(ledger, json.dumps(known, indent=1).encode())


def report(mutants: Sequence[Mutant], verdicts: Sequence[dict[str, Any]]) -> int:
    """Print the survivors as what they changed, and the figures of the run. The exit status."""
    records = {mutant.name: mutant for mutant in mutants}
    survivors = [v for v in verdicts if v["verdict"] != KILLED]
    for verdict in survivors:
        file, old, new = changed_lines(records[verdict["name"]])
        print(f"{verdict['verdict']}  {verdict['name']}, {file}\n" + "\n".join(
            [*(f"  - {line}" for line in old.splitlines()), *(f"  + {line}" for line in new.splitlines())]))
    kills = [v for v in verdicts if v["verdict"] == KILLED]
    if kills:
        slowest = max(kills, key=lambda v: v["seconds"])
        print(f"seconds to a kill: median {statistics.median(v['seconds'] for v in kills):.1f}, "
              f"at most {slowest['seconds']:.1f} ({slowest['name']}); "
              f"{sum(v['by'].startswith('time') for v in kills)} by running out of time, "
              f"{sum('.py::' not in v['by'] for v in kills)} by no test of values")
    for i, what in enumerate(("the tests that caught them", "random programs")):
        nodes = [v["nodes"][i] for v in kills if v.get("nodes", [None, None])[i]]
        if nodes:
            print(f"nodes of what shows a bug, of {what}: {len(nodes)} shrunk, median {statistics.median(nodes):g}, "
                  f"at most {max(nodes)}")
    alike = len(mutants) - len(verdicts)
    print(f"{len(kills)} of {len(verdicts)} planted bugs caught" + (f", {alike} equivalent left out" if alike else "")
          + (f"; not: {', '.join(v['name'] for v in survivors)}" if survivors else ""))
    return 1 if survivors else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", action="append", help="records whose name or file contains it")
    parser.add_argument("--list", action="store_true", help="print the records and do nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the verdicts of earlier runs")
    parser.add_argument("--ledger", type=Path, default=ROOT / "build" / "mutate.json", help="where verdicts are kept")
    parser.add_argument("--automatic", type=int, metavar="N", help="judge a sample of automatic mutants instead")
    parser.add_argument("--sizes", action="store_true", help="shrink what shows each bug, and count its ops")
    parser.add_argument("--near", action="store_true", help="of the tests after the first run one stage only")
    parser.add_argument("--seed", type=int, default=0, help="of that sample")
    arguments = parser.parse_args()
    try:
        mutants = MUTANTS if arguments.automatic is None else sample(ROOT, arguments.automatic, arguments.seed)
    except ImportError as error:
        parser.error(str(error))
    if arguments.near:
        mutants = [m._replace(then=(m.then or ())[:1]) for m in mutants]
    chosen = [m for m in mutants
              if not arguments.only or any(word in m.name or word in m.file for word in arguments.only)]
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name:28}  {mutant.file:32}  {mutant.what}")
        return 0
    try:
        if not chosen:
            raise MutationError(f"no record's name or file contains {' or '.join(arguments.only or ())}")
        return run(chosen, ROOT, arguments.ledger, arguments.fresh, LIMITS if arguments.automatic else None,
                   arguments.sizes)
    except MutationError as error:
        print(f"mutate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run_program("mutate", main))
