"""One simulated run: its machines, the events to come, and what happens at each.

Events wait in a queue by virtual time; to_the_end() takes them one by one, gives each to its machine, and carries out
what that wants: messages go through the weather, records and snapshots to disks. Machines that die come back with what
their durability left them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from engine.sharder.drivers.disk import Archive, Disk
from engine.sharder.drivers.faults import Faults, Return, Weather
from engine.sharder.drivers.history import History
from engine.sharder.drivers.invariants import Invariants, Violated
from engine.sharder.drivers.plain import Gradient
from engine.sharder.drivers.program import Program
from engine.sharder.events import (
    COORDINATOR,
    RUN,
    Address,
    Append,
    ClockRequested,
    Committed,
    Finish,
    Load,
    Loaded,
    Proceed,
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
from engine.sharder.messages import Gone, Message, ProtocolError, Restore
from engine.sharder.shard import Shard
from engine.sharder.worker import Worker

if TYPE_CHECKING:
    from engine.sharder.drivers.simulator import Simulation


@dataclass(frozen=True)
class Kept:
    """To a machine: its snapshot has come to the disk."""

    save: Save


class Run:
    """The machines of one run, and what is to happen to them.

    nodes: address -> what reacts there; a dead machine has none. Inside a Journal is the machine itself (machine()).
    """

    def __init__(self, cluster: Simulation, gradient: Gradient, clocks: int, seed: int, weather: Weather,
                 faults: Iterable[tuple[int, str]], stride: int):
        self.cluster, self.gradient, self.weather, self.stride = cluster, gradient, weather, stride
        self.random = Random(seed)
        self.faults = Faults(self, dict(faults))
        self.history = History(cluster.setup)
        self.events: list[tuple[float, int, Address, int, Any]] = []  # (time, order, to, incarnation, event)
        self.scheduled = 0
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
            self.bring_worker(worker)
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
        shard = Shard(number, self.cluster.setup)
        if number < self.origin.shards:
            replay(shard, [Restore(self.origin), Loaded(self.origin, self.archive.whole)])
        return shard

    def bring_worker(self, worker: Worker) -> None:
        address = worker_address(worker.number)
        self.incarnations[address] = worker.epoch
        self.programs[worker.number] = Program(self, worker)
        self._bring(address, worker)
        self.schedule(0, address, ClockRequested(), worker.epoch)

    def _return(self, address: Address) -> None:
        """A dead machine comes back, with what it has on record."""
        kind, number = address
        if kind == "worker":
            return self.bring_worker(self.cluster.make_worker(number, self.incarnations[address]))
        if kind == "shard" and self.cluster.durability == "snapshot":
            blank = Shard(number, self.cluster.setup, incarnation=self.incarnations[address])
            return self._bring(address, blank)
        if isinstance(self.nodes.get(backup_address(number)), Backup) and kind == "shard":
            return self.promote(address)
        disk = self.disk(address)
        if kind == "coordinator":
            machine: Any = self.cluster.make_coordinator(self.last)
            self.coordinator = machine
        else:
            machine = self._newborn(number)
            if disk.snapshot:
                machine.resume(disk.snapshot.snapshot)
        replay(machine, [record.record for record in disk.records])
        return self._bring(address, Journal(machine, disk.number))

    def promote(self, address: Address) -> None:
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
        self.schedule_at(self.history.time + delay, to, event, incarnation)

    def schedule_at(self, time: float, to: Address, event: Any, incarnation: int = -1) -> None:
        self.scheduled += 1
        heapq.heappush(self.events, (time, self.scheduled, to, incarnation, event))

    def send(self, source: Address, send: Send) -> None:
        """Put a message on its way, through weather that may lose or repeat it."""
        weather, random, copies = self.weather, self.random, 1
        until, half = self.cut
        if (weather.loss and random.random() < weather.loss) or (
                until > self.history.time and (source in half) != (send.to in half)):
            self.history.faults["lose"] += 1
            self.history.carried.append((self.history.time, None, source, send.to, send.message))
            return
        if weather.duplication and random.random() < weather.duplication:
            self.history.faults["repeat"] += 1
            copies = 2
        for _ in range(copies):
            shortest, longest = weather.latency
            way = shortest + int(random.random() * (longest - shortest + 1))
            self.history.carried.append((self.history.time, self.history.time + way, source, send.to, send.message))
            self.schedule(way, send.to, send.message)

    def work(self, worker: int, clock: int, microbatch: int) -> float:
        """How long a worker takes to compute a microbatch, which it begins now."""
        weather = self.weather
        slow = weather.stalling and self.random.random() < weather.stalling
        return weather.work * (weather.stall if slow else 1) * weather.slow.get(worker, 1)

    # ── the present ─────────────────────────────────────────────────────────────────────────────────

    def to_the_end(self, limit: float) -> History:
        history, number = self.history, 0
        while not (self.coordinator.finished and self._over()):
            time, _, to, incarnation, event = heapq.heappop(self.events)
            if incarnation != -1 and incarnation != self.incarnations[to]:
                continue
            history.time = time
            if time > limit:
                raise Violated(f"training has not ended by virtual time {limit}", history)
            number += 1
            history.record(to, event)
            if not self.faults.strike(number, to, event):
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
        if isinstance(event, Return):
            return self._return(to) if self.nodes.get(to) is None else None  # or just promoted
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
        elif isinstance(event, Kept):
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
                self.disk(source).pending.append(action)
                self._write(source)
            elif isinstance(action, Save):
                self._to_disk(source, Kept(action))
            elif isinstance(action, Load):
                loaded = Loaded(action.term, self.archive.checkpoint(action.term.start))
                self._to_disk(source, loaded)
            elif isinstance(action, Committed):
                self._committed(action)

    def disk(self, address: Address) -> Disk:
        return self.disks.setdefault(address, Disk())

    def _to_disk(self, address: Address, answer: Any) -> None:
        self.schedule(1 + int(self.random.random() * self.weather.disk), address, answer, self.incarnations[address])

    def _write(self, address: Address) -> None:
        """Bring what is pending to the disk, if it is not busy; never before the snapshot that the log begins with."""
        disk, begins = self.disk(address), self.cluster.durability == "backup" and address[0] == "shard"
        if disk.pending and not disk.writing and not (begins and address not in self.protected):
            disk.writing = True
            self._to_disk(address, Written(disk.pending[-1].number))

    def _kept(self, address: Address, save: Save) -> None:
        self.disk(address).keep(save)
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
            self.history.committed_at.append(self.history.time)
            if self.done >= self.granted:
                self._grant()

    def _watch(self) -> None:
        """Ask again, and repeat who is gone."""
        self.schedule(self.weather.timeout, RUN, Timeout())
        self._grant()
        for worker, epoch in self.absent.items():
            self.schedule(0, COORDINATOR, Gone(worker, epoch))
