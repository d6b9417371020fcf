"""How machines that are Ray actors hear from each other: a message is a call of a method, and large arrays are objects.

    actor --> actor    peer.deliver(bytes, reference)    bytes: encoding.py's; reference: of the arrays, in Ray's store
    run   --> actor    the same
    actor --> run      collect() -> messages             called by the run, and answered once there are some

Nobody can call the process that calls run(), so that one asks each actor for what it has to say, and the question fails
when the actor dies, which is how the run learns of it.

Arrays of 64 KB and more are written into Ray's object store once, by the machine that has them: a version of the
parameters once a clock, however many workers pull it. Ray brings an object to the computer where it is read, and there
it is read where it lies: a pulled parameter is a read-only view of the store. An object dies with the actor that wrote
it, and so does a message that speaks of it and has not arrived; the protocol asks again. What has arrived stays for as
long as somebody holds a view of it.

Ray itself unpickles what it carries, so whoever can speak to a Ray cluster can run programs on it: it must be guarded
as Ray's documentation says. What is carried here is bytes and arrays, and they are decoded, not unpickled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from engine.sharder.drivers.segments import Segments
from engine.sharder.drivers.tape import BLANK, Blank
from engine.sharder.encoding import FAR_ALIGNMENT, WireError, decode, encode
from engine.sharder.events import RUN, Address

Letter = tuple[bytes, Sequence[np.ndarray]]  # an encoded message, and its large arrays
PAUSE = 0.05  # seconds until an actor that was out of reach is asked again
log = logging.getLogger(__name__)


class Pieces:
    """Arrays that lie anywhere, cut as if they lay in one segment (encoding.py): each in its turn."""

    def __init__(self, arrays: Iterable[np.ndarray]):
        self.memory: dict[int, memoryview] = {}  # by where it would begin
        self.size = 0
        for array in arrays:
            start = self.size + -self.size % FAR_ALIGNMENT
            self.memory[start] = array.reshape(-1).view(np.uint8).data
            self.size = start + array.nbytes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> memoryview:
        found = self.memory.get(where.start, memoryview(b""))
        if where.start + len(found) != where.stop:
            raise WireError(f"wire: {len(found)} bytes of an array, expected {where.stop - where.start}")
        return found


def read(letter: Letter) -> Any:
    body, arrays = letter
    return decode(body, lambda: Pieces(arrays))


def read_all(letters: Iterable[Letter | None]) -> list[Any]:
    """The messages of those that are one. What is none is refused, with one line in the log, and changes nothing."""
    found = []
    for letter in filter(None, letters):
        try:
            found.append(read(letter))
        except WireError as error:
            log.warning("%s", error)
    return found


def write(message: Any) -> tuple[bytes, list[np.ndarray]]:
    arrays: list[np.ndarray] = []
    return b"".join(encode(message, arrays)), arrays


class Sender:
    """Calls others. ray: the module; tell: their methods, by address."""

    def __init__(self, ray: Any):
        self.ray = ray
        self.tell: dict[Address, Callable[..., Any]] = {}
        self.kept: Segments[Any] = Segments(lambda arrays: ray.put(list(arrays)))

    def know(self, actors: Mapping[Address, Any]) -> None:
        """These are the actors of these machines from now on."""
        self.tell.update((address, in_turn(actor.deliver)) for address, actor in actors.items())

    def send(self, to: Address, message: Any) -> None:
        """Call somebody, if there is one."""
        if to in self.tell:
            body, arrays = write(message)
            self.tell[to](body, *([self.kept.of(arrays)] if arrays else []))


def in_turn(method: Any) -> Callable[..., Any]:
    """A call of an actor's method that is not answered; those of one caller are carried out in their order."""
    call: Callable[..., Any] = method.options(concurrency_group="mail", num_returns=0).remote
    return call


class ActorMail:
    """An actor's: as child.Mail has it for the machine, and for the calls that come.

    Mail says what met, stirred and tape are.
    """

    sending = False

    def __init__(self, ray: Any, peers: Mapping[Address, Any]):
        self.sender = Sender(ray)
        self.sender.know(peers)
        self.inbox: SimpleQueue[Letter | None] = SimpleQueue()  # None: look whether something else has happened
        self.outbox: SimpleQueue[Letter | None] = SimpleQueue()  # to the run; None: nothing more will come
        self.met = False
        self.stirred = 0.0
        self.tape: Blank = BLANK

    # ── the machine ─────────────────────────────────────────────────────────────────────────────────

    def send(self, to: Address, message: Any) -> None:
        self.tape.sent(to, message)
        if to == RUN:
            self.outbox.put(write(message))
        else:
            self.sender.send(to, message)

    def forget(self, address: Address) -> None:
        self.sender.tell.pop(address, None)

    def receive(self, seconds: float) -> list[Any]:
        try:
            letters = [self.inbox.get(timeout=seconds)]
        except Empty:
            return []
        while not self.inbox.empty():
            letters.append(self.inbox.get())
        return read_all(letters)

    def end(self) -> None:
        """There is no machine any more."""
        self.outbox.put(None)

    # ── calls ───────────────────────────────────────────────────────────────────────────────────────

    def deliver(self, body: bytes, arrays: Sequence[np.ndarray]) -> None:
        self.stirred = time.monotonic()
        self.inbox.put((body, arrays))

    def meet(self, peers: Mapping[Address, Any]) -> None:
        self.sender.know(peers)
        self.met = True
        self.inbox.put(None)

    def collect(self) -> tuple[list[Letter], bool]:
        """What there is to say, once there is something; and whether there can be more."""
        letters: list[Letter] = []
        while not letters or not self.outbox.empty():
            letter = self.outbox.get()
            if letter is None:
                self.end()  # for whoever asks again
                return letters, False
            letters.append(letter)
        return letters, True


class RunMail:
    """The supervisor's, as child.Mail has it.

    ended: whose machines have nothing more to say; fallen: who died, and what Ray says of it
    """

    sending = False

    def __init__(self, ray: Any):
        self.ray, self.sender = ray, Sender(ray)
        self.actors: dict[Address, Any] = {}  # those that are not dead
        self.ended: set[Address] = set()
        self.asked: dict[Any, Address] = {}  # by reference of the answer
        self.fallen: list[tuple[Address, Any]] = []
        self.met = False
        self.stirred = 0.0
        self.tape: Blank = BLANK

    def add(self, address: Address, actor: Any) -> None:
        """There is a new actor; the others are told."""
        for other in self.actors.values():
            in_turn(other.meet)({address: actor})
        self.actors[address] = actor
        self.ended.discard(address)
        self.sender.know({address: actor})
        self.met = True

    def send(self, to: Address, message: Any) -> None:
        self.tape.sent(to, message)
        self.sender.send(to, message)

    def forget(self, address: Address) -> None:
        """Nothing is asked or told any more; its actor."""
        self.sender.tell.pop(address, None)
        self.asked = {answer: other for answer, other in self.asked.items() if other != address}
        self.ended.discard(address)

    def _ask(self, address: Address) -> None:
        self.asked[self.actors[address].collect.remote()] = address

    def receive(self, seconds: float) -> list[Any]:
        for address in self.actors.keys() - self.ended - set(self.asked.values()):
            self._ask(address)
        if not self.asked:
            time.sleep(seconds)
            return []
        self.ray.wait(list(self.asked), timeout=seconds)
        answered, _ = self.ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)
        return [message for answer in answered for message in self._take(answer)]

    def _take(self, answer: Any) -> list[Any]:
        address, errors = self.asked.pop(answer), self.ray.exceptions
        try:
            letters, more = self.ray.get(answer)
        except errors.RayTaskError:
            raise
        except (errors.ActorDiedError, errors.ActorUnschedulableError) as error:
            del self.actors[address]
            self.fallen.append((address, error))
            return []
        except errors.RayError:  # out of reach, or dead without Ray's knowing it yet
            time.sleep(PAUSE)
            return []
        self.stirred = time.monotonic()
        if not more:
            self.ended.add(address)
        return read_all(letters)

    def kill(self, seconds: float) -> None:
        """End all actors, and wait for so long until those that were not at their end are gone."""
        for actor in self.actors.values():
            self.ray.kill(actor)
        if self.asked:  # what is not answered any more fails with the actor
            self.ray.wait(list(self.asked), num_returns=len(self.asked), timeout=seconds, fetch_local=False)
