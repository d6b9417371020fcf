"""What staleness and backup workers buy when machines stall, in the simulator's virtual time: a plot.

    python tools/curves.py --out curves.png

Left: microbatches stall at random; the time of a clock over the staleness bound s of SSP. Right: one worker is always
slow; the time of a clock over its slowness, with and without a backup worker. A clock is one microbatch of each worker.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from engine.optim import SGDRule
from engine.sharder import Consistency
from engine.sharder.drivers.faults import Weather
from engine.sharder.drivers.simulator import Simulation
from tools.training.errors import run_program

WORK = 100  # units of virtual time for a microbatch; a message takes 1 or 2
CALM = Weather(latency=(1, 2), work=WORK, disk=1, timeout=50 * WORK)
STALLS = replace(CALM, stalling=0.1, stall=4)  # one microbatch in ten takes four times as long
SEEDS = range(4)


def gradient(parameters: Any, clock: int, microbatch: int) -> tuple[dict[str, np.ndarray], float, float]:
    return {name: np.ones_like(value) for name, value in parameters.items()}, 0.0, 1.0


def clock_time(consistency: Consistency | str, weather: Weather, workers: int = 8, clocks: int = 150,
               seeds: range = SEEDS) -> float:
    """The mean time from one committed clock to the next, in units of the time of a microbatch."""
    total = 0.0
    for seed in seeds:
        simulation = Simulation({"w": np.zeros(2, "float32")}, SGDRule(lr=0.1), workers=workers, shards=2,
                                microbatches=workers, consistency=consistency, save_every=0, device="reference")
        asynchronous = simulation.setup.consistency.asynchronous
        history = simulation.run(gradient, clocks, seed, weather, limit=float("inf"), checked=False,
                                 stride=clocks if asynchronous else 1)
        total += history.time / clocks / WORK
    return total / len(seeds)


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bounds = [0, 1, 2, 3, 4, 6, 8]
    left.plot(bounds, [clock_time(f"ssp:{s}", STALLS) for s in bounds], "o-", label="SSP(s)")
    left.axhline(clock_time("asp", STALLS), color="gray", linestyle="--", label="ASP")
    left.set(xlabel="staleness bound s (0: BSP)", title="8 workers, 10 % of microbatches take 4 times as long")
    factors = [1, 2, 4, 6, 8]
    kinds = {"BSP": Consistency(), "SSP(3)": Consistency(3), "one backup": Consistency(backups=1)}
    for name, kind in kinds.items():
        times = [clock_time(kind, replace(CALM, slow={7: f}), clocks=60, seeds=range(1)) for f in factors]
        right.plot(factors, times, "o-", label=name)
    right.set(xlabel="slowness of one worker", title="8 workers, one of them always slow")
    for axes in (left, right):
        axes.set_ylabel("time of a clock / time of a microbatch")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("curves.png"), metavar="FILE", help="default: curves.png")
    arguments = parser.parse_args()
    bsp, ssp = clock_time("bsp", STALLS), clock_time("ssp:3", STALLS)
    print(f"random stalls: BSP {bsp:.2f}, SSP(3) {ssp:.2f} microbatch times a clock: {bsp / ssp:.2f} times as fast")
    slow = replace(CALM, slow={7: 6})
    waiting, backup = clock_time("bsp", slow), clock_time(Consistency(backups=1), slow)
    print(f"one worker 6 times as slow: BSP {waiting:.2f}, one backup worker {backup:.2f}: "
          f"{waiting / backup:.2f} times as fast")
    draw(arguments.out)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("curves", main))
