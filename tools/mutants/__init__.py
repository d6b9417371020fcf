"""The bugs that tools/mutate.py plants: half of them in C (kernels.py), half in Python (engine.py)."""

from __future__ import annotations

from tools.mutants.engine import ENGINE
from tools.mutants.kernels import KERNELS
from tools.mutants.record import Mutant

MUTANTS: list[Mutant] = [*KERNELS, *ENGINE]

__all__ = ["MUTANTS", "Mutant"]
