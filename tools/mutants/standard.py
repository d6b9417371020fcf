"""Bugs in what the array API standard asks for: the functions that NumPy computes, sets, copies and types."""

from __future__ import annotations

from tools.mutants.record import Mutant
from tools.mutants.surface import FORWARD, both

NAMESPACE = "tests/test_array_api.py"

STANDARD = [
    Mutant("standard: atan2's axes", "engine/ops/functions.py",
           "return g * (b / r / r), -(g * (a / r / r))", "return g * (a / r / r), -(g * (b / r / r))",
           "the two gradients are exchanged",
           both("atan2")),
    Mutant("standard: logaddexp's second derivative", "engine/ops/functions.py",
           "where(isinf(a) & (a == b), 0.0, a - b)", "where(a == b, 0.0, a - b)",
           "where both are equal the gradient no longer depends on them",
           "'tests/ops/test_gradients.py::test_second_order[logaddexp]'"),
    Mutant("standard: a cumulative product's rule", "engine/ops/reductions.py",
           "return running_sum((g * y).flip(axis), axis).flip(axis) / x", "return running_sum(g * y, axis) / x",
           "each element gets the gradients of the products before it",
           both("cumulative_prod")),
    Mutant("standard: NumPy's layouts", "engine/backend/numpy_rows.py",
           "function(*[dense(x) for x in xp.broadcast_arrays(*inputs)])", "function(*inputs)",
           "NumPy computes strided operands by other code, with other bits",
           "'tests/ops/test_bits.py::test_layouts[log10]'"),
    Mutant("standard: a lone element's stride", "engine/backend/numpy_rows.py",
           "return x.copy() if x.size == 1 else xp.ascontiguousarray(x)", "return xp.ascontiguousarray(x)",
           "one element with a negative stride is computed by NumPy's other code, to other bits",
           "tests/ops/test_bits.py::test_position"),
    Mutant("standard: ∞ // 2", "engine/backend/numpy_rows.py",
           "xp.where(xp.isinf(a) | xp.isinf(b), a / b, xp.floor_divide(a, b))", "xp.floor_divide(a, b)",
           "NaN in place of ∞",
           f"'{FORWARD}::test_special_values[floor_divide]' {NAMESPACE}"),
    Mutant("standard: NaNs in sets", "engine/ops/sets.py",
           "return_counts=True, equal_nan=False)", "return_counts=True, equal_nan=True)",
           "all NaNs are counted as one element",
           f"'{FORWARD}::test_special_values[unique_all: counts]'"),
    Mutant("standard: the order of moved axes", "engine/ops/movement.py",
           "in sorted(zip(places, moved)):", "in zip(places, moved):",
           "an axis is put in its place before those that stand further left",
           f"'{FORWARD}::test_forward[moveaxis: several]'"),
    Mutant("standard: sums of unsigned integers", "engine/ops/reductions.py",
           'uint64 if dtype.kind == "u" else int64', "int64",
           "a sum of uint64 comes out signed",
           f"{FORWARD}::test_integers {NAMESPACE}"),
    Mutant("standard: written numbers", "engine/ops/indexing.py",
           "value = tensor(value, dtype=self.dtype, device=self.device)", "value = tensor(value, device=self.device)",
           "a number goes into a float64 tensor by way of float32",
           NAMESPACE),
    Mutant("standard: a copy that is asked for", "engine/array_api.py",
           "return ops.positive(y) if copy and y.array is x.array else y", "return y",
           "asarray(x, copy=True) is x",
           NAMESPACE),
    Mutant("standard: ranges beyond 2⁶³", "engine/backend/numpy_rows.py",
           'if y.dtype.kind == "f" or isinstance(start, float) or isinstance(step, float):', "if True:",
           "an unsigned range overflows",
           NAMESPACE),
]
