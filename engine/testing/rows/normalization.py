"""Rows of softmax, the norms and the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import engine as eg
from engine.testing import formulas
from engine.testing.opspec import Drawing, ErrorCase, OpSpec, register
from engine.testing.source import Source

Draw = tuple[list[Any], dict[str, Any]]


# ── softmax ───────────────────────────────────────────────────────────────────────────────────────────

def _along(s: Source) -> Draw:
    x = s.array(s.shape(), -20, 20)
    return [x], {"axis": s.axis(x.ndim) if x.ndim else -1}


def _rows(s: Source) -> Draw:
    return [s.array((s.integer(2, 5), s.integer(1, 300)), -20, 20)], {"axis": -1}


def _large(s: Source) -> Draw:
    return [s.array((300, 301), -20, 20)], {"axis": -1}


def _softmax(name: str, formula: Callable[..., Any], gradient: Callable[..., Any]) -> None:
    function = getattr(eg, name)
    register(OpSpec(name, _along, formula=formula, gradient=gradient, batch=(_rows, (0,)), large=_large, errors=(
        ErrorCase(lambda: function(eg.zeros(2, 3), axis=2), IndexError, (name, "2", "[-2, 2)")),
        ErrorCase(lambda: function(eg.tensor([1, 2])), TypeError, (name, "int64")))))


_softmax("softmax", formulas.softmax, formulas.softmax_vjp)
_softmax("log_softmax", formulas.log_softmax, formulas.log_softmax_vjp)

# ── norms ─────────────────────────────────────────────────────────────────────────────────────────────


def _norm(operands: int, fixed_rows: int | None = None) -> Drawing:
    def draw(s: Source) -> Draw:
        n = s.choice([s.side(1), s.side(1), s.integer(1, 100)]) if fixed_rows is None else s.integer(1, 300)
        leading = s.shape(0, 2) if fixed_rows is None else (fixed_rows,)
        x = s.distinct((*leading, n)) if s.smooth else s.array((*leading, n))  # not all equal: 1/σ would be 1/√ε
        return [x, *[s.array((n,), 0.5, 2.0) for _ in range(operands)]], {
            "eps": 0.1 if s.smooth else s.choice([1e-5, 0.1])}  # 1/√(x² + ε) bends within √ε: differences must see it
    return draw


def _norm_large(operands: int) -> Drawing:
    return lambda s: ([s.array((300, 301)), *[s.array((301,)) for _ in range(operands)]], {"eps": 1e-5})


register(OpSpec("layer_norm", _norm(2), formula=formulas.layer_norm, gradient=formulas.layer_norm_vjp, wrt=(0, 1, 2),
                batch=(_norm(2, 4), (0,)), large=_norm_large(2), errors=(
    ErrorCase(lambda: eg.layer_norm(eg.zeros(2, 3), eg.ones(4), eg.zeros(4)), ValueError,
              ("layer_norm", "weight", "(4,)")),
    ErrorCase(lambda: eg.layer_norm(eg.zeros(2, 3), eg.ones(3), eg.zeros(2)), ValueError,
              ("layer_norm", "bias", "(2,)")))))
register(OpSpec("rms_norm", _norm(1), formula=formulas.rms_norm, gradient=formulas.rms_norm_vjp, wrt=(0, 1),
                batch=(_norm(1, 4), (0,)), large=_norm_large(1), errors=(
    ErrorCase(lambda: eg.rms_norm(eg.zeros(2, 3), eg.ones(4)), ValueError, ("rms_norm", "weight", "(4,)", "(2, 3)")),)))


def _batch_norm(s: Source) -> Draw:
    n = s.side(1)
    shape = (s.integer(2, 6), *s.shape(0, 1, 1), n)
    x = s.distinct(shape) if s.smooth else s.array(shape)
    return [x, s.array((n,), 0.5, 2.0), s.array((n,))], {"eps": 0.1}


def _batch_norm_formula(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    axes = tuple(range(x.ndim - 1))
    d = x - formulas.mean(x, axes)
    return d * formulas.rsqrt(formulas.mean(d * d, axes) + eps) * weight + bias


register(OpSpec("batch_norm", _batch_norm, formula=_batch_norm_formula, wrt=(0, 1, 2), errors=(
    ErrorCase(lambda: eg.batch_norm(eg.zeros(2, 3), eg.ones(3), eg.zeros(3), training=False), ValueError,
              ("batch_norm", "running_mean")),)))


def _batch_norm_used(s: Source) -> Draw:
    n = s.side(1)
    rng = s.generator()
    running = {"mean": rng.uniform(-1, 1, n).astype(s.dtype), "variance": rng.uniform(0.5, 2, n).astype(s.dtype)}
    return [s.array((*s.shape(0, 2), n)), s.array((n,), 0.5, 2.0), s.array((n,))], {"eps": 0.1, **running}


register(OpSpec("batch_norm: in use", _batch_norm_used, wrt=(0, 1, 2),
                call=lambda x, w, b, mean, variance, eps: eg.batch_norm(
                    x, w, b, eg.tensor(mean), eg.tensor(variance), False, eps=eps),
                formula=lambda x, w, b, mean, variance, eps: (x - mean) * formulas.rsqrt(
                    _exact(variance, x) + eps) * w + b))


def _exact(data: np.ndarray, like: Any) -> Any:
    """Data as a Rounded if the others are."""
    return like._other(data) if hasattr(like, "_other") else data.astype(np.float64)


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────

REDUCTIONS = ["mean", "sum", "none"]


def _classified(s: Source) -> Draw:
    classes = s.choice([s.side(1), s.integer(1, 100)])
    shape = s.shape(0, 2, 1)
    target = s.whole(shape, 0, classes - 1)
    if target.size and s.boolean():  # some count for nothing, but not all
        target = np.array(target)
        target.reshape(-1)[1::3] = -100
    return [s.array((*shape, classes), -8, 8), target, s.array((classes,), 0.5, 2.0) if s.boolean() else None], {
        "label_smoothing": s.choice([0.0, 0.1, 1.0]), "reduction": s.choice(REDUCTIONS)}


def _classified_rows(s: Source) -> Draw:
    rows, classes = s.integer(2, 6), s.integer(1, 300)
    return [s.array((rows, classes), -8, 8), s.whole((rows,), 0, classes - 1), None], {
        "label_smoothing": s.choice([0.0, 0.1]), "reduction": "none"}


def _classified_large(s: Source) -> Draw:
    return [s.array((300, 301), -8, 8), s.whole((300,), 0, 300), None], {"label_smoothing": 0.1, "reduction": "mean"}


register(OpSpec("cross_entropy", _classified, formula=formulas.cross_entropy, wrt=(0, 2),
                batch=(_classified_rows, (0, 1)), large=_classified_large, errors=(
    ErrorCase(lambda: eg.cross_entropy(eg.zeros(2, 3), eg.tensor([0, 3])), IndexError,
              ("cross_entropy", "3", "[0, 3)")),
    ErrorCase(lambda: eg.cross_entropy(eg.zeros(2, 3), eg.tensor([0, -1])), IndexError,
              ("cross_entropy", "-1", "[0, 3)")),
    ErrorCase(lambda: eg.cross_entropy(eg.zeros(2, 3), eg.tensor([0])), ValueError, ("cross_entropy", "(1,)", "(2,)")),
    ErrorCase(lambda: eg.cross_entropy(eg.zeros(2, 3), eg.tensor([0, 1]), reduction="all"), ValueError,
              ("cross_entropy", "'all'", "'mean'")),
    ErrorCase(lambda: eg.cross_entropy(eg.zeros(1, 3), eg.tensor([0]), label_smoothing=2.0), ValueError,
              ("cross_entropy", "label_smoothing", "2.0")))))


def _classified_each(s: Source) -> Draw:
    operands, attributes = _classified(s)
    return operands[:2], {"label_smoothing": attributes["label_smoothing"]}


register(OpSpec("cross_entropy: each", _classified_each, wrt=(0,), gradient=formulas.cross_entropy_vjp,
                formula=lambda x, t, **a: formulas.cross_entropy(x, t, reduction="none", **a),
                call=lambda x, t, **a: eg.cross_entropy(x, t, reduction="none", **a)))


def _predicted(s: Source) -> Draw:
    (logits, target, _), attributes = _classified(s)
    classes, inputs = logits.shape[-1], s.side()
    bias = s.array((classes,)) if s.boolean() else None
    return [s.array((*target.shape, inputs)), s.array((classes, inputs)), target, bias], attributes


def _predicted_rows(s: Source) -> Draw:
    rows, classes, inputs = s.integer(2, 6), s.integer(1, 40), s.integer(1, 300)
    return [s.array((rows, inputs)), s.array((classes, inputs)), s.whole((rows,), 0, classes - 1), None], {
        "label_smoothing": s.choice([0.0, 0.1]), "reduction": "none"}


def _predicted_large(s: Source) -> Draw:
    """More logits than are computed at once."""
    rows, classes = 520, 8200
    return [s.array((rows, 3)), s.array((classes, 3)), s.whole((rows,), 0, classes - 1), s.array((classes,))], {
        "reduction": "mean"}


register(OpSpec("linear_cross_entropy", _predicted, formula=formulas.linear_cross_entropy, wrt=(0, 1, 3),
                batch=(_predicted_rows, (0, 2)), large=_predicted_large, errors=(
    ErrorCase(lambda: eg.linear_cross_entropy(eg.zeros(2, 4), eg.zeros(3, 4), eg.tensor([0, 3])), IndexError,
              ("linear_cross_entropy", "3", "[0, 3)")),
    ErrorCase(lambda: eg.linear_cross_entropy(eg.zeros(2, 4), eg.zeros(3, 4), eg.tensor([0])), ValueError,
              ("linear_cross_entropy", "(1,)", "(2,)")),
    ErrorCase(lambda: eg.linear_cross_entropy(eg.zeros(2, 4), eg.zeros(3, 5), eg.tensor([0, 1])), ValueError,
              ("linear_cross_entropy: weight", "(3, 5)", "(2, 4)")),
    ErrorCase(lambda: eg.linear_cross_entropy(eg.zeros(2, 4), eg.zeros(3, 4), eg.tensor([0.0, 1.0])), TypeError,
              ("linear_cross_entropy: target", "float32")),
    ErrorCase(lambda: eg.linear_cross_entropy(eg.zeros(2, 4), eg.zeros(3, 4), eg.tensor([0, 1]), reduction="all"),
              ValueError, ("linear_cross_entropy", "'all'", "'mean'")),
    ErrorCase(lambda: eg.linear_cross_entropy(eg.zeros(1, 4), eg.zeros(3, 4), eg.tensor([0]), label_smoothing=2.0),
              ValueError, ("linear_cross_entropy", "label_smoothing", "2.0")))))


def loss(name: str, formula: Callable[..., Any], low: float, high: float, target: tuple[float, float] | None = None,
         **options: list[Any]) -> None:
    """A loss of two operands of one shape."""
    def draw(s: Source) -> Draw:
        shape = s.shape(low=1)
        x = s.array(shape, low, high)
        t = s.array(shape, *(target or (low, high)))
        if s.smooth and options:  # away from |d| = delta and d = 0
            t = (x + np.where(t < 0, -0.6, 0.6) + 0.2 * t).astype(s.dtype)
        return [x, t], {"reduction": s.choice(REDUCTIONS), **{k: s.choice(v) for k, v in options.items()}}

    function = getattr(eg, name)
    register(OpSpec(name, draw, formula=formula, wrt=(0, 1), errors=(
        ErrorCase(lambda: function(eg.ones(2), eg.ones(2), reduction="all"), ValueError, (name, "'all'")),)))


loss("mse_loss", formulas.mse_loss, -4, 4)
loss("huber_loss", formulas.huber_loss, -1, 1, delta=[0.25, 3.0])
loss("binary_cross_entropy", formulas.binary_cross_entropy, 0.1, 0.9)
loss("binary_cross_entropy_with_logits", formulas.binary_cross_entropy_with_logits, -9, 9, (0.0, 1.0))
loss("kl_div", formulas.kl_div, -4, -0.1, (0.1, 0.9))
