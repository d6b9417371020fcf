"""The loss curve as a picture: training and validation bits per byte over steps, the baselines as level lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.training.errors import require


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, with the bias of its start divided out."""
    smoothed, average, total = [], 0.0, 0.0
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed


def plot_losses(records: list[dict[str, Any]], baselines: dict[str, float], title: str, path: Path) -> None:
    """Write a PNG. A record gives "bits_per_byte" of its step's batch, or "validation_bits_per_byte", or both."""
    figure = require("matplotlib.figure", "the loss curve").Figure(figsize=(9, 5.2), dpi=130)
    axes = figure.subplots()
    training = [(r["step"], r["bits_per_byte"]) for r in records if "bits_per_byte" in r]
    validation = [(r["step"], r["validation_bits_per_byte"]) for r in records if "validation_bits_per_byte" in r]
    if training:
        steps, losses = [step for step, _ in training], [loss for _, loss in training]
        axes.plot(steps, losses, color="#b9cde5", linewidth=0.7, label="training, each step")
        axes.plot(steps, smooth(losses), color="#1f4e79", linewidth=1.6, label="training, moving average")
    if validation:
        axes.plot(*zip(*validation), "o-", color="#c0504d", markersize=4, linewidth=1.4, label="validation")
    for name, bits in baselines.items():
        axes.axhline(bits, color="#7f7f7f", linewidth=0.8, linestyle="--")
        axes.annotate(f"{name} {bits:.2f}", (1.0, bits), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", fontsize=8, color="#595959", va="center")
    levels = [*baselines.values(), *(bits for _, bits in validation)]
    if levels:
        axes.set_ylim(min(levels) - 0.25, max(max(levels), 5.0))
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    if records:
        axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
