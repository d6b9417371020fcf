"""Other people's functions under the laboratory: the worked example of tests/README.md as printed, and bugs planted in
NumPy, autograd (HIPS) and PyTorch functions. The libraries' own tests are left out where they are not installed."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.testing import CheckFailure, OpSpec, check_adjoint, check_linear_vjp, foreign, register, specs
from engine.testing.rounded import tanh
from engine.testing.row_checks import CHECKS
from engine.testing.strategies import checks_of

README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def own_rows() -> Iterator[None]:
    """Rows that a test registers are forgotten after it."""
    before = dict(specs)
    yield
    specs.clear()
    specs.update(before)


# ── the worked example ────────────────────────────────────────────────────────────────────────────────

def shown(text: str) -> list[tuple[str, str]]:
    """(program, what it prints) of each Python block that is followed by a block of output."""
    return re.findall(r"```python\n((?:(?!```).)*)```\s+prints\s+```\n(.*?)```", text, flags=re.S)


def matches(expected: str, printed: str) -> bool:
    """Equal but for `...`, which stands for anything."""
    return re.fullmatch(".*?".join(map(re.escape, expected.split("..."))), printed, flags=re.S) is not None


def test_the_worked_example_runs_as_printed() -> None:
    examples = shown(README)
    assert len(examples) == 1
    program, expected = examples[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "tests/README.md", "exec"), {"__name__": "readme"})
    assert matches(expected, printed.getvalue()), printed.getvalue()
    assert "array([[" not in printed.getvalue(), "the example did not shrink"


def test_a_wrong_output_would_be_seen() -> None:
    assert matches("a ... c\n", "a b c\n") and not matches("a ... c\n", "a b d\n")


# ── planted bugs ──────────────────────────────────────────────────────────────────────────────────────

def row(name: str, call: Callable[..., Any], vjp: Callable[..., Any], **options: Any) -> OpSpec:
    """x (…, n) and a weight (n,)."""
    def draw(s: Any) -> Any:
        n = s.side(1)
        return [s.array((*s.shape(0, 2), n)), s.array((n,))], {}
    return register(OpSpec(name, draw, call=call, vjp=vjp, wrt=(0, 1), **options))


def caught(spec: OpSpec) -> CheckFailure:
    """The failure that the row's checks end in; its reproduction fails as well."""
    with pytest.raises(CheckFailure) as found:
        for check in checks_of(spec):
            check()
    with pytest.raises(CheckFailure):
        exec(compile(found.value.reproduction, "reproduction", "exec"), {})
    return found.value


def weighted(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.tanh(x) * w


def bounded(x: Any, w: Any) -> Any:
    """The same over numbers that carry error bounds: the tolerance of the values."""
    return tanh(x) * w


def numpy_vjp(slope: Callable[[np.ndarray], np.ndarray], rows: Callable[[np.ndarray], np.ndarray]) -> Any:
    def vjp(xs: Any, g: np.ndarray) -> Any:
        x, w = xs
        return weighted(x, w), [g * w * slope(np.tanh(x)), rows(g * np.tanh(x))]
    return vjp


def all_rows(d: np.ndarray) -> np.ndarray:
    return np.asarray(d.sum(tuple(range(d.ndim - 1))))


def test_numpy() -> None:
    right = row("right", weighted, numpy_vjp(lambda y: 1 - y * y, all_rows), formula=bounded)
    assert [c.__name__ for c in checks_of(right)] == ["right: forward", "right: adjoint", "right: linear_vjp"]
    for check in checks_of(right):
        check()
    failure = caught(row("slope", weighted, numpy_vjp(lambda y: 1 - y, all_rows)))
    assert failure.check == "check_adjoint" and "array([" in failure.reproduction
    failure = caught(row("rows", weighted, numpy_vjp(lambda y: 1 - y * y, lambda d: d)))
    assert "shape" in str(failure.want)
    failure = caught(row("value", weighted, numpy_vjp(lambda y: 1 - y * y, all_rows),
                         formula=lambda x, w: bounded(x, w) * 1.001))
    assert failure.check == "value: forward"
    with pytest.raises(ValueError, match="call"):
        register(OpSpec("no call", right.draw, vjp=right.vjp))


def test_a_vjp_that_is_not_linear() -> None:
    def clipped(xs: Any, g: np.ndarray) -> Any:
        return xs[0] * 2.0, [np.clip(2.0 * g, -1, 1)]

    with pytest.raises(CheckFailure):
        check_linear_vjp(clipped, [np.ones(3)], (3,))
    assert "linear_vjp" in CHECKS


def test_autograd() -> None:
    anp = pytest.importorskip("autograd.numpy")
    extend = pytest.importorskip("autograd.extend")

    def function(swish: Any) -> Callable[..., Any]:
        return lambda x, w: anp.sum(swish(x) * w, axis=-1)

    call, vjp = foreign.of_autograd(function(lambda x: x / (1 + anp.exp(-x))))
    for check in checks_of(row("autograd", call, vjp)):
        check()

    @extend.primitive
    def swish(x: Any) -> Any:
        return x / (1 + np.exp(-x))

    def wrong(y: Any, x: Any) -> Any:  # σ(x) (1 + x (1 − σ(x))) without its x
        s = 1 / (1 + np.exp(-x))
        return lambda g: g * s * (2 - s)

    extend.defvjp(swish, wrong)
    assert caught(row("autograd wrong", *foreign.of_autograd(function(swish)))).check == "check_adjoint"


def test_torch() -> None:
    torch = pytest.importorskip("torch")

    def function(x: Any, w: Any) -> Any:
        return torch.nn.functional.silu(x) * w

    for check in checks_of(row("torch", *foreign.of_torch(function))):
        check()

    class Wrong(torch.autograd.Function):
        """x/(1 + |x|), whose derivative is 1/(1 + |x|)²."""

        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x / (1 + x.abs())

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            (x,) = ctx.saved_tensors
            return g / (1 + x.abs() ** 2)

    def planted(x: Any, w: Any) -> Any:
        return Wrong.apply(x) * w

    call, vjp = foreign.of_torch(planted)
    assert caught(row("torch wrong", call, vjp)).check == "check_adjoint"
    detached, detached_vjp = foreign.of_torch(lambda x, w: torch.tanh(x).detach() * w)
    with pytest.raises(CheckFailure):
        check_adjoint(detached, np.array([0.5, -1.0]), np.array([1.0, 2.0]), vjp=detached_vjp)
