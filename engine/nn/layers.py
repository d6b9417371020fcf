"""Layers: a linear map, an embedding, the norms, dropout, and the feed-forward network of a Transformer.

Initial weights are drawn from the default generator: `with eg.seed(0): model = ...` gives the same ones each time.
They are float32 on the default device; Module.to converts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from engine import ops
from engine.nn.module import Module
from engine.tensor import Tensor


def initial_weights(*shape: int, std: float | None) -> Tensor:
    """Normal with standard deviation `std`; for None uniform in ±1/√(last axis), PyTorch's choice for linear maps."""
    if std is not None:
        return ops.randn(*shape, std=std, requires_grad=True)
    bound = 1 / math.sqrt(shape[-1]) if shape[-1] else 0.0
    return ops.rand(*shape, low=-bound, high=bound, requires_grad=True)


class Linear(Module):
    """y = x Wᵀ + b, for x (..., inputs), W `weight` (outputs, inputs), b `bias` (outputs,) if wanted.

    std: W ~ N(0, std²) and b = 0; by default both are uniform in ±1/√inputs.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, *, std: float | None = None):
        super().__init__()
        self.weight = initial_weights(outputs, inputs, std=std)
        self.bias: Tensor | None = None
        if bias and std is None:
            bound = 1 / math.sqrt(inputs) if inputs else 0.0
            self.bias = ops.rand(outputs, low=-bound, high=bound, requires_grad=True)
        elif bias:
            self.bias = ops.zeros(outputs, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}" + (", bias=False" if self.bias is None else "")


def fusible(*maps: Module) -> bool:
    """Whether one op may stand for these: they are Linear and nothing derived from it, and their weights tensors."""
    return all(type(m) is Linear and isinstance(m.weight, Tensor) for m in maps)


class Embedding(Module):
    """y = W[index]: a row of W `weight` (count, width) ~ N(0, std²) for each integer in [0, count).

    sparse: the gradient of W holds the touched rows only (eg.RowSparse), and an optimizer step costs what they cost.
    Results have the same bits either way.
    """

    def __init__(self, count: int, width: int, *, std: float = 1.0, sparse: bool = False):
        super().__init__()
        self.weight = initial_weights(count, width, std=std)
        self.sparse = sparse

    def forward(self, index: Tensor) -> Tensor:
        return ops.embedding(self.weight, index, sparse=self.sparse)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape) + (", sparse=True" if self.sparse else "")


class LayerNorm(Module):
    """y = w · (x − μ)/√(σ² + ε) + b over the last axis, of length `width`. Ba, Kiros, Hinton 2016, arXiv:1607.06450.

    bias=False leaves b out.
    """

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = ops.ones(width, requires_grad=True)
        self.bias: Tensor | None = ops.zeros(width, requires_grad=True) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = ops.zeros_like(self.weight) if self.bias is None else self.bias
        return ops.layer_norm(x, self.weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.size}, eps={self.eps}" + (", bias=False" if self.bias is None else "")


class RMSNorm(Module):
    """y = w · x/√(mean x² + ε) over the last axis, of length `width`. Zhang, Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = ops.ones(width, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.size}, eps={self.eps}"


class Dropout(Module):
    """In training, each element 0 with probability p, else x/(1 − p); in evaluation x. Srivastava et al. 2014."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p is {p!r}, expected a probability in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p) if self.training and self.p else x

    def extra_repr(self) -> str:
        return str(self.p)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": ops.gelu, "gelu_tanh": ops.gelu_tanh, "relu": ops.relu, "swiglu": ops.silu}


class FeedForward(Module):
    """y = W₂ f(W₁ x), applied to each position by itself; or with "swiglu" y = W₂ (silu(W_g x) · W₁ x).

    W₁ `up` and W_g `gate` (hidden, width), W₂ `down` (width, hidden), each with a bias if wanted.
    activation: "gelu" (Hendrycks, Gimpel 2016, arXiv:1606.08415), "gelu_tanh" (its approximation, as in GPT-2), "relu"
    (Vaswani et al. 2017, eq. 2) or "swiglu" (Shazeer 2020, arXiv:2002.05202, eq. 6).
    std, output_std: of the initial weights of the inner maps and of W₂, as in Linear.
    """

    def __init__(self, width: int, hidden: int, activation: str = "gelu", bias: bool = True, *,
                 std: float | None = None, output_std: float | None = None):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"FeedForward: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.gate = Linear(width, hidden, bias, std=std) if activation == "swiglu" else None
        self.up = Linear(width, hidden, bias, std=std)
        self.down = Linear(hidden, width, bias, std=output_std)

    def forward(self, x: Tensor) -> Tensor:
        f, up, down = ACTIVATIONS[self.activation], self.up, self.down
        if self.gate is None and fusible(up, down):
            return ops.feed_forward(x, up.weight, down.weight, up.bias, down.bias, self.activation)
        inner = f(up(x)) if self.gate is None else f(self.gate(x)) * up(x)
        return down(inner)

    def extra_repr(self) -> str:
        return self.activation
