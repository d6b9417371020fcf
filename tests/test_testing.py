"""The laboratory itself: its bounds against known numbers, and each check against something that is wrong."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
import engine.testing.rows
from engine.backend import get_backend
from engine.backend.cpu import CpuBackend
from engine.testing import (
    Case,
    CheckFailure,
    ErrorCase,
    OpSpec,
    Rounded,
    Seeded,
    assert_ulp,
    check_adjoint,
    check_backends,
    check_bits,
    check_capture,
    check_close,
    check_errors,
    check_grads,
    check_inputs_unmutated,
    check_layouts,
    check_linear_vjp,
    check_no_alias,
    check_second_order,
    check_threads,
    dot_bound,
    gamma,
    matmul_bound,
    placed,
    register,
    rendered,
    specs,
    sum_bound,
    ulp_distance,
    ulp_error,
    unpacked,
)
from engine.testing import strategies as st_eg
from engine.testing.layouts import FOREIGN, LAYOUTS, placement, zero_stride
from engine.testing.rounded import cos, exp, matmul, total
from engine.testing.row_checks import CHECKS
from engine.testing.strategies import row_examples


def fails(check: Any, *words: str) -> CheckFailure:
    """check() raises CheckFailure, whose text contains the words; it says what was allowed, why, and how to see it."""
    with pytest.raises(CheckFailure) as caught:
        check()
    failure = caught.value
    for word in words:
        assert word in str(failure)
    assert failure.bound is not None and failure.origin and failure.reproduction
    return failure


# ── ULPs and bounds ───────────────────────────────────────────────────────────────────────────────────

def test_ulp_distance_counts_floats() -> None:
    one = np.float32(1)
    assert ulp_distance(one, np.nextafter(one, np.float32(2))) == 1
    assert ulp_distance(np.float32(-0.0), np.float32(0.0)) == 0
    tiny = np.float32(1.4e-45)
    assert ulp_distance(tiny, -tiny) == 2 and ulp_distance(np.float64(1), np.float64(2)) == 2**52
    assert ulp_distance(np.float32(np.nan), np.float32(np.nan)) == 0
    assert ulp_distance(np.float32(np.nan), one) == np.iinfo(np.int64).max
    assert ulp_distance(np.float32(np.inf), np.finfo(np.float32).max) == 1
    assert ulp_distance(np.float32(-np.inf), np.float32(np.inf)) == 2 * 0x7F800000
    with pytest.raises(TypeError):
        ulp_distance(one, np.float64(1))


@given(x=st_eg.floats("float32"), y=st_eg.floats("float32"))
def test_ulp_distance_is_a_metric_with_neighbours_one_apart(x: float, y: float) -> None:
    a, b = np.float32(x), np.float32(y)
    assert ulp_distance(a, b) == ulp_distance(b, a) and ulp_distance(a, a) == 0
    if np.isfinite(a):
        assert ulp_distance(a, np.nextafter(a, np.float32(np.inf))) == 1


def test_ulp_error_is_in_units_of_the_exact_result() -> None:
    assert ulp_error(np.float32(1), 1 + 2.0**-24) == 0.5
    assert ulp_error(np.float32(0), 2.0**-149) == 1.0, "subnormals are as far apart as the smallest ones"
    assert ulp_error(np.float32(np.inf), 1e39) == 0.0 and ulp_error(np.float32(np.inf), 1.0) == np.inf
    assert_ulp(np.float32([1, np.nan, np.inf]), [1, np.nan, np.inf], 0)
    failure = fails(lambda: assert_ulp(np.float32([1, 1]), [1, 1 + 2.0**-22], 1), "assert_ulp at (1,)", "2 ULP apart")
    assert failure.index == (1,) and failure.ulps == 2.0


def exact_sum(x: np.ndarray) -> Fraction:
    return sum((Fraction(float(v)) for v in x), Fraction(0))


@given(seed=st.integers(0, 2**16), n=st.integers(1, 200))
def test_bounds_hold_for_every_order(seed: int, n: int) -> None:
    """A float32 sum and dot product, one element at a time, against exact rational arithmetic."""
    rng = np.random.default_rng(seed)
    x, y = ((rng.uniform(-1, 1, n) * 10.0 ** rng.integers(-3, 4, n)).astype(np.float32) for _ in range(2))
    s = np.float32(0)
    for v in x:
        s = np.float32(s + v)
    assert abs(Fraction(float(s)) - exact_sum(x)) <= Fraction(float(sum_bound(x, "float32"))) * Fraction(1 + 2**-40)
    d = np.float32(0)
    for a, b in zip(x, y):
        d = np.float32(d + np.float32(a * b))
    exact = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, y)), Fraction(0))
    assert abs(Fraction(float(d)) - exact) <= Fraction(float(dot_bound(x, y, "float32"))) * Fraction(1 + 2**-40)


def test_gamma() -> None:
    assert gamma(1, 2.0**-24) == 2.0**-24 / (1 - 2.0**-24)
    with pytest.raises(ValueError):
        gamma(2**24, 2.0**-24)
    a, b = np.ones((2, 3)), np.ones((3, 4))
    assert matmul_bound(a, b, "float64").shape == (2, 4)
    tiny = np.full(4, 2.0**-76, np.float32)
    lost = 4 * 2.0**-152  # each product underflows to 0
    assert float(sum(tiny * tiny)) == 0 and lost <= dot_bound(tiny, tiny, "float32")


@given(seed=st.integers(0, 2**16))
def test_rounded_bounds_what_float32_does(seed: int) -> None:
    """A formula in float32 NumPy, against the same over Rounded: inside the bound, and the bound is not absurd."""
    rng = np.random.default_rng(seed)
    x, w = rng.uniform(-2, 2, (3, 7)).astype(np.float32), rng.uniform(-2, 2, (7, 4)).astype(np.float32)

    def f(a: Any, b: Any) -> Any:
        z = matmul(a, b)
        e = exp(z * 0.3 - 0.1)
        return e / total(e, -1, True) + z * z

    y = f(Rounded(x, dtype="float32"), Rounded(w, dtype="float32"))
    got = f(x, w)
    assert got.dtype == np.float32
    check_close(got, y.value, y.tolerance)
    assert np.all(y.tolerance <= 1e-4 * (1 + np.abs(y.value)))


# ── each check finds what it is for ───────────────────────────────────────────────────────────────────

def cube(x: np.ndarray) -> np.ndarray:
    return x * x * x


def cube_vjp(factor: float) -> Any:
    return lambda xs, g: (cube(xs[0]), [factor * g * xs[0] ** 2])


def test_a_subtly_wrong_gradient_of_a_foreign_function_is_found() -> None:
    """A NumPy function with a hand-written gradient: right, wrong by 1 in 10⁶, transposed, and not summed."""
    x = np.array([0.3, -1.5, 2.0])
    check_adjoint(cube, x, vjp=cube_vjp(3.0))
    failure = fails(lambda: check_adjoint(cube, x, vjp=cube_vjp(3.000003)), "check_adjoint", "central differences")
    assert failure.bound is not None and failure.bound < 1e-8

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ b

    a, b = np.random.default_rng(0).normal(size=(2, 3, 3))
    check_adjoint(product, a, b, vjp=lambda xs, g: (None, [g @ xs[1].T, xs[0].T @ g]))
    fails(lambda: check_adjoint(product, a, b, vjp=lambda xs, g: (None, [g @ xs[1], xs[0].T @ g])))
    fails(lambda: check_adjoint(lambda p, q: p + q, a, a[0], vjp=lambda xs, g: (None, [g, g])), "shape (3, 3)")


def off(y: eg.Tensor, share: float) -> eg.Tensor:
    """y, whose gradients are wrong by this share of themselves."""
    return y + (y - y.detach()) * share


@pytest.mark.parametrize("name", [spec.name for spec in specs.values() if spec.analytic])
def test_rows_that_are_analytic_see_a_gradient_that_is_wrong_in_its_tenth_digit(name: str) -> None:
    row, function = specs[name], getattr(eg, name)
    case = row.example(Seeded(1, smooth=True, side=3, ndim=1))
    wrong = replace(row, call=lambda x: off(function(x), 1e-10))
    CHECKS["adjoint"].check(row, case=case, seed=0, create_graph=False)
    failure = fails(lambda: CHECKS["adjoint"].check(wrong, case=case, seed=0, create_graph=False), "a complex step")
    assert failure.bound < 1e-12 * abs(failure.want) + 1e-13


def test_a_complex_step_sees_what_differences_do_not() -> None:
    """A slope wrong by 10⁻¹² of itself."""
    x = np.array([0.3, -1.5, 2.0])
    check_adjoint(cube, x, vjp=cube_vjp(3.0), analytic=True)
    check_adjoint(cube, x, vjp=cube_vjp(3.0 + 3e-12))
    fails(lambda: check_adjoint(cube, x, vjp=cube_vjp(3.0 + 3e-12), analytic=True), "a complex step")
    check_adjoint(eg.sin, x, reference=np.sin, analytic=True)
    check_grads(eg.sin, x, reference=np.sin, analytic=True)
    check_grads(lambda t: off(eg.sin(t), 1e-12), x, reference=np.sin)
    fails(lambda: check_grads(lambda t: off(eg.sin(t), 1e-12), x, reference=np.sin, analytic=True), "a complex step")
    fails(lambda: check_grads(eg.sin, x, reference=lambda z: 1.001 * np.sin(z)), "central differences")
    with pytest.raises(TypeError, match="reference is None, expected a NumPy function"):
        check_grads(eg.sin, x, analytic=True)
    with pytest.raises(TypeError, match="expected complex"):
        check_adjoint(cube, x, reference=lambda z: cube(z).real, vjp=cube_vjp(3.0), analytic=True)


def test_a_capture_that_remembers_is_found() -> None:
    """A replay that keeps values, one that overwrites what it gave before, and one that is right."""
    def f(x: Any) -> Any:
        return x * 2.0

    check_capture(f, lambda x: x + x, np.ones(3))
    first: list[Any] = []

    def remembers(x: Any) -> Any:
        first.append(f(x))
        return first[0]

    fails(lambda: check_capture(f, remembers, np.ones(3)), "round 1")
    buffer = np.empty(3)

    def overwrites(x: Any) -> Any:
        buffer[:] = 2.0 * x.numpy()
        return buffer

    fails(lambda: check_capture(f, overwrites, np.ones(3)), "after round 2")
    fails(lambda: check_capture(f, lambda x: (x, x), np.ones(3)), "2 results")


def module_function(x: np.ndarray) -> np.ndarray:
    return x * x


def not_a_cube(x: Any) -> Any:
    return x * x * 1.5


def spoiling(x: np.ndarray) -> None:
    x += 1.0


def of_its_strides(x: eg.Tensor) -> eg.Tensor:
    return x * float(x.numpy().strides[0])


def of_its_device(x: eg.Tensor) -> eg.Tensor:
    return x * (1.0 if x.device == "cpu" else 3.0)


def two_lines() -> None:
    raise ValueError("one\ntwo")


CALLS: dict[str, Any] = {  # each fails, and its functions can be printed
    "assert_ulp": lambda: assert_ulp(np.float32([1, np.nan, 2]), [1, np.nan, 2.5], 3, "float32"),
    "check_close": lambda: check_close(np.float32([1, 2]), [1, 2.5], [0.1, 0.25]),
    "check_close of shapes": lambda: check_close(np.ones(2), np.ones(3), 1.0),
    "check_bits": lambda: check_bits(np.array([0.0, 1.0]), np.array([-0.0, 1.0])),
    "check_bits of types": lambda: check_bits(np.ones(2), np.ones(2, "float32")),
    "check_adjoint of shapes": lambda: check_adjoint(module_function, np.ones(2), vjp=lambda xs, g: (None, [g[:1]])),
    "check_layouts": lambda: check_layouts(of_its_strides, np.ones((2, 3))),
    "check_backends": lambda: check_backends(of_its_device, np.ones((3, 2))[:, 0], bound=0.5),
    "check_capture": lambda: check_capture(module_function, not_a_cube, np.ones(3)),
    "check_no_alias": lambda: check_no_alias(Same, np.ones(2)),
    "check_inputs_unmutated": lambda: check_inputs_unmutated(spoiling, np.ones(4)[::2]),
    "check_errors": lambda: check_errors(two_lines, ValueError, "one"),
    "check_errors of another kind": lambda: check_errors(two_lines, TypeError),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_check_prints_fails_in_the_same_way(name: str) -> None:
    failure = fails(CALLS[name], name.split()[0])
    with pytest.raises(CheckFailure) as again:
        exec(compile(failure.reproduction.replace("vjp = ...", "vjp = lambda xs, g: (None, [g[:1]])"), "again", "exec"),
             {})
    assert (again.value.check, str(again.value.got)) == (failure.check, str(failure.got))


@given(data=st.data())
def test_what_is_printed_lies_in_memory_as_it_did(data: Any) -> None:
    """Strides, alignment, whether it may be written to; and nothing is written outside of its own block."""
    x = data.draw(st_eg.arrays("float32"))
    for layout in [*LAYOUTS.values(), *FOREIGN.values(), zero_stride]:
        y = layout(x, np.random.default_rng(0))
        again = eval(rendered(y), {"array": np.array, "placed": placed, "unpacked": unpacked, "nan": np.nan})
        assert np.array_equal(again, y) and again.dtype == y.dtype
        assert not y.size or (placement(again), again.flags.aligned) == (placement(y), y.flags.aligned)


def test_an_odd_stride_ends_where_its_last_byte_does() -> None:
    """Two rows of three floats, 15 and 5 bytes apart: 29 bytes."""
    y = placed(np.arange(6, dtype="float32").reshape(2, 3), (15, 5))
    block = y.base
    assert isinstance(block, np.ndarray) and y.ctypes.data + 29 <= block.ctypes.data + block.nbytes
    assert placed(np.ones(3), shift=8).ctypes.data % 16 == 8 and not placed(np.ones(3), writeable=False).flags.writeable


def test_reproductions_run() -> None:
    """What a failure prints is a program that fails in the same way."""
    large = np.random.default_rng(0).normal(size=(20, 30))
    assert np.array_equal(eval(rendered(large), {"unpacked": unpacked}), large)
    odd: Any = [np.array([np.nan, -0.0, np.inf], np.float32), {"axis": None}, (1, np.int32(3)), np.zeros((0, 3))]
    again = eval(rendered(odd), {"array": np.array, "dtype": np.dtype, "nan": np.nan, "inf": np.inf})
    assert again[0].tobytes() == odd[0].tobytes() and again[1:3] == odd[1:3] and again[3].shape == (0, 3)
    assert type(again[2][1]) is np.int32

    def wrong(xs: Any, g: np.ndarray) -> Any:
        return None, [g * xs[0]]

    failure = fails(lambda: check_adjoint(module_function, np.ones(2), vjp=wrong))
    assert "import module_function as f" in failure.reproduction and "def wrong(xs" in failure.reproduction
    with pytest.raises(CheckFailure):
        exec(compile(failure.reproduction, "reproduction", "exec"), {})
    assert "cannot be printed" in fails(lambda: check_layouts(lambda t: t * float(t.numpy().strides[0]),
                                                              np.ones((2, 3)))).reproduction


def test_gradient_checks_refuse_float32_with_a_reason() -> None:
    check_errors(lambda: check_grads(lambda x: x * x, np.ones(2, np.float32)), TypeError, "float64", "3 or 4 digits")


def planted(rule: Any) -> Any:
    """y = x² as an op with a vjp of one's choice."""
    from engine.ops.registry import op

    @op("... -> ...", public=False)
    def planted_square(k: Any, x: Any) -> Any:
        return k.map("square", x)

    planted_square.vjp(rule)
    return planted_square


def right_rule(g: Any, x: Any) -> Any:
    return g * (x * 2.0)


def detached_rule(g: Any, x: Any) -> Any:
    return g * (x.detach() * 2.0)


def test_first_and_second_order_are_checked_apart() -> None:
    x = np.array([0.5, -2.0])
    check_grads(planted(right_rule), x)
    wrong_once = planted(lambda g, x: g * (x * 2.0000001))
    fails(lambda: check_grads(wrong_once, x), "check_adjoint")
    detached = planted(detached_rule)
    check_adjoint(detached, x)
    fails(lambda: check_second_order(detached, x), "check_second_order", "∂ₜ∂ₛ")
    of_g = planted(lambda g, x: g.detach() * (x * 2.0))
    check_adjoint(of_g, x)
    fails(lambda: check_second_order(of_g, x), "check_second_order: J v")
    fails(lambda: check_grads(of_g, x))
    check_grads(of_g, x, order=1)


def test_a_vjp_that_is_not_linear_is_found() -> None:
    x = np.array([0.5, -2.0])
    check_linear_vjp(cube_vjp(3.0), [x], x.shape)
    fails(lambda: check_linear_vjp(lambda xs, g: (None, [g * g]), [x], x.shape), "check_linear_vjp: −2u")
    fails(lambda: check_linear_vjp(lambda xs, g: (None, [np.abs(g).max() * np.sign(g)]), [x], x.shape), "u − 2w")


class Same:
    """A result whose backward puts one tensor into all gradients."""

    def __init__(self, *leaves: eg.Tensor):
        self.leaves, self.shape, self.numpy = leaves, leaves[0].shape, leaves[0].numpy

    def backward(self, g: eg.Tensor) -> None:
        for leaf in self.leaves:
            leaf.grad = g


def test_aliased_gradients_are_found() -> None:
    x, y = np.ones(2), np.ones(2)
    check_no_alias(lambda a, b: a + b, x, y)
    fails(lambda: check_no_alias(Same, x, y), "gradient 0 and gradient 1 share memory")
    fails(lambda: check_no_alias(Same, x), "gradient 0 and cotangent share memory")


def test_a_function_of_arrays_where_gradients_are_asked_for() -> None:
    x = np.array([0.5, -2.0])
    for check in (check_no_alias, check_second_order, check_adjoint, check_grads):
        check_errors(lambda check=check: check(np.sin, x), TypeError, "f gave ndarray, expected a tensor")  # type: ignore
    check_layouts(lambda t: np.sin(t.numpy()), x)
    check_layouts(np.sin, x)


def test_layout_dependence_is_found() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4))
    check_layouts(lambda t: t * 2.0, x)
    fails(lambda: check_layouts(lambda t: t * (2.0 if 0 in t.numpy().strides else 1.0), x), "zero stride against C")
    fails(lambda: check_layouts(lambda t: t * float(t.numpy().strides[0]), x), "check_layouts")


def test_thread_dependence_is_found() -> None:
    if not isinstance(get_backend("cpu"), CpuBackend):
        pytest.skip("no compiled kernels, so no threads")
    check_threads(lambda: eg.ones(3))
    fails(lambda: check_threads(lambda: eg.ones(3) * float(eg.get_num_threads())), "2 threads against 1")
    calls: list[int] = []

    def fickle() -> eg.Tensor:
        calls.append(1)
        return eg.ones(1) * float(len(calls) // 5)

    fails(lambda: check_threads(fickle), "1 threads against 1")


def test_backends_that_differ_and_inputs_that_change_are_found() -> None:
    check_backends(lambda t: t * 2.0, np.ones(3), bound=0.0)
    fails(lambda: check_backends(lambda t: t * (2.0 if t.device == "cpu" else 3.0), np.ones(3), bound=0.5))
    check_inputs_unmutated(lambda a: a * 2, np.ones(3))

    def spoil(a: np.ndarray) -> None:
        a[0] = 5.0

    fails(lambda: check_inputs_unmutated(spoil, np.ones(3)), "input 0 changed")
    fails(lambda: check_inputs_unmutated(lambda a, b: spoil(b), np.ones(3), np.ones(3)), "input 1 changed")


def test_errors_are_checked_for_kind_words_and_length() -> None:
    def fail(text: str) -> Any:
        raise ValueError(text)

    check_errors(lambda: fail("op: x is 1, expected 2"), ValueError, "op", "expected 2")
    fails(lambda: check_errors(lambda: fail("op: bad"), ValueError, "expected"), "one line with 'expected'")
    fails(lambda: check_errors(lambda: fail("op\nbad"), ValueError, "op"))
    fails(lambda: check_errors(lambda: fail("op"), TypeError), "ValueError: op")
    fails(lambda: check_errors(lambda: None, TypeError), "no error")


@pytest.mark.parametrize(("got", "want", "bound"), [
    (1.0, np.nan, 1.0), (np.nan, 1.0, 1.0), (np.inf, 1.0, 1.0), (-np.inf, np.inf, 1.0), (0.0, -0.0, 0.0),
    (1.0, 1.5, 0.4), (np.inf, 3.0e38, 1.0), (1.0, np.inf, 1.0)])
def test_check_close_and_check_bits_tell_special_values_apart(got: float, want: float, bound: float) -> None:
    fails(lambda: check_close(np.float32([got]), [want], bound))
    fails(lambda: check_bits(np.float32([got]), np.float32([want]), check="bits"))


def test_check_close_accepts_what_rounds_so() -> None:
    got = np.float32([np.inf, 3.4028235e38, np.nan, -0.0])
    check_close(got, [3.5e38, 3.4028236e38, np.nan, -0.0], [1e37, 1e32, 0, 0])
    fails(lambda: check_close(np.float32([1]), [[1.0]], 1.0), "equal shapes")


# ── each check of a row finds what it is for ──────────────────────────────────────────────────────────

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
def test_each_check_of_a_row_finds_what_it_is_for(name: str) -> None:
    check, spec = CHECKS[name], PLANTED[name]
    assert check.applies(spec)
    if name == "threads" and not isinstance(get_backend("cpu"), CpuBackend):
        pytest.skip("no compiled kernels, so no threads")

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
