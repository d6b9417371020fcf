"""The coordinator: decides when a clock begins, who computes what, when every shard may update, and what a term is.

    a clock:  begun --Reduced of every shard: send Apply--> decided --Applied of every shard: Committed--> (next clock)
    a term:   running --Reshard sealed, or a Blank shard: send Restore--> restoring --Restored of every shard--> running

The decision to apply a clock is taken once, for all shards, when each of them has summed all of it. So there is never
a state in which some shards can update and others cannot. With backups another decision comes before it: which
microbatches, held by every shard, make up the clock.

Work is handed out when workers ask. A clock's microbatches are shared out over the workers that are present when it
begins; those of a worker that is lost go to whoever asks next. A worker's share lasts until the clock is settled, so
what it had computed and not yet delivered is computed again.

The norm for clipping comes from the shards' Σg² a block, put back into the order of the blocks, so it has the same
bits for every number of shards.

The state machine is pure: step(event) -> actions, with no thread, clock, socket, file or random source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isnan
from typing import Any, ClassVar

from engine.sharder.events import (
    Committed,
    Entered,
    Finish,
    Proceed,
    Reshard,
    Send,
    Timeout,
    shard_address,
    worker_address,
)
from engine.sharder.messages import (
    PROTOCOL,
    Applied,
    Apply,
    Begin,
    Blank,
    Choose,
    End,
    Gone,
    Held,
    ProtocolError,
    Ready,
    Reduced,
    Refused,
    Restore,
    Restored,
    Saved,
    Term,
)
from engine.sharder.setup import Setup


@dataclass
class Clock:
    """A clock that has begun and is not committed."""

    number: int
    version: int  # all its microbatches are computed on these parameters
    owners: dict[int, int | None]  # by microbatch: the worker whose share it is in; None: nobody's
    due: set[int]  # microbatches that are yet to be handed out
    held: dict[int, frozenset[int]] = field(default_factory=dict)  # by shard
    chosen: tuple[int, ...] | None = None
    reduced: dict[int, Reduced] = field(default_factory=dict)  # by shard
    decision: Apply | None = None
    norm: float | None = None
    applied: set[int] = field(default_factory=set)  # shards


class Coordinator:
    """Of `workers` workers that are there from the beginning. last: the clock before which training ends, if known."""

    RECORDED = (Ready, Gone, Proceed, Finish, Reshard, Held, Reduced, Applied, Saved, Blank, Restored)
    HANDLERS: ClassVar[dict[type, str]] = {
        Ready: "_ready", Gone: "_gone", Proceed: "_proceed", Finish: "_finish", Reshard: "_reshard",
        Held: "_held", Reduced: "_reduced", Applied: "_applied", Saved: "_saved", Blank: "_blank",
        Restored: "_restored", Timeout: "_remind"}

    def __init__(self, setup: Setup, term: Term, workers: int, last: int | None = None):
        self.setup, self.term, self.last = setup, term, last
        self.clock = self.granted = self.next = term.start  # committed; may be applied; begun: so many clocks
        self.finishing = False
        self.repeated = False  # whether the last event was known already, and changed nothing
        self.clocks: dict[int, Clock] = {}  # those that are running, in order
        self.committed: Committed | None = None  # the last one
        # workers
        self.members = set(range(workers))
        self.epochs: dict[int, int] = {}  # the newest incarnation of each worker
        self.waiting: dict[int, Ready] = {}
        self.answers: dict[int, Begin] = {}  # the newest to each worker
        # shards
        self.saved = dict.fromkeys(range(term.shards), term.start)  # the version of each one's newest snapshot
        self.restoring: set[int] = set()  # shards that are yet to enter the term
        self.incarnations: dict[int, int] = {}  # how often each lost its memory
        self.wish: int | None = None  # to go on with so many shards
        self.applied: Apply | None = None  # the last one

    def step(self, event: Any) -> list[Any]:
        """React to a message, a Timeout, or the driver's Proceed, Finish and Reshard."""
        handler = self.HANDLERS.get(type(event))
        if handler is None:
            raise ProtocolError(f"coordinator: got {event!r}, which is not for the coordinator")
        self.repeated = False
        if isinstance(event, (Held, Reduced, Applied, Saved, Restored)) and event.term != self.term.number:
            return self._repeated()
        return getattr(self, handler)(event)

    def _repeated(self, *answers: Any) -> list[Any]:
        self.repeated = True
        return list(answers)

    # ── the run ─────────────────────────────────────────────────────────────────────────────────────

    def _proceed(self, proceed: Proceed) -> list[Any]:
        if proceed.clock < self.clock:
            return self._repeated(*([self.committed] if self.committed else []))
        if proceed.clock < self.granted:
            return self._repeated()
        self.granted = max(self.granted, proceed.clock + 1)
        return self._go_on()

    def _finish(self, _: Finish) -> list[Any]:
        self.last = self.granted
        self.finishing = True
        return self._hand_out()

    @property
    def finished(self) -> bool:
        """Whether all that was granted is done, and on record if it is to be recorded at all."""
        done = self.finishing and self.clock >= self.granted and not self.restoring
        return done and (not self._sealed() or min(self.saved.values()) >= self.clock)

    def _sealed(self) -> bool:
        """Whether every shard was told to put this version on record."""
        return self.applied is not None and self.applied.save and self.applied.clock + 1 == self.clock

    def _go_on(self) -> list[Any]:
        """Whatever has become possible."""
        return [*self._decide(), *self._hand_out()]

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────

    def _ready(self, ready: Ready) -> list[Any]:
        worker, known = ready.worker, self.epochs.get(ready.worker, -1)
        refusal = ""
        if ready.protocol != PROTOCOL:
            refusal = f"worker {worker} speaks protocol {ready.protocol}, the coordinator {PROTOCOL}"
        elif ready.epoch < known:
            refusal = f"worker {worker} of epoch {ready.epoch} was replaced by epoch {known}"
        if refusal:
            return self._repeated(Send(worker_address(worker), Refused(worker, ready.epoch, refusal)))
        if ready.epoch > known or worker not in self.members:
            return self._join(ready)
        answer = self.answers.get(worker)
        if answer and ready.taken < answer.number:
            lost = ready.taken == answer.number - 1
            return self._repeated(*([Send(worker_address(worker), answer)] if lost else []))
        if self.waiting.get(worker) == ready:
            return self._repeated()
        self.waiting[worker] = ready
        return self._hand_out()

    def _join(self, ready: Ready) -> list[Any]:
        """A worker that was not there, or was thought to be lost, or its next incarnation."""
        self._meet(ready.worker, ready.epoch)
        self.members.add(ready.worker)
        answer = self.answers.get(ready.worker)
        if answer is None or ready.taken >= answer.number:
            self.waiting[ready.worker] = ready
        return self._hand_out()

    def _gone(self, gone: Gone) -> list[Any]:
        known = self.epochs.get(gone.worker, -1)
        if gone.epoch < known or (gone.epoch == known and gone.worker not in self.members):
            return self._repeated()
        self._meet(gone.worker, gone.epoch)
        self._lose(gone.worker)
        self.members.discard(gone.worker)
        return self._hand_out()

    def _meet(self, worker: int, epoch: int) -> None:
        """A new incarnation of a worker takes the place of the one before, if there was one: what waits for a worker
        that has not been heard of yet stays its own."""
        known = self.epochs.get(worker, -1)
        if epoch > known:
            if known >= 0:
                self._lose(worker)
            self.answers.pop(worker, None)
            self.epochs[worker] = epoch

    def _lose(self, worker: int) -> None:
        """Whoever was this worker computes no more: its share is nobody's."""
        self.waiting.pop(worker, None)
        for clock in self.clocks.values():
            for microbatch, owner in clock.owners.items():
                if owner == worker:
                    clock.owners[microbatch] = None
                    clock.due.add(microbatch)

    def _hand_out(self) -> list[Any]:
        """Work, or the end, for every waiting worker that can have it; the others stay waiting."""
        sends: list[Any] = []
        for worker, ready in sorted(self.waiting.items()):
            if self.finished:
                del self.waiting[worker]
                sends.append(Send(worker_address(worker), End(worker, ready.epoch)))
                continue
            clock, share = self._work_for(worker)
            if clock is None:
                continue
            for microbatch in share:
                clock.owners[microbatch] = worker
            clock.due.difference_update(share)
            begin = Begin(worker, ready.epoch, ready.taken + 1, self.term, clock.number, clock.version, share,
                          min(self.saved.values()))
            self.answers[worker] = begin
            del self.waiting[worker]
            sends.append(Send(worker_address(worker), begin))
        return sends

    def _work_for(self, worker: int) -> tuple[Clock | None, tuple[int, ...]]:
        """The earliest clock with something for this worker to do, begun now if need be, and what there is to do."""
        if self.restoring:
            return None, ()
        for clock in self.clocks.values():
            share = tuple(i for i in self._share(clock, worker) if clock.owners[i] in (worker, None))
            if share and not self._settled(clock):
                return clock, share
        if sorted(self.members).index(worker) >= self.setup.microbatches or not self._may_begin():
            return None, ()
        clock = self._begin()
        share = tuple(i for i in self._share(clock, worker) if clock.owners[i] == worker)
        return (clock, share) if share else (None, ())

    def _share(self, clock: Clock, worker: int) -> list[int]:
        """What is due of a clock and can be computed by a worker now. With compression or local steps that needs what
        was left of the microbatch by the clock before: this worker computed it, or every shard has it."""
        running = [c for c in self.clocks.values() if self.setup.remembers and c.number < clock.number]
        return [i for i in sorted(clock.due)
                if all(c.owners[i] == worker or self._settled(c) for c in running)]

    def _settled(self, clock: Clock) -> bool:
        """Whether every shard has all it needs."""
        return clock.chosen is not None or len(clock.reduced) == self.term.shards

    def _may_begin(self) -> bool:
        if self.last is not None and self.next >= self.last:
            return False
        if self.wish is not None and (self.clocks or self._sealed()):
            return False  # the clocks that are running end the term
        return self.setup.consistency.may_begin(self.next, self.clock, self.granted)

    def _begin(self) -> Clock:
        """Begin the next clock: microbatch i goes to worker i modulo the workers that are present."""
        members, microbatches = sorted(self.members), range(self.setup.microbatches)
        version = 0 if self.setup.consistency.asynchronous else self.clock
        owners: dict[int, int | None] = {i: members[i % len(members)] for i in microbatches}
        clock = self.clocks[self.next] = Clock(self.next, version, owners, set(microbatches))
        self.next += 1
        return clock

    # ── shards: one clock ───────────────────────────────────────────────────────────────────────────

    def _held(self, held: Held) -> list[Any]:
        clock = self.clocks.get(held.clock)
        if clock is None:
            return self._repeated()
        if clock.chosen is None:
            clock.held[held.shard] = clock.held.get(held.shard, frozenset()).union(held.microbatches)
            everywhere = frozenset.intersection(*clock.held.values())
            if len(clock.held) < self.term.shards or len(everywhere) < self.setup.needed:
                return []
            clock.chosen = tuple(sorted(everywhere))
            return self._send_choice(clock, set(range(self.term.shards)))
        return self._repeated(*self._send_choice(clock, {held.shard}))

    def _send_choice(self, clock: Clock, shards: set[int]) -> list[Any]:
        assert clock.chosen is not None
        choose = Choose(self.term.number, clock.number, clock.chosen)
        return [Send(shard_address(s), choose) for s in sorted(shards - clock.reduced.keys())]

    def _reduced(self, reduced: Reduced) -> list[Any]:
        clock = self.clocks.get(reduced.clock)
        if clock is None:
            if reduced.clock > self.clock:
                raise ProtocolError(f"coordinator: got {reduced!r}, and clock {reduced.clock} has not begun")
            return self._repeated()
        if clock.decision:
            return self._repeated(*self._send_decision(clock, {reduced.shard} - clock.applied))
        if reduced.shard in clock.reduced:
            return self._repeated()
        clock.reduced[reduced.shard] = reduced
        return self._go_on()

    def _decide(self) -> list[Any]:
        """Let the oldest clock be applied, if all of it is everywhere and the run allows it."""
        clock = self.clocks.get(self.clock)
        if (clock is None or clock.decision or self.clock >= self.granted or self.restoring
                or len(clock.reduced) < self.term.shards):
            return []
        reduced = [clock.reduced[s] for s in range(self.term.shards)]
        same = len({(r.loss, r.tokens) for r in reduced}) == 1 or isnan(reduced[0].loss)
        if not (same or self.setup.consistency.asynchronous):  # in ASP shards may have taken other incarnations' losses
            raise ProtocolError(f"coordinator: the shards disagree on the loss of clock {self.clock}: {reduced}")
        scale = 1.0
        if self.setup.clips:
            squares = self.setup.partition(self.term.shards).in_block_order([r.squares for r in reduced])
            clock.norm, scale = self.setup.clip(squares)
        every, seals = self.setup.save_every, self.wish is not None and len(self.clocks) == 1
        save = seals or (every > 0 and ((self.clock + 1) % every == 0 or self.clock + 1 == self.last))
        clock.decision = self.applied = Apply(self.term.number, self.clock, scale, save)
        return self._send_decision(clock, set(range(self.term.shards)))

    def _send_decision(self, clock: Clock, shards: set[int]) -> list[Any]:
        return [Send(shard_address(s), clock.decision) for s in sorted(shards)]

    def _applied(self, applied: Applied) -> list[Any]:
        if applied.clock < self.clock:
            return self._repeated()
        clock = self.clocks.get(applied.clock)
        if clock is None or clock.decision is None:
            raise ProtocolError(f"coordinator: got {applied!r} before clock {applied.clock} was decided")
        if applied.shard in clock.applied:
            return self._repeated()
        clock.applied.add(applied.shard)
        if len(clock.applied) < self.term.shards:
            return []
        del self.clocks[self.clock]
        self.clock += 1
        total, every = clock.reduced[0], range(self.setup.microbatches)
        dropped = () if clock.chosen is None else tuple(i for i in every if i not in clock.chosen)
        self.committed = Committed(clock.number, total.loss, total.tokens, clock.norm, clock.version, dropped)
        return [self.committed, *self._reshard_if_sealed(), *self._go_on()]

    def _remind(self, _: Timeout) -> list[Any]:
        """Repeat what was not answered."""
        if self.restoring:
            return self._send_restore(self.restoring)
        again = []
        for clock in self.clocks.values():
            if clock.decision:
                again += self._send_decision(clock, set(range(self.term.shards)) - clock.applied)
            elif clock.chosen is not None:
                again += self._send_choice(clock, set(range(self.term.shards)))
        if (self.wish is not None or self.finishing) and not self.clocks and self._sealed():
            again += [Send(shard_address(s), self.applied) for s, v in self.saved.items() if v < self.clock]
        return again

    # ── shards: one term ────────────────────────────────────────────────────────────────────────────

    def _reshard(self, reshard: Reshard) -> list[Any]:
        if reshard.shards < 1:
            raise ValueError(f"reshard: shards is {reshard.shards}, expected at least 1")
        if reshard.shards == (self.term.shards if self.wish is None else self.wish):
            return self._repeated(*([Entered(self.term)] if self.wish is None and not self.restoring else []))
        self.wish = reshard.shards
        return self._reshard_if_sealed()

    def _saved(self, saved: Saved) -> list[Any]:
        if saved.version <= self.saved[saved.shard]:
            return self._repeated()
        self.saved[saved.shard] = saved.version
        committed = []
        if saved.version > self.clock:  # it has applied the running clock, and that word was lost
            committed = self._applied(Applied(saved.shard, saved.term, saved.version - 1))
            self.repeated = False
        return [*committed, *self._reshard_if_sealed(), *self._hand_out()]

    def _reshard_if_sealed(self) -> list[Any]:
        """Begin the term that is wished for, when nothing is running and every shard has this version on record."""
        if self.wish is None or self.clocks or self.restoring or min(self.saved.values()) < self.clock:
            return []
        return self._enter(self.wish)

    def _blank(self, blank: Blank) -> list[Any]:
        """A shard lost its memory: all go back to the newest snapshot that all of them have, and compute it again."""
        if blank.shard >= self.term.shards:
            return self._repeated(*self._send_restore({blank.shard}))  # it has been removed
        if blank.incarnation <= self.incarnations.get(blank.shard, 0):
            return self._repeated()
        if not self.setup.consistency.replays:
            raise ProtocolError(f"coordinator: shard {blank.shard} lost its memory; only BSP can compute it again, "
                                "SSP, ASP and backups need a log")
        self.incarnations[blank.shard] = blank.incarnation
        return self._enter(self.term.shards if self.wish is None else self.wish)

    def _enter(self, shards: int) -> list[Any]:
        """Begin a new term, with so many shards, from the newest snapshot that all shards have."""
        retired = set(range(shards, self.term.shards))
        self.term = Term(self.term.number + 1, shards, min(self.saved.values()))
        self.clock = self.next = self.term.start
        self.clocks, self.wish, self.applied = {}, None, None
        self.saved = dict.fromkeys(range(shards), self.term.start)
        self.restoring = set(range(shards))
        return self._send_restore(self.restoring | retired)

    def _send_restore(self, shards: set[int]) -> list[Any]:
        return [Send(shard_address(s), Restore(self.term)) for s in sorted(shards)]

    def _restored(self, restored: Restored) -> list[Any]:
        if restored.shard not in self.restoring:
            return self._repeated()
        self.restoring.remove(restored.shard)
        return [Entered(self.term), *self._go_on()] if not self.restoring else []
