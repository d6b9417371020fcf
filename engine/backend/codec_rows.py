"""The kernels of gradient compression, as NumPy rows: numbers into fewer bits and back (engine/sharder/compression.py).

All work on flat float32 or float64 arrays, block by block from the first element; the last block may be short. What is
sent must be such that x − sent is a number of x's type, exactly (but for signs): the sender keeps the difference.

    a multiple of ulp(x) that is not larger than |x|        is exact: it has no more digits than x
    x − y with y/2 ≤ x ≤ 2 y                                is exact: Sterbenz's lemma
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Rows = dict[str, Callable[..., None]]


def codec_rows(xp: Any) -> Rows:
    """The table of rows over `xp`, a module with NumPy's interface."""
    return {**half_rows(xp), **int8_rows(xp), **sign_rows(xp), **largest_rows(xp)}


def blocks(block: int, *arrays: tuple[Any, int]) -> Iterator[tuple[Any, ...]]:
    """Matrices of one row a block: of the whole blocks, then of the short one. arrays: (flat array, its elements for a
    block), where 1 is also what a short block has."""
    whole = arrays[0][0].size // block
    if whole:
        yield tuple(a[:whole * per].reshape(whole, per) for a, per in arrays)
    if arrays[0][0].size % block:
        yield tuple(a[whole * per:].reshape(1, -1) for a, per in arrays)


# ── 16 bits ───────────────────────────────────────────────────────────────────────────────────────────

def to_upper_halves(xp: Any, x: Any) -> Any:
    """float32 rounded to bfloat16, ties to even: the upper halves of its bits, as uint32."""
    bits = x.view("uint32")
    return xp.where(xp.isnan(x), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def from_upper_halves(halves: Any) -> Any:
    return (halves.astype("uint32") << 16).view("float32")


def half_rows(xp: Any) -> Rows:
    def saturated(x: Any, top: float, step: float) -> Any:
        """x, but where it would round to `top` or beyond, the largest number below (their ulp is `step`) that is a
        multiple of x's own ulp; Inf and NaN stay."""
        over = (xp.abs(x) >= top - step / 2) & xp.isfinite(x)
        if not over.any():
            return x
        _, exponent = xp.frexp(x[over])
        ulp = xp.ldexp(1.0, exponent - (24 if x.dtype.itemsize == 4 else 53))
        x = x.copy()
        x[over] = xp.copysign(xp.where(ulp <= top, top - xp.maximum(ulp, step), 0.0), x[over])
        return x

    def to_float16(q: Any, x: Any) -> None:
        q[...] = saturated(x, 2.0**16, 2.0**5).astype("float16").view("uint16")

    def from_float16(y: Any, q: Any) -> None:
        y[...] = q.view("float16")

    def to_bfloat16(q: Any, x: Any) -> None:
        q[...] = to_upper_halves(xp, saturated(x, 2.0**128, 2.0**120).astype("float32"))

    def from_bfloat16(y: Any, q: Any) -> None:
        y[...] = from_upper_halves(q)

    return {"to_float16": to_float16, "from_float16": from_float16,
            "to_bfloat16": to_bfloat16, "from_bfloat16": from_bfloat16}


# ── 8 bits and a scale a block ────────────────────────────────────────────────────────────────────────

def int8_rows(xp: Any) -> Rows:
    def to_int8(q: Any, scale: Any, x: Any, block: int) -> None:
        """q = round(x / s), s = max |x| / 127 of the block, a little less so that 127 s ≤ max |x|. Where q ≠ 0, q s is
        within a factor of 2 of x. −128 stands for what is not finite."""
        share = x.dtype.type((1 - 4 * xp.finfo(x.dtype).eps) / 127)
        for xs, qs, s in blocks(block, (x, block), (q, block), (scale, 1)):
            finite = xp.isfinite(xs)
            s[...] = xp.where(finite, xp.abs(xs), 0).max(axis=1, keepdims=True) * share
            ratio = xp.where(finite, xs, 0) / xp.where(s > 0, s, 1)
            qs[...] = xp.where(finite & (s > 0), xp.clip(xp.rint(ratio), -127, 127), xp.where(finite, 0, -128))

    def from_int8(y: Any, q: Any, scale: Any, block: int) -> None:
        for qs, ys, s in blocks(block, (q, block), (y, block), (scale, 1)):
            ys[...] = xp.where(qs == -128, xp.nan, qs.astype(y.dtype) * s)

    return {"to_int8": to_int8, "from_int8": from_int8}


# ── one bit and two means a block ─────────────────────────────────────────────────────────────────────

def sign_rows(xp: Any) -> Rows:
    def to_signs(bits: Any, below: Any, above: Any, x: Any, block: int) -> None:
        """A bit for x ≥ 0, and the means of those below 0 and of the others."""
        bits[...] = xp.packbits(x >= 0)
        for xs, low, high in blocks(block, (x, block), (below, 1), (above, 1)):
            positive = xs >= 0
            for mean, chosen in ((low, ~positive), (high, positive)):
                count = xp.maximum(chosen.sum(axis=1, keepdims=True), 1)
                mean[...] = xp.where(chosen, xs, 0).sum(axis=1, keepdims=True, dtype="float64") / count

    def from_signs(y: Any, bits: Any, below: Any, above: Any, block: int) -> None:
        positive = xp.unpackbits(bits)[:y.size].astype(bool)
        for ys, chosen, low, high in blocks(block, (y, block), (positive, block), (below, 1), (above, 1)):
            ys[...] = xp.where(chosen, high, low)

    return {"to_signs": to_signs, "from_signs": from_signs}


# ── the largest of each block ─────────────────────────────────────────────────────────────────────────

def largest_rows(xp: Any) -> Rows:
    def largest(values: Any, positions: Any, x: Any, count: int, block: int) -> None:
        """The ⌈count · n / block⌉ elements of largest size of each block of n, by ascending position in it; of equal
        ones the first. What is not finite is largest."""
        start = 0
        for (xs,) in blocks(block, (x, block)):
            n = xs.shape[1]
            taken = -(-count * n // block)
            size = xp.where(xp.isfinite(xs), xp.abs(xs), xp.inf)
            least = xp.partition(size, n - taken, axis=1)[:, n - taken, None]
            above, equal = size > least, size == least
            missing = taken - above.sum(axis=1, keepdims=True)
            chosen = above | (equal & (xp.cumsum(equal, axis=1) <= missing))
            stop = start + taken * len(xs)
            values[start:stop] = xs[chosen]
            positions[start:stop] = xp.nonzero(chosen)[1]
            start = stop

    return {"largest": largest}
