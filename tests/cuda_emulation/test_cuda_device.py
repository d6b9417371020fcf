"""The op suite on device "cuda": every row of the op table, forward and backward, and a training run.

By default that device is the stand-in (cupy_stand_in.py), which proves the Python of the GPU backend and, under the
emulation, its kernels. `make test-gpu` runs the same tests on a real GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import device
import emulation
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as eg
import engine.testing.rows  # noqa: F401  (registers the engine's rows)
from engine.backend import cuda_source, get_backend, observers
from engine.testing import OpSpec, check_bits, check_close, specs
from engine.testing.opspec import Case
from engine.testing.strategies import cases

pytestmark = pytest.mark.skipif(not device.REAL and not emulation.available(), reason="no C++ compiler")
launched: set[str] = set()


@pytest.fixture(scope="module", autouse=True)
def on_cuda() -> Iterator[None]:
    def note(name: str, _arguments: tuple[Any, ...]) -> None:
        launched.add(name)

    with device.cuda() as description, eg.device("cuda"):
        observers.append(note)
        print(f"\ndevice cuda: {description}")
        yield
        observers.remove(note)
        ran = sorted(launched & set(cuda_source.kernels()))
        print(f"\nCUDA kernels that ran: {len(ran)} of {len(cuda_source.kernels())}: {', '.join(ran)}")


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in specs.values()])
@settings(max_examples=3)
@given(data=st.data())
def test_forward(spec: OpSpec, data: Any) -> None:
    """Value within its bound, type and shape as the reference's."""
    case = data.draw(cases(spec, special=spec.special and data.draw(st.booleans())))
    want, bound = spec.expected(case)
    got = spec.run(case.operands, case.attributes)
    assert got.device == "cuda"
    check_close(got, want, bound, check=f"{spec.name}: forward on cuda", origin="the bound of its formula")
    if want.dtype.kind == "f" and spec.op != "astype":
        assert got.dtype.name == str(case.dtype)


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in specs.values() if s.wrt])
@settings(max_examples=2)
@given(data=st.data())
def test_gradient(spec: OpSpec, data: Any) -> None:
    """In float64, the gradients on the device are those of the reference device, to 2²⁰ roundings of the largest."""
    case = data.draw(cases(spec, "float64", smooth=True))
    found = [gradients(spec, case, name) for name in ("cuda", "reference")]
    for got, want in zip(*found):
        size = np.abs(want).max(initial=0.0)
        check_close(got + 0.0, want + 0.0, 2.0**-33 * size, check=f"{spec.name}: gradient on cuda", origin="2²⁰ roundings")


def gradients(spec: OpSpec, case: Case, name: str) -> list[np.ndarray]:
    with eg.device(name):
        leaves = [eg.tensor(x, requires_grad=True) for x in spec.points(case)]
        y = spec.function(case)(*leaves)
        g = np.random.default_rng(5).uniform(-1, 1, y.shape)
        grads = eg.grad(y, leaves, eg.tensor(g), allow_unused=True)
        return [y.numpy()] + [np.zeros(x.shape) if d is None else d.numpy() for x, d in zip(leaves, grads)]
