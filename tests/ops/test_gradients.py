"""Every op's gradient, first and second order, against central differences of its float64 reference.

The references are NumPy (engine/testing/rows, formulas.py), never the engine's own jvp: that is made from the vjp, and
so agrees with any wrong vjp that is linear. Examples keep away from kinks by more than the differences reach.
"""

from __future__ import annotations

from table import generated, rows

from engine.testing import OpSpec, Seeded, check_no_alias

test_adjoint = generated("adjoint")
test_second_order = generated("second_order")
test_kernel_vjp = generated("kernel_vjp")
test_linear = generated("linear")
test_unneeded_gradients = generated("unneeded_gradients")


@rows(lambda spec: bool(spec.wrt))
def test_no_alias(spec: OpSpec) -> None:
    """After backward each gradient has memory of its own."""
    case = spec.example(Seeded(3, "float32", side=3))
    points = spec.points(case)
    if points:
        check_no_alias(spec.function(case), *points)
