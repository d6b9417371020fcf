"""The driver without a clock: virtual time, and everything that can go wrong with networks, disks and machines.

    simulation = Simulation(parameters, rule, shards=3, workers=2, microbatches=4)
    history = simulation.run(gradient, clocks=5, seed=7, weather=Weather(loss=0.1, duplication=0.1),
                             faults=[(40, "shard"), (90, "coordinator")])

One event at a time, in the order of virtual time; all chance comes from the seed. So one seed is one history, and
its log is the same to the byte each time: a failure found once can be looked at for ever. Invariants are checked
after every event (invariants.py). The idea is FoundationDB's: test the protocol, not the machine it runs on.

A worker's program is a function, since the simulator has no threads:
gradient(parameters, clock, microbatch) -> (gradients of the loss sum, loss sum, tokens), name -> NumPy array both ways.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from engine.sharder.cluster import Cluster
from engine.sharder.coordinator import Coordinator
from engine.sharder.drivers.disk import Archive, Disk
from engine.sharder.drivers.history import History
from engine.sharder.drivers.invariants import Invariants, Violated
from engine.sharder.drivers.plain import Gradient, Plain
from engine.sharder.drivers.program import Program
from engine.sharder.events import (
    COORDINATOR,
    Address,
    Append,
    ClockRequested,
    Committed,
    Finish,
    Load,
    Loaded,
    Proceed,
    Reshard,
    Save,
    Send,
    Stored,
    Timeout,
    Written,
    backup_address,
    shard_address,
    worker_address,
)
from engine.sharder.journal import Backup, Journal, replay
from engine.sharder.memory import place
from engine.sharder.messages import Gone, Message, Parameters, ProtocolError, Push
from engine.sharder.shard import Shard
from engine.sharder.versions import Versions
from engine.sharder.worker import Worker

RUN: Address = ("run", 0)  # whoever wants the training: grants clocks, watches over workers
MESSAGE_FAULTS = ("lose", "repeat", "delay")
CRASHES = ("worker", "shard", "coordinator")
FAULTS = (*MESSAGE_FAULTS, *CRASHES, "leave", "join", "cut", "suspect")
DURABILITIES = ("snapshot", "log", "backup")


@dataclass(frozen=True)
class Weather:
    """What the network and the machines are like. Times are in units of virtual time.

    latency:   shortest and longest way of a message; a spread reorders
    loss, duplication: the probability that a message gets lost, and that it arrives twice
    bandwidth: elements that a machine can send in a unit of time; 0: any number
    work:      a microbatch takes this long, and `stall` times as long with probability `stalling`
    slow:      by worker: the factor by which it is slower than the others
    crashing:  the probability, at each event, that the machine it is for dies; it comes back after `absence`
    disk:      the longest time until a record or snapshot is on disk
    timeout:   who waits asks again this often
    """

    latency: tuple[int, int] = (1, 10)
    loss: float = 0.0
    duplication: float = 0.0
    bandwidth: float = 0.0
    work: int = 5
    stalling: float = 0.0
    stall: int = 20
    slow: Mapping[int, float] = field(default_factory=dict)
    crashing: float = 0.0
    absence: int = 40
    disk: int = 3
    timeout: int = 60


@dataclass(frozen=True)
class _Return:
    """To a dead machine: it comes back."""


@dataclass(frozen=True)
class _Kept:
    """To a machine: its snapshot has come to the disk."""

    save: Save


class Simulation(Cluster):
    """A cluster whose shards share nothing; the arguments are Cluster's, and

    durability: what a shard that dies comes back with. "snapshot": nothing; all go back to their last snapshot and
                compute again what came after (BSP only); "log": its snapshot and log; "backup": another machine has
                followed it and stands in for it.
    """

    shared = False

    def __init__(self, parameters: Any, rule: Any, *, durability: str = "log", save_every: int = 2, **arguments: Any):
        if durability not in DURABILITIES:
            raise ValueError(f"Simulation: durability is {durability!r}, expected one of {', '.join(DURABILITIES)}")
        super().__init__(parameters, rule, save_every=save_every, **arguments)
        if durability == "snapshot" and not self.setup.consistency.replays:
            raise ValueError('Simulation: durability "snapshot" is for BSP without backups, whose clocks can be '
                             "computed again; the other modes need a log or a backup")
        self.durability = durability

    def run(self, gradient: Gradient, clocks: int, seed: int, weather: Weather = Weather(),
            faults: Iterable[tuple[int, str]] = (), limit: float = 100_000, stride: int = 1,
            plain: Plain | None = None, checked: bool = True) -> History:
        """Train for `clocks` clocks in virtual time.

        faults: besides the weather's, (n, kind) strikes before event number n:
                "lose", "repeat", "delay"              if it is a message
                "worker", "shard", "coordinator"       that kind of machine dies: the one the event is for, or else
                                                       number n modulo how many there are
                "leave", "join"                        a worker goes for good, a new one comes
                "reshard:S"                            the number of shards becomes S
                "cut"                                  half of the machines do not reach the other half for a while
                "suspect"                              a shard's backup is promoted though the shard is well
        plain:   what the bits are held against; several runs of one problem may share it and its work
        checked: whether invariants are checked after every event
        Raises Violated when an invariant is broken, and when training has not ended by time `limit`.
        """
        run = _Run(self, gradient, clocks, seed, weather, faults, stride)
        if checked:
            run.invariants = Invariants(run, plain or Plain(self.setup, run.archive.whole, gradient))
            for shard in range(run.origin.shards):
                run.invariants.check(shard_address(shard), None)
        try:
            history = run.to_the_end(limit)
            self.term, self.memories = run.coordinator.term, run.memories()
            return history
        finally:
            self.active = False


class _Run:
    """The machines of one run, and what is to happen to them.

    nodes: address -> what reacts there; a dead machine has none. Inside a Journal is the machine itself (machine()).
    """

    def __init__(self, cluster: Simulation, gradient: Gradient, clocks: int, seed: int, weather: Weather,
                 faults: Iterable[tuple[int, str]], stride: int):
        self.cluster, self.gradient, self.weather, self.stride = cluster, gradient, weather, stride
        self.random = Random(seed)
        self.faults: dict[int, str] = dict(faults)
        self.history = History(cluster.setup)
        self.events: list[tuple[float, int, Address, int, Any]] = []  # (time, order, to, incarnation, event)
        self.scheduled = 0
        self.links: dict[Address, float] = {}  # when what each machine sent so far has left it
        self.cut: tuple[float, frozenset[Address]] = (0, frozenset())
        self.first = self.done = self.granted = cluster.clock
        self.last = cluster.clock + clocks
        whole = cluster.checkpoint()
        self.coordinator, shards, workers = cluster.start(clocks)
        self.origin = self.coordinator.term
        self.archive = Archive(cluster.setup, whole)
        self.nodes: dict[Address, Any] = {}
        self.incarnations: Counter[Address] = Counter()
        self.disks: dict[Address, Disk] = {}
        self.programs: dict[int, Program] = {}
        self.protected: set[Address] = set()  # shards with a backup, or with their snapshot on disk
        self.zombies: dict[Address, Journal] = {}  # shards that were taken for dead and replaced
        self.absent: dict[int, int] = {}  # workers that will not come back, and their last epoch
        self._bring(COORDINATOR, Journal(self.coordinator))
        for shard in shards:
            self._bring_shard(shard)
        for worker in workers:
            self._bring_worker(worker)
        self.schedule(weather.timeout, RUN, Timeout())
        self.invariants: Invariants | None = None
        self._grant()

    # ── machines ────────────────────────────────────────────────────────────────────────────────────

    def _bring(self, address: Address, node: Any) -> None:
        self.nodes[address] = node
        self.schedule(self.weather.timeout, address, Timeout(), self.incarnations[address])

    def _bring_shard(self, shard: Shard) -> None:
        address = shard_address(shard.number)
        if self.cluster.durability == "snapshot":
            return self._bring(address, shard)
        if self.cluster.durability == "log":
            return self._bring(address, Journal(shard))
        backup = backup_address(shard.number)
        self._bring(address, Journal(shard, own=address, backup=backup))
        self.nodes[backup] = Backup(self._newborn(shard.number), address)
        self.protected.add(address)
        return None

    def _newborn(self, number: int) -> Shard:
        """A shard as it was when the run began: blank, if it was not there."""
        setup = self.cluster.setup
        if number >= self.origin.shards:
            return Shard(number, setup)
        partition = setup.partition(self.origin.shards)
        versions = Versions(setup.k, partition.sizes[number], setup.dtype, setup.updates(self.origin.start),
                            older=setup.consistency.staleness)
        return Shard(number, setup, self.origin,
                     place(setup.k, setup.rule, partition.pieces[number], versions, self.archive.whole))

    def _bring_worker(self, worker: Worker) -> None:
        address = worker_address(worker.number)
        self.incarnations[address] = worker.epoch
        self.programs[worker.number] = Program(self, worker)
        self._bring(address, worker)
        self.schedule(0, address, ClockRequested(), worker.epoch)

    def machine(self, address: Address) -> Any:
        """The machine itself, None while it is dead."""
        node = self.nodes.get(address)
        return node.machine if isinstance(node, Journal) else node

    def shards(self) -> list[Shard | None]:
        """Those of the present term."""
        return [self.machine(shard_address(s)) for s in range(self.coordinator.term.shards)]

    def memories(self) -> list[Any]:
        return [shard.memory for shard in self.shards() if shard is not None]

    # ── the future ──────────────────────────────────────────────────────────────────────────────────

    def schedule(self, delay: float, to: Address, event: Any, incarnation: int = -1) -> None:
        """An event to come; one that is for a certain incarnation of a machine is void when that is dead."""
        self.scheduled += 1
        heapq.heappush(self.events, (self.history.time + delay, self.scheduled, to, incarnation, event))

    def send(self, source: Address, send: Send) -> None:
        """Put a message on its way, through weather that may lose or repeat it."""
        weather, random, delay, copies = self.weather, self.random, 0.0, 1
        if weather.bandwidth:
            delay = self._transmission(source, send.message)
        until, half = self.cut
        if (weather.loss and random.random() < weather.loss) or (
                until > self.history.time and (source in half) != (send.to in half)):
            self.history.faults["lose"] += 1
            return
        if weather.duplication and random.random() < weather.duplication:
            self.history.faults["repeat"] += 1
            copies = 2
        for _ in range(copies):
            shortest, longest = weather.latency
            self.schedule(delay + shortest + int(random.random() * (longest - shortest + 1)), send.to, send.message)

    def _transmission(self, source: Address, message: Any) -> float:
        """How long it takes until a message, and what was sent before it, has left the machine."""
        elements = sum(g.size for g in message.gradients) if isinstance(message, Push) else (
            message.values.flat.size if isinstance(message, Parameters) else 0)
        start = max(self.history.time, self.links.get(source, 0))
        self.links[source] = start + elements / self.weather.bandwidth
        return self.links[source] - self.history.time

    # ── the present ─────────────────────────────────────────────────────────────────────────────────

    def to_the_end(self, limit: float) -> History:
        history, number, weather_kills = self.history, 0, self.weather.crashing > 0
        while not (self.coordinator.finished and self._over()):
            time, _, to, incarnation, event = heapq.heappop(self.events)
            if incarnation != -1 and incarnation != self.incarnations[to]:
                continue
            history.time = time
            if time > limit:
                raise Violated(f"training has not ended by virtual time {limit}", history)
            number += 1
            history.record(to, event)
            if not (number in self.faults or weather_kills) or not self._struck(number, to, event):
                self._happen(to, event)
            if self.invariants:
                self.invariants.check(to, event)
        if self.invariants:
            self.invariants.check_end()
        return history

    def _over(self) -> bool:
        return (self.nodes.get(COORDINATOR) is not None
                and all(self.nodes[worker_address(w)] is None or program.worker.ended
                        for w, program in self.programs.items())
                and all(shard is not None and shard.active and shard.term == self.coordinator.term
                        and shard.clock == self.last
                        for shard in self.shards()))

    def _happen(self, to: Address, event: Any) -> None:
        if to == RUN:
            return self._watch()
        if isinstance(event, _Return):
            return self._return(to)
        node, kind = self.nodes.get(to), to[0]
        if node is None:
            if kind == "shard" and self.incarnations[to] == 0:  # the first that is heard of a new shard
                self._bring_shard(Shard(to[1], self.cluster.setup))
                return self._happen(to, event)
            return None
        if to in self.zombies and self.random.random() < 0.25 and self._haunt(to, event):
            return None
        if isinstance(event, Timeout):
            self.schedule(self.weather.timeout, to, event, self.incarnations[to])
        elif isinstance(event, Written):
            self.disks[to].flush(event.number)
            self.disks[to].writing = False
            self._write(to)
        elif isinstance(event, _Kept):
            return self._kept(to, event.save)
        if kind == "worker":
            self.programs[to[1]].react(event)
        else:
            self.perform(to, node.step(event))
        return None

    def _haunt(self, to: Address, event: Any) -> bool:
        """Some still take a replaced shard for the shard: whether it gets this message instead. It stops when it is
        told what it cannot make sense of."""
        if isinstance(event, (Message, Timeout)):
            try:
                self.perform(to, self.zombies[to].step(event))
            except ProtocolError:
                del self.zombies[to]
        return isinstance(event, Message)

    def perform(self, source: Address, actions: list[Any]) -> None:
        """Carry out what a machine wants."""
        for action in actions:
            if isinstance(action, Send):
                if self.invariants:
                    self.invariants.said(source, action)
                self.send(source, action)
            elif isinstance(action, Append):
                self._disk(source).pending.append(action)
                self._write(source)
            elif isinstance(action, Save):
                self._to_disk(source, _Kept(action))
            elif isinstance(action, Load):
                loaded = Loaded(action.term, self.archive.checkpoint(action.term.start))
                self._to_disk(source, loaded)
            elif isinstance(action, Committed):
                self._committed(action)

    def _disk(self, address: Address) -> Disk:
        return self.disks.setdefault(address, Disk())

    def _to_disk(self, address: Address, answer: Any) -> None:
        self.schedule(1 + int(self.random.random() * self.weather.disk), address, answer, self.incarnations[address])

    def _write(self, address: Address) -> None:
        """Bring what is pending to the disk, if it is not busy; never before the snapshot that the log begins with."""
        disk, begins = self._disk(address), self.cluster.durability == "backup" and address[0] == "shard"
        if disk.pending and not disk.writing and not (begins and address not in self.protected):
            disk.writing = True
            self._to_disk(address, Written(disk.pending[-1].number))

    def _kept(self, address: Address, save: Save) -> None:
        self._disk(address).keep(save)
        if save.snapshot.active:
            self.archive.keep(address[1], save.snapshot)
        node = self.nodes[address]
        self.protected.add(address)
        self._write(address)
        if isinstance(node, Journal) and node.backup is None:
            self.perform(address, node.step(Written(save.number)))
        if save.snapshot.active:
            self.perform(address, node.step(Stored(save.snapshot.term.number, save.snapshot.clock)))

    # ── whoever wants the training ──────────────────────────────────────────────────────────────────

    def _grant(self) -> None:
        if self.done == self.last:
            return self.schedule(0, COORDINATOR, Finish())
        if self.done == self.granted:
            self.granted = min(self.done + self.stride, self.last)
        return self.schedule(0, COORDINATOR, Proceed(self.granted - 1))

    def _committed(self, committed: Committed) -> None:
        if committed.clock >= self.done:
            self.done = committed.clock + 1
            self.history.committed.append(committed)
            if self.done >= self.granted:
                self._grant()

    def _watch(self) -> None:
        """Ask again, and repeat who is gone."""
        self.schedule(self.weather.timeout, RUN, Timeout())
        self._grant()
        for worker, epoch in self.absent.items():
            self.schedule(0, COORDINATOR, Gone(worker, epoch))

    # ── faults ──────────────────────────────────────────────────────────────────────────────────────

    def _struck(self, number: int, to: Address, event: Any) -> bool:
        """Whether a fault keeps this event from happening (now)."""
        fault = self.faults.get(number, "")
        if not fault:
            if self.weather.crashing and to[0] in CRASHES and self.random.random() < self.weather.crashing:
                self._crash(to)
            return False
        if fault not in MESSAGE_FAULTS:
            self._strike(fault, number, to)
            return False
        if not isinstance(event, Message):
            return False
        self._note(fault)
        if fault != "lose":
            self.schedule(2 * self.weather.timeout, to, event)
        return fault != "repeat"

    def _note(self, fault: str, what: str = "") -> None:
        self.history.faults[fault] += 1
        self.history.note(what or fault)

    def _strike(self, fault: str, number: int, to: Address) -> None:
        kind, _, argument = fault.partition(":")
        if kind in CRASHES:
            of_kind = [address for address, node in self.nodes.items() if address[0] == kind and node is not None]
            if of_kind:
                self._crash(to if to in of_kind else of_kind[number % len(of_kind)])
        elif kind == "leave":
            self._leave(number)
        elif kind == "join":
            self._note("join")
            self._bring_worker(Worker(len(self.programs), 0, self.cluster.setup, self.origin, self.cluster.encode))
        elif kind == "reshard":
            self._note("reshard", fault)
            self.schedule(0, COORDINATOR, Reshard(int(argument)))
        elif kind == "cut":
            self._note("cut")
            half = frozenset(address for address in self.nodes if self.random.random() < 0.5)
            self.cut = (self.history.time + 2 * self.weather.timeout, half)
        elif kind == "suspect":
            of_kind = [a for a, node in self.nodes.items() if isinstance(node, Backup)]
            if of_kind:
                self._note("suspect")
                self._promote(shard_address(of_kind[number % len(of_kind)][1]))
        else:
            raise ValueError(f"Simulation: the fault {fault!r} is unknown")

    def _leave(self, number: int) -> None:
        """A worker goes for good, unless it is the last."""
        present = [w for w in self.programs if w not in self.absent]
        if len(present) > 1:
            worker = present[number % len(present)]
            self._note("leave", f"worker {worker} leaves")
            address = worker_address(worker)
            self.absent[worker] = self.programs[worker].worker.epoch
            self.nodes[address] = None
            self.incarnations[address] += 1
            self.schedule(self.weather.timeout, COORDINATOR, Gone(worker, self.absent[worker]))

    def _crash(self, address: Address) -> None:
        """A machine dies: its memory is gone, what it sent is on its way. It comes back."""
        kind, number = address
        if self.nodes.get(address) is None or (kind == "worker" and self.programs[number].worker.ended):
            return
        if kind == "shard" and self.cluster.durability == "backup" and address not in self.protected:
            return  # its backup has just stood in for it: one backup is good for one loss
        self._note(kind, f"{kind} {number} dies")
        self.nodes[address] = None
        self.incarnations[address] += 1
        if kind != "worker":
            self._disk(address).crash(self.random)
        self.schedule(self.weather.absence, address, _Return(), self.incarnations[address])

    def _return(self, address: Address) -> None:
        kind, number = address
        setup = self.cluster.setup
        if kind == "worker":
            epoch = self.incarnations[address]
            return self._bring_worker(Worker(number, epoch, setup, self.origin, self.cluster.encode))
        if kind == "shard" and self.cluster.durability == "snapshot":
            return self._bring(address, Shard(number, setup, incarnation=self.incarnations[address]))
        if isinstance(self.nodes.get(backup_address(number)), Backup) and kind == "shard":
            return self._promote(address)
        disk = self._disk(address)
        if kind == "coordinator":
            machine: Any = Coordinator(setup, self.origin, self.cluster.workers, self.last)
            self.coordinator = machine
        else:
            machine = self._newborn(number)
            if disk.snapshot:
                machine.resume(disk.snapshot.snapshot)
        replay(machine, [record.record for record in disk.records])
        return self._bring(address, Journal(machine, disk.number))

    def _promote(self, address: Address) -> None:
        """The backup of a shard stands in for it; from here on it has a log instead, which begins with a snapshot."""
        node = self.nodes.pop(backup_address(address[1]))
        if self.nodes.get(address) is not None:
            self.zombies[address] = self.nodes[address]
        self.incarnations[address] += 1
        self.disks[address] = Disk()
        self.protected.discard(address)
        journal = Journal(node.promote(), node.number)
        self._bring(address, journal)
        self.perform(address, journal.save())
        if self.invariants:
            self.invariants.check(address, None)
