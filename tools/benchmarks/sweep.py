"""Random shapes: every kind of kernel beside PyTorch's, from one element to 10⁸, to find where ours is the slower one.

Case i of a seed depends on nothing but the two, so `--first 40 --shapes 20` are the same cases as in the whole sweep.
"kernel" rows write into memory that was given, through the launch point; "op" rows are what a user calls, on tensors,
with the result in new memory. Where PyTorch cannot write into given memory (cross-entropy, dropout, adamw, gradients),
its side of a "kernel" row is what its user calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

import engine as eg
from tools.benchmarks import gemm, kernels
from tools.benchmarks.contest import OURS, Contest, Result
from tools.benchmarks.kernels import Maker, Row
from tools.benchmarks.peers import Peers

ELEMENTS = 10**8  # of the largest operand,
MEMORY = 3 << 30  # and bytes of all operands, ours and PyTorch's
FLOPS = 4e9  # of a matrix product or attention: some 30 ms
SLOWER = 1.1  # a ratio of times from here on counts as slower

Shape = tuple[Any, ...]


class Draw:
    """Random sizes: logarithms evenly distributed, one in three a power of two."""

    def __init__(self, seed: int, number: int):
        self.rng = np.random.default_rng((seed, number))

    def size(self, most: float, least: int = 1) -> int:
        exponent = self.rng.uniform(math.log2(least), math.log2(max(most, least)))
        n = 2 ** int(exponent) if self.rng.random() < 1 / 3 else round(2**exponent)
        return max(least, min(n, int(max(most, least))))

    def rows(self, operands: int, most: float = ELEMENTS) -> tuple[int, int]:
        """(rows, n) of a matrix of which `operands` fit the memory twice."""
        elements = self.size(min(most, MEMORY / (8 * operands)))
        n = self.size(elements)
        return elements // n, n

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def product(self, most: int = 4096) -> tuple[int, int, int]:
        m, n, k = (self.size(most) for _ in range(3))
        while 2.0 * m * n * k > FLOPS:
            m, n, k = (m + 1) // 2, (n + 1) // 2, (k + 1) // 2
        return m, n, k


# ── kernels that tools/benchmarks/kernels.py has no row for ───────────────────────────────────────────

def binary(m: Maker, name: str, form: str, rows: int, n: int) -> Row:
    other = {"": (rows, n), " a row": (n,), " a column": (rows, 1)}[form]
    (a, ta), (b, tb), (y, ty) = m.pair(rows, n), m.pair(*other), m.outputs(rows, n)
    layout, kernel = m.k.layout(y, a, b), getattr(m.k, name)
    return Row(lambda: kernel(y, a, b, layout), m.run(lambda: lambda: getattr(m.torch, name)(ta, tb, out=ty)))


def reduction(m: Maker, name: str, axis: int, rows: int, n: int) -> Row:
    """Along an axis of a matrix."""
    (x, tx), (y, ty) = m.pair(rows, n), m.outputs(n if axis == 0 else rows)
    sizes = (1, rows, n) if axis == 0 else (rows, n, 1)
    kernel, peer = getattr(m.k, name), {"max": "amax"}.get(name, name)
    return Row(lambda: kernel(y, x, *sizes), m.run(lambda: lambda: getattr(m.torch, peer)(tx, axis, out=ty)))


def embedding(m: Maker, count: int, vocabulary: int, n: int) -> Row:
    (w, tw), (index, tindex), (y, ty) = m.pair(vocabulary, n), m.integers(vocabulary, count), m.outputs(count, n)
    return Row(lambda: m.k.embedding(y, w, index, count, vocabulary, n),
               m.run(lambda: lambda: m.aten.embedding.out(tw, tindex, out=ty)))


def product(m: Maker, order: str, batch: int, rows: int, n: int, k: int) -> Row:
    a, b = gemm.operands(batch, rows, n, k, order)
    return Row(gemm.ours(a, b), m.run(lambda: gemm.torch_product(m.torch, a, b)))


# ── ops as a user calls them ──────────────────────────────────────────────────────────────────────────

def called(m: Maker, ours: Callable[..., Any], torch: Callable[[Any], Callable[..., Any]], *shapes: Shape) -> Row:
    """ours(tensors of these shapes) beside the function that torch(the module) gives, on the same numbers."""
    pairs = [m.pair(*shape) for shape in shapes]
    tensors = [eg.Tensor(a, "cpu") for a, _ in pairs]

    def peer() -> Callable[[], object]:
        function, theirs = torch(m.torch), [t for _, t in pairs]
        return lambda: function(*theirs)

    return Row(lambda: ours(*tensors), m.run(peer))


def op_linear(m: Maker, rows: int, n: int, k: int) -> Row:
    return called(m, eg.linear, lambda torch: torch.nn.functional.linear, (rows, k), (n, k), (n,))


def op_layer_norm(m: Maker, rows: int, n: int) -> Row:
    return called(m, eg.layer_norm, lambda torch: lambda x, w, b: torch.nn.functional.layer_norm(x, (n,), w, b),
                  (rows, n), (n,), (n,))


def op_cross_entropy(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (target, ttarget) = m.pair(rows, n), m.integers(n, rows)
    logits, targets = eg.Tensor(x, "cpu"), eg.Tensor(target, "cpu")
    return Row(lambda: eg.cross_entropy(logits, targets),
               m.run(lambda: lambda: m.torch.nn.functional.cross_entropy(tx, ttarget)))


def op_backward(m: Maker, rows: int, n: int) -> Row:
    """A small graph, forward and backward: d/dx of the mean of GELU(x) x."""
    x, tx = m.pair(rows, n)
    leaf = eg.Tensor(x, "cpu", True)

    def torch() -> Callable[[], object]:
        theirs, gelu = tx.clone().requires_grad_(), m.torch.nn.functional.gelu
        return lambda: m.torch.autograd.grad((gelu(theirs) * theirs).mean(), theirs)

    return Row(lambda: eg.grad((eg.gelu(leaf) * leaf).mean(), [leaf]), m.run(torch))


# ── what is drawn ─────────────────────────────────────────────────────────────────────────────────────

class Work(NamedTuple):
    """A kind of case: its rows' names begin with level and name; shape draws what `make` takes after the maker."""

    level: str
    name: str
    shape: Callable[[Draw], Shape]
    make: Callable[..., Row]


def matrix(operands: int, most: float = ELEMENTS) -> Callable[[Draw], Shape]:
    return lambda draw: draw.rows(operands, most)


def batched(draw: Draw) -> Shape:
    m, n, k = draw.product(256)
    return max(2, draw.size(min(512, FLOPS / (2.0 * m * n * k)))), m, n, k


def heads(draw: Draw) -> Shape:
    time, d = draw.size(2048), draw.pick(16, 32, 64, 80, 128)
    batch = draw.size(min(16, max(1, FLOPS / (4.0 * time * time * d))))
    return batch, draw.size(min(16, max(1, FLOPS / (4.0 * batch * time * time * d)))), time, d


def table_of_rows(draw: Draw) -> Shape:
    vocabulary, n = draw.size(50_000), draw.size(1024)
    return draw.size(min(65536, MEMORY / (16 * n))), vocabulary, n


UNARY = [("relu", "relu"), ("exp", "exp"), ("tanh", "tanh"), ("sigmoid", "sigmoid"), ("gelu_tanh", "gelu"),
         ("gelu", "gelu"), ("sqrt", "sqrt"), ("sin", "sin")]
WORKS = [
    *(Work("kernel", name, matrix(2), lambda m, *s, a=name, b=torch: kernels.unary(m, a, b, *s))
      for name, torch in UNARY),
    Work("kernel", "gelu_tanh backward", matrix(3), kernels.gelu_vjp),
    *(Work("kernel", f"{name}{form}", matrix(3), lambda m, *s, a=name, b=form: binary(m, a, b, *s))
      for name, form in (("add", ""), ("multiply", " a row"), ("maximum", ""), ("divide", " a column"))),
    *(Work("kernel", f"{name} over axis {axis}", matrix(1), lambda m, *s, a=name, b=axis: reduction(m, a, b, *s))
      for name, axis in (("sum", 0), ("sum", 1), ("max", 0), ("max", 1))),
    Work("kernel", "sum of all", matrix(1), kernels.sum_all),
    Work("kernel", "softmax", matrix(2), kernels.softmax),
    Work("kernel", "softmax backward", matrix(3), kernels.softmax_vjp),
    Work("kernel", "layer_norm", matrix(2), kernels.layer_norm),
    Work("kernel", "layer_norm backward", matrix(3), kernels.layer_norm_vjp),
    Work("kernel", "cross_entropy", matrix(1), kernels.cross_entropy),
    Work("kernel", "cross_entropy backward", matrix(2), kernels.cross_entropy_vjp),
    Work("kernel", "transpose copy", matrix(2), kernels.transpose_copy),
    Work("kernel", "heads copy", lambda draw: (draw.size(16), draw.size(512), draw.size(16), draw.size(128)),
         kernels.heads_copy),
    Work("kernel", "dropout", matrix(2), kernels.dropout),
    Work("kernel", "adamw", lambda draw: (draw.size(3e7),), kernels.adamw),
    Work("kernel", "embedding", table_of_rows, embedding),
    Work("kernel", "embedding backward", table_of_rows, kernels.embedding_vjp),
    *(Work("kernel", f"matmul {order}", lambda draw: draw.product(), lambda m, *s, a=order: product(m, a, 1, *s))
      for order in gemm.ORDERS),
    *(Work("kernel", f"batched matmul {order}", batched, lambda m, *s, a=order: product(m, a, *s))
      for order in gemm.ORDERS),
    *(Work("op", f"causal attention{' backward' if back else ''}", heads,
           lambda m, *s, a=back: kernels.attention(m, s, a)) for back in (False, True)),
    Work("op", "exp", matrix(2), lambda m, *s: called(m, eg.exp, lambda torch: torch.exp, s)),
    Work("op", "add", matrix(3), lambda m, *s: called(m, eg.add, lambda torch: torch.add, s, s)),
    Work("op", "sum of all", matrix(1), lambda m, *s: called(m, eg.sum, lambda torch: torch.sum, s)),
    Work("op", "softmax", matrix(2), lambda m, *s: called(
        m, eg.softmax, lambda torch: lambda x: torch.softmax(x, -1), s)),
    Work("op", "layer_norm", matrix(2), op_layer_norm),
    Work("op", "linear", lambda draw: draw.product(), op_linear),
    Work("op", "cross_entropy", matrix(1), op_cross_entropy),
    Work("op", "gelu(x) x, backward", matrix(5, 1e7), op_backward),
]


def contests(peers: Peers, shapes: int, seed: int, first: int = 0) -> Iterator[tuple[str, Callable[[], Contest]]]:
    """Cases first … first + shapes − 1; the kinds of work take turns."""
    if not peers.torch:
        raise SystemExit("bench: sweep compares with torch, which is not installed or not among --peers")
    for number in range(first, first + shapes):
        work = WORKS[number % len(WORKS)]
        shape = work.shape(Draw(seed, number))
        name = f"{work.level} {work.name} {'×'.join(map(str, shape))}"
        yield name, partial(contest, name, work, shape, peers)


def contest(name: str, work: Work, shape: Shape, peers: Peers) -> Contest:
    maker = Maker(peers.torch)
    cast(Any, maker.k).pool.trim()  # of what a larger case left
    row = work.make(maker, *shape)
    assert row.torch is not None
    return Contest(name, {OURS: row.ours, "torch": row.torch}, unit="µs")


def slowest(results: list[Result], shown: int = 30) -> str:
    """How many cases are slower than PyTorch's by more than a tenth, and the worst, worst first."""
    ranked = sorted(((r.ratio, r) for r in results if r.ratio is not None), key=lambda pair: pair[0])
    slower = sum(ratio < 1 / SLOWER for ratio, _ in ranked)
    ratios = [ratio for ratio, _ in ranked]
    lines = [f"{slower} of {len(ranked)} cases take more than {SLOWER:g} times as long as PyTorch's; ratio of speeds: "
             f"median {np.median(ratios):.2f}, lowest {min(ratios):.2f}, highest {max(ratios):.2f}" if ratios else
             "no cases", "", "| slowest first | engine µs | torch µs | × torch |", "|---|---|---|---|"]
    lines += [f"| {r.contest.name} | {r.shown(OURS):.4g} | {r.shown('torch'):.4g} | {ratio:.2f} |"
              for ratio, r in ranked[:shown]]
    return "\n".join(lines) + "\n"
