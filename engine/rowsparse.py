"""RowSparse: a gradient that is zero but in a few rows, as that of an embedding table is.

A batch of T tokens touches at most T of a table's V rows; all others have a gradient of zeros. RowSparse keeps the
touched rows only. It means the same as the dense gradient, to the bit, wherever it is added, scaled, clipped or
applied: how a gradient is stored changes what a step costs, never what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from engine.backend import Array, Backend, get_backend
from engine.dtypes import DType

if TYPE_CHECKING:
    from engine.tensor import Tensor

Gradient = Union["Tensor", "RowSparse"]


class RowSparse:
    """The gradient G (height, ...) with G[rows[i]] = values[i], and zeros in every other row.

    rows:   NumPy int64, ascending, each once      values: Tensor (len(rows), ...)

    RowSparse(rows, values, height) takes rows in any order and sums repeated ones in order of occurrence, from zero:
    the bits that the dense gradient's row has. Raises TypeError or ValueError with one line for rows that are not whole
    numbers in [0, height), or not one for each of values.
    """

    __slots__ = ("rows", "shape", "values")

    def __init__(self, rows: Any, values: Tensor, height: int):
        where = np.asarray(rows)
        if where.size and where.dtype.kind not in "iu":
            raise TypeError(f"RowSparse: rows are {where.dtype}, expected whole numbers")
        if where.ndim != 1 or values.ndim < 1 or len(where) != values.shape[0]:
            raise ValueError(f"RowSparse: rows have shape {where.shape} and values {values.shape}, "
                             "expected one row number for each of values")
        where = where.astype(np.int64)
        if len(where) and not 0 <= where.min() <= where.max() < height:
            wrong = where.min() if where.min() < 0 else where.max()
            raise ValueError(f"RowSparse: rows hold {wrong}, expected whole numbers in [0, {height})")
        self.shape = (height, *values.shape[1:])
        self.rows, slot = np.unique(where, return_inverse=True)
        # The kernel of the dense gradient, over a table of just the rows that there are.
        k = get_backend(values.device)
        sums = k.empty((len(self.rows), *self.shape[1:]), values.dtype)
        k.embedding_vjp(sums, k.contiguous(values.array), k.array(slot), len(slot), len(self.rows),
                        math.prod(self.shape[1:]))
        self.values = type(values)(sums, values.device)

    @property
    def dtype(self) -> DType:
        return self.values.dtype

    @property
    def device(self) -> str:
        return self.values.device

    def __repr__(self) -> str:
        return f"RowSparse({len(self.rows)} rows of {self.shape}, {self.dtype})"

    # ── as a dense gradient ─────────────────────────────────────────────────────────────────────────

    def dense(self) -> Tensor:
        """The same gradient as a Tensor."""
        return type(self.values)(self._spread(get_backend(self.device), np.arange(self.shape[0])), self.device)

    def _spread(self, k: Backend, rows: np.ndarray) -> Array:
        """These of the dense gradient's rows, ascending and with all that are not zero among them."""
        if len(rows) == len(self.rows):
            return self.values.array
        spread = k.zeros((len(rows), *self.shape[1:]), self.dtype)
        put_rows(k, spread, np.searchsorted(rows, self.rows), self.values.array)
        return spread

    def numpy(self) -> np.ndarray:
        """The dense gradient as a NumPy array."""
        return self.dense().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("__array__: a RowSparse has no dense array to share, and copy=False was asked for")
        return np.asarray(self.numpy(), dtype)

    # ── what may be done to it ──────────────────────────────────────────────────────────────────────

    def map(self, function: Callable[[Array], Array]) -> RowSparse:
        """The same rows with function(values), for a function of each element that takes 0 to 0."""
        return _of(self.rows, type(self.values)(function(self.values.array), self.device), self.shape[0])

    def to(self, dtype: DType | str | None = None, device: str | None = None) -> RowSparse:
        """In another dtype or on another device."""
        return _of(self.rows, self.values.to(dtype=dtype, device=device), self.shape[0])

    def __mul__(self, factor: float) -> RowSparse:
        return _of(self.rows, self.values * factor, self.shape[0])

    __rmul__ = __mul__


def _of(rows: np.ndarray, values: Tensor, height: int) -> RowSparse:
    """From rows that ascend already."""
    made = RowSparse.__new__(RowSparse)
    made.rows, made.values, made.shape = rows, values, (height, *values.shape[1:])
    return made


def put_rows(k: Backend, table: Array, rows: np.ndarray, values: Array) -> None:
    """table[rows] = values, for distinct rows of a dense table (height, ...)."""
    width = math.prod(table.shape[1:])
    k.scatter_runs(Array(table.data.reshape(-1), table.dtype), k.contiguous(values).reshaped((len(rows), width)),
                   k.array(rows * width))


def dense(gradient: Gradient) -> Tensor:
    """A gradient as a Tensor, however it is stored."""
    return gradient.dense() if isinstance(gradient, RowSparse) else gradient


def add_gradients(a: Gradient, b: Gradient) -> Gradient:
    """a + b: row-sparse if both are, else dense."""
    if isinstance(a, RowSparse) and isinstance(b, RowSparse):
        return add_row_sparse(a, b)
    return dense(a) + dense(b)


def add_row_sparse(a: RowSparse, b: RowSparse) -> RowSparse:
    """a + b, over the rows of either. A row that only one has is added to zeros, as in the dense sum (−0 + 0 is 0)."""
    if a.shape != b.shape:
        raise ValueError(f"RowSparse: gradients of shapes {a.shape} and {b.shape} do not add")
    k = get_backend(a.device)
    rows = a.rows if np.array_equal(a.rows, b.rows) else np.union1d(a.rows, b.rows)
    total = k.map("add", a._spread(k, rows), b._spread(k, rows))
    return _of(rows, type(a.values)(total, a.device), a.shape[0])
