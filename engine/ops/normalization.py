"""Softmax and the norms, along the last axis in one pass over memory; beside each, the composition that defines it."""

from __future__ import annotations

from typing import Any

from engine import autograd
from engine.backend import Array
from engine.ops.elementwise import exp, log, rsqrt, square
from engine.ops.movement import moveaxis
from engine.ops.reductions import max as max_over
from engine.ops.reductions import mean, sum
from engine.ops.registry import axis_index, composite, op
from engine.tensor import Tensor


def _rows(x: Array) -> tuple[int, int]:
    """(rows, n) of x seen as a matrix whose rows are its last axis."""
    n = x.data.shape[-1] if x.data.ndim else 1
    return (x.data.size // n if n else 0), n


def _along_last(name: str, f: Any, x: Tensor, axis: int) -> Tensor:
    """f, which works along the last axis, along another. A 0-d tensor is one axis of one element."""
    at = axis_index(name, axis, x.ndim or 1)
    return f(x) if at == max(x.ndim - 1, 0) else moveaxis(f(moveaxis(x, at, -1)), -1, at)


@op("... -> ...", types="float!", kernel="softmax", public=False, part_of="softmax")
def softmax_rows(k: Any, x: Array) -> Array:
    """softmax over the last axis."""
    x = k.contiguous(x)
    y = k.empty_like(x)
    k.softmax(y, x, *_rows(x))
    return y


@softmax_rows.kernel_vjp
def _(k: Any, g: Array, y: Array) -> Array:
    dx = k.empty_like(y)
    k.softmax_vjp(dx, g, y, *_rows(y))
    return dx


@softmax_rows.composition
def _(x: Tensor) -> Tensor:
    e = exp(x - max_over(x.detach(), -1 if x.ndim else None, keepdims=True)) if x.size else x
    return e / sum(e, -1 if x.ndim else None, keepdims=True)


@composite("... -> ...", method="softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """y = eˣ / Σ eˣ along `axis`, computed from x − max x so that it cannot overflow."""
    return _along_last("softmax", softmax_rows, x, axis)


@op("... -> ...", types="float!", kernel="log_softmax", public=False, part_of="log_softmax")
def log_softmax_rows(k: Any, x: Array) -> Array:
    """log softmax over the last axis."""
    x = k.contiguous(x)
    y = k.empty_like(x)
    k.log_softmax(y, x, *_rows(x))
    return y


@log_softmax_rows.kernel_vjp
def _(k: Any, g: Array, y: Array) -> Array:
    dx = k.empty_like(y)
    k.log_softmax_vjp(dx, g, y, *_rows(y))
    return dx


@log_softmax_rows.composition
def _(x: Tensor) -> Tensor:
    d = x - max_over(x.detach(), -1 if x.ndim else None, keepdims=True) if x.size else x
    return d - log(sum(exp(d), -1 if x.ndim else None, keepdims=True))


@composite("... -> ...", method="log_softmax")
def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """y = x − ln Σ eˣ along `axis`."""
    return _along_last("log_softmax", log_softmax_rows, x, axis)


@op("...n, n, n -> ...n", types="float!")
def layer_norm(k: Any, x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Any:
    """y = weight · (x − μ)/√(σ² + ε) + bias over the last axis. Ba, Kiros, Hinton 2016, arXiv:1607.06450, eq. 3."""
    x, weight, bias = k.contiguous(x), k.contiguous(weight), k.contiguous(bias)
    rows, n = _rows(x)
    y, mu, rstd = k.empty_like(x), k.empty((rows,), x.dtype), k.empty((rows,), x.dtype)
    k.layer_norm(y, mu, rstd, x, weight, bias, rows, n, eps)
    return y, {"mu": mu, "rstd": rstd}


@layer_norm.kernel_vjp
def _(k: Any, g: Array, x: Array, weight: Array, mu: Array, rstd: Array) -> Any:
    x, weight = k.contiguous(x), k.contiguous(weight)
    dx, dweight, dbias = k.empty_like(x), k.empty_like(weight), k.empty_like(weight)
    k.layer_norm_vjp(dx, dweight, dbias, g, x, weight, mu, rstd, *_rows(x))
    return dx, dweight, dbias


@layer_norm.composition
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    d = x - mean(x, axis=-1, keepdims=True)
    return weight * d * rsqrt(mean(square(d), axis=-1, keepdims=True) + eps) + bias


@composite("...c, c, c -> ...c")
def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None = None,
               running_var: Tensor | None = None, training: bool = True, momentum: float = 0.1,
               eps: float = 1e-5) -> Tensor:
    """y = weight · (x − μ)/√(σ² + ε) + bias for each channel, the last axis. Ioffe, Szegedy 2015, arXiv:1502.03167.

    training: μ and σ² (divided by n) are those of the batch, over every axis but the last, and the running ones move
    towards them in place: r ← (1 − momentum) r + momentum μ, the variance divided by n − 1 as in PyTorch.
    Otherwise μ and σ² are the running ones.
    """
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm: running_mean and running_var are None, expected tensors when not training")
        return (x - running_mean) * rsqrt(running_var + eps) * weight + bias
    axes = tuple(range(x.ndim - 1))
    mu = mean(x, axes)
    d = x - mu
    variance = mean(square(d), axes)
    with autograd.no_grad():
        n = x.size // x.shape[-1] if x.shape[-1] else 0
        if running_mean is not None:
            running_mean.copy_(running_mean * (1 - momentum) + mu.detach() * momentum)
        if running_var is not None:
            unbiased = variance.detach() * (n / (n - 1) if n > 1 else 1.0)
            running_var.copy_(running_var * (1 - momentum) + unbiased * momentum)
    return d * rsqrt(variance + eps) * weight + bias


@op("...n, n -> ...n", types="float!")
def rms_norm(k: Any, x: Array, weight: Array, eps: float = 1e-6) -> Any:
    """y = weight · x/√(mean x² + ε) over the last axis. Zhang, Sennrich 2019, arXiv:1910.07467, eq. 4."""
    x, weight = k.contiguous(x), k.contiguous(weight)
    rows, n = _rows(x)
    y, rstd = k.empty_like(x), k.empty((rows,), x.dtype)
    k.rms_norm(y, rstd, x, weight, rows, n, eps)
    return y, {"rstd": rstd}


@rms_norm.kernel_vjp
def _(k: Any, g: Array, x: Array, weight: Array, rstd: Array) -> Any:
    x, weight = k.contiguous(x), k.contiguous(weight)
    dx, dweight = k.empty_like(x), k.empty_like(weight)
    k.rms_norm_vjp(dx, dweight, g, x, weight, rstd, *_rows(x))
    return dx, dweight


@rms_norm.composition
def _(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x * rsqrt(mean(square(x), axis=-1, keepdims=True) + eps)
