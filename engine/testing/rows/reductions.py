"""Rows of the reductions and of what sorts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import engine as eg
from engine.testing import formulas, rounded
from engine.testing.opspec import Drawing, ErrorCase, OpSpec, register
from engine.testing.rounded import Rounded
from engine.testing.source import Source

Draw = tuple[list[Any], dict[str, Any]]


def over_axes(low: float = -4.0, high: float = 4.0, least: int = 0, several: bool = True) -> Drawing:
    """One operand, an axis (None, one, or several) and keepdims. least = 1: no axis is empty."""
    def draw(s: Source) -> Draw:
        x = s.array(s.shape(low=least), low, high)
        axis = s.axes(x.ndim) if several else (s.axis(x.ndim) if x.ndim and s.boolean() else None)
        return [x], {"axis": axis, "keepdims": s.boolean()}
    return draw


def ranked(least: int = 1, several: bool = True) -> Drawing:
    """The same with ties, or, if smooth, with no two values near each other."""
    def draw(s: Source) -> Draw:
        x = s.distinct(s.shape(low=least))
        axis = s.axes(x.ndim) if several else (s.axis(x.ndim) if x.ndim and s.boolean() else None)
        return [x], {"axis": axis, "keepdims": s.boolean()}
    return draw


def rows(low: float = -4.0, high: float = 4.0, **attributes: Any) -> tuple[Drawing, tuple[int, ...]]:
    """A batch of rows, reduced along the last axis."""
    def draw(s: Source) -> Draw:
        return [s.array((s.integer(2, 5), *s.shape(0, 1, 1), s.integer(1, 300)), low, high)], {"axis": -1, **attributes}
    return draw, (0,)


def wrong_axis(name: str) -> ErrorCase:
    function = getattr(eg, name)
    return ErrorCase(lambda: function(eg.zeros(2, 3), axis=2), IndexError, (name, "2", "[-2, 2)"))


def empty_axis(name: str) -> ErrorCase:
    function = getattr(eg, name)
    return ErrorCase(lambda: function(eg.zeros(2, 0), axis=1), ValueError, (name, "(2, 0)", "empty"))


def reduction(name: str, draw: Drawing, **row: Any) -> OpSpec:
    errors = (wrong_axis(name), *row.pop("errors", ()))
    row = {"batch": rows(), "large": lambda s: ([s.array((301, 307), 0.9, 1.1)], {"axis": s.choice([0, 1])}), **row}
    return register(OpSpec(name, draw, errors=errors, **row))


def exactly(f: Callable[..., Any]) -> Callable[..., Any]:
    """A NumPy reduction as a reference: axis () reduces nothing there as here."""
    return lambda x, axis=None, keepdims=False: f(x, axis=axis, keepdims=keepdims)


def _prod(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Π x: n − 1 roundings in any order, |fl − y| ≤ γ_n |y|; each may lose η to underflow, times what multiplies it."""
    if not isinstance(x, Rounded):
        return np.prod(x, axis=axis, keepdims=keepdims)
    value = np.prod(x.value, axis=axis, keepdims=keepdims)
    n = x.size // max(value.size, 1)
    grown = np.prod(np.maximum(np.abs(x.value), 1.0), axis=axis, keepdims=keepdims)
    tiny = rounded.smallest_subnormal(x.dtype)
    return Rounded(value, rounded.gamma(n, x.unit) * np.abs(value) + n * tiny * grown, dtype=x.dtype)


reduction("sum", over_axes(), formula=rounded.total, linear=(0,), integers=True)
reduction("prod", over_axes(0.5, 2.0), formula=_prod, integers=True, batch=rows(0.9, 1.1))
reduction("mean", over_axes(least=1), formula=rounded.mean, linear=(0,))
reduction("max", ranked(), special=True, signed_zero=False, reference=exactly(np.max), errors=(empty_axis("max"),))
reduction("min", ranked(), special=True, signed_zero=False, reference=exactly(np.min), errors=(empty_axis("min"),))
reduction("argmax", ranked(several=False), special=True, wrt=(), reference=exactly(np.argmax),
          errors=(empty_axis("argmax"),))
reduction("argmin", ranked(several=False), special=True, wrt=(), reference=exactly(np.argmin),
          errors=(empty_axis("argmin"),))
reduction("any", ranked(least=0), wrt=(), special=True, reference=exactly(np.any))
reduction("all", ranked(least=0), wrt=(), special=True, reference=exactly(np.all))
reduction("logsumexp", over_axes(-30, 30, least=1), formula=formulas.logsumexp, batch=rows(-30, 30))


def _count_nonzero(x: np.ndarray, axis: Any = None, keepdims: bool = False) -> np.ndarray:
    return np.sum(x != 0, axis=axis, keepdims=keepdims)


def _spread(s: Source) -> Draw:
    """Variances away from 0, where the root has no derivative, and more elements than the correction."""
    shape = s.shape(1, 3, 2)
    axis = s.axes(len(shape))
    x = s.distinct(shape) if s.smooth else s.array(shape)
    axis = None if axis == () else axis
    return [x], {"axis": axis, "correction": s.choice([0.0, 1.0]), "keepdims": s.boolean()}


reduction("var", _spread, formula=formulas.variance)
reduction("std", _spread, formula=formulas.deviation)


def _accumulated(x: Any, axis: int, include_initial: bool, function: Callable[..., Any], first: float) -> Any:
    """function(x) along `axis`, and where that is asked for the value of nothing before it."""
    if not x.ndim:
        return rounded.plain(x)
    y = function(rounded.plain(x), axis=axis)
    if not include_initial:
        return y
    shape = list(y.shape)
    shape[axis] = 1
    return np.concatenate([np.full(shape, first, y.dtype), y], axis)


def _cumulative_sum(x: Any, axis: int = -1, include_initial: bool = False) -> Any:
    """y[i] passes through i additions: |fl − y| ≤ γ_i Σ|x|."""
    value = _accumulated(x, axis, include_initial, np.cumsum, 0)
    if not isinstance(x, Rounded):
        return value
    size = _accumulated(abs(x.value), axis, include_initial, np.cumsum, 0)
    return Rounded(value, rounded.gamma(x.shape[axis] if x.ndim else 0, x.unit) * size, dtype=x.dtype)


def _cumulative_prod(x: Any, axis: int = -1, include_initial: bool = False) -> Any:
    """y[i] passes through i products: |fl − y| ≤ γ_i |y|. (The row's numbers do not underflow.)"""
    value = _accumulated(x, axis, include_initial, np.cumprod, 1)
    if not isinstance(x, Rounded):
        return value
    return Rounded(value, rounded.gamma(x.shape[axis] if x.ndim else 0, x.unit) * abs(value), dtype=x.dtype)


def _along(low: float = -4.0, high: float = 4.0) -> Drawing:
    def draw(s: Source) -> Draw:
        x = s.array(s.shape(1), low, high)
        return [x], {"axis": s.axis(x.ndim), "include_initial": s.boolean()}
    return draw


reduction("cumulative_sum", _along(), formula=_cumulative_sum, linear=(0,), integers=True)
reduction("cumulative_prod", _along(0.5, 2.0), formula=_cumulative_prod, integers=True, batch=rows(0.9, 1.1))
reduction("count_nonzero", ranked(least=0), wrt=(), special=True, integers=True, reference=_count_nonzero)


def _differences(x: Any, axis: int = -1, n: int = 1) -> Any:
    """n times over x[i + 1] − x[i], each rounded once."""
    if n == 0:
        return x
    index: list[Any] = [slice(None)] * x.ndim
    index[axis] = slice(1, None)
    after = x[tuple(index)]
    index[axis] = slice(0, -1)
    return _differences(after - x[tuple(index)], axis, n - 1)


def _neighbours(s: Source) -> Draw:
    x = s.array(s.shape(1, low=1))
    return [x], {"axis": s.axis(x.ndim), "n": s.integer(0, 2)}


def _between(s: Source) -> Draw:
    """With something before and behind it."""
    (x,), attributes = _neighbours(s)
    ends = [s.array(x.shape), s.array(x.shape)]
    return [x, *ends], {"axis": attributes["axis"]}


register(OpSpec("diff", _neighbours, formula=_differences, linear=(0,), integers=True, view=True, errors=(
    wrong_axis("diff"), ErrorCase(lambda: eg.diff(eg.zeros(2), n=-1), ValueError, ("diff", "-1")))))
register(OpSpec("diff: between", _between, wrt=(0, 1, 2), linear=(0, 1, 2),
                call=lambda x, before, behind, axis: eg.diff(x, axis, prepend=before, append=behind),
                reference=lambda x, *ends, axis: np.diff(np.concatenate([ends[0], x, ends[1]], axis), axis=axis)))

# ── sorting: what is exact, and where equal elements go ───────────────────────────────────────────────


def _sortable(s: Source) -> Draw:
    x = s.distinct(s.shape(1))
    return [x], {"axis": s.axis(x.ndim), "descending": s.boolean()}


def _argsort(x: np.ndarray, axis: int = -1, descending: bool = False) -> np.ndarray:
    """Element by element, by Python's own sort."""
    y = np.empty(x.shape, np.int64)
    rows_in, rows_out = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
    for place in np.ndindex(rows_in.shape[:-1]):
        row = [float(v) for v in rows_in[place]]
        keys = [(not v != v, -v) if descending else (v != v, v) for v in row]  # NaN counts as the largest
        keys = [(last, 0.0 if v != v else v) for last, v in keys]
        rows_out[place] = sorted(range(len(row)), key=keys.__getitem__)  # Python's sort is stable
    return y


def _sort(x: np.ndarray, axis: int = -1, descending: bool = False) -> np.ndarray:
    return np.take_along_axis(x, _argsort(x, axis, descending), axis)


def _topk(s: Source) -> Draw:
    x = s.distinct(s.shape(1))
    axis = s.axis(x.ndim)
    return [x], {"count": s.integer(0, x.shape[axis]), "axis": axis}


register(OpSpec("argsort", _sortable, wrt=(), special=True, reference=_argsort, errors=(wrong_axis("argsort"),)))
register(OpSpec("sort", _sortable, special=True, reference=_sort, errors=(wrong_axis("argsort"),)))
register(OpSpec("topk", _topk, special=True, call=lambda x, **a: eg.topk(x, **a)[0],
                reference=lambda x, count, axis: np.take(_sort(x, axis, True), range(count), axis), errors=(
                    ErrorCase(lambda: eg.topk(eg.zeros(3), 4), ValueError, ("topk", "4", "[0, 3]")),)))
register(OpSpec("topk: indices", _topk, wrt=(), special=True, call=lambda x, **a: eg.topk(x, **a)[1],
                reference=lambda x, count, axis: np.take(_argsort(x, axis, True), range(count), axis)))


def _quantile(x: Any, q: float, axis: Any = None, keepdims: bool = False) -> Any:
    """a + (b − a) t between neighbours a ≤ b of the sorted x."""
    data = rounded.plain(x)
    n = data.size if axis is None else data.shape[axis]
    place = q * (n - 1)
    low = min(int(place), n - 1)
    high = min(low + 1, n - 1)
    ordered = np.sort(data, axis=axis)
    a, b = (np.take(ordered, i, axis=0 if axis is None else axis) for i in (low, high))
    if isinstance(x, Rounded):
        a, b = Rounded(a, dtype=x.dtype), Rounded(b, dtype=x.dtype)
    y = a + (b - a) * (place - low)
    return y.reshape(data.sum(axis=axis, keepdims=keepdims).shape)


def _quantiles(s: Source) -> Draw:
    x = s.distinct(s.shape(low=1))
    axis = s.axis(x.ndim) if x.ndim and s.boolean() else None
    return [x], {"q": s.choice([0.0, 1.0, 0.5, 0.25, 0.7]), "axis": axis, "keepdims": s.boolean()}


def _medians(s: Source) -> Draw:
    operands, attributes = _quantiles(s)
    attributes.pop("q")
    return operands, attributes


def _searched(s: Source) -> Draw:
    return [np.sort(s.distinct((s.side(),))), s.distinct(s.shape())], {"side": s.choice(["left", "right"])}


def _unordered(s: Source) -> Draw:
    values = s.distinct((s.side(),))
    return [values, s.distinct(s.shape()), np.argsort(values, kind="stable")], {"side": s.choice(["left", "right"])}


register(OpSpec("quantile", _quantiles, formula=_quantile, errors=(
    ErrorCase(lambda: eg.quantile(eg.zeros(3), 1.5), ValueError, ("quantile", "1.5", "[0, 1]")),
    ErrorCase(lambda: eg.quantile(eg.zeros(0), 0.5), ValueError, ("quantile", "empty")))))
register(OpSpec("median", _medians, formula=lambda x, **a: _quantile(x, 0.5, **a), errors=(
    ErrorCase(lambda: eg.median(eg.zeros(0)), ValueError, ("quantile", "empty")),)))
register(OpSpec("nonzero", lambda s: ([s.distinct(s.shape(1))], {}), wrt=(),
                call=lambda x: eg.stack(eg.nonzero(x)), reference=lambda x: np.stack(np.nonzero(x)), errors=(
    ErrorCase(lambda: eg.nonzero(eg.tensor(1.0)), ValueError, ("nonzero", "0-d")),)))
register(OpSpec("searchsorted", _searched, wrt=(), reference=np.searchsorted, errors=(
    ErrorCase(lambda: eg.searchsorted(eg.zeros(2, 2), eg.zeros(1)), ValueError, ("searchsorted", "(2, 2)")),
    ErrorCase(lambda: eg.searchsorted(eg.zeros(2), eg.zeros(1), "middle"), ValueError, ("searchsorted", "'middle'")))))
register(OpSpec("searchsorted: sorter", _unordered, wrt=(),
                call=lambda values, x, sorter, side: eg.searchsorted(values, x, side, sorter),
                reference=lambda values, x, sorter, side: np.searchsorted(values, x, side, sorter)))
