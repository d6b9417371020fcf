"""The stand-in for CuPy: it refuses what CuPy refuses; and where CuPy is installed, CuPy has all that it has."""

from __future__ import annotations

import sys

import cupy_stand_in
import numpy as np
import pytest
from cupy_stand_in import FUNCTIONS, IN_PLACE, MAKERS, METHODS

from engine.backend.cupy_rows import UFUNCS

CUPY = cupy_stand_in.make()["cupy"]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "cupy", CUPY)


@pytest.fixture
def real() -> object:
    return pytest.importorskip("cupy", reason="CuPy is not installed")


def test_nothing_moves_by_itself() -> None:
    x = CUPY.asarray(np.ones(3))
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    for mix in (lambda: x + np.ones(3), lambda: CUPY.add(x, np.ones(3)), lambda: CUPY.add(np.ones(3), np.ones(3))):
        with pytest.raises(TypeError, match="Unsupported type"):
            mix()
    assert isinstance(x + 1, CUPY.ndarray) and (x + 1).get().tolist() == [2, 2, 2]


def test_no_scalars() -> None:
    x = CUPY.asarray(np.arange(6.0).reshape(2, 3))
    for y in (x[1, 2], x.sum(), x[1].max(0), CUPY.matmul(x[0], x[1])):
        assert isinstance(y, CUPY.ndarray) and y.shape == ()
    view = x[1, 2]
    view[...] = 9
    assert x.get()[1, 2] == 9


def test_what_a_gpu_leaves_undefined_is_an_error() -> None:
    x = CUPY.asarray(np.zeros(3))
    with pytest.raises(AssertionError, match="wrap this index"):
        x[np.array([3])]
    with pytest.raises(AssertionError, match="undefined"):
        x[np.array([1, 1])] = CUPY.asarray(np.ones(2))
    with pytest.raises(AssertionError, match="atomics"):
        CUPY.add.at(x, np.array([1, 1]), 1.0)


def test_numpys_functions_become_cupys() -> None:
    x = CUPY.asarray(np.ones((1, 3)))
    assert isinstance(np.broadcast_to(x, (2, 3)), CUPY.ndarray) and isinstance(np.exp(x), CUPY.ndarray)
    with pytest.raises(TypeError):
        np.median(x)


def test_cupy_has_what_the_stand_in_has(real: object) -> None:
    """Names only: no GPU is needed to import CuPy."""
    missing = [name for name in (*FUNCTIONS, *MAKERS, "asarray", "asnumpy", "copyto", "sort", "argsort", "RawModule")
               if not hasattr(real, name)]
    missing += [name for name in (*METHODS, *IN_PLACE, "get", "item", "tolist", "flags", "strides", "__array_ufunc__",
                                  "__array_function__") if not hasattr(real.ndarray, name)]
    assert not missing


def test_the_functions_of_the_table_write_into_an_output(real: object) -> None:
    names = [word.partition("=")[2] or word for word in UFUNCS.split()]
    assert [n for n in names if type(getattr(real, n)).__name__ != "ufunc"] == []
    assert hasattr(real.add, "at") and hasattr(real.lib.stride_tricks, "as_strided")
