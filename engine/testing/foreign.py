"""Functions of other libraries as functions of NumPy arrays with a vjp, so that every check here can be turned on them.

    call, vjp = of_torch(my_function)
    check_adjoint(call, x, y, vjp=vjp)
    register(OpSpec("mine", draw, call=call, vjp=vjp, wrt=(0, 1)))

The libraries are imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Call = Callable[..., np.ndarray]
Vjp = Callable[..., tuple[np.ndarray, list[np.ndarray]]]


def of_torch(f: Callable[..., Any]) -> tuple[Call, Vjp]:
    """(call, vjp) of a function of PyTorch tensors; gradients by torch.autograd."""
    import torch

    def call(*xs: np.ndarray, **attributes: Any) -> np.ndarray:
        with torch.no_grad():
            y: np.ndarray = f(*[torch.from_numpy(np.array(x)) for x in xs], **attributes).numpy()
        return y

    def vjp(xs: Sequence[np.ndarray], g: np.ndarray, **attributes: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        leaves = [torch.from_numpy(np.array(x)).requires_grad_() for x in xs]
        y = f(*leaves, **attributes)
        found = torch.autograd.grad(y, leaves, torch.from_numpy(np.array(g)), allow_unused=True)
        return y.detach().numpy(), [np.zeros(x.shape) if d is None else d.numpy() for x, d in zip(xs, found)]

    return call, vjp


def of_autograd(f: Callable[..., Any]) -> tuple[Call, Vjp]:
    """(call, vjp) of a function written in autograd.numpy; gradients by HIPS autograd's make_vjp."""
    from autograd import make_vjp

    def vjp(xs: Sequence[np.ndarray], g: np.ndarray, **attributes: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        pull, y = make_vjp(f, argnum=tuple(range(len(xs))))(*xs, **attributes)
        return y, [np.asarray(d) for d in pull(np.asarray(g))]

    return f, vjp
