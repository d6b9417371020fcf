"""Draw a simulated training run: a Chrome trace for https://ui.perfetto.dev or chrome://tracing.

    python tools/timeline.py --workers 4 --shards 2 --consistency ssp:2 --stalling 0.1 --fault 60:shard --out trace.json

A fault is an event number and what strikes there: lose, repeat, delay (a message); worker, shard, coordinator (that
machine dies and comes back); leave, join, cut, suspect, reshard:S.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import numpy as np

from engine.files import replace_file
from engine.optim import SGDRule
from engine.sharder import Consistency
from engine.sharder.drivers.faults import FAULTS, Weather
from engine.sharder.drivers.invariants import Violated
from engine.sharder.drivers.simulator import DURABILITIES, Simulation
from engine.sharder.drivers.timeline import timeline
from tools.training.errors import ProgramError, run_program


def gradient(parameters: Mapping[str, np.ndarray], clock: int, microbatch: int) -> tuple[Any, float, float]:
    return {name: 0.1 * value for name, value in parameters.items()}, 1.0, 1


def fault(text: str) -> tuple[int, str]:
    number, _, kind = text.partition(":")
    if not number.isdecimal() or not (kind in FAULTS or re.fullmatch("reshard:[1-9][0-9]*", kind)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an event number and one of {', '.join(FAULTS)} or "
                                         "reshard:S, as in 60:shard")
    return int(number), kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("workers", 4), ("shards", 2), ("microbatches", 4), ("clocks", 6), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--consistency", default="bsp", help="bsp, ssp:S or asp (default: bsp)")
    parser.add_argument("--backups", type=int, default=0, help="microbatches of a clock that need not be waited for")
    parser.add_argument("--compress", help="fp16, bf16, int8, 1bit or topk:SHARE (default: gradients as they are)")
    parser.add_argument("--zero", type=int, default=1, help="stage of ZeRO: 1, 2 or 3 (default: 1)")
    parser.add_argument("--save-every", type=int, default=2, help="clocks between two snapshots, 0: none (default: 2)")
    parser.add_argument("--durability", choices=DURABILITIES, default="log")
    for name in ("loss", "duplication", "stalling", "crashing"):
        parser.add_argument(f"--{name}", type=float, default=0.0, help="a probability")
    parser.add_argument("--fault", type=fault, action="append", default=[], metavar="N:WHAT")
    parser.add_argument("--out", type=Path, default=Path("trace.json"))
    given = parser.parse_args()
    if not given.out.absolute().parent.is_dir():
        parser.error(f"argument --out: there is no folder {given.out.absolute().parent}")
    try:
        weather = Weather(loss=given.loss, duplication=given.duplication, stalling=given.stalling,
                          crashing=given.crashing)
        Simulation.check_run(given.clocks, 1)
        simulation = Simulation({"w": np.ones((64, 64), np.float32)}, SGDRule(lr=0.1), workers=given.workers,
                                shards=given.shards, microbatches=given.microbatches, zero=given.zero,
                                consistency=Consistency.parse(given.consistency, given.backups),
                                compress=given.compress, save_every=given.save_every, durability=given.durability)
    except ValueError as error:
        parser.error(str(error))
    try:
        history = simulation.run(gradient, given.clocks, given.seed, weather, given.fault,
                                 stride=1 if given.consistency == "bsp" else given.clocks)
    except Violated as error:  # in this weather training does not end; the rest of the message is the history
        raise ProgramError(str(error).splitlines()[0]) from error
    replace_file(given.out, json.dumps(timeline(history)).encode())
    print(f"{given.out}: {len(history.committed)} clocks in {history.time:g} ms of virtual time, "
          f"{len(history.carried)} messages, faults: {dict(history.faults) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("timeline", main))
