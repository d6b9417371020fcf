"""Rows of the ops on sets, with Python's own sets as references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import engine as eg
from engine.testing.opspec import OpSpec, register
from engine.testing.source import Source

Draw = tuple[list[Any], dict[str, Any]]


def _values(x: np.ndarray) -> list[float]:
    """The different elements in ascending order; every NaN differs from all others."""
    elements = x.reshape(-1).tolist()
    return sorted({v for v in elements if v == v}) + [v for v in elements if v != v]


def _places(x: np.ndarray) -> list[int]:
    """Which of _values each element is, in C order."""
    place = {v: i for i, v in enumerate(_values(x)) if v == v}
    nans = iter(range(len(place), x.size + 1))
    return [place[v] if v == v else next(nans) for v in x.reshape(-1).tolist()]


def _counts(x: np.ndarray) -> np.ndarray:
    return np.bincount(np.asarray(_places(x), np.int64), minlength=len(_values(x)))


def _firsts(x: np.ndarray) -> np.ndarray:
    places = _places(x)
    return np.asarray([places.index(i) for i in range(len(_values(x)))], np.int64)


def _elements(s: Source, most: int = 3) -> np.ndarray:
    """Many equal ones, and several NaNs if special."""
    x = s.distinct(s.shape(most=most))
    if not s.special:
        return x
    return s.arranged(np.where(s.generator().integers(0, 4, x.shape) == 0, np.nan, x).astype(s.dtype))


def _one(s: Source) -> Draw:
    return [_elements(s)], {}


def unique(name: str, reference: Callable[..., Any], call: Callable[..., Any] | None = None) -> None:
    register(OpSpec(name, _one, wrt=(), special=True, signed_zero=False, reference=reference, call=call))


def part(name: str, of: str) -> Callable[..., Any]:
    """One of the tensors that an op gives."""
    function: Any = getattr(eg, name)
    return lambda x: getattr(function(x), of)


unique_inverse: Any = eg.unique_inverse


def _put_back(x: Any) -> Any:
    values, inverse = unique_inverse(x)
    return values[inverse]


unique("unique_values", lambda x: np.asarray(_values(x), np.float64))
unique("unique_counts", _counts, part("unique_counts", "counts"))
unique("unique_inverse", lambda x: np.asarray(_places(x), np.int64).reshape(x.shape),
       part("unique_inverse", "inverse_indices"))
unique("unique_inverse: put back", lambda x: x, _put_back)
unique("unique_all", _firsts, part("unique_all", "indices"))
unique("unique_all: counts", _counts, part("unique_all", "counts"))


def _two(s: Source) -> Draw:
    return [_elements(s), _elements(s, 1)], {"invert": s.boolean()}


def _is_in(x: np.ndarray, values: np.ndarray, invert: bool = False) -> np.ndarray:
    among = values.reshape(-1).tolist()
    found = [any(v == other for other in among) != invert for v in x.reshape(-1).tolist()]
    return np.asarray(found, bool).reshape(x.shape)


register(OpSpec("isin", _two, wrt=(), special=True, reference=_is_in))
