"""Every op's gradient, first and second order, against central differences of its float64 reference.

The references are NumPy (engine/testing/rows, formulas.py), never the engine's own jvp: that is made from the vjp, and
so agrees with any wrong vjp that is linear. Examples keep away from kinks by more than the differences reach.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from table import rows, share

import engine as eg
from engine.testing import OpSpec, Rounded, check_adjoint, check_close, check_no_alias, check_second_order
from engine.testing.bounds import unit_roundoff
from engine.testing.checks import as_tensor
from engine.testing.opspec import Case
from engine.testing.strategies import cases


def differentiable(spec: OpSpec) -> bool:
    return bool(spec.wrt)


def smooth_case(spec: OpSpec, data: Any) -> Case:
    case: Case = data.draw(cases(spec, "float64", smooth=True, arrange=True))
    assume(spec.points(case))
    return case


@rows(differentiable)
@given(data=st.data())
def test_adjoint(spec: OpSpec, data: Any) -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀu⟩, for the kernel's vjp and for the differentiable one."""
    case = smooth_case(spec, data)
    f, points = spec.function(case), spec.points(case)
    create_graph = bool(data.draw(st.integers(0, 2)) == 2)
    check_adjoint(f, *points, reference=spec.numpy_function(case), rounding=spec.rounding(case),
                  create_graph=create_graph, seed=data.draw(st.integers(0, 99)))


@rows(differentiable)
@share(0.3)
@given(data=st.data())
def test_second_order(spec: OpSpec, data: Any) -> None:
    """The vjp's own vjp, with respect to the operands and to the cotangent."""
    case = smooth_case(spec, data)
    check_second_order(spec.function(case), *spec.points(case), reference=spec.numpy_function(case),
                       rounding=spec.rounding(case), seed=data.draw(st.integers(0, 99)))


@rows(lambda spec: spec.gradient is not None)
@given(data=st.data())
def test_kernel_vjp(spec: OpSpec, data: Any) -> None:
    """A kernel's gradient in either type against the textbook's equation, within its error bound."""
    case = data.draw(cases(spec, arrange=True))
    y, _ = spec.expected(case)
    g = data.draw(st.builds(lambda n: np.random.default_rng(n).uniform(-1, 1, y.shape).astype(case.dtype),
                            st.integers(0, 99)))
    leaves = [as_tensor(x, True) for x in spec.points(case)]
    found = eg.grad(spec.function(case)(*leaves), leaves, as_tensor(g), allow_unused=True)
    wanted = [w for i, w in enumerate(spec.gradient_expected(case, g)) if i in spec.differentiable(case)]
    for i, (got, want) in enumerate(zip(found, wanted)):
        assert isinstance(want, Rounded) and got is not None and got.dtype.name == str(case.dtype)
        check_close(got, want.value, want.tolerance, check=f"{spec.name}: gradient {i}",
                    origin="the bound of its equation")


@rows(lambda spec: bool(spec.linear))
@share(0.3)
@given(data=st.data())
def test_linear(spec: OpSpec, data: Any) -> None:
    """f(2a) = 2 f(a) and f(−a) = −f(a), bit for bit, in each operand in which f is linear: scaling by two is exact."""
    case = data.draw(cases(spec, "float64"))
    index = data.draw(st.sampled_from(spec.linear))
    several = isinstance(case.operands[0], list)
    assume(several or case.operands[index] is not None)

    def run(factor: float) -> np.ndarray:
        operands = [[factor * x for x in case.operands[0]]] if several else list(case.operands)
        if not several:
            operands[index] = factor * operands[index]
        return spec.run(operands, case.attributes).numpy()

    y, zero = run(1.0), run(0.0)  # with a bias, or another summand, f is affine
    size = np.abs(run(2.0)) + np.abs(y) + 2 * np.abs(zero)
    check_close(run(2.0) - zero, 2 * (y - zero), 4 * unit_roundoff("float64") * size,
                check=f"{spec.name}: f(2a) = 2f(a)", origin="the four roundings of this test's own sums")


@rows(differentiable)
def test_no_alias(spec: OpSpec) -> None:
    """After backward each gradient has memory of its own."""
    from engine.testing import Seeded

    case = spec.example(Seeded(3, "float32", side=3))
    points = spec.points(case)
    if points:
        check_no_alias(spec.function(case), *points)


@rows(lambda spec: len(spec.wrt) > 1 or spec.op in ("concat", "stack", "einsum"))
@share(0.3)
@given(data=st.data())
def test_unneeded_gradients(spec: OpSpec, data: Any) -> None:
    """With one operand requiring grad, its gradient has the bits that it has when all do."""
    case = data.draw(cases(spec, "float32"))
    points = spec.points(case)
    f = spec.function(case)
    leaves = [as_tensor(x, True) for x in points]
    y = f(*leaves)
    g = as_tensor(np.random.default_rng(1).uniform(-1, 1, y.shape).astype(y.numpy().dtype))
    every = eg.grad(y, leaves, g, allow_unused=True)
    for i, x in enumerate(points):
        mixed = [as_tensor(p, i == j) for j, p in enumerate(points)]
        y = f(*mixed)
        if not y.requires_grad:
            continue
        alone = eg.grad(y, mixed[i], g, allow_unused=True)
        if alone is None:
            assert every[i] is None or not np.any(every[i].numpy())
            continue
        assert np.array_equal(alone.numpy(), every[i].numpy(), equal_nan=True), f"{spec.name}: gradient {i} ({x.shape})"
