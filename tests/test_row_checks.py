"""The checks that a row gets: each finds what it is for, and allows what its derivation says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from planted import Same, fails, off

import engine as eg
import engine.testing.rows
from engine.testing import (
    Case,
    ErrorCase,
    OpSpec,
    Seeded,
    check_close,
    register,
    specs,
)
from engine.testing.rounded import cos
from engine.testing.row_checks import CHECKS
from engine.testing.strategies import row_examples


def with_slope(y: eg.Tensor, x: eg.Tensor, slope: eg.Tensor) -> eg.Tensor:
    """y, as a function of x with this derivative; a constant to whoever differentiates twice."""
    return y.detach() + slope.detach() * (x - x.detach())


def other_beside(a: eg.Tensor, b: eg.Tensor) -> eg.Tensor:
    """a b, with another gradient where only one is asked for."""
    y = a * b
    return y if a.requires_grad and b.requires_grad else with_slope(y, a, b * 2.0)


def one(s: Any) -> Any:
    return [s.array(s.shape(1, 2, 2))], {}


def two(s: Any) -> Any:
    return [s.array((3,)), s.array((3,))], {}


def planted_row(call: Any, reference: Any = np.sin, **options: Any) -> OpSpec:
    return OpSpec("planted", options.pop("draw", one), call=call, reference=reference, **options)


PLANTED: dict[str, OpSpec] = {
    "forward": planted_row(lambda x: eg.sin(x) * 1.00001, ulps="sin"),
    "special_values": planted_row(lambda x: eg.clip(x, -1e30, 1e30), lambda x: x, special=True),
    "reference_device": planted_row(lambda x: x * (1.0 if x.device == "cpu" else 1.5), lambda x: x),
    "adjoint": planted_row(lambda x: with_slope(eg.sin(x), x, eg.cos(x) * 1.0001), ulps="sin"),
    "second_order": planted_row(lambda x: with_slope(eg.sin(x), x, eg.cos(x)), ulps="sin"),
    "linear_vjp": planted_row(np.sin, vjp=lambda xs, g: (np.sin(xs[0]), [np.abs(g) * np.cos(xs[0])])),
    "kernel_vjp": planted_row(lambda x: with_slope(eg.sin(x), x, eg.cos(x) * 1.0001), ulps="sin",
                              gradient=lambda g, x: g * cos(x)),
    "linear": planted_row(lambda x: x * eg.abs(x), lambda x: x * np.abs(x), linear=(0,)),
    "unneeded_gradients": planted_row(other_beside, np.multiply, draw=two, wrt=(0, 1)),
    "layouts": planted_row(lambda x: x * (1.0 if x.array.data.flags.c_contiguous else 1.5), lambda x: x),
    "no_alias": planted_row(Same, np.add, draw=two, wrt=(0, 1)),
    "threads": planted_row(lambda x: x * float(eg.get_num_threads()), large=one),
    "errors": planted_row(lambda x: x, errors=(ErrorCase(lambda: eg.sin("x"), TypeError, ("sin", "a number")),)),
    "batch_invariance": planted_row(lambda x: x + eg.mean(x), batch=(one, (0,))),
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_of_a_row_finds_what_it_is_for(name: str, told_threads: None) -> None:
    check, spec = CHECKS[name], PLANTED[name]
    assert check.applies(spec)

    @given(row_examples(check, spec))
    def run(drawn: Any) -> None:
        check.run(spec, drawn)

    fails(run, f"CHECKS[{name!r}]")


def test_doubling_allows_what_an_affine_op_rounds_on_its_way() -> None:
    """Four sums onto a constant, which nearly cancel: each rounds, and doubled otherwise."""
    values = np.array([1.4588200178190407, 2.7384410156694594, -2.7968392117988063, -1.2560286029440428])
    case = Case([np.array([0.34899993172338295]), values], {"index": np.zeros(4, np.int64)}, np.dtype("float64"))
    CHECKS["linear"].check(specs["scatter_add"], case=case, index=1)


@pytest.mark.parametrize("off", [np.float32(1e-45), np.float32(0.0)])
def test_a_function_that_is_zero_is_held_to_it_and_to_its_sign(off: np.float32) -> None:
    """tanh(−0) = −0: neither the least float nor +0."""
    spec = planted_row(lambda x: eg.where(x == 0, float(off), eg.tanh(x)), np.tanh, ulps="tanh")
    case = Case([np.array([-0.0, 0.5], np.float32)], {}, np.dtype("float32"))
    fails(lambda: CHECKS["forward"].check(spec, case=case), "planted: forward", "(0,)")


def test_a_users_own_op_gets_the_same_checks() -> None:
    row = OpSpec("wave", lambda s: ([s.array(s.shape())], {}), reference=np.sin, ulps="sin", call=eg.sin)
    try:
        register(row)
        case = row.example(Seeded(0, "float32"))
        want, bound = row.expected(case)
        check_close(row.run(case.operands, case.attributes), want, bound)
        with pytest.raises(ValueError, match="wave"):
            register(row)
    finally:
        specs.pop("wave")


@pytest.mark.parametrize("name", [spec.name for spec in specs.values() if spec.analytic])
def test_rows_that_are_analytic_see_a_gradient_that_is_wrong_in_its_tenth_digit(name: str) -> None:
    row, function = specs[name], getattr(eg, name)
    case = row.example(Seeded(1, smooth=True, side=3, ndim=1))
    wrong = replace(row, call=lambda x: off(function(x), 1e-10))
    CHECKS["adjoint"].check(row, case=case, seed=0, create_graph=False)
    failure = fails(lambda: CHECKS["adjoint"].check(wrong, case=case, seed=0, create_graph=False), "a complex step")
    assert failure.bound < 1e-12 * abs(failure.want) + 1e-13
