"""Every op: equation, forward and vjp side by side. See registry.py for how to read and write one."""

from __future__ import annotations

import engine.ops.inplace  # noqa: F401  (attaches x += y, x[i] = y ...)
from engine.ops.attention import rope, rope_table, scaled_dot_product_attention
from engine.ops.creation import (
    arange,
    astype,
    dropout,
    empty,
    eye,
    full,
    full_like,
    linspace,
    one_hot,
    ones,
    ones_like,
    rand,
    randint,
    randn,
    tril,
    triu,
    zeros,
    zeros_like,
)
from engine.ops.elementwise import (
    abs,
    add,
    bitwise_and,
    bitwise_not,
    bitwise_or,
    bitwise_xor,
    ceil,
    clip,
    cos,
    divide,
    equal,
    erf,
    exp,
    expm1,
    floor,
    floor_divide,
    gelu,
    gelu_tanh,
    greater,
    greater_equal,
    isfinite,
    isinf,
    isnan,
    less,
    less_equal,
    log,
    log1p,
    logical_and,
    logical_not,
    logical_or,
    logical_xor,
    maximum,
    minimum,
    multiply,
    negative,
    not_equal,
    pow,
    reciprocal,
    relu,
    remainder,
    round,
    rsqrt,
    sigmoid,
    sign,
    silu,
    sin,
    softplus,
    sqrt,
    square,
    subtract,
    tanh,
    where,
)
from engine.ops.indexing import argsort, embedding, sort, take, take_along_axis
from engine.ops.losses import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    kl_div,
    mse_loss,
)
from engine.ops.matmul import linear, matmul, tensordot
from engine.ops.movement import (
    broadcast_to,
    concat,
    expand_dims,
    flatten,
    flip,
    matrix_transpose,
    moveaxis,
    permute_dims,
    repeat,
    reshape,
    split,
    squeeze,
    stack,
    swapaxes,
)
from engine.ops.normalization import layer_norm, log_softmax, rms_norm, softmax
from engine.ops.reductions import (
    all,
    any,
    argmax,
    argmin,
    cumulative_sum,
    logsumexp,
    max,
    mean,
    min,
    prod,
    std,
    sum,
    var,
)
from engine.ops.registry import Op, composite, op, registry
from engine.tensor import Tensor

__all__ = [
    "Op", "abs", "add", "all", "any", "arange", "argmax", "argmin", "argsort", "astype", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "broadcast_to",
    "ceil", "clip", "composite", "concat", "cos", "cross_entropy", "cumulative_sum", "divide", "dropout",
    "embedding", "empty", "equal", "erf", "exp", "expand_dims", "expm1", "eye", "flatten", "flip", "floor",
    "floor_divide", "full", "full_like", "gelu", "gelu_tanh", "greater", "greater_equal", "huber_loss", "isfinite",
    "isinf", "isnan", "kl_div", "layer_norm", "less", "less_equal", "linear", "linspace", "log", "log1p",
    "log_softmax", "logical_and", "logical_not", "logical_or", "logical_xor", "logsumexp", "matmul",
    "matrix_transpose", "max", "maximum", "mean", "min", "minimum", "moveaxis", "mse_loss", "multiply", "negative",
    "not_equal", "one_hot", "ones", "ones_like", "op", "permute_dims", "pow", "prod", "rand", "randint", "randn",
    "reciprocal", "registry", "relu", "remainder", "repeat", "reshape", "rms_norm", "rope", "rope_table", "round",
    "rsqrt", "scaled_dot_product_attention", "sigmoid", "sign", "silu", "sin", "softmax", "softplus", "sort",
    "split", "sqrt", "square", "squeeze", "stack", "std", "subtract", "sum", "swapaxes", "take", "take_along_axis",
    "tanh", "tensordot", "tril", "triu", "var", "where", "zeros", "zeros_like",
]


def _attach_reversed(name: str, forward: Op) -> None:
    """`2 - x`: Python asks the right operand when the left one does not know."""
    def run(self: Tensor, other: object) -> Tensor:
        return forward(other, self)
    setattr(Tensor, name, run)


for _name, _forward in (("__radd__", add), ("__rsub__", subtract), ("__rmul__", multiply), ("__rtruediv__", divide),
                        ("__rpow__", pow), ("__rfloordiv__", floor_divide), ("__rmod__", remainder),
                        ("__rmatmul__", matmul)):
    _attach_reversed(_name, _forward)
