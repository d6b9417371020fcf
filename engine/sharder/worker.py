"""A worker: turns what its program wants (clock, pull, push) into messages, and resends what is unanswered.

    idle --ClockRequested: send Ready--> waiting --Begin--> computing --PullRequested: send Pull--> pulling
                                           |                    ^                                      |
                                           '--End--> ended      '------- Parameters of every shard ----'

Pushes go out while it computes and need no waiting: each is kept until its shard has acknowledged it. The gradients
of a microbatch are one push, which leaves for each shard as soon as all that this shard owns is there. If the program
gives up half-way and computes the microbatch again, shards that have their part keep it: it would be the same. The
program may ask for the next clock while acknowledgements are still on their way. When it learns of a new term, by a
Begin or because a shard has Moved, all that it was doing in the old one is void: the program finishes it and nobody
listens.

The state machine is pure: step(event) -> actions, with no thread, clock, socket or random source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf
from typing import Any, ClassVar

from engine.backend import Array
from engine.rowsparse import RowSparse
from engine.sharder.codecs import Rows
from engine.sharder.events import (
    COORDINATOR,
    Began,
    ClockRequested,
    Ended,
    Pulled,
    PullRequested,
    PushRequested,
    Received,
    Send,
    Timeout,
    shard_address,
)
from engine.sharder.learners import Learners
from engine.sharder.local import LocalSteps
from engine.sharder.messages import (
    Begin,
    End,
    Identity,
    Moved,
    Parameters,
    ProtocolError,
    Pull,
    Push,
    Pushed,
    Ready,
    Refused,
    Term,
)
from engine.sharder.partition import Partition, Piece
from engine.sharder.setup import Setup
from engine.sharder.versions import Version

Encode = Callable[[int, int, Piece, Array, int, int], Any]
"""encode(clock, microbatch, piece, its gradient, flat, term, floor) -> what travels, with decode(k, size, dtype)."""


class Worker:
    """Incarnation `epoch` of worker `number`, in `term` until it hears of another."""

    HANDLERS: ClassVar[dict[type, str]] = {
        ClockRequested: "_next_clock", PullRequested: "_pull_requested", PushRequested: "_push", Timeout: "_resend",
        Begin: "_begin", End: "_end", Refused: "_end", Parameters: "_parameters", Pushed: "_pushed", Moved: "_moved"}

    def __init__(self, number: int, epoch: int, setup: Setup, term: Term, learners: Learners | None = None):
        self.number, self.epoch, self.setup, self.term = number, epoch, setup, term
        self.encode: Encode | None = learners.compression.encode if learners and learners.compression else None
        self.local = learners.local if learners else None
        self.begun: Begin | None = None
        self.due: set[int] = set()  # microbatches of this clock that are yet to be pushed
        self.taken = 0  # Begins
        self.sequence = 0
        self.ready: Ready | None = None
        self.pulls: dict[int, Pull] = {}  # by shard: unanswered
        self.wanted: tuple[str, ...] | None = None  # parameters that were asked for last; None: all
        self.values: dict[int, Version] = {}  # by shard: answered, until all are
        self.read: dict[int, int] = {}  # by shard: the version that it answered with last
        self.pushes: dict[tuple[int, int], Push] = {}  # by shard and sequence: unacknowledged
        self.leaving: dict[int, tuple[Identity, set[int]]] = {}  # by microbatch: its push, and shards that were sent it
        self.again = 0  # pulls and pushes that were sent more than once
        self.ended = False

    @property
    def partition(self) -> Partition:
        return self.setup.partition(self.term.shards)

    @property
    def clock(self) -> int:
        """The clock it computes; −1 before the first."""
        return self.begun.clock if self.begun else -1

    def step(self, event: Any) -> list[Any]:
        """React to a request of the program, a message or a Timeout."""
        handler = self.HANDLERS.get(type(event))
        if handler is None:
            raise ProtocolError(f"worker {self.number}: got {event!r}, which is not for a worker")
        return getattr(self, handler)(event)

    def _mine(self, worker: int, epoch: int) -> bool:
        """Whether it is meant for this incarnation."""
        return (worker, epoch) == (self.number, self.epoch)

    def _resend(self, _: Timeout) -> list[Any]:
        self.again += len(self.pulls) + len(self.pushes)
        unanswered = [Send(COORDINATOR, self.ready)] if self.ready else []
        unanswered += [Send(shard_address(s), pull) for s, pull in self.pulls.items()]
        return unanswered + [Send(shard_address(s), push) for (s, _), push in self.pushes.items()]

    # ── requests of the program ─────────────────────────────────────────────────────────────────────

    def _next_clock(self, _: ClockRequested) -> list[Any]:
        if self.due:
            raise RuntimeError(f"worker {self.number}: clock() before microbatches {sorted(self.due)} of clock "
                               f"{self.clock} were pushed")
        self.pulls = {}  # what the program did without
        self.ready = Ready(self.number, self.epoch, self.taken)
        return [Send(COORDINATOR, self.ready)]

    def _in_clock(self) -> Begin:
        if self.begun is None or self.ready or self.ended:
            raise RuntimeError(f"worker {self.number}: pull and push belong to a clock, and none has begun; "
                               "call clock() first, and stop when it returns False")
        return self.begun

    def _pull_requested(self, request: PullRequested) -> list[Any]:
        begun = self._in_clock()
        self.wanted, self.values = request.names, {}
        return self._pull(begun.version if begun.term == self.term else 0)

    def _pull(self, version: int) -> list[Any]:
        seen = self.read if self.setup.consistency.asynchronous else {}
        shards: Iterable[int] = range(self.term.shards)
        if self.wanted is not None:
            shards = sorted({s for name in self.wanted for s in self.partition.owners[name]})
        self.pulls = {s: Pull(self.number, self.epoch, self.term.number, max(version, seen.get(s, 0))) for s in shards}
        return [Send(shard_address(s), pull) for s, pull in self.pulls.items()]

    def _push(self, request: PushRequested) -> list[Any]:
        begun = self._in_clock()
        if request.microbatch not in self.due:
            raise ValueError(f"worker {self.number}: push of microbatch {request.microbatch} in clock {self.clock}, "
                             f"expected one of {sorted(self.due)}, each once")
        if not 0 <= request.tokens < inf:
            raise ValueError(f"worker {self.number}: push of microbatch {request.microbatch} with {request.tokens} "
                             "tokens, expected a finite number of at least 0")
        if self.setup.consistency.asynchronous and not request.tokens:
            raise ValueError(f"worker {self.number}: push of microbatch {request.microbatch} without tokens; in asp "
                             "each is an update of its own, which divides by them")
        shards: Iterable[int] = range(self.term.shards) if request.shard is None else (request.shard,)
        if self._void(begun):
            if request.shard is None:
                self.due.remove(request.microbatch)
            self.leaving.clear()
            return []
        if self.local:
            request = self._stepped(self.local, request)
        identity, have = self.leaving.get(request.microbatch) or self._new_push(request.microbatch)
        pushes = {}
        for shard in shards:
            if shard in have:
                continue
            version = begun.version
            if self.setup.consistency.asynchronous:
                version = self.read.get(shard, version)
            pushes[shard] = Push(identity, self.term.number, begun.clock, version, request.microbatch, request.loss,
                                 request.tokens, self._share(shard, request))
        # What may fail, as writing a residual may, is done: till here it can be asked for again.
        have.update(pushes)
        self.pushes.update({(shard, identity.sequence): push for shard, push in pushes.items()})
        if request.shard is None:
            self.due.remove(request.microbatch)
            del self.leaving[request.microbatch]
        return [Send(shard_address(shard), push) for shard, push in pushes.items()]

    def _stepped(self, local: LocalSteps, request: PushRequested) -> PushRequested:
        """With the step that these gradients are for the microbatch, in their place."""
        if request.place is None:
            raise RuntimeError(f"worker {self.number}: push of microbatch {request.microbatch}, which has a place of "
                               f"its own, expected client.localize({request.microbatch}, replica) before its loss")
        begun = self._in_clock()
        steps = local.step(self.clock, request.microbatch, request.place, request.gradients, request.tokens,
                           self.term.number, begun.floor)
        return replace(request, gradients=dict(steps))

    def _void(self, begun: Begin) -> bool:
        """Whether nobody waits for what it computes: its term is over, or its clock, so that it was given parameters of
        a later version. (Of those the gradients would be other ones, and so would what compression leaves.)"""
        synchronous = not self.setup.consistency.asynchronous
        return begun.term != self.term or (synchronous and any(read > begun.version for read in self.read.values()))

    def _new_push(self, microbatch: int) -> tuple[Identity, set[int]]:
        """One identity for the gradients of a microbatch, which leave for each shard in their time."""
        self.leaving[microbatch] = Identity(self.number, self.epoch, self.sequence), set()
        self.sequence += 1
        return self.leaving[microbatch]

    def _share(self, shard: int, request: PushRequested) -> tuple[Any, ...]:
        """The part of each gradient that a shard owns: views, or what they are encoded as; of row-sparse ones, rows."""
        share: list[Any] = []
        for piece in self.partition.pieces[shard]:
            whole = request.gradients[piece.parameter.name]
            if isinstance(whole, RowSparse):
                share.append(Rows.of(whole, piece.start, piece.size))
                continue
            part = whole.view(whole.data[piece.start:piece.stop])
            share.append(self._encoded(request.microbatch, piece, part) if self.encode else part)
        return tuple(share)

    def _encoded(self, microbatch: int, piece: Piece, part: Array) -> Any:
        assert self.encode is not None and self.begun is not None
        return self.encode(self.clock, microbatch, piece, part, self.term.number, self.begun.floor)

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, begin: Begin) -> list[Any]:
        if not self._mine(begin.worker, begin.epoch) or self.ready is None or begin.number != self.taken + 1:
            return []  # late or repeated
        self.taken = begin.number
        if begin.term.number < self.term.number:
            return self._next_clock(ClockRequested())  # void before it began
        self._enter(begin.term)
        self.ready, self.begun, self.due = None, begin, set(begin.microbatches)
        if not self.setup.consistency.asynchronous:
            self.read = {}  # in ASP, what it has read bounds what it may read
        return [Began(begin.clock, begin.microbatches)]

    def _end(self, answer: End | Refused) -> list[Any]:
        if not self._mine(answer.worker, answer.epoch) or self.ready is None:
            return []
        self.ready, self.ended = None, True
        return [Ended(answer.reason if isinstance(answer, Refused) else "")]

    def _pushed(self, pushed: Pushed) -> list[Any]:
        if self._mine(pushed.identity.worker, pushed.identity.epoch):
            self.pushes.pop((pushed.shard, pushed.identity.sequence), None)
        return []

    def _parameters(self, answer: Parameters) -> list[Any]:
        pull = self.pulls.get(answer.shard)
        if (pull is None or not self._mine(answer.worker, answer.epoch)
                or (answer.term, answer.version) != (pull.term, pull.version)):
            return []
        del self.pulls[answer.shard]
        self.read[answer.shard] = answer.values.number
        if self.wanted is not None:
            return [Received(answer.shard, answer.values)]
        self.values[answer.shard] = answer.values
        if self.pulls:
            return []
        newest = max(version.number for version in self.values.values())
        if not self.setup.consistency.asynchronous and any(v.number < newest for v in self.values.values()):
            return self._pull(newest)  # its clock is over, and it was overtaken: ask again, never mix
        values, self.values = self.values, {}
        return [Pulled(tuple(values[s] for s in range(self.term.shards)))]

    def _moved(self, moved: Moved) -> list[Any]:
        if not self._mine(moved.worker, moved.epoch) or moved.term.number <= self.term.number:
            return []
        pulling = bool(self.pulls)
        self._enter(moved.term)
        return self._pull(0) if pulling else []

    def _enter(self, term: Term) -> None:
        """Forget what belongs to older terms."""
        if term != self.term:
            self.term, self.values, self.read, self.pulls, self.pushes = term, {}, {}, {}, {}
