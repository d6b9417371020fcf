"""Captured functions: bit for bit the function, whatever it is called with; what cannot be captured says so."""

from __future__ import annotations

import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import engine as eg
from engine import nn, optim
from engine.backend import finishers, get_backend, observers
from engine.backend.recording import recording
from engine.models import Transformer

CPU: Any = get_backend("cpu")
pytestmark = pytest.mark.skipif(not CPU.records or bool(finishers), reason="no compiled kernels, or guard zones")

CALLS = 4  # as it is, recorded, run again twice


def numbers(shape: tuple[int, ...], seed: int) -> eg.Tensor:
    return eg.tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def bits(x: Any) -> Any:
    """Something that is equal for equal bits: of tensors, alone or in sequences."""
    if isinstance(x, eg.Tensor):
        return x.shape, str(x.dtype), x.numpy().tobytes()
    return [bits(part) for part in x] if isinstance(x, (tuple, list)) else x


def agree(function: Callable[..., Any], *shapes: tuple[int, ...], reads: Any = (), calls: int = CALLS) -> Any:
    """Hold a captured function against itself, on other numbers in each call; returns it."""
    captured = eg.capture(function, reads)
    kept = []
    for call in range(calls):
        given = [numbers(shape, 10 * call + i) for i, shape in enumerate(shapes)]
        with eg.seed(eg.Generator(3).at(call)):
            want = bits(function(*given))
        with eg.seed(eg.Generator(3).at(call)):
            kept.append((captured(*given), want))
    assert [bits(got) for got, _ in kept] == [want for _, want in kept]  # after all calls: nothing was written over
    assert len(captured.programs) == 1
    return captured


# ── the same bits ─────────────────────────────────────────────────────────────────────────────────────

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


class Network(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(6, 16), nn.Dropout(dropout), nn.Linear(16, 3)

    def forward(self, x: eg.Tensor) -> eg.Tensor:
        return self.last(self.dropout(eg.gelu(self.first(x))))


def mlp(dropout: float = 0.0) -> nn.Module:
    with eg.seed(0):
        return Network(dropout)


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
    assert program.memory == 4096 and len(program.lifetimes) == 1


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


# ── what is there besides arguments ───────────────────────────────────────────────────────────────────

def test_a_closure_is_not_the_argument_that_was_recorded() -> None:
    x, other = numbers((3,), 0), numbers((3,), 1)
    times = eg.capture(lambda a: a * x)
    for a in (x, x, other, x, other):
        assert bits(times(a)) == bits(a * x)
    whole = numbers((5, 3), 2)
    against_mean = eg.capture(lambda row: row - whole.sum(0))
    for row in (whole[0], whole[0], other, whole[4]):
        assert bits(against_mean(row)) == bits(row - whole.sum(0))


def test_a_part_of_what_it_reads_and_more_than_that() -> None:
    w, whole = numbers((4, 3), 0), numbers((4, 3), 1)
    part = eg.capture(lambda x: w[1] * x, [w])
    for call in range(4):
        w.array = numbers((4, 3), call).array
        assert bits(part(whole[0])) == bits(w[1] * whole[0])
    more = eg.capture(lambda x: whole * x, [whole[:2]])
    more(whole[0])
    with pytest.raises(RuntimeError, match="capture: multiply takes more of an array than what is given of it"):
        more(whole[0])


def gradients_are_handled(change: Callable[[eg.Tensor, Any], Any]) -> None:
    """Hold a function that does something with .grad against itself, with and without gradients that are there."""
    found = []
    for capture in (False, True):
        w = numbers((3,), 0).requires_grad_()

        def function(x: eg.Tensor, w: eg.Tensor = w) -> Any:
            return change(w, lambda: (w * w * x).sum().backward())

        run, kept = eg.capture(function, [w]) if capture else function, []
        for call in range(8):
            if call % 4 == 2:
                w.grad = None
            kept.append(bits(run(numbers((3,), call))))
            kept.append(bits(w.grad))
        found.append(kept)
    assert found[0] == found[1]


@pytest.mark.parametrize("change", [
    lambda w, backward: backward(),
    lambda w, backward: [setattr(w, "grad", None), backward()][1],
    lambda w, backward: [backward(), setattr(w, "grad", w.grad * 0.5)][1],
    lambda w, backward: [backward(), w.grad * 1, setattr(w, "grad", None)][1],
    lambda w, backward: [backward(), optim.clip_grad_value_([w], 0.1)][1],
    lambda w, backward: [w * 1 if w.grad is None else w.grad * 2, backward()][0].detach(),
    lambda w, backward: [backward(), backward()][1],
    lambda w, backward: [backward(), w.grad][1]], ids=range(8))
def test_functions_that_handle_gradients(change: Any) -> None:
    gradients_are_handled(change)


def test_one_tensor_in_several_places() -> None:
    w = numbers((33,), 0).requires_grad_()

    def slope(a: eg.Tensor, b: eg.Tensor) -> None:
        ((a * a * b).sum() + (a * b * b).sum() + (a * w).sum()).backward()

    captured, x, y = eg.capture(slope, [w]), numbers((33,), 1), numbers((33,), 2)
    for run_first in (captured, slope):
        for a, b in ((x, x), (x, y), (w, x), (w, w)) * 3:
            found = []
            for run in (run_first, slope):
                for t in (w, x, y):
                    t.grad = None
                    t.requires_grad_()
                run(a, b)
                found.append(bits([w.grad, x.grad, y.grad]))
            assert found[0] == found[1]


def test_buffers_and_replaced_parameters() -> None:
    model: Any = mlp()
    model.register_buffer("offset", numbers((3,), 0))
    captured, x = eg.capture(lambda x: (model(x) + model.offset).detach(), model), numbers((2, 6), 1)
    for call in range(8):
        if call == 3:
            model.offset.array = numbers((3,), 5).array
        if call == 4:
            model.offset = numbers((3,), 6)
        if call == 5:
            model.to("float64").to("float32")
            model.offset.copy_(numbers((3,), 7))
        if call == 6:
            model.last.weight = nn.Parameter(numbers((3, 16), 8))
        with eg.no_grad():
            assert bits(captured(x)) == bits(model(x) + model.offset)


def test_equal_is_not_identical() -> None:
    with eg.no_grad():
        sign = eg.capture(lambda x, y: x * y)
        for y in (0.0, -0.0, 0, False, float("nan"), 1, True, 1.0) * 3:
            x = numbers((3,), 0)
            assert bits(sign(x, y)) == bits(x * y)
        assert len(sign.programs) == 8
        scaled = eg.capture(lambda x, pair: x.to("int64") * pair[0])
        for pair in ((2,), (2.0,)) * 3:
            assert bits(scaled(x, pair)) == bits(x.to("int64") * pair[0])


def test_further_kinds_of_calls_take_the_place_of_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["engine.capture"], "KEPT", 3)
    captured = eg.capture(lambda x, n: x * n)
    for n in (1, 2, 3, 4, 5):
        for _ in range(2):
            captured(numbers((2,), 0), n)
    assert len(captured.programs) == 3


# ── what happens again besides launches ───────────────────────────────────────────────────────────────

def test_checks_of_elements_happen_again() -> None:
    table = numbers((5, 2), 0)
    look_up = eg.capture(lambda i: eg.embedding(table, i))
    loss = eg.capture(lambda x, t: eg.cross_entropy(x, t))
    for _ in range(3):
        look_up(eg.tensor([0, 4]))
        loss(table, eg.tensor([1, 0, 1, -100, 0]))
    with pytest.raises(IndexError, match=r"embedding: index holds 5, expected whole numbers in \[0, 5\)"):
        look_up(eg.tensor([0, 5]))
    with pytest.raises(IndexError, match=r"cross_entropy: target holds 2, expected classes in \[0, 2\)"):
        loss(table, eg.tensor([1, 0, 1, 2, 0]))
    assert bits(look_up(eg.tensor([1, 2]))) == bits(table[1:3])


def test_while_kernels_are_observed_it_is_called_as_it_is() -> None:
    captured, seen = eg.capture(lambda x: eg.exp(x)), []
    for call in range(3):
        captured(numbers((3,), call))
    x = numbers((3,), 9)
    observers.append(lambda name, _: seen.append(name))
    try:
        captured(x)
    finally:
        observers.pop()
    assert seen == ["exp"]


def test_captured_inside_captured() -> None:
    inner = eg.capture(lambda x: eg.exp(x) * 2)
    agree(lambda x: inner(x) + inner(x + 1), (4,))


def test_other_devices_are_called_as_they_are() -> None:
    captured = eg.capture(lambda x: eg.exp(x))
    for _ in range(3):
        assert captured(eg.tensor([0.0], device="reference")).device == "reference"
    assert captured.programs == []


# ── what cannot be captured ───────────────────────────────────────────────────────────────────────────

W = eg.tensor([1.0, 2.0], requires_grad=True)
OTHER = eg.tensor([3.0, 4.0], requires_grad=True)
REFUSED: dict[str, tuple[Callable[[eg.Tensor], Any], str]] = {
    "item": (lambda x: eg.exp(x).sum().item(), "elements are read on the host"),
    "an argument's elements": (lambda x: x.numpy().sum(), "elements are read on the host"),
    "bool": (lambda x: x if (x > 0).all() else -x, "elements are read on the host"),
    "nonzero": (lambda x: eg.nonzero(x), "elements are read on the host"),
    "an index": (lambda x: W.detach()[(x > 9).to("int64")], "elements are read on the host"),
    "print": (lambda x: str(x), "elements are read on the host"),
    "norm": (lambda x: [(W * x).sum().backward(), optim.clip_grad_norm_([W], 1.0)], "on the host"),  # type: ignore
    "step": (lambda x: optim.SGD([W]).step(), r"SGD\.step would not happen again"),
    "seed": (lambda x: _seeded(x), "a generator of their own"),
    "generator": (lambda x: eg.dropout(x, 0.5, generator=eg.Generator(4)), "a generator of their own"),
    "moved": (lambda x: [eg.default_generator().at(3), eg.dropout(x, 0.5)][1], "Generator.at would not happen"),
    "cache": (lambda x: nn.attention.KeyValueCache(1, 1, 4, 2).append(*[x.reshape(1, 1, 1, 2)] * 2),
              r"KeyValueCache\.append would not happen again"),
    "graph": (lambda x: W * x, "its graph would be lost"),
    "a gradient's graph": (lambda x: (W * W * x).sum().backward(create_graph=True), "has a graph"),
    "a row-sparse gradient": (lambda x: _sparse(), "elements are read on the host"),
    "another leaf": (lambda x: (OTHER * x).sum().backward(), r"a leaf of shape \(2,\) that is neither an argument"),
    "writing elsewhere": (lambda x: OTHER.detach().copy_(x), "writes to memory that is neither given nor made"),
    "a closure's elements": (lambda x: x * OTHER.detach().sum().item(), "elements are read on the host"),
    "a change in a graph": (lambda x: _rebound(x), "becomes another"),
    "an equal generator": (lambda x: eg.dropout(x, 0.5, generator=eg.Generator(1)), "a generator of their own"),
    "an equal seed": (lambda x: _seeded(x, 1), "a generator of their own"),
    "a scaler": (lambda x: optim.GradScaler().scale(x), r"GradScaler\.scale would not happen again"),
}


def _seeded(x: eg.Tensor, seed: int = 9) -> eg.Tensor:
    with eg.seed(seed):
        return eg.dropout(x, 0.5)


def _sparse() -> None:
    eg.embedding(W.reshape(2, 1), eg.tensor([0]), sparse=True).sum().backward()


def _rebound(x: eg.Tensor) -> None:
    x *= W
    x.sum().backward()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_says_so(name: str) -> None:
    function, message = REFUSED[name]
    captured, x = eg.capture(function, [W]), eg.tensor([1.0, 2.0])
    with eg.seed(1), pytest.raises(RuntimeError, match="capture: .*" + message) as caught:
        for _ in range(2):
            W.grad = None
            captured(x * 1)
    assert "\n" not in str(caught.value)
    W.grad = None
    assert recording() is None and CPU.pool.allocated is None
    agree(lambda x: x + 1, (2,))  # nothing is left behind


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"capture: reads is \[3\], expected a module, a tensor, or a list"):
        eg.capture(abs, [3])
    with pytest.raises(TypeError, match="capture: argument 1 is list, expected a tensor or something that can be ha"):
        eg.capture(lambda x, y: x)(W.detach(), [1])
    with pytest.raises(RuntimeError, match="capture: argument x was made by exp, and no gradient flows back"):
        eg.capture(lambda x: x)(x=eg.exp(W))
    for reads in (3, None, "text"):
        with pytest.raises(TypeError, match=r"capture: reads is .*, expected a module, a tensor, or a list of them"):
            eg.capture(abs, reads)
    with pytest.raises(TypeError, match="capture: argument 1 holds a tensor"):
        eg.capture(lambda x, pair: x)(W.detach(), (1, W))
    with pytest.raises(TypeError, match="capture: argument 0 is list"):
        eg.capture(lambda pair: pair[0])(([2], 1))
    with pytest.raises(TypeError, match="capture: a result is set, expected tensors"):
        eg.capture(lambda x: {1})(W.detach())
    captured = eg.capture(lambda x: x + 1, [numbers((2, 3), 0).T])
    captured(numbers((2,), 0))
    with pytest.raises(ValueError, match=r"reads has a tensor of shape \(3, 2\) that is not dense"):
        captured(numbers((2,), 0))


def test_an_error_while_it_is_recorded_leaves_nothing_behind() -> None:
    fails = [False, True, False, False]

    def function(x: eg.Tensor) -> eg.Tensor:
        y = eg.exp(x)
        if fails.pop(0):
            raise KeyboardInterrupt
        return y

    captured, x = eg.capture(function), numbers((3,), 0)
    captured(x)
    with pytest.raises(KeyboardInterrupt):
        captured(x)
    assert recording() is None and observers == [] and CPU.pool.allocated is None
    for _ in range(3):
        assert bits(captured(x)) == bits(eg.exp(x))
