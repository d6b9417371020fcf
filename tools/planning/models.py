"""How many parameters a model has, without making it."""

from __future__ import annotations

from pathlib import Path

from engine.models import TransformerConfig
from engine.models.huggingface import config_from
from tools.training.errors import ProgramError, json_object

PRESETS = {
    "default": TransformerConfig(vocab_size=256, context_length=256, layers=4, heads=6, width=192, positions="rotary",
                                 norm="rms_norm", activation="swiglu", bias=False),  # what tools/train.py trains
    "gpt2": TransformerConfig.gpt2(),
    "gpt2-xl": TransformerConfig.gpt2(layers=48, heads=25, width=1600),
    "bert-base": TransformerConfig.bert(),
    "llama-7b": TransformerConfig.llama(),
    "llama-70b": TransformerConfig.llama(layers=80, heads=64, kv_heads=8, width=8192, hidden=28672),
}


def parameters_of(config: TransformerConfig) -> int:
    """The parameters of a decoder or an encoder."""
    d, h, bias = config.width, config.hidden, int(config.bias)
    keys = d * config.kv_heads // config.heads
    norm = d * (1 + (bias if config.norm == "layer_norm" else 0))
    attention = 2 * d * d + 2 * d * keys + bias * (2 * d + 2 * keys)
    gates = 2 if config.activation == "swiglu" else 1
    feed_forward = (gates + 1) * d * h + bias * (gates * h + d)
    tables = config.vocab_size + config.segments + (config.context_length if config.positions == "learned" else 0)
    total = d * tables + config.layers * (attention + feed_forward + 2 * norm)
    total += norm * (config.norm_first + config.embedding_norm)
    total += 0 if config.tie_weights else d * config.vocab_size
    return total + (d * d + bias * d + norm + config.vocab_size if config.output_layer else 0)


def from_file(path: Path) -> int:
    """The parameters of the model that a config.json of Hugging Face describes."""
    try:
        return parameters_of(config_from(json_object(path.read_bytes())))
    except (OSError, ValueError) as error:
        raise ProgramError(f"--config {path}: {error}") from None
