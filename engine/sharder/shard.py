"""A shard: owns some pieces of the parameters and their optimizer state, and updates them once a clock.

    collecting --every microbatch is in, send Reduced--> reduced --Apply: update, commit, send Applied--> collecting

A shard sums the gradients it is pushed by the tree over microbatch index, never by arrival (optim.Accumulator). It
does not update when its own sum is ready but when the coordinator says that every shard's is: then either all shards
go to the next version or none does, whoever fails in between; and the coordinator knows the norm of the whole
gradient by then, which clipping needs.

The state machine is pure: step(event) -> actions, with no thread, clock, socket or random source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.backend import Array, Backend
from engine.optim.accumulator import Accumulated, Accumulator
from engine.optim.clip import sums_of_squares
from engine.sharder.events import COORDINATOR, Send, Timeout, worker_address
from engine.sharder.messages import Applied, Apply, Identity, Parameters, ProtocolError, Pull, Push, Pushed, Reduced
from engine.sharder.partition import Partition
from engine.sharder.versions import Versions

Hyper = Callable[[int, str], Mapping[str, Any]]
"""hyper(step, parameter name): what the update rule is given besides its defaults. step counts from 1."""


@dataclass
class Memory:
    """What outlives a run of the protocol: parameters, optimizer state (in place), and how many clocks made them."""

    versions: Versions
    slots: dict[str, tuple[Array, ...]]  # by name: one Array a piece
    version: int
    torn: bool = False  # an update began and did not end


class Window:
    """Which sequence numbers of one incarnation have been seen: all below `floor`, and those in `above`."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.floor = 0
        self.above: set[int] = set()

    def first_time(self, sequence: int) -> bool:
        """Record a sequence number; False if it was there already."""
        if sequence < self.floor or sequence in self.above:
            return False
        self.above.add(sequence)
        while self.floor in self.above:
            self.above.remove(self.floor)
            self.floor += 1
        return True


class Shard:
    """Shard `number` of `partition`. `rule` updates; `microbatches` are due each clock; `clip`: squares are wanted."""

    def __init__(self, number: int, partition: Partition, memory: Memory, rule: Any, hyper: Hyper, k: Backend,
                 microbatches: int, clip: bool):
        self.number, self.pieces, self.memory = number, partition.pieces[number], memory
        self.rule, self.hyper, self.k = rule, hyper, k
        self.microbatches, self.clip = microbatches, clip
        self.windows: dict[int, Window] = {}
        self.waiting: dict[int, Pull] = {}  # by worker: pulls of a version that is yet to come
        self._collect()

    @property
    def version(self) -> int:
        return self.memory.version

    def _collect(self) -> None:
        self.accumulator = Accumulator(self.microbatches, self.k)
        self.mean: Accumulated | None = None
        self.reduced: Reduced | None = None

    def step(self, event: Any) -> list[Send]:
        """React to a Push, Pull, Apply or Timeout."""
        if isinstance(event, Push):
            return self._push(event)
        if isinstance(event, Pull):
            return self._pull(event)
        if isinstance(event, Apply):
            return self._apply(event)
        if isinstance(event, Timeout):
            return [Send(COORDINATOR, self.reduced)] if self.reduced else []
        raise ProtocolError(f"shard {self.number}: got {event!r}, which is not for a shard")

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────

    def _alive(self, worker: int, epoch: int) -> bool:
        """Whether these are words of the worker's newest incarnation known here."""
        window = self.windows.get(worker)
        if window is None or epoch > window.epoch:
            self.windows[worker] = Window(epoch)
            return True
        return epoch == window.epoch

    def _pull(self, pull: Pull) -> list[Send]:
        if not self._alive(pull.worker, pull.epoch):
            return []
        if pull.version > self.version:
            self.waiting[pull.worker] = pull
            return []
        return [self._parameters(pull)]

    def _parameters(self, pull: Pull) -> Send:
        return Send(worker_address(pull.worker),
                    Parameters(pull.worker, pull.epoch, self.number, self.memory.versions.current))

    def _push(self, push: Push) -> list[Send]:
        identity = push.identity
        if not self._alive(identity.worker, identity.epoch):
            return []
        if push.clock > self.version:
            raise ProtocolError(f"shard {self.number}: got a push for clock {push.clock} at clock {self.version}")
        if self.windows[identity.worker].first_time(identity.sequence) and self._wanted(push):
            self.accumulator.add(push.microbatch, push.gradients, push.loss, push.tokens)
        return [_acknowledge(identity, self.number), *self._reduce()]

    def _wanted(self, push: Push) -> bool:
        """Not if the clock is over, or if a dead incarnation of some worker delivered this microbatch already:
        a microbatch's gradients are a function of the clock and its index, so both have the same bits."""
        return push.clock == self.version and push.microbatch not in self.accumulator

    # ── the update ──────────────────────────────────────────────────────────────────────────────────

    def _reduce(self) -> list[Send]:
        if self.reduced or not self.accumulator.complete:
            return []
        self.mean = self.accumulator.mean()
        squares = [sums_of_squares(self.k, g).data for g in self.mean.gradients] if self.clip else []
        self.reduced = Reduced(self.number, self.version, self.mean.loss, self.mean.tokens,
                               np.concatenate(squares) if squares else np.empty(0))
        return [Send(COORDINATOR, self.reduced)]

    def _apply(self, apply: Apply) -> list[Send]:
        if apply.clock == self.version:
            if self.mean is None:
                raise ProtocolError(f"shard {self.number}: told to apply clock {apply.clock} before all of it is here")
            self.memory.torn = True
            self._update(self.mean.gradients, apply.scale)
            self.memory.version, self.memory.torn = self.version + 1, False
            self._collect()
        elif apply.clock > self.version:
            raise ProtocolError(f"shard {self.number}: got {apply!r} at clock {self.version}")
        ready = [self.waiting.pop(w) for w in sorted(self.waiting) if self.waiting[w].version <= self.version]
        return [Send(COORDINATOR, Applied(self.number, apply.clock)), *map(self._parameters, ready)]

    def _update(self, gradients: tuple[Array, ...], scale: float) -> None:
        """new parameters, new state = rule(parameters, state, scale · gradient), parameters into the next version."""
        old, new, k = self.memory.versions.current, self.memory.versions.reserve(), self.k
        for i, (piece, gradient) in enumerate(zip(self.pieces, gradients, strict=True)):
            if scale != 1.0:
                gradient = k.map("multiply", gradient, k.constant(scale, gradient.dtype))
            state = {slot: of_pieces[i] for slot, of_pieces in self.memory.slots.items()}
            self.rule.apply(k, new.piece(piece), state, old.piece(piece), state, gradient, self.version + 1,
                            **self.hyper(self.version + 1, piece.parameter.name))
        self.memory.versions.commit()


def _acknowledge(identity: Identity, shard: int) -> Send:
    return Send(worker_address(identity.worker), Pushed(identity, shard))
