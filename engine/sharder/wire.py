"""Frames: messages between machines that share a secret, over connections that anybody may tamper with.

    frame    head 32 bytes │ tag of the head 16 │ body, see encoding.py │ tag of head and body 32
    head     magic, version of this format, sequence number, length of the body, checksum of the body, of the head

Both ends first say hello: who they are, what their arithmetic is, and a nonce that is never used again. From the shared
secret and both hellos they work out one key for each direction and tag,

    key = HMAC-SHA256(secret, label ‖ SHA-256(hello of who connected) ‖ SHA-256(hello of who was called))

so a frame of another connection, of the other direction, or of somebody without the secret has another tag; changed
hellos give keys that open nothing. Frames are numbered, and each is taken in its turn only: one that is repeated, or
comes after one that was held back, is refused. The head has a tag of its own so that a length is believed, and memory
taken, only if it comes from whoever has the key. Checksums find nothing that tags do not: they tell damage from
forgery.

What is refused raises WireError with one line, and changes nothing: the next frame in turn is still taken. Machines
whose kernels might compute other bits (another instruction-set level, other kernels, another protocol) are refused at
the hello.

What lies in a segment of shared memory (encoding.py) is not under a tag: tags would cost more than the memory saves. It
comes over the same socket, sealed, and a message under its tag says how long it is and what is in it.

A Channel is one end, and pure: no socket, no clock, and its nonce is given. Krawczyk, Bellare, Canetti 1997, RFC 2104.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.backend import Backend
from engine.sharder.encoding import Part, Reader, SegmentMemory, WireError, Writer, decode, encode, kind
from engine.sharder.encoding import declare as _declare
from engine.sharder.events import Address
from engine.sharder.messages import PROTOCOL

FORMAT = 1
HEAD = struct.Struct("<4sIQQII")  # magic, format, sequence, length of the body, checksums of the body and of these
PREFIX = HEAD.size + 16
TAG = 32
LIMIT = 1 << 34  # of a body, in bytes
HELLO = struct.Struct("<4sI16sII")  # magic, format, nonce, length of what follows, checksum of it and of these
HELLO_LIMIT = 512
NONCE = 16


class Foreign(WireError):
    """A machine that belongs here and computes otherwise. Calling it again will not help."""


@dataclass(frozen=True)
class Hello:
    """Who speaks: an address, its incarnation, and what its arithmetic is."""

    kind: str
    number: int
    incarnation: int
    arithmetic: str

    @property
    def address(self) -> Address:
        return self.kind, self.number

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


_declare(None, Hello)


def arithmetic(k: Backend) -> str:
    """What must be equal for results to have the same bits: device, kernels, protocol, order of bytes."""
    return f"{k.device} {k.identity}, protocol {PROTOCOL}, {sys.byteorder}-endian"


class Channel:
    """One end of a connection. called: whether the other end connected to this one; nonce: never used before."""

    def __init__(self, secret: bytes, nonce: bytes, own: Hello, called: bool, limit: int = LIMIT):
        if len(secret) < 16 or len(nonce) != NONCE:
            raise ValueError(f"Channel: a secret of {len(secret)} bytes and a nonce of {len(nonce)}, expected at least "
                             f"16 and {NONCE}")
        self.secret, self.own, self.called, self.limit = secret, own, called, limit
        self.hello = _hello_bytes(own, nonce)  # what to say first
        self.peer: Hello | None = None
        self.sent = self.taken = 0  # frames

    # ── hello ───────────────────────────────────────────────────────────────────────────────────────

    def meet(self, data: bytes) -> Hello:
        """Take the other end's hello. Raises WireError if it cannot be read, Foreign if its arithmetic is another."""
        peer = read_hello(data)
        if peer.arithmetic != self.own.arithmetic:
            raise Foreign(f"wire: {peer} computes with {peer.arithmetic}, and {self.own} with "
                            f"{self.own.arithmetic}: results would have other bits")
        hellos = (data, self.hello) if self.called else (self.hello, data)
        transcript = b"".join(hashlib.sha256(hello).digest() for hello in hellos)
        mine, theirs = (b"called ", b"caller ") if self.called else (b"caller ", b"called ")
        self._head_out, self._body_out = (self._key(mine + part + transcript) for part in (b"head ", b"body "))
        self._head_in, self._body_in = (self._key(theirs + part + transcript) for part in (b"head ", b"body "))
        self.peer = peer
        return peer

    def _key(self, label: bytes) -> hmac.HMAC:
        return hmac.new(hmac.digest(self.secret, b"shardgrad " + label, "sha256"), digestmod="sha256")

    # ── frames ──────────────────────────────────────────────────────────────────────────────────────

    def seal(self, message: Any, elsewhere: list[Any] | None = None) -> list[Part]:
        """The next frame, in parts; see encode(). Raises WireError for a message that cannot travel."""
        return self.seal_body(encode(message, elsewhere))

    def seal_body(self, body: Sequence[Part]) -> list[Part]:
        length = sum(map(len, body))
        if length > self.limit:
            raise WireError(f"wire: a message of {length} bytes, expected at most {self.limit}")
        checksum = 0
        for part in body:
            checksum = zlib.crc32(part, checksum)
        head = HEAD.pack(MAGIC, FORMAT, self.sent, length, checksum, 0)
        head = head[:-4] + struct.pack("<I", zlib.crc32(head[:-4]))
        self.sent += 1
        return [head + _tag(self._head_out, [head])[:16], *body, _tag(self._body_out, [head, *body])]

    def head(self, data: Any) -> int:
        """How many bytes follow these first PREFIX ones of a frame."""
        if len(data) != PREFIX:
            raise WireError(f"wire: a frame of {len(data)} bytes, expected at least {PREFIX}")
        magic, version, sequence, length, _, checksum = HEAD.unpack_from(data)
        _expect_format(magic, MAGIC, version)
        if checksum != zlib.crc32(data[:HEAD.size - 4]):
            raise WireError("wire: the head of a frame is damaged")
        self._check_tag(_tag(self._head_in, [data[:HEAD.size]])[:16], data[HEAD.size:])
        self._check_turn(sequence)
        if length > self.limit:
            raise WireError(f"wire: a frame of {length} bytes, expected at most {self.limit}")
        return length + TAG

    def open(self, head: Any, rest: Any, segment: Callable[[], SegmentMemory] | None = None) -> Any:
        """The message of a frame: its first PREFIX bytes, and the others. Raises WireError unless it is the next one of
        the other end, whole and unchanged. segment: see decode()."""
        expected, rest = self.head(head), memoryview(rest)
        if len(rest) != expected:
            raise WireError(f"wire: a frame with {len(rest)} bytes after its head, expected {expected}")
        self._check_body(HEAD.unpack_from(head)[4], rest[:-TAG])
        self._check_tag(_tag(self._body_in, [head[:HEAD.size], rest[:-TAG]]), rest[-TAG:])
        message = decode(rest[:-TAG], segment)
        self.taken += 1
        return message

    def open_frame(self, frame: bytes) -> Any:
        """The message of a frame that lies in one piece."""
        return self.open(frame[:PREFIX], frame[PREFIX:])

    def _check_turn(self, sequence: int) -> None:
        if sequence != self.taken:
            raise WireError(f"wire: frame {sequence} is not in its turn, expected {self.taken}")

    def _check_body(self, checksum: int, body: Any) -> None:
        if zlib.crc32(body) != checksum:
            raise WireError("wire: the body of a frame is damaged")

    def _check_tag(self, expected: bytes, found: Any) -> None:
        if not hmac.compare_digest(expected, found):
            raise WireError("wire: a frame that was not made with this connection's key: it is foreign or forged")


MAGIC, HELLO_MAGIC = b"shgd", b"shgH"


def _tag(key: hmac.HMAC, parts: Sequence[Any]) -> bytes:
    made = key.copy()
    for part in parts:
        made.update(part)
    return made.digest()


def _expect_format(magic: bytes, expected: bytes, version: int) -> None:
    if magic != expected:
        raise WireError(f"wire: begins with {magic!r}, expected {expected!r}")
    if version != FORMAT:
        raise WireError(f"wire: version {version}, expected {FORMAT}")


def _hello_bytes(hello: Hello, nonce: bytes) -> bytes:
    writer = Writer()
    kind("Hello").write(writer, hello)
    body = b"".join(writer.parts)
    start = HELLO.pack(HELLO_MAGIC, FORMAT, nonce, len(body), 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(start + body)) + body


def hello_length(data: Any) -> int:
    """How many bytes follow these first HELLO.size ones of a hello."""
    if len(data) != HELLO.size:
        raise WireError(f"wire: a hello of {len(data)} bytes, expected at least {HELLO.size}")
    magic, version, _, length, _ = HELLO.unpack_from(data)
    _expect_format(magic, HELLO_MAGIC, version)
    if length > HELLO_LIMIT:
        raise WireError(f"wire: a hello of {length} bytes, expected at most {HELLO_LIMIT}")
    return length


def read_hello(data: bytes) -> Hello:
    """Raises WireError with one line for what is no hello."""
    length, body = hello_length(data[:HELLO.size]), data[HELLO.size:]
    if len(body) != length or HELLO.unpack_from(data)[4] != zlib.crc32(data[:HELLO.size - 4] + body):
        raise WireError("wire: a hello is damaged")
    reader = Reader(body)
    hello = kind("Hello").read(reader)
    reader.end()
    return hello
