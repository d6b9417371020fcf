"""Bad input gives one line that names the op, the argument, what came and what was expected."""

from __future__ import annotations

import inspect

from table import generated, rows

import engine as eg
from engine.ops import registry
from engine.testing import OpSpec, check_errors

test_errors = generated("errors")


@rows(lambda spec: ":" not in spec.name)
def test_unknown_argument(spec: OpSpec) -> None:
    """A misspelt keyword is named, and so is the op."""
    op = registry[spec.op]
    operands = ["ij,jk->ik"] if spec.op == "einsum" else []
    operands += [[eg.ones(2, 2)]] if op.signature.startswith("*") else [eg.ones(2, 2) for _ in op.inputs]
    check_errors(lambda: op(*operands, axes_of_evil=1), TypeError, spec.op, "axes_of_evil")


@rows(lambda spec: ":" not in spec.name)
def test_operand_is_no_tensor(spec: OpSpec) -> None:
    """An operand that is no tensor and no number: the line says so, and names the op if that looks at it itself."""
    op = registry[spec.op]
    operands: list[object] = ["no tensor" for name in op.inputs if name not in op.optional]
    if op.variadic:
        operands = ["ij->ij", "no tensor"] if spec.op == "einsum" else [["no tensor"]]
    required = [1 for default in op.attributes.values() if default is inspect.Parameter.empty]
    whose = () if op.variadic and op.composite else (spec.op,)
    check_errors(lambda: op(*operands, *required), TypeError, *whose, "str")


def test_devices_are_not_mixed() -> None:
    a, b = eg.ones(2), eg.ones(2, device="reference")
    check_errors(lambda: a + b, ValueError, "add", "cpu", "reference", ".to()")
    check_errors(lambda: eg.layer_norm(a, a, b), ValueError, "layer_norm", "cpu", "reference")
    check_errors(lambda: eg.concat([a, b]), ValueError, "concat", "cpu", "reference")
