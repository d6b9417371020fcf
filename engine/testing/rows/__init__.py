"""The engine's rows, one or more for every public op. Importing this registers them."""

from __future__ import annotations

from engine.testing.rows import elementwise, indexing, movement, normalization, products, reductions

__all__ = ["elementwise", "indexing", "movement", "normalization", "products", "reductions"]
