"""Inputs for the decoder of messages, by the million: none may crash it, hang it, make it take memory, or pass.

    python tools/fuzz_wire.py                     goes on where it stopped, to 1,000,000 inputs of this commit
    python tools/fuzz_wire.py --inputs 50000      to so many
    python tools/fuzz_wire.py --table             what the ledger says, and run nothing

What is fed: messages of every type with drawn fields, and what changes, cuts, splices, wrong lengths and noise make of
them; as bodies, as frames, as frames signed again after the change (so that what stands behind the signature is
reached), as frames repeated, out of turn, of another connection, direction, version or secret; hellos; compressed
gradients; and pushes that no worker sends, given to a shard. What must hold of every input:

    it is refused by a WireError of one line, or it is what the encoder writes, byte for byte
    a frame is taken only if it is the very one that is due, and after a refusal the one that is due is still taken
    a push that changes a shard fits it in all its parts; of any other the shard is as it was, to the bit
    nothing takes more memory than LIMIT or more time than SECONDS a slice

The ledger (build/fuzz-wire.jsonl) has one line a slice: seed, inputs, how many were refused and taken, commit, failure.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import numpy as np

from engine.backend import Array, get_backend
from engine.dtypes import ALL, DType, bool_, float32
from engine.optim import SGDRule
from engine.sharder import encoding, wire
from engine.sharder.codecs import Payload, codec_of
from engine.sharder.consistency import Consistency
from engine.sharder.drivers.frozen import freeze
from engine.sharder.encoding import WireError, decode, encode
from engine.sharder.events import Loaded
from engine.sharder.journal import replay
from engine.sharder.memory import Checkpoint
from engine.sharder.messages import Gone, Identity, ProtocolError, Push, Restore, Term
from engine.sharder.setup import Setup, as_hyper
from engine.sharder.shard import Shard
from tools.training.errors import run_program

ROOT = Path(__file__).resolve().parent.parent
SLICE = 20_000  # inputs
LIMIT = 1 << 30  # bytes that a run may take beyond what it has at its beginning
SECONDS = 300  # of processor time a slice
K = get_backend("reference")


# ── drawn messages ────────────────────────────────────────────────────────────────────────────────────

INTS = (0, 1, -1, 2, 255, 1 << 31, (1 << 63) - 1, -(1 << 63))
NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF4_0000_0000_BEEF))[0]  # a signalling one, with a payload
FLOATS = (0.0, -0.0, 1.5, float("inf"), float("-inf"), NAN, 5e-324, 1e308)
TEXTS = ("", "w", "blocks.0.attention.weight", "Größe ∇ 𝛼", "\0\n", "x" * 300)
SHAPES = ((), (0,), (1,), (7,), (3, 5), (2, 0, 4), (1, 1, 1, 1, 1), (40, 30))


def draw(random: Random, annotation: str, depth: int = 0) -> Any:
    """A value of a field, whatever may stand there."""
    members = encoding._split(annotation, " | ")
    if len(members) > 1:
        return draw(random, random.choice(members), depth)
    if annotation.startswith("tuple["):
        item = annotation.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(draw(random, item, depth) for _ in range(random.choice((0, 1, 2, 5))))
    if annotation.startswith("Mapping["):
        key, item = encoding._split(annotation.removeprefix("Mapping[")[:-1], ", ")
        return {draw(random, key, depth): draw(random, item, depth) for _ in range(random.choice((0, 1, 3)))}
    if annotation in encoding.ALIASES:
        return draw(random, encoding.ALIASES[annotation], depth)
    if annotation == "Any":
        return draw_message(random, depth + 1)
    return SIMPLE[annotation](random) if annotation in SIMPLE else _draw_object(random, annotation, depth)


def draw_message(random: Random, depth: int = 0) -> Any:
    """A message of any type; those that hold another one end at the depth that is allowed."""
    numbered = [name for kind, name in ((kind, kind.__name__) for kind in encoding._by_class)
                if depth < encoding.DEPTH - 1 or "Any" not in encoding._classes[name][1].values()]
    return _draw_object(random, random.choice(numbered), depth)


def _draw_object(random: Random, name: str, depth: int) -> Any:
    made, annotations = encoding._classes[name]
    return made(**{field: draw(random, annotation, depth) for field, annotation in annotations.items()})


def draw_array(random: Random) -> np.ndarray:
    """Any element type, shape and layout, and any bits."""
    dtype, shape = random.choice(ALL), random.choice(SHAPES)
    size = int(np.prod(shape, dtype=int))
    data = random.randbytes(size * dtype.itemsize)
    array = np.frombuffer(data, np.uint8) & 1 if dtype is bool_ else np.frombuffer(data, dtype.numpy)
    array = array.astype(dtype.numpy).reshape(shape) if dtype is bool_ else array.reshape(shape)
    return array.T if random.random() < 0.3 else array


def _draw_payload(random: Random) -> Payload:
    codec = codec_of(random.choice(("fp16", "bf16", "int8", "1bit", "topk:0.05")))
    x = np.frombuffer(random.randbytes(4 * 100), np.int16).astype(np.float32)[:100]
    return codec.write(K, K.array(x))


SIMPLE: dict[str, Callable[[Random], Any]] = {
    "int": lambda random: random.choice(INTS) if random.random() < 0.5 else random.randrange(1000),
    "float": lambda random: random.choice(FLOATS) if random.random() < 0.5 else random.gauss(0, 1),
    "bool": lambda random: random.random() < 0.5,
    "None": lambda random: None,
    "str": lambda random: random.choice(TEXTS),
    "np.ndarray": draw_array,
    "Array": lambda random: Array(draw_array(random)),
    "Payload": _draw_payload,
}


def bits(value: Any) -> Any:
    """Everything that there is to a value, so that two of them can be compared to the bit."""
    if isinstance(value, Array):
        return "Array", bits(value.data)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, (tuple, list)):
        return [bits(item) for item in value]
    if isinstance(value, dict):
        return [(name, bits(item)) for name, item in value.items()]
    if is_dataclass(value) or type(value).__name__ in encoding._classes:
        annotations = encoding._classes[type(value).__name__][1]
        return type(value).__name__, [bits(getattr(value, field)) for field in annotations]
    return type(value).__name__, value


# ── what must hold ────────────────────────────────────────────────────────────────────────────────────

def refused(call: Callable[[Any], Any], data: Any, error: type[Exception] = WireError) -> bool:
    """Whether it is refused, as what is refused should be: by one line."""
    try:
        call(data)
    except error as caught:
        line = str(caught)
        assert line and "\n" not in line and len(line) < 1000, f"not one line: {line!r}"
        return True
    return False


def check_body(data: bytes) -> bool:
    """Refused, or what the encoder writes."""
    if refused(decode, data):
        return False
    assert b"".join(encode(decode(data))) == data, "the decoder takes what the encoder does not write"
    return True


def check_hello(data: bytes) -> bool:
    if refused(wire.read_hello, data):
        return False
    assert wire._hello_bytes(wire.read_hello(data), data[8:8 + wire.NONCE]) == data, "a hello that nobody says"
    return True


def check_payload(data: bytes, size: int = 100, dtype: DType = float32) -> bool:
    """Refused, or so many numbers."""
    def read(data: bytes) -> None:
        found = Payload(data).decode(K, size, dtype)
        assert found.shape == (size,) and found.dtype is dtype

    return not refused(read, data, ValueError)


def wire_target(data: bytes) -> None:
    """Bytes from anywhere, given to everything that reads bytes. Raises AssertionError where one of them is wrong."""
    check_body(data)
    check_hello(data)
    check_payload(data)
    assert refused(Link(b"bytes from outside, to nobody").receiver.open_frame, data), "a forged frame was taken"


class Link:
    """Two machines that have met, and the frames between them."""

    def __init__(self, secret: bytes, nonces: bytes = b"cs", called: bool = True):
        names = [wire.Hello("worker", 0, 0, "cpu"), wire.Hello("shard", 0, 0, "cpu")]
        caller, shard = (wire.Channel(secret, nonces[i:i + 1] * wire.NONCE, names[i], called=bool(i), limit=1 << 20)
                         for i in range(2))
        caller.meet(shard.hello)
        shard.meet(caller.hello)
        self.sender, self.receiver = (caller, shard) if called else (shard, caller)

    def seal(self, body: bytes) -> bytes:
        return b"".join(self.sender.seal_body([body]))

    def check(self, frame: bytes, due: bytes) -> bool:
        """A frame is taken if it is the one that is due; if not, the one that is due is taken still."""
        if frame != due:
            assert refused(self.receiver.open_frame, frame), "a forged frame was taken"
        self.receiver.open_frame(due)
        return frame == due


class Target:
    """A shard in the middle of its training: clock 2, version 2, of three microbatches one is there."""

    SHAPES: ClassVar = {"w": (10, 10), "b": (3,)}

    def __init__(self, consistency: Consistency):
        self.setup = Setup(self.SHAPES, float32, K, SGDRule(), as_hyper({"lr": 0.5}), 3, consistency=consistency)
        term = Term(1, 1, 2)
        values = {name: np.ones(shape, np.float32) for name, shape in self.SHAPES.items()}
        shard = Shard(0, self.setup)
        replay(shard, [Restore(term), Loaded(term, Checkpoint(2, values, {}))])
        self.version = shard.memory.version
        shard.step(self.push((K.full((100,), 1.0, float32), K.full((3,), 1.0, float32))))
        self.snapshot = shard.snapshot()

    def push(self, gradients: tuple[Any, ...]) -> Push:
        return Push(Identity(1, 0, 0), 1, 2, self.version, 0, 0.5, 1.0, gradients)

    def fits(self, push: Push) -> bool:
        """Whether a worker can have sent it."""
        who, far = push.identity, self.setup.consistency
        sizes = [int(np.prod(shape)) for shape in self.SHAPES.values()]
        return (min(who.worker, who.epoch, who.sequence, push.version, push.microbatch) >= 0 and push.microbatch < 3
                and 0 <= push.tokens < float("inf") and len(push.gradients) == len(sizes)
                and (far.asynchronous or (push.clock <= 2 + far.staleness and push.version <= 2))
                and all((g.shape, g.dtype) == ((n,), float32) if isinstance(g, Array) else check_payload(g.data, n)
                        for g, n in zip(push.gradients, sizes)))

    def check(self, push: Push) -> bool:
        """Refused, or such as a worker sends; if it is not, nothing has changed."""
        shard = Shard(0, self.setup)
        shard.resume(self.snapshot)
        before = bits(freeze(shard.snapshot()))
        taken = not refused(shard.step, push, ProtocolError)
        changed = bits(freeze(shard.snapshot())) != before
        assert not changed or (taken and self.fits(push)), f"a shard took {push!r}"
        return changed


# ── changes ───────────────────────────────────────────────────────────────────────────────────────────

FAR = np.zeros(4 * encoding.LARGE, np.uint8)
LENGTHS = (0, 1, 7, 255, 4096, (1 << 31) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)


def flip(random: Random, data: bytearray, _: bytes) -> None:
    for _bit in range(random.choice((1, 1, 1, 2, 8))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def set_byte(random: Random, data: bytearray, _: bytes) -> None:
    data[random.randrange(len(data))] = random.choice((0, 1, 2, 3, 8, 127, 128, 255))


def set_length(random: Random, data: bytearray, _: bytes) -> None:
    start = random.randrange(len(data))
    value = random.choice(LENGTHS) if random.random() < 0.7 else len(data) + random.randint(-9, 9)
    data[start:start + 8] = struct.pack("<Q", max(0, value))[:len(data) - start]


def cut(random: Random, data: bytearray, _: bytes) -> None:
    start = random.randrange(len(data))
    del data[start:random.choice((len(data), start + 1, start + 8))]


def extend(random: Random, data: bytearray, _: bytes) -> None:
    start = random.choice((len(data), random.randrange(len(data))))
    data[start:start] = random.choice((bytes(1), bytes(8), random.randbytes(random.randrange(1, 40))))


def splice(random: Random, data: bytearray, other: bytes) -> None:
    data[random.randrange(len(data)):] = other[random.randrange(max(1, len(other))):]


def repeat(random: Random, data: bytearray, _: bytes) -> None:
    start = random.randrange(len(data))
    data[start:start] = data[start:start + random.choice((1, 8, 24))]


POLYNOMIAL = int(f"{0x104C11DB7:b}"[::-1], 2)  # of CRC-32
CHANGES = (flip, flip, set_byte, set_length, set_length, cut, extend, splice, repeat)


def changed(random: Random, data: bytes, other: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if found:
            random.choice(CHANGES)(random, found, other)
    return bytes(found)


class Fuzzer:
    """Inputs of one seed. run() checks so many, and counts (what, whether it was taken)."""

    def __init__(self, seed: int):
        self.random = Random(seed)
        self.secret = self.random.randbytes(32)
        self.link = Link(self.secret)
        self.foreign = [Link(self.random.randbytes(32)), Link(self.secret, b"dt"), Link(self.secret, called=False)]
        self.targets = [Target(Consistency.parse(text, b)) for text, b in (("bsp", 0), ("ssp:1", 1), ("asp", 0))]
        self.old: list[bytes] = []  # frames that were taken
        self.counts: Counter[tuple[str, bool]] = Counter()
        self.input = b""  # the last one

    def run(self, inputs: int) -> None:
        kinds = (self._body, self._body, self._body, self._signed_again, self._frame, self._same_checksum,
                 self._foreign_frame, self._hello, self._segment, self._payload, self._push, self._noise)
        other = b""
        for _ in range(inputs):
            body = b"".join(encode(draw_message(self.random)))
            check = self.random.choice(kinds)
            taken = check(body, other)
            self.counts[check.__name__.strip("_"), bool(taken)] += 1
            other = body

    def _changed(self, data: bytes, other: bytes) -> bytes:
        self.input = changed(self.random, data, other)
        return self.input

    def _body(self, body: bytes, other: bytes) -> bool:
        return check_body(self._changed(body, other))

    def _signed_again(self, body: bytes, other: bytes) -> bool:
        """Behind the signature stands what a machine with a bug, or a traitor, could have signed."""
        link, body = self.link, self._changed(body, other)
        taken, frame = check_body(body), link.seal(body)
        if taken:
            link.receiver.open_frame(frame)
        else:
            assert refused(link.receiver.open_frame, frame), "a frame with a body that is no message was taken"
            link.sender.sent -= 1  # the turn is still its
        return taken

    def _frame(self, body: bytes, other: bytes) -> bool:
        due = self.link.seal(body)
        self.old = [*self.old[-20:], due]
        return self.link.check(self._changed(due, self.random.choice(self.old)), due)

    def _same_checksum(self, body: bytes, other: bytes) -> bool:
        """CRC-32 does not see a change by a multiple of its polynomial; bits count from the lowest of each byte."""
        due = self.link.seal(body)
        change = POLYNOMIAL << self.random.randrange(max(1, 8 * len(body) - 33))
        body = (int.from_bytes(body.ljust(5, b"\0"), "little") ^ change).to_bytes(max(5, len(body)), "little")
        self.input = due[:wire.PREFIX] + body + due[-wire.TAG:]
        return self.link.check(self.input, due)

    def _foreign_frame(self, body: bytes, other: bytes) -> bool:
        """Whole frames that are not due: repeated, ahead of their turn, or made elsewhere."""
        random, link = self.random, self.link
        due = link.seal(body)
        strange = [later := link.seal(body), *self.old[-3:]]
        link.sender.sent -= 1
        for foreign in self.foreign:
            foreign.sender.sent = link.receiver.taken  # in its turn, by its number
            strange.append(foreign.seal(b"".join(encode(Gone(self.random.randrange(1 << 40), 0)))))
        self.old = [*self.old[-20:], due]
        self.input = random.choice(strange)
        assert later != due
        return link.check(self.input, due)

    def _hello(self, body: bytes, other: bytes) -> bool:
        hello = _draw_object(self.random, "Hello", 0)
        return check_hello(self._changed(wire._hello_bytes(hello, self.random.randbytes(wire.NONCE)), other))

    def _segment(self, body: bytes, other: bytes) -> bool:
        """Messages whose large arrays lie in a segment, of the right size and of others."""
        sizes = [self.random.choice((encoding.LARGE, encoding.LARGE + 8)) for _ in range(self.random.choice((1, 1, 3)))]
        gradients = tuple(Array(FAR[:size].view(self.random.choice((np.uint8, np.float32)))) for size in sizes)
        far: list[np.ndarray] = []
        body = b"".join(encode(Push(Identity(0, 0, 0), 0, 0, 0, 0, 0.0, 1.0, gradients), far))
        end = 0
        for size in sizes:
            end += -end % encoding.FAR_ALIGNMENT + size
        if self.random.random() < 0.7:
            body = self._changed(body, other)
        else:
            end += self.random.choice((0, 0, 1, -1, 64, -encoding.LARGE))
        segment = FAR.data[:end]
        if refused(lambda data: decode(data, lambda: segment), body):
            return False
        far.clear()
        again = b"".join(encode(decode(body, lambda: segment), far))
        assert again == body, "the decoder takes what the encoder does not write"
        return True

    def _payload(self, body: bytes, other: bytes) -> bool:
        return check_payload(self._changed(_draw_payload(self.random).data, other))

    def _push(self, body: bytes, other: bytes) -> bool:
        """What is sent to a shard by somebody who has the secret."""
        random, target = self.random, self.random.choice(self.targets)
        gradients: list[Any] = [Array(np.frombuffer(random.randbytes(4 * n), np.float32)) for n in (100, 3)]
        if random.random() < 0.5:
            gradients[0] = _draw_payload(random)
        push = replace(target.push(tuple(gradients)), microbatch=1, identity=Identity(0, 0, 0))
        annotations = encoding._classes["Push"][1]
        for field in random.sample(sorted(annotations), random.choice((0, 1, 1, 2))):
            push = replace(push, **{field: draw(random, annotations[field])})
        self.input = b"".join(encode(push))
        if random.random() < 0.5:
            self._changed(self.input, other)
        found = None if refused(decode, self.input) else decode(self.input)
        if not isinstance(found, Push):
            return False
        return target.check(found if found.tokens else replace(found, tokens=1.0))  # a clock without any is an error

    def _noise(self, body: bytes, other: bytes) -> bool:
        start = self.random.choice((b"", wire.MAGIC, wire.HELLO_MAGIC, b"grad", body[:2]))
        self.input = start + self.random.randbytes(self.random.randrange(200))
        wire_target(self.input)
        return False


# ── slices and the ledger ─────────────────────────────────────────────────────────────────────────────

def run_slice(seed: int, inputs: int) -> dict[str, Any]:
    """Check so many inputs, and give the ledger's line."""
    fuzzer, start, failure = Fuzzer(seed), time.monotonic(), ""
    try:
        fuzzer.run(inputs)
    except Exception as error:  # whatever it is, it is the finding
        failure = f"{type(error).__name__}: {error}; input {fuzzer.input.hex()}"
    counts = {f"{kind} {'taken' if taken else 'refused'}": n for (kind, taken), n in sorted(fuzzer.counts.items())}
    return {"seed": seed, "inputs": sum(counts.values()), "seconds": round(time.monotonic() - start, 2), **counts,
            "failure": failure}


class Hang(Exception):
    """A slice has taken too much processor time."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bounds on memory, and on the processor time of a slice."""
    def hang(*_: Any) -> None:
        raise Hang(f"a slice took more than {SECONDS} seconds")

    signal.signal(signal.SIGPROF, hang)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> int:
    from tools.nightly import Ledger, commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of this commit, in all")
    parser.add_argument("--table", action="store_true", help="print what the ledger says and run nothing")
    parser.add_argument("--ledger", type=Path, default=ROOT / "build" / "fuzz-wire.jsonl")
    arguments = parser.parse_args()
    ledger = Ledger(arguments.ledger)

    def done() -> list[dict[str, Any]]:
        return [line for line in ledger.lines if line["commit"] == commit()]

    with contextlib.suppress(KeyboardInterrupt), bounded():
        while not arguments.table and sum(line["inputs"] for line in done()) < arguments.inputs:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            line = {**run_slice(len(ledger.lines), SLICE), "commit": commit()}
            ledger.add(line)
            if line["failure"]:
                break
    failures = [line["failure"] for line in done() if line["failure"]]
    total, seconds = sum(line["inputs"] for line in done()), sum(line["seconds"] for line in done())
    print("\n".join([*failures, f"{total:,} inputs on {commit()}, {total / max(seconds, 1e-9):,.0f} a second, "
                                f"{len(failures)} failures; {sum(line['inputs'] for line in ledger.lines):,} in all"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_program("fuzz_wire", main))
