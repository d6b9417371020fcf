"""Functional transforms on top of reverse mode: vjp and jvp of a function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine import autograd
from engine.autograd import enable_grad
from engine.backend import get_backend
from engine.tensor import Tensor


def _zeros_like(x: Tensor) -> Tensor:
    return Tensor(get_backend(x.device).zeros(x.shape, x.dtype), x.device)


def _fresh(primals: Sequence[Tensor]) -> list[Tensor]:
    """Leaves over the same memory, so that f's graph starts here."""
    return [Tensor(x.array, x.device, requires_grad=True) for x in primals]


def vjp(f: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """(f(*primals), pull), where pull(g) = gᵀJ for each primal, with J the Jacobian of f there."""
    with enable_grad():
        xs = _fresh(primals)
        out = f(*xs)

    def pull(g: Tensor) -> tuple[Tensor, ...]:
        if not out.requires_grad:
            return tuple(_zeros_like(x) for x in xs)
        grads = autograd.grad(out, xs, g, retain_graph=True, allow_unused=True)
        return tuple(_zeros_like(x) if d is None else d for x, d in zip(xs, grads))

    return out.detach(), pull


def jvp(f: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(f(*primals), J v): the directional derivative of f along the tangents v.

    By reverse mode twice: u ↦ uᵀJ is linear in u, and the vjp of that map along v is J v. So every op that has a
    second derivative has this, without a rule of its own.
    """
    if len(primals) != len(tangents):
        raise ValueError(f"jvp: got {len(primals)} primals and {len(tangents)} tangents, expected as many")
    with enable_grad():
        xs = _fresh(primals)
        out = f(*xs)
        if not out.requires_grad:
            return out, _zeros_like(out)
        u = _zeros_like(out).requires_grad_(True)
        rows: Any = autograd.grad(out, xs, u, create_graph=True, allow_unused=True)
        used = [(row, v) for row, v in zip(rows, tangents) if row is not None and row.requires_grad]
        if not used:
            return out.detach(), _zeros_like(out)
        jv = autograd.grad([row for row, _ in used], [u], [v for _, v in used], allow_unused=True)[0]
    return out.detach(), _zeros_like(out) if jv is None else jv
