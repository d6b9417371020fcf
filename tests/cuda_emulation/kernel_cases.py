"""Launches of every CUDA kernel, with what must come out and how far off it may be.

A case is the arguments in the order of kernels.h, and for each output the exact result with an error bound; both come
from the same equation over Rounded numbers (engine/testing/rounded.py), so no bound is chosen by hand. Sizes are such
that blocks do several tasks, rows end within a warp, and tiles are partly empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.backend.numpy_rows import random_words
from engine.testing import formulas
from engine.testing.bounds import unit_roundoff
from engine.testing.formulas import exp, log, mean, rsqrt, sqrt, total, where
from engine.testing.rounded import Rounded

KEY = (0x123456789ABCDEF, 7, 3, 11)  # seed, step, microbatch, site
IGNORE = -100


@dataclass
class KernelCase:
    """One launch. `outputs`: (exact value, error bound) of each output, which come first among the arguments."""

    kernel: str
    label: str
    dtype: np.dtype
    outputs: list[tuple[np.ndarray, Any]]
    inputs: list[Any]

    def __repr__(self) -> str:
        return f"{self.kernel}-{self.label}-{self.dtype.name}"

    def arguments(self) -> list[Any]:
        """Fresh outputs that mean nothing yet, then the inputs."""
        return [np.full(value.shape, *self.poison(value.dtype)) for value, _ in self.outputs] + self.inputs

    def poison(self, dtype: np.dtype) -> tuple[Any, np.dtype]:
        """(what an output holds before, its type): floats in the case's type, but for the sums that are in double."""
        if dtype.kind != "f":
            return 0x5A, dtype
        return np.nan, dtype if self.kernel == "sum_squares" else self.dtype


Cases = Iterator[tuple[str, list[Any], list[Any]]]  # label, outputs, inputs
_GROUPS: list[tuple[str, Callable[[Any, np.random.Generator], Cases]]] = []


def of(kernel: str) -> Callable[[Any], Any]:
    def register(make: Callable[[Any, np.random.Generator], Cases]) -> Any:
        _GROUPS.append((kernel, make))
        return make
    return register


def all_cases() -> list[KernelCase]:
    """Every case, in float and in double; the same numbers every time."""
    found = []
    for kernel, make in _GROUPS:
        for dtype in (np.dtype("float32"), np.dtype("float64")):
            with np.errstate(all="ignore"):  # −∞ where attention sees nothing
                made = list(make(dtype, np.random.default_rng(len(kernel))))
            for label, outputs, inputs in made:
                pairs = [(y.value, y.tolerance) if isinstance(y, Rounded) else (np.asarray(y), 0.0) for y in outputs]
                found.append(KernelCase(kernel, label, dtype, pairs, inputs))
    return [case for case in found if not (case.kernel == "random_bits" and case.dtype.itemsize == 8)]


def rounded(x: np.ndarray) -> Rounded:
    return Rounded(x, dtype=x.dtype.name)


def draw(rng: np.random.Generator, dtype: Any, *shape: int, low: float = -4, high: float = 4) -> np.ndarray:
    return rng.uniform(low, high, shape).astype(dtype)


# ── softmax ───────────────────────────────────────────────────────────────────────────────────────────

ROWS = ((7, 1), (5, 33), (7, 300))


@of("softmax")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in ROWS:
        x = draw(rng, dtype, rows, n, low=-20, high=20)
        yield f"{rows}x{n}", [formulas.softmax(rounded(x))], [x, rows, n]


@of("softmax_vjp")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in ROWS:
        g, y = draw(rng, dtype, rows, n), draw(rng, dtype, rows, n, low=0, high=1)
        a, b = rounded(g), rounded(y)
        yield f"{rows}x{n}", [b * (a - total(a * b, -1, True))], [g, y, rows, n]


@of("log_softmax")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in ROWS:
        x = draw(rng, dtype, rows, n, low=-20, high=20)
        yield f"{rows}x{n}", [formulas.log_softmax(rounded(x))], [x, rows, n]


@of("log_softmax_vjp")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in ROWS:
        g, y = draw(rng, dtype, rows, n), draw(rng, dtype, rows, n, low=-9, high=0)
        a, b = rounded(g), rounded(y)
        yield f"{rows}x{n}", [a - exp(b) * total(a, -1, True)], [g, y, rows, n]


@of("cross_entropy")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in ROWS:
        for smoothing in (0.0, 0.1):
            x, target = draw(rng, dtype, rows, n, low=-9, high=9), rng.integers(0, n, rows)
            target[2] = IGNORE
            loss = formulas.cross_entropy(rounded(x), target, label_smoothing=smoothing, reduction="none")
            yield (f"{rows}x{n},{smoothing}", [loss, formulas.logsumexp(rounded(x), -1)],
                   [x, target, rows, n, IGNORE, smoothing])


@of("cross_entropy_vjp")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in ROWS:
        for smoothing in (0.0, 0.1):
            x, g, target = draw(rng, dtype, rows, n), draw(rng, dtype, rows), rng.integers(0, n, rows)
            target[2] = IGNORE
            lse = formulas.logsumexp(x.astype("float64"), -1).astype(dtype)
            dx, _ = formulas.cross_entropy_vjp(rounded(g), rounded(x), target, ignore_index=IGNORE,
                                               label_smoothing=smoothing)
            yield f"{rows}x{n},{smoothing}", [dx], [g, x, lse, target, rows, n, IGNORE, smoothing]


# ── norms ─────────────────────────────────────────────────────────────────────────────────────────────

NORM_ROWS = ((1, 3), (37, 40), (70, 33))  # eight rows a task and eight columns a task, on three blocks


@of("layer_norm")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in NORM_ROWS:
        x, weight, bias = draw(rng, dtype, rows, n), draw(rng, dtype, n), draw(rng, dtype, n)
        a = rounded(x)
        y, center = formulas.layer_norm(a, rounded(weight), rounded(bias), 0.1), mean(a, -1)
        _, scale = formulas.normalized(a, 0.1)
        yield f"{rows}x{n}", [y, center, scale[:, 0]], [x, weight, bias, rows, n, 0.1]


@of("layer_norm_vjp")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in NORM_ROWS:
        g, x, weight = draw(rng, dtype, rows, n), draw(rng, dtype, rows, n), draw(rng, dtype, n)
        grads = formulas.layer_norm_vjp(rounded(g), rounded(x), rounded(weight), weight, 0.1)
        center = x.mean(1, dtype="float64")
        scale = 1 / np.sqrt(x.var(1, dtype="float64") + 0.1)
        yield f"{rows}x{n}", [*grads], [g, x, weight, center.astype(dtype), scale.astype(dtype), rows, n]


@of("rms_norm")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in NORM_ROWS:
        x, weight = draw(rng, dtype, rows, n), draw(rng, dtype, n)
        a = rounded(x)
        yield (f"{rows}x{n}", [formulas.rms_norm(a, rounded(weight), 0.1), rsqrt(mean(a * a, -1) + 0.1)],
               [x, weight, rows, n, 0.1])


@of("rms_norm_vjp")
def _(dtype: Any, rng: Any) -> Cases:
    for rows, n in NORM_ROWS:
        g, x, weight = draw(rng, dtype, rows, n), draw(rng, dtype, rows, n), draw(rng, dtype, n)
        grads = formulas.rms_norm_vjp(rounded(g), rounded(x), rounded(weight), 0.1)
        scale = 1 / np.sqrt(np.square(x, dtype="float64").mean(1) + 0.1)
        yield f"{rows}x{n}", [*grads], [g, x, weight, scale.astype(dtype), rows, n]


# ── attention ─────────────────────────────────────────────────────────────────────────────────────────

# batch, heads, kv_heads, t, s, d; what is special
ATTENTION = {
    "plain": ((1, 2, 2, 5, 40, 3), {}),
    "causal_grouped": ((1, 4, 2, 40, 40, 8), {"causal": True}),
    "two_passes": ((1, 1, 1, 5, 3, 130), {}),
    "mask_lengths": ((2, 1, 1, 3, 70, 4), {"mask": True, "lengths": np.array([0, 50])}),
    "dropout": ((1, 2, 1, 6, 34, 5), {"dropout": 0.4, "causal": True}),
    "few_keys": ((1, 1, 1, 40, 3, 4), {"causal": True}),
    "no_keys": ((1, 2, 1, 3, 0, 4), {}),
}


def kept(count: int, p: float, dtype: Any) -> np.ndarray:
    """What dropout multiplies element i by, i < count, under KEY (kernels/random.c)."""
    if dtype.itemsize == 4:
        u = (random_words(count, *KEY) >> 8).astype(dtype) * dtype.type(2.0**-24)
    else:
        words = random_words(2 * count, *KEY).astype("uint64").reshape(count, 2)
        u = ((words[:, 0] << np.uint64(32) | words[:, 1]) >> np.uint64(11)).astype(dtype) * 2.0**-53
    return np.where(u >= dtype.type(p), 1 / (1 - p), 0.0)


def turned(x: Any) -> Any:
    """(batch, heads, length, d) as (batch, length, heads, d), and back."""
    return np.swapaxes(x, 1, 2) if isinstance(x, np.ndarray) else x.moved(lambda a: np.swapaxes(a, 1, 2))


def apart(rng: Any, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An operand (batch, length, heads, d) whose axes are strided: out of a longer last axis, heads first."""
    b, t, h, d = shape
    return turned(draw(rng, dtype, b, h, t, d + 1, low=-2, high=2))[..., :d]


def element_strides(x: np.ndarray, axes: int) -> list[int]:
    return [n // x.itemsize for n in x.strides[:axes]]


def attention_case(dtype: Any, rng: Any, sizes: tuple[int, ...], causal: bool = False, mask: bool = False,
                   lengths: Any = None, dropout: float = 0.0) -> tuple[list[Any], dict[str, Any], list[Any], list[Any]]:
    """(operands q, k, v as passed; options of the formulas; mask and lengths as passed; sizes and scalars)."""
    batch, heads, kv_heads, t, s, d = sizes
    q, k, v = (apart(rng, dtype, (batch, n, h, d)) for h, n in ((heads, t), (kv_heads, s), (kv_heads, s)))
    added = np.broadcast_to(draw(rng, dtype, t, s), (batch, heads, t, s)) if mask else None
    if added is not None:
        added = np.where(rng.random(added.shape) < 0.2, -np.inf, added).astype(dtype)
    keep = kept(batch * heads * t * s, dropout, dtype).reshape(batch, heads, t, s) if dropout else 1.0
    scale = d ** -0.5
    strides = [*element_strides(turned(q), 3), *element_strides(turned(k), 3), *element_strides(turned(v), 3),
               *(element_strides(added, 4) if mask else [0] * 4), heads * d, kv_heads * d]
    options = {"causal": causal, "lengths": lengths, "scale": scale, "keep": keep, "mask": added}
    scalars = [*sizes, np.array(strides, np.int64), scale, int(causal), dropout, *KEY]
    return [q, k, v], options, [added, lengths], scalars


def log_sums(q: Any, k: Any, options: dict[str, Any]) -> Any:
    """lse: −∞ for a query that sees nothing."""
    t, s = q.shape[2], k.shape[2]
    scores = formulas.matmul(q, formulas.swap(formulas._spread_heads(k, q.shape[1]))) * options["scale"]
    scores = scores if options["mask"] is None else scores + options["mask"]
    seen = np.broadcast_to(np.isfinite(formulas.plain(scores)), scores.shape)
    if options["causal"]:
        seen = seen & (np.arange(s) <= np.arange(t)[:, None] + (s - t))
    if options["lengths"] is not None:
        seen = seen & (np.arange(s) < options["lengths"].reshape(-1, 1, 1, 1))
    if not s:
        return np.full(q.shape[:3], -np.inf)
    alive = seen.any(-1)
    top = np.where(alive, np.where(seen, formulas.plain(scores), -np.inf).max(-1, initial=-np.inf), 0.0)[..., None]
    safe = where(seen, scores, top)
    sums = total(where(seen, exp(safe - top), 0.0), -1)
    return where(alive, log(where(alive, sums, 1.0)) + top[..., 0], -np.inf)


@of("attention")
def _(dtype: Any, rng: Any) -> Cases:
    for label, (sizes, options) in ATTENTION.items():
        operands, formula, extra, scalars = attention_case(dtype, rng, sizes, **options)
        q, k, v = (rounded(turned(x)) for x in operands)
        want = [turned(formulas.attention(q, k, v, **formula)), turned(log_sums(q, k, formula))]
        yield label, want, [*operands, *extra, *scalars]


@of("attention_vjp")
def _(dtype: Any, rng: Any) -> Cases:
    for label, (sizes, options) in ATTENTION.items():
        operands, formula, extra, scalars = attention_case(dtype, rng, sizes, **options)
        exact = [turned(x).astype("float64") for x in operands]
        out = np.ascontiguousarray(turned(formulas.attention(*exact, **formula))).astype(dtype)
        lse = np.ascontiguousarray(turned(formulas.plain(log_sums(exact[0], exact[1], formula)))).astype(dtype)
        g = draw(rng, dtype, *out.shape)
        grads = formulas.attention_vjp(rounded(turned(g)), *(rounded(turned(x)) for x in operands), **formula)
        delta = total(rounded(g) * rounded(out), -1)
        yield label, [*map(turned, grads), delta], [g, *operands, out, lse, *extra, *scalars]


# ── gathering ─────────────────────────────────────────────────────────────────────────────────────────

TABLES = ((600, 700, 3), (5, 1000, 1), (40, 9, 300))  # tokens, vocabulary, n


@of("embedding")
def _(dtype: Any, rng: Any) -> Cases:
    for count, vocabulary, n in TABLES:
        weight, index = draw(rng, dtype, vocabulary, n), rng.integers(0, vocabulary, count)
        index[-1] = vocabulary  # no row of the table
        y = np.vstack([weight[index[:-1]], np.full((1, n), np.nan, dtype)])
        yield f"{count}_of_{vocabulary}x{n}", [y], [weight, index, count, vocabulary, n]


@of("embedding_vjp")
def _(dtype: Any, rng: Any) -> Cases:
    for count, vocabulary, n in TABLES:
        g, index = draw(rng, dtype, count, n), rng.integers(0, vocabulary, count)
        index[1::3] = index[0]  # one token many times
        dweight = np.zeros((vocabulary, n), dtype)
        for i, row in enumerate(index):
            dweight[row] += g[i]  # in ascending order: the same bits
        yield f"{count}_of_{vocabulary}x{n}", [dweight], [g, index, count, vocabulary, n]


@of("rope")
def _(dtype: Any, rng: Any) -> Cases:
    for interleaved in (0, 1):
        outer, t, d = 3, 7, 70
        x = draw(rng, dtype, outer, t, d)
        cosine, sine = draw(rng, dtype, t, d // 2, low=-1, high=1), draw(rng, dtype, t, d // 2, low=-1, high=1)
        y = formulas.rope(rounded(x), rounded(cosine), rounded(sine), bool(interleaved))
        yield f"interleaved={interleaved}", [y], [x, cosine, sine, outer, t, d, interleaved]


# ── random numbers ────────────────────────────────────────────────────────────────────────────────────

COUNTS = (1, 6, 1001)


def uniforms(count: int, dtype: Any) -> np.ndarray:
    """The uniform numbers of elements 0 … under KEY, in their own type."""
    if dtype.itemsize == 4:
        return (random_words(count, *KEY) >> 8).astype(dtype) * dtype.type(2.0**-24)
    words = random_words(2 * count, *KEY).astype("uint64").reshape(count, 2)
    return ((words[:, 0] << np.uint64(32) | words[:, 1]) >> np.uint64(11)).astype(dtype) * 2.0**-53


@of("random_bits")
def _(dtype: Any, rng: Any) -> Cases:
    for n in COUNTS:
        yield f"{n}", [random_words(n, *KEY)], [n, *KEY]


@of("random_uniform")
def _(dtype: Any, rng: Any) -> Cases:
    for n in COUNTS:
        yield f"{n}", [dtype.type(-2) + uniforms(n, dtype) * dtype.type(5)], [n, -2.0, 3.0, *KEY]


@of("random_normal")
def _(dtype: Any, rng: Any) -> Cases:
    for n in COUNTS:
        u = uniforms(n + n % 2, dtype).astype("float64").reshape(-1, 2)
        unit = unit_roundoff(dtype.name)
        angle = 2 * np.pi * u[:, 1]
        radius = sqrt(log(1.0 - rounded(u[:, 0].astype(dtype))) * -2.0) * 1.5
        parts = []
        for f in (np.cos, np.sin):  # 2π and the product are rounded, a slope is at most 1; then 2 ULPs of the function
            turned = Rounded(f(angle), 2 * unit * angle + 4 * unit, dtype=dtype.name)
            parts.append((radius * turned + 0.5).reshape(-1, 1))
        y = formulas.join(parts, 1).reshape(-1)[:n]
        yield f"{n}", [y], [n, 0.5, 1.5, *KEY]


@of("dropout")
def _(dtype: Any, rng: Any) -> Cases:
    for n in COUNTS:
        x = draw(rng, dtype, n)
        y = np.where(uniforms(n, dtype) >= dtype.type(0.3), x * dtype.type(1 / 0.7), dtype.type(0))
        yield f"{n}", [y], [x, n, 0.3, *KEY]


# ── sums, activations, optimizers ─────────────────────────────────────────────────────────────────────

SUM = DIVISOR, SCALE = 3.0, 0.7  # what is left of a gradient's sum: the mean, clipped


@of("sum_squares")
def _(dtype: Any, rng: Any) -> Cases:
    for n in (1, 5000, 4096 * 5):
        x = draw(rng, dtype, n)
        quotient = rounded(x) / DIVISOR
        wide = Rounded(quotient.value, quotient.error, dtype="float64")
        parts = [total((wide * wide)[i:i + 4096], 0, True) for i in range(0, n, 4096)]
        yield f"{n}", [formulas.join(parts, 0)], [x, n, DIVISOR]


def layout(out: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """The record of kernels.h for operands that broadcast to out's shape."""
    operands = [out, *[np.broadcast_to(x, out.shape) for x in inputs]]
    return np.array([out.ndim, *out.shape, *[n // x.itemsize for x in operands for n in x.strides]], np.int64)


ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")


def activation(name: str, vjp: bool) -> Callable[[Any, Any], Cases]:
    def make(dtype: Any, rng: Any) -> Cases:
        for label, shape in (("dense", (1000,)), ("one", ()), ("three_axes", (5, 7, 11)), ("empty", (0, 3))):
            x = draw(rng, dtype, *shape, low=-6, high=6)
            g = draw(rng, dtype, *shape)
            if label == "three_axes":
                x, g = x.transpose(2, 0, 1)[::-1].transpose(1, 2, 0), g[:1]  # strided; broadcast along an axis
            y = np.empty(shape, dtype)
            wide = np.broadcast_to(g, shape)
            if vjp:
                want = getattr(formulas, f"{name}_vjp")(rounded(wide), rounded(x))
                yield label, [want], [g, x, layout(y, g, x)]
            else:
                yield label, [getattr(formulas, name)(rounded(x))], [x, layout(y, x)]
    return make


for _name in ACTIVATIONS:
    of(_name)(activation(_name, False))
    of(f"{_name}_vjp")(activation(_name, True))

N = 1001  # elements: more than the threads of three blocks


def state(dtype: Any, rng: Any) -> tuple[list[np.ndarray], list[Rounded]]:
    """p, m, v ≥ 0 and g; and their exact values, but for g, which is what the rules make of it."""
    arrays = [draw(rng, dtype, N), draw(rng, dtype, N), draw(rng, dtype, N, low=0), draw(rng, dtype, N)]
    p, m, v, g = (rounded(x) for x in arrays)
    return arrays, [p, m, v, g / DIVISOR * SCALE]


@of("sgd")
def _(dtype: Any, rng: Any) -> Cases:
    (p, m, _, g), (a, b, _, c) = state(dtype, rng)
    lr, damp, decay = 0.1, 0.25, 0.01
    for nesterov in (0, 1):
        slope = c + a * decay
        moved = b * 0.9 + slope * (1 - damp)
        direction = slope + moved * 0.9 if nesterov else moved
        yield (f"nesterov={nesterov}", [a - direction * lr, moved],
               [p, m, g, N, *SUM, lr, 0.9, damp, decay, nesterov, 2])
    yield "first_step", [a - slope * lr, slope], [p, m, g, N, *SUM, lr, 0.9, damp, decay, 0, 1]
    yield "no_momentum", [a - slope * lr, np.full(N, np.nan)], [p, m, g, N, *SUM, lr, 0.0, damp, decay, 0, 2]


@of("adam")
def _(dtype: Any, rng: Any) -> Cases:
    (p, m, v, g), (a, b, c, d) = state(dtype, rng)
    lr, beta1, beta2, eps, decay, step = 0.01, 0.9, 0.999, 1e-3, 0.1, 5
    for decoupled in (0, 1):
        slope = d if decoupled else d + a * decay
        old = a * (1 - lr * decay) if decoupled else a
        moment, square = b * beta1 + slope * (1 - beta1), c * beta2 + slope * slope * (1 - beta2)
        change = moment / (sqrt(square) / np.sqrt(1 - beta2**step) + eps) * (lr / (1 - beta1**step))
        yield (f"decoupled={decoupled}", [old - change, moment, square],
               [p, m, v, g, N, *SUM, lr, beta1, beta2, eps, decay, decoupled, step])


@of("adagrad")
def _(dtype: Any, rng: Any) -> Cases:
    (p, _, v, g), (a, _, c, d) = state(dtype, rng)
    slope = d + a * 0.01
    square = c + slope * slope
    yield ("step_4", [a - slope / (sqrt(square) + 1e-3) * (0.1 / (1 + 3 * 0.5)), square],
           [p, v, g, N, *SUM, 0.1, 0.5, 1e-3, 0.01, 4])


@of("rmsprop")
def _(dtype: Any, rng: Any) -> Cases:
    (p, m, v, g), (a, b, c, d) = state(dtype, rng)
    slope = d + a * 0.01
    square = c * 0.99 + slope * slope * (1 - 0.99)
    direction = slope / (sqrt(square) + 1e-3)
    moved = b * 0.9 + direction
    yield "momentum", [a - moved * 0.1, square, moved], [p, v, m, g, N, *SUM, 0.1, 0.99, 1e-3, 0.01, 0.9, 3]
    yield ("no_momentum", [a - direction * 0.1, square, np.full(N, np.nan)],
           [p, v, m, g, N, *SUM, 0.1, 0.99, 1e-3, 0.01, 0.0, 3])
