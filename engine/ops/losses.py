"""Losses: what training minimises."""

from __future__ import annotations

from typing import Any

from engine.backend import Array, get_backend
from engine.dtypes import DType, int64
from engine.ops.elementwise import abs, log, maximum, minimum, square, where
from engine.ops.indexing import take_along_axis
from engine.ops.normalization import log_softmax
from engine.ops.reductions import logsumexp, mean, sum
from engine.ops.registry import cast, composite, op
from engine.tensor import Tensor

IGNORE = -100  # the target that counts for nothing, as in PyTorch


def reduced(name: str, loss: Tensor, reduction: str) -> Tensor:
    """A loss per element as its "mean", its "sum", or as it is ("none")."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    return mean(loss) if reduction == "mean" else sum(loss) if reduction == "sum" else loss


def check_smoothing(name: str, label_smoothing: float) -> None:
    """Raises ValueError naming the op."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing!r}, expected a number in [0, 1]")


@op("...n, ... -> ...",
    types="float!", fixed=("target",), kernel="cross_entropy", public=False, part_of="cross_entropy")
def token_cross_entropy(k: Any, logits: Array, target: Array, ignore_index: int = IGNORE,
                        label_smoothing: float = 0.0) -> Any:
    """loss = ln Σ eˣ − (1 − s) x[target] − s mean x for each row; the probabilities are never stored."""
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"cross_entropy: target has shape {target.shape}, expected {logits.shape[:-1]}, "
                         f"the shape of logits {logits.shape} without its last axis")
    x, index = k.contiguous(logits), class_indices("cross_entropy", k, target, logits.shape[-1], ignore_index)
    loss, lse = k.empty(target.shape, x.dtype), k.empty(target.shape, x.dtype)
    k.cross_entropy(loss, lse, x, index, index.size, x.shape[-1], ignore_index, label_smoothing)
    return loss, {"lse": lse}


def class_indices(name: str, k: Any, target: Array, classes: int, ignore_index: int) -> Array:
    """The targets as dense int64, each a class or ignore_index; raises IndexError naming the op."""
    index = k.contiguous(target if target.dtype is int64 else cast(k, target, int64))
    k.check_index(index, classes, ignore_index,
                  f"{name}: target holds {{}}, expected classes in [0, {classes}) or ignore_index {ignore_index}")
    return index


def how_many_count(k: Any, target: Array, ignore_index: int, dtype: DType) -> Array:
    """How many targets are not ignore_index, as one element."""
    count = k.empty((), dtype)
    k.count_unequal(count, target, ignore_index)
    return count


@token_cross_entropy.kernel_vjp
def _(k: Any, g: Array, logits: Array, target: Array, lse: Array, ignore_index: int, label_smoothing: float) -> Any:
    x = k.contiguous(logits)
    index = k.contiguous(target if target.dtype is int64 else cast(k, target, int64))
    dx = k.empty_like(x)
    k.cross_entropy_vjp(dx, g, x, lse, index, index.size, x.shape[-1], ignore_index, label_smoothing)
    return dx, None


@token_cross_entropy.composition
def _(logits: Tensor, target: Tensor, ignore_index: int = IGNORE, label_smoothing: float = 0.0) -> Tensor:
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"cross_entropy: target has shape {target.shape}, expected {logits.shape[:-1]}, "
                         f"the shape of logits {logits.shape} without its last axis")
    class_indices("cross_entropy", get_backend(target.device), target.array, logits.shape[-1], ignore_index)
    counted = target != ignore_index
    safe = where(counted, target, 0)
    chosen = take_along_axis(logits, safe.expand_dims(-1), -1).squeeze(-1)
    loss = logsumexp(logits, -1) - chosen * (1 - label_smoothing)
    if label_smoothing:
        loss = loss - mean(logits, -1) * label_smoothing
    return where(counted, loss, 0.0)


@composite("...n, ... -> ...")
def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = IGNORE,
                  label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """−ln softmax(logits)[target], averaged over the targets that count.

    logits (..., classes) floating; target (...) integer classes, or ignore_index, which counts for nothing.
    weight: (classes,), each target's loss and its share of the mean are multiplied by its class's.
    label_smoothing s: the target distribution is (1 − s) one-hot + s uniform. Szegedy et al. 2016, arXiv:1512.00567.
    The mean is NaN when nothing counts. Raises IndexError for a target that is no class.
    """
    check_smoothing("cross_entropy", label_smoothing)
    if weight is not None:
        return _weighted(logits, target, weight, ignore_index, label_smoothing, reduction)
    loss = token_cross_entropy(logits, target, ignore_index, label_smoothing)
    if reduction != "mean":
        return reduced("cross_entropy", loss, reduction)
    count = how_many_count(get_backend(target.device), target.array, ignore_index, loss.dtype)
    return sum(loss) / Tensor(count, loss.device)


def _weighted(logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: float,
              reduction: str) -> Tensor:
    """Cross-entropy with a weight for each class (PyTorch's definition, smoothing included)."""
    counted = target != ignore_index
    safe = where(counted, target, 0)
    logp = log_softmax(logits, -1)
    chosen = take_along_axis(logp, safe.expand_dims(-1), -1).squeeze(-1)
    share = where(counted, weight[safe], 0.0)
    loss = -(share * chosen) * (1 - smoothing)
    if smoothing:
        loss = loss - where(counted, sum(weight * logp, -1), 0.0) * (smoothing / logits.shape[-1])
    return sum(loss) / sum(share) if reduction == "mean" else reduced("cross_entropy", loss, reduction)


@composite("..., ... -> ...")
def mse_loss(x: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """(x − target)²."""
    return reduced("mse_loss", square(x - target), reduction)


@composite("..., ... -> ...")
def huber_loss(x: Tensor, target: Tensor, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """d²/2 where |d| ≤ δ, else δ(|d| − δ/2), d = x − target. Huber 1964."""
    if delta <= 0:
        raise ValueError(f"huber_loss: delta is {delta!r}, expected a positive number")
    d = abs(x - target)
    near = minimum(d, delta)
    return reduced("huber_loss", near * (d - near * 0.5), reduction)


@composite("..., ... -> ...")
def binary_cross_entropy(probability: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """−(t ln p + (1 − t) ln(1 − p)), the logarithms held above −100 as PyTorch does."""
    kept, lost = maximum(log(probability), -100.0), maximum(log(1.0 - probability), -100.0)
    return reduced("binary_cross_entropy", -(target * kept + (1.0 - target) * lost), reduction)


@composite("..., ... -> ...")
def binary_cross_entropy_with_logits(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """softplus(x) − x t, which is −(t ln σ(x) + (1 − t) ln(1 − σ(x))) without its overflow."""
    from engine.ops.elementwise import softplus

    return reduced("binary_cross_entropy_with_logits", softplus(logits) - logits * target, reduction)


@composite("..., ... -> ...")
def kl_div(log_probability: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """t (ln t − log p), 0 where t = 0: Σ of it is the Kullback–Leibler divergence from p to t."""
    positive = target > 0.0
    entropy = where(positive, target * log(where(positive, target, 1.0)), 0.0)
    return reduced("kl_div", entropy - target * log_probability, reduction)
