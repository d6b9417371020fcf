"""Predictions as text."""

from __future__ import annotations

from collections.abc import Sequence

from tools.planning.predict import PARTS, Prediction
from tools.planning.units import show_bytes, show_seconds


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def table(predictions: Sequence[Prediction]) -> str:
    """One column a prediction."""
    def row(name: str, cells: Sequence[str]) -> list[str]:
        return [name, *cells]

    unit = "tokens/s" if predictions[0].plan.tokens else "microbatches/s"
    rows = [row("shards", [str(p.plan.shards) for p in predictions]),
            row("step, median", [show_seconds(p.step) for p in predictions]),
            row("  90 %", [show_seconds(p.p90) for p in predictions]),
            row("  mean", [show_seconds(p.mean) for p in predictions])]
    rows += [row(f"  {part}", [f"{show_seconds(p.parts[part])} {p.parts[part] / sum(p.parts.values()):4.0%}"
                               if sum(p.parts.values()) else "0" for p in predictions]) for part in PARTS]
    rows += [row("a worker's link, out", [show_bytes(p.pushed) for p in predictions]),
             row("  in, a step", [show_bytes(p.pulled) for p in predictions]),
             row("a shard's link, in", [show_bytes(p.received) for p in predictions]),
             row("  out, a step", [show_bytes(p.served) for p in predictions])]
    for kind in ("worker", "shard"):
        rows.append(row(f"memory of a {kind}", [show_bytes(sum(p.memory[kind].values())) for p in predictions]))
        rows += [row(f"  {what}", [show_bytes(p.memory[kind][what]) for p in predictions])
                 for what in predictions[0].memory[kind]]
    if any(p.lost for p in predictions):
        rows.append(row("lost to failures a day", [show_seconds(p.lost_a_day) for p in predictions]))
    rows.append(row(unit, [f"{p.rate:,.4g}" if p.rate < 1e4 else f"{p.rate:,.0f}" for p in predictions]))
    return aligned(rows)
