"""What we want to reach in the rows of the tables, and what limits those that do not.

Goals are ratios, to the best peer of the same run or to the machine's limit in the same run, so that they mean the same
on every machine. What limits a row was measured where its text says, and is shown where the goal is missed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tools.benchmarks.contest import Result


@dataclass(frozen=True)
class Goal:
    """For the rows of a table whose whole name matches.

    ratio: times as fast as `peer`, or as the best one, at least; share: of the machine's limit, at least
    """

    table: str
    rows: str
    ratio: float | None = None
    share: float | None = None
    peer: str | None = None
    limit: str = ""

    def text(self) -> str:
        ratio = f"{self.ratio:g} × {self.peer or ''}".rstrip() if self.ratio else ""
        share = f"{self.share:g} of bound" if self.share else ""
        return ", ".join(part for part in (ratio, share) if part)

    def met(self, result: Result) -> bool | None:
        """None if something that it takes to say so is not there: a peer, the bound."""
        wanted = [(self.ratio, result.times(self.peer or result.best_peer)), (self.share, result.of_bound)]
        found = [got >= least for least, got in wanted if least is not None and got is not None]
        if not all(found):
            return False
        return True if len(found) == sum(least is not None for least, _ in wanted) else None


PACKING = ("Tiles alone reach 0.95 of the peak on packed panels; packing both operands for each task takes 14 % of the "
           "time, most of it waiting for memory. Packing once for all tasks gains 2 % at one shape and loses as much "
           "at another (Cascade Lake). Zen 4: tiles 0.97, packing takes 10 %, sums read and written 4; spans wider "
           "than 512 columns gain nothing, and asking for A during the tiles loses 1 to 2 %.")
SMALL = "Tasks of a few microseconds, of which the call through Python and the packing of both operands are a part."
TILES = ("AMX: two thirds of the time are tiles, which alone do 2,000 GFLOP/s on a core and 500 to 600 while the host "
         "runs another program on it, in any order of loads and multiplications; a quarter of that waits for the "
         "stores of tiles before the sums of blocks are added. The rest rounds and packs A again for each span. "
         "Smaller groups of rows gained nothing (Sapphire Rapids).")
EXPONENTIAL = ("Bound by arithmetic: some 30 operations an element and a division, for the accuracy that is promised. "
               "Zen 4: 26 cycles for 16 elements, 32 for their gradient; the FMA units alone need 24.")
STREAMS = ("Bound by memory, as PyTorch's is: at 0.9 to 1.0 of the copy bandwidth only fewer bytes would help "
           "(Sapphire Rapids).")
SOFTMAX = ("A row takes an exponential an element and is then written at once. Its lines are fetched before, so that "
           "12 bytes move where the bound has 8; past the caches, so many stores at once take longer. Zen 4: 23 cycles "
           "for 16 elements in the second-level cache, 12.5 of them exponentials; asking for lines earlier, adding up "
           "while exponentials are made, a corrected reciprocal for the division: 0 to 10 % together.")
LAUNCHES = ("Captured, a step is 184 launches with no Python in between, and AdamW takes 5 % of it; products take 81 %,"
            " of a few hundred microseconds each, at 0.55 of the peak that pure FMAs reach, PyTorch's at 0.7: the tile "
            "has 0.98 of it alone on a core, and 0.8 while the host runs another program on the same core (Sapphire "
            "Rapids, two threads).")
TOKEN = ("A token is one program of 149 launches; nearly all of its time are products that read their weights "
         "(Sapphire Rapids, two threads).")
WIDENING = ("8-bit weights are widened and multiplied as floats, 14 GB/s of them where memory has 21 (Sapphire Rapids, "
            "two threads); integer dot products would round x as well.")
PROMPT = ("A prompt is multiplied in float, at up to 0.9 of the FMA units' peak; peers round x to bfloat16 or to 8 "
          "bits and use AMX, or dot products of pairs and fours.")
SERVER = "Gradients of all workers meet in memory: their sum is written, and read again by the rule."

GOALS = (
    Goal("gemm", r".. 256×384×384", share=0.87, limit=SMALL),
    Goal("gemm", r".. 64×64×64", share=0.81, limit=SMALL),
    Goal("gemm", r".. 96 of .*", share=0.85, limit=SMALL),
    Goal("gemm", r".. bfloat16 .*", ratio=1, limit=TILES),
    Goal("gemm", r".. (1024|3072|512|2048)×.*", ratio=1, share=0.92, limit=PACKING),
    Goal("kernels", r"gelu_tanh (backward )?2048×3072", ratio=4.5, limit=EXPONENTIAL),
    Goal("kernels", r"softmax 4096×1024", ratio=1.6, limit=SOFTMAX),
    Goal("kernels", r"softmax backward 4096×1024", ratio=1.6, limit=STREAMS),
    Goal("kernels", r"layer_norm 2048×768", ratio=1.3, limit=STREAMS),
    Goal("kernels", r"layer_norm backward 2048×768", ratio=2.5, limit=STREAMS),
    Goal("kernels", r"cross_entropy (backward )?1024×50257", ratio=12,
         limit="Forward takes an exponential for each logit, which is arithmetic; backward writes a gradient as large "
               "as the logits. linear_cross_entropy never holds either."),
    Goal("kernels", r"causal attention (backward )?4×12×256×64", ratio=2.5,
         limit="Only what is visible counts: on the diagonal tiles of 64 keys are computed whole. Zen 4, forward, 256 "
               "keys: scores 34 % of the time, values 38, softmax 10, queries read and output written 18. Register "
               "tiles do 0.93 of the peak at a depth of 64 in the caches and 0.82 here; packing keys and values, "
               "asking for them earlier, tiles of 64 to 384 queries: no gain."),
    Goal("kernels", r"embedding backward, rows alone", ratio=100,
         limit="3 MB of gradients are read, sorted by their rows, summed and written, by some ten calls."),
    Goal("kernels", r"transpose copy 2048×3072", ratio=6,
         limit="Written past the caches, a line at a time, each to a page of its own."),
    Goal("kernels", r"adamw .*", ratio=1, limit=STREAMS),
    Goal("kernels", r"exp 2048×3072", share=0.95, limit=EXPONENTIAL),
    Goal("kernels", r"(add|relu) 2048×3072", share=0.95, limit=STREAMS),
    Goal("train", r"tiny", ratio=1.8, limit=LAUNCHES),
    Goal("train", r"char", ratio=1.25, limit=PACKING),
    Goal("train", r"gpt2", ratio=1.2, limit=PACKING),
    Goal("train", r"char bfloat16", ratio=1.5, limit=TILES),
    Goal("train", r"gpt2 bfloat16", ratio=1.2, limit=TILES),
    Goal("generate", r"decode gpt2", ratio=1.05, peer="llama.cpp", limit=TOKEN),
    Goal("generate", r"decode gpt2 bf16", ratio=1.15, peer="llama.cpp", limit=TOKEN),
    Goal("generate", r"decode gpt2 q8_0", ratio=1.3, peer="llama.cpp", limit=WIDENING),
    Goal("generate", r"prefill gpt2( bf16| q8_0)?", ratio=1.15, limit=PROMPT),
    Goal("sharder", r"default model|GPT-2 124M", ratio=0.95, limit=SERVER),
    Goal("sharder", r"push, update, pull.*", share=0.8, limit=SERVER),
)


def goal_of(table: str, result: Result) -> Goal | None:
    """The first that speaks of the row."""
    name = result.contest.name
    return next((goal for goal in GOALS if goal.table == table and re.fullmatch(goal.rows, name)), None)


class Notes:
    """Footnotes of one table: the limits of rows that miss their goal, numbered as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def cell(self, table: str, result: Result) -> str:
        """The goal, and whether it is met: "1.25 × ✓", "1.25 × [1]"; without a mark where that cannot be said."""
        goal = goal_of(table, result)
        if goal is None:
            return ""
        met = goal.met(result)
        if met is not False:
            return goal.text() + (" ✓" if met else "")
        if goal.limit not in self.texts:
            self.texts.append(goal.limit)
        return f"{goal.text()} [{self.texts.index(goal.limit) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{i}] {text}" for i, text in enumerate(self.texts, 1)]
