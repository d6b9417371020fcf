"""Tensors: construction, types and their promotion, indexing as NumPy has it, ways in and out of the engine."""

from __future__ import annotations

import copy
import math
import operator
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import engine as eg
from engine.dtypes import ALL, promote
from engine.testing import check_adjoint, check_bits, check_errors
from engine.testing.layouts import LAYOUTS

# ── construction ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("data", "dtype"), [
    (1.5, "float32"), (True, "bool"), (3, "int64"), ([1, 2.5], "float32"), ([[1, 2], [3, 4]], "int64"), ([], "float32"),
    ([True, False], "bool"), (np.float64(2.0), "float64"), (np.zeros(2), "float64"), (np.zeros(2, np.int8), "int8"),
    (np.zeros((2, 0), np.uint16), "uint16")])
def test_python_data_and_arrays_choose_the_type(data: Any, dtype: str) -> None:
    x = eg.tensor(data)
    assert x.dtype.name == dtype and x.device == "cpu" and not x.requires_grad
    assert np.array_equal(x.numpy(), np.asarray(data, dtype))


def test_tensor_copies() -> None:
    data = np.zeros(3, np.float32)
    x = eg.tensor(data)
    data[0] = 1.0
    assert x.numpy()[0] == 0.0
    assert not np.shares_memory(eg.tensor(x).numpy(), x.numpy())


def test_from_numpy_shares() -> None:
    data = np.zeros((3, 4), np.float32)
    x = eg.from_numpy(data.T)
    data[2, 1] = 1.0
    assert x.shape == (4, 3) and x[1, 2].item() == 1.0
    x[0, 0] = 5.0
    assert data[0, 0] == 5.0


def test_arrays_that_a_kernel_cannot_walk_are_refused_or_copied() -> None:
    """A field of a record, and elements that straddle their alignment, have strides that are no number of elements."""
    record = np.zeros(4, dtype=[("tag", "i1"), ("value", "f4")])
    record["value"] = [1, 2, 3, 4]
    field = record["value"]
    assert field.strides[0] % 4
    assert np.array_equal(eg.tensor(field).numpy(), [1, 2, 3, 4])
    assert np.array_equal((eg.ones(4) + field).numpy(), [2, 3, 4, 5])
    check_errors(lambda: eg.from_numpy(field), ValueError, "from_numpy", "stride")
    crooked = np.frombuffer(bytes(17), np.uint8)[1:].view(np.float32)
    assert np.array_equal((eg.ones(4) + crooked).numpy(), np.ones(4))
    check_errors(lambda: eg.from_numpy(crooked), ValueError, "from_numpy", "align")


def test_errors_of_construction() -> None:
    check_errors(lambda: eg.tensor([[1, 2], [3]]), ValueError, "tensor", "rectangular")
    check_errors(lambda: eg.tensor("text"), TypeError, "tensor", "numbers")
    check_errors(lambda: eg.tensor(np.zeros(1, np.complex64)), TypeError, "tensor", "complex64")
    check_errors(lambda: eg.tensor([1], requires_grad=True), TypeError, "requires_grad", "int64")
    check_errors(lambda: eg.tensor(1.0, dtype="float33"), TypeError, "dtype", "'float33'")
    check_errors(lambda: eg.tensor(1.0, device="tpu"), ValueError, "device", "'tpu'", "cpu")
    check_errors(lambda: eg.zeros(2, -1), ValueError, "zeros", "(2, -1)")
    check_errors(lambda: eg.arange(0, 5, 0), ValueError, "arange", "step is 0")
    check_errors(lambda: eg.randn(2, dtype="int64"), TypeError, "randn", "int64")
    check_errors(lambda: eg.randint(3, 3, 2), ValueError, "randint", "[3, 3)")
    check_errors(lambda: len(eg.tensor(1.0)), TypeError, "len", "0-d")
    check_errors(lambda: eg.zeros(2).item(), ValueError, "item", "(2,)")
    check_errors(lambda: [1, 2][eg.tensor(1.0)], TypeError, "index", "float32")


def test_constants_and_ranges() -> None:
    assert np.array_equal(eg.full((2, 3), 7).numpy(), np.full((2, 3), 7)) and eg.full((1,), 7).dtype is eg.int64
    assert eg.full((1,), True).dtype is eg.bool_ and eg.zeros(2, dtype="int8").dtype is eg.int8
    assert np.array_equal(eg.eye(3, 4, k=1).numpy(), np.eye(3, 4, 1, np.float32))
    assert np.array_equal(eg.one_hot(eg.tensor([[0, 2]]), 3).numpy(), [[[1, 0, 0], [0, 0, 1]]])
    assert eg.ones_like(eg.zeros(2, 3, dtype="float64")).numpy().sum() == 6.0
    assert eg.full_like(eg.zeros(2), 3).tolist() == [3.0, 3.0] and eg.zeros_like(eg.ones(2)).tolist() == [0.0, 0.0]
    check_bits(eg.linspace(0, 1, 7), np.linspace(0, 1, 7).astype(np.float32), check="linspace")


@given(start=st.integers(-20, 20), stop=st.integers(-20, 20), step=st.integers(-5, 5).filter(bool))
def test_arange_of_whole_numbers(start: int, stop: int, step: int) -> None:
    check_bits(eg.arange(start, stop, step), np.arange(start, stop, step), check="arange")
    assert eg.arange(5).tolist() == [0, 1, 2, 3, 4]


@given(start=st.integers(-8, 8), count=st.integers(0, 40), step=st.sampled_from([0.25, 0.5, -0.125, 3.0]))
def test_arange_of_fractions(start: int, count: int, step: float) -> None:
    want = start + step * np.arange(count)
    assert np.array_equal(eg.arange(float(start), start + count * step, step, dtype="float64").numpy(), want)


# ── types ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("a", ALL, ids=repr)
@pytest.mark.parametrize("b", ALL, ids=repr)
def test_promotion(a: eg.DType, b: eg.DType) -> None:
    """NumPy's table for integers and bools; with a float, the (wider) float wins."""
    if {a.kind, b.kind} == {"i", "u"} and eg.uint64 in (a, b):
        check_errors(lambda: promote(a, b), TypeError, "dtype", "uint64")
        return
    if a.is_floating or b.is_floating:
        want = max([t for t in (a, b) if t.is_floating], key=lambda t: t.itemsize).name
    else:
        want = np.promote_types(a.numpy, b.numpy).name
    assert promote(a, b).name == promote(b, a).name == want
    left, right = eg.ones(2, dtype=a), eg.ones(2, dtype=b)
    assert (left + right if want != "bool" else left | right).dtype.name == want
    assert (left == right).dtype is eg.bool_


@pytest.mark.parametrize("dtype", ALL, ids=repr)
def test_python_numbers_are_weak(dtype: eg.DType) -> None:
    x = eg.ones(2, dtype=dtype)
    assert (x * 2.5).dtype is (dtype if dtype.is_floating else eg.float32)
    assert (x * 2).dtype is (eg.int64 if dtype is eg.bool_ else dtype)
    assert (2.5 * x).dtype is (x * 2.5).dtype and (x * True).dtype is dtype
    assert (x / 2).dtype is (dtype if dtype.is_floating else eg.float32)


@given(value=st.floats(-100, 100, width=32), to=st.sampled_from(["int8", "int32", "int64", "float64", "bool"]))
def test_conversion(value: float, to: str) -> None:
    x = np.array([value, -value, 0.0], np.float32)
    check_bits(eg.tensor(x).to(to), x.astype(to), check=f"to {to}")


def test_to_returns_itself_when_nothing_changes_and_is_differentiable() -> None:
    x = eg.ones(2)
    assert x.to("float32") is x and x.to(device="cpu") is x
    w = eg.ones(2, requires_grad=True)
    (w.to("float64") * 3.0).to("reference").sum().backward()
    assert w.grad.dtype is eg.float32 and w.grad.device == "cpu" and w.grad.tolist() == [3.0, 3.0]


def test_operators() -> None:
    a, b = np.array([5.0, -3.0, 2.0]), np.array([2.0, 2.0, -4.0])
    x, y = eg.tensor(a), eg.tensor(b)
    for f in (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.lt,
              operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
        check_bits(f(x, y), f(a, b), check=f.__name__)
        check_bits(f(x, 2.0), f(a, 2.0), check=f.__name__)
        check_bits(f(2.0, x), f(2.0, a), check=f.__name__)
        check_bits(f(a, y), f(a, b), check=f"NumPy array first: {f.__name__}")
        check_bits(f(x, b), f(a, b), check=f"NumPy array second: {f.__name__}")
    assert np.array_equal((-x).numpy(), -a) and np.array_equal(abs(x).numpy(), abs(a))
    assert np.array_equal((x @ y).numpy(), a @ b) and np.array_equal((2.0**y).numpy(), 2.0**b)
    bits = eg.tensor([5, 3])
    assert (bits & 1).tolist() == [1, 1] and (bits | 2).tolist() == [7, 3] and (~bits).tolist() == [-6, -4]


def test_out_of_the_engine() -> None:
    x = eg.tensor([[1.0, 2.0]])
    assert np.asarray(x).dtype == np.float32 and np.shares_memory(np.asarray(x), x.numpy())
    assert np.array(x, dtype=np.float64).dtype == np.float64
    assert x.tolist() == [[1.0, 2.0]] and float(eg.tensor(2.5)) == 2.5 and int(eg.tensor(7)) == 7
    assert [10, 20, 30][eg.tensor(1)] == 20 and bool(eg.tensor(False)) is False
    assert len(x) == 1 and x.size == 2 and x.ndim == 2 and x.is_leaf
    assert np.sin(x).dtype == np.float32  # NumPy's own functions read it


def test_repr_says_what_it_is() -> None:
    assert repr(eg.tensor([1.0, 2.0])) == "tensor([1., 2.])"
    assert repr(eg.tensor([1])) == "tensor([1], dtype=int64)"
    x = eg.tensor([1.0], requires_grad=True)
    assert "requires_grad=True" in repr(x) and "node=multiply" in repr(x * x)
    assert "device='reference'" in repr(eg.ones(1, device="reference"))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 2)])
def test_copies_and_pickles_keep_shape_type_and_values(shape: tuple[int, ...]) -> None:
    x = eg.tensor(np.random.default_rng(0).normal(size=shape), requires_grad=True)
    for other in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert other.shape == shape and other.dtype is x.dtype and other.requires_grad
        assert np.array_equal(other.numpy(), x.numpy()) and not (x.size and np.shares_memory(other.numpy(), x.numpy()))
    check_errors(lambda: copy.deepcopy(x * 2.0), TypeError, "pickle", "multiply")


def test_dlpack_shares_memory() -> None:
    x = eg.tensor([1.0, 2.0])
    y = np.from_dlpack(x)
    assert np.shares_memory(x.numpy(), y)
    assert np.shares_memory(eg.from_dlpack(y).numpy(), x.numpy())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the buffer protocol in Python: 3.12 and later (PEP 688)")
def test_the_buffer_protocol_shares_memory() -> None:
    x = eg.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    view = memoryview(x[:, 1:])
    assert (view.shape, view.strides, view.format) == ((2, 2), (12, 4), "f")
    assert np.shares_memory(np.asarray(view), x.numpy()) and view.tolist() == [[2, 3], [5, 6]]
    view[1, 0] = 9
    assert x[1, 1].item() == 9 and bytes(x.flip(0)) == x.numpy()[::-1].tobytes()
    leaf = eg.ones(2, requires_grad=True)
    check_errors(lambda: memoryview(leaf), BufferError, "__buffer__", "requires grad")
    assert np.asarray(leaf).tolist() == [1, 1]


def test_devices() -> None:
    with eg.device("reference"):
        assert eg.ones(1).device == "reference" == eg.default_device()
    assert eg.ones(1).device == "cpu"
    x = eg.tensor([1.0, 2.0])
    y = x.to("reference")
    assert y.device == "reference" and not np.shares_memory(x.numpy(), y.numpy())


# ── indexing ──────────────────────────────────────────────────────────────────────────────────────────

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)


def indices(shape: tuple[int, ...]) -> Any:
    """Basic indices, integer arrays, masks, and mixtures of the first two."""
    basic = hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True)
    masks = hnp.arrays(bool, shape)
    options = [basic, masks]
    if all(shape):
        options.append(hnp.integer_array_indices(shape, result_shape=hnp.array_shapes(max_dims=2, max_side=3)))
        lists = st.lists(st.integers(-shape[0], shape[0] - 1), min_size=1, max_size=4)
        options += [lists, lists.map(np.array), st.tuples(st.slices(shape[0]), *([lists] if len(shape) > 1 and
                                                                              shape[1] >= shape[0] else []))]
    return st.one_of(options)


@given(data=st.data())
def test_reading_by_index(data: Any) -> None:
    shape = data.draw(SHAPES)
    x = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    x = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](x, np.random.default_rng(0))
    index = data.draw(indices(shape))
    got, want = eg.from_numpy(x)[index], np.asarray(x[index])
    check_bits(got, want, check=f"x[{index!r}]")
    basic = isinstance(index, tuple) and all(isinstance(p, (int, slice, type(None), type(...))) for p in index)
    if want.size and basic:
        assert np.shares_memory(got.numpy(), x), "a basic index gives a view"


@given(data=st.data())
def test_writing_by_index(data: Any) -> None:
    shape = data.draw(SHAPES)
    want = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    index = data.draw(indices(shape))
    value = data.draw(st.sampled_from(["number", "array"]))
    source = 7.5 if value == "number" else np.random.default_rng(1).normal(size=np.asarray(want[index]).shape)
    x = eg.tensor(want)
    x[index] = source
    want[index] = source
    check_bits(x, want, check=f"x[{index!r}] = {value}")


@given(data=st.data())
def test_gradients_of_indexing(data: Any) -> None:
    """Reading scatters the cotangent back, adding where an element was read twice; writing cuts it out."""
    shape = data.draw(SHAPES)
    x = np.random.default_rng(0).uniform(-1, 1, shape)
    index = data.draw(indices(shape))
    check_adjoint(lambda t: t[index], x, reference=lambda a: np.asarray(a[index]))
    value = np.random.default_rng(1).uniform(-1, 1, np.asarray(x[index]).shape)

    def write(t: eg.Tensor, v: eg.Tensor) -> eg.Tensor:
        y = t * 1.0
        y[index] = v
        return y

    def by_hand(a: np.ndarray, v: np.ndarray) -> np.ndarray:
        y = a * 1.0
        y[index] = v
        return y

    repeated = np.asarray(np.arange(x.size).reshape(shape)[index]).reshape(-1)
    if len(set(repeated.tolist())) == repeated.size:  # a twice written element has no derivative that is one number
        check_adjoint(write, x, value, reference=by_hand)


def test_indices_may_be_tensors() -> None:
    x = eg.arange(12).reshape(3, 4)
    assert x[eg.tensor([2, 0])].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert x[x > 9].tolist() == [10, 11] and x[eg.tensor(1), 2].item() == 6
    assert x[:, eg.tensor([[0], [3]])].shape == (3, 2, 1)


def test_errors_of_indexing() -> None:
    x = eg.zeros(2, 3)
    check_errors(lambda: x[5], IndexError, "index", "(2, 3)", "5")
    check_errors(lambda: x[0, 0, 0], IndexError, "index", "(2, 3)")
    check_errors(lambda: x[eg.tensor([0.5])], TypeError, "index", "float32")
    check_errors(lambda: x["a"], TypeError, "index", "str")
    check_errors(lambda: x[[True, False, True]], IndexError, "index", "(2, 3)")
    check_errors(lambda: x.__setitem__(0, eg.ones(4)), ValueError, "index assignment", "(2, 3)", "(4,)")
    check_errors(lambda: x.__setitem__(9, 1.0), IndexError, "index assignment", "(2, 3)")


def test_iteration_ends() -> None:
    assert [row.tolist() for row in eg.arange(4).reshape(2, 2)] == [[0, 1], [2, 3]]
