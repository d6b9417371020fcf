"""The other kernels: each beside PyTorch's own, writing into memory that was given where PyTorch can do that.

A row is one function of this file: it makes its operands and returns our call, PyTorch's, and what the work needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import engine as eg
from engine.backend import Array, get_backend
from engine.random import Key
from tools.benchmarks.contest import OURS, Contest
from tools.benchmarks.peers import Peers

Run = Callable[[], object]
CACHES = 1 << 24  # bytes that may stay in the caches between two calls


class Row(NamedTuple):
    ours: Run
    torch: Run | None
    bytes: float = 0.0
    flops: float = 0.0


class Maker:
    """Operands for both sides from the same numbers."""

    def __init__(self, torch: Any):
        self.torch, self.k = torch, get_backend("cpu")
        self.aten: Any = torch.ops.aten if torch else None
        self.rng = np.random.default_rng(0)

    def pair(self, *shape: int) -> tuple[Array, Any]:
        data = self.rng.standard_normal(shape, np.float32)
        return self.k.array(data), self.torch.from_numpy(data) if self.torch else None

    def outputs(self, *shape: int) -> tuple[Array, Any]:
        return self.k.zeros(shape, eg.float32), self.torch.zeros(shape) if self.torch else None

    def integers(self, high: int, *shape: int) -> tuple[Array, Any]:
        data = self.rng.integers(0, high, shape)
        return self.k.array(data), self.torch.from_numpy(data) if self.torch else None

    def run(self, make: Callable[[], Run]) -> Run | None:
        """PyTorch's side, or None where it takes no part."""
        return make() if self.torch else None


# ── elementwise ───────────────────────────────────────────────────────────────────────────────────────

def unary(m: Maker, name: str, torch_name: str, rows: int, n: int, passes: int = 2) -> Row:
    (x, tx), (y, ty) = m.pair(rows, n), m.outputs(rows, n)
    layout = m.k.layout(y, x)
    kernel = getattr(m.k, name)
    options = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    return Row(lambda: kernel(y, x, layout),
               m.run(lambda: lambda: getattr(m.aten, torch_name).out(tx, **options, out=ty)), passes * 4.0 * rows * n)


def add(m: Maker, rows: int, n: int) -> Row:
    (a, ta), (b, tb), (y, ty) = m.pair(rows, n), m.pair(rows, n), m.outputs(rows, n)
    layout = m.k.layout(y, a, b)
    return Row(lambda: m.k.add(y, a, b, layout),
               m.run(lambda: lambda: m.torch.add(ta, tb, out=ty)), 12.0 * rows * n)


def add_bias(m: Maker, rows: int, n: int) -> Row:
    (a, ta), (b, tb), (y, ty) = m.pair(rows, n), m.pair(n), m.outputs(rows, n)
    layout = m.k.layout(y, a, b)
    return Row(lambda: m.k.add(y, a, b, layout),
               m.run(lambda: lambda: m.torch.add(ta, tb, out=ty)), 8.0 * rows * n)


def gelu_vjp(m: Maker, rows: int, n: int) -> Row:
    (g, tg), (x, tx), (y, ty) = m.pair(rows, n), m.pair(rows, n), m.outputs(rows, n)
    layout = m.k.layout(y, g, x)
    return Row(lambda: m.k.gelu_tanh_vjp(y, g, x, layout),
               m.run(lambda: lambda: m.aten.gelu_backward.grad_input(tg, tx, approximate="tanh", grad_input=ty)),
               12.0 * rows * n)


def transpose_copy(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (y, ty) = m.pair(rows, n), m.outputs(n, rows)
    turned = x.view(x.data.T)
    layout = m.k.layout(y, turned)
    return Row(lambda: m.k.copy(y, turned, layout),
               m.run(lambda: lambda: ty.copy_(tx.T)), 8.0 * rows * n)


def heads_copy(m: Maker, batch: int, time: int, heads: int, d: int) -> Row:
    (x, tx), (y, ty) = m.pair(batch, time, heads, d), m.outputs(batch, heads, time, d)
    turned = x.view(x.data.transpose(0, 2, 1, 3))
    layout = m.k.layout(y, turned)
    return Row(lambda: m.k.copy(y, turned, layout),
               m.run(lambda: lambda: ty.copy_(tx.transpose(1, 2))), 8.0 * x.size)


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────

def softmax(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (y, ty) = m.pair(rows, n), m.outputs(rows, n)
    return Row(lambda: m.k.softmax(y, x, rows, n),
               m.run(lambda: lambda: m.aten._softmax.out(tx, -1, False, out=ty)), 8.0 * rows * n)


def softmax_vjp(m: Maker, rows: int, n: int) -> Row:
    (g, tg), (y, ty), (dx, tdx) = m.pair(rows, n), m.pair(rows, n), m.outputs(rows, n)
    return Row(lambda: m.k.softmax_vjp(dx, g, y, rows, n),
               m.run(lambda: lambda: m.aten._softmax_backward_data.out(tg, ty, -1, m.torch.float32, grad_input=tdx)),
               12.0 * rows * n)


def layer_norm(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (w, tw), (b, tb), (y, ty) = m.pair(rows, n), m.pair(n), m.pair(n), m.outputs(rows, n)
    (mean, tmean), (rstd, trstd) = m.outputs(rows), m.outputs(rows)
    return Row(lambda: m.k.layer_norm(y, mean, rstd, x, w, b, rows, n, 1e-5),
               m.run(lambda: lambda: m.aten.native_layer_norm.out(
                   tx, [n], tw, tb, 1e-5, out0=ty, out1=tmean.view(rows, 1), out2=trstd.view(rows, 1))),
               8.0 * rows * n)


def layer_norm_vjp(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (w, tw), (b, tb), (g, tg) = m.pair(rows, n), m.pair(n), m.pair(n), m.pair(rows, n)
    (y, _), (dx, tdx), (dw, tdw), (db, tdb) = m.outputs(rows, n), m.outputs(rows, n), m.outputs(n), m.outputs(n)
    (mean, _), (rstd, _) = m.outputs(rows), m.outputs(rows)
    m.k.layer_norm(y, mean, rstd, x, w, b, rows, n, 1e-5)

    def torch() -> Run:
        tmean, trstd = (m.torch.from_numpy(s.data.copy()).view(rows, 1) for s in (mean, rstd))
        return lambda: m.aten.native_layer_norm_backward.out(
            tg, tx, [n], tmean, trstd, tw, tb, [True, True, True], out0=tdx, out1=tdw, out2=tdb)

    return Row(lambda: m.k.layer_norm_vjp(dx, dw, db, g, x, w, mean, rstd, rows, n), m.run(torch), 12.0 * rows * n)


def cross_entropy(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (target, ttarget) = m.pair(rows, n), m.integers(n, rows)
    (loss, _), (lse, _) = m.outputs(rows), m.outputs(rows)
    return Row(lambda: m.k.cross_entropy(loss, lse, x, target, rows, n, -100, 0.0),
               m.run(lambda: lambda: m.torch.nn.functional.cross_entropy(tx, ttarget)), 4.0 * rows * n)


def cross_entropy_vjp(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (target, ttarget), (dx, _) = m.pair(rows, n), m.integers(n, rows), m.outputs(rows, n)
    (loss, _), (lse, _), (g, _) = m.outputs(rows), m.outputs(rows), m.pair(rows)
    m.k.cross_entropy(loss, lse, x, target, rows, n, -100, 0.0)

    def torch() -> Run:
        leaf = tx.clone().requires_grad_()
        y = m.torch.nn.functional.cross_entropy(leaf, ttarget)
        return lambda: m.torch.autograd.grad(y, leaf, retain_graph=True)

    return Row(lambda: m.k.cross_entropy_vjp(dx, g, x, lse, target, rows, n, -100, 0.0), m.run(torch), 8.0 * rows * n)


def sum_all(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (y, _) = m.pair(rows, n), m.outputs()
    return Row(lambda: m.k.sum(y, x, 1, rows * n, 1), m.run(lambda: lambda: m.torch.sum(tx)),
               4.0 * rows * n)


def sum_rows(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (y, ty) = m.pair(rows, n), m.outputs(n)
    return Row(lambda: m.k.sum(y, x, 1, rows, n),
               m.run(lambda: lambda: m.torch.sum(tx, 0, out=ty)), 4.0 * rows * n)


# ── embedding, optimizer, attention ───────────────────────────────────────────────────────────────────

def embedding_vjp(m: Maker, count: int, vocabulary: int, n: int) -> Row:
    (g, tg), (index, tindex), (dw, _) = m.pair(count, n), m.integers(vocabulary, count), m.outputs(vocabulary, n)
    return Row(lambda: m.k.embedding_vjp(dw, g, index, count, vocabulary, n),
               m.run(lambda: lambda: m.aten.embedding_dense_backward(tg, tindex, vocabulary, -1, False)),
               4.0 * vocabulary * n + 12.0 * count * n)


def embedding_rows_vjp(m: Maker, count: int, vocabulary: int, n: int) -> Row:
    """Only the rows that were looked up, where PyTorch's gradient is as large as the table."""
    (g, tg), (index, tindex) = m.pair(count, n), m.integers(vocabulary, count)
    weight = eg.zeros(vocabulary, n, requires_grad=True)
    with eg.enable_grad():
        y, cotangent = eg.embedding(weight, eg.Tensor(index, "cpu"), sparse=True), eg.Tensor(g, "cpu")

    def ours() -> object:
        weight.grad = None
        y.backward(cotangent, retain_graph=True)
        return weight.grad

    return Row(ours, m.run(lambda: lambda: m.aten.embedding_dense_backward(tg, tindex, vocabulary, -1, False)),
               8.0 * count * n)


def adamw(m: Maker, n: int) -> Row:
    (p, tp), (g, tg), (first, _), (second, _) = m.pair(n), m.pair(n), m.outputs(n), m.outputs(n)

    def torch() -> Run:
        leaf = tp.clone().requires_grad_()
        leaf.grad = tg
        return m.torch.optim.AdamW([leaf], fused=True).step

    return Row(lambda: m.k.adam(p, first, second, p, first, second, g, n, 1, 1, 1e-4, 0.9, 0.999, 1e-8, 0.01,
                                                1, 10), m.run(torch), 28.0 * n)


def attention(m: Maker, shape: tuple[int, ...], backward: bool) -> Row:
    batch, heads, time, d = shape
    operands = [m.pair(batch, heads, time, d) for _ in range(3)]
    q, key, value = (eg.Tensor(a, "cpu", True) for a, _ in operands)
    g, tg = m.pair(batch, heads, time, d)
    flops = (10.0 if backward else 4.0) * batch * heads * d * time * (time + 1) / 2

    def torch() -> Run:
        tq, tk, tv = (t.clone().requires_grad_(backward) for _, t in operands)
        f = m.torch.nn.functional.scaled_dot_product_attention
        if not backward:
            return lambda: f(tq, tk, tv, is_causal=True)
        y = f(tq, tk, tv, is_causal=True)
        return lambda: m.torch.autograd.grad(y, (tq, tk, tv), tg, retain_graph=True)

    def forward() -> Any:
        return eg.scaled_dot_product_attention(q, key, value, causal=True)

    with eg.enable_grad():
        y, cotangent = forward(), eg.Tensor(g, "cpu")

    def ours() -> Any:
        if backward:
            return eg.grad(y, [q, key, value], cotangent, retain_graph=True)
        with eg.no_grad():
            return forward()

    return Row(ours, m.run(torch), 0.0,
               flops)


def dropout(m: Maker, rows: int, n: int) -> Row:
    (x, tx), (y, _), key = m.pair(rows, n), m.outputs(rows, n), Key(0, 0, 0, 0)
    return Row(lambda: m.k.dropout(y, x, rows * n, 0.1, *key),
               m.run(lambda: lambda: m.torch.nn.functional.dropout(tx, 0.1)), 8.0 * rows * n)


ROWS: dict[str, Callable[[Maker], Row]] = {
    **{f"{name} 2048×3072": partial(unary, name=name, torch_name=torch_name, rows=2048, n=3072)
       for name, torch_name in (("relu", "relu"), ("exp", "exp"), ("tanh", "tanh"), ("sigmoid", "sigmoid"),
                                ("log", "log"), ("gelu_tanh", "gelu"), ("gelu", "gelu"))},
    "gelu_tanh 64×1024": partial(unary, name="gelu_tanh", torch_name="gelu", rows=64, n=1024),
    "exp 64×1024": partial(unary, name="exp", torch_name="exp", rows=64, n=1024),
    "gelu_tanh backward 2048×3072": partial(gelu_vjp, rows=2048, n=3072),
    "add 2048×3072": partial(add, rows=2048, n=3072),
    "add 64×1024": partial(add, rows=64, n=1024),
    "add a row to 2048×3072": partial(add_bias, rows=2048, n=3072),
    "transpose copy 2048×3072": partial(transpose_copy, rows=2048, n=3072),
    "heads copy 12×256×6×64": partial(heads_copy, batch=12, time=256, heads=6, d=64),
    "softmax 4096×1024": partial(softmax, rows=4096, n=1024),
    "softmax backward 4096×1024": partial(softmax_vjp, rows=4096, n=1024),
    "layer_norm 2048×768": partial(layer_norm, rows=2048, n=768),
    "layer_norm backward 2048×768": partial(layer_norm_vjp, rows=2048, n=768),
    "cross_entropy 1024×50257": partial(cross_entropy, rows=1024, n=50257),
    "cross_entropy backward 1024×50257": partial(cross_entropy_vjp, rows=1024, n=50257),
    "sum 2048×3072": partial(sum_all, rows=2048, n=3072),
    "sum over rows of 2048×3072": partial(sum_rows, rows=2048, n=3072),
    "dropout 2048×3072": partial(dropout, rows=2048, n=3072),
    "embedding backward 1024 of 50257×768": partial(embedding_vjp, count=1024, vocabulary=50257, n=768),
    "embedding backward, rows alone": partial(embedding_rows_vjp, count=1024, vocabulary=50257, n=768),
    "adamw 30,000,000": partial(adamw, n=30_000_000),
    **{f"causal attention {'backward ' if backward else ''}{'×'.join(map(str, shape))}":
       partial(attention, shape=shape, backward=backward)
       for shape in ((4, 12, 256, 64), (12, 6, 256, 64), (12, 4, 64, 32), (1, 12, 2048, 64))
       for backward in (False, True)},
}


def contests(peers: Peers) -> Iterator[tuple[str, Callable[[], Contest]]]:
    for name, make in ROWS.items():
        yield name, partial(contest, name, make, peers)


def contest(name: str, make: Callable[[Maker], Row], peers: Peers) -> Contest:
    row = make(Maker(peers.torch))
    runs = {OURS: row.ours}
    if row.torch is not None:
        runs["torch"] = row.torch
    return Contest(name, runs, row.flops, row.bytes, streams=row.bytes > CACHES)
