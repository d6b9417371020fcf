"""Compile kernels/*.c into one extension module per instruction-set level: engine/_kernels/cpu_<level>.

    python tools/build_kernels.py [--into FOLDER] [--levels v2,v3,v4] [--flags "-fsanitize=address"]

kernels/kernels.h is the single source of the interface: its KERNEL and EXPORT lines are turned into
cffi declarations here, and the C compiler checks the bodies against the very same lines. Each typed
source is compiled twice, for float and for double. Files that have not changed are not rebuilt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
UNTYPED = {"threads.c", "machine.c"}  # no element type inside: compiled once
FLAGS = ["-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
         "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"]
# Of one source: the instructions of neighbouring vectors in turns (elementwise.h). Clang does not know the flag, and
# shall not say so each time.
FLAGS_OF = {"elementwise.c": ["-fschedule-insns", "-Wno-ignored-optimization-argument"]}

# An instruction-set level is three facts: its name, the compiler's flags, the vector width (simd.h reads it).
X86_LEVELS = {
    "v2": ["-march=x86-64-v2", "-DVECTOR_BYTES=16"],
    "v3": ["-march=x86-64-v3", "-DVECTOR_BYTES=32"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-DVECTOR_BYTES=64"],
}
ARM_LEVELS = {"neon": ["-DVECTOR_BYTES=16"]}


class BuildError(Exception):
    """The kernels could not be built; the message is one line that says why."""


def check_python() -> None:
    """Raise BuildError where this Python cannot load, or cannot compile, a module of the stable C interface."""
    headers = Path(sysconfig.get_paths()["include"])
    if sys.platform == "win32":
        raise BuildError("the kernels need POSIX threads, and this is Windows")
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("the kernels need CPython's stable C interface (abi3), which this Python does not have")
    if not (headers / "Python.h").exists():
        raise BuildError(f"no Python.h in {headers}: install Python's headers (Debian, Ubuntu: python3-dev)")


def levels_here() -> dict[str, list[str]]:
    """The levels that this processor family can have; which of them runs is decided at import."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return X86_LEVELS
    if machine in ("aarch64", "arm64"):
        return ARM_LEVELS
    raise BuildError(f"there are no kernels for processor family {machine!r}, only for x86-64 and ARM64")


def declarations(header: str) -> str:
    """kernels.h as cffi reads it: each KERNEL line twice (float, double), each EXPORT line once."""
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    lines = []
    for line in header.splitlines():
        if line.startswith("KERNEL"):
            prototype = re.fullmatch(r"KERNEL\((\w+)\)(\(.*\);)", line.strip())
            if prototype is None:
                raise BuildError(f"kernels.h: expected KERNEL(name)(arguments); on one line, got: {line.strip()}")
            name, arguments = prototype.groups()
            for suffix, c_type in (("f32", "float"), ("f64", "double")):
                lines.append(f"void {name}_{suffix}" + re.sub(r"\breal\b", c_type, arguments))
        elif line.startswith("EXPORT"):
            lines.append(line.removeprefix("EXPORT").strip())
    return "\n".join(lines)


def programs(declared: str) -> tuple[str, str]:
    """What runs recorded launches (engine/backend/program.py): its declarations for cffi, and its C source.

    A program is a run of numbers: for each launch the number of its kernel, how many arguments it has, and these:
    pointers, whole numbers, and doubles by their bits. Each kernel gets a function here that takes its arguments from
    there, and a prototype: a letter for each parameter, p a pointer, w one that is written through, d a double, i a
    whole number, and # those of a draw's key.
    """
    calls, table = [], []
    for name, listed in re.findall(r"^void (\w+)\((.*)\);$", declared, flags=re.M):
        if name.startswith(("memory_", "threads_")) or name.endswith("_run"):
            continue
        taken, letters = [], ""
        for i, parameter in enumerate(listed.split(", ")):
            kind = re.sub(r"\w+$", "", parameter).strip()
            letters += "d" if kind == "double" else "i" if "*" not in kind else "p" if "const" in kind else "w"
            taken.append(f"as_double(a[{i}])" if kind == "double" else f"({kind})(intptr_t)a[{i}]" if "*" in kind
                         else f"({kind})a[{i}]")
        if listed.endswith(KEY):
            letters = letters[:-4] + "####"
        calls.append(f"static void call_{name}(const int64_t *a) {{ {name}({', '.join(taken)}); }}")
        table.append(f'{{"{name}", "{letters}", call_{name}}}')
    source = "\n".join([*calls, "static const struct { const char *name, *prototype; call *run; } calls[] = {",
                        ",\n".join(table), "};", f"enum {{ CALLS = {len(calls)} }};"])
    return PROGRAM_DECLARATIONS, PROGRAM_HEAD + source + PROGRAM_TAIL


KEY = "uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site"
PROGRAM_DECLARATIONS = """
int kernel_number(const char *name);
const char *kernel_prototype(int number);
void run_program(const int64_t *program, int64_t length);
"""
PROGRAM_HEAD = """
#include <string.h>
typedef void call(const int64_t *arguments);
static double as_double(int64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
"""
PROGRAM_TAIL = """
static int kernel_number(const char *name) {
    int i = 0;
    while (i < CALLS && strcmp(calls[i].name, name)) i++;
    return i;
}
static const char *kernel_prototype(int number) { return calls[number].prototype; }
static void run_program(const int64_t *program, int64_t length) {
    for (const int64_t *end = program + length; program < end; program += 2 + program[1])
        calls[program[0]].run(program + 2);
}
"""
BOTH_TYPES = """
#define REAL_BITS 32
#include "kernels.h"
#undef REAL_BITS
#define REAL_BITS 64
#include "kernels.h"
#undef real
"""


def find_compiler() -> list[str]:
    for candidate in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    raise BuildError("found no C compiler (tried $CC, cc, gcc and clang)")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise BuildError(f"the C compiler failed: {shlex.join(command)}")


def newer(target: Path, *sources: Path) -> bool:
    return target.exists() and all(target.stat().st_mtime >= s.stat().st_mtime for s in sources)


def write_if_changed(path: Path, text: str) -> Path:
    """So that a file's time says when its content last changed."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


class Unit(NamedTuple):
    """One run of the compiler: a source, for one level and, where it has an element type, for one of the two."""

    source: Path
    object: Path
    flags: list[str]


def units_of(level: str, glue: Path, work: Path) -> Iterator[Unit]:
    flags = levels_here()[level]
    for source in sorted(KERNELS.glob("*.c")):
        for bits in ("32",) if source.name in UNTYPED else ("32", "64"):
            yield Unit(source, work / f"{level}_{source.stem}_{bits}.o",
                       [*flags, *FLAGS_OF.get(source.name, []), f"-DREAL_BITS={bits}"])
    yield Unit(glue, work / f"{level}_glue.o", [*flags, "-O1", "-w", f"-I{sysconfig.get_paths()['include']}"])


def emit_glue(level: str, work: Path, declared: str, *sources: Path) -> Path:
    """Let cffi write the C source of the extension module that makes the kernels callable from Python."""
    import cffi

    glue = work / f"cpu_{level}.c"
    if not newer(glue, *sources):
        ffi = cffi.FFI()
        declaration, source = programs(declared)
        ffi.cdef(declared + "\n" + declaration)
        ffi.set_source(f"engine._kernels.cpu_{level}", BOTH_TYPES + source, py_limited_api=True)
        with contextlib.redirect_stdout(None):
            ffi.emit_c_code(str(glue))
        glue.touch()  # cffi leaves an equal file alone
    return glue


def link(module: Path, objects: list[Path], compiler: list[str], flags: list[str], work: Path) -> None:
    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    command = [*compiler, *shared, "-pthread", *flags, *map(str, objects), "-lm"]
    stamp = write_if_changed(work / f"{module.stem}.link", shlex.join(command))  # a source may have gone
    if not newer(module, stamp, *objects):
        fresh = module.with_suffix(".tmp")
        run([*command, "-o", str(fresh)])
        os.replace(fresh, module)  # a process that has the old module open keeps it


def build(into: Path = ROOT / "engine" / "_kernels", levels: list[str] | None = None,
          flags: list[str] | None = None, work: Path | None = None) -> list[Path]:
    """Build the extension modules for `levels` (all of this machine's family by default) in `into`.

    Returns the paths of the modules. Raises BuildError with one line when there is no compiler, when
    a file does not compile, or when this Python or this processor family has no kernels.
    """
    check_python()
    import fcntl  # not on Windows

    known = levels_here()
    unknown = set(levels or ()) - set(known)
    if unknown:
        raise BuildError(f"unknown level {', '.join(sorted(unknown))}: this machine's family has {', '.join(known)}")
    compiler, flags = find_compiler(), list(flags or ())
    work = work or ROOT / "build" / "kernels"
    work.mkdir(parents=True, exist_ok=True)
    into.mkdir(parents=True, exist_ok=True)
    declared = declarations((KERNELS / "kernels.h").read_text())
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
        common = [*compiler, *FLAGS, *flags, f"-I{KERNELS}"]
        # What every object depends on: the headers, the compiler and its flags, and this file.
        shared = [*KERNELS.glob("*.h"), write_if_changed(work / "flags", shlex.join(common)), Path(__file__).resolve()]
        modules = {}
        for level in levels or known:
            glue = emit_glue(level, work, declared, *shared)
            modules[into / f"cpu_{level}.abi3.so"] = list(units_of(level, glue, work))
        stale = [u for units in modules.values() for u in units if not newer(u.object, u.source, *shared)]
        if stale:
            print(f"kernels: compiling {len(stale)} objects with {compiler[0]}", flush=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda u: run([*common, *u.flags, "-c", str(u.source), "-o", str(u.object)]), stale))
        for module, units in modules.items():
            link(module, [u.object for u in units], compiler, flags, work)
    return list(modules)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "engine" / "_kernels", help="folder for the modules")
    parser.add_argument("--levels", default="", help="comma-separated, e.g. v3,v4 (default: all of this family)")
    parser.add_argument("--flags", default="", help="extra compiler and linker flags")
    parser.add_argument("--work", type=Path, default=None, help="folder for the objects (default: build/kernels)")
    arguments = parser.parse_args()
    try:
        modules = build(arguments.into, [v for v in arguments.levels.split(",") if v],
                        shlex.split(arguments.flags), arguments.work)
        print(f"kernels: {', '.join(module.name for module in modules)} in {arguments.into} are up to date")
    except BuildError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
