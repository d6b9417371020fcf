"""What cannot be captured says so with one line, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from captured import CPU, agree, bits, numbers

import engine as eg
from engine import nn, optim
from engine.backend import observers
from engine.backend.recording import recording

pytestmark = pytest.mark.usefixtures("unwatched")

W = eg.tensor([1.0, 2.0], requires_grad=True)
OTHER = eg.tensor([3.0, 4.0], requires_grad=True)
REFUSED: dict[str, tuple[Callable[[eg.Tensor], Any], str]] = {
    "item": (lambda x: eg.exp(x).sum().item(), "elements are read on the host"),
    "an argument's elements": (lambda x: x.numpy().sum(), "elements are read on the host"),
    "bool": (lambda x: x if (x > 0).all() else -x, "elements are read on the host"),
    "nonzero": (lambda x: eg.nonzero(x), "elements are read on the host"),
    "an index": (lambda x: W.detach()[(x > 9).to("int64")], "elements are read on the host"),
    "print": (lambda x: str(x), "elements are read on the host"),
    "norm": (lambda x: _clipped(x), "elements are read on the host"),
    "step": (lambda x: optim.SGD([W]).step(), r"SGD\.step would not happen again"),
    "seed": (lambda x: _seeded(x), "a generator of their own"),
    "generator": (lambda x: eg.dropout(x, 0.5, generator=eg.Generator(4)), "a generator of their own"),
    "moved": (lambda x: [eg.default_generator().at(3), eg.dropout(x, 0.5)][1], "Generator.at would not happen"),
    "cache": (lambda x: nn.attention.KeyValueCache(1, 1, 4, 2).append(*[x.reshape(1, 1, 1, 2)] * 2),
              r"KeyValueCache\.append would not happen again"),
    "graph": (lambda x: W * x, "its graph would be lost"),
    "a gradient's graph": (lambda x: (W * W * x).sum().backward(create_graph=True), "has a graph"),
    "a row-sparse gradient": (lambda x: _sparse(), "elements are read on the host"),
    "another leaf": (lambda x: (OTHER * x).sum().backward(), r"a leaf of shape \(2,\) that is neither an argument"),
    "writing elsewhere": (lambda x: OTHER.detach().copy_(x), "writes to memory that is neither given nor made"),
    "a closure's elements": (lambda x: x * OTHER.detach().sum().item(), "elements are read on the host"),
    "a change in a graph": (lambda x: _rebound(x), "becomes another"),
    "an equal generator": (lambda x: eg.dropout(x, 0.5, generator=eg.Generator(1)), "a generator of their own"),
    "an equal seed": (lambda x: _seeded(x, 1), "a generator of their own"),
    "a scaler": (lambda x: optim.GradScaler().scale(x), r"GradScaler\.scale would not happen again"),
}


def _seeded(x: eg.Tensor, seed: int = 9) -> eg.Tensor:
    with eg.seed(seed):
        return eg.dropout(x, 0.5)


def _clipped(x: eg.Tensor) -> None:
    (W * x).sum().backward()
    optim.clip_grad_norm_([W], 1.0)


def _sparse() -> None:
    eg.embedding(W.reshape(2, 1), eg.tensor([0]), sparse=True).sum().backward()


def _rebound(x: eg.Tensor) -> None:
    x *= W
    x.sum().backward()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_says_so(name: str) -> None:
    function, message = REFUSED[name]
    captured, x = eg.capture(function, [W]), eg.tensor([1.0, 2.0])
    with eg.seed(1), pytest.raises(RuntimeError, match="capture: .*" + message) as caught:
        for _ in range(2):
            W.grad = None
            captured(x * 1)
    assert "\n" not in str(caught.value)
    W.grad = None
    assert recording() is None and CPU.pool.allocated is None
    agree(lambda x: x + 1, (2,))  # nothing is left behind


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"capture: reads is \[3\], expected a module, a tensor, or a list"):
        eg.capture(abs, [3])
    with pytest.raises(TypeError, match="capture: argument 1 is list, expected a tensor or something that can be ha"):
        eg.capture(lambda x, y: x)(W.detach(), [1])
    with pytest.raises(RuntimeError, match="capture: argument x was made by exp, and no gradient flows back"):
        eg.capture(lambda x: x)(x=eg.exp(W))
    for reads in (3, None, "text"):
        with pytest.raises(TypeError, match=r"capture: reads is .*, expected a module, a tensor, or a list of them"):
            eg.capture(abs, reads)
    with pytest.raises(TypeError, match="capture: argument 1 holds a tensor"):
        eg.capture(lambda x, pair: x)(W.detach(), (1, W))
    with pytest.raises(TypeError, match="capture: argument 0 is list"):
        eg.capture(lambda pair: pair[0])(([2], 1))
    with pytest.raises(TypeError, match="capture: a result is set, expected tensors"):
        eg.capture(lambda x: {1})(W.detach())
    captured = eg.capture(lambda x: x + 1, [numbers((2, 3), 0).T])
    captured(numbers((2,), 0))
    with pytest.raises(ValueError, match=r"reads has a tensor of shape \(3, 2\) that is not dense"):
        captured(numbers((2,), 0))


def test_an_error_while_it_is_recorded_leaves_nothing_behind() -> None:
    fails = [False, True, False, False]

    def function(x: eg.Tensor) -> eg.Tensor:
        y = eg.exp(x)
        if fails.pop(0):
            raise KeyboardInterrupt
        return y

    captured, x = eg.capture(function), numbers((3,), 0)
    captured(x)
    with pytest.raises(KeyboardInterrupt):
        captured(x)
    assert recording() is None and observers == [] and CPU.pool.allocated is None
    for _ in range(3):
        assert bits(captured(x)) == bits(eg.exp(x))
