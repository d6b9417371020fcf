"""The last layer of a language model and its loss in one, a chunk of rows at a time: the logits are never all there.

For N tokens, width d and a vocabulary of V the logits x Wᵀ are N · V numbers, and so is their gradient: for 1,024
tokens and GPT-2's 50,257 words 206 MB each, against 3 MB for x. But the rows of a cross-entropy know nothing of each
other. So take some rows, compute their logits, their losses, and at once (the target is known) the gradient in place of
the logits, and what follows from it, then forget them:

    for each chunk of rows:  l = x Wᵀ + b;  loss = ln Σ eˡ − l[target];  g = (softmax l − one-hot)/N
                             dx = g W;  dW += gᵀ x;  db += Σ g

Nothing is computed twice: backward multiplies dx, dW and db by the gradient of the loss, one number. After Hsu et al.
2024, arXiv:2410.10989, and Wijmans et al. 2024, arXiv:2411.09009.
"""

from __future__ import annotations

from typing import Any

from engine import autograd
from engine.backend import Array
from engine.ops.losses import IGNORE, check_smoothing, class_indices, cross_entropy, how_many_count, reduced
from engine.ops.matmul import as_rows, column_sums, gemm, linear, shaped, transposed
from engine.ops.registry import composite, op
from engine.tensor import Tensor

CHUNK = 256  # rows; gemm sums dW by blocks of as many (KC of gemm.c), so a chunk's share is one of its blocks
AT_ONCE = 1 << 22  # logits that are not worth cutting up: 16 MB of float32


@op("...i, oi, ..., o -> ",
    types="float!", fixed=("target",), kernel="cross_entropy", public=False, part_of="linear_cross_entropy")
def chunked_cross_entropy(k: Any, x: Array, weight: Array, target: Array, bias: Array | None = None,
                          ignore_index: int = IGNORE, label_smoothing: float = 0.0, mean: bool = True,
                          wanted: tuple[bool, bool, bool] = (False, False, False)) -> Any:
    """The sum or mean of the losses, and the gradients `wanted` of x, weight and bias."""
    classes = weight.shape[0]
    if target.shape != x.shape[:-1]:
        raise ValueError(f"linear_cross_entropy: target has shape {target.shape}, expected {x.shape[:-1]}, the shape "
                         f"of x {x.shape} without its last axis")
    index = class_indices("linear_cross_entropy", k, target, classes, ignore_index)
    index, rows = index.seen_as(index.data.reshape(-1)), index.size
    flat, bias = as_rows(k, x), bias if bias is None else k.contiguous(bias)
    counted = how_many_count(k, index, ignore_index, x.dtype)
    share = k.empty((rows,), x.dtype)
    one = k.constant(1.0, x.dtype)
    part_of_mean = k.map("divide", one, counted) if mean else one
    k.copy(share, part_of_mean, k.layout(share, part_of_mean))
    losses, lse = k.empty((rows,), x.dtype), k.empty((rows,), x.dtype)
    dx, dweight = (k.empty(a.shape, x.dtype) if want else None for a, want in zip((flat, weight), wanted))
    dbias = None
    step = CHUNK if rows * classes > AT_ONCE else max(rows, 1)
    memory = k.empty((min(step, rows), classes), x.dtype)
    for first in range(0, max(rows, 1), step):
        here, many = slice(first, first + step), len(index.data[first:first + step])
        part, lse_here, targets = (a.view(a.data[here]) for a in (flat, lse, index))
        logits = gemm(k, part, transposed(weight), bias, out=memory.view(memory.data[:many]))
        k.cross_entropy(losses.view(losses.data[here]), lse_here, logits, targets, many, classes, ignore_index,
                        label_smoothing)
        if not any(wanted):
            continue
        k.cross_entropy_vjp(logits, share.view(share.data[here]), logits, lse_here, targets, many, classes,
                            ignore_index, label_smoothing)
        if dx is not None:
            gemm(k, logits, weight, out=dx.view(dx.data[here]))
        if dweight is not None:
            gemm(k, transposed(logits), part, out=dweight, accumulate=first > 0)
        if wanted[2]:
            part_of_sum = column_sums(k, logits)
            dbias = part_of_sum if dbias is None else k.map("add", dbias, part_of_sum)
    total = k.empty((), x.dtype)
    k.sum(total, losses, 1, rows, 1)
    if mean:
        total = k.map("divide", total, counted)
    return total, {"dx": dx if dx is None else shaped(dx, x.shape), "dweight": dweight, "dbias": dbias}


@chunked_cross_entropy.kernel_vjp
def _(k: Any, g: Array, dx: Array | None, dweight: Array | None, dbias: Array | None) -> Any:
    dx, dweight, dbias = (None if d is None else k.map("multiply", d, g) for d in (dx, dweight, dbias))
    return dx, dweight, None, dbias


@chunked_cross_entropy.composition
def _(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int = IGNORE,
      label_smoothing: float = 0.0, mean: bool = True, wanted: tuple[bool, bool, bool] | None = None) -> Tensor:
    return cross_entropy(linear(x, weight, bias), target, ignore_index=ignore_index, label_smoothing=label_smoothing,
                         reduction="mean" if mean else "sum")


@composite("...i, oi, ..., o -> ...")
def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None,
                         ignore_index: int = IGNORE, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """cross_entropy(linear(x, weight, bias), target), in the memory of 256 rows of logits.

    x (..., inputs), weight (classes, inputs) and bias (classes,) floating; target (...) integer classes, or
    ignore_index, which counts for nothing. The gradients are computed at once, where they are recorded: under no_grad
    only the loss is. Loss and gradients of x and weight have the very bits of the two ops one after the other, as long
    as the gradient of the result is 1. reduction "none" is no more than those two.
    Raises ValueError for shapes that do not fit, IndexError for a target that is no class.
    """
    check_smoothing("linear_cross_entropy", label_smoothing)
    if reduction not in ("mean", "sum"):
        return reduced("linear_cross_entropy", cross_entropy(linear(x, weight, bias), target, None, ignore_index,
                                                             label_smoothing, "none"), reduction)
    wanted = tuple(autograd.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias))
    return chunked_cross_entropy(x, weight, target, bias, ignore_index, label_smoothing, reduction == "mean", wanted)
