"""What the engine has, from the registry: the README's table of ops, and what has run on a GPU.

    python tools/op_table.py            print the table
    python tools/op_table.py --check    exit status 1 if README.md shows another one
    python tools/op_table.py --write    put it into README.md, between its two marks

Every row of the op table is run once on the CPU, and the launch point tells which kernels that took; a kernel is in C
if kernels.h declares it, and in CUDA if kernels/cuda defines it. `make test-gpu` leaves what it saw on a device in
kernels/cuda/hardware.json; without that file nothing has run on one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import engine as eg
import engine.testing.rows
from engine.backend import cuda_source, observers
from engine.ops.registry import Op, registry
from engine.testing import specs
from engine.testing.source import Seeded
from tools.training.errors import run_program

ROOT = Path(__file__).resolve().parent.parent
README, HARDWARE = ROOT / "README.md", ROOT / "kernels" / "cuda" / "hardware.json"
MARKS = ("<!-- tools/op_table.py -->\n", "<!-- end -->\n")
EXAMPLES = 5  # of a row: one alone may be empty, or of a kind that takes another path


@dataclass
class Family:
    """The ops of one file of engine/ops, and the kernels that they launch, backward included."""

    name: str
    ops: list[Op] = field(default_factory=list)
    launched: set[str] = field(default_factory=set)


def kernels_of(op: Op) -> set[str]:
    """The kernels that the examples of an op launch on the CPU."""
    seen: set[str] = set()

    def note(name: str, _arguments: tuple[Any, ...]) -> None:
        seen.add(name)

    observers.append(note)
    try:
        for spec in [s for s in specs.values() if s.op == op.name]:
            for number in range(EXAMPLES):
                case = spec.example(Seeded(number, "float32"))
                leaves = [eg.tensor(x, requires_grad=x.dtype.kind == "f") for x in spec.points(case)]
                y = spec.function(case)(*leaves)
                if isinstance(y, eg.Tensor) and y.requires_grad:
                    y.backward(eg.ones(y.shape, dtype=y.dtype))
    finally:
        observers.remove(note)
    return seen


def differentiable(op: Op) -> bool:
    return any(spec.wrt for spec in specs.values() if spec.op == op.name)


def families() -> list[Family]:
    found: dict[str, Family] = {}
    for op in registry.values():
        name = op.forward.__module__.rpartition(".")[2]
        family = found.setdefault(name, Family(name))
        family.ops.append(op)
        family.launched |= kernels_of(op)
    return list(found.values())


def _count(names: Iterable[str], of: set[str]) -> str:
    chosen = set(names)
    return f"{len(chosen & of)} of {len(chosen)}" if chosen else "—"


def table() -> str:
    """The README's table, in Markdown."""
    in_c = set(cuda_source.prototypes((ROOT / "kernels" / "kernels.h").read_text(encoding="utf-8")))
    in_cuda = set(cuda_source.kernels())
    ran = json.loads(HARDWARE.read_text(encoding="utf-8")) if HARDWARE.exists() else None
    rows = ["| file of `engine/ops` | ops | with a gradient | kernels in C | in CUDA | ran on a GPU |",
            "|---|---|---|---|---|---|"]
    every = families()
    for family in every:
        gpu = "never" if ran is None else _count([op.name for op in family.ops], set(ran["ops"]))
        rows.append(f"| `{family.name}.py` | {', '.join(op.name for op in family.ops)} "
                    f"| {_count([op.name for op in family.ops], {op.name for op in family.ops if differentiable(op)})} "
                    f"| {_count(family.launched, in_c)} | {_count(family.launched, in_cuda)} | {gpu} |")
    launched = set().union(*(family.launched for family in every))
    ops = sum(len(family.ops) for family in every)
    rows += ["", f"{ops} ops launch {len(launched)} kernels: {len(launched & in_c)} are in C for float32 "
             f"and float64, the others are NumPy behind the same launch point. On the GPU {len(launched & in_cuda)} "
             "of them are in CUDA, the others are CuPy's.", ""]
    rows.append("Nothing of it has run on a real GPU yet: compiled and emulated only." if ran is None else
                f"On a real GPU, {ran['device']} ({ran['date']}): {len(ran['ops'])} ops and {len(ran['kernels'])} of "
                f"{len(in_cuda)} CUDA kernels ran.")
    return "\n".join(rows) + "\n"


def replaced(text: str, new: str) -> str:
    """README's text with the table in place of what stands between the marks."""
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise SystemExit(f"op_table: README.md has no lines {MARKS[0].strip()} and {MARKS[1].strip()}")
    return before + mark + new + end + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit status 1 if README.md shows another table")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    new, text = table(), README.read_text(encoding="utf-8")
    if arguments.write:
        README.write_text(replaced(text, new), encoding="utf-8")
    elif arguments.check:
        if replaced(text, new) != text:
            print("op_table: README.md shows another table; python tools/op_table.py --write", file=sys.stderr)
            return 1
    else:
        print(new, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("op_table", main))
