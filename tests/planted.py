"""What tests of the laboratory plant, and how they see that it was found."""

from __future__ import annotations

from typing import Any

import pytest

import engine as eg
from engine.testing import CheckFailure


def fails(check: Any, *words: str) -> CheckFailure:
    """check() raises CheckFailure, whose text contains the words; it says what was allowed, why, and how to see it."""
    with pytest.raises(CheckFailure) as caught:
        check()
    failure = caught.value
    for word in words:
        assert word in str(failure)
    assert failure.bound is not None and failure.origin and failure.reproduction
    return failure


def off(y: eg.Tensor, share: float) -> eg.Tensor:
    """y, whose gradients are wrong by this share of themselves."""
    return y + (y - y.detach()) * share


class Same:
    """A result whose backward puts one tensor into all gradients."""

    def __init__(self, *leaves: eg.Tensor):
        self.leaves, self.shape, self.numpy = leaves, leaves[0].shape, leaves[0].numpy

    def backward(self, g: eg.Tensor) -> None:
        for leaf in self.leaves:
            leaf.grad = g
