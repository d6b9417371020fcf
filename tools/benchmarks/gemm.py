"""Matrix products: transformer shapes in the three orders that a linear layer needs, small ones, and batches.

    NN: C = A B        NT: C = A Bᵀ, B stored (n, k): a linear layer        TN: C = Aᵀ B: the gradient of its weights

Every contestant writes into memory that it was given. "bfloat16": ours rounds float32 factors as it packs them and sums
in float32; torch's are stored in 16 bits, and so is its result. The bound of those rows is still that of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from engine.backend import get_backend
from engine.precision import FORMATS
from tools.benchmarks.contest import OURS, Contest
from tools.benchmarks.peers import Peers

# (batch, m, n, k): a 64-wide head's attention, a char model, GPT-2, squares
SHAPES = [(1, 1024, 768, 768), (1, 1024, 3072, 768), (1, 1024, 768, 3072), (1, 3072, 384, 384), (1, 256, 384, 384),
          (1, 768, 128, 128), (1, 64, 64, 64), (1, 128, 128, 128), (1, 512, 512, 512), (1, 2048, 2048, 2048),
          (96, 64, 64, 64), (96, 256, 256, 64)]
SHORT_SHAPES = [(1, 1024, 768, 3072), (1, 3072, 384, 1536), (1, 256, 384, 384), (1, 2048, 2048, 2048)]
ORDERS = ("NN", "NT", "TN")


def contests(peers: Peers) -> Iterator[tuple[str, Callable[[], Contest]]]:
    for batch, m, n, k in SHAPES:
        for order in ORDERS:
            name = f"{order} {f'{batch} of ' if batch > 1 else ''}{m}×{n}×{k}"
            yield name, partial(product, name, peers, batch, m, n, k, order)
    for batch, m, n, k in SHORT_SHAPES:
        for order in ORDERS:
            name = f"{order} bfloat16 {m}×{n}×{k}"
            yield name, partial(product, name, peers, batch, m, n, k, order, "bfloat16")


def operands(batch: int, m: int, n: int, k: int, order: str) -> tuple[np.ndarray, np.ndarray]:
    """(batch, m, k) and (batch, k, n); what is transposed is a view of an array in the other order."""
    rng = np.random.default_rng(m * n + k)
    a = rng.standard_normal((batch, k, m) if order == "TN" else (batch, m, k), np.float32)
    b = rng.standard_normal((batch, n, k) if order == "NT" else (batch, k, n), np.float32)
    return a.swapaxes(1, 2) if order == "TN" else a, b.swapaxes(1, 2) if order == "NT" else b


def product(name: str, peers: Peers, batch: int, m: int, n: int, k: int, order: str,
            dtype: str = "float32") -> Contest:
    a_view, b_view = operands(batch, m, n, k, order)
    flops = 2.0 * batch * m * n * k
    runs: dict[str, Callable[[], object]] = {OURS: ours(a_view, b_view, dtype)}
    if peers.torch:
        runs["torch"] = torch_product(peers.torch, a_view, b_view, dtype)
    if dtype != "float32":
        return Contest(name, runs, flops, work=flops / 1e9, unit="GFLOP/s", streams=False)
    if "openblas" in peers:
        out = np.empty((batch, m, n), np.float32)
        x, y, z = (a_view[0], b_view[0], out[0]) if batch == 1 else (a_view, b_view, out)
        runs["openblas"] = lambda: np.matmul(x, y, out=z)
    if peers.jax:
        runs["jax"] = jax_product(peers.jax, a_view, b_view, order)
    return Contest(name, runs, flops, work=flops / 1e9, unit="GFLOP/s", streams=False)


def ours(a: np.ndarray, b: np.ndarray, dtype: str = "float32") -> Callable[[], object]:
    backend = get_backend("cpu")
    x, y = backend.array(a.base if a.base is not None else a), backend.array(b.base if b.base is not None else b)
    batch, m, k = a.shape
    n = b.shape[2]
    out = backend.empty((batch, m, n), x.dtype)
    strides = [s // 4 for s in (*a.strides, *b.strides)]
    return lambda: backend.gemm(out, x, y, None, batch, m, n, k, *strides, m * n, n, 0, FORMATS[dtype])


def torch_product(torch: Any, a: np.ndarray, b: np.ndarray, dtype: str = "float32") -> Callable[[], object]:
    x, y = (torch.from_numpy(z).to(getattr(torch, dtype)) for z in (a, b))  # with the strides that they have
    out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=x.dtype)
    if a.shape[0] == 1:
        x, y, out = x[0], y[0], out[0]
        return lambda: torch.mm(x, y, out=out)
    return lambda: torch.bmm(x, y, out=out)


def jax_product(jax: Any, a: np.ndarray, b: np.ndarray, order: str) -> Callable[[], object]:
    """JAX has no strides: a transposed operand is part of the program that it compiles."""
    equation = {"NN": "bmk,bkn->bmn", "NT": "bmk,bnk->bmn", "TN": "bkm,bkn->bmn"}[order]
    run = jax.jit(lambda x, y: jax.numpy.einsum(equation, x, y))
    x, y = (jax.numpy.asarray(z if z.base is None else z.base) for z in (a, b))
    return lambda: run(x, y).block_until_ready()
