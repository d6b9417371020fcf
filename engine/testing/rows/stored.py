"""Rows of linear with a weight that is only read: packed, and quantised."""

from __future__ import annotations

from typing import Any

import numpy as np

import engine as eg
from engine.testing import blocks, formulas, rounded
from engine.testing.opspec import ErrorCase, OpSpec, register
from engine.testing.rounded import Rounded
from engine.testing.source import Source

Draw = tuple[list[Any], dict[str, Any]]
SCHEMES = ["q8_0", "q4_0", "q4_1", "bf16"]


def _drawn(s: Source, rows: tuple[int, ...], inputs: int, outputs: int, **attributes: Any) -> Draw:
    bias = s.array((outputs,)) if s.boolean() else None
    return [s.array((*rows, inputs)), s.array((outputs, inputs)), bias], attributes


def _packed(s: Source) -> Draw:
    return _drawn(s, s.shape(0, 2), s.choice([s.side(), s.integer(0, 300)]), s.choice([s.side(), s.integer(0, 70)]))


def _packed_rows(s: Source) -> Draw:
    return _drawn(s, (s.integer(2, 20),), s.integer(1, 600), s.integer(1, 70))


def _quantized(s: Source) -> Draw:
    inputs = 32 * s.choice([s.integer(0, 2), s.integer(0, 10)])
    return _drawn(s, s.shape(0, 2), inputs, s.choice([s.side(), s.integer(0, 40)]), scheme=s.choice(SCHEMES))


def _quantized_rows(s: Source) -> Draw:
    return _drawn(s, (s.integer(2, 20),), 32 * s.integer(1, 18), s.integer(1, 40), scheme=s.choice(SCHEMES))


def _call_packed(x: Any, weight: Any, bias: Any) -> eg.Tensor:
    return eg.linear(x, eg.pack(weight), bias)


def _call_quantized(x: Any, weight: Any, bias: Any, scheme: str) -> eg.Tensor:
    return eg.linear(x, eg.quantize(weight, scheme), bias)


def _meant(weight: Any, scheme: str) -> Any:
    """What the blocks of a weight stand for; d q is exact in either type, and d q + m rounded once."""
    value = weight.value if isinstance(weight, Rounded) else weight
    exact = blocks.decoded(blocks.encoded(value, scheme), scheme)
    if not isinstance(weight, Rounded):
        return exact
    error = rounded.unit_roundoff(weight.dtype) * np.abs(exact) if scheme == "q4_1" else np.zeros(exact.shape)
    return Rounded(exact, error, dtype=weight.dtype)


def _formula(x: Any, weight: Any, bias: Any, scheme: str) -> Any:
    return formulas.linear(x, _meant(weight, scheme), bias)


def _gradient(g: Any, x: Any, weight: Any, bias: Any, scheme: str) -> Any:
    return formulas.linear_vjp(g, x, _meant(weight, scheme), bias)


register(OpSpec("linear: packed", _packed, formula=formulas.linear, gradient=formulas.linear_vjp, wrt=(0, 2),
                linear=(0,), batch=(_packed_rows, (0,)), call=_call_packed,
                large=lambda s: _drawn(s, (150,), 300, 130), errors=(
    ErrorCase(lambda: eg.linear(eg.zeros(2, 3), eg.pack(eg.zeros(4, 5))), ValueError,
              ("linear", "(2, 3)", "(..., 5)", "PackedTensor((4, 5)")),
    ErrorCase(lambda: eg.linear(eg.zeros(2, 5), eg.pack(eg.zeros(4, 5)), eg.zeros(5)), ValueError,
              ("linear", "bias", "(5,)", "(4,)")),
    ErrorCase(lambda: eg.linear(eg.zeros(2, 5, dtype="float64"), eg.pack(eg.zeros(4, 5))), TypeError,
              ("linear", "float64", "float32")),
    ErrorCase(lambda: eg.linear(eg.zeros(2, 5), eg.pack(eg.zeros(4, 5)), eg.zeros(4, dtype="float64")), TypeError,
              ("linear", "bias has dtype float64", "float32")),
    ErrorCase(lambda: eg.pack(eg.zeros(4)), TypeError, ("pack", "(4,)", "(n, k)")),
    ErrorCase(lambda: eg.exp(eg.pack(eg.zeros(4, 5))), TypeError, ("exp", "PackedTensor", "linear and embedding")),
    ErrorCase(lambda: eg.linear(eg.zeros(2, 5), eg.pack(eg.zeros(4, 5)), [0.0] * 5), ValueError,
              ("linear", "bias", "(5,)", "(4,)")),
    ErrorCase(lambda: eg.concat([eg.zeros(4, 5), eg.pack(eg.zeros(4, 5))]), TypeError,
              ("concat", "arrays is PackedTensor", "linear and embedding")),
    ErrorCase(lambda: eg.linear(eg.pack(eg.zeros(4, 5)), eg.zeros(3, 5)), TypeError, ("linear", "x is PackedTensor")))))

register(OpSpec("linear: quantized", _quantized, formula=_formula, gradient=_gradient, wrt=(0, 2), linear=(0,),
                batch=(_quantized_rows, (0,)), call=_call_quantized,
                large=lambda s: _drawn(s, (150,), 320, 130, scheme=s.choice(SCHEMES)), errors=(
    ErrorCase(lambda: eg.quantize(eg.zeros(4, 33)), ValueError, ("quantize", "(4, 33)", "multiple of 32")),
    ErrorCase(lambda: eg.quantize(eg.zeros(4, 32), "q9"), ValueError, ("quantize", "'q9'", "q8_0, q4_0, q4_1")),
    ErrorCase(lambda: eg.quantize(eg.arange(32)), TypeError, ("quantize", "int64 (32,)", "(n, k)")),
    ErrorCase(lambda: eg.quantize(eg.full((1, 32), float("nan"))), ValueError, ("quantize", "nan", "finite")),
    ErrorCase(lambda: eg.quantize(eg.full((1, 32), float("inf"))), ValueError, ("quantize", "inf", "finite")),
    ErrorCase(lambda: eg.quantize(eg.full((1, 32), 1e6), "q4_0"), ValueError, ("quantize", "1000000.0", "float16")),
    ErrorCase(lambda: eg.quantize(eg.full((1, 32), 3.4e38), "bf16"), ValueError, ("quantize", "3.39", "bfloat16")),
    ErrorCase(lambda: eg.QuantizedTensor(eg.zeros(2, 33, dtype="uint8"), "q8_0"), TypeError,
              ("QuantizedTensor", "(2, 33)", "multiple of 34")),
    ErrorCase(lambda: eg.QuantizedTensor(eg.zeros(2, 34, dtype="uint8"), "q9"), ValueError,
              ("QuantizedTensor", "'q9'", "q8_0, q4_0, q4_1")),
    ErrorCase(lambda: eg.QuantizedTensor(eg.full((1, 18), 0x7C, dtype="uint8"), "q4_0"), ValueError,
              ("QuantizedTensor", "infinite or NaN")),
    ErrorCase(lambda: eg.linear(eg.zeros(2, 3), eg.quantize(eg.zeros(4, 32))), ValueError,
              ("linear", "(2, 3)", "(..., 32)", "QuantizedTensor((4, 32), 'q8_0')")),
    ErrorCase(lambda: eg.matmul(eg.zeros(2, 4), eg.quantize(eg.zeros(4, 32))), TypeError,
              ("matmul", "QuantizedTensor")),
    ErrorCase(lambda: eg.embedding(eg.quantize(eg.zeros(4, 32)), eg.tensor([4])), IndexError,
              ("embedding", "holds 4", "[0, 4)")))))
