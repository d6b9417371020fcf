"""What a worker's program sees of the parameter server: clock, pull, push.

    def train(client):
        model = Model()
        while client.clock():                      # waits for the next clock; False: training is over
            client.pull(model)                     # its parameters are now views of the server's
            for index in client.microbatches:      # of this clock, this worker's share
                client.localize(index, model)      # for servers with a local rule; else it changes nothing
                loss, tokens = loss_sum(model, batch(client.step, index))
                client.backward(index, model, loss, tokens)  # and push the gradients

A program that has gradients from elsewhere gives them to client.push().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType
from engine.rowsparse import RowSparse
from engine.sharder.binding import bind, flat_gradients, named, take_gradients
from engine.sharder.events import Began, ClockRequested, Ended, Pulled, PullRequested, PushRequested, Received, Send
from engine.sharder.late import LateParameters
from engine.sharder.overlap import Departure
from engine.sharder.partition import Partition
from engine.sharder.versions import Counter, Traffic, assemble
from engine.sharder.worker import Worker
from engine.tensor import Tensor


class Stopped(BaseException):
    """Raised in a program by its client when the run was ended from outside. Not for programs to catch."""


class Port(Protocol):
    """How a driver carries a worker's messages."""

    def send(self, send: Send) -> None:
        """Deliver it, now or later."""

    def receive(self, wait: bool = True) -> Any:
        """The next message for this worker; waits for one, or gives None if there is none and it is not to wait. Raises
        Stopped once there is to be none."""


class Desk(Protocol):
    """What a client wants of its cluster: a backend, the parameters' type, and where bytes are counted."""

    @property
    def k(self) -> Backend: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def copied(self) -> Counter: ...
    @property
    def pushed(self) -> Traffic: ...


class Client:
    """Worker `worker`'s access to the server.

    worker:       its number             step:   the clock that is running, from 0
    microbatches: its share of the clock ended:  whether training is over
    most_held:    bytes of parameters that it had at a time, at most
    """

    def __init__(self, cluster: Desk, machine: Worker, port: Port):
        self._machine, self._port = machine, port
        self.k, self.dtype, self.copied, self._pushed = cluster.k, cluster.dtype, cluster.copied, cluster.pushed
        self.worker = machine.number
        self.step = -1
        self.microbatches: tuple[int, ...] = ()
        self.ended = False
        self.most_held = 0
        self._late: LateParameters | None = None
        self._pulled: Mapping[str, np.ndarray] | None = None
        self._places: dict[int, Mapping[str, np.ndarray]] = {}  # with a local rule: by microbatch, until it is pushed

    def clock(self) -> bool:
        """Wait for the next work: True when there is some, False when training is over.

        It is the next clock's, or what a lost worker left undone of an earlier one.

        Raises RuntimeError if microbatches of the present clock were not pushed, or if the server refuses this worker.
        """
        self._close()
        self._pulled = None
        outcome = self._until(ClockRequested())
        if isinstance(outcome, Ended):
            self.ended = True
            if outcome.refused:
                raise RuntimeError(f"clock: the server refused: {outcome.refused}")
            return False
        assert isinstance(outcome, Began)
        self.step, self.microbatches = outcome.clock, outcome.microbatches
        return True

    def pull(self, replica: Any = None, late: bool = False) -> Mapping[str, np.ndarray]:
        """name -> the parameters of this clock, read-only; a replica (module or name -> Tensor) is bound to them.

        late: return at once, and wait for a parameter when it is first used. With zero=3 that is always so, and those
        that were not used lately are let go of, to be pulled again when they are used again (late.py).
        """
        self._close()
        self._places = {}  # a replica leaves them
        release = self._machine.setup.zero == 3
        if late or release:
            self._late = LateParameters(self, release)
            if replica is not None:
                self._late.bind(replica)
            self._pulled = self._late
            return self._late
        outcome = self._until(PullRequested())
        assert isinstance(outcome, Pulled)
        values = assemble(self.partition, outcome.values, self.k, self.copied)
        flats = {id(version.flat): version.flat.data.nbytes for version in outcome.values}
        self.most_held = max(self.most_held, sum(flats.values()))
        if replica is not None:
            bind(replica, values)
        self._pulled = values
        return values

    def localize(self, index: int, replica: Any = None) -> Mapping[str, np.ndarray]:
        """name -> the parameters at which microbatch `index` is to be computed, read-only; a replica is bound to them.

        With a local rule (local.py), where its own steps have led this microbatch; else what was pulled, to which a
        replica is bound already. Raises RuntimeError before a pull of this clock, and ValueError for an index not due.
        """
        if self._pulled is None:
            raise RuntimeError(f"localize: microbatch {index} before the parameters of this clock were pulled; "
                               "expected a pull() first")
        local = self._machine.local
        if local is None:
            return self._pulled
        if index not in self.microbatches:
            raise ValueError(f"localize: microbatch {index} in clock {self.step}, expected one of {self.microbatches}")
        place = self._places[index] = local.place(self.step, index, self._pulled)
        if replica is not None:
            bind(replica, place)
        return place

    def _close(self) -> None:
        """What was pulled late has had its time."""
        if self._late is not None:
            self._late.close()
            self.most_held = max(self.most_held, self._late.most)
            self._late = None

    def push(self, index: int, gradients: Any, loss: float = 0.0, tokens: float = 1) -> None:
        """Give the gradients of the loss *sum* of microbatch `index`, that sum, and how many tokens it sums over.

        gradients: the replica, whose .grad are taken, or a mapping name -> Tensor, Array, NumPy array, or RowSparse, of
        which the touched rows are sent. They are given away: nobody may write to them afterwards. The server divides by
        the tokens of all microbatches of the clock. Returns at once. Raises ValueError with one line for gradients that
        do not fit, for an index not due, and for tokens that are none.
        """
        of_replica = hasattr(gradients, "named_parameters")
        given = {name: p.grad for name, p in named(gradients).items()} if of_replica else gradients
        self.send_gradients(index, flat_gradients(self.partition, self.dtype, given, self.copied), loss, tokens)
        if of_replica:  # now that they are on their way
            take_gradients(gradients)

    def backward(self, index: int, replica: Any, loss: Tensor, tokens: float = 1) -> None:
        """loss.backward() and push(index, replica, loss.item(), tokens): the gradients of a loss *sum*.

        With zero=2, the default, gradients leave for their shards while others are computed, and a worker never holds
        all of them (overlap.py); with zero=1 they leave when all are there. If it ends by an exception, the replica has
        no gradients, and microbatch `index` is still due: compute it again. Raises what push and backward raise.
        """
        Departure(self, index, replica, loss.item(), tokens).backward(loss, self._machine.setup.zero > 1)

    # ── for what sends gradients, and fetches parameters, while others are computed ─────────────────

    @property
    def partition(self) -> Partition:
        return self._machine.partition

    def send_gradients(self, index: int, flat: dict[str, Array | RowSparse], loss: float, tokens: float,
                       shard: int | None = None) -> None:
        """Give a shard its part of these flat gradients; None: give all shards what they do not have yet."""
        actions = self._machine.step(PushRequested(index, flat, loss, tokens, shard, self._places.get(index)))
        self._places.pop(index, None)
        for send in actions:
            pieces = self.partition.pieces[send.to[1]]
            self._pushed.count(pieces, send.message.gradients, self.dtype.itemsize)
        self._perform(actions)

    def settle(self, waiting: int) -> None:
        """Hear what has come, and wait until at most so many pushes are unacknowledged."""
        while (message := self._port.receive(len(self._machine.pushes) > waiting)) is not None:
            self._perform(self._machine.step(message))

    @property
    def fetching(self) -> set[int]:
        """Shards that have not answered a pull."""
        return set(self._machine.pulls)

    def fetch(self, names: tuple[str, ...]) -> None:
        """Ask the shards that own these parameters."""
        self._perform(self._machine.step(PullRequested(names)))

    def hear(self) -> Any:
        """Wait for one message; returns what comes of it for the program, if anything does."""
        return self._perform(self._machine.step(self._port.receive()))

    def _until(self, request: Any) -> Any:
        """Make a request and exchange messages until it has its outcome."""
        outcome = self._perform(self._machine.step(request))
        while outcome is None:
            outcome = self.hear()
        return outcome

    def _perform(self, actions: list[Any]) -> Any:
        """Send what is to be sent; returns the action that is for the program, if there is one."""
        outcome = None
        for action in actions:
            if isinstance(action, Send):
                self._port.send(action)
            elif isinstance(action, Received):
                if self._late is not None:
                    self._late.receive(action)
            else:
                outcome = action
        return outcome


Program = Callable[[Client], Any]
"""What a worker runs, from its beginning to the end of training."""


def run_to_end(program: Program, client: Client) -> None:
    """Run a worker's program. Raises RuntimeError if it returns before the end of training."""
    program(client)
    if not client.ended:
        raise RuntimeError(f"worker {client.worker}: its program returned in clock {client.step}, before the end of "
                           "training; loop `while client.clock():`")
