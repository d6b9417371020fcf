"""What the tests of captured functions share: numbers, their bits, and a function held against itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import engine as eg
from engine import nn
from engine.backend import get_backend
from engine.backend.pool import Block

CPU: Any = get_backend("cpu")
CALLS = 4  # as it is, recorded, run again twice


def numbers(shape: tuple[int, ...], seed: int) -> eg.Tensor:
    return eg.tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def bits(x: Any) -> Any:
    """Something that is equal for equal bits: of tensors, alone or in sequences."""
    if isinstance(x, eg.Tensor):
        return x.shape, str(x.dtype), x.numpy().tobytes()
    return [bits(part) for part in x] if isinstance(x, (tuple, list)) else x


def block_bytes(size: int) -> int:
    """What a block of so many bytes takes of the pool: its size class, and guard zones where there are any."""
    block = CPU.pool.allocate(size)
    whole = block.base if isinstance(block.base, Block) else block
    return int(whole.nbytes)


def agree(function: Callable[..., Any], *shapes: tuple[int, ...], reads: Any = (), calls: int = CALLS) -> Any:
    """Hold a captured function against itself, on other numbers in each call; returns it."""
    captured = eg.capture(function, reads)
    kept = []
    for call in range(calls):
        given = [numbers(shape, 10 * call + i) for i, shape in enumerate(shapes)]
        with eg.seed(eg.Generator(3).at(call)):
            want = bits(function(*given))
        with eg.seed(eg.Generator(3).at(call)):
            kept.append((captured(*given), want))
    assert [bits(got) for got, _ in kept] == [want for _, want in kept]  # after all calls: nothing was written over
    assert len(captured.programs) == 1
    return captured


class Network(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(6, 16), nn.Dropout(dropout), nn.Linear(16, 3)

    def forward(self, x: eg.Tensor) -> eg.Tensor:
        return self.last(self.dropout(eg.gelu(self.first(x))))


def mlp(dropout: float = 0.0) -> nn.Module:
    with eg.seed(0):
        return Network(dropout)
