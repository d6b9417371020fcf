"""Messages as bytes, and back: what stands in the body of a frame (wire.py) and in a record on disk.

A message is a number, which says what it is, and its fields in their order. A field is written as its annotation says;
all numbers are little-endian.

    int                  8 bytes, signed                  float     8 bytes, IEEE 754
    bool                 1 byte, 0 or 1                   str       how many bytes, and the text as UTF-8
    tuple[X, ...]        how many, and each X             bytes     how many, and they
    Mapping[K, V]        how many, and each K, V          X | Y     1 byte, which of them it is, and that one
    np.ndarray, Array    1 byte element type, 1 byte number of axes, their lengths, zeros up to a multiple of 8 bytes,
                         the elements in C order
    Any                  2 bytes, the number of a class, and its fields
    a class              its fields

So a reader knows from the class what must come, and bytes never say what is to be made of them, but for the numbers of
classes that are declared here. Nothing is evaluated or unpickled, and nothing is allocated before as many bytes are
there. A value has one encoding: whatever decode() takes, encode() writes the same way. Arrays are not copied: they are
read-only views of the bytes they came in.

Between machines that share memory, arrays of LARGE bytes and more can lie elsewhere: end to end, each at a multiple of
FAR_ALIGNMENT, in one segment that comes with the message. Then 128 is added to the element type, and nothing follows
the lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.backend import Array
from engine.dtypes import (
    DType,
    bool_,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
)
from engine.sharder import messages
from engine.sharder.codecs import Payload
from engine.sharder.events import Committed, Entered, Finish, Loaded, Proceed, Reshard
from engine.sharder.journal import Record, Recorded
from engine.sharder.memory import Checkpoint
from engine.sharder.versions import Version

ELEMENTS = (bool_, uint8, uint16, uint32, uint64, int8, int16, int32, int64, float32, float64)  # by number
AXES = 16  # at most
DEPTH = 4  # at most: a value of type Any within another
ALIGNMENT, FAR_ALIGNMENT = 8, 64
SMALL, LARGE = 1 << 12, 1 << 16
ELSEWHERE = 128

INT, FLOAT, LENGTH, NUMBER = struct.Struct("<q"), struct.Struct("<d"), struct.Struct("<Q"), struct.Struct("<H")


class WireError(ValueError):
    """Bytes that are refused, and why, in one line. Nothing has changed."""


class Kind(NamedTuple):
    """How a type is written and read, and how a value of it is recognised where it is one of several."""

    write: Callable[[Writer, Any], None]
    read: Callable[[Reader], Any]
    fits: Callable[[Any], bool]


# ── the classes that there are ────────────────────────────────────────────────────────────────────────

_numbers: dict[int, type] = {}  # of classes that may stand where Any is written
_by_class: dict[type, int] = {}
_classes: dict[str, tuple[type, Mapping[str, str]]] = {}  # by name: and annotations by field


def declare(number: int | None, kind: type, annotations: Mapping[str, str] | None = None) -> None:
    """Let a class travel: one that may stand alone has a number. annotations: by field, of what is not a dataclass."""
    if number is not None:
        assert number not in _numbers, f"{number} is {_numbers[number].__name__}"
        _numbers[number], _by_class[kind] = kind, number
    _classes[kind.__name__] = kind, annotations or {field.name: str(field.type) for field in fields(kind)}


for _part in (messages.Identity, messages.Term, Payload):
    declare(None, _part)
declare(None, Version, {"number": "int", "shared": "bool", "flat": "Array"})
for _number, _class in {
        1: messages.Ready, 2: messages.Begin, 3: messages.End, 4: messages.Refused, 5: messages.Gone,
        6: messages.Pull, 7: messages.Parameters, 8: messages.Push, 9: messages.Pushed, 10: messages.Moved,
        11: messages.Held, 12: messages.Choose, 13: messages.Reduced, 14: messages.Apply, 15: messages.Applied,
        16: messages.Saved, 17: messages.Blank, 18: messages.Restore, 19: messages.Restored,
        20: Record, 21: Recorded, 32: Proceed, 33: Finish, 34: Reshard, 35: Committed, 36: Loaded, 37: Entered,
        48: Checkpoint}.items():
    declare(_number, _class)

ALIASES = {"Values": "Mapping[str, np.ndarray]"}


# ── the way in ────────────────────────────────────────────────────────────────────────────────────────

Part = bytes | bytearray | memoryview


def encode(value: Any, elsewhere: list[np.ndarray] | None = None) -> list[Part]:
    """The bytes of a message, in parts; those of arrays are its own memory. Raises WireError for what cannot travel.

    elsewhere: where to put large arrays that are to lie in a segment; None: there is none
    """
    writer = Writer(elsewhere)
    _write_any(writer, value)
    return writer.parts


class SegmentMemory(Protocol):
    """A segment: a memoryview, or what can be cut like one."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> memoryview: ...


def decode(data: Any, segment: Callable[[], SegmentMemory] | None = None) -> Any:
    """What encode() wrote; `data` is bytes or a buffer. Raises WireError with one line for anything else.

    segment: gives the one that came with the message, and is called only if the message says that there is one
    """
    reader = Reader(data, segment)
    value = _read_any(reader)
    reader.end()
    return value


class Writer:
    """Bytes in parts: short ones are collected, arrays are referred to."""

    def __init__(self, elsewhere: list[np.ndarray] | None = None) -> None:
        self.parts: list[Part] = []
        self.elsewhere = elsewhere
        self.size = 0
        self._open: bytearray | None = None  # the last part, while it grows

    def put(self, data: bytes) -> None:
        if self._open is None:
            self._open = bytearray()
            self.parts.append(self._open)
        self._open += data
        self.size += len(data)

    def refer(self, data: memoryview) -> None:
        """Bytes that nobody changes any more; few are copied all the same, since a part costs more."""
        if len(data) < SMALL:
            return self.put(bytes(data))
        self.parts.append(data)
        self.size += len(data)
        self._open = None
        return None


class Reader:
    """Bytes that are taken one after the other, and never beyond their end."""

    def __init__(self, data: Any, segment: Callable[[], SegmentMemory] | None = None):
        self.data = memoryview(data).cast("B").toreadonly()
        self.segment, self.far_position = segment, 0
        self.far: SegmentMemory = memoryview(b"")
        self.position = 0
        self.depth = 0
        self.inside: list[str] = []  # the fields that are being read, for errors

    def refuse(self, why: str) -> WireError:
        return WireError(f"wire: {'.'.join(self.inside) or 'message'}: {why}")

    def take(self, size: int) -> memoryview:
        left = len(self.data) - self.position
        if size > left:
            raise self.refuse(f"expected {size} bytes, got {left}")
        self.position += size
        return self.data[self.position - size:self.position]

    def take_far(self, size: int) -> memoryview:
        """The next bytes of the segment."""
        assert self.segment is not None
        if size < LARGE:
            raise self.refuse(f"{size} bytes lie elsewhere, expected at least {LARGE}")
        if not self.far:
            self.far = self.segment()
        start = self.far_position + -self.far_position % FAR_ALIGNMENT
        if start + size > len(self.far):
            raise self.refuse(f"expected {size} bytes at {start} of a segment of {len(self.far)}")
        self.far_position = start + size
        return self.far[start:start + size].toreadonly()

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def byte(self, limit: int, what: str) -> int:
        found = self.take(1)[0]
        if found >= limit:
            raise self.refuse(f"{what} is {found}, expected less than {limit}")
        return found

    def zeros(self, size: int) -> None:
        if any(self.take(size)):
            raise self.refuse("is padded with something else than zeros")

    def end(self) -> None:
        if self.position != len(self.data):
            raise WireError(f"wire: message: {len(self.data) - self.position} bytes too many")
        if self.far_position != len(self.far):
            raise WireError(f"wire: message: {len(self.far) - self.far_position} bytes of its segment too many")


# ── kinds ─────────────────────────────────────────────────────────────────────────────────────────────

@cache
def kind(annotation: str) -> Kind:
    """How an annotation is written and read."""
    members = _split(annotation, " | ")
    if len(members) > 1:
        return _union([kind(member) for member in members], annotation)
    if annotation.startswith("tuple["):
        return _tuple(kind(annotation.removeprefix("tuple[").removesuffix(", ...]")))
    if annotation.startswith("Mapping["):
        return _mapping(*map(kind, _split(annotation.removeprefix("Mapping[")[:-1], ", ")))
    if annotation in ALIASES:
        return kind(ALIASES[annotation])
    return SIMPLE.get(annotation) or _class_kind(annotation)


def _split(text: str, separator: str) -> list[str]:
    """The parts of an annotation, where a separator in brackets counts for nothing."""
    parts, start = [], 0
    for i in range(len(text)):
        if text.startswith(separator, i) and text.count("[", 0, i) == text.count("]", 0, i):
            parts.append(text[start:i])
            start = i + len(separator)
    return [*parts, text[start:]]


def _union(members: Sequence[Kind], annotation: str) -> Kind:
    def write(writer: Writer, value: Any) -> None:
        for number, member in enumerate(members):
            if member.fits(value):
                writer.put(bytes([number]))
                return member.write(writer, value)
        raise WireError(f"wire: got {type(value).__name__}, expected {annotation}")

    def read(reader: Reader) -> Any:
        return members[reader.byte(len(members), "its type")].read(reader)

    return Kind(write, read, lambda value: any(member.fits(value) for member in members))


def _tuple(item: Kind) -> Kind:
    def write(writer: Writer, values: Any) -> None:
        writer.put(LENGTH.pack(len(values)))
        for value in values:
            item.write(writer, value)

    def read(reader: Reader) -> tuple[Any, ...]:
        return tuple([item.read(reader) for _ in range(reader.number(LENGTH))])

    return Kind(write, read, lambda value: isinstance(value, tuple))


def _mapping(key: Kind, item: Kind) -> Kind:
    def write(writer: Writer, values: Any) -> None:
        writer.put(LENGTH.pack(len(values)))
        for name, value in values.items():
            key.write(writer, name)
            item.write(writer, value)

    def read(reader: Reader) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for _ in range(reader.number(LENGTH)):
            name = key.read(reader)
            if name in found:
                raise reader.refuse(f"has {name!r} twice")
            found[name] = item.read(reader)
        return found

    return Kind(write, read, lambda value: isinstance(value, Mapping))


def _class_kind(name: str) -> Kind:
    made, annotations = _classes[name]
    items = [(field, kind(annotation)) for field, annotation in annotations.items()]

    def write(writer: Writer, value: Any) -> None:
        if type(value) is not made:
            raise WireError(f"wire: got {type(value).__name__}, expected {name}")
        for field, item in items:
            try:
                item.write(writer, getattr(value, field))
            except (struct.error, TypeError, UnicodeError) as error:
                raise WireError(f"wire: {name}.{field} cannot travel: {error}") from None

    def read(reader: Reader) -> Any:
        values = {}
        for field, item in items:
            reader.inside.append(f"{name}.{field}")
            values[field] = item.read(reader)
            reader.inside.pop()
        return made(**values)

    return Kind(write, read, lambda value: type(value) is made)


# ── simple values ─────────────────────────────────────────────────────────────────────────────────────

def _write_float(writer: Writer, value: Any) -> None:
    number = float(value)
    if number != value and number == number:
        raise TypeError(f"{value!r} is not a float64")
    writer.put(FLOAT.pack(number))


def _write_bytes(writer: Writer, value: Any) -> None:
    writer.put(LENGTH.pack(len(value)))
    writer.refer(memoryview(value).cast("B"))


def _read_text(reader: Reader) -> str:
    try:
        return str(reader.take(reader.number(LENGTH)), "utf-8")
    except UnicodeDecodeError:
        raise reader.refuse("is not UTF-8") from None


def _write_any(writer: Writer, value: Any) -> None:
    number = _by_class.get(type(value))
    if number is None:
        raise WireError(f"wire: got {type(value).__name__}, which does not travel")
    writer.put(NUMBER.pack(number))
    kind(type(value).__name__).write(writer, value)


def _read_any(reader: Reader) -> Any:
    number = reader.number(NUMBER)
    if number not in _numbers:
        raise reader.refuse(f"begins with {number}, which no message does")
    if reader.depth == DEPTH:
        raise reader.refuse(f"is {DEPTH} messages deep")
    reader.depth += 1
    value = kind(_numbers[number].__name__).read(reader)
    reader.depth -= 1
    return value


# ── arrays ────────────────────────────────────────────────────────────────────────────────────────────

def _write_array(writer: Writer, data: Any, dtype: DType) -> None:
    if data.ndim > AXES:
        raise TypeError(f"an array of {data.ndim} axes, expected at most {AXES}")
    code, lengths = ELEMENTS.index(dtype), b"".join(map(LENGTH.pack, data.shape))
    host = np.asarray(data if isinstance(data, np.ndarray) else data.get(), order="C")  # from a GPU
    if writer.elsewhere is not None and host.nbytes >= LARGE:
        writer.elsewhere.append(host)
        return writer.put(bytes([code + ELSEWHERE, data.ndim]) + lengths)
    writer.put(bytes([code, data.ndim]) + lengths)
    writer.put(bytes(-writer.size % ALIGNMENT))
    return writer.refer(host.reshape(-1).view(np.uint8).data)


def _read_array(reader: Reader) -> np.ndarray:
    limit = len(ELEMENTS) + (ELSEWHERE if reader.segment else 0)
    code = reader.byte(limit, "its element type")
    if len(ELEMENTS) <= code < ELSEWHERE:
        raise reader.refuse(f"its element type is {code}, expected less than {len(ELEMENTS)}")
    dtype = ELEMENTS[code % ELSEWHERE]
    shape = [reader.number(LENGTH) for _ in range(reader.byte(AXES + 1, "its number of axes"))]
    size, extent = dtype.itemsize, dtype.itemsize  # extent: as NumPy counts it, with axes of no elements
    for length in shape:
        size, extent = size * length, extent * max(1, length)
    if extent >= 1 << 62:
        raise reader.refuse(f"is an array of shape {tuple(shape)}")
    if code >= ELSEWHERE:
        elements = reader.take_far(size)
    else:
        reader.zeros(-reader.position % ALIGNMENT)
        elements = reader.take(size)
    found = np.frombuffer(elements, dtype.numpy).reshape(shape)
    if dtype is bool_ and found.size and found.view(np.uint8).max() > 1:
        raise reader.refuse("has truth values other than 0 and 1")
    return found if found.flags.aligned else found.copy()


def _read_flag(reader: Reader) -> bool:
    return bool(reader.byte(2, "a truth value"))


SIMPLE = {
    "int": Kind(lambda writer, value: writer.put(INT.pack(value)), lambda reader: reader.number(INT),
                lambda value: isinstance(value, (int, np.integer))),
    "float": Kind(_write_float, lambda reader: reader.number(FLOAT), lambda value: isinstance(value, (int, float))),
    "bool": Kind(lambda writer, value: writer.put(bytes([bool(value)])), _read_flag,
                 lambda value: isinstance(value, bool)),
    "None": Kind(lambda writer, value: None, lambda reader: None, lambda value: value is None),
    "bytes": Kind(_write_bytes, lambda reader: bytes(reader.take(reader.number(LENGTH))),
                  lambda value: isinstance(value, bytes)),
    "str": Kind(lambda writer, value: _write_bytes(writer, value.encode()), _read_text,
                lambda value: isinstance(value, str)),
    "Any": Kind(_write_any, _read_any, lambda value: type(value) in _by_class),
    "np.ndarray": Kind(lambda writer, value: _write_array(writer, value, _element_type(value)), _read_array,
                       lambda value: isinstance(value, np.ndarray)),
    "Array": Kind(lambda writer, value: _write_array(writer, value.data, value.dtype),
                  lambda reader: Array(_read_array(reader)), lambda value: isinstance(value, Array)),
}


def _element_type(value: np.ndarray) -> DType:
    for dtype in ELEMENTS:
        if dtype.numpy == value.dtype:
            return dtype
    raise TypeError(f"an array of {value.dtype}")
