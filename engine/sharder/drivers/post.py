"""Sockets that carry frames: messages by address, between processes of one machine.

Everybody listens at a Unix-domain socket that is named after its address. Of two machines the one further down in RANKS
calls the other, and calls again when the connection is lost. What cannot be delivered at once waits; what is on its way
when a connection is lost is lost with it, which the protocol can bear: `met` says that there is a new connection, and
that it is time to ask again.

A connection that brings anything but the next frame of who it claims to be is closed, with one line in the log, and
nothing of it reaches a machine. Nothing here blocks but receive() and flush(), and those go on reading while they wait,
so two machines that both have much to say do not wait for each other.

Large arrays do not go through the socket: a frame brings the descriptor of a segment that they lie in (segments.py).
"""

from __future__ import annotations

import array
import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.sharder import wire
from engine.sharder.drivers.segments import AVAILABLE, Segment, Segments, opened
from engine.sharder.drivers.tape import BLANK, Blank
from engine.sharder.encoding import WireError, declare
from engine.sharder.events import COORDINATOR, Address
from engine.sharder.wire import Channel, Hello

RANKS = ("run", "coordinator", "shard", "worker")
WAITING = 1000  # messages to one machine that wait; more are dropped, and will be asked for again
REDIAL = 0.02  # seconds between two calls of who does not answer
READS = 64  # of the system before another connection has its turn
PARTS = 64  # of frames that are handed to the system at once
DESCRIPTORS = "/proc/self/fd"  # where Linux knows what is open, a folder too, by a path that is short
NAME = 103  # bytes that the path of a socket may have in every system: macOS and BSD take 104, and one ends it
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Here:
    """The first message of either end: with its tag it shows that the sender has the secret."""


declare(64, Here)


class Connection:
    """One socket and its channel. address: of the other end, None until it has said it. proven: it has the secret."""

    def __init__(self, own: socket.socket, channel: Channel, address: Address | None,
                 segments: Segments[Segment]):
        self.socket, self.channel, self.address, self.proven = own, channel, address, False
        self.segments = segments  # written here
        self.descriptor: int | None = None  # of the segment that came with the frame that is coming
        self.waiting: deque[Any] = deque()  # messages, until the other end is proven
        self.outbox: deque[tuple[memoryview, Segment | None]] = deque([(memoryview(channel.hello), None)])
        self.inbox: list[Any] = []
        self._parser = self._parse()
        self._buffer, self._filled = _space(next(self._parser)), 0

    def _parse(self) -> Generator[int, memoryview, None]:
        """What comes: yields how many bytes are to come next, and is sent them."""
        channel = self.channel
        start = bytes((yield wire.HELLO.size))
        peer = channel.meet(start + bytes((yield wire.hello_length(start))))
        if self.address not in (None, peer.address):
            raise WireError(f"wire: {peer} answers for {self.address}")
        self.address = peer.address
        self._seal(Here())
        while True:
            head = yield wire.PREFIX
            message = channel.open(head, (yield channel.head(head)), self._next_segment if AVAILABLE else None)
            if self.descriptor is not None:
                raise WireError("wire: a segment that no message speaks of")
            if self.proven:
                self.inbox.append(message)
                continue
            self.proven = True
            while self.waiting:
                self._seal(self.waiting.popleft())

    def _next_segment(self) -> memoryview:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is None:
            raise WireError("wire: a frame without the segment that it speaks of")
        return opened(descriptor)

    def _seal(self, message: Any) -> None:
        far: list[np.ndarray] = []
        first, *parts = self.channel.seal(message, far if AVAILABLE else None)
        self.outbox.append((memoryview(first), self.segments.of(far) if far else None))
        self.outbox += [(memoryview(part).cast("B"), None) for part in parts if len(part)]

    def put(self, message: Any) -> None:
        if self.proven:
            self._seal(message)
        else:
            self.waiting.append(message)

    def write(self) -> None:
        """Hand over what the system takes now."""
        while self.outbox:
            segment, parts = self.outbox[0][1], [self.outbox[0][0]]
            for part, another in islice(self.outbox, 1, PARTS):
                if another:
                    break  # its descriptor goes with its first byte
                parts.append(part)
            try:
                sent = self.socket.sendmsg(parts, [_rights(segment)] if segment else [])
            except BlockingIOError:
                return
            while sent:
                part, _ = self.outbox.popleft()
                if sent < len(part):
                    self.outbox.appendleft((part[sent:], None))
                sent -= min(sent, len(part))

    def read(self) -> None:
        """Take what has come, but leave a turn to others. Raises WireError for what is refused, and OSError when the
        connection is over."""
        for _ in range(READS):
            while self._filled == len(self._buffer):
                self._buffer, self._filled = _space(self._parser.send(self._buffer)), 0
            try:
                count, extra, _, _ = self.socket.recvmsg_into([self._buffer[self._filled:]], SPACE)
            except BlockingIOError:
                return
            for level, kind, data in extra:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._take(array.array("i", data[:len(data) - len(data) % ITEM]))
            if not count:
                raise ConnectionResetError("closed by the other end")
            self._filled += count

    def _take(self, descriptors: Sequence[int]) -> None:
        """What came with the first bytes of a frame: one segment at most, and from whoever is proven."""
        if len(descriptors) == 1 and self.descriptor is None and self.proven:
            self.descriptor = descriptors[0]
        else:
            for descriptor in descriptors:
                os.close(descriptor)
            raise WireError(f"wire: {len(descriptors)} descriptors that nobody expects")

    def close(self) -> None:
        self.socket.close()
        self.outbox.clear()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


ITEM = array.array("i").itemsize
SPACE = socket.CMSG_SPACE(4 * ITEM)  # of what comes with one call


def _rights(segment: Segment) -> tuple[int, int, bytes]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [segment.descriptor]).tobytes()


def _space(size: int) -> memoryview:
    """Memory for so many bytes, aligned for any element type."""
    return np.empty(size, np.uint8).data


class Post:
    """The connections of one machine.

    calls: whom it keeps a connection to       met: whether there is a new one since somebody last looked
    refusals: lines about what was refused     stirred: when bytes have last come or gone
    tape: where messages that leave are recorded

    Calling a machine whose arithmetic is another raises wire.Foreign in receive() and flush().
    """

    def __init__(self, own: Hello, folder: Path, secret: bytes):
        self.own, self.folder, self.secret = own, folder, secret
        self.selector = selectors.PollSelector()
        self.connections: dict[Address, Connection] = {}
        self.segments = Segments(Segment)
        self.calls: set[Address] = set()
        self.refusals: deque[str] = deque(maxlen=100)
        self.met = False
        self.tape: Blank = BLANK
        self._messages: list[Any] = []
        self.stirred = self._called = 0.0  # monotonic time
        self._directory = os.open(folder, os.O_RDONLY)
        short = f"{DESCRIPTORS}/{self._directory}"
        self._sockets = short if os.path.isdir(short) else str(folder)
        longest = len(os.fsencode(self._path(COORDINATOR)))
        if longest > NAME:
            self.close()
            raise OSError(f"the path of a socket has {longest} bytes there, expected at most {NAME}")
        path = self._path(own.address)
        if os.path.exists(path):
            os.unlink(path)  # of an incarnation that is dead
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(128)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def _path(self, address: Address) -> str:
        """Where a machine listens; the coordinator's has the longest name."""
        return f"{self._sockets}/{address[0]}-{address[1]}.socket"

    def close(self) -> None:
        """Close everything; in a forked child, its share of what the two have in common."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
        for key in list(self.selector.get_map().values()):
            self.selector.unregister(key.fileobj)
            for own in (key.data, key.fileobj):
                if isinstance(own, (Connection, socket.socket)):
                    own.close()
        self.connections.clear()
        self.segments.clear()

    # ── sending ─────────────────────────────────────────────────────────────────────────────────────

    def send(self, to: Address, message: Any) -> None:
        """Put a message on its way, if there is one."""
        self.tape.sent(to, message)
        if RANKS.index(to[0]) < RANKS.index(self.own.kind):
            self.calls.add(to)
            self._call(to)
        connection = self.connections.get(to)
        if connection is not None and len(connection.waiting) + len(connection.outbox) < WAITING:
            connection.put(message)
            self._write(connection)

    def forget(self, address: Address) -> None:
        """Call somebody no more, until there is something to send."""
        self.calls.discard(address)

    @property
    def sending(self) -> bool:
        """Whether there is something that the system has not taken yet."""
        return any(connection.outbox for connection in self.connections.values())

    def flush(self, seconds: float = float("inf")) -> None:
        """Wait until everything is handed over or lost; messages that come meanwhile are kept."""
        end = time.monotonic() + seconds
        while any(c.outbox or c.waiting for c in self.connections.values()) and time.monotonic() < end:
            self._exchange(0.1)

    def _write(self, connection: Connection) -> None:
        try:
            connection.write()
        except OSError:
            connection.outbox.clear()  # the other end hears nothing more, but its last words are yet to be read
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outbox else 0)
        if self.selector.get_key(connection.socket).events != wanted:
            self.selector.modify(connection.socket, wanted, connection)

    # ── receiving ───────────────────────────────────────────────────────────────────────────────────

    def receive(self, seconds: float) -> list[Any]:
        """The messages that have come; waits for so long if there are none."""
        if not self._messages:
            self._exchange(min(seconds, REDIAL) if self.calls - self.connections.keys() else seconds)
        found, self._messages = self._messages, []
        return found

    def _exchange(self, seconds: float) -> None:
        if time.monotonic() - self._called >= REDIAL:
            self._called = time.monotonic()
            for to in self.calls:
                self._call(to)
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.listener:
                self._accept()
            elif isinstance(key.data, Connection) and key.data.socket.fileno() >= 0:
                self._attend(key.data)

    def _attend(self, connection: Connection) -> None:
        """Read what there is, and write what can be written."""
        self.stirred, unproven = time.monotonic(), not connection.proven
        try:
            connection.read()
        except WireError as error:
            self._close(connection)
            self.refusals.append(str(error))
            log.warning("%s: %s", self.own, str(error))  # a record that kept the error would keep what it refused
            if isinstance(error, wire.Foreign) and connection.address in self.calls:
                raise
        except OSError:
            self._close(connection)
        self._messages += connection.inbox
        connection.inbox.clear()
        if connection.socket.fileno() >= 0:
            if unproven and connection.proven:
                self._know(connection)
            self._write(connection)

    # ── connections ─────────────────────────────────────────────────────────────────────────────────

    def _accept(self) -> None:
        try:
            own, _ = self.listener.accept()
        except OSError:
            return
        self._add(own, None)

    def _call(self, to: Address) -> None:
        """Open a connection, if there is none."""
        if to in self.connections:
            return
        own = socket.socket(socket.AF_UNIX)
        try:
            own.connect(self._path(to))
        except OSError:
            return own.close()
        self.connections[to] = self._add(own, to)
        return None

    def _add(self, own: socket.socket, to: Address | None) -> Connection:
        own.setblocking(False)
        channel = Channel(self.secret, os.urandom(wire.NONCE), self.own, called=to is None)
        connection = Connection(own, channel, to, self.segments)
        self.selector.register(own, selectors.EVENT_READ, connection)
        self._write(connection)  # its hello at once, so that both ends can say what is wrong with the other
        return connection

    def _know(self, connection: Connection) -> None:
        """The other end is who it says it is; an older connection to it is over."""
        assert connection.address is not None
        older = self.connections.get(connection.address)
        if older is not None and older is not connection:
            self._close(older)
        self.connections[connection.address] = connection
        self.met = True

    def _close(self, connection: Connection) -> None:
        self.selector.unregister(connection.socket)
        connection.close()
        if connection.address is not None and self.connections.get(connection.address) is connection:
            del self.connections[connection.address]
