"""Every op's result against its float64 reference, within a bound that is derived (engine/testing/rounded.py)."""

from __future__ import annotations

import numpy as np
import pytest
from table import generated, rows

import engine as eg
from engine.testing import Case, OpSpec, Seeded, check_bits, specs
from engine.testing.checks import check_close
from engine.testing.row_checks import forward

test_forward = generated("forward")
test_special_values = generated("special_values")
test_reference_device = generated("reference_device")


@rows(lambda spec: (spec.formula or spec.reference) and spec.name == spec.op and eg.ops.registry[spec.op].reference)
@pytest.mark.parametrize("seed", range(3))
def test_references_agree(spec: OpSpec, seed: int) -> None:
    """The line of NumPy at an op's definition against its row's own equation: either may round as the bound allows."""
    case = spec.example(Seeded(seed, "float64"))
    want, bound = spec.expected(case)
    reference = eg.ops.registry[spec.op].reference
    assert reference is not None
    with np.errstate(all="ignore"):
        got = np.asarray(reference(*case.operands, **case.attributes))
    check_close(got, want, 2 * bound, check=f"{spec.name}: the op's reference")


@rows()
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("ndim", [0, 1, 3])
def test_empty_and_single(spec: OpSpec, side: int, ndim: int) -> None:
    """Lengths 0 and 1, and no axes at all, where the op allows them; with gradients."""
    for dtype in ("float32", "float64"):
        case = spec.example(Seeded(side + ndim, dtype, side=side, ndim=ndim))
        forward(spec, case)
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
    """Integer operands give what NumPy gives for the same ones, exactly; sums and products count in 64 bits."""
    rng = np.random.default_rng(7)
    count = len(spec.example(Seeded(0)).operands)
    operands = [rng.integers(1, 5, (3, 3)).astype(dtype) for _ in range(count)]
    along_last = {"cumulative_sum": lambda x: np.cumsum(x, -1), "cumulative_prod": lambda x: np.cumprod(x, -1)}
    reference = along_last.get(spec.op) or eg.ops.registry[spec.op].reference
    want = np.asarray(reference(*operands))
    if spec.op in ("sum", "prod", "cumulative_sum", "cumulative_prod"):
        want = want.astype(np.uint64 if dtype == "uint8" else np.int64)
    check_bits(spec.run(operands, {}), want, check=f"{spec.name}: {dtype}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logaddexp_near_0(dtype: str) -> None:
    """Its two terms cancel: the error is that of the terms, not of the result."""
    a = -np.random.default_rng(0).uniform(0.01, 3.0, 10_000)
    operands = [x.astype(dtype) for x in (a, np.log1p(-np.exp(a)))]
    forward(specs["logaddexp"], Case(operands, {}, np.dtype(dtype)))
