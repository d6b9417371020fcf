"""What a call costs when there is nothing to compute: microseconds for each kind of eager call, on four elements.

The last rows are about threads: what a job takes longer on a team of N than its N-th part takes one thread, while the
team still spins from the job before, and when it has slept for 2 ms. One job computes in registers only, so what is
left is waking and joining; the other is exp of 65,536 elements a thread, where it also counts which thread finds which
part in its cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np

import engine as eg
from engine.backend import get_backend, set_num_threads
from tools.benchmarks import kernels
from tools.benchmarks.contest import OURS, Contest, Result, wait_until_quiet
from tools.benchmarks.kernels import Maker, Run
from tools.benchmarks.peers import Peers

ELEMENTS_A_THREAD = 1 << 16
REGISTER_STEPS = 12_800  # some 30 µs
ASLEEP_SECONDS = 0.002
JOBS = 20  # timed in a row
LEAST = 1e-8  # seconds: the clock's own grain, and what a difference of two times may not go below

Pair = tuple[Run, Run | None]


class Operands:
    """The same small operands for both sides: x, y (2, 2), w and b of a layer; leaf and its model record gradients."""

    def __init__(self, torch: Any):
        self.torch = torch
        self.x, self.tx = self.both(np.array([[0.5, -1.0], [2.0, 0.25]], np.float32))
        self.y, self.ty = self.both(np.array([[1.0, 3.0], [-0.5, 0.75]], np.float32))
        self.b, self.tb = self.both(np.array([0.1, 0.2], np.float32))
        self.index, self.tindex = self.both(np.array([1, 0]))
        self.leaf = eg.tensor(self.x.numpy(), requires_grad=True)
        self.tleaf = self.tx.clone().requires_grad_() if torch else None

    def both(self, data: np.ndarray) -> tuple[eg.Tensor, Any]:
        return eg.tensor(data), self.torch.from_numpy(data.copy()) if self.torch else None

    def peer(self, make: Callable[[], Run]) -> Run | None:
        return make() if self.torch else None


def simple(o: Operands, ours: Callable[..., object],
           torch: Callable[[Any], Callable[..., object]] | None = None) -> Pair:
    """ours(x, y, b, index), and the same function of PyTorch's tensors; or the one that torch(the module) gives."""
    theirs = torch(o.torch) if torch and o.torch else ours
    return (lambda: ours(o.x, o.y, o.b, o.index)), o.peer(lambda: lambda: theirs(o.tx, o.ty, o.tb, o.tindex))


def recorded(o: Operands) -> Pair:
    return (lambda: o.leaf + o.y), o.peer(lambda: lambda: o.tleaf + o.ty)


def backward(o: Operands) -> Pair:
    def step(leaf: Any, y: Any) -> Callable[[], None]:
        def run() -> None:
            leaf.grad = None
            (leaf * y + leaf).sum().backward()
        return run

    return step(o.leaf, o.y), o.peer(lambda: step(o.tleaf, o.ty))


def optimizer_step(o: Operands) -> Pair:
    """AdamW over ten parameters of four elements."""
    ours = [eg.tensor(o.x.numpy(), requires_grad=True) for _ in range(10)]
    for p in ours:
        p.grad = o.y

    def torch() -> Run:
        theirs = [o.tx.clone().requires_grad_() for _ in range(10)]
        for p in theirs:
            p.grad = o.ty
        return o.torch.optim.AdamW(theirs, fused=True).step

    return eg.optim.AdamW(ours).step, o.peer(torch)


def launch(o: Operands) -> Pair:
    """A kernel into given memory: the launch point alone."""
    k = get_backend("cpu")
    y, x = k.empty((2, 2), eg.float32), o.x.array
    layout = k.layout(y, x)
    return (lambda: k.exp(y, x, layout)), o.peer(lambda: partial(o.torch.exp, o.tx, out=o.tx.clone()))


KINDS: dict[str, Callable[[Operands], Pair]] = {
    "kernel launch (exp into given memory)": launch,
    "exp": lambda o: simple(o, lambda x, y, b, i: eg.exp(x), lambda torch: lambda x, y, b, i: torch.exp(x)),
    "x + y": lambda o: simple(o, lambda x, y, b, i: x + y),
    "x + 1.0": lambda o: simple(o, lambda x, y, b, i: x + 1.0),
    "x + row": lambda o: simple(o, lambda x, y, b, i: x + b),
    "x < y": lambda o: simple(o, lambda x, y, b, i: x < y),
    "x + y, recorded for the gradient": recorded,
    "x.sum()": lambda o: simple(o, lambda x, y, b, i: x.sum()),
    "x.sum(0)": lambda o: simple(o, lambda x, y, b, i: x.sum(0)),
    "softmax": lambda o: simple(o, lambda x, y, b, i: eg.softmax(x),
                                lambda torch: lambda x, y, b, i: torch.softmax(x, -1)),
    "layer_norm": lambda o: simple(
        o, lambda x, y, b, i: eg.layer_norm(x, b, b),
        lambda torch: lambda x, y, b, i: torch.nn.functional.layer_norm(x, (2,), b, b)),
    "x @ y": lambda o: simple(o, lambda x, y, b, i: x @ y),
    "linear": lambda o: simple(o, lambda x, y, b, i: eg.linear(x, y, b),
                               lambda torch: lambda x, y, b, i: torch.nn.functional.linear(x, y, b)),
    "cross_entropy": lambda o: simple(o, lambda x, y, b, i: eg.cross_entropy(x, i),
                                      lambda torch: lambda x, y, b, i: torch.nn.functional.cross_entropy(x, i)),
    "embedding": lambda o: simple(o, lambda x, y, b, i: eg.embedding(x, i),
                                  lambda torch: lambda x, y, b, i: torch.nn.functional.embedding(i, x)),
    "x.reshape(4)": lambda o: simple(o, lambda x, y, b, i: x.reshape(4)),
    "x.T": lambda o: simple(o, lambda x, y, b, i: x.T),
    "x[0]": lambda o: simple(o, lambda x, y, b, i: x[0]),
    "x.item()": lambda o: simple(o, lambda x, y, b, i: x[0, 0].item()),
    "zeros((2, 2))": lambda o: simple(o, lambda x, y, b, i: eg.zeros((2, 2)),
                                      lambda torch: lambda x, y, b, i: torch.zeros((2, 2))),
    "(x y + x).sum(), forward and backward": backward,
    "AdamW over ten parameters": optimizer_step,
}


def contests(peers: Peers) -> Iterator[tuple[str, Callable[[], Contest]]]:
    for name, make in KINDS.items():
        yield name, partial(call_of, name, make, peers)


def call_of(name: str, make: Callable[[Operands], Pair], peers: Peers) -> Contest:
    ours, torch = make(Operands(peers.torch))
    return Contest(name, {OURS: ours, **({"torch": torch} if torch else {})}, unit="µs")


# ── threads ───────────────────────────────────────────────────────────────────────────────────────────

Jobs = Callable[[int], dict[str, Run]]  # from a number of threads to a job that gives each of them its share


def in_registers(threads: int) -> dict[str, Run]:
    return {OURS: partial(cast(Any, get_backend("cpu")).lib.peak_flops_run, REGISTER_STEPS)}


def over_memory(torch: Any, threads: int) -> dict[str, Run]:
    row = kernels.unary(Maker(torch), "exp", "exp", threads, ELEMENTS_A_THREAD)
    return {OURS: row.ours, **({"torch": row.torch} if row.torch else {})}


def timed(run: Run, asleep: float = 0.0) -> float:
    time.sleep(asleep)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def set_everybody(peers: Peers, threads: int) -> None:
    set_num_threads(threads)
    if peers.torch:
        peers.torch.set_num_threads(threads)


def job_results(name: str, jobs: Jobs, peers: Peers, turns: int) -> Iterator[Result]:
    set_everybody(peers, 1)
    alone = {who: float(np.median([timed(run) for _ in range(turns * JOBS)])) for who, run in jobs(1).items()}
    set_everybody(peers, peers.threads)
    together = jobs(peers.threads)
    for state, asleep in (("spinning", 0.0), ("asleep", ASLEEP_SECONDS)):
        contest = Contest(f"{peers.threads} threads {name}, {state}", {}, unit="µs")
        result = Result(contest, {who: [] for who in together})
        for _ in range(turns):
            for who, run in together.items():
                wait_until_quiet()
                run()
                result.seconds[who] += [max(LEAST, timed(run, asleep) - alone[who]) for _ in range(JOBS)]
        yield result


def team_results(peers: Peers, turns: int = 10) -> list[Result]:
    """The rows about threads; none where there is one."""
    if peers.threads == 1:
        return []
    return [*job_results("in registers", in_registers, peers, turns),
            *job_results("over memory", partial(over_memory, peers.torch), peers, turns)]
