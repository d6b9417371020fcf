"""Shared memory without a name: sealed, read where it is, gone with whoever holds it; and the sockets it comes by."""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from fuzz_wire import bits

from engine.backend import Array
from engine.sharder.drivers import post, segments
from engine.sharder.drivers.post import Post
from engine.sharder.drivers.segments import Segment, Segments, opened
from engine.sharder.encoding import WireError
from engine.sharder.messages import Identity, Parameters, Push, Pushed
from engine.sharder.versions import Version
from engine.sharder.wire import Hello

# Whatever is tested here but the frames themselves is memfd_create's, which Linux alone has.
pytestmark = pytest.mark.skipif(not segments.AVAILABLE, reason="memfd_create and its seals are Linux's, from 3.17 on")


def descriptors():
    """What is open: number and what it is."""
    gc.collect()
    paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return {(path, os.readlink(path)) for path in paths if os.path.lexists(path)}


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    before = descriptors()
    yield
    assert descriptors() <= before


def ramp(size):
    return np.arange(size, dtype=np.float32)


def test_what_was_written_is_mapped_and_cannot_change():
    segment = Segment([ramp(5), ramp(1000).reshape(10, 100)])
    memory = opened(os.dup(segment.descriptor))
    assert len(memory) == 64 + 4000 and memory.readonly
    assert np.array_equal(np.frombuffer(memory, np.float32, 5), ramp(5))
    assert np.array_equal(np.frombuffer(memory, np.float32, 1000, 64), ramp(1000))
    with pytest.raises(OSError):
        os.pwrite(segment.descriptor, b"x", 0)
    for size in (0, 1 << 20):
        with pytest.raises(OSError):
            os.ftruncate(segment.descriptor, size)
    del segment  # the memory stays while somebody holds it
    assert np.array_equal(np.frombuffer(memory, np.float32, 5), ramp(5))


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW])
def test_memory_that_could_still_change_is_refused(seals):
    descriptor = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.pwrite(descriptor, b"abc", 0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(WireError, match=r"wire: a segment of 3 bytes with seals 0x\d, expected 0xf"):
        opened(descriptor)


def test_files_and_nothing_at_all_are_refused():
    with tempfile.TemporaryFile() as file:
        file.write(b"abc")
        file.flush()
        with pytest.raises(WireError, match="a segment of 3 bytes with seals 0x0"):
            opened(os.dup(file.fileno()))
    nothing = Segment([])
    with pytest.raises(WireError, match="a segment of 0 bytes"):
        opened(os.dup(nothing.descriptor))


def test_what_is_sent_again_is_written_once():
    kept, one, two = Segments(Segment), ramp(10), ramp(10)
    assert kept.of([one, two]) is kept.of([one, two])
    assert len({id(kept.of(arrays)) for arrays in ([one, two], [one], [two])}) == 3
    del one
    assert kept.of([two]) is kept.of([two]) and len(kept._kept) == 1


def test_only_the_newest_are_kept_to_be_sent_again():
    kept, arrays = Segments(Segment), [ramp(10) for _ in range(segments.KEPT + 1)]
    first, *others = [kept.of([array]) for array in arrays]
    assert [kept.of([array]) for array in arrays[1:]] == others
    assert kept.of(arrays[:1]) is not first and len(kept._kept) == segments.KEPT


# ── by the socket ─────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def posts(no_descriptor_is_left):
    with tempfile.TemporaryDirectory() as folder:
        made = [Post(Hello(kind, 0, 0, "cpu"), Path(folder), bytes(32)) for kind in ("shard", "worker")]
        made[1].calls.add(("shard", 0))
        yield made
        for post in made:
            post.close()


def heard(post, other, count):
    """So many messages, while the other works on."""
    found, end = [], time.monotonic() + 20
    while len(found) < count and time.monotonic() < end:
        other.receive(0)
        found += post.receive(0.01)
    return found


def push_of(*arrays):
    return Push(Identity(0, 0, 0), 0, 0, 0, 0, 0.0, 1.0, tuple(map(Array, arrays)))


@pytest.mark.parametrize("available", [True, False], ids=["segments", "frames alone"])
def test_large_and_small_messages_in_their_order(posts, monkeypatch, available):
    monkeypatch.setattr(post, "AVAILABLE", available)  # False: as on systems that have no such memory
    shard, worker = posts
    said = [push_of(ramp(5)), push_of(ramp(70_000), ramp(3), ramp(20_000)), Pushed(Identity(0, 0, 1), 0),
            push_of(ramp(16_384)), push_of(ramp(70_000))]
    for message in (*said, *said):
        worker.send(("shard", 0), message)
    assert [bits(message) for message in heard(shard, worker, 10)] == [bits(message) for message in said + said]
    version = Version(3, False, Array(ramp(100_000)))
    answer = Parameters(0, 0, 0, 1, 3, version)
    shard.send(("worker", 0), answer)
    shard.send(("worker", 0), answer)
    assert [bits(message) for message in heard(worker, shard, 2)] == [bits(answer)] * 2
    assert len([own for own, _ in shard.segments._kept if own[0]() is version.flat.data]) == available


def test_descriptors_of_strangers_are_closed(posts):
    shard, _ = posts
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(shard.folder / "shard-0.socket"))
        shard.receive(0.01)
        segment = Segment([ramp(100)])
        socket.send_fds(stranger, [bytes(10)], [segment.descriptor] * 3)
        for _ in range(3):
            shard.receive(0.01)
        assert list(shard.refusals) == ["wire: 3 descriptors that nobody expects"]


@pytest.mark.parametrize(("message", "descriptors", "error"), [
    (push_of(ramp(20_000)), 0, "a frame without the segment that it speaks of"),
    (push_of(ramp(3)), 1, "a segment that no message speaks of"),
    (push_of(ramp(30_000)), 1, "expected 120000 bytes at 0 of a segment of 80000"),
    (push_of(ramp(20_000)), 2, "2 descriptors that nobody expects"),
])
def test_frames_and_segments_that_do_not_belong_together(posts, message, descriptors, error):
    shard, worker = posts
    worker.send(("shard", 0), Pushed(Identity(0, 0, 1), 0))
    assert heard(shard, worker, 1)
    connection, far = worker.connections["shard", 0], []
    frame = b"".join(connection.channel.seal(message, far))
    segment = Segment([ramp(20_000)])
    connection.socket.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                                         np.array([segment.descriptor] * descriptors, "i").tobytes())])
    assert shard.receive(0.05) == []
    assert any(error in line for line in shard.refusals)
