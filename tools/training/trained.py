"""A model out of a checkpoint, ready to predict."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import engine as eg
from engine.ops.stored import SCHEMES
from tools.training import checkpoint
from tools.training.errors import ProgramError
from tools.training.tokens import Tokenizer, load_tokenizer


def load_model(path: Path) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, training.json) of a run's folder or one of its checkpoints."""
    folder = checkpoint.locate(path)
    saved = checkpoint.read(folder)
    try:
        config = eg.models.TransformerConfig(**saved.config)
        numbers = sum(array.size for array in saved.model.values())
        if numbers < config.matrix_parameters:  # before memory is taken for them
            raise ValueError(f"{numbers} numbers are too few for its config.json")
        model = eg.models.Transformer(config)
        model.load_state_dict({name: eg.tensor(array) for name, array in saved.model.items()})
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ProgramError(f"the checkpoint {folder} does not fit this version's models: {error}") from error
    return model.eval(), load_tokenizer(folder), saved.facts


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quantize", choices=list(SCHEMES), help="multiply by weights of 8.5, 4.5, 5 or 16 bits "
                                                                  "(default: by the float32 of the checkpoint)")


def for_inference(model: Any, quantize: str | None) -> Any:
    """The model with matrices that are only read: packed, with the same bits, or quantised."""
    try:
        return model.for_inference(quantize or "packed")
    except ValueError as error:
        raise ProgramError(f"--quantize {quantize}: {error}") from None
