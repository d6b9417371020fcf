"""What the laboratory draws: examples have the layouts and values they promise, shrink, and depend on nothing else."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import engine as eg
import engine.testing.rows
from engine.backend import walkable
from engine.testing import Seeded, check_errors, specs
from engine.testing import strategies as st_eg
from engine.testing.layouts import FOREIGN, LAYOUTS, zero_stride
from engine.testing.source import reduction_killers, some_special


@given(data=st.data())
def test_layouts_keep_shape_and_values(data: Any) -> None:
    x = data.draw(st_eg.arrays("float32", arrange=False))
    for name, layout in LAYOUTS.items():
        y = layout(x, np.random.default_rng(0))
        assert isinstance(y, np.ndarray) and np.array_equal(x, y) and x.shape == y.shape, name
        assert name == "read-only" or y.flags.writeable
        assert not any(s % y.itemsize for s in y.strides)


def test_layouts_are_what_they_say() -> None:
    x, rng = np.arange(24.0).reshape(2, 3, 4), np.random.default_rng(0)
    assert LAYOUTS["F"](x, rng).flags.f_contiguous and not LAYOUTS["strided"](x, rng).flags.forc
    assert LAYOUTS["negative"](x, rng).strides[-1] < 0 and LAYOUTS["offset"](x, rng).ctypes.data % 64
    assert np.isnan(LAYOUTS["rows"](x, rng).base).any(), "what lies between the elements is poison"


@given(data=st.data())
def test_what_a_kernel_cannot_walk_is_copied_or_refused(data: Any) -> None:
    x = data.draw(st_eg.arrays("float64", arrange=False))
    for name, layout in FOREIGN.items():
        y = layout(x, np.random.default_rng(0))
        assert (np.array_equal(x, y) and not walkable(y)) or not x.size, name
        assert np.array_equal(eg.tensor(y).numpy(), x) and np.array_equal((eg.tensor(x) + y).numpy(), x + x)
        if x.size:
            check_errors(lambda y=y: eg.from_numpy(y), ValueError, "from_numpy", "strides")
    assert data.draw(st_eg.layouts(walkable=False)) in [*LAYOUTS.values(), *FOREIGN.values()]


def test_a_stride_of_0_is_drawn_where_values_may_change() -> None:
    repeating = find(st_eg.layouts(equal=False), lambda layout: layout is zero_stride)
    assert 0 in repeating(np.arange(6.0).reshape(2, 3), np.random.default_rng(0)).strides
    assert find(st_eg.layouts(equal=False), lambda layout: True) is LAYOUTS["C"]


def neighbour(x: float, dtype: str) -> bool:
    """Whether it is next to a power of two, and none itself."""
    near = np.abs(np.dtype(dtype).type(x))
    with np.errstate(over="ignore"):
        around = [float(np.nextafter(near, near.dtype.type(to))) for to in (0, np.inf)]
    return math.frexp(float(near))[0] != 0.5 and any(math.frexp(other)[0] == 0.5 for other in around)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_numbers_are_of_every_kind_and_sign(dtype: str) -> None:
    kind = np.finfo(dtype)
    x = some_special(np.dtype(dtype), np.random.default_rng(0), 4000)
    finite = x[np.isfinite(x) & (x != 0)]
    assert x.dtype == dtype and np.isnan(x).any() and np.isinf(x).any() and (x == 0).any()
    for sign in (1, -1):
        own = np.abs(finite[np.sign(finite) == sign])
        assert np.sum(own < kind.tiny) > 300 and len({*own[own < kind.tiny].tolist()}) > 300
        assert len({math.frexp(float(v))[1] for v in own if neighbour(v, dtype)}) > 100
        assert neighbour(find(st_eg.floats(dtype), lambda v, s=sign: v * s > 2e4 and neighbour(v, dtype)), dtype)


def test_killers_are_next_to_multiples_of_half_pi() -> None:
    """The C library reduces any double exactly: there sin or cos is 10⁻⁹, of the double's worst case 10⁻¹⁹."""
    for dtype, least in (("float32", 2e-9), ("float64", 5e-19)):
        worst = max(reduction_killers(np.dtype(dtype)).tolist())
        assert min(abs(math.sin(worst)), abs(math.cos(worst))) < least
        assert np.array_equal(np.dtype(dtype).type(worst), worst)


def test_examples_shrink_to_the_small_and_plain() -> None:
    x = find(st_eg.arrays("float32"), lambda a: a.size >= 3)
    assert x.size == 3 and x.flags.c_contiguous
    case = find(st_eg.cases(specs["softmax"], "float32", arrange=True), lambda c: c.operands[0].ndim == 2)
    assert case.operands[0].size <= 1 and case.operands[0].flags.c_contiguous


def test_examples_do_not_depend_on_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[int]:
        seen: list[int] = []

        @settings(derandomize=True, max_examples=300, database=None)
        @given(value=st.integers(-10**9, 10**9))
        def draw(value: int) -> None:
            seen.append(value)

        draw()
        return seen

    before = drawn()
    loaded = ModuleType("full_of_numbers")
    loaded.__file__ = str(tmp_path / "full_of_numbers.py")
    Path(loaded.__file__).write_text(f"NUMBERS = {list(range(777_000, 778_000))}")
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    assert drawn() == before


@given(data=st.data())
def test_strategies_give_what_they_promise(data: Any) -> None:
    shapes = data.draw(st_eg.broadcastable(3))
    np.broadcast_shapes(*shapes)
    whole = data.draw(st_eg.exact_tensors())
    assert np.array_equal(whole.numpy(), np.round(whole.numpy())) and np.all(np.abs(whole.numpy()) <= 8)
    x = data.draw(st_eg.tensors("float64", requires_grad=True))
    assert x.requires_grad and x.dtype is eg.float64
    assert eg.ops.registry and data.draw(st_eg.dtypes("fi")) in {t.name for t in eg.dtypes.ALL}
    value = data.draw(st_eg.floats("float32"))
    assert math.isnan(value) or float(np.float32(value)) == value
    assert len(data.draw(st_eg.shapes(2, 2, 1))) == 2


def test_smooth_examples_keep_away_from_kinks_and_ties() -> None:
    for seed in range(20):
        source = Seeded(seed, smooth=True)
        assert np.all(np.abs(source.array((50,), kinks=(0.0, 1.0))) >= 0.05)
        assert np.min(np.diff(np.sort(source.distinct((50,))))) >= 0.1
