"""A scan over the number of shards as a picture: where a step's time goes, and what it needs."""

from __future__ import annotations

from pathlib import Path

from tools.planning.predict import DAY, PARTS, Prediction
from tools.training.errors import require

COLOURS = dict(zip(PARTS, ("#1f4e79", "#c0504d", "#8064a2", "#e0a030", "#d0d0d0")))


def plot(predictions: list[Prediction], chosen: Prediction, title: str, path: Path) -> None:
    """Write a PNG."""
    figure = require("matplotlib.figure", "the plot").Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 3, 3))
    places, labels = range(len(predictions)), [str(p.plan.shards) for p in predictions]
    below = [0.0] * len(predictions)
    for part in PARTS:
        heights = [p.parts[part] for p in predictions]
        left.bar(places, heights, 0.7, below, label=part, color=COLOURS[part])
        below = [a + b for a, b in zip(below, heights)]
    left.plot(places, [p.p90 for p in predictions], "_", color="black", markersize=16, label="nine tenths of the steps")
    left.set(ylabel="seconds of a worker's step", ylim=(0, 1.3 * max(*below, *(p.p90 for p in predictions))))
    left.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    middle.plot(places, [p.rate for p in predictions], "o-", color=COLOURS["compute"])
    middle.plot([predictions.index(chosen)], [chosen.rate], "o", color=COLOURS["push"], markersize=10,
                label=f"best: {chosen.plan.shards}, failures take {100 * chosen.lost_a_day / DAY:.2g} %")
    middle.set(ylabel="tokens/s" if chosen.plan.tokens else "microbatches/s", ylim=(0, None))
    middle.legend(frameon=False, fontsize=9, loc="lower right")
    for kind, colour in (("worker", COLOURS["compute"]), ("shard", COLOURS["push"])):
        memory = [sum(p.memory[kind].values()) / 1e9 for p in predictions]
        right.plot(places, memory, "o-", color=colour, label=f"of a {kind}")
    right.set(ylabel="memory, GB", ylim=(0, None))
    right.legend(frameon=False, fontsize=9)
    for axes in (left, middle, right):
        axes.set_xlabel("shards")
        axes.set_xticks(list(places), labels)
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
