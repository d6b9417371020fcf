"""Models. transformer.py is the Transformer, config.py its choices, generation.py how it writes text, decoding.py
a token after the other without Python, huggingface.py how published weights come in and out."""

from __future__ import annotations

from engine.models import huggingface
from engine.models.config import TransformerConfig
from engine.models.decoding import Decoding
from engine.models.generation import generate
from engine.models.transformer import Cache, Transformer

__all__ = ["Cache", "Decoding", "Transformer", "TransformerConfig", "generate", "huggingface"]
