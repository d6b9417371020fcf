"""Every op's gradient, first and second order, against central differences of its float64 reference.

The references are NumPy (engine/testing/rows, formulas.py), never the engine's own jvp: that is made from the vjp, and
so agrees with any wrong vjp that is linear. Examples keep away from kinks by more than the differences reach.
"""

from __future__ import annotations

from typing import Any

import pytest
from table import generated, rows

import engine as eg
from engine.autograd import Node
from engine.ops.registry import Op
from engine.testing import OpSpec, Seeded

test_adjoint = generated("adjoint")
test_second_order = generated("second_order")
test_kernel_vjp = generated("kernel_vjp")
test_linear = generated("linear")
test_unneeded_gradients = generated("unneeded_gradients")
test_no_alias = generated("no_alias")


@rows(lambda spec: bool(spec.wrt) and "needs" in eg.ops.registry[spec.op].needed and spec.op != "divide")
def test_only_wanted_gradients_are_made(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that asks which gradients are needed makes no other. Division's first is half of its second."""
    made = []
    gradients = Op.gradients

    def watched(self: Op, node: Node, g: eg.Tensor, create_graph: bool) -> Any:
        found = gradients(self, node, g, create_graph)
        if "needs" in self.needed:
            made.append([(grad is None or edge is not None) for grad, edge in zip(found, node.edges)])
        return found

    monkeypatch.setattr(Op, "gradients", watched)
    case = spec.example(Seeded(3, "float32", side=3))
    points = spec.points(case)
    for i in range(len(points)):
        leaves = [eg.tensor(x, requires_grad=i == j) for j, x in enumerate(points)]
        y = spec.function(case)(*leaves)
        if y.requires_grad:
            eg.grad(y, leaves[i], eg.ones_like(y), allow_unused=True)
    assert made and all(all(row) for row in made)
