"""OpSpec: one row for an op, from which all its checks are made.

    OpSpec("tanh", lambda s: ([s.array(s.shape())], {}), reference=np.tanh, ulps="tanh")

A row says how an example is drawn (in terms of a Source, so that Hypothesis, a seed and a benchmark can all draw one),
what the op is (a reference in NumPy, or a formula whose error bound comes with it), how exact it must be, and what is
special about it. `register` makes it known; the engine's own rows are in engine/testing/rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.ops import registry as ops
from engine.testing.bounds import smallest_subnormal, spacing, unit_roundoff
from engine.testing.checks import as_tensor
from engine.testing.rounded import Rounded, function_ulps
from engine.testing.source import Source

Drawing = Callable[[Source], "tuple[list[Any], dict[str, Any]]"]

# ULPs that a float64 reference may be off itself. It calls at most one function of the C library or NumPy, 3 ULPs (an
# assumption: glibc's manual knows of at most 2), and rounds at most twice more, ½ ULP each. One that is further off
# gives a false alarm; a kernel that is wrong gets 9·10⁻¹⁶ of its result more room.
SEVERAL = 4.0


@dataclass
class Case:
    """One example: operands (arrays, None, or lists of arrays for ops of a sequence), attributes, and its type."""

    operands: list[Any]
    attributes: dict[str, Any]
    dtype: np.dtype
    special: bool = False


@dataclass(frozen=True)
class ErrorCase:
    """A call that must fail: with this exception, in one line that contains these words."""

    call: Callable[[], Any]
    kind: type[BaseException]
    words: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class OpSpec:
    """One op's row.

    name:       the op's public name; `call` is how it is called, registry[name] by default
    draw:       Source -> (operands, attributes)
    reference:  the op in NumPy on float64 operands; the registry row's by default
    formula:    instead: an equation over Rounded operands, which is reference and error bound in one (formulas.py)
    ulps:       a function's name, in rounded.FLOAT32_ULPS or NumPy's: that accuracy is asked for (of float32 if there
                is a formula)
                Neither formula nor ulps: the op is exact, or rounds once, correctly.
    wrt:        the operands that gradients flow to; () for none
    analytic:   the op in NumPy on complex operands, where it is analytic and a few operations that do not cancel give
                its derivative: the adjoint check takes a complex step then, and sees errors of 10⁻¹⁴
    gradient:   an equation of the vjp over Rounded (g, *operands), for ops with a kernel vjp
    linear:     the operands in which it is linear (each alone)
    batch:      how to draw an example with two rows or more, and which operands have them along their first axis:
                each row alone must give the same bits as in the batch
    large:      how to draw an example large enough to be spread over threads
    integers:   also takes integer operands; compared with the reference on the same integers
    special:    whether ±0, ±∞, NaN and subnormals are part of its examples
    signed_zero: whether the sign of a zero result is part of the definition; max(−0, +0) may be either, as in NumPy
    cancels:    roundings of size 1 that the op's composition, by which it is differentiated twice, loses to
                cancellation where the reference does not
    view:       whether the result may share memory with an operand
    call:       how it is called, instead of registry[name]
    vjp:        for a function that is not the engine's: `call` is given NumPy arrays, and
                vjp(operands, g, **attributes) returns (y, [one gradient for each operand in wrt]). Its values are
                checked if there is a reference or a formula.
    errors:     calls that must fail
    """

    name: str
    draw: Drawing
    reference: Callable[..., Any] | None = None
    formula: Callable[..., Any] | None = None
    ulps: str | None = None
    wrt: tuple[int, ...] = (0,)
    analytic: Callable[..., Any] | None = None
    gradient: Callable[..., Any] | None = None
    linear: tuple[int, ...] = ()
    batch: tuple[Drawing, tuple[int, ...]] | None = None
    large: Drawing | None = None
    integers: bool = False
    special: bool = False
    signed_zero: bool = True
    cancels: float = 0.0
    view: bool = False
    call: Callable[..., Any] | None = None
    vjp: Callable[..., Any] | None = None
    errors: Sequence[ErrorCase] = field(default=())

    def __repr__(self) -> str:
        return f"specs[{self.name!r}]"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # how Hypothesis prints it
        printer.text(repr(self))

    @property
    def op(self) -> str:
        """The public name of the op that this is a row of."""
        return self.name.split(":")[0]

    # ── calling it ──────────────────────────────────────────────────────────────────────────────────

    def example(self, source: Source, draw: Drawing | None = None) -> Case:
        operands, attributes = (draw or self.draw)(source)
        return Case(operands, attributes, source.dtype, source.has_special)

    def run(self, operands: Sequence[Any], attributes: dict[str, Any]) -> Any:
        """The op on tensors (or on arrays, which become tensors in their own layout)."""
        if self.vjp is not None:
            assert self.call is not None
            return self.call(*operands, **attributes)
        made = [[as_tensor(x) for x in o] if isinstance(o, list) else as_tensor(o) for o in operands]
        return (self.call or ops[self.op])(*made, **attributes)

    def function(self, case: Case) -> Callable[..., Any]:
        """The op as a function of the operands in `wrt` alone, the rest of the case fixed."""
        def f(*xs: Any) -> Any:
            return self.run(self._filled(case, xs), case.attributes)
        f.__name__ = self.name
        return f

    def vjp_function(self, case: Case) -> Callable[..., Any] | None:
        """(xs, g) -> (y, gradients of the operands in `wrt`), where the row has a vjp of its own."""
        vjp = self.vjp
        return vjp and (lambda xs, g: vjp(self._filled(case, xs), g, **case.attributes))

    def numpy_function(self, case: Case) -> Callable[..., np.ndarray]:
        """The same for the reference."""
        def f(*xs: np.ndarray) -> np.ndarray:
            with np.errstate(all="ignore"):
                return np.asarray(self._oracle(self._filled(case, xs), case.attributes))
        return f

    def complex_function(self, case: Case) -> Callable[..., np.ndarray] | None:
        """The same for `analytic`, where the row has it."""
        analytic = self.analytic
        return analytic and (lambda *xs: np.asarray(analytic(*self._filled(case, xs), **case.attributes)))

    def _filled(self, case: Case, xs: Sequence[Any]) -> list[Any]:
        """The case's operands with those in `wrt` replaced. One list of operands counts as one."""
        operands = list(case.operands)
        if operands and isinstance(operands[0], list):
            return [list(xs)]
        for i, x in zip(self.differentiable(case), xs):
            operands[i] = x
        return operands

    def differentiable(self, case: Case) -> list[int]:
        return [i for i in self.wrt if i < len(case.operands) and case.operands[i] is not None]

    def points(self, case: Case) -> list[np.ndarray]:
        """The operands in `wrt`."""
        if case.operands and isinstance(case.operands[0], list):
            return list(case.operands[0])
        return [case.operands[i] for i in self.differentiable(case)]

    # ── what it should give ─────────────────────────────────────────────────────────────────────────

    def _oracle(self, operands: Sequence[Any], attributes: dict[str, Any]) -> Any:
        f = self.formula or self.reference or (self.call if self.vjp else ops[self.op].reference)
        if f is None:
            raise LookupError(f"{self.name}: its row has neither reference nor formula")
        return f(*operands, **attributes)

    def expected(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """(value in float64, bound on the error of computing it in the case's type)."""
        wide = [_wide(o) for o in case.operands]
        use_formula = self.formula is not None and (self.ulps is None or case.dtype.itemsize == 8)
        with np.errstate(all="ignore"):
            if use_formula:
                y = self._oracle([_rounded(o, case.dtype) for o in wide], case.attributes)
                return (y.value, y.tolerance) if isinstance(y, Rounded) else (np.asarray(y), np.zeros(np.shape(y)))
            value = np.asarray(self._oracle(wide, case.attributes))
            if value.dtype.kind != "f":
                return value, np.zeros(value.shape)
            if self.ulps is None:  # round the reference once: + − × ÷ √ round so in their own type (Figueroa 1995)
                least = 0.0 if self.signed_zero else smallest_subnormal(str(case.dtype))
                return value.astype(case.dtype).astype(np.float64), np.full(value.shape, least)
            allowed = function_ulps(self.ulps, str(case.dtype)) + (SEVERAL if case.dtype.itemsize == 8 else 0)
            scale = spacing(np.where(np.isfinite(value), value, 1.0), str(case.dtype))
            return value, np.where(value == 0, 0.0, allowed * scale)  # a zero is exact, and has its sign

    def gradient_expected(self, case: Case, g: np.ndarray) -> list[Any]:
        """For each operand, its gradient as a Rounded, from the row's equation of the vjp; None where there is none."""
        assert self.gradient is not None
        with np.errstate(all="ignore"):
            found = self.gradient(*[_rounded(_wide(o), case.dtype) for o in (g, *case.operands)], **case.attributes)
        return list(found) if isinstance(found, tuple) else [found]

    def rounding(self, case: Case) -> np.ndarray | None:
        """A bound on the error of one evaluation of the reference in float64, for the differences; None if unknown."""
        if self.vjp is not None and self.formula is None:
            return None
        value, bound = self.expected(Case(case.operands, case.attributes, np.dtype("float64")))
        if value.dtype.kind != "f":
            return bound
        return bound + unit_roundoff("float64") * (SEVERAL * np.abs(value) + self.cancels)


def _wide(operand: Any) -> Any:
    """Floats as float64; the rest as it is."""
    if isinstance(operand, list):
        return [_wide(o) for o in operand]
    if isinstance(operand, np.ndarray) and operand.dtype.kind == "f":
        return operand.astype(np.float64)
    return operand


def _rounded(operand: Any, dtype: np.dtype) -> Any:
    if isinstance(operand, list):
        return [_rounded(o, dtype) for o in operand]
    if isinstance(operand, np.ndarray) and operand.dtype.kind == "f":
        return Rounded(operand, dtype=str(dtype))
    return operand


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────

specs: dict[str, OpSpec] = {}
"""Every row by name. One op may have several rows ("sum", "sum: integers"): the name up to a colon is the op's."""


def register(spec: OpSpec) -> OpSpec:
    """Make a row known."""
    if spec.name in specs:
        raise ValueError(f"register: there is a row named {spec.name!r} already")
    if spec.vjp is not None and spec.call is None:
        raise ValueError(f"register: the row {spec.name!r} has a vjp of its own, expected `call` as well")
    specs[spec.name] = spec
    return spec
