"""An element of a product has the bits that it has in any other product of the same row and column: those of few rows,
of few columns, of parts of vectors and of whole tiles are computed in ways of their own (kernels/gemm.c)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.backend import Array, get_backend

MANY = 70  # columns, or rows: several tiles of any level, and part of one


def product(a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None, old: np.ndarray | None = None,
            row: int = 0) -> np.ndarray:
    """A B + bias + old by one launch, in rows that are at least `row` apart; what is between them must stay."""
    k, size = get_backend("cpu"), a.dtype.itemsize
    (m, depth), n = a.shape, b.shape[1]
    row = max(row, n)
    c = np.full((m, row), np.nan, a.dtype)
    if old is not None:
        c[:, :n] = old
    steps = [s // size for s in (*a.strides, *b.strides)]
    k.gemm(Array(c), Array(a), Array(b), None if bias is None else Array(bias), 1, m, n, depth, 0, *steps[:2],
           0, *steps[2:], 0, row, int(old is not None), 0)
    assert np.isnan(c[:, n:]).all()
    return c[:, :n]


def drawn(rng: np.random.Generator, rows: int, columns: int, dtype: str, turned: bool) -> np.ndarray:
    x = rng.standard_normal((columns, rows) if turned else (rows, columns)).astype(dtype)
    return x.T if turned else x


def same_bits_as_among_many(a: np.ndarray, b: np.ndarray, shapes: list[tuple[int, int]],
                            rng: np.random.Generator) -> None:
    """The first m rows by the first n columns, with and without a bias and an old C, rows apart in C or not."""
    (rows, _), columns = a.shape, b.shape[1]
    bias, old = rng.standard_normal(columns).astype(a.dtype), rng.standard_normal((rows, columns)).astype(a.dtype)
    for plus, was in ((None, None), (bias, None), (None, old), (bias, old)):
        whole = product(a, b, plus, was)
        for m, n in shapes:
            part = product(a[:m], b[:, :n], None if plus is None else plus[:n], None if was is None else was[:m, :n],
                           row=n + (m + n) % 3)
            expected = np.ascontiguousarray(whole[:m, :n])
            assert part.tobytes() == expected.tobytes(), (m, n, plus is not None, was is not None)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("order", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("depth", [0, 1, 5, 31, 256, 257, 600])
def test_a_few_rows_or_columns_among_many(depth: int, dtype: str, order: str) -> None:
    rng = np.random.default_rng(depth)
    a, b = drawn(rng, MANY, depth, dtype, order[0] == "T"), drawn(rng, depth, MANY, dtype, order[1] == "T")
    few_columns = [(MANY, 1), (MANY, 2), (MANY, 3), (MANY, 5), (MANY, 8), (33, 8), (9, 7), (5, 4), (2, 1)]
    few_rows = [(1, 1), (8, 8), (1, MANY), (3, 18), (4, 33), (8, 65), (14, 17), (15, 31), (20, 9)]
    same_bits_as_among_many(a, b, few_columns + few_rows, rng)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("depth", [255, 256, 300, 530])
def test_few_rows_by_a_matrix_larger_than_the_caches(depth: int) -> None:
    """Which is not packed, but read where it lies, some steps of all columns at a time."""
    rng = np.random.default_rng(depth)
    a, b = drawn(rng, MANY, depth, "float32", False), drawn(rng, depth, 650, "float32", False)
    same_bits_as_among_many(a, b, [(1, 650), (2, 641), (5, 650), (6, 647), (13, 640), (14, 650)], rng)
