"""Bugs in mixed precision: in what is rounded, how, when, and on which unit; and in the scaling of losses."""

from __future__ import annotations

from tools.mutants.record import Mutant

TESTS = "tests/test_precision.py"
ROUNDING = f"{TESTS}::test_factors_are_rounded_to_the_nearest"
BOUND = f"{TESTS}::test_a_product_is_within_the_bound_on_every_unit"
DEPTHS = f"{TESTS}::test_every_depth_with_bias_and_what_is_there"

PRECISION = [
    Mutant("ties away from even", "kernels/short_floats.h",
           "up_to_half = none + ((1u << (digits - 1)) - 1)", "up_to_half = none + (1u << (digits - 1))",
           "a number half-way between two of the format goes up, and from one below it",
           ROUNDING),
    Mutant("float16 too late subnormal", "kernels/short_floats.h",
           "size < vf_set1(0x1p-14f)", "size < vf_set1(0x1p-15f)",
           "the largest subnormal numbers keep a digit that the format does not have",
           ROUNDING),
    Mutant("B is not rounded", "kernels/gemm.c",
           "round_packed(packed, divide_up(columns, NR) * panel_size(NR, depths), x->format);",
           "round_packed(packed, columns / NR * panel_size(NR, depths), x->format);",
           "the columns beyond the last whole panel keep all their digits",
           f"{ROUNDING} {TESTS}::test_backward_rounds_as_forward_did_wherever_it_is_called"),
    Mutant("A in place", "kernels/gemm.c",
           "if (!x->format && (columns <=", "if ((columns <=",
           "an A that needs no packing is not rounded, or is read as if it were pairs",
           f"{ROUNDING} {BOUND}"),
    Mutant("few rows are not rounded", "kernels/gemm.c",
           "x->m <= FEW_ROWS && !x->format &&", "x->m <= FEW_ROWS &&",
           "a row alone has other bits than among many, those of float32",
           f"{TESTS}::test_a_row_does_not_depend_on_its_neighbours"),
    Mutant("activation in another format", "kernels/gemm_activation.c",
           ".b_row = 1, .b_col = k, .c_row = n, .format = format,", ".b_row = 1, .b_col = k, .c_row = n,",
           "the first product of the network is not rounded",
           f"{TESTS}::test_fused_ops_have_the_bits_of_their_parts"),
    Mutant("backward in the format of the caller", "engine/autograd.py",
           "token = product_format.set(edge.format)", "token = product_format.set(product_format.get())",
           "outside of the with statement the gradients are those of float32",
           f"{TESTS}::test_backward_rounds_as_forward_did_wherever_it_is_called"),
    Mutant("computed again in another format", "engine/checkpoint.py",
           "product_format.set(self.format)", "product_format.set(0)",
           "what a checkpoint computes again is not what was computed",
           f"{TESTS}::test_what_is_computed_again_is_rounded_again"),
    Mutant("a decorator that does not end", "engine/precision.py",
           "                product_format.reset(token)\n        return run",
           "                pass\n        return run",
           "after a decorated function everything is rounded",
           f"{TESTS}::test_one_object_may_be_entered_twice_and_decorate"),
    Mutant("NaN in the reference", "engine/backend/numpy_rows.py",
           "return xp.where(xp.isnan(x), x, ", "return xp.where(xp.isnan(x) & False, x, ",
           "a NaN whose first digits are zeros becomes infinity, and one whose digits are ones −0",
           ROUNDING),
    Mutant("an overflow steps", "engine/optim/scaler.py",
           "return optimizer.step(**options) if finite else None", "return optimizer.step(**options)",
           "parameters become NaN",
           f"{TESTS}::test_an_overflow_costs_a_step_and_nothing_else"),
    Mutant("looked at before the step", "engine/optim/scaler.py",
           "        if finite is None:", "        if True:",
           "gradients that were unscaled to be looked at cannot be stepped with",
           f"{TESTS}::test_the_scaler_refuses_what_it_cannot_do"),
    Mutant("workers in float32", "tools/training/session.py",
           "self.settings.seed, self.settings.precision)", "self.settings.seed)",
           "--precision bfloat16 changes nothing",
           "tests/test_tools_train.py::test_precision_reaches_the_workers"),
]
