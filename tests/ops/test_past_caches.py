"""Large results go past the caches (kernels/stream.h): they have the bits that the same rows have in small pieces, and
nothing beside them is written, wherever they begin and whatever their rows are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

import engine as eg
from engine.backend import Array, get_backend

ELEMENTS = 6_000_000  # of a result: 24 MB and 48 MB are moved at least, 16 are enough
SMALL = 200_000  # of a piece, of whose results and operands at most 11 MB are moved (adam in float64)
AROUND = 16  # elements on both sides of a result, which must stay
Kernel = Callable[[Array, list[Array], int, int], None]  # writes the result: rows × n, from the operands


def elementwise(name: str) -> Kernel:
    """Operands of shape (rows, n), (n,) or (rows, 1)."""
    def run(y: Array, operands: list[Array], rows: int, n: int) -> None:
        k = get_backend("cpu")
        getattr(k, name)(y, *operands, k.layout(y, *operands))
    return run


def of_rows(name: str) -> Kernel:
    def run(y: Array, operands: list[Array], rows: int, n: int) -> None:
        getattr(get_backend("cpu"), name)(y, *operands, rows, n)
    return run


def layer_norm(y: Array, operands: list[Array], rows: int, n: int) -> None:
    x, weight, bias = operands
    mean, rstd = Array(np.empty(rows, x.data.dtype)), Array(np.empty(rows, x.data.dtype))
    get_backend("cpu").layer_norm(y, mean, rstd, x, weight, bias, rows, n, 1e-5)


def rms_norm(y: Array, operands: list[Array], rows: int, n: int) -> None:
    x, weight = operands
    get_backend("cpu").rms_norm(y, Array(np.empty(rows, x.data.dtype)), x, weight, rows, n, 1e-5)


def layer_norm_vjp(y: Array, operands: list[Array], rows: int, n: int) -> None:
    g, x, weight, mean, rstd = operands
    of_weight, of_bias = Array(np.empty(n, x.data.dtype)), Array(np.empty(n, x.data.dtype))
    get_backend("cpu").layer_norm_vjp(y, of_weight, of_bias, g, x, weight, mean, rstd, rows, n)


def rms_norm_vjp(y: Array, operands: list[Array], rows: int, n: int) -> None:
    g, x, weight, rstd = operands
    get_backend("cpu").rms_norm_vjp(y, Array(np.empty(n, x.data.dtype)), g, x, weight, rstd, rows, n)


def cross_entropy_vjp(y: Array, operands: list[Array], rows: int, n: int) -> None:
    x, g, lse = operands
    target = Array(np.abs(g.data * 1000).astype(np.int64) % n)
    get_backend("cpu").cross_entropy_vjp(y, g, x, lse, target, rows, n, -100, 0.1)


def optimizer(name: str, states: int, numbers: tuple[float, ...]) -> Kernel:
    """The new parameters, in another place than the old ones; the state is updated where it is, so in a copy."""
    def run(y: Array, operands: list[Array], rows: int, n: int) -> None:
        p, g, *state = operands
        state = [Array(s.data.copy()) for s in state]
        getattr(get_backend("cpu"), name)(y, *state, p, *state, g, rows * n, 2.0, 0.5, *numbers)
    return run


ROWS, ROW, COLUMN = "rows × n", "n", "rows"  # shapes of operands
CASES: dict[str, tuple[Kernel, tuple[str, ...]]] = {
    "relu": (elementwise("relu"), (ROWS,)),
    "exp": (elementwise("exp"), (ROWS,)),
    "copy": (elementwise("copy"), (ROWS,)),
    "relu_vjp": (elementwise("relu_vjp"), (ROWS, ROWS)),
    "add": (elementwise("add"), (ROWS, ROWS)),
    "multiply a row": (elementwise("multiply"), (ROWS, ROW)),
    "subtract a column": (elementwise("subtract"), (ROWS, COLUMN)),
    "subtract from a column": (elementwise("subtract"), (COLUMN, ROWS)),
    "where": (elementwise("where"), ("mask", ROWS, ROWS)),
    "softmax": (of_rows("softmax"), (ROWS,)),
    "softmax_vjp": (of_rows("softmax_vjp"), (ROWS, ROWS)),
    "log_softmax": (of_rows("log_softmax"), (ROWS,)),
    "log_softmax_vjp": (of_rows("log_softmax_vjp"), (ROWS, ROWS)),
    "cross_entropy_vjp": (cross_entropy_vjp, (ROWS, COLUMN, COLUMN)),
    "layer_norm": (layer_norm, (ROWS, ROW, ROW)),
    "layer_norm_vjp": (layer_norm_vjp, (ROWS, ROWS, ROW, COLUMN, COLUMN)),
    "rms_norm": (rms_norm, (ROWS, ROW)),
    "rms_norm_vjp": (rms_norm_vjp, (ROWS, ROWS, ROW, COLUMN)),
    "sgd": (optimizer("sgd", 1, (0.1, 0.9, 0.0, 0.01, 0, 2)), (ROWS,) * 3),
    "adam": (optimizer("adam", 2, (1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 2)), (ROWS,) * 4),
    "adagrad": (optimizer("adagrad", 1, (1e-2, 0.1, 1e-8, 0.1, 2)), (ROWS,) * 3),
    "rmsprop": (optimizer("rmsprop", 2, (1e-3, 0.9, 1e-8, 0.1, 0.9, 2)), (ROWS,) * 4),
}


def drawn(rng: np.random.Generator, shape: str, rows: int, n: int, dtype: str) -> np.ndarray:
    if shape == "mask":
        return rng.random((rows, n)) < 0.5
    sizes = {ROWS: (rows, n), ROW: (n,), COLUMN: (rows, 1)}[shape]
    return np.abs(rng.standard_normal(sizes, "float32")).astype(dtype)


def result(kernel: Kernel, operands: list[np.ndarray], rows: int, n: int, dtype: str, begin: int) -> np.ndarray:
    """In memory that begins `begin` elements behind an aligned one."""
    memory = get_backend("cpu").empty((AROUND + begin + rows * n + AROUND,), eg.float64 if dtype == "float64" else
                                      eg.float32)
    memory.data[:] = np.nan
    inside = memory.data[AROUND + begin:AROUND + begin + rows * n]
    kernel(memory.view(inside.reshape(rows, n)), [Array(x) for x in operands], rows, n)
    outside = np.concatenate([memory.data[:AROUND + begin], memory.data[AROUND + begin + rows * n:]])
    assert np.isnan(outside).all()
    return inside.reshape(rows, n).copy()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n, begin, dtype", [(1024, 0, "float32"), (1003, 0, "float32"), (1003, 5, "float32"),
                                             (37, 1, "float64")])
@pytest.mark.parametrize("name", CASES)
def test_large_results_have_the_bits_of_small_ones(name: str, n: int, begin: int, dtype: str) -> None:
    kernel, shapes = CASES[name]
    rows, rng = math.ceil(ELEMENTS / n), np.random.default_rng(n)
    operands = [drawn(rng, shape, rows, n, dtype) for shape in shapes]
    whole = result(kernel, operands, rows, n, dtype, begin)
    assert np.isfinite(whole).all()
    few = SMALL // n
    for start in range(0, rows, few):
        cut = [x if x.shape == (n,) else x[start:start + few] for x in operands]
        part = result(kernel, cut, min(few, rows - start), n, dtype, 0)
        assert whole[start:start + few].tobytes() == part.tobytes(), start


@pytest.mark.usefixtures("threads")
def test_a_large_result_in_the_place_of_an_operand() -> None:
    k, x = get_backend("cpu"), np.random.default_rng(0).standard_normal(ELEMENTS).astype("float32")
    y = Array(x.copy())
    k.relu(y, y, k.layout(y, y))
    k.add(y, Array(x), y, k.layout(y, y, y))
    assert y.data.tobytes() == (x + np.maximum(x, 0)).tobytes()
