"""Rows of the ops that read and write by index."""

from __future__ import annotations

from typing import Any

import numpy as np

import engine as eg
from engine.testing import rounded
from engine.testing.opspec import ErrorCase, OpSpec, register
from engine.testing.rounded import Rounded
from engine.testing.source import Source

Draw = tuple[list[Any], dict[str, Any]]


def _embedding(s: Source) -> Draw:
    vocabulary = s.side(1)
    index = s.whole(s.shape(0, 2), 0, vocabulary - 1, s.choice(["int64", "int32"]))
    return [s.array((vocabulary, s.side())), index], {}


def _embedding_rows(s: Source) -> Draw:
    return [s.array((7, s.integer(1, 40))), s.whole((3, s.integer(1, 5)), 0, 6)], {}


def _embedding_vjp(g: Any, weight: Any, index: np.ndarray) -> tuple[Any, None]:
    """Row v collects the g of every place that names it: a sum of as many."""
    hot = (index.reshape(-1) == np.arange(weight.shape[0])[:, None]).astype(float)
    return rounded.matmul(Rounded(hot, dtype=g.dtype), g.reshape(index.size, weight.shape[1])), None


register(OpSpec("embedding", _embedding, wrt=(0,), linear=(0,), gradient=_embedding_vjp, batch=(_embedding_rows, (1,)),
                large=lambda s: ([s.array((500, 130)), s.whole((40, 50), 0, 499)], {}),
                reference=lambda weight, index: weight[index], errors=(
    ErrorCase(lambda: eg.embedding(eg.zeros(3, 2), eg.tensor([0, 3])), IndexError, ("embedding", "3", "[0, 3)")),
    ErrorCase(lambda: eg.embedding(eg.zeros(3, 2), eg.tensor([-1])), IndexError, ("embedding", "-1", "[0, 3)")),
    ErrorCase(lambda: eg.embedding(eg.zeros(3, 2), eg.tensor([0.0])), TypeError, ("embedding", "index", "float32")),
    ErrorCase(lambda: eg.embedding(eg.zeros(3), eg.tensor([0])), ValueError, ("embedding", "weight", "(3,)")))))


def _take(s: Source) -> Draw:
    x = s.array(s.shape(1, low=1))
    axis = s.axis(x.ndim)
    n = x.shape[axis]
    return [x, s.whole((s.side(),), -n, n - 1)], {"axis": axis}


def _take_along_axis(s: Source) -> Draw:
    x = s.array(s.shape(1, low=1))
    axis = s.axis(x.ndim)
    shape = list(x.shape)
    shape[axis] = s.side()
    return [x, s.whole(tuple(shape), 0, x.shape[axis] - 1)], {"axis": axis}


register(OpSpec("take", _take, linear=(0,), special=True, errors=(
    ErrorCase(lambda: eg.take(eg.zeros(3), eg.tensor([3])), IndexError, ("index", "(3,)")),
    ErrorCase(lambda: eg.take(eg.zeros(3), eg.tensor([0]), axis=1), IndexError, ("take", "1")))))
register(OpSpec("take_along_axis", _take_along_axis, linear=(0,), special=True, errors=(
    ErrorCase(lambda: eg.take_along_axis(eg.zeros(2, 3), eg.tensor([0])), ValueError, ("take_along_axis", "(1,)")),)))


def _scatter_add(s: Source) -> Draw:
    """Values added at indices, several at some."""
    n = s.side(1)
    rest = s.shape(0, 1)
    index = s.generator().integers(0, n, s.side())
    return [s.array((n, *rest)), s.array((index.size, *rest))], {"index": index}


def _scatter_add_formula(x: Any, value: Any, index: np.ndarray) -> Any:
    """Row i: x plus the values that name it, a sum of at most 1 + their number."""
    hot = (index == np.arange(x.shape[0])[:, None]).astype(float)
    if not value.size:
        return x
    hot = Rounded(hot, dtype=x.dtype) if isinstance(x, Rounded) else hot
    return x + rounded.matmul(hot, value.reshape(index.size, -1)).reshape(*x.shape)


register(OpSpec("scatter_add", _scatter_add, wrt=(0, 1), linear=(0, 1), formula=_scatter_add_formula,
                call=lambda x, value, index: eg.scatter_add(x, eg.tensor(index), value), errors=(
    ErrorCase(lambda: eg.scatter_add(eg.zeros(3), eg.tensor([3]), eg.ones(1)), IndexError, ("scatter_add", "(3,)")),)))
