"""The same bits: whatever the layout of the operands, the number of threads, the neighbours in a batch, and again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table import rows, share

import engine as eg
from engine.testing import OpSpec, Seeded, check_bits, check_threads
from engine.testing.checks import as_tensor
from engine.testing.layouts import LAYOUTS
from engine.testing.opspec import Case
from engine.testing.strategies import cases


def with_gradients(spec: OpSpec, case: Case) -> list[np.ndarray]:
    """The op's result, and its gradients for a fixed cotangent."""
    points = spec.points(case) if spec.wrt else []
    leaves = [as_tensor(x, True) for x in points]
    y = spec.function(case)(*leaves) if leaves else spec.run(case.operands, case.attributes)
    results = [y]
    if leaves and y.requires_grad:
        g = np.random.default_rng(5).uniform(-1, 1, y.shape).astype(y.numpy().dtype)
        results += [d for d in eg.grad(y, leaves, as_tensor(g), allow_unused=True) if d is not None]
    return [r.numpy().copy() for r in results]


def rearranged(operand: Any, name: str, rng: np.random.Generator) -> Any:
    if isinstance(operand, list):
        return [rearranged(o, name, rng) for o in operand]
    return LAYOUTS[name](operand, rng) if isinstance(operand, np.ndarray) else operand


@rows()
@share(0.3)
@given(data=st.data())
def test_layouts(spec: OpSpec, data: Any) -> None:
    """Result and gradients of operands in any layout have the bits of those in C order."""
    case = data.draw(cases(spec))
    want = with_gradients(spec, case)
    rng = np.random.default_rng(1)
    for name in data.draw(st.sets(st.sampled_from(list(LAYOUTS)[1:]), min_size=2, max_size=3)):
        other = Case([rearranged(o, name, rng) for o in case.operands], case.attributes, case.dtype)
        for got, expected in zip(with_gradients(spec, other), want):
            check_bits(got, expected, check=f"{spec.name}: {name} against C order")


@rows(lambda spec: spec.large)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads(spec: OpSpec, dtype: str) -> None:
    """1, 2, 3 and 7 threads, and 1 again: result and gradients."""
    case = spec.example(Seeded(11, dtype), spec.large)
    check_threads(lambda: with_gradients(spec, case))


@rows(lambda spec: spec.batch)
@given(data=st.data())
def test_batch_invariance(spec: OpSpec, data: Any) -> None:
    """A row alone has the bits that it has in the batch: its result, and the gradient of its operands."""
    assert spec.batch is not None
    draw, batched = spec.batch
    from engine.testing.strategies import Drawn

    source = Drawn(data.draw, data.draw(st.sampled_from(["float32", "float64"])))
    case = spec.example(source, draw)
    shown = [i for i in batched if i in spec.wrt]

    def run(operands: list[Any], g: np.ndarray | None) -> tuple[np.ndarray, list[np.ndarray]]:
        tensors = [as_tensor(x, i in shown) for i, x in enumerate(operands)]
        y = spec.run(tensors, case.attributes)
        if g is None or not shown:
            return y.numpy(), []
        return y.numpy(), [d.numpy() for d in eg.grad(y, [tensors[i] for i in shown], as_tensor(g))]

    y, _ = run(case.operands, None)
    g = source.generator().uniform(-1, 1, y.shape).astype(y.dtype)
    y, grads = run(case.operands, g)
    row = data.draw(st.integers(0, y.shape[0] - 1))
    one = slice(row, row + 1)
    alone = [x[one] if i in batched else x for i, x in enumerate(case.operands)]
    y_alone, grads_alone = run(alone, g[one])
    check_bits(y_alone, y[one], check=f"{spec.name}: row {row} alone against in the batch of {y.shape[0]}")
    for got, want in zip(grads_alone, grads):
        check_bits(got, want[one], check=f"{spec.name}: the gradient of row {row} alone")


@rows(lambda spec: spec.large and not spec.batch and ":" not in spec.name)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_position(spec: OpSpec, dtype: str) -> None:
    """An element's bits do not depend on where in a vector or tail it stands: ends of arrays alone, and strided."""
    source = Seeded(2, dtype, side=77, ndim=1, special=spec.special)
    case = spec.example(source)
    operands = [np.array(np.broadcast_to(x, (77,))) for x in case.operands]
    whole = spec.run(operands, case.attributes).numpy()
    for start in (1, 2, 3, 5, 8, 13, 33, 64, 76):
        for step in (1, 2):
            part = spec.run([x[start::step] for x in operands], case.attributes).numpy()
            check_bits(part, whole[start::step], check=f"{spec.name}: elements {start}::{step} alone")
