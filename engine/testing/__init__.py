"""A numerics laboratory: checks, bounds and strategies, for the engine's own tests and for anybody's numerical code.

    from engine.testing import check_grads, assert_ulp, register, OpSpec
    from engine.testing import strategies          # imports Hypothesis; nothing else here does

checks.py       gradients by the adjoint identity, second order, layouts, threads, aliasing, errors
bounds.py       ULPs, γ_k, error bounds of sums and products
rounded.py      numbers that carry a bound on their rounding error: a formula gives its own tolerance
opspec.py       one row for an op, from which its checks are made (row_checks.py); rows/ has the engine's rows
programs.py     random programs, their source and their meaning (forms.py: their instructions)
traces.py       sequences of optimizer steps against the papers' formulas
machine.py      random lives of tensors against a naive model (model.py)
foreign.py      functions of autograd and PyTorch under the same checks
failure.py      what a failed check says
source.py       how examples are drawn; layouts.py the ways an array can lie in memory
"""

from __future__ import annotations

from engine.testing.bounds import (
    assert_ulp,
    dot_bound,
    gamma,
    matmul_bound,
    smallest_subnormal,
    sum_bound,
    ulp_distance,
    ulp_error,
    unit_roundoff,
)
from engine.testing.checks import (
    check_adjoint,
    check_backends,
    check_bits,
    check_capture,
    check_close,
    check_errors,
    check_grads,
    check_inputs_unmutated,
    check_layouts,
    check_linear_vjp,
    check_no_alias,
    check_second_order,
    check_threads,
    engine_vjp,
)
from engine.testing.failure import CheckFailure, rendered, unpacked
from engine.testing.layouts import placed
from engine.testing.opspec import Case, ErrorCase, OpSpec, register, specs
from engine.testing.rounded import Rounded
from engine.testing.source import Seeded, Source

__all__ = ["Case", "CheckFailure", "ErrorCase", "OpSpec", "Rounded", "Seeded", "Source", "assert_ulp", "check_adjoint",
           "check_backends", "check_bits", "check_capture", "check_close", "check_errors", "check_grads",
           "check_inputs_unmutated", "check_layouts", "check_linear_vjp", "check_no_alias", "check_second_order",
           "check_threads", "dot_bound", "engine_vjp", "gamma", "matmul_bound", "placed", "register", "rendered",
           "smallest_subnormal", "specs", "sum_bound", "ulp_distance", "ulp_error", "unit_roundoff", "unpacked"]
