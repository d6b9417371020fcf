"""Gradients as bytes: what travels in place of an array, and what each way of writing n numbers down costs.

    fp16, bf16  the nearest number of 16 bits; beyond the largest one, a large one                       2 ×
    int8        q · s for whole numbers q in ±127, s = max |x| / 127 of each block of 256                3.94 ×
    topk:0.01   the share of largest size of each block of 4096, as they are; the others as 0            66 ×
    1bit        the mean of those of x's sign, of each block of 1024                                     30 ×
    rows        the touched rows of a row-sparse gradient, as they are

Blocks are counted from a parameter's first element and divide the blocks that shards own (partition.py), so what is
sent does not depend on how many shards there are.

A payload is a header, which says which codec, and the codec's arrays, whose lengths follow from the header. Reading one
refuses, with one line, whatever writing one never makes, and allocates nothing before it knows that the numbers are as
many as are expected. Nothing is unpickled.

Seide, Fu, Droppo, Li, Yu 2014, "1-Bit Stochastic Gradient Descent" (1bit); Dettmers 2015, arXiv:1511.04561 (8 bits by
block); Aji, Heafield 2017, arXiv:1704.05021 (topk).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType, int8, uint8, uint16
from engine.optim.clip import BLOCK
from engine.rowsparse import RowSparse

HEADER = struct.Struct("<4sBBHQ")  # magic, codec, bytes of a number, the codec's parameter, how many numbers
MAGIC = b"grad"

Sections = Sequence["tuple[DType, int]"]
Self = TypeVar("Self", bound="Codec")


@dataclass(frozen=True)
class Payload:
    """What travels in place of a gradient."""

    data: bytes

    def __repr__(self) -> str:
        return f"Payload({len(self.data)} bytes)"

    def decode(self, k: Backend, size: int, dtype: DType) -> Array:
        """The numbers, flat: `size` of them, of type `dtype`. Raises ValueError with one line for anything else."""
        if len(self.data) < HEADER.size:
            raise ValueError(f"payload: {len(self.data)} bytes, expected at least {HEADER.size}")
        magic, tag, itemsize, parameter, elements = HEADER.unpack_from(self.data)
        codec = CODECS.get(tag)
        if magic != MAGIC or codec is None:
            raise ValueError(f"payload: begins with {self.data[:5]!r}, which no codec writes")
        if (itemsize, elements) != (dtype.itemsize, size):
            raise ValueError(f"payload: {elements} numbers of {itemsize} bytes, expected {size} of {dtype.itemsize}")
        try:
            return codec.read(k, memoryview(self.data)[HEADER.size:], parameter, size, dtype)
        except ValueError as error:
            raise ValueError(f"payload: {codec.name}: {error}") from None


@dataclass(frozen=True)
class Codec:
    """A way of writing numbers down. parameter: what a reader must know besides how many there are."""

    parameter: int = 0

    tag: ClassVar[int]
    name: ClassVar[str]

    def sections(self, n: int, dtype: DType) -> Sections:
        """The arrays that are sent for n numbers: element type and length of each, the wider first."""
        raise NotImplementedError

    def pack(self, k: Backend, x: Array, *sections: Array) -> None:
        """Fill the arrays from x."""
        raise NotImplementedError

    def unpack(self, k: Backend, y: Array, *sections: Array) -> None:
        """Fill y from the arrays. Raises ValueError for what pack never makes."""
        raise NotImplementedError

    def write(self, k: Backend, x: Array) -> Payload:
        """x, flat float32 or float64, as bytes."""
        sections = [k.empty((length,), dtype) for dtype, length in self.sections(x.size, x.dtype)]
        self.pack(k, x, *sections)
        return self.frame(x.size, x.dtype, *(k.to_numpy(section) for section in sections))

    def frame(self, size: int, dtype: DType, *sections: np.ndarray) -> Payload:
        header = HEADER.pack(MAGIC, self.tag, dtype.itemsize, self.parameter, size)
        return Payload(b"".join([header, *(section.tobytes() for section in sections)]))

    @classmethod
    def read(cls: type[Self], k: Backend, body: memoryview, parameter: int, size: int, dtype: DType) -> Array:
        """What write made bytes of."""
        codec = cls(parameter)
        sections = cut(body, codec.sections(size, dtype))
        y = k.empty((size,), dtype)
        codec.unpack(k, y, *(k.from_numpy(section) for section in sections))
        return y


def cut(body: memoryview, sections: Sections) -> list[np.ndarray]:
    """The arrays that lie end to end in `body`, read-only views. Raises ValueError unless they fill it."""
    expected = sum(dtype.itemsize * length for dtype, length in sections)
    if len(body) != expected:
        raise ValueError(f"{len(body)} bytes, expected {expected}")
    found, offset = [], 0
    for dtype, length in sections:
        found.append(np.frombuffer(body, dtype.numpy, length, offset))
        offset += dtype.itemsize * length
    return found


@dataclass(frozen=True)
class Float16(Codec):
    """IEEE half precision: 11 bits of significand, up to 65504."""

    tag: ClassVar[int] = 1
    name: ClassVar[str] = "fp16"

    def sections(self, n: int, dtype: DType) -> Sections:
        return [(uint16, n)]

    def pack(self, k: Backend, x: Array, *sections: Array) -> None:
        k.to_float16(*sections, x)

    def unpack(self, k: Backend, y: Array, *sections: Array) -> None:
        k.from_float16(y, *sections)


@dataclass(frozen=True)
class BFloat16(Codec):
    """The upper half of a float32: 8 bits of significand, and its range."""

    tag: ClassVar[int] = 2
    name: ClassVar[str] = "bf16"

    def sections(self, n: int, dtype: DType) -> Sections:
        return [(uint16, n)]

    def pack(self, k: Backend, x: Array, *sections: Array) -> None:
        k.to_bfloat16(*sections, x)

    def unpack(self, k: Backend, y: Array, *sections: Array) -> None:
        k.from_bfloat16(y, *sections)


@dataclass(frozen=True)
class Int8(Codec):
    """Whole multiples of a scale for each block."""

    tag: ClassVar[int] = 3
    name: ClassVar[str] = "int8"
    block: ClassVar[int] = 256

    def sections(self, n: int, dtype: DType) -> Sections:
        return [(dtype, -(-n // self.block)), (int8, n)]

    def pack(self, k: Backend, x: Array, *sections: Array) -> None:
        scale, q = sections
        k.to_int8(q, scale, x, self.block)

    def unpack(self, k: Backend, y: Array, *sections: Array) -> None:
        scale, q = sections
        k.from_int8(y, q, scale, self.block)


@dataclass(frozen=True)
class TopK(Codec):
    """The largest elements of each block. parameter: how many of a whole block; of a short one, as large a share."""

    tag: ClassVar[int] = 4
    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        if not 1 <= self.parameter <= BLOCK:
            raise ValueError(f"{self.parameter} elements of a block of {BLOCK}")

    def counts(self, n: int) -> list[int]:
        """How many of each block of n numbers."""
        short = [-(-self.parameter * (n % BLOCK) // BLOCK)] if n % BLOCK else []
        return [self.parameter] * (n // BLOCK) + short

    def sections(self, n: int, dtype: DType) -> Sections:
        count = sum(self.counts(n))
        return [(dtype, count), (uint16, count)]

    def pack(self, k: Backend, x: Array, *sections: Array) -> None:
        values, positions = sections
        k.largest(values, positions, x, self.parameter, BLOCK)

    def unpack(self, k: Backend, y: Array, *sections: Array) -> None:
        values, positions = sections[0], k.to_numpy(sections[1])
        starts = np.repeat(np.arange(0, y.size, BLOCK), self.counts(y.size))
        places = starts + positions
        if np.any(positions >= np.minimum(BLOCK, y.size - starts)) or np.any(places[1:] <= places[:-1]):
            raise ValueError("positions that do not ascend within their blocks")
        k.fill(y, 0)
        k.scatter_runs(y, values.reshaped((values.size, 1)), k.array(places))


@dataclass(frozen=True)
class OneBit(Codec):
    """The sign of each element, and the mean of either sign in its block."""

    tag: ClassVar[int] = 5
    name: ClassVar[str] = "1bit"
    block: ClassVar[int] = 1024

    def sections(self, n: int, dtype: DType) -> Sections:
        blocks = -(-n // self.block)
        return [(dtype, blocks), (dtype, blocks), (uint8, -(-n // 8))]

    def pack(self, k: Backend, x: Array, *sections: Array) -> None:
        below, above, bits = sections
        k.to_signs(bits, below, above, x, self.block)

    def unpack(self, k: Backend, y: Array, *sections: Array) -> None:
        below, above, bits = sections
        if y.size % 8 and int(k.to_numpy(bits)[-1]) & 0xFF >> y.size % 8:
            raise ValueError("bits beyond the last element")
        k.from_signs(y, bits, below, above, self.block)


@dataclass(frozen=True)
class Rows(Codec):
    """Some rows of a table, or what of them lies in a piece of it. parameter: bytes of a row number's difference.

    The body is the rows' width, how many elements of the row in which the piece begins lie before it, and the number of
    rows; their elements; and their numbers, counted from that row, each as the difference to the one before.
    """

    tag: ClassVar[int] = 6
    name: ClassVar[str] = "rows"
    FACTS: ClassVar[struct.Struct] = struct.Struct("<QQQ")

    @classmethod
    def of(cls, gradient: RowSparse, start: int, size: int) -> Payload:
        """Elements [start, start + size) of a row-sparse gradient, end to end."""
        values, dtype = gradient.values.numpy(), gradient.dtype
        rows, width = gradient.rows, max(1, math.prod(gradient.shape[1:]))
        first, last = np.searchsorted(rows, [start // width, -(-(start + size) // width)])
        rows, values = rows[first:last], values[first:last].reshape(-1)
        if len(rows):
            values = values[max(0, start - int(rows[0]) * width):]
            values = values[:values.size - max(0, (int(rows[-1]) + 1) * width - start - size)]
        steps = np.diff(rows, prepend=start // width)
        narrow = next(kind for kind in ("u1", "u2", "u4", "u8") if not len(rows) or steps.max() <= np.iinfo(kind).max)
        facts = np.frombuffer(cls.FACTS.pack(width, start % width, len(rows)), np.uint8)
        return cls(int(narrow[1])).frame(size, dtype, facts, values, steps.astype(narrow))

    @classmethod
    def read(cls, k: Backend, body: memoryview, parameter: int, size: int, dtype: DType) -> Array:
        if len(body) < cls.FACTS.size or parameter not in (1, 2, 4, 8):
            raise ValueError(f"{len(body)} bytes with row numbers of {parameter} bytes each")
        width, lead, count = cls.FACTS.unpack_from(body)
        if not lead < width <= 1 << 40 or cls.FACTS.size + count * parameter > len(body):
            raise ValueError(f"{count} rows of {width} elements, from element {lead} on, in {len(body)} bytes")
        numbers, steps = body[cls.FACTS.size:len(body) - count * parameter], body[len(body) - count * parameter:]
        rows = np.cumsum(_steps(steps, parameter, -(-(lead + size) // width)), dtype=np.int64)
        starts = rows * width - lead  # of the rows in the piece, the first perhaps before it
        begins, ends = np.maximum(starts, 0), np.minimum(starts + width, size)
        if np.any(ends <= begins) or len(numbers) != dtype.itemsize * int((ends - begins).sum()):
            raise ValueError(f"{len(numbers)} bytes of elements in {count} rows of {width}")
        return _laid_out(k, np.frombuffer(numbers, dtype.numpy), begins, ends, width, size, dtype)


def _steps(data: memoryview, itemsize: int, limit: int) -> np.ndarray:
    """Differences of ascending row numbers below `limit`. Raises ValueError where they are not."""
    steps = np.frombuffer(data, f"u{itemsize}")
    if len(steps) and (int(steps.max()) >= limit or not steps[1:].all()):
        raise ValueError("row numbers that do not ascend within the piece")
    return steps.astype(np.int64)


def _laid_out(k: Backend, numbers: np.ndarray, begins: np.ndarray, ends: np.ndarray, width: int, size: int,
              dtype: DType) -> Array:
    """Zeros, with `numbers`, end to end, in the places [begins, ends). Only the first and the last may be short."""
    y = k.zeros((size,), dtype)
    offsets = np.cumsum(ends - begins) - (ends - begins)
    whole = ends - begins == width
    if whole.any():
        first = int(offsets[whole][0])
        some = k.from_numpy(numbers[first:first + width * int(whole.sum())].reshape(-1, width))
        k.scatter_runs(y, some, k.array(begins[whole]))
    for begin, end, offset in zip(begins[~whole], ends[~whole], offsets[~whole]):
        k.cast(y.view(y.data[begin:end]), k.from_numpy(numbers[offset:offset + end - begin]))
    return y


CODECS: dict[int, type[Codec]] = {codec.tag: codec for codec in (Float16, BFloat16, Int8, TopK, OneBit, Rows)}


def codec_of(text: str) -> Codec:
    """From "fp16", "bf16", "int8", "1bit", or "topk:" and a share, as in topk:0.01. Raises ValueError."""
    name, colon, share = text.partition(":")
    plain = {codec.name: codec for codec in (Float16, BFloat16, Int8, OneBit)}
    if name in plain and not colon:
        return plain[name]()
    try:
        if name == TopK.name and 0 < float(share) <= 1:
            return TopK(math.ceil(float(share) * BLOCK))
    except ValueError:
        pass
    raise ValueError(f"compress is {text!r}, expected fp16, bf16, int8, 1bit, or topk: and a share in (0, 1], "
                     "as in topk:0.01")
