"""The engine's rows, one or more for every public op. Importing this registers them."""

from __future__ import annotations

from engine.testing.rows import (
    elementwise,
    functions,
    indexing,
    movement,
    normalization,
    products,
    reductions,
    sets,
    stored,
)

__all__ = ["elementwise", "functions", "indexing", "movement", "normalization", "products", "reductions", "sets",
           "stored"]
