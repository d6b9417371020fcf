"""The coordinator: decides when a clock begins, who computes what, and when every shard may update.

    idle --Proceed: send Begin--> gathering --Reduced of every shard: send Apply--> applying
     ^ |                                                                               |
     | '--Finish: send End--> finished                                                 |
     '------------------------- Applied of every shard: Committed ---------------------'

The decision to apply a clock is taken once, for all shards, when each of them holds all of it. So there is never a
state in which some shards can update and others cannot.

The norm for clipping comes from the shards' Σg² a block, put back into the order of the blocks, so it has the same
bits for every number of shards.

The state machine is pure: step(event) -> actions, with no thread, clock, socket or random source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.sharder.events import Committed, Finish, Proceed, Send, Timeout, shard_address, worker_address
from engine.sharder.messages import PROTOCOL, Applied, Apply, Begin, End, ProtocolError, Ready, Reduced, Refused

Clip = Callable[[np.ndarray], "tuple[float, float]"]
"""clip(Σg² of every block) -> (norm of the gradient, factor that clips it)."""


class Coordinator:
    """Of `shards` shards and `workers` workers, at clock `clock`, with `microbatches` in each clock."""

    def __init__(self, shards: int, workers: int, microbatches: int, clock: int = 0, clip: Clip | None = None):
        self.shards, self.workers, self.microbatches, self.clip = shards, workers, microbatches, clip
        self.clock = clock  # as many are committed; while one is running, its number
        self.running = self.finished = False
        self.epochs: dict[int, int] = {}  # by worker: its newest incarnation
        self.waiting: dict[int, Ready] = {}  # by worker
        self._gather()

    def _gather(self) -> None:
        self.reduced: dict[int, Reduced] = {}  # by shard
        self.applied: set[int] = set()
        self.decision: Apply | None = None
        self.norm: float | None = None

    def step(self, event: Any) -> list[Any]:
        """React to Ready, Reduced, Applied, a Timeout, or the driver's Proceed and Finish."""
        if isinstance(event, Ready):
            return self._ready(event)
        if isinstance(event, Reduced):
            return self._reduced(event)
        if isinstance(event, Applied):
            return self._applied(event)
        if isinstance(event, Timeout):
            return self._apply(set(range(self.shards)) - self.applied)
        if isinstance(event, (Proceed, Finish)):
            if self.running or self.finished:
                raise ProtocolError(f"coordinator: {event!r} while clock {self.clock} is running or after the end")
            self.running, self.finished = isinstance(event, Proceed), isinstance(event, Finish)
            return self._answer()
        raise ProtocolError(f"coordinator: got {event!r}, which is not for the coordinator")

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────

    def assignment(self, worker: int) -> tuple[int, ...]:
        """The microbatches of a clock that a worker computes: every workers-th, from its own number on."""
        return tuple(range(worker, self.microbatches, self.workers))

    def _ready(self, ready: Ready) -> list[Any]:
        refusal = self._refusal(ready)
        if refusal:
            return [Send(worker_address(ready.worker), Refused(ready.worker, ready.epoch, refusal))]
        self.epochs[ready.worker] = ready.epoch
        self.waiting[ready.worker] = ready
        return self._answer()

    def _refusal(self, ready: Ready) -> str:
        if ready.protocol != PROTOCOL:
            return f"worker {ready.worker} speaks protocol {ready.protocol}, the coordinator {PROTOCOL}"
        if not 0 <= ready.worker < self.workers:
            return f"worker {ready.worker} is none of the {self.workers} workers"
        known = self.epochs.get(ready.worker, ready.epoch)
        if ready.epoch < known:
            return f"worker {ready.worker} of epoch {ready.epoch} was replaced by epoch {known}"
        return ""

    def _answer(self) -> list[Any]:
        """Begin or End for every waiting worker that can have it; the others stay waiting."""
        answers = []
        for worker, ready in sorted(self.waiting.items()):
            if self.finished:
                answers.append(Send(worker_address(worker), End(worker, ready.epoch)))
            elif self.running and ready.clock <= self.clock:
                begin = Begin(worker, ready.epoch, self.clock, self.assignment(worker))
                answers.append(Send(worker_address(worker), begin))
        for answer in answers:
            del self.waiting[answer.message.worker]
        return answers

    # ── shards ──────────────────────────────────────────────────────────────────────────────────────

    def _reduced(self, reduced: Reduced) -> list[Any]:
        if reduced.clock < self.clock or not self.running:
            return []  # repeated
        if reduced.clock > self.clock:
            raise ProtocolError(f"coordinator: got {reduced!r} at clock {self.clock}")
        if self.decision is None:
            self.reduced[reduced.shard] = reduced
            return self._decide(list(self.reduced.values())) if len(self.reduced) == self.shards else []
        return self._apply({reduced.shard} - self.applied)

    def _decide(self, reduced: Sequence[Reduced]) -> list[Any]:
        if len({(r.loss, r.tokens) for r in reduced}) != 1 and not np.isnan(reduced[0].loss):
            raise ProtocolError(f"coordinator: the shards disagree on the loss of clock {self.clock}: {reduced}")
        scale = 1.0
        if self.clip:
            in_order = sorted(reduced, key=lambda r: r.shard)
            self.norm, scale = self.clip(np.concatenate([r.squares for r in in_order]))
        self.decision = Apply(self.clock, scale)
        return self._apply(set(range(self.shards)))

    def _apply(self, shards: set[int]) -> list[Any]:
        return [Send(shard_address(s), self.decision) for s in sorted(shards)] if self.decision else []

    def _applied(self, applied: Applied) -> list[Any]:
        if applied.clock != self.clock or not self.running:
            return []  # repeated
        if self.decision is None:
            raise ProtocolError(f"coordinator: got {applied!r} before clock {self.clock} was decided")
        self.applied.add(applied.shard)
        if len(self.applied) < self.shards:
            return []
        total = self.reduced[0]
        committed = Committed(self.clock, total.loss, total.tokens, self.norm)
        self.clock, self.running = self.clock + 1, False
        self._gather()
        return [committed]
