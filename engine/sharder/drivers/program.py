"""What the program of a simulated worker would do: clock, pull, compute and push each microbatch, clock ...

From zero=2 on, gradients leave shard by shard, the last shard's first; and in some weather a program gives up a
microbatch when some of them have left, and computes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.sharder.binding import flat_gradients
from engine.sharder.events import Began, ClockRequested, Pulled, PullRequested, PushRequested, Send, worker_address
from engine.sharder.versions import assemble
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
        self.parameters: Mapping[str, np.ndarray] = {}
        self.queue: list[int] = []
        self.ahead: list[int] = []  # shards that are sent their part of this microbatch before it is done

    def react(self, event: Any) -> None:
        if not isinstance(event, Computed):
            return self._perform(self.worker.step(event))
        cluster, worker, weather = self.run.cluster, self.worker, self.run.weather
        index, shard = self.queue[0], self.ahead.pop() if self.ahead else None
        gradients, loss, tokens = self.run.gradient(self.parameters, worker.clock, index)
        flat = flat_gradients(worker.partition, cluster.dtype, gradients, cluster.copied)
        if shard is None:
            self.queue.pop(0)
        elif shard >= worker.term.shards:
            return self._compute()
        self._perform(worker.step(PushRequested(index, flat, loss, tokens, shard)))
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
                self._perform(self.worker.step(PullRequested()))
            elif isinstance(action, Pulled):
                if self.run.invariants:
                    self.run.invariants.pulled(self.worker, action)
                cluster = self.run.cluster
                self.parameters = assemble(self.worker.partition, action.values, cluster.k, cluster.copied)
                self._compute_or_go_on()

    def _compute_or_go_on(self) -> None:
        if not self.queue:
            return self._perform(self.worker.step(ClockRequested()))
        self.ahead = list(range(self.worker.term.shards)) if self.run.cluster.setup.zero > 1 else []
        return self._compute()

    def _compute(self) -> None:
        delay = self.run.work(self.worker.number, self.worker.clock, self.queue[0])
        self.run.schedule(delay, self.address, Computed(), self.worker.epoch)
