"""The ladder: matrix products in seven rungs, attention in four. Validates each, times each, draws them.

    python tools/ladder/ladder.py                       make ladder
    python tools/ladder/ladder.py --check               only validate: every rung on odd sizes against float64
    python tools/ladder/ladder.py --size 1024 --threads 1 --png ladder.png

Contestants take turns, and between any two of them the machine's peak is measured, with the same number of threads: a
pure loop of fused multiply-adds. A rung's bar is its share of the peak right before and after it, the median over the
turns; GFLOP/s are this share of the fastest peak. So a machine that changes its speed is fair to all rungs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed

if TYPE_CHECKING:
    import numpy as np

    from tools.ladder.rungs import Loaded

Run = Callable[[], object]
HEADS, WIDTH = 4, 64  # of the attention that is timed


@dataclass
class Bar:
    """One line of the table and one bar of the picture: shares of the peak, which is in GFLOP/s."""

    who: str
    threads: int
    low: float
    share: float
    high: float
    peak: float

    @property
    def is_rung(self) -> bool:
        return self.who[0].isdigit()

    @property
    def rate(self) -> float:
        return self.share * self.peak

    def line(self, below: Bar | None) -> str:
        gain = f"{self.rate / below.rate:.1f}" if below else ""
        return (f"| {self.who} | {self.threads} | {self.rate:.3g} | {gain} | {self.share:.3f} "
                f"| {self.low:.3f}–{self.high:.3f} |")


# ── what is timed ─────────────────────────────────────────────────────────────────────────────────────

def pooled(*shape: int, seed: int) -> tuple[Any, np.ndarray]:
    """Random numbers in aligned memory of the engine's pool: for the engine and for everybody else."""
    import numpy as np

    from engine.backend import get_backend

    array = get_backend("cpu").array(np.random.default_rng(seed).standard_normal(shape, np.float32))
    return array, array.data


def gemm_runs(rungs: Sequence[Loaded], size: int, openblas: bool) -> dict[str, Run]:
    import numpy as np

    from engine.backend import get_backend

    (out, c), (x, a), (y, b) = (pooled(size, size, seed=seed) for seed in range(3))
    backend = get_backend("cpu")
    runs: dict[str, Run] = {rung.rung.title: rung.bind(c, a, b) for rung in rungs}
    runs["engine"] = lambda: backend.gemm(out, x, y, None, 1, size, size, size, 0, size, 1, 0, size, 1, 0, size, 0, 0)
    if openblas:
        runs["OpenBLAS"] = lambda: np.matmul(a, b, out=c)
    return runs


def attention_runs(rungs: Sequence[Loaded], t: int) -> dict[str, Run]:
    import engine as eg

    (_, out), (q, qs), (k, ks), (v, vs) = (pooled(HEADS, t, WIDTH, seed=seed) for seed in range(4))
    tensors = [eg.tensor(x.data[None]) for x in (q, k, v)]
    runs: dict[str, Run] = {rung.rung.title: rung.bind(out, qs, ks, vs) for rung in rungs}
    runs["engine"] = lambda: eg.scaled_dot_product_attention(*tensors, causal=True)
    return runs


def take_turns(runs: dict[str, Run], flops: float, threads: int, seconds: float, least_turns: int = 5) -> list[Bar]:
    """Each run's share of the peak beside it, for about `seconds`."""
    import numpy as np

    from engine.backend import set_num_threads
    from engine.backend.roofs import peak_flops
    from tools.benchmarks.contest import calls_a_turn, take_turn, wait_until_quiet

    set_num_threads(threads)
    calls = {who: calls_a_turn(run) for who, run in runs.items()}
    shares: dict[str, list[float]] = {who: [] for who in runs}
    peaks = [peak_flops(repeats=2) or 0.0]
    stop = time.perf_counter() + seconds
    while len(shares["engine"]) < least_turns or time.perf_counter() < stop:
        for who, run in runs.items():
            rate = flops / take_turn(run, calls[who])
            wait_until_quiet()
            peaks.append(peak_flops(repeats=2) or 0.0)
            shares[who].append(2 * rate / (peaks[-2] + peaks[-1]))
    bars = []
    for who in runs:
        low, median, high = (float(x) for x in np.quantile(shares[who], (0.1, 0.5, 0.9)))
        bars.append(Bar(who, threads, low, median, high, max(peaks) / 1e9))
    return bars


def climb(loaded: Sequence[Loaded], arguments: argparse.Namespace) -> dict[str, list[Bar]]:
    """Times everything; the bars of each table."""
    gemm = [rung for rung in loaded if rung.rung.family == "gemm"]
    attention = [rung for rung in loaded if rung.rung.family == "attention"]
    threaded = [rung for rung in gemm if rung.rung.idea == "threads"]
    for rung in loaded:
        rung.set_threads(arguments.threads if rung in threaded else 1)
    size, t = arguments.size, arguments.time
    flops = 2.0 * size**3
    visible = 4.0 * HEADS * WIDTH * t * (t + 1) / 2  # of what a causal mask leaves
    single = [rung for rung in gemm if rung not in threaded]
    return {
        f"GEMM {size}×{size}×{size}":
            take_turns(gemm_runs(single, size, False), flops, 1, arguments.seconds)
            + take_turns(gemm_runs(threaded, size, True), flops, arguments.threads, arguments.seconds),
        f"causal attention {HEADS}×{t}×{WIDTH}":
            take_turns(attention_runs(attention, t), visible, 1, arguments.seconds),
    }


# ── what is shown ─────────────────────────────────────────────────────────────────────────────────────

def peaks(bars: Sequence[Bar]) -> dict[str, float]:
    """The machine's GFLOP/s with each number of threads, by what it is called."""
    return {f"{bar.threads} thread{'s' if bar.threads > 1 else ''}": bar.peak for bar in bars}


def table(title: str, bars: Sequence[Bar]) -> str:
    limits = ", ".join(f"{limit:.0f} GFLOP/s with {threads}" for threads, limit in peaks(bars).items())
    rungs = [bar for bar in bars if bar.is_rung]
    below = dict(zip([bar.who for bar in rungs[1:]], rungs))
    return "\n".join([f"{title}, float32; peak {limits}", "",
                      "| rung | threads | GFLOP/s | × the rung below | of the peak | 10–90 % |",
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
        axes.barh(range(len(bars)), [bar.rate for bar in bars], ecolor="#333333",
                  xerr=[[(bar.share - bar.low) * bar.peak for bar in bars],
                        [(bar.high - bar.share) * bar.peak for bar in bars]],
                  color=["#3b6ea5" if bar.is_rung else "#b9b9b9" for bar in bars])
        for place, bar in enumerate(bars):
            axes.annotate(f"{bar.rate:.3g} GFLOP/s, {bar.share:.1%} of the peak", (bar.high * bar.peak, place),
                          (6, 0), textcoords="offset points", va="center", fontsize=8,
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
