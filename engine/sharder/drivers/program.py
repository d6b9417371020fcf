"""What the program of a simulated worker would do: clock, pull, compute and push each microbatch, clock ...

From zero=2 on, gradients leave shard by shard, the last shard's first; and in some weather a program gives up a
microbatch when some of them have left, and computes it again. With zero=3 it pulls parameter by parameter, for each
microbatch anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.sharder.binding import flat_gradients
from engine.sharder.events import (
    Began,
    ClockRequested,
    Pulled,
    PullRequested,
    PushRequested,
    Received,
    Send,
    worker_address,
)
from engine.sharder.versions import Version, assemble, assemble_one
from engine.sharder.worker import Worker

if TYPE_CHECKING:
    from engine.sharder.drivers.run import Run


@dataclass(frozen=True)
class Computed:
    """To a worker's program: it has had the time to compute its next microbatch, or the gradients of one more shard."""


class Program:
    def __init__(self, run: Run, worker: Worker):
        self.run, self.worker = run, worker
        self.address = worker_address(worker.number)
        self.parameters: dict[str, np.ndarray] = {}
        self.term, self.received = worker.term, dict[int, Version]()  # shards of the parameter that is being pulled
        self.queue: list[int] = []
        self.ahead: list[int] = []  # shards that are sent their part of this microbatch before it is done

    def react(self, event: Any) -> None:
        if not isinstance(event, Computed):
            return self._perform(self.worker.step(event))
        cluster, worker, weather = self.run.cluster, self.worker, self.run.weather
        index, shard = self.queue[0], self.ahead.pop() if self.ahead else None
        place = self.parameters if worker.local is None else worker.local.place(worker.clock, index, self.parameters)
        gradients, loss, tokens = self.run.gradient(place, worker.clock, index)
        flat = flat_gradients(worker.partition, cluster.dtype, gradients, cluster.copied)
        if shard is None:
            self.queue.pop(0)
        elif shard >= worker.term.shards:
            return self._compute()
        self._perform(worker.step(PushRequested(index, flat, loss, tokens, shard, place)))
        if shard is None:
            return self._compute_or_go_on()
        if weather.giving_up and self.run.random.random() < weather.giving_up:
            return self._compute_or_go_on()
        return self._compute()

    def _perform(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.run.send(self.address, action)
            elif isinstance(action, Began):
                self.queue = list(action.microbatches)
                self._pull_or_compute(True)
            elif isinstance(action, Received):
                self._receive(action)
            elif isinstance(action, Pulled):
                if self.run.invariants:
                    self.run.invariants.pulled(self.worker, action)
                cluster = self.run.cluster
                self.parameters = assemble(self.worker.partition, action.values, cluster.k, cluster.copied)
                self._compute_or_go_on()

    def _pull_or_compute(self, begins: bool = False) -> None:
        """Pull, if this is the time for it, or begin to compute a microbatch."""
        if self.run.cluster.setup.zero == 3:
            self.parameters = {}
            return self._pull_next()
        return self._perform(self.worker.step(PullRequested())) if begins else self._begin_microbatch()

    def _pull_next(self) -> None:
        """The next parameter, if there is one; else all are here."""
        missing = [name for name in self.worker.partition.parameters if name not in self.parameters]
        if not missing:
            return self._begin_microbatch()
        self.term, self.received = self.worker.term, {}
        return self._perform(self.worker.step(PullRequested((missing[0],))))

    def _receive(self, action: Received) -> None:
        worker, cluster = self.worker, self.run.cluster
        if self.run.invariants:
            self.run.invariants.received(worker, action)
        if worker.term != self.term:  # the worker has asked again, the shards of the new term
            self.term, self.received = worker.term, {}
        self.received[action.shard] = action.values
        name = next(name for name in worker.partition.parameters if name not in self.parameters)
        if self.received.keys() >= set(worker.partition.owners[name]):
            self.parameters[name] = assemble_one(worker.partition, name, self.received, cluster.dtype, cluster.k,
                                                 cluster.copied)
            self._pull_next()

    def _compute_or_go_on(self) -> None:
        if not self.queue:
            return self._perform(self.worker.step(ClockRequested()))
        return self._pull_or_compute()

    def _begin_microbatch(self) -> None:
        self.ahead = list(range(self.worker.term.shards)) if self.run.cluster.setup.zero > 1 else []
        return self._compute()

    def _compute(self) -> None:
        delay = self.run.work(self.worker.number, self.worker.clock, self.queue[0])
        self.run.schedule(delay, self.address, Computed(), self.worker.epoch)
