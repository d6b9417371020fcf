"""Real kills at random moments: training in processes that die by SIGKILL must end with the bits of training in one.

    python tools/kills.py                   goes on where it stopped, until 200 processes were killed on this commit
    python tools/kills.py --kills 1000      until so many were
    python tools/kills.py --seed 17         one run, and what happened in it

A run is drawn from its seed: 1..8 workers, 1..7 shards, microbatches, clipping, compression, snapshots or logs, how
often a snapshot is made, after which clocks the number of shards is to change, and when which machine is killed: at its
birth, in the middle of a clock, while it comes back, at the end. The expected state is that of a plain loop
(engine/sharder/drivers/plain.py), hashed with the optimizer state.

The ledger (build/kills.jsonl) has one line a run: seed, who was killed, both hashes, commit, seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import numpy as np

from engine.backend import get_backend
from engine.optim import AdamWRule
from engine.sharder.drivers.plain import Plain
from engine.sharder.drivers.processes import ProcessServer
from engine.sharder.memory import Checkpoint
from tools.training.checkpoint import arrays_digest
from tools.training.errors import run_program

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("worker", "shard", "coordinator")
SHAPES = {"embedding": (300, 100), "bias": (3,), "deep": (2, 5000), "scale": ()}  # of several blocks, some shared
RETRY = 0.002  # seconds until a kill is tried again when there is nobody of its kind: at first


def gradient(parameters: Mapping[str, np.ndarray], clock: int, microbatch: int) -> tuple[Any, float, float]:
    """Gradients of sizes far enough apart to feel any reordering, which depend on all that they may depend on."""
    random = np.random.default_rng((clock, microbatch))
    size = np.float32(10.0 ** (microbatch % 3))
    gradients = {name: np.asarray(p * np.float32(0.25) + size * random.standard_normal(p.shape).astype("float32"))
                 for name, p in parameters.items()}
    return gradients, float(random.random()), 2 + microbatch % 3


def work(client: Any) -> None:
    """A worker's program, with time for something to be killed in."""
    while client.clock():
        parameters = client.pull()
        for index in client.microbatches:
            time.sleep(0.004)
            client.push(index, *gradient(parameters, client.step, index))


class Killer:
    """Kills at given moments, from a timer's signal. plan: (seconds since the kill before, kind of machine), in order.

    A kill for which there is nobody yet waits until there is, longer each time: a fork that a signal interrupts begins
    anew, so on a busy computer signals that come too often would keep it from ever ending.
    """

    def __init__(self, server: ProcessServer, plan: Iterable[tuple[float, str]], choose: Random):
        self.server, self.plan, self.choose = server, list(plan), choose
        self.killed: list[str] = []
        self.retry = RETRY

    def __enter__(self) -> Killer:
        self.before = signal.signal(signal.SIGALRM, self._strike)
        self._wait()
        return self

    def _wait(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, self.plan[0][0]) if self.plan else 0.0)

    def _strike(self, *_: Any) -> None:
        kind = self.plan[0][1]
        there = [item for item in self.server.processes().items() if item[0][0] == kind]
        if there:
            address, pid = self.choose.choice(there)
            os.kill(pid, signal.SIGKILL)
            self.killed.append(f"{address[0]} {address[1]}")
            self.plan.pop(0)
            self.retry = RETRY
            self._wait()
        else:
            signal.setitimer(signal.ITIMER_REAL, self.retry)
            self.retry *= 2

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def digest(state: Checkpoint) -> str:
    """Of every bit of the parameters and the optimizer's state."""
    kinds = {"parameters": state.parameters, **state.slots}
    return arrays_digest({f"{kind}/{name}": value for kind, values in kinds.items()
                          for name, value in (values or {}).items()})


def run(seed: int) -> dict[str, Any]:
    """One run, as the ledger's line."""
    draw = Random(seed)
    workers, shards, microbatches = draw.randint(1, 8), draw.randint(1, 7), draw.choice((2, 3, 4, 6))
    clip_norm, durability, compress = (draw.choice(of) for of in ((None, 1.0), ("snapshot", "log"), (None, "int8")))
    save_every, clocks = draw.choice((0, 1, 3)), draw.randint(4, 8)
    plan = [(draw.choice((0.0, draw.uniform(0, 0.01), draw.uniform(0, 0.1))), draw.choice(KINDS))
            for _ in range(draw.randint(1, 8))]
    wishes = {draw.randrange(clocks): draw.randint(1, 7) for _ in range(draw.choice((0, 0, 1, 2)))}
    random = np.random.default_rng(0)
    parameters = {name: random.standard_normal(shape).astype("float32") for name, shape in SHAPES.items()}
    server = ProcessServer(parameters, AdamWRule(lr=0.01), workers=workers, shards=shards, microbatches=microbatches,
                           clip_norm=clip_norm, durability=durability, save_every=save_every, compress=compress,
                           zero=1 + seed % 3)
    origin, start = server.checkpoint(), time.monotonic()
    right = Plain(server.setup, origin, gradient).after(tuple((c, tuple(range(microbatches))) for c in range(clocks)))
    committed = []
    with Killer(server, plan, draw) as killer:
        for done in server.run(work, clocks):
            committed.append(done.clock)
            if done.clock in wishes:
                server.reshard(wishes[done.clock])
    found = server.checkpoint()
    hashes = digest(found), digest(right)
    return {"seed": seed, "workers": workers, "shards": shards, "microbatches": microbatches, "clip_norm": clip_norm,
            "compress": compress, "durability": durability, "save_every": save_every,
            "zero": server.setup.zero, "clocks": clocks,
            "wishes": wishes, "killed": killer.killed, "found": hashes[0], "expected": hashes[1],
            "seconds": round(time.monotonic() - start, 2),
            "equal": hashes[0] == hashes[1] and committed == list(range(clocks))}


def main() -> int:
    from tools.nightly import Ledger, commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="on this commit, in all")
    parser.add_argument("--seed", type=int, help="one run, printed and not recorded")
    parser.add_argument("--ledger", type=Path, default=ROOT / "build" / "kills.jsonl")
    arguments = parser.parse_args()
    get_backend("cpu")
    if arguments.seed is not None:
        print(run(arguments.seed))
        return 0
    ledger = Ledger(arguments.ledger)

    def done() -> list[dict[str, Any]]:
        return [line for line in ledger.lines if line["commit"] == commit()]

    with contextlib.suppress(KeyboardInterrupt):
        while sum(len(line["killed"]) for line in done()) < arguments.kills and all(line["equal"] for line in done()):
            ledger.add({**run(len(ledger.lines)), "commit": commit()})
    kills = [address for line in done() for address in line["killed"]]
    wrong = [line["seed"] for line in done() if not line["equal"]]
    by_kind = ", ".join(f"{sum(k.startswith(kind) for k in kills)} {kind}s" for kind in KINDS)
    print(f"{len(kills)} processes killed ({by_kind}) in {len(done())} runs on {commit()}: "
          + (f"other bits or clocks with seed {wrong[0]}" if wrong else "every run has the bits of plain training"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_program("kills", main))
