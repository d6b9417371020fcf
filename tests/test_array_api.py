"""The namespace of the array API standard, where it says more than the ops do. The standard's own suite tests the rest:
make test-array-api."""

from __future__ import annotations

import array
import math
import operator
from typing import Any

import numpy as np
import pytest

import engine as eg
from engine import array_api as xp


def shares(a: eg.Tensor, b: Any) -> bool:
    return np.shares_memory(a.numpy(), b.numpy() if isinstance(b, eg.Tensor) else b)


# ── creation ──────────────────────────────────────────────────────────────────────────────────────────

def test_asarray_shares_what_it_can_and_copies_what_it_must() -> None:
    x = eg.tensor([1.0, 2.0])
    assert xp.asarray(x) is x and not shares(xp.asarray(x, copy=True), x)
    assert xp.asarray(x, dtype=eg.float64).dtype is eg.float64
    data = np.arange(3.0)
    assert shares(xp.asarray(data), data) and xp.asarray(data).dtype is eg.float64
    assert shares(xp.asarray(data, copy=False), data) and not shares(xp.asarray(data, copy=True), data)
    assert not shares(xp.asarray(data, dtype=eg.float32), data)
    buffer = array.array("d", [1.0, 2.0])
    assert xp.asarray(buffer).dtype is eg.float64 and shares(xp.asarray(buffer), np.asarray(buffer))
    assert xp.asarray([[1, 2], [3, 4]]).dtype is eg.int64 and xp.asarray(1.5).dtype is eg.float32
    unaligned = np.frombuffer(b"\0" * 9, np.uint8)[1:].view(np.float32)
    assert xp.asarray(unaligned).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("obj", "options"), [
    ([1.0], {}), (eg.tensor([1.0]), {"dtype": eg.float64}), (np.zeros(2), {"dtype": eg.float32}),
    (eg.tensor([1.0]), {"device": "reference"})])
def test_asarray_refuses_to_copy(obj: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="asarray: copy is False"):
        xp.asarray(obj, copy=False, **options)


def test_whole_numbers_keep_all_their_bits() -> None:
    assert xp.asarray([2**63, 1], dtype=xp.uint64).tolist() == [2**63, 1]
    assert xp.arange(2**63, 2**63 + 5, 2, dtype=xp.uint64).tolist() == [2**63, 2**63 + 2, 2**63 + 4]
    assert xp.arange(2**62, 2**62 + 2).tolist() == [2**62, 2**62 + 1]
    assert xp.arange(100, -120, -100, dtype=xp.int8).tolist() == [100, 0, -100]


def test_numbers_that_are_written_keep_all_their_digits() -> None:
    x = eg.zeros(3, dtype="float64")
    x[0] = 16777217.0
    x[1:] = [0.1, 0.2]
    assert x.tolist() == [16777217.0, 0.1, 0.2]
    y = eg.zeros(2, dtype="float64", requires_grad=True) * 1.0
    y[:] = [0.1, 0.2]
    assert y.tolist() == [0.1, 0.2] and y.requires_grad


def test_floats_in_lists_take_the_type_they_meet() -> None:
    x = eg.zeros(2, dtype="float64")
    assert (x + [0.1, 0.2]).tolist() == ([0.1, 0.2] + x).tolist() == [0.1, 0.2]
    assert xp.where(x == 0.0, [0.1, 0.2], x).tolist() == [0.1, 0.2]
    assert xp.isin(x + [0.1, 0.2], [0.2]).tolist() == [False, True]
    x += [0.1, 0.2]
    assert x.tolist() == [0.1, 0.2]
    assert (xp.asarray([1, 2]) + [0.5, 0.5]).dtype is eg.float32 and ([0.5] + eg.zeros(1)).dtype is eg.float32
    assert (eg.zeros(1, dtype="int8") + [300]).tolist() == [300]  # whole numbers stay whole, and in range


def test_from_dlpack_keeps_the_memory_unless_asked() -> None:
    data = np.arange(3.0)
    assert shares(xp.from_dlpack(data), data) and not shares(xp.from_dlpack(data, copy=True), data)
    x = eg.tensor([1.0], device="reference")
    assert xp.from_dlpack(x).device == "reference" and xp.from_dlpack(x, device="cpu").device == "cpu"
    with pytest.raises(ValueError, match="from_dlpack: copy is False"):
        xp.from_dlpack(x, device="cpu", copy=False)


def test_none_is_the_default_type() -> None:
    for made in (xp.zeros(2, dtype=None), xp.ones((2,), dtype=None), xp.empty(2), xp.eye(2), xp.linspace(0, 1, 2)):
        assert made.dtype is eg.float32
    assert xp.zeros_like(xp.asarray([1], dtype=xp.int8)).dtype is eg.int8
    assert xp.full_like(xp.zeros(2), 3, device="reference").device == "reference"


# ── types ─────────────────────────────────────────────────────────────────────────────────────────────

def test_limits() -> None:
    assert xp.finfo(eg.float32) == (32, 2.0**-23, (2 - 2.0**-23) * 2.0**127, -(2 - 2.0**-23) * 2.0**127, 2.0**-126,
                                    eg.float32)
    assert xp.iinfo(eg.zeros(1, dtype="int16")) == (16, 32767, -32768, eg.int16)
    with pytest.raises(TypeError, match="finfo: got dtype int64, expected float32 or float64"):
        xp.finfo(eg.int64)
    with pytest.raises(TypeError, match="iinfo: got dtype bool, expected an integer type"):
        xp.iinfo(eg.bool_)


def test_kinds_of_types() -> None:
    assert xp.isdtype(eg.uint8, "integral") and xp.isdtype(eg.bool_, ("numeric", eg.bool_))
    assert not xp.isdtype(eg.bool_, "numeric") and not xp.isdtype(eg.float32, "complex floating")
    with pytest.raises(ValueError, match="isdtype: kind is 'whole', expected a dtype or one of bool, signed integer"):
        xp.isdtype(eg.int8, "whole")


def test_promotion() -> None:
    assert xp.can_cast(eg.int8, eg.int16) and not xp.can_cast(eg.int16, eg.uint16)
    assert not xp.can_cast(eg.uint64, eg.int64)  # they have no common type
    assert xp.result_type(eg.zeros(1, dtype="int8"), eg.uint8, 1) is eg.int16
    assert xp.result_type(eg.float64, 1, 1.5) is eg.float64 and xp.result_type(eg.int8, 1.5) is eg.float32
    with pytest.raises(ValueError, match="result_type: got no tensor and no dtype"):
        xp.result_type(1, 2)


def test_astype_copies_unless_told_otherwise() -> None:
    x = eg.tensor([1.5])
    assert not shares(xp.astype(x, eg.float32), x) and xp.astype(x, eg.float32, copy=False) is x
    assert xp.astype(x, eg.int8, copy=False).tolist() == [1]
    assert xp.astype(x, eg.float64, device="reference").device == "reference"


# ── the namespace ─────────────────────────────────────────────────────────────────────────────────────

def test_a_tensor_knows_its_namespace() -> None:
    x = eg.tensor([1.0])
    assert x.__array_namespace__() is xp and x.__array_namespace__(api_version="2025.12") is xp
    with pytest.raises(ValueError, match=r"__array_namespace__: api_version is '2031.12', expected one of 2021.12"):
        x.__array_namespace__(api_version="2031.12")
    assert {"sin", "float64", "bool", "asarray", "pi"} <= set(dir(xp)) and xp.bool is eg.bool_ and xp.sin is eg.sin
    with pytest.raises(AttributeError, match=r"module 'engine.array_api' has no attribute 'fft'"):
        xp.fft  # noqa: B018


def test_it_tells_what_it_has() -> None:
    info = xp.__array_namespace_info__()
    assert {"cpu", "reference"} <= set(info.devices()) and info.default_device() == "cpu"
    assert info.default_dtypes() == {"real floating": eg.float32, "integral": eg.int64, "indexing": eg.int64}
    assert info.dtypes(kind="real floating") == {"float32": eg.float32, "float64": eg.float64}
    assert len(info.dtypes()) == 11 and info.capabilities()["boolean indexing"]
    assert eg.zeros((1,) * info.capabilities()["max dimensions"]).sum().item() == 0.0


def test_to_device() -> None:
    x = eg.tensor([1.0], requires_grad=True)
    assert x.to_device("cpu") is x
    x.to_device("reference").sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0]
    with pytest.raises(ValueError, match="to_device: stream is 1, expected None"):
        x.to_device("cpu", stream=1)


def test_reshape_and_concat() -> None:
    x = eg.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert shares(xp.reshape(x, (4,)), x) and not shares(xp.reshape(x, (4,), copy=True), x)
    assert shares(xp.reshape(x, (4,), copy=False), x)
    with pytest.raises(ValueError, match=r"reshape: copy is False, but x of shape \(2, 2\) must be copied into \(4,\)"):
        xp.reshape(x.T, (4,), copy=False)
    assert xp.concat([x, eg.tensor([5.0])], axis=None).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_real_numbers_as_complex_ones() -> None:
    x = eg.tensor([1.0, -2.0])
    assert xp.conj(x).tolist() == xp.real(x).tolist() == [1.0, -2.0] and xp.imag(x).tolist() == [0.0, 0.0]
    assert complex(eg.tensor(1.5)) == 1.5 + 0j


def test_gradients_pass_through_it() -> None:
    x = eg.tensor([0.25, 0.5], requires_grad=True)
    xp.sum(xp.atan(xp.reshape(x, (2, 1), copy=True))).backward()
    assert x.grad is not None and x.grad.tolist() == pytest.approx([1 / (1 + v * v) for v in (0.25, 0.5)])


# ── operators ─────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ["floordiv", "mod", "and", "or", "xor", "lshift", "rshift"])
def test_reflected_and_in_place_operators(name: str) -> None:
    plain: Any = getattr(operator, f"__{name}__")
    x = eg.tensor([3, 5, 1])
    view, want = x[1:], [plain(v, 2) for v in (3, 5, 1)]
    assert plain(7, x).tolist() == [plain(7, v) for v in (3, 5, 1)]
    assert getattr(operator, f"__i{name}__")(x, 2) is x and x.tolist() == want
    assert view.tolist() == want[1:]


def test_matmul_in_place_and_unary_plus() -> None:
    x = eg.tensor([[1.0, 2.0], [3.0, 4.0]])
    view = x[0]
    x @= eg.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert x.tolist() == [[2.0, 1.0], [4.0, 3.0]] and view.tolist() == [2.0, 1.0]
    assert not shares(+x, x) and (+x).tolist() == x.tolist()


def test_quotients_with_infinities() -> None:
    x = eg.tensor([math.inf, 1.0, -1.0], dtype="float64")
    assert (x // 2.0).tolist() == [math.inf, 0.0, -1.0]
    y = (x // -math.inf).tolist()
    assert math.isnan(y[0]) and math.copysign(1, y[1]) == -1 and y[1:] == [0.0, 0.0]


def test_cumulative_results_begin_with_nothing() -> None:
    x = eg.tensor([[1, 2, 3]], dtype="uint8")
    assert xp.cumulative_sum(x, axis=1, include_initial=True).tolist() == [[0, 1, 3, 6]]
    total = xp.cumulative_prod(x, axis=1, dtype=eg.float64, include_initial=True)
    assert total.tolist() == [[1.0, 1.0, 2.0, 6.0]] and total.dtype is eg.float64
    assert xp.cumulative_sum(x, axis=1).dtype is xp.sum(x).dtype is xp.prod(x).dtype is eg.uint64


def test_vecdot_keeps_the_type_and_checks_the_axis() -> None:
    x = eg.tensor([[1, 2], [3, 4]], dtype="int8")
    assert xp.vecdot(x, x).tolist() == [5, 25] and xp.vecdot(x, x).dtype is eg.int8
    with pytest.raises(ValueError, match=r"vecdot: a has shape \(2, 2\) and b has shape \(1,\)"):
        xp.vecdot(x, eg.tensor([1], dtype="int8"))
