"""Layers, blocks and losses against torch.nn: results, and gradients of inputs and parameters."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import agreement
import numpy as np
import pytest
import torch
from agreement import agree_all
from torch.nn import functional as F

import engine as eg
from engine import nn
from engine.models import TransformerConfig
from engine.models.transformer import Block

Shape = tuple[int, ...]


@dataclass
class Pair:
    """A layer, the peer's, and how their parameters correspond.

    names:  our module or parameter -> theirs, or (theirs, which rows of it)
    inputs: shapes of floating inputs, or integer arrays
    ours, peer: how each is called, by default with the inputs
    """

    make: Callable[[], nn.Module]
    peer_make: Callable[[], torch.nn.Module]
    names: dict[str, Any]
    inputs: list[Any]
    ours: Callable[..., Any] = lambda module, *inputs: module(*inputs)
    peer: Callable[..., Any] = lambda module, *inputs: module(*inputs)


def attention_names(ours: str, theirs: str, width: int = 24) -> dict[str, Any]:
    """Query, key and value are one matrix there."""
    joined = {f"{ours}{name}": (f"{theirs}in_proj_", slice(i * width, (i + 1) * width))
              for i, name in enumerate(("query", "key", "value"))}
    return {**joined, f"{ours}output": f"{theirs}out_proj"}


LENGTHS = np.array([5, 2, 7])
HIDDEN = np.arange(7) >= LENGTHS[:, None]  # as torch masks: true where nothing may be seen
LATER = np.triu(np.ones((7, 7), bool), 1)
FEED_FORWARD = {"feed_forward.up": "linear1", "feed_forward.down": "linear2"}
SMALL: dict[str, Any] = {"width": 24, "heads": 4, "hidden": 40, "dropout": 0.0, "activation": "relu"}


def block(causal: bool, cross: bool, norm_first: bool) -> Callable[[], nn.Module]:
    return lambda: Block(TransformerConfig(**SMALL, norm_first=norm_first), causal, cross)


def peers_block(kind: Any, norm_first: bool) -> Callable[[], torch.nn.Module]:
    return lambda: kind(24, 4, 40, 0.0, "relu", norm_first=norm_first, batch_first=True)


def encoder_block(norm_first: bool) -> Pair:
    names = {**attention_names("attention.", "self_attn."), "attention_norm": "norm1", "feed_forward_norm": "norm2",
             **FEED_FORWARD}
    return Pair(block(False, False, norm_first), peers_block(torch.nn.TransformerEncoderLayer, norm_first), names,
                [(3, 7, 24)], lambda m, x: m(x, lengths=eg.tensor(LENGTHS)),
                lambda m, x: m(x, src_key_padding_mask=torch.tensor(HIDDEN)))


def decoder_block(norm_first: bool) -> Pair:
    names = {**attention_names("attention.", "self_attn."), **attention_names("cross_attention.", "multihead_attn."),
             "attention_norm": "norm1", "cross_attention_norm": "norm2", "feed_forward_norm": "norm3", **FEED_FORWARD}
    return Pair(block(True, True, norm_first), peers_block(torch.nn.TransformerDecoderLayer, norm_first), names,
                [(3, 7, 24), (3, 7, 24)],
                lambda m, x, context: m(x, context=context, context_lengths=eg.tensor(LENGTHS)),
                lambda m, x, context: m(x, context, tgt_mask=torch.tensor(LATER),
                                        memory_key_padding_mask=torch.tensor(HIDDEN)))


def attention(ours: Callable[..., Any], **masks: np.ndarray) -> Pair:
    def call(m: Any, x: Any) -> Any:
        given = {name: torch.tensor(mask) for name, mask in masks.items()}
        return m(x, x, x, need_weights=False, **given)[0]
    return Pair(lambda: nn.MultiHeadAttention(24, 4), lambda: torch.nn.MultiheadAttention(24, 4, batch_first=True),
                attention_names("", ""), [(3, 7, 24)], ours, call)


class Feed(torch.nn.Module):
    """The two linear maps of a feed-forward, with what stands between them; and the gated form."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], gated: bool = False):
        super().__init__()
        self.f, self.up, self.down = f, torch.nn.Linear(20, 30), torch.nn.Linear(30, 20)
        self.gate = torch.nn.Linear(20, 30) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.f(self.up(x)) if self.gate is None else self.f(self.gate(x)) * self.up(x))


def feed_forward(activation: str, f: Callable[[torch.Tensor], torch.Tensor]) -> Pair:
    gated = activation == "swiglu"
    names = {name: name for name in ("up", "down", *(["gate"] if gated else []))}
    return Pair(lambda: nn.FeedForward(20, 30, activation), lambda: Feed(f, gated), names, [(3, 5, 20)])


LAYERS = {
    "Linear": Pair(lambda: nn.Linear(300, 17), lambda: torch.nn.Linear(300, 17), {"": ""}, [(4, 5, 300)]),
    "Linear without bias": Pair(lambda: nn.Linear(12, 7, False), lambda: torch.nn.Linear(12, 7, False), {"": ""},
                                [(12,)]),
    "Embedding": Pair(lambda: nn.Embedding(11, 9), lambda: torch.nn.Embedding(11, 9), {"": ""},
                      [np.array([[1, 1, 3], [10, 0, 1]])]),
    "LayerNorm": Pair(lambda: nn.LayerNorm(33), lambda: torch.nn.LayerNorm(33), {"": ""}, [(4, 5, 33)]),
    "LayerNorm without bias": Pair(lambda: nn.LayerNorm(33, 0.1, False),
                                   lambda: torch.nn.LayerNorm(33, 0.1, bias=False), {"": ""}, [(9, 33)]),
    "RMSNorm": Pair(lambda: nn.RMSNorm(33, 1e-5), lambda: torch.nn.RMSNorm(33, 1e-5), {"": ""}, [(4, 5, 33)]),
    "Dropout in evaluation": Pair(lambda: nn.Dropout(0.4), lambda: torch.nn.Dropout(0.4), {}, [(4, 5)]),
    "FeedForward gelu": feed_forward("gelu", F.gelu),
    "FeedForward gelu_tanh": feed_forward("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "FeedForward relu": feed_forward("relu", F.relu),
    "FeedForward swiglu": feed_forward("swiglu", F.silu),
    "MultiHeadAttention": attention(lambda m, x: m(x)),
    "MultiHeadAttention, causal": attention(lambda m, x: m(x, causal=True), attn_mask=LATER),
    "MultiHeadAttention, padded": attention(lambda m, x: m(x, lengths=eg.tensor(LENGTHS)), key_padding_mask=HIDDEN),
    "MultiHeadAttention, mask": attention(lambda m, x: m(x, mask=eg.tensor(~LATER.T)), attn_mask=LATER.T),
    "Block of an encoder": encoder_block(norm_first=False),
    "Block of an encoder, norm first": encoder_block(norm_first=True),
    "Block of a decoder": decoder_block(norm_first=False),
    "Block of a decoder, norm first": decoder_block(norm_first=True),
    "Sequential": Pair(lambda: nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9)),
                       lambda: torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.LayerNorm(9)),
                       {"0": "0", "1": "1"}, [(3, 8)]),
}
NO_LAYER = {"Module": "the class of all layers", "ModuleList": "computes nothing",
            "KeyValueCache": "equal to the bit to attention without it, tests/test_models.py"}


def test_every_layer_is_compared() -> None:
    public = {name for name in nn.__all__ if inspect.isclass(getattr(nn, name))}
    assert public == {name.split()[0].rstrip(",") for name in LAYERS} - {"Block"} | set(NO_LAYER)


# ── the same weights, the same inputs, the same cotangent ─────────────────────────────────────────────

def peers_parameters(pair: Pair, module: Any) -> dict[str, tuple[Any, Any]]:
    """Our name -> (their parameter, which rows of it)."""
    theirs, found = dict(module.named_parameters()), {}
    for name, other in pair.names.items():
        stem, rows = other if isinstance(other, tuple) else (f"{other}." if other else "", slice(None))
        for kind in ("weight", "bias"):
            if stem + kind in theirs:
                found[f"{name}.{kind}" if name else kind] = (theirs[stem + kind], rows)
    return found


def draw(pair: Pair) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Weights of the size that keeps a signal, gains around 1; and inputs."""
    rng = np.random.default_rng(11)

    def weight(name: str, shape: Shape) -> np.ndarray:
        if len(shape) == 1:
            return 0.3 * rng.normal(size=shape) + (1.0 if name.endswith("weight") else 0.0)
        return rng.normal(size=shape) / np.sqrt(shape[-1])

    weights = {name: weight(name, p.shape).astype("float32") for name, p in pair.make().named_parameters()}
    inputs = [x if isinstance(x, np.ndarray) else rng.normal(size=x).astype("float32") for x in pair.inputs]
    return weights, inputs


def cotangent(shape: Shape) -> np.ndarray:
    return np.random.default_rng(12).uniform(-1, 1, shape).astype("float32")


def run_ours(pair: Pair, dtype: str) -> dict[str, np.ndarray]:
    weights, arrays = draw(pair)
    module = pair.make().eval()
    module.load_state_dict(weights)
    module.to(dtype)
    inputs = [eg.tensor(x, dtype=dtype, requires_grad=True) if x.dtype.kind == "f" else eg.tensor(x) for x in arrays]
    y = pair.ours(module, *inputs)
    y.backward(eg.tensor(cotangent(y.shape), dtype=dtype))
    floating = {f"input {i}": np.asarray(x.grad) for i, x in enumerate(inputs) if x.requires_grad}
    return {"result": y.numpy(), **floating, **{name: np.asarray(p.grad) for name, p in module.named_parameters()}}


def run_peer(pair: Pair, dtype: str) -> dict[str, np.ndarray]:
    weights, arrays = draw(pair)
    kind = getattr(torch, dtype)
    module = pair.peer_make().eval().to(kind)
    parameters = peers_parameters(pair, module)
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, (p, rows) in parameters.items():
            p[rows] = torch.tensor(weights[name], dtype=kind)
    inputs = [torch.tensor(x, dtype=kind, requires_grad=True) if x.dtype.kind == "f" else torch.tensor(x)
              for x in arrays]
    y = pair.peer(module, *inputs)
    y.backward(torch.tensor(cotangent(tuple(y.shape)), dtype=kind))
    floating = {f"input {i}": x.grad.numpy() for i, x in enumerate(inputs) if x.requires_grad}
    grads = {name: p.grad[rows].numpy() for name, (p, rows) in parameters.items()}
    return {"result": y.detach().numpy(), **floating, **grads}


def compare(label: str, pair: Pair) -> None:
    agree_all("layers", label, run_ours(pair, "float32"), run_peer(pair, "float32"), run_peer(pair, "float64"),
              run_ours(pair, "float64"), together=True)


@pytest.mark.parametrize("label", list(LAYERS))
def test_layer(label: str) -> None:
    compare(label, LAYERS[label])


@pytest.mark.parametrize("label, ours", [
    ("LayerNorm", lambda: nn.LayerNorm(33, 1.1e-5)), ("RMSNorm", lambda: nn.RMSNorm(33, 1.1e-5)),
    ("FeedForward gelu", lambda: nn.FeedForward(20, 30, "gelu_tanh")),
    ("Block of an encoder", block(False, False, True)), ("Block of a decoder", block(False, True, False))])
def test_planted_differences_are_seen(label: str, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "seen", defaultdict(list))
    pair = LAYERS[label]
    with pytest.raises(AssertionError, match="from the wide result, the peer"):
        compare(label, Pair(ours, pair.peer_make, pair.names, pair.inputs, pair.ours, pair.peer))


def test_the_default_initial_weights_of_a_linear_map() -> None:
    """Uniform in ±1/√inputs in both: the same bound is kept, and nearly reached by 3,000 draws."""
    torch.manual_seed(0)
    with eg.seed(0):
        modules = nn.Linear(100, 30), torch.nn.Linear(100, 30)
    for module in modules:
        weight = np.asarray(module.weight.detach())
        assert 0.0999 < np.abs(weight).max() <= 0.1 and abs(weight.mean()) < 5 * 0.1 / np.sqrt(3 * weight.size)


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────

REDUCTIONS = ("mean", "sum", "none")


def compare_loss(label: str, ours: Callable[..., Any], peer: Callable[..., Any], arrays: list[np.ndarray]) -> None:
    """A loss of floating arrays, with the gradients of all."""
    def of_ours(dtype: str) -> dict[str, np.ndarray]:
        xs = [eg.tensor(x, dtype=dtype, requires_grad=True) for x in arrays]
        loss = ours(*xs)
        loss.backward(eg.tensor(cotangent(loss.shape), dtype=dtype))
        return {"loss": loss.numpy(), **{str(i): np.asarray(x.grad) for i, x in enumerate(xs)}}

    def of_peer(dtype: str) -> dict[str, np.ndarray]:
        xs = [torch.tensor(x, dtype=getattr(torch, dtype), requires_grad=True) for x in arrays]
        loss = peer(*xs)
        loss.backward(torch.tensor(cotangent(tuple(loss.shape)), dtype=loss.dtype))
        return {"loss": loss.detach().numpy(), **{str(i): x.grad.numpy() for i, x in enumerate(xs)}}

    agree_all("losses", label, of_ours("float32"), of_peer("float32"), of_peer("float64"), of_ours("float64"))


def classified(ignore_index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (6, 5, 13), targets of which a third counts for nothing, weights of the classes."""
    rng = np.random.default_rng(21)
    target = rng.integers(0, 13, (6, 5))
    target[rng.uniform(size=target.shape) < 0.3] = ignore_index
    return rng.normal(size=(6, 5, 13)).astype("float32") * 3, target, rng.uniform(0.2, 3, 13).astype("float32")


def compare_cross_entropy(reduction: str, smoothing: float, ignore_index: int, weighted: bool, other: Any) -> None:
    logits, target, weight = classified(ignore_index)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}

    def ours(x: eg.Tensor) -> eg.Tensor:
        return eg.cross_entropy(x, eg.tensor(target), eg.tensor(weight, dtype=x.dtype) if weighted else None,
                                **{**options, **other})

    def peer(x: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(x.flatten(0, 1), torch.tensor(target).flatten(),
                               torch.tensor(weight, dtype=x.dtype) if weighted else None, **options)
        return loss.reshape(target.shape) if reduction == "none" else loss

    label = f"cross_entropy {reduction}, smoothing {smoothing}, ignoring {ignore_index}" + ", weighted" * weighted
    compare_loss(label, ours, peer, [logits])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy(reduction: str, smoothing: float, ignore_index: int, weighted: bool) -> None:
    compare_cross_entropy(reduction, smoothing, ignore_index, weighted, {})


def test_other_smoothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "seen", defaultdict(list))
    with pytest.raises(AssertionError, match="from the wide result, the peer"):
        compare_cross_entropy("mean", 0.1, -100, True, {"label_smoothing": 0.10001})


LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "mse_loss": (eg.mse_loss, F.mse_loss, "real"),
    "huber_loss": (eg.huber_loss, F.huber_loss, "real"),
    "huber_loss, delta 0.3": (lambda *x, **o: eg.huber_loss(*x, delta=0.3, **o),
                              lambda *x, **o: F.huber_loss(*x, delta=0.3, **o), "real"),
    "binary_cross_entropy": (eg.binary_cross_entropy, F.binary_cross_entropy, "share"),
    "binary_cross_entropy_with_logits": (eg.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits,
                                         "real, share"),
    "kl_div": (eg.kl_div, F.kl_div, "log, share"),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label", list(LOSSES))
def test_loss(label: str, reduction: str) -> None:
    ours, peer, domain = LOSSES[label]
    rng = np.random.default_rng(22)
    share = [rng.uniform(0.02, 0.98, (9, 14)).astype("float32") for _ in range(2)]
    real = [2 * rng.normal(size=(9, 14)).astype("float32") for _ in range(2)]
    arrays = {"real": real, "share": share, "real, share": [real[0], share[1]],
              "log, share": [np.log(share[0]), share[1]]}[domain]
    compare_loss(f"{label}, {reduction}", lambda *x: ours(*x, reduction=reduction),
                 lambda *x: peer(*x, reduction=reduction), arrays)
