"""Captured functions: bit for bit the function, call after call, whatever they are called with."""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from captured import CALLS, CPU, agree, bits, block_bytes, mlp, numbers

import engine as eg
from engine import optim
from engine.models import Transformer

pytestmark = pytest.mark.usefixtures("unwatched")

def test_a_chain_of_ops() -> None:
    captured = agree(lambda x, y: eg.softmax(eg.tanh(x @ y) + 1.0, -1).sum(0), (5, 7), (7, 3))
    [program] = captured.programs
    assert program.launches == 5 and 0 < program.memory < 1024


@pytest.mark.parametrize("function", [
    lambda x: x, lambda x: x[1:], lambda x: (x.T, x.T), lambda x: [x + 1, (x * 2)[0], (x * 2)[0]],
    lambda x: eg.zeros(3), lambda x: (eg.arange(4), x), lambda x: eg.tensor([1.0, 2.0]) + x[0, 0],
    lambda x: eg.sum(x), lambda x: (x > 0, eg.argmax(x, -1), (x * 8).to("int32")), lambda x: x.to("float64") * 2,
    lambda x: x[:0] * 2, lambda x: (x, 3, None, "text"), lambda x: eg.flip(x, 0) - x],
    ids=range(13))
def test_results_of_all_kinds(function: Callable[..., Any]) -> None:
    agree(function, (4, 3))


def test_sequences_keep_their_kind() -> None:
    pair = namedtuple("pair", "low high")
    captured = eg.capture(lambda x: {"both": pair(x - 1, x + 1), "list": [x]})
    for call in range(CALLS):
        found = captured(numbers((2,), call))
        assert isinstance(found["both"], pair) and isinstance(found["list"], list)


def step_of(model: Any) -> Callable[[eg.Tensor, eg.Tensor], eg.Tensor]:
    def step(x: eg.Tensor, target: eg.Tensor) -> eg.Tensor:
        loss = eg.cross_entropy(model(x), target)
        loss.backward()
        return loss
    return step


def train(capture: bool, make: Callable[[list[eg.Tensor]], Any], dropout: float = 0.0, steps: int = 8,
          zero: int = 1, autocast: str = "float32") -> list[Any]:
    """The bits of losses, parameters and gradients along a training of a small network."""
    model = mlp(dropout)
    optimizer = make(list(model.parameters()))
    step: Any = step_of(model)
    step = eg.capture(step, model) if capture else step
    found = []
    for i in range(steps):
        rng = np.random.default_rng(i)
        x, target = rng.standard_normal((10, 6)).astype(np.float32), rng.integers(0, 3, 10)
        with eg.seed(eg.Generator(5).at(i)), eg.autocast(autocast):
            loss = step(eg.tensor(x), eg.tensor(target))
        found.append(bits([loss, *[p.grad for p in model.parameters()]]))
        optimizer.step()
        if i % zero == 0:
            optimizer.zero_grad()
    return [*found, bits(list(model.parameters()))]


@pytest.mark.parametrize("options", [
    {}, {"dropout": 0.3}, {"zero": 3}, {"autocast": "bfloat16"}], ids=["plain", "dropout", "accumulated", "bfloat16"])
@pytest.mark.parametrize("make", [lambda p: optim.AdamW(p), lambda p: optim.SGD(p, lr=0.1, momentum=0.9)],
                         ids=["AdamW", "SGD"])
def test_training(make: Any, options: dict[str, Any]) -> None:
    assert train(True, make, **options) == train(False, make, **options)


KINDS: Sequence[dict[str, Any]] = [
    {"positions": "learned", "norm": "layer_norm", "activation": "gelu_tanh", "dropout": 0.1},
    {"positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "kv_heads": 1, "tie_weights": True,
     "bias": False},
    {"kind": "encoder_decoder", "positions": "sinusoidal"}]


@pytest.mark.parametrize("kind", KINDS, ids=["gpt2", "llama", "encoder_decoder"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_transformer(kind: dict[str, Any], threads: int) -> None:
    with eg.seed(0):
        model = Transformer(vocab_size=19, context_length=12, layers=2, heads=2, width=16, **kind)
    source = eg.tensor([[1, 2, 3, 4]] * 2) if model.encoder is not None else None

    def step(tokens: eg.Tensor, targets: eg.Tensor) -> eg.Tensor:
        loss = model.loss(tokens, targets, source)
        loss.backward()
        return loss

    captured, before = eg.capture(step, model), eg.get_num_threads()
    try:
        eg.set_num_threads(threads)
        for call in range(CALLS):
            text = np.random.default_rng(call).integers(0, 19, (2, 13))
            text[0, -3:] = -100 if call == 2 else text[0, -3:]  # the mean is over fewer
            tokens, targets = eg.tensor(np.maximum(text[:, :-1], 0)), eg.tensor(text[:, 1:])
            found = []
            for run in (step, captured):
                for p in model.parameters():
                    p.grad = None
                with eg.seed(eg.Generator(7).at(call)) as generator:
                    loss = bits(run(tokens, targets))
                found.append([loss, bits([p.grad for p in model.parameters()]), generator.site])
            assert found[0] == found[1]
    finally:
        eg.set_num_threads(before)


def test_gradients_of_arguments() -> None:
    def slope(x: eg.Tensor) -> eg.Tensor:
        y = (eg.sin(x) * x).sum()
        y.backward()
        return y

    captured = eg.capture(slope)
    for call in range(CALLS):
        x, y = (numbers((3, 4), call).requires_grad_() for _ in range(2))
        assert bits(slope(x)) == bits(captured(y)) and bits(x.grad) == bits(y.grad)
    agree(lambda x: eg.vjp(lambda a: eg.exp(a) * a, x)[0], (5,))


def test_two_backwards_add_to_what_is_there_as_the_function_does() -> None:
    w = numbers((3,), 0).requires_grad_()

    def both(x: eg.Tensor) -> None:
        (w * x).sum().backward()
        (eg.exp(w) * x).sum().backward()

    captured, found = eg.capture(both, [w]), []
    for run in (both, captured):
        w.grad = None
        for call in range(6):
            run(numbers((3,), call))
            if call < 2:
                w.grad = None
        found.append(bits(w.grad))
    assert found[0] == found[1]


def test_arguments_of_other_layouts() -> None:
    """Not dense, of overlapping memory, the same twice: what was recorded for one runs for all."""
    captured = eg.capture(lambda x, y: x * 2 + y)
    a = numbers((4, 6), 0)
    for x, y in ((a, a), (a, a), (a.T.reshape(4, 6), a), (a, numbers((4, 6), 1)), (numbers((6, 4), 2).T, a),
                 (eg.flip(a, 1), a[::1]), (a, a)):
        assert bits(captured(x, y)) == bits(x * 2 + y)
    assert len(captured.programs) == 2  # one of them for the same tensor twice


def test_writing_to_an_argument() -> None:
    def add_one(x: eg.Tensor) -> None:
        x += 1

    captured = eg.capture(add_one)
    with eg.no_grad():
        for call in range(CALLS):
            x = numbers((3,), call)
            want, version = x.numpy() + 1, x.array.storage.version
            captured(x)
            assert np.array_equal(x.numpy(), want) and x.array.storage.version > version


def first_moves(a: eg.Tensor, b: eg.Tensor) -> eg.Tensor:
    a += 1
    return a * b


def halves(seed: int) -> tuple[eg.Tensor, eg.Tensor]:
    x = numbers((9,), seed)
    return x[:6], x[3:]


PAIRS: list[Callable[[int], tuple[eg.Tensor, eg.Tensor]]] = [
    lambda seed: (numbers((6,), seed), numbers((6,), seed + 50)),
    lambda seed: (x := numbers((6,), seed), x),
    halves,
    lambda seed: (eg.flip(numbers((6,), seed), 0), numbers((6,), seed)),
    lambda seed: (numbers((6, 2), seed)[:, 1], numbers((6,), seed))]


@pytest.mark.parametrize("recorded", range(len(PAIRS)))
@pytest.mark.parametrize("run", range(len(PAIRS)))
def test_writing_to_what_shares_memory_or_is_not_dense(recorded: int, run: int) -> None:
    """Whichever pair is recorded, and whichever it is run for."""
    captured = eg.capture(first_moves)
    with eg.no_grad():
        for call, pair in enumerate([recorded] * 3 + [run] * 3):
            ours, theirs = PAIRS[pair](call), PAIRS[pair](call)
            assert bits(captured(*ours)) == bits(first_moves(*theirs))
            assert bits(list(ours)) == bits(list(theirs))


def test_parameters_that_move() -> None:
    """What it reads may have other memory in each call, and other shapes: then it is recorded anew."""
    w = numbers((3,), 0)
    captured = eg.capture(lambda x: x * w, w)
    for call in range(6):
        w.array = numbers((3 if call < 4 else 1,), call).array
        x = numbers((3,), 9)
        assert bits(captured(x)) == bits(x * w)


def test_what_belongs_to_the_way_of_a_call() -> None:
    model = mlp(0.5)
    captured = eg.capture(lambda x, scale=1.0: model(x) * scale, model)

    def held(*args: Any, **options: Any) -> None:
        with eg.seed(1):
            want = bits(model(args[0]) * (options or {"scale": (*args, 1.0)[1]})["scale"])
        with eg.seed(1):
            assert bits(captured(*args, **options)) == want

    with eg.no_grad():
        x = numbers((2, 6), 0)
        for training in (True, False, True):
            model.train(training)
            for _ in range(3):
                held(x)
                held(x, 2)
                held(x, 2.5)
                held(x, scale=3.0)
                held(numbers((4, 6), 1))
        with eg.autocast("bfloat16"):
            for _ in range(3):
                held(x)
    assert len(captured.programs) == 2 * 5 + 1


def test_each_thread_records_for_itself() -> None:
    captured, found = eg.capture(lambda x: eg.exp(x) @ x), {}

    def work(i: int) -> None:
        found[i] = [bits(captured(numbers((8, 8), i + j))) for j in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        assert found[i] == [bits(eg.exp(x) @ x) for x in (numbers((8, 8), i + j) for j in range(20))]


def test_results_are_new_in_each_call_and_the_arena_is_not() -> None:
    captured = eg.capture(lambda x: eg.exp(x) + 1)
    made = [captured(numbers((1000,), call)) for call in range(6)]
    assert len({y.numpy().ctypes.data for y in made}) == 6
    [program] = captured.programs
    assert program.memory == block_bytes(4000) and len(program.lifetimes) == 1


def test_what_was_recorded_is_not_kept() -> None:
    """But for the arena, and what was there before."""
    captured = eg.capture(lambda x: [eg.exp(eg.sin(x)) for _ in range(20)])
    for call in range(2):
        captured(numbers((250_000,), call))  # 1 MB each
    live = CPU.pool.figures().live
    made = [captured(numbers((250_000,), call)) for call in range(2, 4)]
    assert CPU.pool.figures().live - live > 2 * 20 * 1_000_000
    del made
    assert CPU.pool.figures().live == live and captured.programs[0].memory < 2_500_000
    del captured
    assert CPU.pool.figures().live < live - 1_000_000
