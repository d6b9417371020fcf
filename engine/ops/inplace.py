"""In-place operations: x += y, x[i] = v, x.zero_().

On a tensor outside any graph they write to its memory and advance its version, so that a node which saved the old
elements says so in backward. On a tensor inside a graph they do not touch memory: x is bound to the result of the
functional op, and the graph stays right. Where that would go unseen, because other views of the memory exist, and
on a leaf that requires grad while recording, they raise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from engine import autograd
from engine.backend import Array, get_backend
from engine.ops import elementwise, logic
from engine.ops.matmul import matmul
from engine.ops.registry import attach, cast
from engine.tensor import Tensor

ALONE = 2  # references to a storage that one Array sees: the Array's, and the one being counted


def rebind_or_write(name: str, x: Tensor, value: Any, functional: Callable[[Tensor, Any], Tensor],
                    write: Callable[[Any, Array], None]) -> None:
    """The two ways above: functional(x, value) gives the new tensor; write(k, x's Array) overwrites the elements."""
    recording = autograd.is_grad_enabled() and (
        x.requires_grad or (isinstance(value, Tensor) and value.requires_grad))
    if recording:
        if x.node is None and x.requires_grad:
            raise RuntimeError(f"{name}: x is a leaf that requires grad, which cannot be changed in place while "
                               "recording; use eg.no_grad(), or make a new tensor")
        if x.array.storage.has_views and sys.getrefcount(x.array.storage) > ALONE:
            raise RuntimeError(f"{name}: x shares its memory with a view while in a graph, and the change would not "
                               "be seen there; make a new tensor instead")
        result = functional(x, value)
        if result.shape != x.shape:
            raise ValueError(f"{name}: the result has shape {result.shape}, which does not fit x {x.shape} in place")
        if result.dtype is not x.dtype:
            result = result.to(dtype=x.dtype)
        x.array, x.node, x.requires_grad = result.array, result.node, result.requires_grad
        return
    if not x.array.writeable:
        raise ValueError(f"{name}: x is read-only (a broadcast view or a read-only array)")
    if isinstance(value, Tensor) and value.device != x.device:
        raise ValueError(f"{name}: x is on {x.device} and the value on {value.device}; move it with .to()")
    write(get_backend(x.device), x.array)
    x.array.storage.version += 1


def _augmented(f: Any, name: str) -> Callable[[Tensor, Any], Tensor]:
    def run(self: Tensor, other: Any) -> Tensor:
        def write(k: Any, target: Array) -> None:
            with autograd.no_grad():
                result = f(self, other)
            if result.shape != self.shape:
                raise ValueError(f"{name}: the result has shape {result.shape}, which does not fit x {self.shape} "
                                 "in place")
            source = result.array if result.dtype is self.dtype else cast(k, result.array, self.dtype)
            k.copy(target, source, k.layout(target, source))
        rebind_or_write(name, self, other, f, write)
        return self
    run.__name__ = name
    return run


def _copy_(self: Tensor, other: Any) -> Tensor:
    """Overwrite the elements with those of `other`, which broadcasts to this shape."""
    self[...] = other
    return self


def _zero_(self: Tensor) -> Tensor:
    """Set every element to 0."""
    self[...] = 0
    return self


for _name, _op in (("__iadd__", elementwise.add), ("__isub__", elementwise.subtract),
                   ("__imul__", elementwise.multiply), ("__itruediv__", elementwise.divide),
                   ("__ipow__", elementwise.pow), ("__ifloordiv__", elementwise.floor_divide),
                   ("__imod__", elementwise.remainder), ("__imatmul__", matmul),
                   ("__iand__", logic.bitwise_and), ("__ior__", logic.bitwise_or),
                   ("__ixor__", logic.bitwise_xor), ("__ilshift__", logic.bitwise_left_shift),
                   ("__irshift__", logic.bitwise_right_shift)):
    attach(_name, _augmented(_op, _name))
attach("copy_", _copy_)
attach("zero_", _zero_)
