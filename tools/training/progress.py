"""What a person watches: a bar on a terminal, a line every so often where output goes to a file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tools.training.errors import require

LINE_SECONDS = 10.0  # between two lines where there is no terminal
AVERAGING = 0.9      # weight of the past in the moving averages


def duration(seconds: float) -> str:
    """90 → "1:30", 3700 → "1:01:40"."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def show_percent(done: int, total: int) -> None:
    """A running figure on a terminal, gone when it reaches the end; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{100 * done // total} %" if done < total else "\r     \r", end="", file=sys.stderr, flush=True)


@dataclass
class Progress:
    """Loss, tokens/s, GFLOP/s and its share of the measured peak, and the time left.

    flops_per_token counts what the mathematics of forward and backward asks for, so it is comparable between
    programs; peak_flops is what this machine was measured to do per second on as many threads, None if unknown.
    """

    first_step: int
    steps: int
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    loss: float | None = None
    rate: float | None = None  # tokens per second

    def __post_init__(self) -> None:
        self.bar = None
        self.clock = self.last_line = time.perf_counter()
        if sys.stderr.isatty():
            self.bar = require("tqdm", "the progress bar").tqdm(
                total=self.steps, initial=self.first_step, unit="step", dynamic_ncols=True, smoothing=0.05,
                bar_format="{percentage:3.0f}% |{bar}| {n}/{total}{postfix}, ETA {remaining}")

    def update(self, step: int, bits_per_byte: float, status: str = "") -> None:
        """Called after each step; `step` counts the finished ones. status: what else is to be seen."""
        now = time.perf_counter()
        rate = self.tokens_per_step / max(now - self.clock, 1e-9)
        self.clock = now
        self.loss = bits_per_byte if self.loss is None else AVERAGING * self.loss + (1 - AVERAGING) * bits_per_byte
        self.rate = rate if self.rate is None else AVERAGING * self.rate + (1 - AVERAGING) * rate
        figures = ", ".join(filter(None, [self.figures(), status]))
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(1)
        elif now - self.last_line >= LINE_SECONDS or step == self.steps:
            self.last_line = now
            left = (self.steps - step) * self.tokens_per_step / self.rate
            self.say(f"step {step}/{self.steps}  {figures}, ETA {duration(left)}")

    def figures(self) -> str:
        flops = (self.rate or 0.0) * self.flops_per_token
        share = f" ({100 * flops / self.peak_flops:.0f}% of peak)" if self.peak_flops else ""
        return f"{self.loss:.3f} bits/byte, {self.rate:,.0f} tokens/s, {flops / 1e9:.1f} GFLOP/s{share}"

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def measured(self, peak_flops: float | None) -> None:
        """Another measurement of the peak: the highest counts, since other programs can only lower it."""
        if peak_flops is not None:
            self.peak_flops = max(peak_flops, self.peak_flops or 0.0)

    def pause(self) -> None:
        """Time until now was not spent on steps (validation, a checkpoint): leave it out of the rates."""
        self.clock = time.perf_counter()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
