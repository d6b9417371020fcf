"""Ours beside the peers that are installed: matrix products, the other kernels, training steps, random shapes.

    python tools/bench.py gemm                                  one table; what the machine can do is measured first
    python tools/bench.py all --peers torch,torch.compile,openblas,jax --threads 1
    python tools/bench.py kernels --only softmax --seconds 3
    python tools/bench.py train --json runs/bench/train.json --png runs/bench
    python tools/bench.py sweep --shapes 200                    random shapes beside torch, slowest first
    python tools/bench.py sweep --first 40 --shapes 20          a part of it

Contestants take turns within a row. Each table is printed when it is measured; other work on the machine shows in the
spread.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

TABLES = ("gemm", "kernels", "train", "sweep")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--peers", default="torch,openblas,jax", metavar="LIST",
                        help="of torch, torch.compile, openblas, jax (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each row (default: %(default)s)")
    parser.add_argument("--shapes", type=int, default=200, metavar="N", help="sweep: so many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="sweep: from this one on (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="sweep: draw other shapes (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every turn of every contestant")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also draw each table")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    from tools.benchmarks.peers import Peers, prepare_environment

    prepare_environment(arguments.threads)  # before the libraries that read it
    from tools.benchmarks.contest import measure
    from tools.benchmarks.machine import measure_machine, probes
    from tools.benchmarks.report import save_json, save_picture, table

    peers = Peers([name for name in arguments.peers.split(",") if name], arguments.threads)
    measured = {}
    for name in TABLES if arguments.table == "all" else (arguments.table,):
        machine = measure_machine(arguments.threads)
        module = importlib.import_module(f"tools.benchmarks.{name}")
        drawn = (arguments.shapes, arguments.seed, arguments.first) if name == "sweep" else ()
        results = []
        for row, make in module.contests(peers, *drawn):
            if arguments.only in row:
                results.append(measure(make(), arguments.seconds, probes()))
                print(results[-1].line(), file=sys.stderr, flush=True)
        print(module.slowest(results) if name == "sweep" else table(name, machine, results), flush=True)
        measured[name] = (machine, results)
        if arguments.png:
            save_picture(arguments.png / f"{name}.png", name, machine, results)
    if arguments.json:
        save_json(arguments.json, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
