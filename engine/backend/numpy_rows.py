"""One row a kernel, in NumPy: what the reference backend runs, and the CPU backend for types without C kernels.

A row takes exactly the arguments of its kernel in kernels.h, with arrays for pointers, so `row(y, x, layout)`.
`numpy_rows(xp)` builds the table over any module with NumPy's interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy

from engine.backend.codec_rows import codec_rows, from_upper_halves, to_upper_halves
from engine.backend.stored_rows import stored_rows
from engine.precision import FORMATS

Rows = dict[str, Callable[..., None]]


def numpy_rows(xp: Any) -> Rows:
    """The table of rows over `xp`, a module with NumPy's interface."""
    return {**elementwise_rows(xp), **reduction_rows(xp), **indexing_rows(xp), **random_rows(xp),
            **optimizer_rows(xp), **codec_rows(xp), **stored_rows(xp), "gemm": lambda *a: gemm(xp, *a)}


# ── elementwise: f(*inputs), written to the output; the layout is NumPy's own business ────────────────

def elementwise_rows(xp: Any) -> Rows:
    def row(function: Callable[..., Any]) -> Callable[..., None]:
        def run(y: Any, *inputs_and_layout: Any) -> None:
            y[...] = function(*inputs_and_layout[:-1])
        return run

    def densely(function: Callable[..., Any]) -> Callable[..., Any]:
        """NumPy has other code, with other bits, for other strides; so it gets them all dense."""
        def dense(x: Any) -> Any:  # one element counts as contiguous whatever its stride
            return x.copy() if x.size == 1 else xp.ascontiguousarray(x)
        return lambda *inputs: function(*[dense(x) for x in xp.broadcast_arrays(*inputs)])

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: function(x) if x.dtype.kind == "f" else x  # older NumPys make floats of integers

    def sigmoid(x: Any) -> Any:  # no overflow on either side
        e = xp.exp(-xp.abs(x))
        return xp.where(x >= 0, 1, e) / (1 + e)

    def power(a: Any, b: Any) -> Any:
        if a.dtype.kind in "iu" and xp.any(xp.asarray(b) < 0):
            raise ValueError("pow: an integer to a negative power is not an integer; convert to a float first")
        return xp.power(a, b)

    def floor_divide(a: Any, b: Any) -> Any:
        if a.dtype.kind == "f":  # NumPy goes by the remainder: NaN for ∞ // 2, and −1 for 1 // −∞, whose quotient is −0
            return xp.where(xp.isinf(a) | xp.isinf(b), a / b, xp.floor_divide(a, b))
        if not xp.all(b):
            raise ZeroDivisionError("floor_divide: integer division by zero")
        return xp.floor_divide(a, b)

    functions = {
        "copy": lambda x: x, "negative": xp.negative, "abs": xp.abs, "sign": xp.sign,
        "floor": whole(xp.floor), "ceil": whole(xp.ceil), "round": whole(xp.round), "trunc": whole(xp.trunc),
        "square": xp.square, "sqrt": xp.sqrt, "rsqrt": lambda x: 1 / xp.sqrt(x), "reciprocal": lambda x: 1 / x,
        "exp": xp.exp, "expm1": xp.expm1, "log": xp.log, "log1p": xp.log1p, "sin": xp.sin, "cos": xp.cos,
        "tanh": xp.tanh, "sigmoid": sigmoid, "erf": erf,
        "signbit": xp.signbit, "copysign": xp.copysign, "nextafter": xp.nextafter,
        "relu": lambda x: xp.where(x > 0, x, xp.where(x <= 0, 0, x)),  # NaN stays
        "softplus": lambda x: xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x))),
        "add": xp.add, "subtract": xp.subtract, "multiply": xp.multiply, "divide": xp.divide, "pow": power,
        "floor_divide": floor_divide, "remainder": xp.remainder,
        "maximum": xp.maximum, "minimum": xp.minimum, "where": xp.where,
        "equal": xp.equal, "not_equal": xp.not_equal, "less": xp.less, "less_equal": xp.less_equal,
        "logical_and": xp.logical_and, "logical_or": xp.logical_or, "logical_xor": xp.logical_xor,
        "logical_not": xp.logical_not, "bitwise_and": xp.bitwise_and, "bitwise_or": xp.bitwise_or,
        "bitwise_xor": xp.bitwise_xor, "bitwise_not": xp.invert, "bitwise_left_shift": xp.left_shift,
        "bitwise_right_shift": xp.right_shift,
        "isnan": xp.isnan, "isinf": xp.isinf, "isfinite": xp.isfinite,
    }
    functions |= {name: densely(function) for name, function in {
        "log2": xp.log2, "log10": xp.log10, "logaddexp": xp.logaddexp, "hypot": xp.hypot, "tan": xp.tan,
        "asin": xp.arcsin, "acos": xp.arccos, "atan": xp.arctan, "atan2": xp.arctan2, "sinh": xp.sinh, "cosh": xp.cosh,
        "asinh": xp.arcsinh, "acosh": xp.arccosh, "atanh": xp.arctanh}.items()}
    rows = {name: row(function) for name, function in functions.items()}

    def cast(y: Any, x: Any, *_layout: Any) -> None:
        xp.copyto(y, x, casting="unsafe")

    def fill(y: Any, value: Any) -> None:
        y[...] = value

    def arange(y: Any, start: Any, step: Any) -> None:
        if y.dtype.kind == "f" or isinstance(start, float) or isinstance(step, float):
            y[...] = start + step * xp.arange(y.size)
        else:  # modulo 2⁶⁴, which every integer type takes its own bits of
            first, gap = (xp.asarray(n % 2**64, "uint64") for n in (start, step))
            y[...] = (first + gap * xp.arange(y.size, dtype="uint64")).astype(y.dtype)

    return {**rows, "cast": cast, "fill": fill, "arange": arange}


def erf(x: Any) -> Any:
    """NumPy has no erf; the C library's, one element at a time."""
    return numpy.vectorize(math.erf, otypes=[float])(numpy.asarray(x, dtype=float))


# ── reductions over (outer, n, inner) ─────────────────────────────────────────────────────────────────

def reduction_rows(xp: Any) -> Rows:
    def row(function: Callable[..., Any]) -> Callable[..., None]:
        def run(y: Any, x: Any, outer: int, n: int, inner: int) -> None:
            y.reshape(outer, inner)[...] = function(x.reshape(outer, n, inner))
        return run

    def logsumexp(x: Any) -> Any:
        if not x.shape[1]:
            return -math.inf
        top = x.max(1, keepdims=True)
        safe = xp.where(xp.isfinite(top), top, 0)
        return (xp.log(xp.exp(x - safe).sum(1, keepdims=True)) + safe)[:, 0]

    def running(function: Callable[..., Any]) -> Callable[..., None]:
        def run(y: Any, x: Any, outer: int, n: int, inner: int) -> None:
            function(x.reshape(outer, n, inner), axis=1, out=y.reshape(outer, n, inner))
        return run

    def sum_squares(partial: Any, x: Any, n: int, divisor: float) -> None:
        """Zeros fill a short last block, since NumPy adds in an order that depends on how many there are."""
        for block in range(partial.size):
            part, whole = x.reshape(-1)[block * 4096:(block + 1) * 4096], xp.zeros(4096)
            whole[:part.size] = part / divisor
            partial[block] = xp.square(whole).sum()

    return {"sum": row(lambda x: x.sum(1)), "prod": row(lambda x: x.prod(1)),
            "max": row(lambda x: x.max(1)), "min": row(lambda x: x.min(1)),
            "argmax": row(lambda x: x.argmax(1)), "argmin": row(lambda x: x.argmin(1)),
            "any": row(lambda x: x.any(1)), "all": row(lambda x: x.all(1)),
            "logsumexp": row(logsumexp), "cumulative_sum": running(xp.cumsum), "cumulative_prod": running(xp.cumprod),
            "sum_squares": sum_squares}


# ── matrix product: the operands are walked by their strides, as the C kernel does ────────────────────

def gemm(xp: Any, c: Any, a: Any, b: Any, bias: Any, batch: int, m: int, n: int, k: int,
         a_batch: int, a_row: int, a_col: int, b_batch: int, b_row: int, b_col: int,
         c_batch: int, c_row: int, accumulate: int, format: int) -> None:
    strided = xp.lib.stride_tricks.as_strided

    def walk(x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return strided(x, shape, [s * x.itemsize for s in strides])

    left, right = walk(a, (batch, m, k), (a_batch, a_row, a_col)), walk(b, (batch, k, n), (b_batch, b_row, b_col))
    left, right = to_format(xp, left, format), to_format(xp, right, format)
    target = walk(c, (batch, m, n), (c_batch, c_row, 1))
    product = xp.matmul(left, right)
    if bias is not None:
        product = product + bias
    target[...] = target + product if accumulate else product


def to_format(xp: Any, x: Any, format: int) -> Any:
    """float32 rounded to a format of precision.py, ties to even, and still float32; other types as they are."""
    if format == FORMATS["float32"] or x.dtype != "float32":
        return x
    return x.astype("float16").astype("float32") if format == FORMATS["float16"] \
        else from_upper_halves(to_upper_halves(xp, x))


# ── gathering and scattering ──────────────────────────────────────────────────────────────────────────

def indexing_rows(xp: Any) -> Rows:
    def gather(y: Any, x: Any, index: Any) -> None:
        y[...] = x[index]

    def scatter_add(y: Any, g: Any, index: Any) -> None:  # y is zeroed or holds what g adds to
        xp.add.at(y, index, g)

    def scatter(y: Any, value: Any, index: Any) -> None:
        y[index] = value

    def scatter_runs(y: Any, values: Any, starts: Any) -> None:
        """y[starts[i] : starts[i] + n] = values[i], for flat y, values (count, n), and runs that do not overlap."""
        n = values.shape[1]
        if values.size:
            runs = xp.lib.stride_tricks.as_strided(y, (y.size - n + 1, n), (y.itemsize, y.itemsize))
            runs[starts] = values

    def sort(y: Any, x: Any, axis: int, descending: bool) -> None:
        y[...] = xp.flip(xp.sort(xp.flip(x, axis), axis, kind="stable"), axis) if descending \
            else xp.sort(x, axis, kind="stable")

    def argsort(y: Any, x: Any, axis: int, descending: bool) -> None:
        if descending:  # stable from the other end: equal elements keep their order
            y[...] = x.shape[axis] - 1 - xp.flip(xp.argsort(xp.flip(x, axis), axis, kind="stable"), axis)
        else:
            y[...] = xp.argsort(x, axis, kind="stable")

    def check_index(index: Any, length: int, ignore: int | None, told: str) -> None:
        """Raise IndexError(told) with the first element that is neither in [0, length) nor `ignore`."""
        wrong = (index < 0) | (index >= length)
        if wrong.any():
            wrong = wrong if ignore is None else wrong & (index != ignore)
            if wrong.any():
                raise IndexError(told.format(index[wrong][0]))

    def count_unequal(y: Any, x: Any, value: int) -> None:
        y[...] = (x != value).sum()

    def embedding(y: Any, weight: Any, index: Any, count: int, vocabulary: int, n: int) -> None:
        y.reshape(count, n)[...] = weight[index.reshape(count)]

    def embedding_vjp(dweight: Any, g: Any, index: Any, count: int, vocabulary: int, n: int) -> None:
        dweight[...] = 0
        xp.add.at(dweight.reshape(vocabulary, n), index.reshape(count), g.reshape(count, n))

    return {"gather": gather, "scatter_add": scatter_add, "scatter": scatter, "scatter_runs": scatter_runs,
            "check_index": check_index, "count_unequal": count_unequal,
            "sort": sort, "argsort": argsort, "embedding": embedding, "embedding_vjp": embedding_vjp}


# ── random numbers: Philox4x32-10, the same words as random.c ─────────────────────────────────────────

def philox(counter: numpy.ndarray, key: tuple[int, int]) -> numpy.ndarray:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): counter (blocks, 4) uint32 -> words (blocks, 4) uint32."""
    c = [counter[:, i].astype("uint64") for i in range(4)]
    k0, k1 = numpy.uint64(key[0]), numpy.uint64(key[1])
    low, half = numpy.uint64(0xFFFFFFFF), numpy.uint64(32)
    for _ in range(10):
        p0, p1 = numpy.uint64(0xD2511F53) * c[0], numpy.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> half) ^ c[1] ^ k0, p1 & low, (p0 >> half) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + numpy.uint64(0x9E3779B9)) & low, (k1 + numpy.uint64(0xBB67AE85)) & low
    return numpy.stack(c, axis=1).astype("uint32")


def random_words(n: int, seed: int, step: int, microbatch: int, site: int) -> numpy.ndarray:
    """The first n words of a site: word i is word i % 4 of the block with counter (i // 4, site, microbatch, step)."""
    blocks = -(-n // 4)
    counter = numpy.empty((blocks, 4), "uint32")
    counter[:, 0] = numpy.arange(blocks)
    counter[:, 1:] = (site, microbatch, step)
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[:n]


def random_rows(xp: Any) -> Rows:
    def unit(n: int, double: bool, *key: int) -> numpy.ndarray:
        """Uniform in [0, 1): 24 bits of one word for float, 53 bits of two for double."""
        if not double:
            return (random_words(n, *key) >> 8).astype("float32") * numpy.float32(2.0**-24)
        words = random_words(2 * n, *key).astype("uint64").reshape(n, 2)
        bits = (words[:, 0] << numpy.uint64(32) | words[:, 1]) >> numpy.uint64(11)
        return bits.astype("float64") * 2.0**-53

    def random_uniform(y: Any, n: int, low: float, high: float, *key: int) -> None:
        u = unit(n, y.dtype.itemsize == 8, *key)
        y.reshape(-1)[...] = xp.asarray(u.dtype.type(low) + u.dtype.type(high - low) * u)

    def random_normal(y: Any, n: int, mean: float, std: float, *key: int) -> None:
        u = unit(n + n % 2, y.dtype.itemsize == 8, *key).reshape(-1, 2)
        radius = numpy.sqrt(-2 * numpy.log(1 - u[:, 0]))  # 1 − u is in (0, 1]
        angle = 2 * math.pi * u[:, 1]
        pair = numpy.stack([radius * numpy.cos(angle), radius * numpy.sin(angle)], axis=1)
        y.reshape(-1)[...] = xp.asarray((mean + std * pair).reshape(-1)[:n])

    def dropout(y: Any, x: Any, n: int, p: float, *key: int) -> None:
        keep = unit(n, y.dtype.itemsize == 8, *key) >= p
        y.reshape(-1)[...] = xp.asarray(keep) * x.reshape(-1) * x.dtype.type(1 / (1 - p) if p < 1 else 0)

    def random_bits(y: Any, n: int, *key: int) -> None:
        y.reshape(-1)[...] = xp.asarray(random_words(n, *key))

    return {"random_uniform": random_uniform, "random_normal": random_normal, "dropout": dropout,
            "random_bits": random_bits}


# ── optimizers: the update rules of engine/optim/rules.py, where the equations stand ──────────────────

def optimizer_rows(xp: Any) -> Rows:
    def sgd(new_p: Any, new_m: Any, p: Any, m: Any, g: Any, n: int, divisor: float, scale: float, lr: float,
            momentum: float, dampening: float, weight_decay: float, nesterov: int, step: int) -> None:
        g = g / divisor * scale + weight_decay * p
        if momentum:
            moved = g if step == 1 else momentum * m + (1 - dampening) * g
            g = g + momentum * moved if nesterov else moved
            new_m[...] = moved
        new_p[...] = p - lr * g

    def adam(new_p: Any, new_m: Any, new_v: Any, p: Any, m: Any, v: Any, g: Any, n: int, divisor: float,
             scale: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: int,
             step: int) -> None:
        g = g / divisor * scale
        if decoupled:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        new_m[...] = beta1 * m + (1 - beta1) * g
        new_v[...] = beta2 * v + (1 - beta2) * g * g
        new_p[...] = p - lr / (1 - beta1**step) * new_m / (xp.sqrt(new_v) / math.sqrt(1 - beta2**step) + eps)

    def adagrad(new_p: Any, new_s: Any, p: Any, s: Any, g: Any, n: int, divisor: float, scale: float, lr: float,
                lr_decay: float, eps: float, weight_decay: float, step: int) -> None:
        g = g / divisor * scale + weight_decay * p
        new_s[...] = s + g * g
        new_p[...] = p - lr / (1 + (step - 1) * lr_decay) * g / (xp.sqrt(new_s) + eps)

    def rmsprop(new_p: Any, new_v: Any, new_m: Any, p: Any, v: Any, m: Any, g: Any, n: int, divisor: float,
                scale: float, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float,
                step: int) -> None:
        g = g / divisor * scale + weight_decay * p
        new_v[...] = alpha * v + (1 - alpha) * g * g
        g = g / (xp.sqrt(new_v) + eps)
        if momentum:
            g = momentum * m + g
            new_m[...] = g
        new_p[...] = p - lr * g

    return {"sgd": sgd, "adam": adam, "adagrad": adagrad, "rmsprop": rmsprop}
