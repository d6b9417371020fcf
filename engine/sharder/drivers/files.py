"""Storage that survives its process: a log and snapshots for each machine, in files whose every record has a checksum.

    <folder>/origin                            the checkpoint that the run begins with
    <folder>/coordinator-0-0/log               records, in order
    <folder>/shard-2-<incarnation>/log
    <folder>/shard-2-<incarnation>/snapshot-<version>-<term>

    record    number, length, checksum of the body, checksum of these │ body, see encoding.py

A machine's folder has the name of the incarnation that it belongs to. The next one takes it by renaming it, and then
writes what it found there into a file of its own. So an incarnation that was only thought to be dead, on a computer
that was cut off, can put nothing on record any more: what it would replace is not where it was, and before it says that
its log is written it looks whether the folder is still its own. If it is, whoever takes it later reads that record; if
not, it says nothing. All computers must see a rename at once.

A log is synchronised before its machine hears that it is written. A process that dies in the middle of a record leaves
a part of one, which its checksum shows: the log ends before it, and nobody has heard what would have followed. A file
that is replaced is written beside it, synchronised, and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import fnmatch
import os
import platform
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.files import sync_folder, write_durably
from engine.sharder.drivers.frozen import Frozen, freeze, thaw
from engine.sharder.encoding import WireError, decode, encode
from engine.sharder.events import Address
from engine.sharder.memory import Checkpoint, Snapshot, gather
from engine.sharder.setup import Setup


class Replaced(Exception):
    """Another incarnation has this machine's place, and its files: it is to say nothing any more."""


RECORD = struct.Struct("<QQII")
KEPT = 3  # snapshots of a shard: all shards have one of the two newest, since one lags behind by at most one


def record_bytes(number: int, value: Any) -> list[Any]:
    """A record, in parts."""
    body, checksum = encode(value), 0
    for part in body:
        checksum = zlib.crc32(part, checksum)
    head = RECORD.pack(number, sum(map(len, body)), checksum, 0)[:-4]
    return [head + struct.pack("<I", zlib.crc32(head)), *body]


def records_of(data: bytes) -> Iterator[tuple[int, Any, int]]:
    """(number, value, where it ends) of each record, up to one that is not whole."""
    position, view = 0, memoryview(data)
    while len(data) - position >= RECORD.size:
        number, length, checksum, own = RECORD.unpack_from(data, position)
        start = position + RECORD.size
        body = view[start:start + length]
        if own != zlib.crc32(view[position:start - 4]) or len(body) != length or zlib.crc32(body) != checksum:
            return
        try:
            value = decode(body)
        except WireError:
            return
        position = start + length
        yield number, value, position


def write_whole(path: Path, records: Iterable[tuple[int, Any]]) -> None:
    """Replace a file by (number, value) of each record."""
    beside = path.with_name(path.name + ".new")
    write_durably(beside, (part for number, value in records for part in record_bytes(number, value)))
    os.replace(beside, path)
    sync_folder(path.parent)


def read_whole(path: Path) -> tuple[int, Any] | None:
    """(number, value) of a file that write_whole made of one record; None if there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return next(((number, value) for number, value, end in records_of(data) if end == len(data)), None)


def folder_of(folder: Path, address: Address) -> Path | None:
    """Of the newest incarnation that has one."""
    found = folder.glob(f"{address[0]}-{address[1]}-*")
    return max(found, key=_incarnation, default=None)


def _names(folder: Path, pattern: str) -> list[str]:
    """Of the files in a folder; none where it is not there (any more)."""
    try:
        return fnmatch.filter(os.listdir(folder), pattern)
    except FileNotFoundError:
        return []


def _incarnation(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def claim(folder: Path, address: Address, incarnation: int) -> Path:
    """Take the folder of a machine from the incarnation before, or make one. Raises Replaced if a later one has it."""
    own = folder / f"{address[0]}-{address[1]}-{incarnation}"
    while (found := folder_of(folder, address)) != own:
        if found is None:
            own.mkdir(exist_ok=True)
        elif _incarnation(found) > incarnation:
            raise Replaced(f"{address[0]} {address[1]}: incarnation {_incarnation(found)} has taken its place")
        else:
            try:
                found.rename(own)
            except FileNotFoundError:
                continue  # somebody else was quicker
        sync_folder(folder)
    return own


class Store:
    """The log and the snapshots of one machine. number: of the last record."""

    def __init__(self, folder: Path, address: Address, setup: Setup, incarnation: int = 0):
        self.folder, self.setup, self.shard = claim(folder, address, incarnation), setup, address[1]
        self.number = 0
        self.snapshot: Snapshot | None = None
        self.records: list[Any] = []  # after the snapshot
        self._pending: list[Any] = []
        with self._its_own():
            self._read_snapshot()
            self._open_log()

    @contextmanager
    def _its_own(self) -> Iterator[None]:
        """Raises Replaced if the folder is not there, at the latest when all is done."""
        try:
            yield
            self.folder.stat()
        except FileNotFoundError:
            raise Replaced(f"{self.folder.name}: another incarnation has taken its place") from None

    def _read_snapshot(self) -> None:
        found = filter(None, map(read_whole, self.folder.glob("snapshot-*-*[0-9]")))
        for number, frozen in found:
            if number > self.number:
                self.number, self.snapshot = number, thaw(frozen, self.setup, self.shard)

    def _open_log(self) -> None:
        """Read the log, and go on in a file that nobody else has open."""
        path, after = self.folder / "log", self.number
        data = path.read_bytes() if path.exists() else b""
        records = [(number, event) for number, event, _ in records_of(data) if number > after]
        self.records = [event for _, event in records]
        self.number = records[-1][0] if records else after
        self._replace_log(records)

    def _replace_log(self, records: Iterable[tuple[int, Any]]) -> None:
        write_whole(self.folder / "log", records)
        self._log = (self.folder / "log").open("ab")

    def append(self, number: int, event: Any) -> None:
        """Put a record at the end of the log; it is not written before synchronise()."""
        self._pending += record_bytes(number, event)
        self.number = number

    @property
    def pending(self) -> bool:
        """Whether there is something to be written."""
        return bool(self._pending)

    def synchronise(self) -> int | None:
        """Write what was appended: the number of the last record, or None if there is nothing new. Raises Replaced if
        it does not count any more."""
        if not self._pending:
            return None
        with self._its_own():
            self._log.writelines(self._pending)
            self._log.flush()
            os.fdatasync(self._log.fileno())
        self._pending.clear()
        return self.number

    def save(self, snapshot: Snapshot, number: int) -> None:
        """Keep a snapshot that holds all records up to `number`; those need not be kept, nor older snapshots. Raises
        Replaced as synchronise() does."""
        assert snapshot.term is not None
        self.synchronise()
        name = f"snapshot-{snapshot.clock}-{snapshot.term.number}"
        with self._its_own():
            write_whole(self.folder / name, [(number, freeze(snapshot))])
            data = (self.folder / "log").read_bytes()
            self._log.close()
            self._replace_log((n, event) for n, event, _ in records_of(data) if n > number)
            self._prune(snapshot.clock)

    def _prune(self, clock: int) -> None:
        """Forget what no term can begin with any more. Versions after this one are those of a term that went back."""
        versions: dict[int, list[Path]] = {}
        for path in self.folder.glob("snapshot-*-*[0-9]"):
            versions.setdefault(int(path.name.split("-")[1]), []).append(path)
        kept = sorted(version for version in versions if version <= clock)[-KEPT:]
        for version in versions.keys() - set(kept):
            for path in versions[version]:
                path.unlink()


class Library:
    """What a term may begin with: the origin, and the snapshots of all shards together."""

    def __init__(self, folder: Path, setup: Setup):
        self.folder, self.setup = folder, setup

    def keep_origin(self, origin: Checkpoint) -> None:
        write_whole(self.folder / "origin", [(0, origin)])

    def expect_origin(self) -> None:
        """Raise FileNotFoundError, with one line, where the run's folder cannot be seen."""
        if not (self.folder / "origin").exists():
            raise FileNotFoundError(f"there is no folder {self.folder} of this run on {platform.node()}; expected one "
                                    "in a file system that every computer of the run sees")

    def origin(self) -> Checkpoint:
        found = read_whole(self.folder / "origin")
        assert found is not None
        return found[1]

    def checkpoint(self, version: int) -> Checkpoint:
        """Of the newest term in which every shard saved this version, or the origin. Raises KeyError if there is none.
        """
        while True:
            folders = set(self.folder.glob("shard-*-*"))
            names = {name for folder in folders for name in _names(folder, f"snapshot-{version}-*[0-9]")}
            for name in sorted(names, key=lambda name: -int(name.split("-")[2])):
                parts = self._parts(name)
                if parts:
                    return join(self.setup, parts)
            origin = self.origin()
            if version == origin.clock:
                return origin
            if folders == set(self.folder.glob("shard-*-*")):  # none was taken over while this looked into it
                raise KeyError(f"there is no snapshot of version {version} that all shards have")

    def _parts(self, name: str) -> list[Frozen]:
        """One of each shard, or none."""
        parts: list[Frozen] = []
        shards = 1
        while len(parts) < shards:
            folder = folder_of(self.folder, ("shard", len(parts)))
            found = read_whole(folder / name) if folder else None
            if found is None:
                return []
            parts.append(found[1])
            shards = found[1].term.shards
        return parts


def join(setup: Setup, parts: list[Frozen]) -> Checkpoint:
    """What all shards hold together: one part of each."""
    return gather(setup.partition(len(parts)), parts[0].clock, [part.kept[-1] for part in parts],
                  [part.slots for part in parts], setup.rule.slots)
