"""A shard: owns some pieces of the parameters and their optimizer state, and updates them once a clock.

    gathering --every microbatch is in, send Reduced--> reduced --Apply: update, commit, send Applied--> (next clock)

A shard sums the gradients it is pushed by the tree over microbatch index, never by arrival (optim.Accumulator). It
does not update when its own sum is ready but when the coordinator says that every shard's is: then either all shards
go to the next version or none does, whoever fails in between; and the coordinator knows the norm of the whole
gradient by then, which clipping needs. In SSP several clocks gather at a time and are applied in their order. In ASP a
push is an update of its own as soon as it arrives, and Apply only closes the clock's account.

A shard that has lost its memory, or is new, is blank: it takes no part until it is told which term to Restore. One
that has been removed remembers the term, so that it can tell those who have not heard.

The state machine is pure: step(event) -> actions, with no thread, clock, socket, file or random source.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from math import inf
from sys import float_info
from typing import Any, ClassVar

import numpy as np

from engine.optim.accumulator import Accumulated, Accumulator
from engine.optim.clip import sums_of_squares
from engine.sharder.events import COORDINATOR, Load, Loaded, Save, Send, Stored, Timeout, worker_address
from engine.sharder.memory import Gathering, Memory, Snapshot, Window, decoded, dense, place
from engine.sharder.messages import (
    Applied,
    Apply,
    Blank,
    Choose,
    Held,
    Moved,
    Parameters,
    ProtocolError,
    Pull,
    Push,
    Pushed,
    Reduced,
    Restore,
    Restored,
    Saved,
    Term,
)
from engine.sharder.partition import Piece
from engine.sharder.setup import Setup
from engine.sharder.versions import Versions


class Shard:
    """Shard `number`; blank without a term and its memory. `incarnation` counts how often it lost its memory."""

    RECORDED = (Push, Choose, Apply, Restore, Loaded)  # what changes the state, unless it is a repetition
    HANDLERS: ClassVar[dict[type, str]] = {
        Push: "_push", Pull: "_pull", Choose: "_choose", Apply: "_apply", Timeout: "_remind",
        Restore: "_restore", Loaded: "_loaded", Stored: "_stored"}

    def __init__(self, number: int, setup: Setup, term: Term | None = None, memory: Memory | None = None,
                 incarnation: int = 0):
        self.number, self.setup, self.incarnation = number, setup, incarnation
        self.k, self.asynchronous = setup.k, setup.consistency.asynchronous
        self.loading: Term | None = None  # what storage was asked for
        self.repeated = False  # whether the last event was known already, and changed nothing
        self.stored = -1  # the version of the newest snapshot on record
        self.term: Term | None = None
        self.pieces: tuple[Piece, ...] = ()
        self.active = False  # whether it has memory, and a part in its term
        if term is not None and memory is not None:
            self._enter(term, memory)

    def _enter(self, term: Term, memory: Memory) -> None:
        self.term, self.memory, self.clock = term, memory, term.start
        self.pieces = self.setup.partition(term.shards).pieces[self.number]
        self.windows: dict[int, Window] = {}  # by worker
        self.gatherings: dict[int, Gathering] = {}  # by clock
        self.active = True

    def step(self, event: Any) -> list[Any]:
        """React to a message, a Timeout, or an answer of the storage."""
        handler = self.HANDLERS.get(type(event))
        if handler is None:
            raise ProtocolError(f"shard {self.number}: got {event!r}, which is not for a shard")
        self.repeated = False
        if not self.active and isinstance(event, (Choose, Apply, Stored)):
            return self._repeated()
        return getattr(self, handler)(event)

    def _repeated(self, *answers: Any) -> list[Any]:
        self.repeated = True
        return list(answers)

    def _tell(self, message: Any) -> Send:
        return Send(COORDINATOR, message)

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────

    def _other_term(self, worker: int, epoch: int, term: int) -> list[Send] | None:
        """The answer to words of another term, or of a dead incarnation; None: they are of now."""
        if self.term is not None and term < self.term.number:
            return [Send(worker_address(worker), Moved(worker, epoch, self.term))]
        if not self.active or term > self._term() or not self._alive(worker, epoch):
            return []
        return None

    def _alive(self, worker: int, epoch: int) -> bool:
        """Whether these are words of the worker's newest incarnation known here."""
        window = self.windows.get(worker)
        if window is None or epoch > window.epoch:
            self.windows[worker] = Window(epoch)
            return True
        return epoch == window.epoch

    def _pull(self, pull: Pull) -> list[Send]:
        answer = self._other_term(pull.worker, pull.epoch, pull.term)
        if answer is not None:
            return answer
        if pull.version > self.memory.version:
            return []  # yet to come: it will be asked for again
        values = self.memory.versions.current if self.asynchronous else self.memory.versions.at(pull.version)
        return [Send(worker_address(pull.worker),
                     Parameters(pull.worker, pull.epoch, self.number, pull.term, pull.version, values))]

    def _push(self, push: Push) -> list[Any]:
        worker, epoch, sequence = push.identity.worker, push.identity.epoch, push.identity.sequence
        if self.active and push.term == self._term():
            push = self._read(push)
        answer = self._other_term(worker, epoch, push.term)
        if answer is not None:
            return self._repeated(*answer)
        acknowledgement = Send(worker_address(worker), Pushed(push.identity, self.number))
        if push.clock < self.clock or not self.windows[worker].first_time(sequence):
            return self._repeated(acknowledgement)
        return [acknowledgement, *self._take(push)]

    def _read(self, push: Push) -> Push:
        """The push with dense gradients. Raises ProtocolError, before anything has changed, for one that no correct
        worker sends: kernels believe the lengths of arrays, and who has the secret may still be wrong."""
        who, clock, at = push.identity, push.clock, self.clock
        first, last = clock - self.setup.consistency.staleness, min(clock, self.memory.version)
        if self.asynchronous:
            first, last = 0, self.memory.version
        elif clock in self.gatherings and (version := self.gatherings[clock].version) is not None:
            first = last = version  # all its gradients are computed on one
        for name, value, least, most in (
                ("worker", who.worker, 0, inf), ("epoch", who.epoch, 0, inf), ("sequence", who.sequence, 0, inf),
                ("clock", clock, 0, inf if self.asynchronous else at + self.setup.consistency.staleness),
                ("version", push.version, first, last), ("microbatch", push.microbatch, 0, self.setup.microbatches - 1),
                ("tokens", push.tokens, 0, float_info.max)):
            if not least <= value <= most:
                raise ProtocolError(f"shard {self.number}: got {push!r} at clock {at}: its {name} is {value}, expected "
                                    f"{least} to {most}")
        try:
            return replace(push, gradients=decoded(push, self.pieces, self.setup))
        except ValueError as error:
            raise ProtocolError(f"shard {self.number}: got {push!r}: {error}") from None

    def _gathering(self, clock: int) -> Gathering:
        if clock not in self.gatherings:
            self.gatherings[clock] = Gathering(self.setup, self.pieces)
        return self.gatherings[clock]

    def _take(self, push: Push) -> list[Send]:
        """Make a push count."""
        gathering = self._gathering(push.clock)
        if self.asynchronous:
            if gathering.add(replace(push, gradients=())):
                alone = Accumulator(1, self.k)
                alone.add(0, dense(push), push.loss, push.tokens)
                self._update(alone.total(), 1.0, self.memory.version - push.version)
        elif gathering.add(push):
            gathering.version = push.version
        return self._report(push.clock)

    # ── the clock ───────────────────────────────────────────────────────────────────────────────────

    def _report(self, clock: int) -> list[Send]:
        """Tell the coordinator when there is enough to choose from, and when the sum is made."""
        gathering, term = self.gatherings[clock], self._term()
        if gathering.chosen is None and len(gathering.held) >= gathering.needed:
            return [self._tell(Held(self.number, term, clock, tuple(sorted(gathering.held))))]
        if not gathering.complete or gathering.reduced:
            return []
        total = gathering.sum.total()
        squares = [] if not self.setup.clips else [
            sums_of_squares(self.k, g, total.tokens).data for g in total.gradients]
        gathering.reduced = Reduced(self.number, term, clock, total.loss, total.tokens,
                                    np.concatenate(squares) if squares else np.empty(0))
        return [self._tell(gathering.reduced)]

    def _term(self) -> int:
        assert self.term is not None
        return self.term.number

    def _choose(self, choose: Choose) -> list[Send]:
        if choose.term != self._term() or choose.clock < self.clock:
            return self._repeated()
        gathering = self._gathering(choose.clock)
        if gathering.chosen is None:
            gathering.choose(choose.microbatches)
            return self._report(choose.clock)
        return self._repeated(*([self._tell(gathering.reduced)] if gathering.reduced else []))

    def _apply(self, apply: Apply) -> list[Any]:
        if apply.term != self._term():
            return self._repeated()
        self.repeated = apply.clock < self.clock
        if apply.clock == self.clock:
            gathering = self.gatherings.get(apply.clock)
            if gathering is None or gathering.reduced is None:
                raise ProtocolError(f"shard {self.number}: told to apply clock {apply.clock} before all of it is here")
            if not self.asynchronous:
                late = self.clock - (gathering.version if gathering.version is not None else self.clock)
                self._update(gathering.sum.total(), apply.scale, late)
            del self.gatherings[self.clock]
            self.clock += 1
        elif apply.clock > self.clock:
            raise ProtocolError(f"shard {self.number}: got {apply!r} at clock {self.clock}")
        actions: list[Any] = [self._tell(Applied(self.number, apply.term, apply.clock))]
        if apply.save and self.clock == apply.clock + 1:
            actions.append(Save(self.snapshot()) if self.stored < self.clock else self._saved())
        return actions

    def _update(self, total: Accumulated, scale: float, staleness: int) -> None:
        """new parameters, new state = rule(parameters, state, Σ gradients / divisor · scale); parameters into the next
        version."""
        memory, k, step = self.memory, self.k, self.memory.version + 1
        divisor = self.setup.divisor(total.tokens)
        updates = [self.setup.update_at(step, piece.parameter.name, staleness) for piece in self.pieces]
        memory.torn = True
        old, new = memory.versions.current, memory.versions.reserve()
        for i, (piece, gradient) in enumerate(zip(self.pieces, total.gradients, strict=True)):
            state = {slot: of_pieces[i] for slot, of_pieces in memory.slots.items()}
            updates[i](k, new.piece(piece), state, old.piece(piece), state, gradient, step, divisor, scale)
        memory.versions.commit()
        memory.version, memory.torn = step, False

    def _remind(self, _: Timeout) -> list[Any]:
        """Ask again for whatever is unanswered."""
        again: list[Any] = [Load(self.loading)] if self.loading else []
        if self.term is None:
            return [*again, self._tell(Blank(self.number, self.incarnation))]
        if not self.active:
            return again
        for clock, gathering in sorted(self.gatherings.items()):
            again += [self._tell(gathering.reduced)] if gathering.reduced else self._report(clock)
        return again

    # ── snapshots and terms ─────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> Snapshot:
        """All it remembers; with this, and what it is told from here on, another can stand in for it."""
        if self.term is None or not self.active:
            return Snapshot(self.term, self.incarnation)
        slots = {slot: tuple(self.k.map("copy", array) for array in arrays)
                 for slot, arrays in self.memory.slots.items()}
        return Snapshot(self.term, self.incarnation, True, self.clock, self.memory.version,
                        self.memory.versions.kept(), slots,
                        {worker: copy(window) for worker, window in self.windows.items()},
                        {clock: copy(gathering) for clock, gathering in self.gatherings.items()})

    def resume(self, snapshot: Snapshot) -> None:
        """Be as the shard was that gave this snapshot."""
        self.term, self.incarnation, self.active, self.loading = snapshot.term, snapshot.incarnation, False, None
        if snapshot.term is None or not snapshot.active:
            return
        versions = self._versions(snapshot.term, snapshot.version)
        versions.reset(snapshot.kept)
        slots = {slot: tuple(self.k.map("copy", array) for array in arrays) for slot, arrays in snapshot.slots.items()}
        self._enter(snapshot.term, Memory(versions, slots, snapshot.version))
        self.clock, self.stored = snapshot.clock, snapshot.clock
        self.windows = {worker: copy(window) for worker, window in snapshot.windows.items()}
        self.gatherings = {clock: copy(gathering) for clock, gathering in snapshot.gatherings.items()}

    def _versions(self, term: Term, number: int) -> Versions:
        size = self.setup.partition(term.shards).sizes[self.number]
        return Versions(self.k, size, self.setup.dtype, number, older=self.setup.consistency.staleness)

    def _stored(self, stored: Stored) -> list[Send]:
        if stored.term != self._term():
            return []
        self.stored = max(self.stored, stored.version)
        return [self._saved()]

    def _saved(self) -> Send:
        return self._tell(Saved(self.number, self._term(), self.stored))

    def _restore(self, restore: Restore) -> list[Any]:
        newest = self.loading or self.term
        if newest is None or restore.term.number > newest.number:
            if self.number >= restore.term.shards:
                self.term, self.loading, self.active = restore.term, None, False  # it has been removed
                return []
            self.loading = restore.term
            return [Load(restore.term)]
        known = restore.term == self.term and self.active
        return self._repeated(*([self._tell(Restored(self.number, restore.term.number))] if known else []))

    def _loaded(self, loaded: Loaded) -> list[Any]:
        term = loaded.term
        if term != self.loading:
            return self._repeated()
        pieces = self.setup.partition(term.shards).pieces[self.number]
        versions = self._versions(term, self.setup.updates(term.start))
        self._enter(term, place(self.k, self.setup.rule, pieces, versions, loaded.checkpoint))
        self.loading, self.stored = None, -1
        return [Save(self.snapshot()), self._tell(Restored(self.number, term.number))]
