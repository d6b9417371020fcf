"""A model out of a checkpoint, ready to predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine as eg
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
