"""The checks of the laboratory: each finds what it is for, and what it prints fails again."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import Same, fails, off

import engine as eg
from engine.testing import (
    CheckFailure,
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
    placed,
    rendered,
    unpacked,
)
from engine.testing import strategies as st_eg
from engine.testing.layouts import FOREIGN, LAYOUTS, placement, zero_stride


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


def test_aliased_gradients_are_found() -> None:
    x, y = np.ones(2), np.ones(2)
    check_no_alias(lambda a, b: a + b, x, y)
    fails(lambda: check_no_alias(Same, x, y), "gradient 0 and gradient 1 share memory")
    fails(lambda: check_no_alias(Same, x), "gradient 0 and cotangent share memory")


def test_a_function_of_arrays_where_gradients_are_asked_for() -> None:
    x = np.array([0.5, -2.0])
    for check in (check_no_alias, check_second_order, check_adjoint, check_grads):
        check_errors(partial(check, np.sin, x), TypeError, "f gave ndarray, expected a tensor")
    check_layouts(lambda t: np.sin(t.numpy()), x)
    check_layouts(np.sin, x)


def test_layout_dependence_is_found() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4))
    check_layouts(lambda t: t * 2.0, x)
    fails(lambda: check_layouts(lambda t: t * (2.0 if 0 in t.numpy().strides else 1.0), x), "zero stride against C")
    fails(lambda: check_layouts(lambda t: t * float(t.numpy().strides[0]), x), "check_layouts")


def test_thread_dependence_is_found(told_threads: None) -> None:
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
