"""Where the time goes: every kernel's calls, seconds, bytes and flops, as a table and as a Chrome trace."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from engine.backend import Array, finishers
from engine.backend.roofs import peak_flops


@dataclass
class Event:
    """One launch: times in seconds since the profile began, bytes of all its arrays, floating-point operations."""

    name: str
    start: float
    seconds: float
    bytes: int
    flops: float
    thread: int
    shapes: str


def _flops(name: str, arguments: tuple[Any, ...]) -> float:
    """Flops of the kernels whose count is a formula of their sizes: matrix products and attention; else 0."""
    if name == "gemm":
        batch, m, n, k = arguments[4:8]
        return 2.0 * batch * m * n * k
    if name in ("linear_activation", "linear_activation_vjp"):
        m, n, k = arguments[5:8] if name == "linear_activation" else arguments[4:7]
        return 2.0 * m * n * k
    if name in ("attention", "attention_vjp"):
        batch, heads, _, t, s, d, _, _, causal = arguments[7:16] if name == "attention" else arguments[12:21]
        seen = sum(max(0, s - t + 1 + query) for query in range(t)) if causal else t * s  # pairs of query and key
        products = 2 if name == "attention" else 5  # QKᵀ and PV; backward: QKᵀ again, dP, dV, dQ, dK
        return 2.0 * products * batch * heads * seen * d
    return 0.0


@cache
def _peak_gflops() -> float | None:
    flops = peak_flops()
    return flops and flops / 1e9


class Profile:
    """What `eg.profile()` recorded. `str(profile)` is the table; `trace(path)` writes it for chrome://tracing."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.started = perf_counter()
        self.seconds = 0.0

    def record(self, name: str, arguments: tuple[Any, ...], seconds: float) -> None:
        arrays = [a for a in arguments if isinstance(a, Array)]
        self.events.append(Event(name, perf_counter() - self.started - seconds, seconds,
                                 sum(a.data.nbytes for a in arrays), _flops(name, arguments),
                                 threading.get_ident(), " ".join(str(a.shape) for a in arrays)))

    def rows(self) -> list[tuple[str, int, float, int, float]]:
        """(kernel, calls, seconds, bytes, flops) summed by kernel, the slowest first."""
        by_name: dict[str, list[Event]] = {}
        for event in self.events:
            by_name.setdefault(event.name, []).append(event)
        rows = [(name, len(es), sum(e.seconds for e in es), sum(e.bytes for e in es), sum(e.flops for e in es))
                for name, es in by_name.items()]
        return sorted(rows, key=lambda row: -row[2])

    def table(self, peak_gflops: float | None = None) -> str:
        """A line for each kernel, with its share of `peak_gflops`: by default what this machine was measured to reach.

        The measurement takes a fraction of a second, once, and only where some kernel's flops are known.
        """
        if peak_gflops is None and any(event.flops for event in self.events):
            peak_gflops = _peak_gflops()
        head = f"{'kernel':<20}{'calls':>8}{'ms':>11}{'share':>8}{'GB/s':>9}{'GFLOP/s':>10}"
        lines = [head + (f"{'of peak':>9}" if peak_gflops else "")]
        for name, calls, seconds, size, flops in self.rows():
            rate = flops / seconds / 1e9 if seconds else 0.0
            lines.append(f"{name:<20}{calls:>8}{seconds * 1e3:>11.3f}{seconds / max(self.seconds, 1e-12):>8.1%}"
                         f"{size / max(seconds, 1e-12) / 1e9:>9.1f}{rate:>10.1f}"
                         + (f"{rate / peak_gflops:>9.1%}" if peak_gflops and rate else ""))
        inside = sum(event.seconds for event in self.events)
        lines.append(f"{'in kernels':<20}{len(self.events):>8}{inside * 1e3:>11.3f}"
                     f"{inside / max(self.seconds, 1e-12):>8.1%}   of {self.seconds * 1e3:.3f} ms")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def trace(self, path: str | Path) -> None:
        """Write the events as Chrome trace JSON (open in chrome://tracing or ui.perfetto.dev)."""
        events = [{"name": e.name, "ph": "X", "ts": e.start * 1e6, "dur": e.seconds * 1e6, "pid": 0, "tid": e.thread,
                   "args": {"bytes": e.bytes, "flops": e.flops, "shapes": e.shapes}} for e in self.events]
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


@contextmanager
def profile() -> Iterator[Profile]:
    """`with eg.profile() as p: ...; print(p)`: record every kernel launch in the block, in all threads."""
    recorded = Profile()
    finishers.append(recorded.record)
    try:
        yield recorded
    finally:
        finishers.remove(recorded.record)
        recorded.seconds = perf_counter() - recorded.started
