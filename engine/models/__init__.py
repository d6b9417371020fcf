"""Models. transformer.py is the Transformer, config.py its choices, generation.py how it writes text,
huggingface.py how published weights come in and out."""

from __future__ import annotations

from engine.models import huggingface
from engine.models.config import TransformerConfig
from engine.models.generation import generate
from engine.models.transformer import Cache, Transformer

__all__ = ["Cache", "Transformer", "TransformerConfig", "generate", "huggingface"]
