"""What goes wrong in a simulated run: the weather by chance, and faults, each at the event that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.sharder.events import COORDINATOR, Address, Reshard, shard_address, worker_address
from engine.sharder.journal import Backup
from engine.sharder.messages import Gone, Message

if TYPE_CHECKING:
    from engine.sharder.drivers.run import Run

MESSAGE_FAULTS = ("lose", "repeat", "delay")
CRASHES = ("worker", "shard", "coordinator")
FAULTS = (*MESSAGE_FAULTS, *CRASHES, "leave", "join", "cut", "suspect")


@dataclass(frozen=True)
class Weather:
    """What the network and the machines are like. Times are in units of virtual time.

    latency:   shortest and longest way of a message; a spread reorders
    loss, duplication: the probability that a message gets lost, and that it arrives twice
    work:      a microbatch takes this long, and `stall` times as long with probability `stalling`
    slow:      by worker: the factor by which it is slower than the others
    giving_up: the probability that a program gives up a microbatch after it has sent some shard its part of it
    crashing:  the probability, at each event, that the machine it is for dies; it comes back after `absence`
    disk:      the longest time until a record or snapshot is on disk
    timeout:   who waits asks again this often
    """

    latency: tuple[int, int] = (1, 10)
    loss: float = 0.0
    duplication: float = 0.0
    work: int = 5
    stalling: float = 0.0
    stall: int = 20
    slow: Mapping[int, float] = field(default_factory=dict)
    giving_up: float = 0.0
    crashing: float = 0.0
    absence: float = 40
    disk: int = 3
    timeout: float = 60

    def __post_init__(self) -> None:
        for name in ("loss", "duplication", "stalling", "giving_up", "crashing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Weather: {name} is {getattr(self, name)!r}, expected a probability in [0, 1]")


FAIR = Weather()  # messages overtake each other, and nothing else


@dataclass(frozen=True)
class Return:
    """To a dead machine: it comes back."""


class Faults:
    """Strikes a run. plan: event number -> fault; Simulation.run says which there are."""

    def __init__(self, run: Run, plan: Mapping[int, str]):
        self.run, self.plan = run, plan

    def strike(self, number: int, to: Address, event: Any) -> bool:
        """Whether a fault keeps this event from happening (now)."""
        run, fault = self.run, self.plan.get(number, "")
        if not fault:
            crashing = run.weather.crashing if to[0] in CRASHES else 0
            if crashing and run.random.random() < crashing:
                self.crash(to)
            return False
        if fault not in MESSAGE_FAULTS:
            self._befall(fault, number, to)
            return False
        if not isinstance(event, Message):
            return False
        self._note(fault)
        if fault != "lose":
            run.schedule(2 * run.weather.timeout, to, event)
        return fault != "repeat"

    def _note(self, fault: str, what: str = "") -> None:
        self.run.history.faults[fault] += 1
        self.run.history.note(what or fault)

    def _befall(self, fault: str, number: int, to: Address) -> None:
        run = self.run
        kind, _, argument = fault.partition(":")
        if kind in CRASHES:
            of_kind = [address for address, node in run.nodes.items() if address[0] == kind and node is not None]
            if of_kind:
                self.crash(to if to in of_kind else of_kind[number % len(of_kind)])
        elif kind == "leave":
            self._leave(number)
        elif kind == "join":
            self._note("join")
            run.bring_worker(run.cluster.make_worker(len(run.programs), 0))
        elif kind == "reshard":
            self._note("reshard", fault)
            run.schedule(0, COORDINATOR, Reshard(int(argument)))
        elif kind == "cut":
            self._note("cut")
            half = frozenset(address for address in run.nodes if run.random.random() < 0.5)
            run.cut = (run.history.time + 2 * run.weather.timeout, half)
        elif kind == "suspect":
            of_kind = [a for a, node in run.nodes.items() if isinstance(node, Backup)]
            if of_kind:
                self._note("suspect")
                run.promote(shard_address(of_kind[number % len(of_kind)][1]))
        else:
            raise ValueError(f"Simulation: the fault {fault!r} is unknown")

    def _leave(self, number: int) -> None:
        """A worker goes for good, unless it is the last."""
        run = self.run
        present = [w for w in run.programs if w not in run.absent]
        if len(present) > 1:
            worker = present[number % len(present)]
            self._note("leave", f"worker {worker} leaves")
            address = worker_address(worker)
            run.absent[worker] = run.programs[worker].worker.epoch
            run.nodes[address] = None
            run.incarnations[address] += 1
            run.schedule(run.weather.timeout, COORDINATOR, Gone(worker, run.absent[worker]))

    def crash(self, address: Address) -> None:
        """A machine dies: its memory is gone, what it sent is on its way. It comes back."""
        run, (kind, number) = self.run, address
        if run.nodes.get(address) is None or (kind == "worker" and run.programs[number].worker.ended):
            return
        if kind == "shard" and run.cluster.durability == "backup" and address not in run.protected:
            return  # its backup has just stood in for it: one backup is good for one loss
        self._note(kind, f"{kind} {number} dies")
        run.nodes[address] = None
        run.incarnations[address] += 1
        if kind != "worker":
            run.disk(address).crash(run.random)
        run.schedule(run.weather.absence, address, Return(), run.incarnations[address])
