"""How much longer than usual a microbatch takes, drawn for each.

    none
    stall:0.1:4          one in ten takes 4 times as long
    slow:1:6             one worker, the last, always takes 6 times as long
    lognormal:0.2        e^(0.2 z), z standard normal: the median is 1
    exponential:0.3      1 + 0.3 times a standard exponential; the shortest is 1

Several are joined by +, and multiply. A draw is a function of (seed, worker, clock, microbatch) alone, so that two
plans are compared on the same luck, and a microbatch that is computed again takes as long as the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, isfinite
from random import Random

Factor = Callable[[Random, int, int], float]
"""factor(random, worker, workers)"""

KINDS = "none, stall:P:F, slow:K:F, lognormal:SIGMA or exponential:SCALE"


def parse(text: str) -> list[Factor]:
    """The factors that `text` names. Raises ValueError with one line."""
    return [_parse(part) for part in text.split("+") if part != "none"]


def _parse(text: str) -> Factor:
    name, *given = text.split(":")
    try:
        numbers = [float(x) for x in given]
    except ValueError:
        numbers = []
    if all(isfinite(x) and x >= 0 for x in numbers):
        if len(numbers) == 2:
            a, b = numbers
            if name == "stall" and a <= 1:
                return lambda random, worker, workers: b if random.random() < a else 1.0
            if name == "slow" and a == int(a):
                return lambda random, worker, workers: b if worker >= workers - a else 1.0
        elif len(numbers) == 1:
            scale = numbers[0]
            if name == "lognormal":
                return lambda random, worker, workers: exp(scale * random.gauss(0, 1))
            if name == "exponential":
                return lambda random, worker, workers: 1 + scale * random.expovariate(1)
    raise ValueError(f"straggler is {text!r}, expected {KINDS}")


def drawn(factors: list[Factor], seconds: float, seed: int, workers: int) -> Callable[[int, int, int], float]:
    """work(worker, clock, microbatch): seconds."""
    if not factors:
        return lambda worker, clock, microbatch: seconds

    def work(worker: int, clock: int, microbatch: int) -> float:
        random, factor = Random(f"{seed} {worker} {clock} {microbatch}"), 1.0
        for draw in factors:
            factor *= draw(random, worker, workers)
        return seconds * factor

    return work
