"""What a reader must hold: lines of source by room, beside the goals of the design.

    python tools/lines.py [--files]

Counts lines that are not blank; docstrings and comments count, since they are what she reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from tools.training.errors import run_program

ROOT = Path(__file__).resolve().parent.parent

# Room, goal in lines (None: breadth, outside the budget), and its files.
ROOMS: list[tuple[str, int | None, list[str]]] = [
    ("autograd + tensor + ops", 1500, ["engine/tensor.py", "engine/autograd.py", "engine/ops/*.py"]),
    ("nn + optim", 700, ["engine/nn/*.py", "engine/optim/*.py"]),
    ("Transformer", 500, [f"engine/models/{name}.py" for name in ("__init__", "config", "transformer", "generation")]),
    ("sharder core", 900, ["engine/sharder/*.py"]),
    ("core C kernels", 2000, ["kernels/*.h", "kernels/*.c"]),
    ("the rest of the engine", None, ["engine/**/*.py"]),
    ("tools", None, ["tools/**/*.py"]),
    ("tests", None, ["tests/**/*.py", "tests/**/*.c"]),
]


def lines_of(path: Path) -> int:
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def rooms(root: Path) -> Iterable[tuple[str, int | None, dict[Path, int]]]:
    """Each room with its files and their lines; a file belongs to the first room that names it."""
    taken: set[Path] = set()
    for name, goal, patterns in ROOMS:
        paths = dict.fromkeys(p for pattern in patterns for p in sorted(root.glob(pattern)) if p not in taken)
        taken.update(paths)
        yield name, goal, {path: lines_of(path) for path in paths}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="list every file under its room")
    arguments = parser.parse_args()
    goals = total = 0
    print(f"{'room':<30}{'lines':>8}{'goal':>8}")
    for name, goal, files in rooms(ROOT):
        lines = sum(files.values())
        if goal is not None:
            goals, total = goals + goal, total + lines
        print(f"{name:<30}{lines:>8,}{goal or '':>8}")
        if arguments.files:
            for path, count in files.items():
                print(f"    {path.relative_to(ROOT).as_posix():<40}{count:>6,}")
    print(f"{'what an afternoon holds':<30}{total:>8,}{goals:>8}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("lines", main))
