"""Ours beside the peers that are installed: products, kernels, training, generation, random shapes, calls, memory.

    python tools/bench.py gemm                                  one table; what the machine can do is measured first
    python tools/bench.py all --peers torch,torch.compile,openblas,jax --threads 1
    python tools/bench.py kernels --only softmax --seconds 3
    python tools/bench.py train --json runs/bench/train.json --png runs/bench
    python tools/bench.py generate --only decode                tokens a second with a cache of keys and values
    python tools/bench.py sweep --shapes 200                    random shapes beside torch, slowest first
    python tools/bench.py sweep --first 40 --shapes 20          a part of it
    python tools/bench.py sharder                               workers on the parameter server beside a plain loop
    python tools/bench.py overhead --peers torch                microseconds a call, and to wake the team of threads
    python tools/bench.py memory                                of a training step: pool, resident set, page faults

Contestants take turns within a row. Each table is printed when it is measured, with the goals of its rows, and below it
what limits those that miss theirs (benchmarks/goals.py); other work on the machine shows in the spread.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from tools.training.errors import run_program

if TYPE_CHECKING:
    from tools.benchmarks.contest import Result
    from tools.benchmarks.peers import Peers

TABLES = ("gemm", "kernels", "train", "generate", "sharder", "sweep", "overhead", "memory")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--peers", default="torch,openblas,jax,llama.cpp", metavar="LIST",
                        help="of torch, torch.compile, openblas, jax, llama.cpp (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each row (default: %(default)s)")
    parser.add_argument("--shapes", type=int, default=200, metavar="N", help="sweep: so many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="sweep: from this one on (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="sweep: draw other shapes (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every turn of every contestant")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also draw each table")
    return parser.parse_args()


def contest_results(name: str, peers: Peers, arguments: argparse.Namespace) -> list[Result]:
    """The rows of a table of contests, each shown when it is measured."""
    from tools.benchmarks import gemm, generate, kernels, overhead, sharder, sweep, train
    from tools.benchmarks.contest import measure
    from tools.benchmarks.machine import probes

    modules: dict[str, Any] = {"gemm": gemm, "kernels": kernels, "train": train, "generate": generate,
                               "sharder": sharder, "overhead": overhead}
    contests = (sweep.contests(peers, arguments.shapes, arguments.seed, arguments.first) if name == "sweep"
                else modules[name].contests(peers))
    results = []
    for row, make in contests:
        if arguments.only in row:
            results.append(measure(make(), arguments.seconds, probes()))
            results[-1].contest.contestants.clear()  # models, of which the next row has its own
            print(results[-1].line(), file=sys.stderr, flush=True)
    if name == "overhead" and not arguments.only:
        results += overhead.team_results(peers)
    return results


def main() -> int:
    arguments = parse()
    from tools.benchmarks.peers import Peers, prepare_environment

    prepare_environment(arguments.threads)  # before the libraries that read it
    from tools.benchmarks import memory, report, sweep
    from tools.benchmarks.machine import measure_machine

    peers = Peers([name for name in arguments.peers.split(",") if name], arguments.threads)
    measured = {}
    every = [name for name in TABLES if peers.torch or name != "sweep"]  # which has nothing else to compare with
    for name in every if arguments.table == "all" else (arguments.table,):
        machine = measure_machine(arguments.threads)
        if name == "memory":
            footprints = memory.measure(peers, arguments.only)
            print(memory.table(machine, footprints), flush=True)
            measured[name] = machine, memory.rows(footprints)
            continue
        results = contest_results(name, peers, arguments)
        print(sweep.slowest(results) if name == "sweep" else report.table(name, machine, results), flush=True)
        measured[name] = machine, report.rows(name, results)
        if arguments.png:
            report.save_picture(arguments.png / f"{name}.png", name, machine, results)
    if arguments.json:
        report.save_json(arguments.json, measured)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("bench", main))
