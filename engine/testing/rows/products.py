"""Rows of matrix products, convolution, attention and rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np

import engine as eg
from engine.testing import formulas, rounded
from engine.testing.opspec import ErrorCase, OpSpec, register
from engine.testing.rounded import Rounded
from engine.testing.source import Source

Draw = tuple[list[Any], dict[str, Any]]


def _inner(s: Source) -> int:
    """The summed length: at times longer than the 256 products that gemm sums in one chain."""
    return s.choice([s.side(), s.side(), s.integer(0, 300)])


def _matmul(s: Source) -> Draw:
    m, n, k = s.side(), s.side(), _inner(s)
    if s.integer(0, 5) == 5:
        m = s.integer(0, 40)
    if s.integer(0, 5) == 5:
        n = s.integer(0, 70)
    left, right = s.broadcastable(2, most=2) if s.boolean() else ((), ())
    a, b = (*left, m, k), (*right, k, n)
    if s.integer(0, 4) == 4:
        a = (k,)
    if s.integer(0, 4) == 4:
        b = (k,)
    return [s.array(a), s.array(b)], {}


def _matmul_rows(s: Source) -> Draw:
    k = s.integer(1, 600)
    return [s.array((s.integer(2, 20), k)), s.array((k, s.integer(1, 40)))], {}


def _matmul_large(s: Source) -> Draw:
    return [s.array((2, 130, 300)), s.array((300, 170))], {}


def _no_tensor() -> eg.Tensor:
    return eg.tensor(1.0)


register(OpSpec("matmul", _matmul, formula=formulas.matrix_product, wrt=(0, 1), linear=(0, 1),
                batch=(_matmul_rows, (0,)), large=_matmul_large, integers=True, errors=(
    ErrorCase(lambda: eg.matmul(eg.zeros(2, 3), eg.zeros(4, 5)), ValueError, ("matmul", "(2, 3)", "(4, 5)")),
    ErrorCase(lambda: eg.matmul(_no_tensor(), eg.zeros(2)), ValueError, ("matmul", "()", "1 axis")),
    ErrorCase(lambda: eg.matmul(eg.zeros(2, 2, 3), eg.zeros(3, 3, 4)), ValueError, ("matmul", "(2,)", "(3,)")))))


def _matmul_many(s: Source) -> Draw:
    """A batch of matrices on both sides: each alone as in the batch."""
    batch, m, k, n = s.integer(2, 4), s.integer(1, 9), s.integer(1, 300), s.integer(1, 9)
    return [s.array((batch, m, k)), s.array((batch, k, n))], {}


register(OpSpec("matmul: batched", _matmul_many, formula=formulas.matrix_product, wrt=(0, 1), linear=(0, 1),
                batch=(_matmul_many, (0, 1)), large=lambda s: ([s.array((9, 120, 90)), s.array((9, 90, 110))], {})))


def _matmul_broadcast(s: Source) -> Draw:
    """Two batch axes, of which one side lacks or repeats the first, the second or both."""
    p, q, m, n, k = s.integer(2, 3), s.integer(2, 3), s.integer(1, 4), s.integer(1, 4), s.integer(1, 20)
    whole, part = (p, q), s.choice([(q,), (1, q), (p, 1), (1,), ()])
    left, right = (whole, part) if s.boolean() else (part, whole)
    return [s.array((*left, m, k)), s.array((*right, k, n))], {}


register(OpSpec("matmul: broadcast", _matmul_broadcast, formula=formulas.matrix_product, wrt=(0, 1), linear=(0, 1)))


def _linear(s: Source) -> Draw:
    inputs, outputs = _inner(s), s.side()
    x = s.array((*s.shape(0, 2), inputs))
    return [x, s.array((outputs, inputs)), s.array((outputs,)) if s.boolean() else None], {}


def _linear_rows(s: Source) -> Draw:
    inputs, outputs = s.integer(1, 600), s.integer(1, 40)
    return [s.array((s.integer(2, 20), inputs)), s.array((outputs, inputs)), s.array((outputs,))], {}


register(OpSpec("linear", _linear, formula=formulas.linear, gradient=formulas.linear_vjp, wrt=(0, 1, 2), linear=(0, 1),
                batch=(_linear_rows, (0,)),
                large=lambda s: ([s.array((150, 300)), s.array((130, 300)), s.array((130,))], {}), errors=(
    ErrorCase(lambda: eg.linear(eg.zeros(2, 3), eg.zeros(4, 5)), ValueError, ("linear", "weight", "(4, 5)", "(2, 3)")),
    ErrorCase(lambda: eg.linear(eg.zeros(2, 3), eg.zeros(4, 3), eg.zeros(3)), ValueError, ("linear", "bias", "(3,)")),
    ErrorCase(lambda: eg.linear(eg.tensor([[1, 2]]), eg.tensor([[1, 2]])), TypeError, ("linear", "int64")))))


def _feed_forward(s: Source) -> Draw:
    """Not relu, whose kink float32 and float64 may see on different sides; test_feed_forward.py has it."""
    inputs, hidden, outputs = _inner(s), s.side(), s.side()
    biases = [s.array((n,)) if s.boolean() else None for n in (hidden, outputs)]
    return [s.array((*s.shape(0, 2), inputs)), s.array((hidden, inputs)), s.array((outputs, hidden)), *biases], {
        "activation": s.choice(["silu", "gelu", "gelu_tanh"])}


def _feed_forward_rows(s: Source) -> Draw:
    inputs, hidden, outputs = s.integer(1, 300), s.integer(1, 80), s.integer(1, 20)
    return [s.array((s.integer(2, 20), inputs)), s.array((hidden, inputs)), s.array((outputs, hidden)),
            s.array((hidden,)), None], {"activation": s.choice(["relu", "silu", "gelu", "gelu_tanh"])}


register(OpSpec("feed_forward", _feed_forward, formula=formulas.feed_forward, gradient=formulas.feed_forward_vjp,
                wrt=(0, 1, 2, 3, 4), batch=(_feed_forward_rows, (0,)), cancels=16,
                large=lambda s: ([s.array((70, 130)), s.array((410, 130)), s.array((90, 410)), s.array((410,)),
                                  s.array((90,))], {}), errors=(
    ErrorCase(lambda: eg.feed_forward(eg.zeros(2, 3), eg.zeros(4, 5), eg.zeros(3, 4)), ValueError,
              ("feed_forward", "up", "(4, 5)", "(2, 3)")),
    ErrorCase(lambda: eg.feed_forward(eg.zeros(2, 3), eg.zeros(4, 3), eg.zeros(3, 5)), ValueError,
              ("feed_forward", "down", "(3, 5)", "(4, 3)")),
    ErrorCase(lambda: eg.feed_forward(eg.zeros(2, 3), eg.zeros(4, 3), eg.zeros(3, 4), eg.zeros(3)), ValueError,
              ("feed_forward", "up_bias", "(3,)")),
    ErrorCase(lambda: eg.feed_forward(eg.zeros(2, 3), eg.zeros(4, 3), eg.zeros(3, 4), activation="elu"), ValueError,
              ("feed_forward", "'elu'", "gelu_tanh")),
    ErrorCase(lambda: eg.feed_forward(eg.tensor([[1]]), eg.tensor([[1]]), eg.tensor([[1]])), TypeError,
              ("feed_forward", "int64")))))


def _tensordot(s: Source) -> Draw:
    summed = [s.side() for _ in range(s.integer(0, 2))]
    a, b = [s.side() for _ in range(s.integer(0, 2))], [s.side() for _ in range(s.integer(0, 2))]
    return [s.array((*a, *summed)), s.array((*summed, *b))], {"axes": len(summed)}


register(OpSpec("tensordot", _tensordot, formula=formulas.tensordot, wrt=(0, 1), linear=(0, 1), errors=(
    ErrorCase(lambda: eg.tensordot(eg.zeros(2, 3), eg.zeros(2, 3)[:, :2], 2), ValueError, ("tensordot", "3", "2")),)))


def _tensordot_axes(s: Source) -> Draw:
    """Pairs of axes that are not at the ends."""
    p, q = s.side(), s.side()
    return [s.array((p, s.side(), q)), s.array((s.side(), q, p))], {"axes": s.choice([((0, 2), (2, 1)), ((-1,), (1,))])}


register(OpSpec("tensordot: axes", _tensordot_axes, formula=formulas.tensordot, wrt=(0, 1), linear=(0, 1)))


def _vecdot(s: Source) -> Draw:
    shape = s.shape(1)
    return [s.array(shape), s.array(shape)], {"axis": s.axis(len(shape))}


register(OpSpec("vecdot", _vecdot, formula=lambda a, b, axis: rounded.total(a * b, axis), wrt=(0, 1), linear=(0, 1)))
register(OpSpec("outer", lambda s: ([s.array((s.side(),)), s.array((s.side(),))], {}), wrt=(0, 1), linear=(0, 1),
                special=True))

# ── einsum: named products ────────────────────────────────────────────────────────────────────────────

_EINSUMS = ["ij,jk->ik", "bij,bjk->bik", "ij,kj->ki", "ii->i", "ij,ij,jk->k", "bhtd,bhsd->bhts",
            "ij,k->kij", "...ij,...jk->...ik", "...i,...i", "...,i...->i...", "kj,ji"]


def _subscripts(s: Source) -> tuple[list[str], str]:
    """The terms of a random expression of one to three operands, and its result: with its arrow, or "" for none.

    Letters occur twice in a term, in one operand only, in all of them; hidden axes stand where they please.
    """
    terms = []
    for _ in range(s.integer(1, 3)):
        term = [s.choice("ijkl") for _ in range(s.integer(0, 3))]
        if s.integer(0, 2) == 2:
            term.insert(s.integer(0, len(term)), "...")
        terms.append("".join(term))
    if s.integer(0, 2) == 2:
        return terms, ""
    letters = sorted(set("".join(terms)) - {"."})
    kept = [letters.pop(s.integer(0, len(letters) - 1)) for _ in range(s.integer(0, len(letters)))]
    if any("..." in term for term in terms):  # NumPy wants the hidden axes in the result
        kept.insert(s.integer(0, len(kept)), "...")
    return terms, "->" + "".join(kept)


def _einsum(s: Source) -> Draw:
    terms, result = _subscripts(s)
    return _operands(s, terms, result)


def _einsum_known(s: Source) -> Draw:
    """Expressions that people write."""
    left, arrow, right = s.choice(_EINSUMS).partition("->")
    return _operands(s, left.split(","), arrow + right)


def _operands(s: Source, terms: list[str], result: str) -> Draw:
    """Operands whose lengths fit the terms."""
    lengths = {c: s.integer(0, 4) if s.integer(0, 5) == 5 else s.integer(1, 4) for c in "bdhijklst"}
    hidden = tuple(s.integer(1, 3) for _ in range(2))
    operands = []
    for term in terms:
        # now and then a length of 1, which is repeated; in the order of the letters, for a set has none
        own = {c: 1 if s.integer(0, 7) == 7 else lengths[c] for c in sorted(set(term) - {"."})}
        before, dots, after = term.partition("...")
        middle = hidden[s.choice([1, 0, 2]):] if dots else ()
        operands.append(s.array((*[own[c] for c in before], *middle, *[own[c] for c in after])))
    return [operands], {"subscripts": ",".join(terms) + result}


def _einsum_formula(operands: list[Any], subscripts: str) -> Any:
    """Each product of p operands is rounded p − 1 times and joins a sum of as many as a result of ones counts."""
    def f(*xs: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum(subscripts, *xs))
    if not isinstance(operands[0], Rounded):
        return f(*operands)
    summed = int(f(*[np.ones(x.shape) for x in operands]).max(initial=0))
    size = f(*[np.abs(x.value) for x in operands])
    roundings = summed + len(operands)
    tiny = roundings * rounded.smallest_subnormal(operands[0].dtype) * 4.0**len(operands)  # |x| ≤ 4
    return Rounded(f(*[x.value for x in operands]), rounded.gamma(roundings, operands[0].unit) * size + tiny,
                   dtype=operands[0].dtype)


def _einsum_call(operands: list[Any], subscripts: str) -> Any:
    return eg.einsum(subscripts, *operands)


register(OpSpec("einsum", _einsum, formula=_einsum_formula, view=True, call=_einsum_call, errors=(
    ErrorCase(lambda: eg.einsum("ij,jk->ik", eg.zeros(2, 3), eg.zeros(4, 5)), ValueError, ("einsum", "j", "3", "4")),
    ErrorCase(lambda: eg.einsum("ij->ijk", eg.zeros(2, 3)), ValueError, ("einsum", "k")))))
register(OpSpec("einsum: known", _einsum_known, formula=_einsum_formula, view=True, call=_einsum_call))

# ── convolution ───────────────────────────────────────────────────────────────────────────────────────


def _conv1d(s: Source) -> Draw:
    groups, width, dilation = s.choice([1, 2]), s.integer(1, 3), s.choice([1, 2])
    channels, outputs = groups * s.integer(1, 2), groups * s.integer(1, 2)
    padding = s.integer(0, 2)
    length = max(dilation * (width - 1) + 1 - 2 * padding, 1) + s.side()
    x, weight = s.array((s.side(), channels, length)), s.array((outputs, channels // groups, width))
    return [x, weight, s.array((outputs,)) if s.boolean() else None], {
        "stride": s.integer(1, 2), "padding": padding, "dilation": dilation, "groups": groups}


def _conv1d_formula(x: Any, weight: Any, bias: Any, stride: int, padding: int, dilation: int, groups: int) -> Any:
    """The definition as sums over taps: y[b, o, t] = Σ_i Σ_c w[o, c, i] x[b, c, t·stride + i·dilation − padding]."""
    if isinstance(x, Rounded):
        parts = (stride, padding, dilation, groups)
        value = _conv1d_formula(x.value, weight.value, None, *parts)
        size = _conv1d_formula(np.abs(x.value), np.abs(weight.value), None, *parts)
        terms = weight.shape[1] * weight.shape[2]
        error = rounded.gamma(terms, x.unit) * size + terms * rounded.smallest_subnormal(x.dtype)
        sums = Rounded(value, error, dtype=x.dtype)
        return sums if bias is None else sums + bias.reshape(-1, 1)
    outputs, per_group, width = weight.shape
    wide = np.pad(x, ((0, 0), (0, 0), (padding, padding)))
    steps = (wide.shape[2] - dilation * (width - 1) - 1) // stride + 1
    y = np.zeros((x.shape[0], outputs, steps))
    for o in range(outputs):
        first = o // (outputs // groups) * per_group
        for i in range(width):
            taps = wide[:, first:first + per_group, i * dilation:i * dilation + (steps - 1) * stride + 1:stride]
            y[:, o] += np.einsum("bct,c->bt", taps, weight[o, :, i])
    return y if bias is None else y + bias[:, None]


def _conv1d_call(x: Any, weight: Any, bias: Any, **attributes: Any) -> Any:
    return eg.conv1d(x, weight, bias, **attributes)


register(OpSpec("conv1d", _conv1d, formula=_conv1d_formula, wrt=(0, 1, 2), linear=(0, 1), call=_conv1d_call, errors=(
    ErrorCase(lambda: eg.conv1d(eg.zeros(1, 2, 5), eg.zeros(3, 3, 2)), ValueError,
              ("conv1d", "(1, 2, 5)", "(3, 3, 2)")),
    ErrorCase(lambda: eg.conv1d(eg.zeros(1, 2, 5), eg.zeros(3, 2, 2), stride=0), ValueError, ("conv1d", "stride is 0")),
    ErrorCase(lambda: eg.conv1d(eg.zeros(1, 2, 1), eg.zeros(3, 2, 2)), ValueError,
              ("conv1d", "window of 2", "length 1")))))

# ── attention ─────────────────────────────────────────────────────────────────────────────────────────


def _attention_of(s: Source, batch: int, kv_heads: int, group: int, t: int, sources: int, d: int) -> Draw:
    """Queries, keys, values and the ways of masking; dropout is drawn from Generator(seed)."""
    query = s.array((batch, kv_heads * group, t, d), -2, 2)
    key, value = s.array((batch, kv_heads, sources, d), -2, 2), s.array((batch, kv_heads, sources, d), -2, 2)
    masks = [None, lambda: s.truth((t, sources)), lambda: s.array((batch, 1, t, sources), -1, 1)]
    mask = s.choice(masks)
    lengths = s.whole((batch,), 0, sources) if s.integer(0, 2) == 2 else None
    return [query, key, value, mask() if mask else None], {
        "causal": s.boolean(), "lengths": lengths, "scale": s.choice([None, 0.5]), "dropout": s.choice([0.0, 0.0, 0.3]),
        "seed": s.integer(0, 9), "dtype": str(s.dtype)}


def _attention(s: Source) -> Draw:
    t = s.integer(1, 5)
    sources = s.choice([t, t + s.integer(0, 3), s.integer(1, 80)])
    return _attention_of(s, s.integer(1, 2), s.integer(1, 2), s.integer(1, 2), t, sources, s.choice([1, 2, 3, 8, 17]))


def _attention_rows(s: Source) -> Draw:
    operands, attributes = _attention_of(s, 3, 1, 2, s.integer(1, 20), s.integer(1, 80), s.choice([4, 16]))
    operands[3] = None
    return operands, {**attributes, "dropout": 0.0, "lengths": None}


def _attention_large(s: Source) -> Draw:
    query, key = s.array((2, 4, 150, 32), -1, 1), s.array((2, 2, 150, 32), -1, 1)
    return [query, key, s.array((2, 2, 150, 32), -1, 1), None], {
        "causal": True, "lengths": np.array([150, 77]), "scale": None, "dropout": 0.1, "seed": 3, "dtype": str(s.dtype)}


def _keep(query: Any, key: Any, dropout: float, seed: int, dtype: str) -> Any:
    shape = (*query.shape[:3], key.shape[2])
    return formulas.dropout_scale(shape, dropout, seed, dtype) if dropout else np.ones(shape)


def _attention_call(query: Any, key: Any, value: Any, mask: Any, *, seed: int, dtype: str, lengths: Any,
                    **rest: Any) -> Any:
    return eg.scaled_dot_product_attention(query, key, value, mask, generator=eg.Generator(seed),
                                           lengths=None if lengths is None else eg.from_numpy(lengths), **rest)


def _attention_formula(query: Any, key: Any, value: Any, mask: Any, *, dropout: float, seed: int, dtype: str,
                       **rest: Any) -> Any:
    return formulas.attention(query, key, value, mask, keep=_keep(query, key, dropout, seed, dtype), **rest)


def _attention_vjp(g: Any, query: Any, key: Any, value: Any, mask: Any, *, dropout: float, seed: int, dtype: str,
                   **rest: Any) -> Any:
    return formulas.attention_vjp(g, query, key, value, mask, keep=_keep(query, key, dropout, seed, dtype), **rest)


def _attend(query: tuple[int, ...], key: tuple[int, ...], dropout: float = 0.0,
            mask: tuple[int, ...] | None = None) -> Any:
    return lambda: eg.scaled_dot_product_attention(eg.zeros(query), eg.zeros(key), eg.zeros(key),
                                                   None if mask is None else eg.zeros(mask), dropout=dropout)


_ATTENTION = "scaled_dot_product_attention"
register(OpSpec(_ATTENTION, _attention, formula=_attention_formula, gradient=_attention_vjp, wrt=(0, 1, 2), linear=(2,),
                batch=(_attention_rows, (0, 1, 2)), large=_attention_large, call=_attention_call, errors=(
    ErrorCase(_attend((1, 3, 2, 4), (1, 2, 2, 4)), ValueError, (_ATTENTION, "3 heads", "2")),
    ErrorCase(_attend((2, 4), (3, 2, 4)), ValueError, (_ATTENTION, "(2, 4)", "(3, 2, 4)")),
    ErrorCase(_attend((1, 2, 3, 4), (1, 2, 3, 5)), ValueError, (f"{_ATTENTION}: key", "(1, 2, 3, 5)", "(1, 2, 3, 4)")),
    ErrorCase(_attend((1, 1, 2, 4), (1, 1, 2, 4), dropout=1.0), ValueError, (_ATTENTION, "dropout", "1.0")),
    ErrorCase(_attend((1, 1, 2, 4), (1, 1, 3, 4), mask=(2, 2)), ValueError, (_ATTENTION, "mask", "(2, 2)")))))


def _attention_free(s: Source) -> Draw:
    """Any number of leading axes, as in the array notation."""
    leading, t, d = s.shape(0, 1, 1), s.integer(1, 4), s.integer(1, 4)
    sources = s.integer(1, 5)
    return [s.array((*leading, n, d), -2, 2) for n in (t, sources, sources)], {"causal": s.boolean()}


register(OpSpec(f"{_ATTENTION}: leading axes", _attention_free, formula=formulas.attention, wrt=(0, 1, 2)))

# ── rotary positions ──────────────────────────────────────────────────────────────────────────────────


def _rope(s: Source) -> Draw:
    t, half = s.side(), s.side()
    shape = (*s.shape(0, 2), t, 2 * half)
    return [s.array(shape), s.array((t, half), -1, 1), s.array((t, half), -1, 1)], {"interleaved": s.boolean()}


def _rope_rows(s: Source) -> Draw:
    t, half = s.integer(1, 9), s.integer(1, 20)
    operands = [s.array((3, t, 2 * half)), s.array((t, half), -1, 1), s.array((t, half), -1, 1)]
    return operands, {"interleaved": s.boolean()}


def _rope_large(s: Source) -> Draw:
    return [s.array((40, 60, 64)), s.array((60, 32)), s.array((60, 32))], {"interleaved": s.boolean()}


register(OpSpec("rope", _rope, formula=formulas.rope, gradient=formulas.rope_vjp, wrt=(0,), linear=(0,),
                batch=(_rope_rows, (0,)), large=_rope_large, errors=(
    ErrorCase(lambda: eg.rope(eg.zeros(2, 3), eg.zeros(2, 1), eg.zeros(2, 1)), ValueError, ("rope", "(2, 3)", "even")),
    ErrorCase(lambda: eg.rope(eg.zeros(2, 4), eg.zeros(2, 1), eg.zeros(2, 1)), ValueError,
              ("rope", "(2, 1)", "(2, 2)")))))

