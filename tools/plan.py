"""Plan a cluster past this machine: what a training step on the parameter server will take, and with how many shards.

    python tools/plan.py --model gpt2 --workers 8 --work 500ms --bandwidth 10Gbit/s --latency 50us --memory 10GB/s
    python tools/plan.py --model llama-7b --workers 64 --tokens 4096 --flops 150T --bandwidth 100Gbit/s \\
        --straggler stall:0.01:4 --consistency ssp:2 --mtbf 30d --restart 2min --scan 8,16,32,64 --png plan.png
    python tools/plan.py --check             predictions beside published figures, with their sources
    python tools/plan.py --check here        beside runs on this machine, of one worker and of two

The protocol's own machines run in the simulator, where messages share links and shards, disks and workers take their
time; engine/sharder/README.md says what it is good for, tools/planning/cost_model.py has the equations.
"""

from __future__ import annotations

import argparse
import json
import sys
from math import inf
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from tools.planning import models, published, units
from tools.planning.cost_model import OPTIMIZERS, PLACEMENTS, Plan
from tools.planning.predict import best, scan
from tools.planning.stragglers import KINDS
from tools.planning.table import aligned, table
from tools.training.errors import ProgramError, finite, run_program


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload(parser.add_argument_group("what is trained"))
    add_cluster(parser.add_argument_group("on what (without a rate, its part costs nothing)"))
    add_failures(parser.add_argument_group("failures"))
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--scan", type=counts, metavar="S,S,...", help="numbers of shards (default: powers of two up to "
                                                                     "--workers)")
    asked.add_argument("--clocks", type=int, default=20, metavar="N", help="steps that are simulated (default: 20)")
    asked.add_argument("--seed", type=int, default=0, metavar="N", help="of the stragglers (default: 0)")
    asked.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked.add_argument("--png", type=Path, metavar="FILE", help="draw the scan")
    asked.add_argument("--check", nargs="?", const="published", choices=("published", "here"),
                       help="hold predictions against published figures, or against runs on this machine")
    return parser.parse_args()


def add_workload(group: Any) -> None:
    group.add_argument("--model", choices=models.PRESETS, help="a known model")
    group.add_argument("--config", type=Path, metavar="FILE", help="or a config.json of Hugging Face")
    group.add_argument("--parameters", type=units.number, metavar="N", help="or a number of parameters, as 124M")
    group.add_argument("--work", type=units.seconds, metavar="T", help="time of a microbatch on a worker, as 500ms")
    group.add_argument("--tokens", type=units.number, default=0.0, metavar="N", help="tokens of a microbatch")
    group.add_argument("--flops", type=units.number, metavar="N", help="or, with --tokens, a worker's FLOP/s, as 150T")
    group.add_argument("--microbatches", type=int, default=0, metavar="N", help="in a step (default: one a worker)")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    group.add_argument("--consistency", default="bsp", metavar="HOW", help="bsp, ssp:S or asp (default: bsp)")
    group.add_argument("--backups", type=int, default=0, metavar="N", help="microbatches that need not be waited for")
    group.add_argument("--compress", default="none", metavar="HOW", help="none, fp16, bf16, int8, 1bit or topk:SHARE")


def add_cluster(group: Any) -> None:
    group.add_argument("--workers", type=int, metavar="N")
    group.add_argument("--shards", type=int, metavar="N", help="this number, and no scan")
    group.add_argument("--placement", choices=PLACEMENTS, default="dedicated",
                       help="shards have nodes of their own, or those of the workers")
    group.add_argument("--bandwidth", type=units.rate, default=inf, metavar="R", help="of a node's link, as 10Gbit/s")
    group.add_argument("--latency", type=units.seconds, default=0.0, metavar="T", help="of a message, as 50us")
    group.add_argument("--local", type=units.rate, default=inf, metavar="R", help="from worker to shard within a node")
    group.add_argument("--memory", type=units.rate, default=inf, metavar="R",
                       help="bandwidth of a shard's memory, as 10GB/s: for sums and updates")
    group.add_argument("--straggler", default="none", metavar="HOW", help=f"{KINDS}; joined by + (default: none)")
    group.add_argument("--overlap", type=float, default=0.0, metavar="X",
                       help="share of a microbatch, at its end, during which gradients leave (default: 0: all at "
                            "its end, as with zero=1; with the engine's default, zero=2, they leave during backward, "
                            "shard by shard: up to 0.67 where that takes twice as long as forward)")


def add_failures(group: Any) -> None:
    group.add_argument("--mtbf", type=units.seconds, default=inf, metavar="T", help="of a node, as 30d")
    group.add_argument("--restart", type=units.seconds, default=60.0, metavar="T",
                       help="until a dead node is back (default: 1min)")
    group.add_argument("--durability", choices=("snapshot", "log", "backup"), default="",
                       help="what shards come back with (default: snapshot for bsp without backups, else log)")
    group.add_argument("--snapshot-every", type=int, default=100, metavar="N", help="steps (default: 100)")
    group.add_argument("--disk", type=units.rate, default=inf, metavar="R", help="for logs and snapshots, as 1GB/s")
    group.add_argument("--fsync", type=units.seconds, default=0.0, metavar="T", help="of a write")


def counts(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers of shards, as in 1,2,4,8")
    return sorted(set(found))


def main() -> int:
    given = parse()
    if given.check == "here":
        return check_here()
    if given.check:
        return check_published()
    if given.clocks < 3:
        raise ProgramError(f"--clocks is {given.clocks}, expected at least 3")
    plan, shards = planned(given)
    predictions = scan(plan, shards, given.clocks, given.seed)
    chosen = best(predictions)
    if given.json:
        print(json.dumps({"best": chosen.plan.shards, "predictions": [finite(p.asdict()) for p in predictions]},
                         indent=1))
    else:
        print(f"{describe(plan)}\n\n{table(predictions)}")
        if len(predictions) > 1:
            print(f"\nbest: {chosen.plan.shards} shards (the fewest within 1 % of the fastest)")
    if given.png:
        from tools.planning.plot import plot

        plot(predictions, chosen, describe(plan), given.png)
        print(f"wrote {given.png}", file=sys.stderr)
    return 0


def planned(given: argparse.Namespace) -> tuple[Plan, list[int]]:
    """The plan that the flags describe, and the numbers of shards to look at."""
    sources = [name for name in ("model", "config", "parameters") if getattr(given, name) is not None]
    if len(sources) != 1 or given.workers is None:
        raise ProgramError("expected --workers, and one of --model, --config and --parameters; see --help")
    parameters = (given.parameters if given.parameters is not None else models.from_file(given.config) if given.config
                  else models.parameters_of(models.PRESETS[given.model]))
    if (given.work is None) == (given.flops is None):
        raise ProgramError("expected one of --work, the time of a microbatch, and --flops, with --tokens")
    if given.flops is not None and not (given.flops > 0 and given.tokens > 0):
        raise ProgramError(f"--flops is {given.flops:g} and --tokens {given.tokens:g}, expected both more than 0")
    work = given.work if given.work is not None else 6 * parameters * given.tokens / given.flops
    if given.shards is not None and given.scan:
        raise ProgramError("expected --shards or --scan, not both")
    shards = [given.shards] if given.shards is not None else given.scan or [
        2 ** i for i in range(max(1, given.workers.bit_length()))]
    names = ("workers", "microbatches", "tokens", "straggler", "consistency", "backups", "compress", "optimizer",
             "placement", "bandwidth", "latency", "local", "memory", "overlap", "disk", "fsync", "durability",
             "snapshot_every", "mtbf", "restart")
    plan = Plan(parameters, work=work, shards=shards[0], **{name: getattr(given, name) for name in names})
    return plan, [s for s in shards if s <= parameters]


def describe(plan: Plan) -> str:
    parts = [f"{plan.parameters:,.0f} parameters", f"{plan.workers} workers", f"{plan.microbatches} microbatches of "
             f"{units.show_seconds(plan.work)}", plan.consistency]
    if plan.backups:
        parts.append(f"{plan.backups} backups")
    if plan.compress != "none":
        parts.append(plan.compress)
    if plan.bandwidth < inf:
        parts.append(f"{plan.bandwidth * 8 / 1e9:g} Gbit/s")
    if plan.straggler != "none":
        parts.append(plan.straggler)
    return "; ".join(parts)


# ── predictions beside what is known ──────────────────────────────────────────────────────────────────

def check_published() -> int:
    for case in published.CASES:
        print(f"{case.name}: {case.source}")
        rows = [["", "predicted", "published", "", "error"]]
        rows += [[f"  {c.what}", f"{c.predicted:.4g}", f"{c.published:.4g}", c.unit, f"{100 * c.error:+.1f} %"]
                 for c in case.comparisons()]
        print(f"{aligned(rows)}\n  {case.note}\n", flush=True)
    return 0


def check_here() -> int:
    from tools.planning.measured import measured

    rows = [["", "microbatch", "1 worker", "2, predicted", "2, measured", "error"]]
    rows += [[f"{m.model}, {m.driver}", *map(units.show_seconds, (m.microbatch, m.one, m.predicted, m.two)),
              f"{100 * m.error:+.1f} %"] for m in measured()]
    print("measured: a microbatch alone, and a step of 4 of them with one worker; two workers are predicted from those")
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("plan", main))
