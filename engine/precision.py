"""Mixed precision: matrix products of numbers with fewer digits, and everything else in float32.

    with eg.autocast("bfloat16"):              C = A B becomes C = round(A) round(B), summed in float32
        loss = model(tokens, targets)
    loss.backward()                            the products of backward likewise, whether inside or not

A multiplier of 8 binary digits is a ninth of one of 24, so processors have more of them (kernels/gemm_bf16.c), while
sums, norms, softmax and the weights need the 24: a step of an optimizer is often less than the last of 8 digits. So
only what a product reads is rounded, as it is read, and nothing is stored in 16 bits: weights are their own float32
masters, activations and gradients are float32, and there is no copy to keep in step.

| in 16 bits, if they get float32                                   | in float32 (or float64) as ever               |
|-------------------------------------------------------------------|-----------------------------------------------|
| the factors of matmul, linear, feed_forward, conv1d, tensordot,   | sums, bias and result of these; all other ops,|
| linear_cross_entropy, einsum, the maps of attention; forward and  | attention itself among them; maps by packed   |
| backward                                                          | and quantised weights; optimizers             |

bfloat16 has float32's range. float16 has three digits more and a range of 6e-8 to 65504: gradients fall below it, so
its loss is multiplied by a factor before backward (`eg.optim.GradScaler`).

Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740; Kalamkar et al. 2019, "A Study of BFLOAT16 for
Deep Learning Training", arXiv:1905.12322.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import _GeneratorContextManager

FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2}
"""What factors may be rounded to, by the numbers of kernels.h."""

product_format: ContextVar[int] = ContextVar("product_format", default=0)
"""The format of the products that are computed now, in this thread."""


def autocast(dtype: str = "bfloat16", enabled: bool = True) -> _GeneratorContextManager[None]:
    """`with eg.autocast("bfloat16"):` or `@eg.autocast("bfloat16")`: products inside round their factors to bfloat16.

    dtype "bfloat16", "float16", or "float32", which inside another autocast leaves factors as they are, as does
    enabled=False. Products of float64 stay as they are. A product's gradients are computed in the format that it was;
    so is what eg.checkpoint computes again. The results have the same bits for any number of threads. The setting is
    the calling thread's. It is for training: a few rows alone pack all of a weight, where in float32 they only read it.
    Raises ValueError for another dtype.
    """
    if dtype not in FORMATS:
        raise ValueError(f"autocast: dtype is {dtype!r}, expected one of {', '.join(FORMATS)}")
    return _products_in(FORMATS[dtype] if enabled else FORMATS["float32"])


@contextmanager
def _products_in(format: int) -> Iterator[None]:
    token = product_format.set(format)
    try:
        yield
    finally:
        product_format.reset(token)


def get_autocast() -> str:
    """What products round their factors to here: "float32" (nothing), "bfloat16" or "float16"."""
    return next(name for name, number in FORMATS.items() if number == product_format.get())
