"""What of the Ray driver needs no cluster: its letters, and what cannot be."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sharder_problems import make

import engine as eg
from engine.backend import get_backend
from engine.sharder.drivers import ray_mail, ray_server
from engine.sharder.drivers.ray_server import RayServer
from engine.sharder.encoding import WireError
from engine.sharder.events import worker_address
from engine.sharder.messages import Parameters, Pull
from engine.sharder.versions import Version


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"^RayServer: the package 'ray' is not installed .*; run: pip "
                                                  r"install 'shardgrad\[cluster\]'$"):
        make(RayServer, microbatches=1)


@pytest.mark.parametrize(("arguments", "error"), [
    ({"compress": "int8", "consistency": "asp"}, "RayServer: compress is 'int8' and consistency asp: .*expected bsp"),
    ({"durability": "snapshot", "consistency": "ssp:1"}, "RayServer: durability is 'snapshot', expected log, the only"),
    ({"options": {"server": {}}}, "RayServer: options has 'server', expected coordinator, shard, worker"),
])
def test_what_cannot_be_configured(monkeypatch, arguments, error):
    monkeypatch.setattr(ray_server, "ray_module", lambda: None)
    with pytest.raises(ValueError, match=f"^{error}"):
        make(RayServer, microbatches=2, **arguments)


def test_a_ray_that_cannot_be_started_is_one_line(monkeypatch):
    def init(**_):
        raise RuntimeError("no room\n  for a store")

    module = SimpleNamespace(init=init, is_initialized=lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConnectionError, match=r"^RayServer: no Ray cluster here: RuntimeError: no room for a store$"):
        ray_server.connect(module, None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"^RayServer: no Ray cluster at {address}: ConnectionRefusedError: "):
            ray_server.connect(module, address)


def test_large_arrays_lie_elsewhere_and_are_put_there_once():
    """A version that two workers pull, as a third one of another version, is an object once; what arrives is a view."""
    k, puts, sent = get_backend("reference"), [], []
    sender = ray_mail.Sender(SimpleNamespace(put=lambda arrays: puts.append(arrays) or arrays))
    sender.tell = {worker_address(w): lambda *letter: sent.append(letter) for w in range(3)}
    versions = [Version(n, False, k.full((1 << 15,), float(n), eg.float32)) for n in (1, 2)]
    for worker in range(3):
        version = versions[worker // 2]
        sender.send(worker_address(worker), Parameters(worker, 0, 0, 1, version.number, version))
    sender.send(worker_address(9), None)  # who is not known
    assert [len(arrays) for arrays in puts] == [1, 1] and len(sent) == 3
    for worker, letter in enumerate(sent):
        found = ray_mail.read(letter).values.flat.data
        assert np.shares_memory(found, puts[worker // 2][0]) and not found.flags.writeable
        assert (found == 1 + worker // 2).all() and len(letter[0]) < 200


def test_what_is_no_message_is_refused_by_one_line_and_the_others_are_taken(caplog):
    mail, pull = ray_mail.ActorMail(SimpleNamespace(), {}), Pull(0, 0, 1, 0)
    body, arrays = ray_mail.write(pull)
    for letter in ((body[:-1], ()), (b"", ()), (body, ()), (b"\xff\xff" + body, arrays)):
        mail.deliver(*letter)
    assert mail.receive(0) == [pull]
    assert [record.getMessage().startswith("wire: ") for record in caplog.records] == 3 * [True]
    assert ray_mail.read_all([(b"?", ())]) == []


def test_pieces_are_cut_where_each_begins_and_nowhere_else():
    arrays = [np.arange(n, dtype=dtype) for n, dtype in ((5, "float32"), (16, "float64"), (1, "uint8"), (7, "int16"))]
    pieces, start = ray_mail.Pieces(arrays), 0
    for array in arrays:
        start += -start % 64
        assert np.array_equal(np.frombuffer(pieces[start:start + array.nbytes], array.dtype), array)
        with pytest.raises(WireError, match=f"{array.nbytes} bytes of an array, expected {array.nbytes + 1}"):
            pieces[start:start + array.nbytes + 1]
        start += array.nbytes
    assert len(pieces) == start
    with pytest.raises(WireError, match="0 bytes of an array, expected 8"):
        pieces[8:16]
