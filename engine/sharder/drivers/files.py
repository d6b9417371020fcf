"""Storage that survives its process: a log and snapshots for each machine, in files whose every record has a checksum.

    <folder>/origin                          the checkpoint that the run begins with
    <folder>/coordinator-0/log               records, in order
    <folder>/shard-2/log
    <folder>/shard-2/snapshot-<version>-<term>

    record    number, length, checksum of the body, checksum of these │ body, see encoding.py

A log is synchronised before its machine hears that it is written. A process that dies in the middle of a record leaves
a part of one, which its checksum shows: the log ends before it, and nobody has heard what would have followed. A file
that is replaced is written beside it, synchronised, and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.sharder.drivers.frozen import Frozen, freeze, thaw
from engine.sharder.encoding import WireError, decode, encode
from engine.sharder.events import Address
from engine.sharder.memory import Checkpoint, Snapshot, gather
from engine.sharder.setup import Setup

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
    with beside.open("wb") as file:
        for number, value in records:
            file.writelines(record_bytes(number, value))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    _synchronise(path.parent)


def read_whole(path: Path) -> tuple[int, Any] | None:
    """(number, value) of a file that write_whole made of one record; None if there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return next(((number, value) for number, value, end in records_of(data) if end == len(data)), None)


def _synchronise(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_of(folder: Path, address: Address) -> Path:
    return folder / f"{address[0]}-{address[1]}"


class Store:
    """The log and the snapshots of one machine. number: of the last record."""

    def __init__(self, folder: Path, address: Address, setup: Setup):
        self.folder, self.setup, self.shard = folder_of(folder, address), setup, address[1]
        self.folder.mkdir(exist_ok=True)
        self.number = 0
        self.snapshot: Snapshot | None = None
        self.records: list[Any] = []  # after the snapshot
        self._pending: list[Any] = []
        self._read_snapshot()
        self._open_log()

    def _read_snapshot(self) -> None:
        found = filter(None, map(read_whole, self.folder.glob("snapshot-*-*[0-9]")))
        for number, frozen in found:
            if number > self.number:
                self.number, self.snapshot = number, thaw(frozen, self.setup, self.shard)

    def _open_log(self) -> None:
        path, end = self.folder / "log", 0
        for number, event, after in records_of(path.read_bytes() if path.exists() else b""):
            end = after
            if number > self.number:
                self.records.append(event)
                self.number = number
        self._log = path.open("ab")
        self._log.truncate(end)

    def append(self, number: int, event: Any) -> None:
        """Put a record at the end of the log; it is not written before synchronise()."""
        self._pending += record_bytes(number, event)
        self.number = number

    def synchronise(self) -> int | None:
        """Write what was appended: the number of the last record, or None if there is nothing new."""
        if not self._pending:
            return None
        self._log.writelines(self._pending)
        self._log.flush()
        os.fdatasync(self._log.fileno())
        self._pending.clear()
        return self.number

    def save(self, snapshot: Snapshot, number: int) -> None:
        """Keep a snapshot that holds all records up to `number`; those need not be kept, nor older snapshots."""
        assert snapshot.term is not None
        self.synchronise()
        write_whole(self.folder / f"snapshot-{snapshot.clock}-{snapshot.term.number}", [(number, freeze(snapshot))])
        path = self.folder / "log"
        write_whole(path, ((n, event) for n, event, _ in records_of(path.read_bytes()) if n > number))
        self._log.close()
        self._log = path.open("ab")
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

    def origin(self) -> Checkpoint:
        found = read_whole(self.folder / "origin")
        assert found is not None
        return found[1]

    def checkpoint(self, version: int) -> Checkpoint:
        """Of the newest term in which every shard saved this version, or the origin. Raises KeyError if there is none.
        """
        names = {path.name for path in self.folder.glob(f"shard-*/snapshot-{version}-*[0-9]")}
        for name in sorted(names, key=lambda name: -int(name.split("-")[2])):
            parts = self._parts(name)
            if parts:
                return join(self.setup, parts)
        origin = self.origin()
        if version != origin.clock:
            raise KeyError(f"there is no snapshot of version {version} that all shards have")
        return origin

    def _parts(self, name: str) -> list[Frozen]:
        """One of each shard, or none."""
        parts: list[Frozen] = []
        shards = 1
        while len(parts) < shards:
            found = read_whole(folder_of(self.folder, ("shard", len(parts))) / name)
            if found is None:
                return []
            parts.append(found[1])
            shards = found[1].term.shards
        return parts


def join(setup: Setup, parts: list[Frozen]) -> Checkpoint:
    """What all shards hold together: one part of each."""
    return gather(setup.partition(len(parts)), parts[0].clock, [part.kept[-1] for part in parts],
                  [part.slots for part in parts], setup.rule.slots)
