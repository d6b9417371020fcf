"""Modules and layers. Read module.py first, then layers.py and attention.py."""

from __future__ import annotations

from engine.nn.attention import KeyValueCache, MultiHeadAttention
from engine.nn.containers import ModuleList, Sequential
from engine.nn.layers import Dropout, Embedding, FeedForward, LayerNorm, Linear, RMSNorm
from engine.nn.module import Module, Parameter

__all__ = ["Dropout", "Embedding", "FeedForward", "KeyValueCache", "LayerNorm", "Linear", "Module", "ModuleList",
           "MultiHeadAttention", "Parameter", "RMSNorm", "Sequential"]
