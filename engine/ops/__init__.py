"""Every op: equation, forward and vjp side by side. See registry.py for how to read and write one."""

from __future__ import annotations

from engine.ops import attention as _attention
from engine.ops import creation as _creation
from engine.ops import elementwise as _elementwise
from engine.ops import indexing as _indexing
from engine.ops import inplace as _inplace  # attaches the in-place methods
from engine.ops import losses as _losses
from engine.ops import matmul as _matmul
from engine.ops import movement as _movement
from engine.ops import normalization as _normalization
from engine.ops import reductions as _reductions
from engine.ops.attention import rope_table
from engine.ops.creation import (arange, empty, eye, full, full_like, linspace, one_hot, ones, ones_like, rand, randint,
                                 randn, zeros, zeros_like)
from engine.ops.registry import Op, composite, op, registry
from engine.tensor import Tensor

globals().update(registry)

__all__ = ["Op", "arange", "composite", "empty", "eye", "full", "full_like", "linspace", "one_hot", "ones", "ones_like",
           "op", "rand", "randint", "randn", "registry", "rope_table", "zeros", "zeros_like", *registry]


def _reversed(name: str) -> None:
    """`2 - x`: Python asks the right operand when the left one does not know."""
    forward = registry[name]

    def run(self: Tensor, other: object) -> Tensor:
        return forward(other, self)

    setattr(Tensor, {"add": "__radd__", "subtract": "__rsub__", "multiply": "__rmul__", "divide": "__rtruediv__",
                     "pow": "__rpow__", "floor_divide": "__rfloordiv__", "remainder": "__rmod__",
                     "matmul": "__rmatmul__"}[name], run)


for _name in ("add", "subtract", "multiply", "divide", "pow", "floor_divide", "remainder", "matmul"):
    _reversed(_name)
