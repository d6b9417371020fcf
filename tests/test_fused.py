"""A fused op is there to run its own kernel: on the CPU it must, and its composition must not run by accident."""

from __future__ import annotations

import pytest

import engine as eg
from engine.backend import get_backend, observers
from engine.ops.registry import internal, registry

FUSED = {name: made for name, made in {**registry, **internal}.items() if made.fused}


def test_there_are_fused_ops() -> None:
    assert {"linear", "layer_norm", "attention", "softmax_rows", "token_cross_entropy", "rotate_pairs"} <= set(FUSED)


@pytest.mark.parametrize("name", sorted(FUSED))
def test_every_fused_op_names_a_kernel_of_the_header(name: str) -> None:
    assert get_backend("cpu").has_fused(FUSED[name].kernel), f"{name}: kernels.h has no {FUSED[name].kernel!r}"


@pytest.mark.parametrize(("call", "kernels"), [
    (lambda x: eg.linear(x, x), ["gemm"]),
    (lambda x: eg.softmax(x), ["softmax"]),
    (lambda x: eg.layer_norm(x, x[0], x[1]), ["layer_norm"]),
    (lambda x: eg.cross_entropy(x, eg.tensor([0, 1, 2, 3]), reduction="none"), ["check_index", "cross_entropy"]),
    (lambda x: eg.gelu(x), ["gelu"]),
])
def test_one_launch(call, kernels) -> None:
    x = eg.ones(4, 4)
    seen: list[str] = []

    def observe(name: str, _arguments: tuple[object, ...]) -> None:
        seen.append(name)

    observers.append(observe)
    try:
        call(x)
    finally:
        observers.remove(observe)
    assert [name for name in seen if name != "cast"] == kernels
