"""The bugs that tools/mutate.py plants: in C (kernels.py), in Python (engine.py), on the GPU (cuda.py), in the
breadth of the ops (surface.py), in products that do more than one thing (fused.py) or round (precision.py), in what is
sparse or compressed (sparse.py), in what is captured (captured.py), in matrices that are only read (stored.py), in what
the array API standard asks for (standard.py), in what runs the parameter server (drivers.py), in what its workers hold
(zero.py), and data races (races.py). automatic.py has those that a library makes by itself, equivalent.py which of them
change nothing."""

from __future__ import annotations

from tools.mutants.captured import CAPTURED
from tools.mutants.cuda import CUDA
from tools.mutants.drivers import DRIVERS
from tools.mutants.engine import ENGINE
from tools.mutants.fused import FUSED
from tools.mutants.kernels import KERNELS
from tools.mutants.precision import PRECISION
from tools.mutants.races import RACES
from tools.mutants.record import Mutant
from tools.mutants.sparse import SPARSE
from tools.mutants.standard import STANDARD
from tools.mutants.stored import STORED
from tools.mutants.surface import SURFACE
from tools.mutants.zero import ZERO

MUTANTS: list[Mutant] = [*KERNELS, *ENGINE, *CUDA, *SURFACE, *FUSED, *PRECISION, *SPARSE, *STORED, *STANDARD,
                         *ZERO, *DRIVERS, *RACES, *CAPTURED]

__all__ = ["MUTANTS", "Mutant"]
