"""The ladder: matrix products in seven rungs, attention in four. Validates each, times each, draws them.

    python tools/ladder/ladder.py                       make ladder
    python tools/ladder/ladder.py --check               only validate: every rung on odd sizes against float64
    python tools/ladder/ladder.py --size 1024 --threads 1 --png ladder.png

Contestants take turns (tools/benchmarks/contest.py), and so does the machine: a pure loop of fused multiply-adds, with
the threads of the row. The fastest of these is the peak, since other work on the machine only takes away, and a rung's
bar is its median as a share of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed

if TYPE_CHECKING:
    import numpy as np

    from tools.benchmarks.contest import Contest, Result
    from tools.ladder.rungs import Loaded

HEADS, WIDTH = 4, 64  # of the attention that is timed


@dataclass
class Bar:
    """One line of the table and one bar of the picture; the rates are GFLOP/s."""

    who: str
    threads: int
    low: float
    median: float
    high: float
    peak: float

    @property
    def is_rung(self) -> bool:
        return self.who[0].isdigit()

    @property
    def share(self) -> float:
        return self.median / self.peak

    def line(self, below: Bar | None) -> str:
        gain = f"{self.median / below.median:.1f}" if below else ""
        return (f"| {self.who} | {self.threads} | {self.median:.3g} | {self.low:.3g}–{self.high:.3g} | {gain} "
                f"| {self.share:.3f} |")


def bars_of(result: Result, threads: int) -> list[Bar]:
    peak = result.contest.work / min(result.bounds)
    return [Bar(who, threads, result.shown(who, 0.9), result.shown(who), result.shown(who, 0.1), peak)
            for who in result.seconds]


# ── what is timed ─────────────────────────────────────────────────────────────────────────────────────

def pooled(*shape: int, seed: int) -> tuple[Any, np.ndarray]:
    """Random numbers in aligned memory of the engine's pool: for the engine and for everybody else."""
    import numpy as np

    from engine.backend import get_backend

    array = get_backend("cpu").array(np.random.default_rng(seed).standard_normal(shape, np.float32))
    return array, array.data


def gemm_contest(rungs: Sequence[Loaded], size: int, openblas: bool) -> Contest:
    import numpy as np

    from engine.backend import get_backend
    from tools.benchmarks.contest import Contest

    (out, c), (x, a), (y, b) = (pooled(size, size, seed=seed) for seed in range(3))
    backend = get_backend("cpu")
    runs: dict[str, Callable[[], object]] = {rung.rung.title: rung.bind(c, a, b) for rung in rungs}
    runs["engine"] = lambda: backend.gemm(out, x, y, None, 1, size, size, size, 0, size, 1, 0, size, 1, 0, size, 0)
    if openblas:
        runs["OpenBLAS"] = lambda: np.matmul(a, b, out=c)
    flops = 2.0 * size**3
    return Contest(f"GEMM {size}×{size}×{size}", runs, flops, work=flops / 1e9, unit="GFLOP/s", streams=False)


def attention_contest(rungs: Sequence[Loaded], time: int) -> Contest:
    import engine as eg
    from tools.benchmarks.contest import Contest

    (_, out), (q, qs), (k, ks), (v, vs) = (pooled(HEADS, time, WIDTH, seed=seed) for seed in range(4))
    tensors = [eg.tensor(x.data[None]) for x in (q, k, v)]
    runs: dict[str, Callable[[], object]] = {rung.rung.title: rung.bind(out, qs, ks, vs) for rung in rungs}
    runs["engine"] = lambda: eg.scaled_dot_product_attention(*tensors, causal=True)
    flops = 4.0 * HEADS * WIDTH * time * (time + 1) / 2  # of what a causal mask leaves
    return Contest(f"causal attention {HEADS}×{time}×{WIDTH}", runs, flops, work=flops / 1e9, unit="GFLOP/s",
                   streams=False)


def climb(loaded: Sequence[Loaded], arguments: argparse.Namespace) -> dict[str, list[Bar]]:
    """Times everything; the bars of each table."""
    from engine.backend import set_num_threads
    from tools.benchmarks.contest import measure
    from tools.benchmarks.machine import probes

    gemm = [rung for rung in loaded if rung.rung.family == "gemm"]
    attention = [rung for rung in loaded if rung.rung.family == "attention"]
    threaded = [rung for rung in gemm if rung.rung.idea == "threads"]
    contests = [(1, gemm_contest([rung for rung in gemm if rung not in threaded], arguments.size, False)),
                (arguments.threads, gemm_contest(threaded, arguments.size, True)),
                (1, attention_contest(attention, arguments.time))]
    tables: dict[str, list[Bar]] = {}
    for threads, contest in contests:
        set_num_threads(threads)
        for rung in loaded:
            rung.set_threads(threads)
        tables.setdefault(contest.name, []).extend(bars_of(measure(contest, arguments.seconds, probes()), threads))
    return tables


# ── what is shown ─────────────────────────────────────────────────────────────────────────────────────

def peaks(bars: Sequence[Bar]) -> dict[str, float]:
    """The machine's GFLOP/s with each number of threads, by what it is called."""
    return {f"{bar.threads} thread{'s' if bar.threads > 1 else ''}": bar.peak for bar in bars}


def table(title: str, bars: Sequence[Bar]) -> str:
    limits = ", ".join(f"{limit:.0f} GFLOP/s with {threads}" for threads, limit in peaks(bars).items())
    rungs = [bar for bar in bars if bar.is_rung]
    below = dict(zip([bar.who for bar in rungs[1:]], rungs))
    return "\n".join([f"{title}, float32; peak {limits}", "",
                      "| rung | threads | GFLOP/s | 10–90 % | × the rung below | of the peak |",
                      "|---|---|---|---|---|---|",
                      *(bar.line(below.get(bar.who)) for bar in bars)]) + "\n"


def draw(path: Path, tables: dict[str, list[Bar]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 + 0.34 * sum(map(len, tables.values()))), layout="constrained")
    panels = figure.subplots(len(tables), 1, sharex=True, squeeze=False,
                             height_ratios=[len(bars) for bars in tables.values()])[:, 0]
    for axes, (title, bars) in zip(panels, tables.items()):
        for (threads, limit), style in zip(peaks(bars).items(), ("--", "-")):
            axes.axvline(limit, color="#b5523b", linestyle=style, linewidth=1,
                         label=f"peak, {threads}: {limit:.0f} GFLOP/s")
        axes.barh(range(len(bars)), [bar.median for bar in bars], ecolor="#333333",
                  xerr=[[bar.median - bar.low for bar in bars], [bar.high - bar.median for bar in bars]],
                  color=["#3b6ea5" if bar.is_rung else "#b9b9b9" for bar in bars])
        for place, bar in enumerate(bars):
            axes.annotate(f"{bar.median:.3g} GFLOP/s, {bar.share:.1%} of the peak", (bar.high, place), (6, 0),
                          textcoords="offset points", va="center", fontsize=8,
                          bbox={"color": "white", "pad": 1})
        axes.set_yticks(range(len(bars)), [f"{bar.who}, {bar.threads} thr." if bar.threads > 1 else bar.who
                                           for bar in bars])
        axes.invert_yaxis()
        axes.set(xscale="log", title=title, xlim=(0.3, 15 * max(bar.peak for bar in bars)))
        axes.legend(fontsize=8, loc="upper right")
    panels[-1].set_xlabel("GFLOP/s: median, and the 10–90 % spread")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def show(path: Path, tables: dict[str, list[Bar]]) -> None:
    for title, bars in tables.items():
        print("\n" + table(title, bars), flush=True)
    try:
        draw(path, tables)
        print(f"wrote {path}")
    except ImportError:
        print("ladder: no picture, since matplotlib is not installed (pip install matplotlib)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="validate the rungs and do not time them")
    parser.add_argument("--size", type=int, default=768, metavar="N", help="of the square matrices (default: 768)")
    parser.add_argument("--time", type=int, default=1024, metavar="T", help="of the sequences (default: 1024)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N",
                        help="of the last GEMM rung, the engine's and OpenBLAS beside it (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="for each table (default: 10)")
    parser.add_argument("--png", type=Path, default=ROOT / "runs" / "ladder" / "ladder.png", metavar="FILE",
                        help="the picture (default: runs/ladder/ladder.png)")
    arguments = parser.parse_args()
    for name in ("size", "time", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: got {getattr(arguments, name)}, expected a positive whole number")
    return arguments


def main() -> int:
    arguments = parse()
    from tools.benchmarks.peers import prepare_environment

    if not arguments.check:
        prepare_environment(arguments.threads)  # before NumPy is imported
    from tools.build_kernels import BuildError
    from tools.ladder.rungs import RungError, find_rungs, load_rungs, validate

    try:
        loaded = load_rungs(find_rungs())
        for rung in loaded:
            validate(rung, threads=3)
    except (BuildError, RungError) as error:
        print(f"ladder: {error}", file=sys.stderr)
        return 1
    print(f"ladder: {len(loaded)} rungs agree with float64", flush=True)
    if arguments.check:
        return 0
    show(arguments.png, climb(loaded, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
