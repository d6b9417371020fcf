"""Logs and snapshots on disk: what is written comes back to the bit; what is half written is seen and left out."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from stat import S_ISDIR
from zlib import crc32

import numpy as np
import pytest
from fuzz_wire import bits
from sharder_machines import machines, push_to

from engine.backend import Array
from engine.sharder.consistency import Consistency
from engine.sharder.drivers.files import (
    RECORD,
    Library,
    Replaced,
    Store,
    folder_of,
    read_whole,
    record_bytes,
    records_of,
)
from engine.sharder.drivers.frozen import freeze, thaw
from engine.sharder.encoding import decode, encode
from engine.sharder.events import Proceed, shard_address
from engine.sharder.memory import Checkpoint
from engine.sharder.messages import Apply, Choose
from engine.sharder.versions import Version

ADDRESS = shard_address(0)


def stored(tmp_path, setup, records=3):
    store = Store(tmp_path, ADDRESS, setup)
    for number in range(1, records + 1):
        store.append(number, Proceed(number))
        assert store.synchronise() == number
    return store


def test_records_come_back_in_order_and_a_torn_one_ends_the_log(tmp_path):
    cluster, *_ = machines()
    stored(tmp_path, cluster.setup)
    path = folder_of(tmp_path, ADDRESS) / "log"
    whole = path.read_bytes()
    ends = [end for *_, end in records_of(whole)]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        store = Store(tmp_path, ADDRESS, cluster.setup)
        complete = sum(end <= cut for end in ends)
        assert store.records == [Proceed(n) for n in range(1, complete + 1)] and store.number == complete
        store.append(complete + 1, Proceed(99))  # the log goes on where it was whole
        store.synchronise()
        assert Store(tmp_path, ADDRESS, cluster.setup).records[-1] == Proceed(99)


def test_every_changed_byte_ends_the_log_before_it():
    data = b"".join(b"".join(record_bytes(n, Proceed(n))) for n in (1, 2))
    first = next(end for *_, end in records_of(data))
    for i in range(len(data)):
        changed = data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1:]
        assert [n for n, *_ in records_of(changed)] == ([] if i < first else [1])


def test_a_record_with_less_than_it_says_ends_the_log():
    """Also where the checksum is that of what there is."""
    _, *body = record_bytes(1, Proceed(1))
    data = b"".join(body)
    for longer in (0, 1):
        head = RECORD.pack(1, len(data) + longer, crc32(data), 0)[:-4]
        found = list(records_of(head + crc32(head).to_bytes(4, "little") + data))
        assert found == ([] if longer else [(1, Proceed(1), RECORD.size + len(data))])


def test_nothing_is_written_before_it_is_synchronised(tmp_path):
    cluster, *_ = machines()
    store = Store(tmp_path, ADDRESS, cluster.setup)
    assert store.synchronise() is None
    store.append(1, Proceed(1))
    assert Store(tmp_path, ADDRESS, cluster.setup).number == 0


def test_the_disk_has_everything_before_anybody_hears_of_it(tmp_path, monkeypatch):
    """A log when it is synchronised; a file that replaces another before it does, and its name after that."""
    cluster, _, (shard, *_), _ = machines()
    store, happened = Store(tmp_path, ADDRESS, cluster.setup), []

    def synchronises(descriptor, original):
        found = os.fstat(descriptor)
        happened.append("folder" if S_ISDIR(found.st_mode) else found.st_size)
        original(descriptor)

    def replaces(source, target, original):
        happened.append((source.stat().st_size, target.name))
        original(source, target)

    for name, spy in (("fsync", synchronises), ("fdatasync", synchronises), ("replace", replaces)):
        monkeypatch.setattr(os, name, partial(spy, original=getattr(os, name)))
    store.append(1, Proceed(1))
    store.append(2, Proceed(2))
    assert store.synchronise() == 2
    two = (store.folder / "log").stat().st_size
    assert happened == [two] and two > 0
    store.append(3, Proceed(3))
    store.save(shard.snapshot(), 1)
    snapshot = (store.folder / "snapshot-0-1").stat().st_size
    assert happened[1:] == [two * 3 // 2, snapshot, (snapshot, "snapshot-0-1"), "folder", two, (two, "log"), "folder"]


def remembered(shard):
    """All that a shard has, without what lies between its pieces."""
    frozen = freeze(shard.snapshot())
    parameters = [version.read(piece).tobytes() for version in frozen.kept for piece in shard.pieces]
    return parameters, b"".join(encode(replace(frozen, kept=())))


@pytest.mark.parametrize("arguments", [{}, {"consistency": "ssp:2"}, {"microbatches": 5}])
def test_a_shard_in_the_middle_of_everything_comes_back_from_its_snapshot(arguments):
    cluster, _, (shard, *_), _ = machines(**{"microbatches": 3, "clip_norm": 1.0, **arguments})
    shard.step(push_to(shard, microbatch=1, sequence=4))
    shard.step(push_to(shard, microbatch=2, sequence=0, worker=1))
    if "consistency" in arguments:
        shard.step(push_to(shard, clock=1, microbatch=0, sequence=1, version=0))
    frozen = freeze(shard.snapshot())
    written = b"".join(encode(frozen))
    again = thaw(decode(written), cluster.setup, 0)
    assert b"".join(encode(freeze(again))) == written
    twin = type(shard)(0, cluster.setup)
    twin.resume(again)
    for machine in (shard, twin):
        for microbatch in {0, 3, 4} & set(range(cluster.setup.microbatches)):
            said = machine.step(push_to(machine, microbatch=microbatch, sequence=7 + microbatch))
        machine.step(Apply(1, 0, 0.5))
    assert remembered(twin) == remembered(shard) and said


def test_what_was_seen_chosen_and_reduced_comes_back():
    """A twin that forgot these would answer differently only after a loss, a repetition or a choice to come."""
    cluster, _, (shard, *_), _ = machines(microbatches=3, consistency=Consistency(backups=1), clip_norm=1.0)
    shard.step(push_to(shard, microbatch=1, sequence=4))
    shard.step(push_to(shard, microbatch=2, sequence=0, worker=1))
    for chosen in (None, (1, 2)):
        if chosen:
            shard.step(Choose(1, 0, chosen))
        was = shard.snapshot()
        found = thaw(decode(b"".join(encode(freeze(was)))), cluster.setup, 0)
        assert {w: vars(window) for w, window in found.windows.items()} == {
            0: {"epoch": 0, "floor": 0, "above": {4}}, 1: {"epoch": 0, "floor": 1, "above": set()}}
        mine, its = was.gatherings[0], found.gatherings[0]
        assert (its.version, its.chosen, its.held.keys()) == (0, chosen, set() if chosen else {1, 2})
        assert (its.reduced is None) == (chosen is None) and its.complete == mine.complete == (chosen is not None)
        if chosen:
            assert b"".join(encode(its.reduced)) == b"".join(encode(mine.reduced))


def test_a_snapshot_makes_earlier_records_needless(tmp_path):
    cluster, _, (shard, *_), _ = machines()
    store = stored(tmp_path, cluster.setup)
    store.append(4, Proceed(4))
    store.save(shard.snapshot(), 2)
    assert [n for n, *_ in records_of((store.folder / "log").read_bytes())] == [3, 4]
    again = Store(tmp_path, ADDRESS, cluster.setup)
    assert again.records == [Proceed(3), Proceed(4)] and again.number == 4
    short = (store.folder / "log").read_bytes()
    (store.folder / "log").write_bytes(b"".join(part for n in (1, 2, 3, 4) for part in record_bytes(n, Proceed(n))))
    assert Store(tmp_path, ADDRESS, cluster.setup).records == again.records  # it died before the log was replaced
    (store.folder / "log").write_bytes(short)
    assert bits(freeze(again.snapshot)) == bits(freeze(shard.snapshot()))
    last = Store(tmp_path, ADDRESS, cluster.setup)
    last.append(5, Proceed(5))
    last.synchronise()
    assert Store(tmp_path, ADDRESS, cluster.setup).records == [Proceed(3), Proceed(4), Proceed(5)]


def test_an_incarnation_that_was_replaced_can_put_nothing_on_record(tmp_path, monkeypatch):
    """Whatever it tries after the next one has come, that one's files are as they were, and it hears of it."""
    cluster, _, (shard, *_), _ = machines()
    older = stored(tmp_path, cluster.setup)
    older.save(shard.snapshot(), 2)
    older.append(4, Proceed(4))
    newer = Store(tmp_path, ADDRESS, cluster.setup, incarnation=1)
    assert newer.records == [Proceed(3)]
    newer.append(4, Proceed(44))
    assert newer.synchronise() == 4
    before = {path: path.read_bytes() for path in newer.folder.iterdir()}
    with pytest.raises(Replaced):
        older.synchronise()
    with pytest.raises(Replaced):
        older.save(shard.snapshot(), 4)
    with pytest.raises(Replaced, match="shard 0: incarnation 1 has taken its place"):
        Store(tmp_path, ADDRESS, cluster.setup)
    with pytest.raises(Replaced), monkeypatch.context() as patch:
        patch.setattr("engine.sharder.drivers.files.claim", lambda *_: older.folder)  # taken just after it was claimed
        Store(tmp_path, ADDRESS, cluster.setup)
    assert {path: path.read_bytes() for path in newer.folder.iterdir()} == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == list(before)
    assert Store(tmp_path, ADDRESS, cluster.setup, incarnation=7).records == [Proceed(3), Proceed(44)]


def library_of(tmp_path):
    """One that has the origin and version 2 of every shard: (library, shards, origin)."""
    cluster, _, shards, _ = machines()
    library, origin = Library(tmp_path, cluster.setup), cluster.checkpoint()
    library.keep_origin(origin)
    for shard in shards:
        saved_at(tmp_path, shard, 2, cluster.setup)
    return library, shards, origin


def test_a_snapshot_is_found_while_its_folder_is_being_taken(tmp_path, monkeypatch):
    library, _, _ = library_of(tmp_path)
    takers = [1]

    def read(path):
        if takers:
            Store(tmp_path, ADDRESS, library.setup, takers.pop())
        return read_whole(path)

    monkeypatch.setattr("engine.sharder.drivers.files.read_whole", read)
    assert library.checkpoint(2).clock == 2


def test_a_folder_is_taken_before_its_snapshots_are_listed(tmp_path, monkeypatch):
    library, _, _ = library_of(tmp_path)
    takers = [1]

    def taken_first(look):
        def looks(folder):
            if takers and str(folder).endswith("shard-0-0"):
                Store(tmp_path, ADDRESS, library.setup, takers.pop())
            return look(folder)
        return looks

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, taken_first(getattr(os, name)))
    assert library.checkpoint(2).clock == 2
    assert not takers


def saved_at(tmp_path, shard, clock, setup):
    shard.clock = clock
    Store(tmp_path, shard_address(shard.number), setup).save(shard.snapshot(), 0)


def test_a_term_begins_with_what_every_shard_has(tmp_path):
    library, shards, origin = library_of(tmp_path)
    saved_at(tmp_path, shards[0], 4, library.setup)
    assert library.checkpoint(2).clock == 2
    assert all(np.array_equal(value, origin.parameters[name])
               for name, value in library.checkpoint(2).parameters.items())
    with pytest.raises(KeyError, match="there is no snapshot of version 4 that all shards have"):
        library.checkpoint(4)
    path = folder_of(tmp_path, ADDRESS) / "snapshot-2-1"
    whole = path.read_bytes()
    for data in (whole[:-1], whole + b"x"):
        path.write_bytes(data)
        with pytest.raises(KeyError, match="version 2"):
            library.checkpoint(2)
    assert bits(library.checkpoint(0)) == bits(Checkpoint(0, origin.parameters, origin.slots))


def test_of_two_terms_that_saved_a_version_the_newest_counts(tmp_path):
    cluster, _, shards, _ = machines()
    for number in (2, 10, 9):  # in no order, that of letters included
        for shard in shards:
            state = shard.snapshot()
            state = replace(state, clock=2, term=replace(state.term, number=number),
                            kept=(replace_elements(state.kept[-1], number),))
            Store(tmp_path, shard_address(shard.number), cluster.setup).save(state, 0)
    loaded = Library(tmp_path, cluster.setup).checkpoint(2)
    assert all((value == 10).all() for value in loaded.parameters.values())


def replace_elements(version, value):
    flat = Array(np.full_like(version.flat.data, value))
    return Version(version.number, version.shared, flat)


def test_old_snapshots_and_those_of_a_term_that_went_back_are_removed(tmp_path):
    cluster, _, (shard, *_), _ = machines()
    for clock in (1, 2, 3, 4, 5):
        saved_at(tmp_path, shard, clock, cluster.setup)
    kept = {path.name for path in folder_of(tmp_path, ADDRESS).glob("snapshot-*")}
    assert kept == {"snapshot-3-1", "snapshot-4-1", "snapshot-5-1"}
    saved_at(tmp_path, shard, 4, cluster.setup)
    assert "snapshot-5-1" not in {path.name for path in folder_of(tmp_path, ADDRESS).glob("snapshot-*")}
