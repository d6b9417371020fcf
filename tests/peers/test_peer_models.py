"""GPT-2-, Llama- and BERT-style models with random weights against the transformers library: logits and gradients.

The peer writes its weights to a folder, and the engine loads that folder; so files, names and layout are tested too.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import agreement
import numpy as np
import pytest
import torch
import transformers
from agreement import agree, agree_all
from torch.overrides import TorchFunctionMode

import engine as eg
from engine.models import Transformer, huggingface
from engine.nn import attention

GPT2 = {"vocab_size": 101, "n_positions": 40, "n_embd": 48, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {"vocab_size": 101, "max_position_embeddings": 40, "hidden_size": 48, "intermediate_size": 72,
         "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = {"vocab_size": 101, "max_position_embeddings": 40, "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2: wide, untied, erf": ("gpt2", {**GPT2, "n_embd": 320, "n_layer": 1, "tie_word_embeddings": False,
                                         "activation_function": "gelu"}),
    "llama": ("llama", LLAMA),
    "llama: grouped, tied, base 500": ("llama", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True,
                                                 "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "bert": ("bert", BERT),
    "bert: three segments, tanh": ("bert", {**BERT, "type_vocab_size": 3, "hidden_act": "gelu_new"}),
}
CLASSES = {"gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
           "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
           "bert": (transformers.BertConfig, transformers.BertForMaskedLM)}
TEXTS = {"one token": (1, 1, None), "whole": (2, 9, None), "padded": (4, 33, (33, 20, 7, 1))}


class Wide(TorchFunctionMode):
    """Float64 throughout: where the library converts to float32 by name (norms, rotations, softmax), to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widened, args), **{key: widened(x) for key, x in (kwargs or {}).items()})


def randomize(model: Any) -> None:
    """Weights of a size at which every part shows: matrices keep the size of what passes, gains and biases vary."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 2:
                embedding = any(word in name for word in ("wte", "wpe", "embed"))
                p.copy_(noise * (0.5 if embedding else 1.5 / p.shape[0 if "c_" in name else 1] ** 0.5))
            else:
                p.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))


class Pair:
    """The same model four times: the peer's in float32 and float64, and ours, loaded from the peer's files."""

    def __init__(self, name: str, folder: Path):
        family, choices = MODELS[name]
        config_class, model_class = CLASSES[family]
        self.name, self.family = name, family
        config = config_class(**choices)
        config._attn_implementation = "eager"
        self.peer = model_class(config).eval()
        randomize(self.peer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peer.save_pretrained(folder)
        with Wide():
            self.wide = model_class(config).double().eval()
        self.wide.load_state_dict(self.peer.state_dict())
        self.ours = huggingface.load(folder)
        self.ours_wide = huggingface.load(folder).to("float64")

    def text(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, real length of each row, segments, targets). Token 0 is padding, whose row the peer never trains."""
        batch, time, given = TEXTS[kind]
        rng = np.random.default_rng(len(self.name) + time)
        lengths = np.array(given or [time] * batch)
        real = np.arange(time) < lengths[:, None]
        tokens = np.where(real, rng.integers(1, 101, (batch, time)), 0)
        segments = rng.integers(0, self.wide.config.type_vocab_size if self.family == "bert" else 1, (batch, time))
        targets = np.where(real & (rng.uniform(size=real.shape) < 0.8), rng.integers(0, 101, (batch, time)), -100)
        targets[0, 0] = 5  # one at least counts
        return tokens, lengths, segments, targets

    def run_peer(self, model: Any, kind: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(logits of the real tokens, gradients by name)."""
        tokens, lengths, segments, targets = self.text(kind)
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        more = {"token_type_ids": torch.tensor(segments)} if self.family == "bert" else {}
        model.zero_grad()
        with wide_if(model is self.wide):
            logits = model(torch.tensor(tokens), attention_mask=torch.tensor(real.astype(np.int64)), **more).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten()).backward()
        return logits.detach().numpy()[real], {name: p.grad.numpy() for name, p in model.named_parameters()}

    def run_ours(self, model: Transformer, kind: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens, lengths, segments, targets = self.text(kind)
        more = {"segments": eg.tensor(segments)} if self.family == "bert" else {}
        model.zero_grad()
        logits = model(eg.tensor(tokens), lengths=eg.tensor(lengths), **more)
        eg.cross_entropy(logits, eg.tensor(targets)).backward()
        grads = {name: np.asarray(p.grad) for name, p in model.named_parameters()}
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        return logits.numpy()[real], huggingface.weights_to(grads, model.config)


@contextmanager
def wide_if(yes: bool) -> Iterator[None]:
    if yes:
        with Wide():
            yield
    else:
        yield


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("weights"))


def compare(pair: Pair, kind: str) -> None:
    (ours, our_grads), (ours_wide, our_wide_grads) = (pair.run_ours(m, kind) for m in (pair.ours, pair.ours_wide))
    (peer, peer_grads), (wide, wide_grads) = (pair.run_peer(m, kind) for m in (pair.peer, pair.wide))
    agree("models: logits", f"{pair.name}, {kind}", ours, peer, wide, ours_wide=ours_wide)
    agree_all("models: gradients", f"{pair.name}, {kind}", our_grads, peer_grads, wide_grads, our_wide_grads,
              together=True)


@pytest.mark.parametrize("kind", list(TEXTS))
def test_logits_and_gradients(pair: Pair, kind: str) -> None:
    compare(pair, kind)


def test_the_peer_opens_what_we_write(pair: Pair, tmp_path: Path) -> None:
    huggingface.save(pair.ours, tmp_path)
    _, model_class = CLASSES[pair.family]
    again = model_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    before, after = pair.peer.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert np.array_equal(pair.run_peer(again, "padded")[0], pair.run_peer(pair.peer, "padded")[0])


# ── each difference that is easily made shows ─────────────────────────────────────────────────────────

def blocks(model: Transformer) -> Any:
    return (model.decoder or model.encoder).blocks


def other_gelu(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(pair.ours):
        block.feed_forward.activation = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}[block.feed_forward.activation]


def other_epsilon(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one norm, and a tenth more: 1e-6 of its variance is below what float32 shows, but not float64."""
    blocks(pair.ours_wide)[1].attention_norm.eps *= 1.1


def interleaved_rotations(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = eg.ops.rope
    monkeypatch.setattr(eg.ops, "rope", lambda x, c, s: rope(x, c, s, interleaved=True))


def padding_seen(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *x, lengths, **more: attend(*x, **more))


def one_segment(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pair.ours.segment_embedding
    monkeypatch.setattr(table, "forward", lambda index: table.weight[0])


@pytest.mark.parametrize("name, plant", [
    ("gpt2", other_gelu), ("bert", other_gelu), ("gpt2", other_epsilon), ("llama", other_epsilon),
    ("llama", interleaved_rotations), ("bert", padding_seen), ("bert", one_segment)])
def test_planted_differences_are_seen(name: str, plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(name, tmp_path)
    monkeypatch.setattr(agreement, "seen", defaultdict(list))
    compare(pair, "padded")
    plant(pair, monkeypatch)
    with pytest.raises(AssertionError, match="from the wide result, the peer"):
        compare(pair, "padded")
