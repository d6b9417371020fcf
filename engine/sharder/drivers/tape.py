"""What happens in a run, written down as it happens, by each machine for itself; playback.py draws it.

    tape    kind, number, incarnation, computer, time, wall clock    whose it is; the first entry
    turn    time, name, more       what this machine does from now on; what it did before ends
    begin   time, name, more       something begins, which ends before what is around it
    end     time                   it ends
    send    time, kind, number, name, mark, bytes                    a message leaves for that machine
    hear    time, name, mark                                         one has come here
    birth   time, kind, number, text                                 of that machine; death likewise
    count   time, clocks                                             so many are committed

An entry is a list of these. The tapes of one process are kept in its memory; a process that may be killed writes each
entry to a file at once, as a line of JSON, so that it is there up to the moment of its death. Times are nanoseconds of
the monotonic clock, which is one and the same for all processes of a computer; the wall clock is for tapes of several.

A message carries nothing for this: its mark is a checksum of its encoding but for large arrays, and is the same where
it leaves and where it comes to.
"""

from __future__ import annotations

import json
import platform
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from engine.sharder.client import Client
from engine.sharder.encoding import encode
from engine.sharder.events import Address

Entry = list[Any]
SHOWN = ("clock", "version", "microbatch", "clocks", "number")  # fields of messages


class Blank:
    """The tape of a run that is not recorded: nothing is written on it."""

    def turn(self, name: str, **more: int) -> None:
        """This machine does something else from now on."""

    def span(self, name: str, **more: int) -> AbstractContextManager[None]:
        """What this machine does inside."""
        return nullcontext()

    def reaction(self, event: Any) -> AbstractContextManager[None]:
        """What it does when something happens."""
        return nullcontext()

    def answer(self, message: Any) -> AbstractContextManager[None]:
        """What it does when a message has come."""
        return nullcontext()

    def sent(self, to: Address, message: Any) -> None: ...
    def heard(self, message: Any) -> None: ...
    def birth(self, whose: Address, text: str) -> None: ...
    def death(self, whose: Address, text: str) -> None: ...
    def count(self, clocks: int) -> None: ...


BLANK = Blank()


class Tape(Blank):
    """Of one incarnation of a machine; in the file `path`, or in `entries`."""

    def __init__(self, address: Address, incarnation: int = 0, path: Path | None = None):
        self.entries: list[Entry] = []
        self._file = path.open("ab", buffering=0) if path else None
        self._put("tape", *address, incarnation, computer(), time.monotonic_ns(), time.time_ns())

    def _put(self, *entry: Any) -> None:
        if self._file:
            self._file.write(json.dumps(entry).encode() + b"\n")
        else:
            self.entries.append(list(entry))

    def turn(self, name: str, **more: int) -> None:
        self._put("turn", time.monotonic_ns(), name, more)

    @contextmanager
    def span(self, name: str, **more: int) -> Iterator[None]:
        self._put("begin", time.monotonic_ns(), name, more)
        try:
            yield
        finally:
            self._put("end", time.monotonic_ns())

    def reaction(self, event: Any) -> AbstractContextManager[None]:
        return self.span(type(event).__name__,
                         **{name: int(getattr(event, name)) for name in SHOWN if hasattr(event, name)})

    @contextmanager
    def answer(self, message: Any) -> Iterator[None]:
        with self.reaction(message):
            self.heard(message)
            yield

    def sent(self, to: Address, message: Any) -> None:
        size, mark = weight(message)
        self._put("send", time.monotonic_ns(), *to, type(message).__name__, mark, size)

    def heard(self, message: Any) -> None:
        self._put("hear", time.monotonic_ns(), type(message).__name__, weight(message)[1])

    def birth(self, whose: Address, text: str) -> None:
        self._put("birth", time.monotonic_ns(), *whose, text)

    def death(self, whose: Address, text: str) -> None:
        self._put("death", time.monotonic_ns(), *whose, text)

    def count(self, clocks: int) -> None:
        self._put("count", time.monotonic_ns(), clocks)


def weight(message: Any) -> tuple[int, int]:
    """The bytes of a message as it is encoded, and its mark."""
    size = mark = 0
    for part in encode(message):
        size += len(part)
        if not isinstance(part, memoryview):  # a large array
            mark = zlib.crc32(part, mark)
    return size, mark


@cache
def computer() -> str:
    """A name for what shares a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class TapedClient(Client):
    """A worker's client that records what its program does."""

    def __init__(self, tape: Blank, *arguments: Any):
        super().__init__(*arguments)
        self._tape = tape

    def clock(self) -> bool:
        self._tape.turn("wait")
        begun = super().clock()
        if begun:
            self._compute()
        else:
            self._tape.turn("over")
        return begun

    def _compute(self) -> None:
        self._tape.turn("compute", clock=self.step)

    def pull(self, *arguments: Any, **named: Any) -> Any:
        self._tape.turn("pull", clock=self.step)
        values = super().pull(*arguments, **named)
        self._compute()
        return values

    def send_gradients(self, *arguments: Any, **named: Any) -> None:
        self._tape.turn("push", clock=self.step)
        super().send_gradients(*arguments, **named)
        self._compute()


# ── of a run ──────────────────────────────────────────────────────────────────────────────────────────

def tape_path(folder: Path, address: Address, incarnation: int) -> Path:
    return folder / f"tape-{address[0]}-{address[1]}-{incarnation}"


def read(path: Path) -> list[Entry]:
    """The entries of a file, up to one that is not whole."""
    entries: list[Entry] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, list):
            break
        entries.append(entry)
    return entries
