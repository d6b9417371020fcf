"""The driver for many computers: each shard, each worker and the coordinator is a Ray actor, on any node of a cluster.

    server = RayServer(model, AdamWRule(), shards=2, workers=4, microbatches=8, folder="/shared/runs")
    for done in server.run(train, clocks=1000):       # train(client): see client.py
        print(done.clock, done.mean_loss)

What supervisor.py says of processes holds of actors, and of nodes: when one is lost, with all the actors on it, others
take their places on those that live, as new incarnations. Messages are calls and arrays are objects (ray_mail.py); logs
and snapshots are files (files.py) in a folder that all nodes see. An actor has lost its memory when it comes back, so
that folder is all that brings it back. Ray restarts nothing itself: births have one authority, which numbers them.

address: of the Ray cluster, as ray.init() takes it. By default the one that this process is connected to, or else what
         ray.init() finds: the environment's RAY_ADDRESS, or a cluster of its own on this computer. What run() connects
         to it leaves again
folder:  must be one that all nodes see, and see alike: a rename on one shows on the others at once
options: what Ray is told of the actors of a kind, as in {"worker": {"num_cpus": 4}}; by default they reserve nothing,
         and each goes to the node that has the fewest

Rule, hyper-parameters and program are pickled by Ray. The node on which run() is called must live, and Ray's head node.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from engine.backend import get_num_threads
from engine.sharder.client import Program, Stopped
from engine.sharder.drivers.child import Order, be, failure
from engine.sharder.drivers.files import Replaced
from engine.sharder.drivers.ray_mail import ActorMail, RunMail
from engine.sharder.drivers.supervisor import SupervisedServer, Team
from engine.sharder.events import RUN, Address, worker_address
from engine.sharder.memory import Checkpoint
from engine.sharder.wire import Foreign, arithmetic

KINDS = ("coordinator", "shard", "worker")
LAST_WORDS = 1.0  # seconds to wait for what a machine that came to its end has said
DYING = 5.0  # seconds for actors to be gone after they were killed
REACH = 5.0  # seconds for a cluster's address to answer


def ray_module() -> Any:
    """Ray. Raises ModuleNotFoundError with one line where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ModuleNotFoundError(f"RayServer: the package 'ray' is not installed ({error}); run: "
                                  "pip install 'shardgrad[cluster]'") from None


class RayServer(SupervisedServer):
    """A parameter server in Ray actors; the arguments are SupervisedServer's, and those above."""

    def __init__(self, parameters: Any, rule: Any, *, address: str | None = None,
                 options: Mapping[str, Mapping[str, Any]] | None = None, **arguments: Any):
        super().__init__(parameters, rule, **arguments)
        self.ray, self.address, self.options = ray_module(), address, dict(options or {})
        if unknown := self.options.keys() - set(KINDS):
            raise ValueError(f"RayServer: options has {min(unknown)!r}, expected {', '.join(KINDS)}")

    def actors(self) -> dict[Address, Any]:
        """The handles of the actors that live now."""
        return dict(self._team.mail.actors) if isinstance(self._team, _Actors) else {}

    def processes(self) -> dict[Address, tuple[str, int]]:
        """The node that each of them is on, and the number of its process there."""
        asked = {address: actor.process.options(concurrency_group="mail").remote()
                 for address, actor in self.actors().items()}
        return dict(zip(asked, self.ray.get(list(asked.values()))))

    def _make_team(self, program: Program, origin: Checkpoint, last: int | None, epoch: int) -> Team:
        return _Actors(self, program, origin, last, epoch)


class Machine:
    """An actor: a machine on a thread of its own, and the calls that bring its messages and take them away."""

    def __init__(self, order: Order, arithmetic_of_run: str, program: Any, peers: Mapping[Address, Any]):
        self.mail = ActorMail(ray_module(), peers)
        order = replace(order, program=program)
        threading.Thread(target=self._live, args=(order, arithmetic_of_run), daemon=True).start()

    def _live(self, order: Order, arithmetic_of_run: str) -> None:
        try:
            setup = order.recipe.setup()
            own = arithmetic(setup.k)
            if own != arithmetic_of_run:
                raise Foreign(f"{order.address[0]} {order.address[1]} computes with {own}, and the run with "
                              f"{arithmetic_of_run}: results would have other bits")
            be(order, setup, self.mail)
        except (Stopped, Replaced):
            pass
        except BaseException as error:
            self.mail.send(RUN, failure(error))
        finally:
            self.mail.end()

    def deliver(self, body: bytes, arrays: Any = ()) -> None:
        self.mail.deliver(body, arrays)

    def meet(self, peers: Mapping[Address, Any]) -> None:
        self.mail.meet(peers)

    def collect(self) -> Any:
        return self.mail.collect()

    def process(self) -> tuple[str, int]:
        """The node that it is on, and the number of its process there."""
        return ray_module().get_runtime_context().get_node_id(), os.getpid()


class _Actors(Team):
    """The actors of one run."""

    server: RayServer
    mail: RunMail

    def open(self) -> None:
        self.ray = ray = self.server.ray
        self.connected = connect(ray, self.server.address)
        try:
            self.hosts = {node["NodeManagerAddress"] for node in self._nodes()}
            if self.server.folder is None and len(self.hosts) > 1:
                raise ValueError(f"RayServer: folder is None, and the cluster has {len(self.hosts)} computers; "
                                 "expected a folder that all of them see")
            self.places: dict[Address, str] = {}  # the node that each was meant for
            self.ended: dict[Address, float] = {}  # when each was seen to have come to its end
            self.mail = RunMail(ray)
            self.kind = ray.remote(concurrency_groups={"mail": 1})(Machine)
            with _picklable("the program"):
                self.shared_program = ray.put(self.program)
        except BaseException:
            self._disconnect()
            raise

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    @property
    def computers(self) -> bool:
        return len(self.hosts) > 1

    def threads(self, address: Address) -> int:
        """Its share of all computers' cores, if they are as this one is."""
        return min(get_num_threads(), max(1, len(self.hosts) * get_num_threads() // len(
            self.workers if address[0] == "worker" else self.servers[1:])))

    def bear(self, order: Order) -> None:
        kind = order.address[0]
        program = self.shared_program if kind == "worker" else None
        try:
            born = self.kind.options(**self._options(order.address))
        except (TypeError, ValueError) as error:
            raise ValueError(f"RayServer: options of {kind} are {self.server.options[kind]!r}: {error}") from error
        with _picklable("the rule or the hyper-parameters"):
            actor = born.remote(replace(order, program=None), arithmetic(self.server.k), program,
                                dict(self.mail.actors))
        self.mail.add(order.address, actor)

    def _options(self, address: Address) -> dict[str, Any]:
        """What was asked for, or else the node with the fewest of these actors."""
        if address[0] in self.server.options:
            return {"scheduling_strategy": "SPREAD", **self.server.options[address[0]]}
        self.places.pop(address, None)
        crowd = Counter(self.places.values())
        node = min((node["NodeID"] for node in self._nodes()), key=lambda node: crowd[node])
        self.places[address] = node
        affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        return {"num_cpus": 0, "scheduling_strategy": affinity(node, soft=False)}

    def alive(self, address: Address) -> bool:
        return address in self.mail.actors.keys() - self.mail.ended

    def remove(self, address: Address) -> None:
        self.mail.forget(address)
        self.mail.fallen = [(other, error) for other, error in self.mail.fallen if other != address]
        self.places.pop(address, None)
        actor = self.mail.actors.pop(address, None)
        if actor is not None:
            self.ray.kill(actor)

    def lost(self) -> Iterator[tuple[Address, str]]:
        while self.mail.fallen:
            address, error = self.mail.fallen.pop(0)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            if getattr(error, "actor_init_failed", False):
                raise self.fail(f"{address[0]} {address[1]}: its actor cannot be made: {lines[-1]}")
            why = next((line for line in lines if "because" in line), lines[0]).split(". ")[0]
            yield address, f"as Ray says: {why}"
        for address in self.mail.ended - {worker_address(worker) for worker in self.returned}:
            if time.monotonic() - self.ended.setdefault(address, time.monotonic()) >= LAST_WORDS:
                raise self.fail(f"{address[0]} {address[1]}: its machine ended before the run")

    def close(self) -> None:
        with _undisturbed():
            self.mail.kill(DYING)
            self.clear()
            self._disconnect()

    def _disconnect(self) -> None:
        if self.connected:
            self.ray.shutdown()


def connect(ray: Any, address: str | None) -> bool:
    """Be connected to a Ray cluster; whether this made the connection. Raises ConnectionError with one line."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that this runs here
    importable = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # what is here, if it is there too
    try:
        expect_listener(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address=address, include_dashboard=False, logging_level="warning",
                 runtime_env={"env_vars": importable})
    except Exception as error:  # of many kinds
        where = f"at {address}" if address else "here"
        text = " ".join(str(error).split())
        raise ConnectionError(f"RayServer: no Ray cluster {where}: {type(error).__name__}: {text}") from error
    return True


def expect_listener(address: str) -> None:
    """Raise OSError where nobody listens at host:port; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), REACH).close()


@contextmanager
def _picklable(what: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        reason = next(iter(str(error.__cause__ or error).splitlines()), "")
        raise ValueError(f"RayServer: {what} cannot be pickled for other processes: {reason}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No Ctrl-C meanwhile. (A mask would not do: Ray's threads take the signal, and Python raises it in this one.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
