"""Every op's result against its float64 reference, within a bound that is derived (engine/testing/rounded.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table import rows, share

import engine as eg
from engine.testing import OpSpec, Seeded, check_bits, check_close, check_inputs_unmutated
from engine.testing.bounds import unit_roundoff
from engine.testing.opspec import Case
from engine.testing.strategies import cases


def flat(operands: list[Any]) -> list[np.ndarray]:
    """All arrays among the operands."""
    out: list[np.ndarray] = []
    for operand in operands:
        out += flat(operand) if isinstance(operand, list) else [operand] if isinstance(operand, np.ndarray) else []
    return out


def check_forward(spec: OpSpec, case: Case) -> None:
    """Value within its bound, type and shape as the reference's, inputs left alone, memory of its own."""
    arrays = flat(case.operands)
    want, bound = spec.expected(case)
    got = check_inputs_unmutated(lambda *_: spec.run(case.operands, case.attributes), *arrays)
    check_close(got, want, bound, check=f"{spec.name}: forward", origin="the bound of its formula")
    if want.dtype.kind == "f" and spec.op != "astype":
        assert got.dtype.name == str(case.dtype), f"{spec.name} of {case.dtype} gave {got.dtype}"
    elif want.dtype.kind != "f":
        assert got.dtype.name == want.dtype.name, f"{spec.name} gave {got.dtype}, expected {want.dtype}"
    if not spec.view:
        assert not any(np.shares_memory(got.numpy(), x) for x in arrays), f"{spec.name}: the result shares memory"


@rows()
@given(data=st.data())
def test_forward(spec: OpSpec, data: Any) -> None:
    check_forward(spec, data.draw(cases(spec, arrange=True)))


@rows(lambda spec: spec.special)
@given(data=st.data())
def test_special_values(spec: OpSpec, data: Any) -> None:
    """±0, ±∞, NaN, subnormals and the largest numbers among the operands, in any lane."""
    check_forward(spec, data.draw(cases(spec, arrange=True, special=True)))


@rows()
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("ndim", [0, 1, 3])
def test_empty_and_single(spec: OpSpec, side: int, ndim: int) -> None:
    """Lengths 0 and 1, and no axes at all, where the op allows them; with gradients."""
    for dtype in ("float32", "float64"):
        case = spec.example(Seeded(side + ndim, dtype, side=side, ndim=ndim))
        check_forward(spec, case)
        points = spec.points(case)
        if not points:
            continue
        leaves = [eg.tensor(x, requires_grad=True) for x in points]
        y = spec.function(case)(*leaves)
        for leaf, grad in zip(leaves, eg.grad(y, leaves, eg.ones_like(y), allow_unused=True)):
            assert grad is None or (grad.shape == leaf.shape and grad.dtype is leaf.dtype)


@rows(lambda spec: spec.integers)
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_integers(spec: OpSpec, dtype: str) -> None:
    """Integer operands give what NumPy gives for the same ones, exactly; sums and products count in int64."""
    rng = np.random.default_rng(7)
    count = len(spec.example(Seeded(0)).operands)
    operands = [rng.integers(1, 5, (3, 3)).astype(dtype) for _ in range(count)]
    reference = {"cumulative_sum": lambda x: np.cumsum(x, -1)}.get(spec.op) or eg.ops.registry[spec.op].reference
    want = np.asarray(reference(*operands))
    if spec.op in ("sum", "prod", "cumulative_sum"):
        want = want.astype(np.int64)
    check_bits(spec.run(operands, {}), want, check=f"{spec.name}: {dtype}")


@rows(lambda spec: ":" not in spec.name)
@share(0.2)
@given(data=st.data())
def test_reference_device(spec: OpSpec, data: Any) -> None:
    """The NumPy backend in float64, which is the oracle of much else, against the same references."""
    case = data.draw(cases(spec, "float64"))
    want, bound = spec.expected(case)

    def moved(x: Any) -> Any:
        return [moved(o) for o in x] if isinstance(x, list) else x if x is None else eg.tensor(x, device="reference")

    with eg.device("reference"):
        attributes = dict(case.attributes)
        if spec.op == "scaled_dot_product_attention" and attributes.get("lengths") is not None:
            attributes["lengths"] = None  # its row makes a tensor of it on the CPU
            case.attributes = attributes
            want, bound = spec.expected(case)
        got = spec.run([moved(o) for o in case.operands], attributes)
    assert got.device == "reference"
    bound = bound + spec.cancels * unit_roundoff("float64")  # fused ops run as their compositions here
    check_close(got, want, bound, check=f"{spec.name}: reference device")
