"""What a training step takes of memory: each model and library in a process of its own.

    pool       bytes in use at most during a step, by the engine's pool; PyTorch has no such count on CPUs
    growth     how far the process's resident set rose at most above what it was when the library had been imported
    faults     page faults a step, once three steps have been made: memory given back to the system and asked for anew

At least the parameters, their gradients and AdamW's two moments must be there, 16 bytes a parameter: "state".
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from tools.benchmarks import train, train_peers
from tools.benchmarks.contest import OURS, Machine
from tools.benchmarks.peers import Peers
from tools.benchmarks.report import head, number

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ("tiny", "char")
WARM_UP, STEPS = 3, 5


@dataclass(frozen=True)
class Footprint:
    """Bytes, but for faults and seconds, which are those of one step; pool is None where nobody counts."""

    model: str
    who: str
    state: int
    pool: int | None
    growth: int
    faults: float
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.model} {self.who}"


def high_water() -> int:
    """Bytes of this process's largest resident set so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage would also count what the process was before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def size_of(model: str) -> train.Size:
    return next(size for size in train.SIZES if size.name == model)


def measure_here(model: str, who: str, threads: int) -> dict[str, Any]:
    """What a step of this process takes; nothing else may have used memory before."""
    from engine.backend import get_backend

    size, pool = size_of(model), None
    if who == OURS:
        pool = cast(Any, get_backend("cpu")).pool
        before = high_water()
        step, _ = train.engine_step(size)
    else:
        peers = Peers([who], threads)
        before = high_water()
        step = train_peers.torch_step(peers.torch, size, train.LEARNING_RATE)
    for _ in range(WARM_UP):
        step()
    if pool:
        pool.reset_peak()
    faults, start = page_faults(), time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds, faults = time.perf_counter() - start, page_faults() - faults
    return {"pool": pool.figures().peak if pool else None, "growth": high_water() - before,
            "faults": faults / STEPS, "seconds": seconds / STEPS}


def measure(peers: Peers, only: str = "") -> list[Footprint]:
    """Every model, ours and PyTorch's, one process after the other."""
    found = []
    for model in MODELS:
        state = 16 * sum(p.size for p in train.engine_model(size_of(model)).parameters())
        for who in (OURS, *(["torch"] if peers.torch else [])):
            if only in f"{model} {who}":
                run = subprocess.run([sys.executable, "-m", "tools.benchmarks.memory", model, who, str(peers.threads)],
                                     cwd=ROOT, capture_output=True, text=True)
                if run.returncode:
                    raise SystemExit(f"bench: memory of {model} {who}: {run.stderr.strip().splitlines()[-1]}")
                found.append(Footprint(model, who, state, **json.loads(run.stdout)))
    return found


def table(machine: Machine, footprints: list[Footprint]) -> str:
    lines = [f"memory of a training step, MiB ({head(machine)})", "",
             "| model | state | who | pool | growth | faults a step | ms a step |", "|---|---|---|---|---|---|---|"]
    for f in footprints:
        state, pool, growth = (number(x / 2**20) if x is not None else "" for x in (f.state, f.pool, f.growth))
        lines.append(f"| {f.model} | {state} | {f.who} | {pool} | {growth} | {f.faults:.0f} "
                     f"| {number(f.seconds * 1e3)} |")
    return "\n".join(lines) + "\n"


def rows(footprints: list[Footprint]) -> list[dict[str, Any]]:
    return [{"name": f.name, **asdict(f)} for f in footprints]


if __name__ == "__main__":  # as measure() starts it, in an environment that it has prepared
    print(json.dumps(measure_here(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
