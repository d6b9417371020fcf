"""The same bits: whatever the layout of the operands, the number of threads, the neighbours in a batch, and again."""

from __future__ import annotations

import numpy as np
import pytest
from table import generated, rows

from engine.testing import OpSpec, Seeded, check_bits

test_layouts = generated("layouts")
test_threads = generated("threads")
test_batch_invariance = generated("batch_invariance")


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
    for at in range(77):  # one element counts as contiguous, whatever its stride
        alone = spec.run([x[at:at + 1][::-1] for x in operands], case.attributes).numpy()
        check_bits(alone, whole[at:at + 1], check=f"{spec.name}: element {at} alone, its stride negative")
