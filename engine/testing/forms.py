"""The instructions that random programs are made of (programs.py): how each is written, and what it means.

    Form("tanh", "eg.tanh({0})", rounded.tanh)

`text` is what a program's source says, {0} {1} {2} being its operands and {name} an attribute; that source is what the
engine runs. `formula` is the same in float64 NumPy and, over Rounded numbers, its error bound. The two know nothing of
each other, so each is held against the other.

Where an instruction takes a decision (max, relu, where), the decision at the point itself is `held` while differences
are taken around it. So every program is smooth along them, and its slope is the one that the op's convention
gives: 0 for relu at 0, equal shares at a tie, nothing through detach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.testing import formulas, rounded
from engine.testing.rounded import Number, Rounded, plain, where

Fits = Callable[[Sequence[np.ndarray], int], "dict[str, Any] | None"]


def _always(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    return {}


@dataclass(frozen=True)
class Form:
    """One kind of instruction.

    fits:     (operands' values, a number that chooses) -> attributes, or None where it cannot be applied
    holds:    what is decided at the point itself, from operands and attributes: formula(..., held=that)
    certain:  whether rounding cannot turn the decision, from operands as Rounded and attributes
    jumps:    its result, not only its slope, depends on the decision
    view:     its result shares its operand's memory; "perhaps" if that depends on the layout
    moved:    it may see operands or its result through views, and what had a view is not bound anew in a graph
    writes:   it is written into its first operand
    through:  the operands that gradients flow to; None for all
    """

    name: str
    text: str
    formula: Callable[..., Number]
    operands: int = 1
    fits: Fits = _always
    holds: Callable[..., Any] | None = None
    certain: Callable[..., bool] = lambda *xs, **attributes: True
    jumps: bool = False
    view: bool | str = False
    moved: bool = False
    writes: bool = False
    through: tuple[int, ...] | None = None

    def tracks(self, operands: Sequence[int], tracked: set[int]) -> bool:
        """Whether gradients flow to an operand, given the variables that they flow to."""
        through = operands if self.through is None else [operands[i] for i in self.through]
        return bool(tracked.intersection(through))


FORMS: dict[str, Form] = {}
"""By name, the simplest first: examples shrink towards the front."""


def add_form(form: Form) -> Form:
    """Let random programs use an instruction; one's own as well as these."""
    if form.name in FORMS:
        raise ValueError(f"add_form: there is a form named {form.name!r} already")
    FORMS[form.name] = form
    return form


# ── when a form fits ──────────────────────────────────────────────────────────────────────────────────

def _within(low: float, high: float) -> Fits:
    """Every element in [low, high]."""
    return lambda xs, pick: {} if xs[0].size and low <= xs[0].min() and xs[0].max() <= high else None


def _broadcast(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    try:
        np.broadcast_shapes(*[x.shape for x in xs])
    except ValueError:
        return None
    return {}


def _divisible(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    return _broadcast(xs, pick) if np.abs(xs[1]).min(initial=1.0) >= 0.25 else None


def _into_first(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    """The second broadcasts to the first's shape."""
    fits = _broadcast(xs, pick) is not None and np.broadcast_shapes(*[x.shape for x in xs]) == xs[0].shape
    return {} if fits else None


def _first_row(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    return _into_first([xs[0][0], xs[1]], pick) if xs[0].ndim and xs[0].size else None


def _axis(least: int = 1) -> Fits:
    """One axis, of at least this length."""
    def fits(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
        axes = [i for i, n in enumerate(xs[0].shape) if n >= least]
        return {"axis": axes[-1 - pick % len(axes)]} if axes else None
    return fits


def _axes(least: int = 1) -> Fits:
    """One axis or all, with or without keepdims."""
    def fits(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
        if xs[0].size < least:
            return None
        axes: list[int | None] = [None, *[i for i, n in enumerate(xs[0].shape) if n >= least]]
        return {"axis": axes[pick // 2 % len(axes)], "keepdims": bool(pick % 2)}
    return fits


def _rows_spread(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    """Rows with a spread that a norm can divide by, and weights of their length."""
    n = xs[0].shape[-1] if xs[0].ndim else 0
    fits = n > 1 and all(w.shape == (n,) for w in xs[1:]) and xs[0].std(-1).min(initial=1.0) > 0.25
    return {} if fits else None


def _ndim(least: int, most: int = 4) -> Fits:
    return lambda xs, pick: {} if least <= xs[0].ndim <= most and xs[0].size else None


# ── functions ─────────────────────────────────────────────────────────────────────────────────────────

def _function(name: str, formula: Callable[..., Number] | None = None, low: float = -32, high: float = 32,
              **rest: Any) -> None:
    add_form(Form(name, f"eg.{name}({{0}})", formula or getattr(rounded, name), fits=_within(low, high), **rest))


def _decided(x: Rounded) -> bool:
    """Whether every element is surely above, below, or at 0."""
    return bool(np.all((np.abs(x.value) > x.tolerance) | (x.error == 0)))


def _apart(*xs: Rounded) -> bool:
    return _decided(xs[0] - xs[1])


def _relu(x: Number, held: Any = None) -> Number:
    return formulas.relu(x) if held is None else where(held, x, 0.0)


def _abs(x: Number, held: Any = None) -> Number:
    return rounded.absolute(x) if held is None else x * held


def _maximum(a: Number, b: Number, held: Any = None) -> Number:
    return rounded.maximum(a, b) if held is None else a * held + b * (1 - held)


def _select(a: Number, b: Number, c: Number, held: Any = None) -> Number:
    return where(plain(a) > plain(b) if held is None else held, a, c)


_function("tanh")
_function("sin")
_function("square", lambda x: x * x)
_function("negative", lambda x: -x)
_function("cos")
_function("sigmoid")
_function("exp", low=-20, high=3)
_function("expm1", low=-20, high=3)
_function("log", low=0.125)
_function("log1p", low=-0.75)
_function("sqrt", low=0.125)
_function("rsqrt", low=0.125)
_function("softplus")
_function("erf")
_function("silu", formulas.silu)
_function("gelu", formulas.gelu, low=-0.5)  # below, its composition cancels (rows/elementwise.py)
_function("relu", _relu, holds=lambda x: x > 0, certain=_decided)
_function("abs", _abs, holds=np.sign, certain=_decided)

add_form(Form("add", "{0} + {1}", lambda a, b: a + b, 2, _broadcast))
add_form(Form("subtract", "{0} - {1}", lambda a, b: a - b, 2, _broadcast))
add_form(Form("multiply", "{0} * {1}", lambda a, b: a * b, 2, _broadcast))
add_form(Form("divide", "{0} / {1}", lambda a, b: a / b, 2, _divisible))
add_form(Form("maximum", "eg.maximum({0}, {1})", _maximum, 2, _broadcast,
              holds=lambda a, b: np.heaviside(a - b, 0.5), certain=_apart))
add_form(Form("scale", "{0} * {factor}", lambda x, factor: x * factor,
              fits=lambda xs, pick: {"factor": (0.5, -1.5, 2.0, 3.0)[pick % 4]}))
add_form(Form("rsubtract", "{constant} - {0}", lambda x, constant: constant - x,
              fits=lambda xs, pick: {"constant": (1.0, 0.25)[pick % 2]}))
add_form(Form("where", "eg.where({0} > {1}, {0}, {2})", _select, 3, _broadcast, holds=lambda a, b, c: a > b,
              certain=_apart, jumps=True, through=(0, 2)))

# ── reductions ────────────────────────────────────────────────────────────────────────────────────────


def _max(x: Number, axis: Any, keepdims: bool, held: Any = None) -> Number:
    return rounded.largest(x, axis, keepdims) if held is None else rounded.total(x * held, axis, keepdims)


def _max_shares(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    top = x == x.max(axis=axis, keepdims=True)
    return np.asarray(top / top.sum(axis=axis, keepdims=True))


def _max_decided(x: Rounded, axis: Any, keepdims: bool) -> bool:
    """One element is surely the largest, or all are exact."""
    could = x.value + x.tolerance >= (x.value - x.tolerance).max(axis=axis, keepdims=True)
    return bool(np.all(x.error == 0) or could.sum(axis).max() == 1)


_CALL = "({0}, axis={axis}, keepdims={keepdims})"
add_form(Form("sum", f"eg.sum{_CALL}", rounded.total, fits=_axes()))
add_form(Form("mean", f"eg.mean{_CALL}", rounded.mean, fits=_axes()))
add_form(Form("max", f"eg.max{_CALL}", _max, fits=_axes(), holds=_max_shares, certain=_max_decided))
add_form(Form("logsumexp", f"eg.logsumexp{_CALL}", formulas.logsumexp, fits=_axes()))
add_form(Form("var", f"eg.var{_CALL}", lambda x, axis, keepdims: formulas.variance(x, axis, 0.0, keepdims),
              fits=_axes(2)))
add_form(Form("softmax", "eg.softmax({0}, axis={axis})", formulas.softmax, fits=_axis(), moved=True))
add_form(Form("log_softmax", "eg.log_softmax({0}, axis={axis})", formulas.log_softmax, fits=_axis(), moved=True))
add_form(Form("rms_norm", "eg.rms_norm({0}, {1}, eps=0.1)", lambda x, w: formulas.rms_norm(x, w, 0.1), 2,
              _rows_spread))
add_form(Form("layer_norm", "eg.layer_norm({0}, {1}, {2}, eps=0.1)",
              lambda x, w, b: formulas.layer_norm(x, w, b, 0.1), 3, _rows_spread))
add_form(Form("cross_entropy", "eg.cross_entropy({0}, eg.tensor({target}))", formulas.cross_entropy,
              fits=lambda xs, pick: {"target": [(pick + i) % xs[0].shape[1] for i in range(len(xs[0]))]}
              if xs[0].ndim == 2 and xs[0].size else None))

# ── movement ──────────────────────────────────────────────────────────────────────────────────────────


def _moves(name: str, text: str, f: Callable[..., np.ndarray], fits: Fits, view: bool | str = True) -> None:
    def formula(x: Number, **attributes: Any) -> Number:
        return x.moved(lambda v: f(v, **attributes)) if isinstance(x, Rounded) else f(x, **attributes)
    add_form(Form(name, text, formula, fits=fits, view=view))


def _cut(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    if not xs[0].ndim or xs[0].shape[-1] < 2:
        return None
    return {"start": (1, 0, None)[pick % 3], "step": (1, 2, -1)[pick % 3]}


def _rows_taken(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    """Some rows, one of them twice."""
    n = xs[0].shape[0] if xs[0].ndim else 0
    return {"index": [pick % n, (pick + 1) % n, pick % n]} if n else None


def _widened(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    return {"shape": (2, *xs[0].shape)} if xs[0].size <= 24 and xs[0].ndim < 4 else None


_moves("transpose", "{0}.T", lambda x: x.T, _ndim(2, 2))
_moves("reshape", "{0}.reshape(-1)", lambda x: x.reshape(-1), _ndim(0), "perhaps")
_moves("slice", "{0}[..., {start}::{step}]", lambda x, start, step: x[..., start::step], _cut)
_moves("row", "{0}[0]", lambda x: x[0, ...], _ndim(1))
_moves("flip", "eg.flip({0}, {axis})", lambda x, axis: np.flip(x, axis), _axis())
_moves("expand_dims", "{0}.expand_dims(0)", lambda x: x[None], _ndim(0, 3))
_moves("broadcast_to", "{0}.broadcast_to({shape})", np.broadcast_to, _widened)
_moves("take", "eg.take({0}, eg.tensor({index}), axis=0)", lambda x, index: np.take(x, index, 0), _rows_taken, False)
_moves("tril", "eg.tril({0})", np.tril, _ndim(2), False)
add_form(Form("concat", "eg.concat([{0}, {1}], axis=-1)", lambda a, b: rounded.join([a, b], -1), 2,
              lambda xs, pick: {} if xs[0].ndim and xs[1].ndim and xs[0].shape[:-1] == xs[1].shape[:-1] else None))

# ── products ──────────────────────────────────────────────────────────────────────────────────────────


def _chained(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    a, b = xs
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        return None
    return {} if b.ndim < 3 or a.ndim < 3 or a.shape[:-2] == b.shape[:-2] else None


def _affine(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    x, weight, bias = xs
    fits = x.ndim and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and bias.shape == weight.shape[:1]
    return {} if fits else None


def _predicting(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    x, weight, _ = xs
    if x.ndim != 2 or not x.size or _affine(xs, pick) is None or not len(weight):
        return None
    return {"target": [(pick + i) % len(weight) for i in range(len(x))]}


def _attended(xs: Sequence[np.ndarray], pick: int) -> dict[str, Any] | None:
    query, key, value = xs
    fits = all(x.ndim == 2 and x.size for x in xs) and query.shape[1] == key.shape[1] and key.shape == value.shape
    return {"causal": bool(pick % 2) and len(query) <= len(key)} if fits else None


add_form(Form("matmul", "{0} @ {1}", formulas.matrix_product, 2, _chained, moved=True))
add_form(Form("linear", "eg.linear({0}, {1}, {2})", formulas.linear, 3, _affine, moved=True))
add_form(Form("linear_cross_entropy", "eg.linear_cross_entropy({0}, {1}, eg.tensor({target}), {2})",
              lambda x, w, b, target: formulas.linear_cross_entropy(x, w, target, b), 3, _predicting))
add_form(Form("attention", "eg.scaled_dot_product_attention({0}, {1}, {2}, causal={causal})",
              lambda q, k, v, causal: formulas.attention(q, k, v, causal=causal), 3, _attended, moved=True))

# ── what is no mathematics: graphs, memory ────────────────────────────────────────────────────────────


def _detached(x: Number, held: Any = None) -> Number:
    return x if held is None else held


def _row_written(x: Number, value: Number) -> Number:
    """x with x[0] = value."""
    if isinstance(x, Rounded) or isinstance(value, Rounded):
        dtype = x.dtype if isinstance(x, Rounded) else value.dtype
        x, value = (v if isinstance(v, Rounded) else Rounded(v, dtype=dtype) for v in (x, value))
        return Rounded(_row_written(x.value, value.value), _row_written(x.error, value.error), dtype=dtype)
    y = np.array(x)
    y[0] = value
    return y


add_form(Form("detach", "{0}.detach()", _detached, holds=lambda x: np.array(x), view=True, through=()))
add_form(Form("no_grad", "eg.no_grad()(eg.sin)({0})", lambda x, held=None: rounded.sin(x) if held is None else held,
              holds=np.sin, through=()))
add_form(Form("iadd", "{0} += {1}", lambda a, b: a + b, 2, _into_first, writes=True))
add_form(Form("imul", "{0} *= {1}", lambda a, b: a * b, 2, _into_first, writes=True))
add_form(Form("isub scaled", "{0} -= {1} * 0.5", lambda a, b: a - b * 0.5, 2, _into_first, writes=True))
add_form(Form("set row", "{0}[0] = {1}", _row_written, 2, _first_row, writes=True))
add_form(Form("copy", "{0}.copy_({1})", lambda a, b: a * 0.0 + b, 2, _into_first, writes=True))
