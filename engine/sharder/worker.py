"""A worker: turns what its program wants (clock, pull, push) into messages, and resends what is unanswered.

    idle --ClockRequested: send Ready--> waiting --Begin--> computing --PullRequested: send Pull--> pulling
                                           |                    ^                                      |
                                           '--End--> ended      '------- Parameters of every shard ----'

Pushes go out while it computes and need no waiting: each is kept until every shard has acknowledged it. The program
may ask for the next clock while acknowledgements are still on their way.

The state machine is pure: step(event) -> actions, with no thread, clock, socket or random source.
"""

from __future__ import annotations

from typing import Any

from engine.backend import Array
from engine.sharder.events import (
    COORDINATOR,
    Began,
    ClockRequested,
    Ended,
    Pulled,
    PullRequested,
    PushRequested,
    Send,
    Timeout,
    shard_address,
)
from engine.sharder.messages import Begin, End, Identity, Parameters, ProtocolError, Pull, Push, Pushed, Ready, Refused
from engine.sharder.partition import Partition
from engine.sharder.versions import Version


class Worker:
    """Incarnation `epoch` of worker `number`."""

    def __init__(self, number: int, epoch: int, partition: Partition):
        self.number, self.epoch, self.partition = number, epoch, partition
        self.clock = -1  # none yet
        self.due: set[int] = set()  # microbatches of this clock that are yet to be pushed
        self.sequence = 0
        self.ready: Ready | None = None
        self.pulls: dict[int, Pull] = {}  # by shard: unanswered
        self.values: dict[int, Version] = {}  # by shard: answered
        self.pushes: dict[tuple[int, int], Push] = {}  # by shard and sequence: unacknowledged
        self.ended = False

    def step(self, event: Any) -> list[Any]:
        """React to a request of the program, a message or a Timeout."""
        if isinstance(event, (ClockRequested, PullRequested, PushRequested)):
            return self._request(event)
        if isinstance(event, Timeout):
            return self._resend()
        if isinstance(event, Pushed):
            if (event.identity.worker, event.identity.epoch) == (self.number, self.epoch):
                self.pushes.pop((event.shard, event.identity.sequence), None)
            return []
        if not isinstance(event, (Begin, End, Refused, Parameters)):
            raise ProtocolError(f"worker {self.number}: got {event!r}, which is not for a worker")
        if (event.worker, event.epoch) != (self.number, self.epoch):
            return []  # meant for an earlier incarnation
        if isinstance(event, Parameters):
            return self._parameters(event)
        return self._answered(event)

    def _resend(self) -> list[Any]:
        unanswered = [Send(COORDINATOR, self.ready)] if self.ready else []
        unanswered += [Send(shard_address(s), pull) for s, pull in self.pulls.items()]
        return unanswered + [Send(shard_address(s), push) for (s, _), push in self.pushes.items()]

    # ── requests of the program ─────────────────────────────────────────────────────────────────────

    def _request(self, request: ClockRequested | PullRequested | PushRequested) -> list[Any]:
        if isinstance(request, ClockRequested):
            return self._next_clock()
        if self.clock < 0 or self.ready or self.ended:
            raise RuntimeError(f"worker {self.number}: pull and push belong to a clock, and none has begun; "
                               "call clock() first, and stop when it returns False")
        return self._pull(self.clock) if isinstance(request, PullRequested) else self._push(request)

    def _next_clock(self) -> list[Any]:
        if self.due:
            raise RuntimeError(f"worker {self.number}: clock() before microbatches {sorted(self.due)} of clock "
                               f"{self.clock} were pushed")
        self.ready = Ready(self.number, self.epoch, self.clock + 1)
        return [Send(COORDINATOR, self.ready)]

    def _pull(self, version: int) -> list[Any]:
        self.values = {}
        self.pulls = {s: Pull(self.number, self.epoch, version) for s in range(self.partition.shards)}
        return [Send(shard_address(s), pull) for s, pull in self.pulls.items()]

    def _push(self, request: PushRequested) -> list[Any]:
        if request.microbatch not in self.due:
            raise ValueError(f"worker {self.number}: push of microbatch {request.microbatch} in clock {self.clock}, "
                             f"expected one of {sorted(self.due)}, each once")
        self.due.remove(request.microbatch)
        identity = Identity(self.number, self.epoch, self.sequence)
        self.sequence += 1
        sends = []
        for shard in range(self.partition.shards):
            push = Push(identity, self.clock, request.microbatch, request.loss, request.tokens,
                        self._share(shard, request.gradients))
            self.pushes[shard, identity.sequence] = push
            sends.append(Send(shard_address(shard), push))
        return sends

    def _share(self, shard: int, gradients: dict[str, Array]) -> tuple[Array, ...]:
        """The part of each gradient that a shard owns, as views."""
        share = []
        for piece in self.partition.pieces[shard]:
            whole = gradients[piece.parameter.name]
            share.append(whole.view(whole.data[piece.start:piece.stop]))
        return tuple(share)

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────

    def _answered(self, answer: Begin | End | Refused) -> list[Any]:
        if self.ready is None or (isinstance(answer, Begin) and answer.clock < self.ready.clock):
            return []  # late or repeated
        self.ready = None
        if isinstance(answer, Begin):
            self.clock, self.due = answer.clock, set(answer.microbatches)
            return [Began(answer.clock, answer.microbatches)]
        self.ended = True
        return [Ended(answer.reason if isinstance(answer, Refused) else "")]

    def _parameters(self, answer: Parameters) -> list[Any]:
        pull = self.pulls.get(answer.shard)
        if pull is None or answer.values.number < pull.version:
            return []
        del self.pulls[answer.shard]
        self.values[answer.shard] = answer.values
        if self.pulls:
            return []
        newest = max(version.number for version in self.values.values())
        if any(version.number < newest for version in self.values.values()):
            return self._pull(newest)  # a worker with nothing to compute was overtaken: ask again, never mix
        return [Pulled(tuple(self.values[s] for s in range(self.partition.shards)))]
