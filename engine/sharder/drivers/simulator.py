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

from collections.abc import Iterable
from typing import Any

from engine.sharder.cluster import Cluster
from engine.sharder.drivers.faults import FAIR, Weather
from engine.sharder.drivers.history import History
from engine.sharder.drivers.invariants import Invariants
from engine.sharder.drivers.plain import Gradient, Plain
from engine.sharder.drivers.run import Run
from engine.sharder.events import shard_address
from engine.sharder.learners import Learners, expect_repeatable

DURABILITIES = ("snapshot", "log", "backup")


class Simulation(Cluster):
    """A cluster whose shards share nothing; the arguments are Cluster's, and

    zero:       as Cluster's, of the programs; they push when a microbatch is done, unless it is 2 or 3
    durability: what a shard that dies comes back with. "snapshot": nothing; all go back to their last snapshot and
                compute again what came after (BSP only); "log": its snapshot and log; "backup": another machine has
                followed it and stands in for it.
    """

    shared = False

    def __init__(self, parameters: Any, rule: Any, *, durability: str = "log", save_every: int = 2, zero: int = 1,
                 **arguments: Any):
        if durability not in DURABILITIES:
            raise ValueError(f"Simulation: durability is {durability!r}, expected one of {', '.join(DURABILITIES)}")
        super().__init__(parameters, rule, save_every=save_every, zero=zero, **arguments)
        expect_repeatable("Simulation", self.setup)
        if durability == "snapshot" and not self.setup.consistency.replays:
            raise ValueError('Simulation: durability "snapshot" is for BSP without backups, whose clocks can be '
                             "computed again; the other modes need a log or a backup")
        self.durability = durability
        self.learners = Learners(self.setup, durability == "snapshot")

    def run(self, gradient: Gradient, clocks: int, seed: int, weather: Weather = FAIR,
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
        run = self.make_run(gradient, clocks, seed, weather, faults, stride)
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

    def make_run(self, *arguments: Any) -> Run:
        return Run(self, *arguments)
