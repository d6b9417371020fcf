"""The bugs that tools/mutate.py plants: in C (kernels.py), in Python (engine.py), on the GPU (cuda.py)."""

from __future__ import annotations

from tools.mutants.cuda import CUDA
from tools.mutants.engine import ENGINE
from tools.mutants.kernels import KERNELS
from tools.mutants.record import Mutant

MUTANTS: list[Mutant] = [*KERNELS, *ENGINE, *CUDA]

__all__ = ["MUTANTS", "Mutant"]
