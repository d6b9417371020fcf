"""The network of a Transformer block in one: two matrix products, and the activation between them as they are made.

    z = x W₁ᵀ + b₁       h = f(z)             y = h W₂ᵀ + b₂
    dh = g W₂            dz = dh ∘ f′(z)      dx = dz W₁
    dW₂ = gᵀ h, db₂ = Σ g                     dW₁ = dzᵀ x, db₁ = Σ dz

Between the products lie the widest arrays of a model, larger than the caches, and the functions that take longest. So
the kernels apply f and f′ to a part of z as soon as the product has made it, both from one exponential, and keep f′(z)
in place of z; backward it multiplies a part of dh likewise, and neither z nor dh is ever whole in memory
(kernels/gemm_activation.c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine import autograd
from engine.backend import Array
from engine.ops.elementwise import gelu, gelu_tanh, relu, silu
from engine.ops.matmul import as_rows, column_sums, gemm, linear, shaped, transposed
from engine.ops.registry import composite, op
from engine.precision import product_format
from engine.tensor import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}
"""What may stand between the products, in the order of kernels.h."""


@op("...i, hi, oh, h, o -> ...o",
    types="float!", kernel="linear_activation", public=False, part_of="feed_forward")
def two_layers(k: Any, x: Array, up: Array, down: Array, up_bias: Array | None = None, down_bias: Array | None = None,
               activation: str = "gelu", recorded: bool = True) -> Any:
    """y = f(x W₁ᵀ + b₁) W₂ᵀ + b₂; f′(z) is computed and kept if `recorded`."""
    rows, up = as_rows(k, x), k.contiguous(up)
    up_bias, down_bias = (bias if bias is None else k.contiguous(bias) for bias in (up_bias, down_bias))
    h = k.empty((rows.shape[0], up.shape[0]), x.dtype)
    slope = k.empty_like(h) if recorded else None
    k.linear_activation(h, slope, rows, up, up_bias, *h.shape, up.shape[1], list(ACTIVATIONS).index(activation),
                        product_format.get())
    y = gemm(k, h, transposed(down), down_bias)
    return shaped(y, (*x.shape[:-1], down.shape[0])), {"slope": slope, "h": h}


@two_layers.kernel_vjp
def _(k: Any, g: Array, x: Array, up: Array, down: Array, slope: Array, h: Array, activation: str,
      needs: tuple[bool, ...]) -> Any:
    flat_g = as_rows(k, g)
    dx = dup = dup_bias = None
    if needs[0] or needs[1] or needs[3]:
        dz = k.empty_like(h)
        k.linear_activation_vjp(dz, flat_g, k.contiguous(down), slope, *dz.shape, flat_g.shape[1],
                                list(ACTIVATIONS).index(activation), product_format.get())
        dx = shaped(gemm(k, dz, up), x.shape) if needs[0] else None
        dup = gemm(k, transposed(dz), as_rows(k, x)) if needs[1] else None
        dup_bias = column_sums(k, dz) if needs[3] else None
    ddown = gemm(k, transposed(flat_g), h) if needs[2] else None
    return dx, dup, ddown, dup_bias, column_sums(k, flat_g) if needs[4] else None


@two_layers.composition
def _(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None, down_bias: Tensor | None = None,
      activation: str = "gelu", recorded: bool = True) -> Tensor:
    return linear(ACTIVATIONS[activation](linear(x, up, up_bias)), down, down_bias)


@composite("...i, hi, oh, h, o -> ...o")
def feed_forward(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None, down_bias: Tensor | None = None,
                 activation: str = "gelu") -> Tensor:
    """y = f(x W₁ᵀ + b₁) W₂ᵀ + b₂. Vaswani et al. 2017, arXiv:1706.03762, eq. 2.

    x (..., inputs), up W₁ (hidden, inputs), down W₂ (outputs, hidden), up_bias b₁ (hidden,), down_bias b₂ (outputs,),
    all of one floating type. activation: "relu", "silu", "gelu" or "gelu_tanh". Output and gradients have the very bits
    of linear, activation, linear. Raises ValueError for another activation and for shapes that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"feed_forward: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return two_layers(x, up, down, up_bias, down_bias, activation, autograd.is_grad_enabled())
