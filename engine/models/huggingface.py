"""Models in the Hugging Face layout: a folder with config.json and model.safetensors, read and written.

    model = huggingface.load("gpt2/")                      # a folder that holds GPT-2, Llama or BERT
    huggingface.save(model, "mine/")                       # which the transformers library opens

A family says how a published model is built from the choices of TransformerConfig and what its files call them. One
table serves both directions, for configurations and for weights. Names stand for modules: a module's weight and bias
follow. Several of ours beside one of theirs are one matrix there, one above the other (GPT-2's query, key and value).

What a file holds beyond the model (causal masks, a pooler, a second task's head) is passed over by name; what the
model would need and the file lacks, or says otherwise, is an error.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from engine.files import replace_file
from engine.models.config import TransformerConfig, shown
from engine.models.transformer import Transformer
from engine.nn.module import listed

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """One published architecture.

    architecture: its class with the output layer, as config.json names it
    base:         what the names of all weights but the output's begin with; files of the bare model leave it out
    fixed:        our choices that make the family
    choices:      our choice -> (their names for it, the first of which is read; what an absent entry means)
    required:     entries that the family leaves open and this engine does not: they must be so, or absent
    activations:  their names -> ours; the first of several is written
    modules:      their modules -> ours
    block, ours:  prefixes of block i, theirs and ours
    inner:        modules inside a block
    transposed:   whether the matrices of blocks are stored as (inputs, outputs)
    passed_over:  endings and beginnings of names that are no part of the model
    """

    architecture: str
    base: str
    fixed: dict[str, Any]
    choices: dict[str, tuple[str, Any]]
    required: dict[str, Any]
    activations: dict[str, str]
    modules: dict[str, str]
    block: str
    ours: str
    inner: dict[str, str]
    transposed: bool
    passed_over: tuple[str, ...]


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "transformer.",
        fixed={"kind": "decoder", "positions": "learned", "norm": "layer_norm", "norm_first": True, "bias": True,
               "embedding_norm": False, "segments": 0, "output_layer": False},
        choices={"vocab_size": ("vocab_size", 50257), "context_length": ("n_positions", 1024),
                 "layers": ("n_layer", 12), "heads": ("n_head", 12), "width": ("n_embd", 768), "hidden": ("n_inner", 0),
                 "dropout": ("resid_pdrop embd_pdrop attn_pdrop", 0.1), "norm_eps": ("layer_norm_epsilon", 1e-5),
                 "activation": ("activation_function", "gelu_new"), "tie_weights": ("tie_word_embeddings", True)},
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"},
        modules={"transformer.wte": "embedding", "transformer.wpe": "position_embedding",
                 "transformer.ln_f": "decoder.norm", "lm_head": "output"},
        block="transformer.h.{}.", ours="decoder.blocks.{}.",
        inner={"ln_1": "attention_norm", "attn.c_attn": "attention.query attention.key attention.value",
               "attn.c_proj": "attention.output", "ln_2": "feed_forward_norm", "mlp.c_fc": "feed_forward.up",
               "mlp.c_proj": "feed_forward.down"},
        transposed=True, passed_over=(".attn.bias", ".attn.masked_bias", "lm_head.")),
    "llama": Family(
        "LlamaForCausalLM", "model.",
        fixed={"kind": "decoder", "positions": "rotary", "norm": "rms_norm", "norm_first": True, "bias": False,
               "embedding_norm": False, "segments": 0, "output_layer": False},
        choices={"vocab_size": ("vocab_size", 32000), "context_length": ("max_position_embeddings", 2048),
                 "layers": ("num_hidden_layers", 32), "heads": ("num_attention_heads", 32),
                 "kv_heads": ("num_key_value_heads", 0), "width": ("hidden_size", 4096),
                 "hidden": ("intermediate_size", 11008), "dropout": ("attention_dropout", 0.0),
                 "norm_eps": ("rms_norm_eps", 1e-6), "activation": ("hidden_act", "silu"),
                 "rotary_base": ("rope_theta", 10000.0), "tie_weights": ("tie_word_embeddings", False)},
        required={"attention_bias": False, "mlp_bias": False, "rope_type": "default",
                  "partial_rotary_factor": 1.0},
        activations={"silu": "swiglu"},
        modules={"model.embed_tokens": "embedding", "model.norm": "decoder.norm", "lm_head": "output"},
        block="model.layers.{}.", ours="decoder.blocks.{}.",
        inner={"input_layernorm": "attention_norm", "self_attn.q_proj": "attention.query",
               "self_attn.k_proj": "attention.key", "self_attn.v_proj": "attention.value",
               "self_attn.o_proj": "attention.output", "post_attention_layernorm": "feed_forward_norm",
               "mlp.gate_proj": "feed_forward.gate", "mlp.up_proj": "feed_forward.up",
               "mlp.down_proj": "feed_forward.down"},
        transposed=False, passed_over=(".rotary_emb.inv_freq", "lm_head.")),
    "bert": Family(
        "BertForMaskedLM", "bert.",
        fixed={"kind": "encoder", "positions": "learned", "norm": "layer_norm", "norm_first": False, "bias": True,
               "embedding_norm": True, "output_layer": True, "tie_weights": True},
        choices={"vocab_size": ("vocab_size", 30522), "context_length": ("max_position_embeddings", 512),
                 "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 12),
                 "width": ("hidden_size", 768), "hidden": ("intermediate_size", 3072),
                 "dropout": ("hidden_dropout_prob attention_probs_dropout_prob", 0.1),
                 "norm_eps": ("layer_norm_eps", 1e-12), "activation": ("hidden_act", "gelu"),
                 "segments": ("type_vocab_size", 2)},
        required={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
                  "tie_word_embeddings": True},
        activations={"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
        modules={"bert.embeddings.word_embeddings": "embedding",
                 "bert.embeddings.position_embeddings": "position_embedding",
                 "bert.embeddings.token_type_embeddings": "segment_embedding",
                 "bert.embeddings.LayerNorm": "embedding_norm", "cls.predictions.transform.dense": "output_layer.dense",
                 "cls.predictions.transform.LayerNorm": "output_layer.norm", "cls.predictions": "output_layer"},
        block="bert.encoder.layer.{}.", ours="encoder.blocks.{}.",
        inner={"attention.self.query": "attention.query", "attention.self.key": "attention.key",
               "attention.self.value": "attention.value", "attention.output.dense": "attention.output",
               "attention.output.LayerNorm": "attention_norm", "intermediate.dense": "feed_forward.up",
               "output.dense": "feed_forward.down", "output.LayerNorm": "feed_forward_norm"},
        transposed=False,
        passed_over=(".position_ids", "bert.pooler.", "cls.seq_relationship.", "cls.predictions.decoder.")),
}


# ── configurations ────────────────────────────────────────────────────────────────────────────────────

def config_from(entries: Mapping[str, Any]) -> TransformerConfig:
    """The choices that a config.json describes. Raises ValueError for a model that the Transformer is not."""
    kind = entries.get("model_type")
    if kind not in list(FAMILIES):
        raise ValueError(f"config.json: model_type is {shown(kind)}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    rope = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: the rotations' parameters are {shown(rope)}, expected an object")
    entries = {**entries, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    for name, expected in family.required.items():
        if entries.get(name, expected) != expected:
            raise ValueError(f"config.json: {name} is {shown(entries[name])}, expected {expected!r}, which is all that "
                             "the engine's Transformer does")
    chosen = dict(family.fixed)
    for ours, (theirs, default) in family.choices.items():
        found = entries.get(theirs.split()[0])
        chosen[ours] = default if found is None else found
    activation = chosen["activation"]
    if activation not in list(family.activations):
        raise ValueError(f"config.json: the activation is {shown(activation)}, expected one of "
                         f"{', '.join(family.activations)}")
    chosen["activation"] = family.activations[activation]
    config = TransformerConfig(**chosen)
    if entries.get("head_dim") not in (None, config.head_width):
        raise ValueError(f"config.json: head_dim is {shown(entries['head_dim'])}, expected hidden_size / "
                         f"num_attention_heads = {config.head_width}")
    return config


def family_of(config: TransformerConfig) -> str:
    """The family that a Transformer of these choices belongs to; ValueError if to none."""
    for name, family in FAMILIES.items():
        if (all(getattr(config, key) == value for key, value in family.fixed.items())
                and config.activation in family.activations.values()
                and ("kv_heads" in family.choices or config.kv_heads == config.heads)
                and ("segments" not in family.choices or config.segments)):
            return name
    raise ValueError(f"huggingface: none of {', '.join(FAMILIES)} is built like this model: {config}")


def entries_of(config: TransformerConfig) -> dict[str, Any]:
    """What config.json says of a model of these choices."""
    name = family_of(config)
    family = FAMILIES[name]
    entries: dict[str, Any] = {"architectures": [family.architecture], "model_type": name}
    for ours, (theirs, _) in family.choices.items():
        value = getattr(config, ours)
        if ours == "activation":
            value = next(key for key, known in family.activations.items() if known == value)
        entries.update(dict.fromkeys(theirs.split(), value))
    return entries


# ── weights ───────────────────────────────────────────────────────────────────────────────────────────

def _modules(family: Family, config: TransformerConfig) -> Iterator[tuple[str, list[str], bool]]:
    """(their module, ours, whether its matrices are transposed), of the whole model."""
    for theirs, ours in family.modules.items():
        if ours != "output" or not config.tie_weights:
            yield theirs, ours.split(), False
    for i in range(config.layers):
        for theirs, ours in family.inner.items():
            yield family.block.format(i) + theirs, [family.ours.format(i) + o for o in ours.split()], family.transposed


def weights_from(weights: Arrays, config: TransformerConfig) -> dict[str, np.ndarray]:
    """Arrays under their names and in their layout as a state_dict of a Transformer of these choices.

    A tied output matrix may be there again, and is passed over. Raises ValueError for names that nothing knows;
    load_state_dict names what is missing.
    """
    family = FAMILIES[family_of(config)]
    left = {_full_name(name, family): np.asarray(value) for name, value in weights.items()}
    state: dict[str, np.ndarray] = {}
    for theirs, ours, transposed in _modules(family, config):
        for kind in ("weight", "bias"):
            whole = left.pop(f"{theirs}.{kind}", None)
            if whole is not None:
                whole = whole.T if transposed else whole
                if not whole.ndim or len(whole) % len(ours):
                    raise ValueError(f"huggingface: {theirs}.{kind} is {whole.shape}, expected something that can be "
                                     f"cut in {len(ours)}")
                pieces = np.split(whole, len(ours))
                state.update({f"{o}.{kind}": piece for o, piece in zip(ours, pieces)})
    unknown = [name for name in left if not name.endswith(family.passed_over)
               and not name.startswith(family.passed_over)]
    if unknown:
        raise ValueError(f"huggingface: got weights {listed(sorted(unknown))}, which are no part of a "
                         f"{family.architecture} with {config.layers} layers")
    return state


def _full_name(name: str, family: Family) -> str:
    """A weight's name as today's files have it: with the base's prefix, and gains and biases called so."""
    first = name.split(".")[0] + "."
    if any(f"{module}.".startswith(family.base + first) for module in (*family.modules, family.block)):
        name = family.base + name
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def weights_to(state: Arrays, config: TransformerConfig) -> dict[str, np.ndarray]:
    """The reverse: a Transformer's state_dict, or its gradients by name, under their names and in their layout."""
    family = FAMILIES[family_of(config)]
    weights: dict[str, np.ndarray] = {}
    for theirs, ours, transposed in _modules(family, config):
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                whole = np.concatenate([np.asarray(state[f"{o}.{kind}"]) for o in ours])
                weights[f"{theirs}.{kind}"] = np.ascontiguousarray(whole.T if transposed else whole)
    return weights


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def load(folder: str | os.PathLike[str]) -> Transformer:
    """The model in a folder: config.json and model.safetensors, or the parts that model.safetensors.index.json names.

    Its parameters are float32, whatever floating type the files hold (bfloat16 and float16 are widened), and it is in
    evaluation mode. Needs safetensors. Raises FileNotFoundError or ValueError with one line for what does not fit.
    """
    path = Path(folder)
    config = config_from(_json(path / "config.json"))
    weights: dict[str, np.ndarray] = {}
    for part in _parts(path):
        weights.update(_read(_existing(path / part)))
    numbers = sum(x.size for x in weights.values())
    if numbers < config.matrix_parameters:  # before memory is taken for them
        raise ValueError(f"huggingface.load: {path / 'config.json'} is of a model with more than "
                         f"{shown(config.matrix_parameters)} parameters, and its files hold {numbers}")
    model = Transformer(config)
    model.load_state_dict(weights_from(weights, config))
    return model.eval()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"huggingface.load: there is no file {path}, expected a folder with config.json and "
                                f"{SINGLE}")
    return path


def _parts(path: Path) -> list[str]:
    """The names of the folder's weight files, which lie in it: one, or if that is not there, those of the index."""
    if (path / SINGLE).exists() or not (path / INDEX).exists():
        return [SINGLE]
    places = _json(path / INDEX).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    here = [isinstance(n, str) and n.isprintable() and 0 < len(n) < 100 and Path(n).name == n for n in names]
    if not names or not all(here):
        raise ValueError(f"huggingface.load: {path / INDEX}: weight_map is {shown(places)}, expected names of files "
                         "in this folder by names of weights")
    return sorted(set(names))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_existing(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"huggingface.load: {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"huggingface.load: {path} is {shown(found)}, expected an object")
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file. NumPy has no bfloat16: its bits are the upper half of a float32's."""
    safetensors = _library("safetensors")
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    arrays: dict[str, np.ndarray] = {}
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"huggingface.load: {path} is damaged or no safetensors file: {str(error)[:300]!r}"
                         ) from None
    for name, entry in entries:
        if entry["dtype"] not in kinds:
            continue  # causal masks and position numbers, which are no weights; a weight would be missed by its name
        x = np.frombuffer(entry["data"], kinds[entry["dtype"]]).reshape(entry["shape"])
        arrays[name] = (x.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else x
    return arrays


def save(model: Transformer, folder: str | os.PathLike[str]) -> None:
    """Write config.json and model.safetensors, each complete or not at all. Needs safetensors.

    Raises ValueError for a Transformer that none of the families can express.
    """
    path = Path(folder)
    entries = entries_of(model.config)
    weights = weights_to({name: value.numpy() for name, value in model.state_dict().items()}, model.config)
    to_bytes = _library("safetensors.numpy").save
    path.mkdir(parents=True, exist_ok=True)
    for name, data in ((SINGLE, to_bytes(weights, {"format": "pt"})),
                       ("config.json", json.dumps(entries, indent=2).encode() + b"\n")):
        replace_file(path / name, data)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError("huggingface: safetensors is not installed, which the files need: "
                                  "pip install 'shardgrad[train]'") from None
