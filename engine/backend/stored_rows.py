"""The kernels of stored weights, as NumPy rows: blocks as GGUF files have them, made, dealt out to panels, read back.

32 weights of a row are a block: a float16 scale d (Q4_1: and a float16 minimum m), then quants. After ggml's formats,
with its reference's rounding:

    Q8_0 (34 bytes)   w = d q          d = max |x| / 127         q = x/d rounded, halves away from 0: 32 signed bytes
    Q4_0 (18 bytes)   w = d (q − 8)    d = x*/−8                 q = ⌊x/d + 8.5⌋, at most 15; x* is the x of largest |x|
    Q4_1 (20 bytes)   w = d q + m      d = (max − min)/15        q = ⌊(x − min)/d + 0.5⌋, at most 15; m = min
    BF16 (64 bytes)   w = q            there is none             q = x rounded to bfloat16, ties to even

Of 4-bit quants byte i holds weight i in its lower half and weight i + 16 in the upper one. d and m are rounded to
float16 when they are stored, and q is computed before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from engine.backend.codec_rows import from_upper_halves, to_upper_halves

Rows = dict[str, Callable[..., None]]
BLOCK = 32
"""Weights in a block, and rows in a panel (kernels.h)."""


class Scheme(NamedTuple):
    """How weights are quantised: GGUF's number for it, and the bytes of a block's header and of its quants."""

    number: int
    header: int
    quants: int

    @property
    def bytes(self) -> int:
        return self.header + self.quants


SCHEMES = {"q8_0": Scheme(8, 2, 32), "q4_0": Scheme(2, 2, 16), "q4_1": Scheme(3, 4, 16),
           "bf16": Scheme(30, 0, 64)}
NUMBERED = {scheme.number: (name, scheme) for name, scheme in SCHEMES.items()}


def stored_rows(xp: Any) -> Rows:
    """The table of rows over `xp`, a module with NumPy's interface."""
    def reciprocal(d: Any) -> Any:
        return xp.where(d != 0, 1 / xp.where(d != 0, d, 1), 0).astype("float32")

    def q8_0(x: Any) -> tuple[Any, Any]:
        d = (xp.abs(x).max(-1, keepdims=True) / 127).astype("float32")
        y = x * reciprocal(d)
        whole = xp.trunc(y)
        return d, (whole + xp.trunc(2 * (y - whole))).astype("int8").view("uint8")

    def halves(q: Any) -> Any:
        q = xp.minimum(q, 15).astype("uint8")
        return q[..., :16] | q[..., 16:] << 4

    def q4_0(x: Any) -> tuple[Any, Any]:
        extreme = xp.take_along_axis(x, xp.abs(x).argmax(-1)[..., None], -1)
        d = (extreme + 0) / -8  # −0 counts as 0
        return d, halves(x * reciprocal(d) + 8.5)

    def q4_1(x: Any) -> tuple[Any, Any, Any]:
        m = x.min(-1, keepdims=True)
        d = (x.max(-1, keepdims=True) - m) / 15
        return d, m, halves((x - m) * reciprocal(d) + 0.5)

    def refuse(x: Any, wrong: Any, expected: str) -> None:
        """x (n, k/32, 32); wrong (n, k/32, ...): whether anything of a block is."""
        if wrong.any():
            row, block = divmod(int(wrong.reshape(*x.shape[:2], -1).any(-1).reshape(-1).argmax()), x.shape[1])
            raise ValueError(f"quantize: row {row} of weight holds numbers from {x[row, block].min()} to "
                             f"{x[row, block].max()} in block {block}, expected finite ones, {expected}")

    def bf16(x: Any) -> tuple[Any]:
        upper = to_upper_halves(xp, x).astype("uint16")
        refuse(x, upper & 0x7F80 == 0x7F80, "that bfloat16 has (up to 3.3895e+38)")
        return (upper.view("uint8"),)

    def quantize(blocks: Any, x: Any, scheme_number: int) -> None:
        """blocks (n, k/32 · bytes of a block) from x (n, k)."""
        n, k = x.shape
        name, scheme = NUMBERED[scheme_number]
        x = x.astype("float32").reshape(n, k // BLOCK, BLOCK)
        *numbers, quants = {"q8_0": q8_0, "q4_0": q4_0, "q4_1": q4_1, "bf16": bf16}[name](x)
        target = blocks.reshape(n, k // BLOCK, scheme.bytes)
        for i, number in enumerate(numbers):
            half = number.astype("float16")
            refuse(x, ~xp.isfinite(half), "with a scale that float16 has (up to 65504)")
            target[..., 2 * i:2 * i + 2] = half.view("uint8")
        target[..., scheme.header:] = quants

    def parts(panels: Any, scheme: Scheme) -> tuple[Any, Any]:
        """Views of the headers (panel, block, number, row, 2 bytes) and quants (panel, block, word, row, 4 bytes)."""
        count, steps, _ = panels.shape
        head = BLOCK * scheme.header
        return (panels[..., :head].reshape(count, steps, scheme.header // 2, BLOCK, 2),
                panels[..., head:].reshape(count, steps, scheme.quants // 4, BLOCK, 4))

    def deal_blocks(panels: Any, blocks: Any, number: int) -> None:
        """panels (⌈n/32⌉, k/32, 32 · bytes of a block), as kernels.h has them, from the blocks (n, k/32 · bytes)."""
        _, scheme = NUMBERED[number]
        rows, (count, steps, _) = blocks.shape[0], panels.shape
        whole = xp.zeros((count * BLOCK, steps, scheme.bytes), "uint8")
        whole[:rows] = blocks.reshape(rows, steps, scheme.bytes)
        whole = whole.reshape(count, BLOCK, steps, scheme.bytes)
        header, quants = parts(panels, scheme)
        for part, taken in ((header, whole[..., :scheme.header]), (quants, whole[..., scheme.header:])):
            each = taken.reshape(count, BLOCK, steps, part.shape[2], part.shape[4])
            part[...] = each.transpose(0, 2, 3, 1, 4)

    def gather_blocks(blocks: Any, panels: Any, number: int) -> None:
        """The reverse."""
        _, scheme = NUMBERED[number]
        rows, (count, steps, _) = blocks.shape[0], panels.shape
        target, (header, quants) = blocks.reshape(rows, steps, scheme.bytes), parts(panels, scheme)
        for at, part in ((0, header), (scheme.header, quants)):
            size = part.shape[2] * part.shape[4]
            whole = part.transpose(0, 3, 1, 2, 4).reshape(count * BLOCK, steps, size)
            target[..., at:at + size] = whole[:rows]

    def dequantize(y: Any, panels: Any, index: Any, number: int) -> None:
        """y[i] = row index[i] of the matrix in `panels`."""
        _, scheme = NUMBERED[number]
        panel, lane, steps = index // BLOCK, index % BLOCK, panels.shape[1]
        header, quants = (part[panel, :, :, lane] for part in parts(panels, scheme))
        q = xp.ascontiguousarray(quants).reshape(len(index), steps, scheme.quants)
        if not scheme.header:
            y[...] = from_upper_halves(q.view("uint16")).reshape(y.shape)
            return
        header = xp.ascontiguousarray(header).view("float16").astype(y.dtype)[..., 0]
        d = header[..., :1]
        if scheme.quants == BLOCK:
            w = d * q.view("int8").astype(y.dtype)
        else:
            nibbles = xp.empty((len(index), steps, BLOCK), y.dtype)
            nibbles[..., :16], nibbles[..., 16:] = q & 15, q >> 4
            w = d * nibbles + header[..., 1:] if scheme.header == 4 else d * (nibbles - 8)
        y[...] = w.reshape(y.shape)

    def pack_weight(panels: Any, weight: Any, n: int, k: int, _row: int, _column: int) -> None:
        count, _, width = panels.shape
        whole = xp.zeros((count * width, k), weight.dtype)
        whole[:n] = weight
        panels[...] = whole.reshape(count, width, k).transpose(0, 2, 1)

    def packed_rows(y: Any, panels: Any, index: Any) -> None:
        """y[i] = row index[i] of the matrix in `panels`."""
        width = panels.shape[2]
        y[...] = panels[index // width, :, index % width]

    return {"quantize": quantize, "deal_blocks": deal_blocks, "gather_blocks": gather_blocks, "dequantize": dequantize,
            "pack_weight": pack_weight, "packed_rows": packed_rows}
