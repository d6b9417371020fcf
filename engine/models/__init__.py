"""Models. transformer.py is the Transformer, config.py its choices, generation.py how it writes text."""

from __future__ import annotations

from engine.models.config import TransformerConfig
from engine.models.generation import generate
from engine.models.transformer import Cache, Transformer

__all__ = ["Cache", "Transformer", "TransformerConfig", "generate"]
