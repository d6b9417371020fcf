"""A table of results as text, as JSON and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.benchmarks.contest import OURS, TIMES, Machine, Result
from tools.benchmarks.goals import Notes, goal_of


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def head(machine: Machine) -> str:
    return (f"{machine.threads} threads: peak {machine.peak / 1e9:.1f} GFLOP/s float32, read {machine.read / 1e9:.1f} "
            f"GB/s, copy {machine.copy / 1e9:.1f} GB/s")


def table(title: str, machine: Machine, results: list[Result]) -> str:
    """A line a result: the median of each contestant, our 10-90 % spread, × the best peer, share of the bound, the
    goal; and below the lines what limits those that miss theirs."""
    who, notes = list(dict.fromkeys(name for r in results for name in r.seconds)), Notes()
    lines = [f"{title} ({head(machine)})", "",
             "| work | unit | " + " | ".join(who) + " | 10–90 % | × best peer | of bound | goal |",
             "|---" * (len(who) + 6) + "|"]
    for r in results:
        cells = [number(r.shown(name)) if name in r.seconds else "" for name in who]
        spread = "–".join(number(r.shown(OURS, q)) for q in ((0.1, 0.9) if r.contest.unit in TIMES else (0.9, 0.1)))
        lines.append(f"| {r.contest.name} | {r.contest.unit} | " + " | ".join(cells) + f" | {spread} | "
                     + (f"{r.ratio:.2f}" if r.ratio else "") + " | "
                     + (f"{r.of_bound:.2f}" if r.of_bound else "") + f" | {notes.cell(title, r)} |")
    return "\n".join([*lines, *(["", *notes.lines()] if notes.texts else [])]) + "\n"


def rows(title: str, results: list[Result]) -> list[dict[str, Any]]:
    """[{"name", "unit", "ratio", "goal", "met", "seconds": {who: [of each turn]} ...}]"""
    goals = [goal_of(title, r) for r in results]
    return [{"name": r.contest.name, "unit": r.contest.unit, "work": r.contest.work, "flops": r.contest.flops,
             "bytes": r.contest.bytes, "ratio": r.ratio, "of_bound": r.of_bound, "goal": goal and goal.text(),
             "met": goal and goal.met(r), "seconds": r.seconds, "bounds": r.bounds} for r, goal in zip(results, goals)]


def save_json(path: Path, tables: dict[str, tuple[Machine, list[dict[str, Any]]]]) -> None:
    """{table: {"machine": ..., "rows": [...]}}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({title: {"machine": asdict(machine), "rows": found}
                                for title, (machine, found) in tables.items()}, indent=1))


def save_picture(path: Path, title: str, machine: Machine, results: list[Result]) -> None:
    """Bars: how many times as fast as the best peer we are, beside a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results if r.ratio is not None]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(rows)))
    ratios = [r.ratio or 0.0 for r in rows]
    axes.barh([f"{r.contest.name}  ({r.best_peer})" for r in rows], ratios,
              color=["#3b7d4f" if ratio >= 1 else "#b5523b" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the best peer")
    axes.set_title(f"{title}: {head(machine)}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
