"""Weights in the Hugging Face layout: names, files and refusals. What the models compute is compared in tests/peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine as eg
from engine.models import Transformer, TransformerConfig, huggingface

safetensors = pytest.importorskip("safetensors.numpy")

SMALL: dict[str, Any] = {"vocab_size": 19, "context_length": 8, "layers": 2, "heads": 4, "width": 8, "dropout": 0.0}
CONFIGS = {
    "gpt2": TransformerConfig.gpt2(**SMALL),
    "gpt2, untied": TransformerConfig.gpt2(**SMALL, tie_weights=False, activation="relu"),
    "llama": TransformerConfig.llama(**SMALL, hidden=24, kv_heads=2, rotary_base=500.0),
    "llama, tied": TransformerConfig.llama(**SMALL, hidden=24, tie_weights=True),
    "bert": TransformerConfig.bert(**SMALL),
    "bert, three segments": TransformerConfig.bert(**SMALL, segments=3, activation="relu"),
}


def model_of(name: str) -> Transformer:
    with eg.seed(4):
        return Transformer(CONFIGS[name]).eval()


def arrays_of(model: Transformer) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def expect_equal(model: Transformer, again: Transformer) -> None:
    assert again.config == model.config
    a, b = arrays_of(model), arrays_of(again)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def rewrite(folder: Path, change: Any) -> None:
    """Change the dict of weights in a folder."""
    weights = safetensors.load((folder / "model.safetensors").read_bytes())
    change(weights)
    (folder / "model.safetensors").write_bytes(safetensors.save(weights))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_was_saved_is_loaded(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    huggingface.save(model, tmp_path / "model")
    expect_equal(model, huggingface.load(tmp_path / "model"))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_names_and_layout_of_gpt2() -> None:
    """Query, key and value side by side, and matrices as (inputs, outputs)."""
    model = model_of("gpt2")
    state, weights = arrays_of(model), huggingface.weights_to(arrays_of(model), model.config)
    names = ("query", "key", "value")
    joined = [state[f"decoder.blocks.1.attention.{name}.weight"].T for name in names]
    assert np.array_equal(weights["transformer.h.1.attn.c_attn.weight"], np.concatenate(joined, axis=1))
    assert weights["transformer.h.0.mlp.c_fc.weight"].shape == (8, 32)
    assert np.array_equal(weights["transformer.wte.weight"], state["embedding.weight"])
    assert "lm_head.weight" not in weights


def test_files_of_other_ages_and_parts(tmp_path: Path) -> None:
    """Without the base's prefix, with causal masks; gains called gamma; a pooler; the tied matrix once more."""
    gpt, bert, llama = model_of("gpt2"), model_of("bert"), model_of("llama")
    for model in (gpt, bert, llama):
        huggingface.save(model, tmp_path / model.config.kind / model.config.norm)

    def as_published(weights: dict[str, np.ndarray]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.").removeprefix("model.")] = weights.pop(name)
        weights["h.0.attn.bias"] = np.ones((1, 1, 8, 8), "float32")
        weights["lm_head.weight"] = weights.get("lm_head.weight", np.zeros((19, 8), "float32"))

    def as_the_first(weights: dict[str, np.ndarray]) -> None:
        for name in list(weights):
            weights[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = \
                weights.pop(name)
        weights["bert.pooler.dense.weight"] = np.zeros((8, 8), "float32")
        weights["bert.embeddings.position_ids"] = np.arange(8)[None]
        weights["cls.predictions.decoder.bias"] = np.zeros(19, "float32")

    rewrite(tmp_path / "decoder" / "layer_norm", as_published)
    rewrite(tmp_path / "encoder" / "layer_norm", as_the_first)
    expect_equal(gpt, huggingface.load(tmp_path / "decoder" / "layer_norm"))
    expect_equal(bert, huggingface.load(tmp_path / "encoder" / "layer_norm"))

    def without_prefix(weights: dict[str, np.ndarray]) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    rewrite(tmp_path / "decoder" / "rms_norm", without_prefix)
    expect_equal(llama, huggingface.load(tmp_path / "decoder" / "rms_norm"))


def bfloat16_file(arrays: dict[str, np.ndarray]) -> bytes:
    """A safetensors file: the length of a JSON header in 8 bytes, the header, the data one after the other."""
    header, data = {}, b""
    for name, x in arrays.items():
        header[name] = {"dtype": "BF16", "shape": x.shape, "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def test_bfloat16_and_several_files(tmp_path: Path) -> None:
    model = model_of("llama")
    huggingface.save(model, tmp_path)
    weights = safetensors.load((tmp_path / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        halves = {name: x.view(np.uint32) >> 16 for name, x in weights.items() if files[name] == file}  # truncated
        (tmp_path / file).write_bytes(bfloat16_file({name: x.astype(np.uint16) for name, x in halves.items()}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    again = arrays_of(huggingface.load(tmp_path))
    for name, value in arrays_of(model).items():
        assert np.array_equal(again[name], (value.view(np.uint32) & 0xFFFF0000).view(np.float32))
    huggingface.save(model, tmp_path)  # where the index and its files still lie
    again = arrays_of(huggingface.load(tmp_path))
    assert all(np.array_equal(again[name], value) for name, value in arrays_of(model).items())


@pytest.mark.parametrize("entries, words", [
    ({"model_type": "t5"}, ["model_type is 't5'", "gpt2, llama, bert"]),
    ({}, ["model_type is None"]),
    ({"model_type": "llama", "attention_bias": True}, ["attention_bias is True", "False"]),
    ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type is 'linear'"]),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, ["rope_type is 'llama3'"]),
    ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, ["head_dim is 32", "16"]),
    ({"model_type": "llama", "hidden_act": "gelu"}, ["the activation is 'gelu'", "silu"]),
    ({"model_type": "bert", "is_decoder": True}, ["is_decoder is True"]),
    ({"model_type": "gpt2", "n_embd": 10, "n_head": 4}, ["width 10, heads 4"]),
])
def test_configurations_that_are_refused(entries: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        huggingface.config_from(entries)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_sparse_entries_mean_the_published_defaults() -> None:
    assert huggingface.config_from({"model_type": "gpt2"}) == TransformerConfig.gpt2(dropout=0.1)
    assert huggingface.config_from({"model_type": "bert"}) == TransformerConfig.bert()
    llama = huggingface.config_from({"model_type": "llama", "rope_parameters": {"rope_theta": 5e5}})
    assert llama == TransformerConfig.llama(context_length=2048, norm_eps=1e-6, rotary_base=5e5)


@pytest.mark.parametrize("changes", [{"positions": "sinusoidal"}, {"norm_first": False}, {"kv_heads": 2},
                                     {"bias": False}, {"output_layer": True}, {"kind": "encoder"}])
def test_models_of_no_family_are_not_written(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of gpt2, llama, bert is built like this model"):
        huggingface.save(Transformer(TransformerConfig.gpt2(**SMALL, **changes)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json"):
        huggingface.load(tmp_path)
    huggingface.save(model_of("gpt2"), tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"transformer.h.2.ln_1.weight": np.ones(8, "float32")}))
    with pytest.raises(ValueError, match=r"transformer\.h\.2\.ln_1\.weight, which are no part of a GPT2LMHeadModel"):
        huggingface.load(tmp_path)
    rewrite(tmp_path, lambda weights: [weights.pop(f"transformer.{name}.weight") for name in ("h.2.ln_1", "wpe")])
    with pytest.raises(ValueError, match=r"missing: position_embedding\.weight"):
        huggingface.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no safetensors file"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        huggingface.load(tmp_path)
