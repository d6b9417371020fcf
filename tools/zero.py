"""What a worker holds at each stage of ZeRO: measured in processes, beside the formulas of Rajbhandari et al. 2020.

    python tools/zero.py                                a Transformer of 19 M parameters, 2 workers, 8 shards
    python tools/zero.py --layers 24 --shards 16

parameters   bytes of pulled parameters that a worker had at a time, at most
gradients    how far its memory pool rose at most during a backward pass; of activations there are next to none, since a
             microbatch is a few tokens
optimizer    no worker has any of it

All stages end with the same bits, which is checked. Formulas are for Ψ parameters in fp32 and S shards of equal size.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import engine as eg
from engine import autograd
from engine.backend import get_backend
from tools.training.checkpoint import arrays_digest
from tools.training.errors import run_program

TOKENS, VOCABULARY, CLOCKS = 8, 512, 3
FORMULAS = {1: ("4Ψ", "4Ψ"), 2: ("4Ψ", "8Ψ/S"), 3: ("8Ψ/S", "8Ψ/S")}


@dataclass(frozen=True)
class Work:
    """A worker's program, which writes down what it held."""

    config: eg.models.TransformerConfig
    folder: Path

    def __call__(self, client: eg.sharder.Client) -> None:
        replica, pool, most = eg.models.Transformer(self.config), cast(Any, get_backend("cpu")).pool, 0
        while client.clock():
            client.pull(replica)
            for index in client.microbatches:
                tokens = np.random.default_rng((client.step, index)).integers(0, VOCABULARY, (1, TOKENS + 1))
                loss = replica.loss(eg.tensor(tokens[:, :-1]), eg.tensor(tokens[:, 1:]), reduction="sum")
                before, seen = pool.figures().live, [0]

                def look(node: Any, what: str, before: int = before, seen: list[int] = seen) -> None:
                    seen.append(pool.figures().live - before)

                autograd.watchers.append(look)
                try:
                    client.backward(index, replica, loss, TOKENS)
                finally:
                    autograd.watchers.remove(look)
                most = max(most, *seen, pool.figures().live - before)
        held = {"parameters": client.most_held, "gradients": most}
        (self.folder / f"{client.worker}.json").write_text(json.dumps(held))


def measure(config: eg.models.TransformerConfig, zero: int, workers: int, shards: int) -> tuple[dict[str, int], str]:
    """What the worker that held most had, and the hash of parameters and optimizer state at the end."""
    with eg.seed(0):
        model = eg.models.Transformer(config)
    server = eg.sharder.ProcessServer(model, eg.optim.AdamWRule(lr=1e-3), microbatches=2 * workers, workers=workers,
                                      shards=shards, clip_norm=1.0, zero=zero)
    with tempfile.TemporaryDirectory() as folder:
        for _ in server.run(Work(config, Path(folder)), clocks=CLOCKS):
            pass
        of_workers = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    most = {kind: max(worker[kind] for worker in of_workers) for kind in ("parameters", "gradients")}
    return most, arrays_digest({name: np.asarray(value) for name, value in server.state().items()})


def main() -> int:
    parser = argparse.ArgumentParser(prog="zero", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("layers", 6, "Transformer blocks"), ("width", 512, "features of a token, 64 a head"),
                                ("workers", 2, "processes that compute"), ("shards", 8, "processes that update")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    given = parser.parse_args()
    for name, least in (("layers", 1), ("width", 64), ("workers", 1), ("shards", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} is {getattr(given, name)}, expected at least {least}")
    if not hasattr(get_backend("cpu"), "pool"):
        parser.error("without compiled kernels nothing counts memory; build them with `make`")
    if given.width % 64:
        parser.error(f"--width is {given.width}, expected a multiple of 64")
    config = eg.models.TransformerConfig(vocab_size=VOCABULARY, context_length=TOKENS, layers=given.layers,
                                         heads=given.width // 64, width=given.width, tie_weights=False)
    psi = eg.models.Transformer(config).num_parameters()
    print(f"{psi:,} parameters, 16Ψ = {16 * psi / 1e6:,.1f} MB; {given.workers} workers, {given.shards} shards\n")
    print(f"{'a worker, MB':<14}{'parameters':>12}{'formula':>9}{'':>9}{'gradients':>12}{'formula':>9}{'':>9}"
          f"{'optimizer':>11}{'together':>10}")
    digests, each = set(), 4 * psi / 1e6
    for zero, formulas in FORMULAS.items():
        held, digest = measure(config, zero, given.workers, given.shards)
        digests.add(digest)
        line = f"{f'stage {zero}':<14}"
        for kind, formula in zip(("parameters", "gradients"), formulas):
            expected = each if formula == "4Ψ" else min(2 / given.shards, 1) * each
            line += f"{held[kind] / 1e6:>12,.1f}{formula:>9}{expected:>9,.1f}"
        print(line + f"{0:>11}{sum(held.values()) / 1e6:>10,.1f}", flush=True)
    if len(digests) != 1:
        print("the stages ended with different bits", file=sys.stderr)
        return 1
    print(f"\nthe same bits at every stage: SHA-256 {digests.pop()[:16]} of parameters and optimizer state")
    print(f"a shard has the optimizer's state, 8Ψ/S = {2 * each / given.shards:,.1f} MB, as much again for two "
          "versions of its parameters, and sums of gradients")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("zero", main))
