"""What the program of a simulated worker would do: clock, pull, compute and push each microbatch, clock ..."""

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
    """To a worker's program: it has had the time to compute its next microbatch."""


class Program:
    def __init__(self, run: Run, worker: Worker):
        self.run, self.worker = run, worker
        self.address = worker_address(worker.number)
        self.parameters: Mapping[str, np.ndarray] = {}
        self.queue: list[int] = []

    def react(self, event: Any) -> None:
        if not isinstance(event, Computed):
            return self._perform(self.worker.step(event))
        cluster, worker = self.run.cluster, self.worker
        index = self.queue.pop(0)
        gradients, loss, tokens = self.run.gradient(self.parameters, worker.clock, index)
        flat = flat_gradients(worker.partition, cluster.dtype, gradients, cluster.copied)
        self._perform(worker.step(PushRequested(index, flat, loss, tokens)))
        return self._compute_or_go_on()

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
        delay = self.run.work(self.worker.number, self.worker.clock, self.queue[0])
        return self.run.schedule(delay, self.address, Computed(), self.worker.epoch)
