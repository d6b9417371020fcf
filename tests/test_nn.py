"""Modules and layers: what a module knows of its parameters, and every layer against NumPy and against differences."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import engine as eg
from engine import nn

DEVICES = ["cpu", "reference"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with eg.device(request.param), eg.seed(0):
        yield request.param


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
        self.register_buffer("offset", eg.ones(2))
        self.register_buffer("scratch", eg.zeros(2), persistent=False)

    def forward(self, x: eg.Tensor) -> eg.Tensor:
        return self.second(eg.relu(self.first(x))) + self.offset


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def random(*shape: int) -> eg.Tensor:
    return eg.randn(*shape, dtype=eg.float64)


# ── Module ────────────────────────────────────────────────────────────────────────────────────────────

def test_an_attributes_role_follows_from_what_is_assigned() -> None:
    module = Pair()
    assert names(module) == ["first.weight", "first.bias", "second.weight"]
    assert [name for name, _ in module.named_buffers()] == ["offset", "scratch"]
    assert [name for name, _ in module.named_modules()] == ["", "first", "second"]
    assert module.num_parameters() == 12 + 4 + 8
    module.plain = eg.ones(3)  # neither requires grad nor announced
    module.gain = nn.Parameter(eg.ones(3))
    assert names(module)[0] == "gain" and "plain" not in names(module)
    module.first.bias = None
    del module.gain
    module.second = "no longer a module"
    assert names(module) == ["first.weight"]


def test_a_frozen_parameter_stays_a_parameter() -> None:
    module = Pair()
    module.requires_grad_(False)
    assert names(module) == ["first.weight", "first.bias", "second.weight"]
    assert not module(eg.ones(1, 3)).requires_grad


@pytest.mark.parametrize("value", ["an op's result", "a constant"])
def test_a_parameter_cannot_be_replaced_by_something_else(value: str) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"Linear: weight is a parameter.*nn\.Parameter"):
        layer.weight = layer.weight * 2 if value == "an op's result" else eg.ones(2, 2)


def test_a_shared_parameter_comes_once_and_loads_under_any_of_its_names() -> None:
    def tied() -> Pair:
        module = Pair()
        module.second = nn.Linear(3, 4, bias=False)
        module.second.weight = module.first.weight
        return module

    module = tied()
    assert names(module) == ["first.weight", "first.bias"]
    assert [n for n, _ in module.named_parameters(remove_duplicate=False)][-1] == "second.weight"
    state = module.state_dict()
    renamed = {"second.weight" if name == "first.weight" else name: value for name, value in state.items()}
    other = tied()
    other.load_state_dict(renamed)
    assert np.array_equal(other.first.weight.numpy(), module.first.weight.numpy())


def test_modes_reach_every_submodule() -> None:
    module = nn.Sequential(nn.Dropout(0.5), Pair())
    assert module.eval() is module
    assert not any(m.training for _, m in module.named_modules())
    assert all(m.training for _, m in module.train().named_modules())


def test_apply_goes_from_the_inside_out() -> None:
    seen: list[str] = []
    nn.Sequential(Pair()).apply(lambda module: seen.append(type(module).__name__))
    assert seen == ["Linear", "Linear", "Pair", "Sequential"]


def test_containers_hold_modules_in_order() -> None:
    row = nn.ModuleList([nn.Linear(2, 3)])
    row.append(nn.Linear(3, 4))
    assert len(row) == 2 and [type(m).__name__ for m in row] == ["Linear", "Linear"]
    assert row[-1].weight.shape == (4, 3)
    assert names(nn.Sequential(*row)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = eg.randn(5, 2)
    assert np.array_equal(nn.Sequential(*row)(x).numpy(), row[1](row[0](x)).numpy())


def test_forward_must_be_defined() -> None:
    with pytest.raises(NotImplementedError, match=r"Module: forward\(\) is not defined"):
        nn.Module()(1)


def test_to_converts_in_place_with_gradients() -> None:
    module = Pair()
    weight = module.first.weight
    module(eg.ones(1, 3)).sum().backward()
    assert module.to("float64") is module and module.first.weight is weight
    assert weight.dtype is eg.float64 and weight.grad is not None and weight.grad.dtype is eg.float64
    assert module.offset.dtype is eg.float64
    module.to(device="reference")
    assert weight.device == "reference" and module.scratch.device == "reference" and weight.grad.device == "reference"
    module.to("cpu").zero_grad()
    assert weight.grad is None
    with pytest.raises(TypeError, match=r"Module\.to: dtype is int64, expected float32 or float64"):
        module.to(eg.int64)


def test_modules_are_copied_and_pickled_whole() -> None:
    module, x = Pair(), eg.ones(1, 3)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert names(again) == names(module) and np.array_equal(again(x).numpy(), module(x).numpy())
        again.first.weight.detach().zero_()
        assert module.first.weight.numpy().any()


def test_repr_shows_the_tree_and_counts() -> None:
    text = repr(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3), nn.ModuleList([nn.RMSNorm(4)])))
    assert text.split("\n") == ["Sequential()  22 parameters", "  0–1: 2 × Linear(2, 3)  9 parameters",
                                "  2: ModuleList()  4 parameters", "    0: RMSNorm(4, eps=1e-06)  4 parameters"]


def test_a_row_holds_modules_only() -> None:
    with pytest.raises(TypeError, match="Sequential: item 1 is Op, expected a Module"):
        nn.Sequential(nn.Linear(2, 3), eg.relu, nn.Linear(3, 1))
    with pytest.raises(TypeError, match="ModuleList: item 0 is list, expected a Module"):
        nn.ModuleList([[nn.Linear(2, 3)]])


def test_a_tensor_takes_the_place_of_a_module() -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    module.extra = nn.Linear(2, 2)
    module.extra = eg.ones(1)
    assert [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias"]


# ── state ─────────────────────────────────────────────────────────────────────────────────────────────

def test_state_dict_goes_round() -> None:
    module, other = Pair(), Pair()
    state = module.state_dict()
    assert list(state) == ["first.weight", "first.bias", "second.weight", "offset"]
    assert not any(value.requires_grad for value in state.values())
    assert state["first.weight"].array.data.base is module.first.weight.array.data.base  # the same memory
    other.load_state_dict({name: value.numpy() for name, value in state.items()})
    for name, value in other.state_dict().items():
        assert np.array_equal(value.numpy(), state[name].numpy())


def test_load_state_dict_names_what_does_not_fit_and_loads_nothing() -> None:
    module = Pair()
    before = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    state = {name: value + 1 for name, value in before.items() if name != "first.bias"}
    for changes, message in [
        ({}, "missing: first.bias"),
        ({"first.bias": np.ones(4), "third": np.ones(1)}, "unexpected: third"),
        ({"first.bias": np.ones(5)}, r"of another shape: first.bias is \(5,\), expected \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=r"Pair.load_state_dict: " + message):
            module.load_state_dict({**state, **changes})
    with pytest.raises(ValueError, match="another shape"):  # also without strict
        module.load_state_dict({**state, "first.bias": np.ones(5)}, strict=False)
    for name, value in module.state_dict().items():
        assert np.array_equal(value.numpy(), before[name])
    for wrong in (np.array(list("abcd")), np.ones(4, complex), np.array([None] * 4)):
        with pytest.raises(TypeError, match=r"Pair\.load_state_dict: expected real numbers; first\.bias is"):
            module.load_state_dict({**state, "first.bias": wrong})
    for name, value in module.state_dict().items():
        assert np.array_equal(value.numpy(), before[name])
    module.load_state_dict({"first.bias": np.full(4, 7.0), "third": np.ones(1)}, strict=False)
    assert np.array_equal(module.first.bias.numpy(), np.full(4, 7.0, np.float32))
    assert np.array_equal(module.first.weight.numpy(), before["first.weight"])


def test_loading_is_seen_by_a_tape_that_saved_the_old_weights() -> None:
    module = Pair()
    loss = module(eg.ones(1, 3)).sum()
    module.load_state_dict(Pair().state_dict())
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_read_only_parameters_are_not_loaded() -> None:
    module = Pair()
    module.second.weight.array.data.flags.writeable = False  # as those that a parameter server lends
    with pytest.raises(ValueError, match=r"read-only here: second\.weight"):
        module.load_state_dict(Pair().state_dict())


# ── initial weights ───────────────────────────────────────────────────────────────────────────────────

def test_initial_weights_come_from_the_default_generator() -> None:
    def drawn(seed: int) -> np.ndarray:
        with eg.seed(seed):
            return np.concatenate([p.numpy().ravel() for p in Pair().parameters()])

    assert np.array_equal(drawn(3), drawn(3)) and not np.array_equal(drawn(3), drawn(4))


def test_initial_weights_have_the_size_they_should() -> None:
    with eg.seed(0):
        uniform, normal, table = nn.Linear(100, 400), nn.Linear(100, 400, std=0.02), nn.Embedding(400, 100, std=0.5)
    n = 40_000
    assert np.abs(uniform.weight.numpy()).max() <= 0.1 and np.abs(uniform.bias.numpy()).max() <= 0.1
    # A sample variance of n normal numbers is off by √(2/n), relatively; 5 of those. For uniform ones √(0.8/n).
    assert abs(uniform.weight.numpy().var() / (0.1**2 / 3) - 1) < 5 * math.sqrt(0.8 / n)
    assert abs(normal.weight.numpy().var() / 0.02**2 - 1) < 5 * math.sqrt(2 / n)
    assert abs(table.weight.numpy().var() / 0.5**2 - 1) < 5 * math.sqrt(2 / n)
    assert not normal.bias.numpy().any()


# ── layers against NumPy ──────────────────────────────────────────────────────────────────────────────

def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def affine(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    y = x @ layer.weight.numpy().T
    return y if layer.bias is None else y + layer.bias.numpy()


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}


def close(y: eg.Tensor, expected: np.ndarray) -> None:
    # Sums of at most 100 terms of size 1: each rounding is 1.1e-16.
    assert y.shape == expected.shape
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=2e-14)


def test_norms(device: str) -> None:
    x = random(2, 3, 8) * 3 + 1
    layer, plain, rms = nn.LayerNorm(8, eps=1e-3), nn.LayerNorm(8, bias=False), nn.RMSNorm(8, eps=1e-3)
    with eg.no_grad():
        for p in nn.ModuleList([layer, plain, rms]).to("float64").parameters():
            p.copy_(random(8))
    data = x.numpy()
    centred = data - data.mean(-1, keepdims=True)
    variance = data.var(-1, keepdims=True)
    close(layer(x), layer.weight.numpy() * centred / np.sqrt(variance + 1e-3) + layer.bias.numpy())
    close(plain(x), plain.weight.numpy() * centred / np.sqrt(variance + 1e-5))
    close(rms(x), rms.weight.numpy() * data / np.sqrt((data**2).mean(-1, keepdims=True) + 1e-3))


@pytest.mark.parametrize("activation", list(FORMULAS))
def test_feed_forward(device: str, activation: str) -> None:
    layer = nn.FeedForward(6, 10, activation).to("float64")
    x = random(2, 3, 6)
    f, data = FORMULAS[activation], x.numpy()
    inner = f(affine(layer.up, data)) if layer.gate is None else f(affine(layer.gate, data)) * affine(layer.up, data)
    close(layer(x), affine(layer.down, inner))


def test_embedding_and_linear(device: str) -> None:
    table, linear = nn.Embedding(7, 4).to("float64"), nn.Linear(4, 3).to("float64")
    index = eg.tensor([[0, 6, 3], [3, 3, 1]])
    rows = table(index)
    close(rows, table.weight.numpy()[index.numpy()])
    close(linear(rows), affine(linear, rows.numpy()))


def rotated(x: np.ndarray) -> np.ndarray:
    """Rotary positions by complex numbers: pair (i, i + d/2) of position t turns by t · 10000^(−2i/d)."""
    time, d = x.shape
    turn = np.exp(1j * np.outer(np.arange(time), 10000.0 ** (-np.arange(0, d, 2) / d)))
    z = (x[:, :d // 2] + 1j * x[:, d // 2:]) * turn
    return np.concatenate([z.real, z.imag], axis=1)


def attention_by_hand(layer: nn.MultiHeadAttention, x: np.ndarray, context: np.ndarray, allowed: np.ndarray,
                      rotary: bool = False) -> np.ndarray:
    """Head by head, row by row: allowed (batch, T, S) says which keys a query may see."""
    d, group = layer.head_width, layer.heads // layer.kv_heads
    out = np.zeros_like(x)
    for b in range(len(x)):
        q, k, v = affine(layer.query, x[b]), affine(layer.key, context[b]), affine(layer.value, context[b])
        for head in range(layer.heads):
            mine, shared = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
            qh, kh = (rotated(q[:, mine]), rotated(k[:, shared])) if rotary else (q[:, mine], k[:, shared])
            scores = np.where(allowed[b], qh @ kh.T / math.sqrt(d), -np.inf)
            out[b][:, mine] = softmax(scores) @ v[:, shared]
    return affine(layer.output, out)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", ["full", "causal", "lengths", "bool mask", "added mask", "cross", "rotary"])
def test_attention(device: str, kv_heads: int, case: str) -> None:
    layer = nn.MultiHeadAttention(16, 4, kv_heads).to("float64")
    x, context = random(2, 5, 16), random(2, 7, 16)
    allowed = np.ones((2, 5, 5), bool)
    if case == "cross":
        y = layer(x, context, lengths=eg.tensor([7, 3]))
        allowed = np.broadcast_to(np.arange(7) < np.array([7, 3])[:, None, None], (2, 5, 7))
        close(y, attention_by_hand(layer, x.numpy(), context.numpy(), allowed))
        return
    if case in ("causal", "rotary"):
        allowed = np.tril(allowed)
        rotary = eg.rope_table(5, 4, dtype=eg.float64) if case == "rotary" else None
        y = layer(x, causal=True, rotary=rotary)
    elif case == "lengths":
        allowed = np.broadcast_to(np.arange(5) < np.array([2, 5])[:, None, None], (2, 5, 5))
        y = layer(x, lengths=eg.tensor([2, 5]))
    elif case.endswith("mask"):
        allowed = np.random.default_rng(0).random((2, 5, 5)) < 0.6
        allowed[:, :, 0] = True
        mask = allowed if case == "bool mask" else np.where(allowed, 0.0, -np.inf)
        y = layer(x, mask=eg.tensor(mask[:, None]))
    else:
        y = layer(x)
    close(y, attention_by_hand(layer, x.numpy(), x.numpy(), allowed, rotary=case == "rotary"))


def test_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="width is 10 and heads 4, expected a multiple"):
        nn.MultiHeadAttention(10, 4)
    with pytest.raises(ValueError, match="heads is 4 and kv_heads 3, expected a multiple"):
        nn.MultiHeadAttention(16, 4, 3)


def test_dropout(device: str) -> None:
    layer = nn.Dropout(0.25)
    x = eg.ones(100, 100)
    with eg.seed(1):
        y = layer(x).numpy()
    with eg.seed(1):
        again = layer(x).numpy()
    assert np.array_equal(y, again)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / x.size)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match=r"Dropout: p is 1.0, expected a probability in \[0, 1\)"):
        nn.Dropout(1.0)


# ── gradients against central differences ─────────────────────────────────────────────────────────────

LAYERS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "Linear": lambda: (nn.Linear(5, 3), (2, 4, 5)),
    "LayerNorm": lambda: (nn.LayerNorm(6), (2, 3, 6)),
    "RMSNorm": lambda: (nn.RMSNorm(6), (2, 3, 6)),
    "gelu": lambda: (nn.FeedForward(4, 8, "gelu"), (2, 3, 4)),
    "gelu_tanh": lambda: (nn.FeedForward(4, 8, "gelu_tanh"), (2, 3, 4)),
    "swiglu": lambda: (nn.FeedForward(4, 8, "swiglu"), (2, 3, 4)),
    "attention": lambda: (nn.MultiHeadAttention(8, 4, 2), (2, 5, 8)),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_gradients(device: str, name: str) -> None:
    """d/dh f(x + h v) at 0 is ⟨∇f, v⟩, for every parameter and the input along a random direction v.

    With h = 1e-4 a central difference is off by h²/6 times the third derivative, and by the rounding of f over h:
    1e-12 each, for functions of size 1 to 100. So 1e-8 relatively is far from both and far from a wrong gradient.
    """
    layer, shape = LAYERS[name]()
    layer.to("float64")
    x, weight = random(*shape).requires_grad_(), random(*shape[:-1], layer(random(*shape)).shape[-1])

    def f() -> eg.Tensor:
        return (layer(x) * weight).sum()

    f().backward()
    for label, p in [*layer.named_parameters(), ("input", x)]:
        assert p.grad is not None, label
        direction, start, h = random(*p.shape).numpy(), p.numpy().copy(), 1e-4
        with eg.no_grad():
            p.copy_(eg.tensor(start + h * direction))
            above = f().item()
            p.copy_(eg.tensor(start - h * direction))
            below = f().item()
            p.copy_(eg.tensor(start))
        slope, expected = (above - below) / (2 * h), float((p.grad.numpy() * direction).sum())
        # (The whole gradient's size, since the components may cancel: the keys' bias has gradient 0.)
        size = float(np.abs(p.grad.numpy() * direction).sum())
        assert abs(slope - expected) < 1e-7 * size + 1e-9, label


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("pieces", [[6], [1] * 6, [2, 3, 1]])
def test_attention_with_a_cache_is_attention(device: str, pieces: list[int]) -> None:
    layer = nn.MultiHeadAttention(16, 4, 2).to("float64")
    x = random(3, 6, 16)
    cosine, sine = eg.rope_table(6, 4, dtype=eg.float64)
    with eg.no_grad():
        whole = layer(x, causal=True, rotary=(cosine, sine)).numpy()
        cache, at, parts = nn.KeyValueCache(3, 2, 8, 4, eg.float64), 0, []
        for n in pieces:
            part = slice(at, at + n)
            parts.append(layer(x[:, part], causal=True, rotary=(cosine[part], sine[part]), cache=cache).numpy())
            at += n
    close(eg.tensor(np.concatenate(parts, axis=1)), whole)
    assert cache.length == 6


def test_cross_attention_with_a_cache_looks_at_the_context_once() -> None:
    layer = nn.MultiHeadAttention(8, 2).eval()
    x, context, cache = eg.randn(1, 1, 8), eg.randn(1, 4, 8), nn.KeyValueCache(1, 2, 4, 4)
    with eg.no_grad():
        first = layer(x, context, cache=cache).numpy()
        again = layer(x, eg.zeros(1, 4, 8), cache=cache).numpy()
    assert np.array_equal(first, again)


def test_a_tape_that_saved_cached_keys_notices_what_is_added() -> None:
    cache, one, w = nn.KeyValueCache(1, 2, 4, 8), eg.ones(1, 2, 1, 8), eg.ones(8, requires_grad=True)
    for i in (0, 1):  # keys, values
        loss = eg.sum(cache.append(one, one)[i] * w)
        cache.append(one, one)
        with pytest.raises(RuntimeError, match="saved at"):
            loss.backward()


def test_cache_errors() -> None:
    cache = nn.KeyValueCache(1, 2, 4, 8)
    k = eg.zeros(1, 2, 3, 8)
    cache.append(k, k)
    with pytest.raises(ValueError, match=r"KeyValueCache: got keys \(1, 2, 3, 8\) after 3 positions.*at most 4"):
        cache.append(k, k)
    with pytest.raises(ValueError, match=r"KeyValueCache: got keys \(1, 3, 1, 8\)"):
        cache.append(eg.zeros(1, 3, 1, 8), eg.zeros(1, 3, 1, 8))
    with pytest.raises(ValueError, match=r"KeyValueCache: got values \(1, 2, 1, 1\) after 3 positions.*\(1, 2, 1, 8\)"):
        cache.append(eg.zeros(1, 2, 1, 8), eg.zeros(1, 2, 1, 1))
    with pytest.raises(RuntimeError, match="no gradient flows through a cache"):
        cache.append(eg.zeros(1, 2, 1, 8, requires_grad=True), eg.zeros(1, 2, 1, 8))
