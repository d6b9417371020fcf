"""CUDA kernels on the CPU, for tests: compiles a .cu program as C++ against cuda_emulation.h, and launches its kernels.

    emulated = build(program_text, bits=32)
    emulated.launch("softmax_f32", prototype, arguments, Schedule(order="random", seed=3, watch=True))

Arguments are NumPy arrays (or None) and numbers, in the order of kernels.h. What is compiled is kept in build/, by the
hash of everything that went in.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.backend.cuda_source import Prototype, prototypes

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "cuda_emulation"
COMPILER = os.environ.get("CXX") or "g++"
# The watch needs the calls of -fsanitize=thread in the kernels, and none in itself. longjmp between stacks is meant.
COMMON = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-U_FORTIFY_SOURCE", "-w"]
KERNEL_FLAGS = [*COMMON, "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
RUNNING = threading.Lock()
ORDERS = {"forward": 0, "backward": 1, "random": 2}
CTYPES = {"int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64, "uint32_t": ctypes.c_uint32, "int": ctypes.c_int,
          "double": ctypes.c_double}


def available() -> bool:
    """Whether there is a C++ compiler."""
    return shutil.which(COMPILER) is not None


@dataclass(frozen=True)
class Schedule:
    """How a grid runs: the number of blocks; which thread goes on where several can; whether memory is watched; and a
    barrier ("softmax.cu:30") that is left out."""

    grid: int = 3
    order: str = "forward"
    seed: int = 0
    watch: bool = False
    skip: str = ""

    def without(self, barrier: str) -> Schedule:
        return replace(self, skip=barrier)


class Fault(AssertionError):
    """What the emulation saw go wrong."""


class Program:
    """A compiled .cu program."""

    def __init__(self, library: ctypes.CDLL, bits: int, kernels: dict[str, Prototype]):
        self.library, self.bits, self.kernels = library, bits, kernels
        library.emulation_report.restype = library.emulation_barriers.restype = ctypes.c_char_p

    def launch(self, name: str, arguments: Sequence[Any], schedule: Schedule = Schedule()) -> list[str]:
        """Run one kernel; returns the barriers it came to. Raises Fault with what was wrong."""
        kernel = self.kernels[name]
        if len(arguments) != len(kernel.parameters):
            raise TypeError(f"{name}: got {len(arguments)} arguments, expected {len(kernel.parameters)}")
        with RUNNING:  # the fibers of a process belong to one launch at a time
            return self._launch(kernel, arguments, schedule)

    def _launch(self, kernel: Prototype, arguments: Sequence[Any], schedule: Schedule) -> list[str]:
        file, _, line = schedule.skip.partition(":")
        self.library.emulation_start(schedule.grid, ORDERS[schedule.order], ctypes.c_uint64(schedule.seed),
                                     int(schedule.watch), file.encode(), int(line or 0))
        passed = []
        for parameter, value in zip(kernel.parameters, arguments):
            if not parameter.is_pointer:
                passed.append(CTYPES[parameter.type](value))
            elif value is None:
                passed.append(ctypes.c_void_p(None))
            else:
                self._make_known(value, parameter.name)
                passed.append(ctypes.c_void_p(value.__array_interface__["data"][0]))
        getattr(self.library, f"launch_{kernel.symbol(self.bits)}")(*passed)
        report = self.library.emulation_report().decode()
        if report:
            raise Fault(f"{kernel.name}: {report}")
        return self.library.emulation_barriers().decode().split()

    def _make_known(self, array: np.ndarray, name: str) -> None:
        spans = [(n - 1) * stride for n, stride in zip(array.shape, array.strides)] if array.size else []
        start = array.__array_interface__["data"][0]
        low, high = start + sum(min(s, 0) for s in spans), start + sum(max(s, 0) for s in spans) + array.itemsize
        size = high - low if array.size else 0
        self.library.emulation_array(ctypes.c_void_p(low), ctypes.c_size_t(size), name.encode())


def launchers(text: str, bits: int) -> str:
    """C++ that calls each kernel of a program as every thread of a grid."""
    out = ["#line 1 \"launchers\""]
    for kernel in prototypes(text).values():
        if not kernel.typed and bits == 64:
            continue
        symbol, names = kernel.symbol(bits), ", ".join(p.name for p in kernel.parameters)
        declared = ", ".join(f"{p.type.rstrip('*')} {'*' if p.is_pointer else ''}{p.name}" for p in kernel.parameters)
        out.append(f"""
extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) void launch_{symbol}({declared}) {{
    auto call = [&]() __attribute__((no_sanitize("thread"))) {{ {symbol}({names}); }};
    emulated_grid([](void *c) __attribute__((no_sanitize("thread"))) {{ (*(decltype(call) *)c)(); }}, &call);
}}""")
    return "\n".join(out)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:1])}: {done.stderr[:2000]}")


@cache
def build(text: str, bits: int) -> Program:
    """Compile a program (cuda_source.program) for float or double."""
    parts = [HERE / name for name in ("cuda_emulation.h", "emulation.h", "fibers.cpp", "watch.cpp", "emulation.py")]
    key = hashlib.sha256("\0".join([text, str(bits), COMPILER, *[p.read_text("utf-8") for p in parts]]).encode())
    name = key.hexdigest()[:24]
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"{name}.so"
    with open(BUILD / f"{name}.lock", "w") as lock:  # several test processes may want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_program(text, bits, library)
    return Program(ctypes.CDLL(str(library)), bits, prototypes(text))


def compile_program(text: str, bits: int, library: Path) -> None:
    source, unfinished = library.with_suffix(".cpp"), library.with_suffix(".part")
    source.write_text(f'#include "cuda_emulation.h"\n{text}\n{launchers(text, bits)}\n', "utf-8")
    run(COMPILER, *KERNEL_FLAGS, f"-DREAL_BITS={bits}", f"-I{HERE}", "-c", str(source), "-o", f"{unfinished}.o")
    # Symbolic: these calls go to the watch, also in a process that the thread sanitizer itself has been loaded into.
    run(COMPILER, "-shared", "-Wl,-Bsymbolic", f"{unfinished}.o", *map(str, runtime()), "-o", str(unfinished))
    unfinished.rename(library)
    Path(f"{unfinished}.o").unlink()


def runtime() -> list[Path]:
    """The objects of the emulation itself; compiled once."""
    objects = []
    for name in ("fibers", "watch"):
        source = HERE / f"{name}.cpp"
        texts = [p.read_text("utf-8") for p in (HERE / "cuda_emulation.h", HERE / "emulation.h", source)]
        made = BUILD / f"{name}-{hashlib.sha256(''.join(texts).encode()).hexdigest()[:16]}.o"
        if not made.exists():
            unfinished = f"{made}.{os.getpid()}"
            run(COMPILER, *COMMON, f"-I{HERE}", "-c", str(source), "-o", unfinished)
            os.replace(unfinished, made)
        objects.append(made)
    return objects
