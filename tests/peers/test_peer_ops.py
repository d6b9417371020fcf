"""Every op that PyTorch has, forward and vjp, on examples drawn by the op's own row.

Forward: each element of ours, float32 and float64, lies within the row's derived bound of PyTorch's float64 result, and
what is no number is equal. Gradients: of ⟨y, g⟩ for a drawn g, ties and kinks included. And both in float32 and float64
as a whole, by the criterion of agreement.py, over all examples of the op.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import agreement
import numpy as np
import pytest
import torch
from agreement import agree
from torch_ops import ANY_OF_EQUAL, CANCELS, NO_GRADIENT, NO_PEER, TORCH, as_torch, counterpart

import engine as eg
import engine.testing.rows
from engine.ops import registry
from engine.testing import OpSpec, Source, check_close, specs
from engine.testing.bounds import spacing, unit_roundoff
from engine.testing.checks import as_tensor
from engine.testing.opspec import Case

EXAMPLES = 24
ROWS = [spec for spec in specs.values() if spec.op not in NO_PEER]


class Varied(Source):
    """Shapes and values of a seed."""

    def __init__(self, seed: int, **options: Any):
        super().__init__("float32", **options)
        self.rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))


def test_every_op_is_compared_or_has_a_reason() -> None:
    assert {name.split(":")[0] for name in TORCH} | NO_PEER.keys() == registry.keys()
    assert not NO_PEER.keys() & TORCH.keys()
    assert {spec.op for spec in specs.values()} == registry.keys()


def examples(spec: OpSpec) -> list[Case]:
    cases = [spec.example(Varied(seed, smooth=seed % 2 == 1 or spec.op in ANY_OF_EQUAL)) for seed in range(EXAMPLES)]
    if spec.large is not None:
        cases.append(spec.example(Varied(EXAMPLES), spec.large))
    for case in cases:
        if case.attributes.get("dropout"):
            case.attributes["dropout"] = 0.0  # its draws are the engine's own
    return cases


def widened(x: Any, dtype: str) -> Any:
    """An operand or attribute, its floating arrays in this type."""
    if isinstance(x, list):
        return [widened(part, dtype) for part in x]
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x, dtype if x.dtype.kind == "f" else x.dtype)
    return x


def case_in(case: Case, dtype: str) -> Case:
    attributes = {name: widened(value, dtype) for name, value in case.attributes.items()}
    return Case([widened(x, dtype) for x in case.operands], attributes, np.dtype(dtype))


def cotangent(y: Any, dtype: str) -> np.ndarray:
    return np.random.default_rng(y.size).uniform(-1, 1, y.shape).astype("float32").astype(dtype)


def leaves_of(spec: OpSpec, case: Case) -> list[int]:
    """The operands, or parts of the first, with respect to which both differentiate."""
    if case.operands and isinstance(case.operands[0], list):
        return list(range(len(case.operands[0])))
    return [i for i in spec.differentiable(case) if i not in NO_GRADIENT.get(spec.op, ())]


def run_ours(spec: OpSpec, case: Case, dtype: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """(y, gradients)."""
    case = case_in(case, dtype)
    several = bool(case.operands) and isinstance(case.operands[0], list)
    operands = case.operands[0] if several else case.operands
    made = [as_tensor(x, i in leaves_of(spec, case)) for i, x in enumerate(operands)]
    y = spec.run([made] if several else made, case.attributes)
    if not y.requires_grad:
        return y.numpy(), []
    leaves = [made[i] for i in leaves_of(spec, case)]
    found = eg.grad(y, leaves, as_tensor(cotangent(y, dtype)), allow_unused=True)
    return y.numpy(), [np.zeros(x.shape) if g is None else g.numpy() for x, g in zip(leaves, found)]


def run_peer(spec: OpSpec, case: Case, dtype: str) -> tuple[np.ndarray, list[np.ndarray]]:
    case = case_in(case, dtype)
    several = bool(case.operands) and isinstance(case.operands[0], list)
    wanted = leaves_of(spec, case)
    operands = [as_torch(x, dtype, several or i in wanted) for i, x in enumerate(case.operands)]
    y = counterpart(spec.name)(*operands, **case.attributes)
    leaves = [(operands[0] if several else operands)[i] for i in wanted]
    if not y.requires_grad:
        return y.detach().numpy(), []
    g = torch.tensor(cotangent(y.detach().numpy(), dtype), dtype=y.dtype)
    found = torch.autograd.grad(y, leaves, g, allow_unused=True)
    return y.detach().numpy(), [np.zeros(x.shape) if g is None else g.numpy() for x, g in zip(leaves, found)]


def compare_values(spec: OpSpec, case: Case, ours: np.ndarray, wide: np.ndarray, dtype: str) -> None:
    """Elementwise: ours is within the bound of its row and type, the peer's wide result within that of float64.

    An exact result of ours is within half a unit in the last place; the peer's square root and quotient within one.
    """
    if wide.dtype.kind != "f" or ours.dtype.kind != "f":
        assert np.array_equal(ours, wide), spec.name
        return
    bound, peers_bound = (spec.expected(case_in(case, kind))[1] for kind in (dtype, "float64"))
    bound = bound + peers_bound + spacing(wide, dtype) / 2 + spacing(wide, "float64")
    bound = bound + max(spec.cancels, CANCELS.get(spec.op, 0.0)) * unit_roundoff("float64")
    check_close(ours, wide, bound, check=f"{spec.name}: forward, {dtype}", origin="the bounds of the row")


class Together:
    """All examples of a row end to end, each brought to size 1 by the largest number of the wide result.

    A gradient is measured beside its cotangent where that is larger: some are nothing but rounding errors, such as that
    of softmax over one element.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, *found: np.ndarray, beside: float = 0.0) -> None:
        """ours, ours wide, the peer's, the peer's wide."""
        assert len({x.shape for x in found}) == 1, [x.shape for x in found]
        size = np.abs(found[3]).max(initial=beside) or 1.0
        for name, x in zip(("ours", "ours_wide", "peer", "wide"), found):
            self.parts[name].append(np.asarray(x, np.float64).reshape(-1) / size)

    def agree(self, part: str, what: str) -> None:
        if self.parts:
            agree(part, what, **{name: np.concatenate(x) for name, x in self.parts.items()})


def compare(spec: OpSpec) -> None:
    values, gradients = Together(), Together()
    for case in examples(spec):
        ours, ours_wide = (run_ours(spec, case, dtype) for dtype in ("float32", "float64"))
        peer, wide = (run_peer(spec, case, dtype) for dtype in ("float32", "float64"))
        for (y, _), dtype in ((ours, "float32"), (ours_wide, "float64")):
            compare_values(spec, case, y, wide[0], dtype)
        if wide[0].dtype.kind == "f":
            values.add(ours[0], ours_wide[0], peer[0], wide[0])
        assert len(ours[1]) == len(wide[1]), f"{spec.name}: {len(ours[1])} gradients, the peer has {len(wide[1])}"
        for found in zip(ours[1], ours_wide[1], peer[1], wide[1]):
            gradients.add(*found, beside=1.0)  # the cotangent's largest number, nearly
    values.agree("ops: forward", spec.name)
    gradients.agree("ops: gradients", spec.name)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("spec", ROWS, ids=[spec.name for spec in ROWS])
def test_op(spec: OpSpec) -> None:
    compare(spec)


# ── ±0, ±∞, NaN, the largest and smallest numbers ─────────────────────────────────────────────────────

OTHERWISE = {
    "sign": "of NaN: NaN, as the array API standard has it; PyTorch gives 0",
    "softplus": "its counterpart's threshold lies where float64 needs none: in float32 eˣ overflows before",
    "gelu": "of the largest numbers: themselves; PyTorch's product overflows",
    "floor_divide": "of infinities: the floor of the quotient, as the standard has it; PyTorch gives NaN for ∞ // 2",
    "sinh": "finite to ln 2 beyond where eˣ overflows, which PyTorch halves only then",
    "cosh": "finite to ln 2 beyond where eˣ overflows, which PyTorch halves only then",
    "unique_inverse": "PyTorch numbers NaNs otherwise",
    "unique_all": "PyTorch numbers NaNs otherwise",
    "argmin": "a stable sort stands for it, which puts NaN last",
}


def special_places(spec: OpSpec, seed: int) -> bool:
    """Whether NaN and infinities of one example come out at the same places, and what is no float is equal."""
    case = case_in(spec.example(Varied(seed, special=True)), "float32")
    ours = spec.run(case.operands, case.attributes).numpy()
    peer = counterpart(spec.name)(*[as_torch(x, "float32") for x in case.operands], **case.attributes).numpy()
    if ours.dtype.kind != "f":
        return np.array_equal(ours, peer)
    signs = [np.where(np.isinf(y), np.sign(y), 0) for y in (ours, peer)]
    return np.array_equal(np.isnan(ours), np.isnan(peer)) and np.array_equal(*signs, equal_nan=True)


@pytest.mark.parametrize("spec", [spec for spec in ROWS if spec.special], ids=lambda spec: spec.name)
def test_special_values(spec: OpSpec) -> None:
    same = all(special_places(spec, seed) for seed in range(40))
    assert same == (spec.name not in OTHERWISE)


# ── what is a little off is seen, in every op ─────────────────────────────────────────────────────────

@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("dtype, relative", [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("place", ["value", "gradient"])
def test_planted_differences_are_seen(place: str, dtype: str, relative: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every floating result, and then every gradient, too large by a hundredth of a thousandth, or of 10⁻¹⁰ of it."""
    real, changed = run_ours, set()

    def off(spec: OpSpec, case: Case, kind: str) -> tuple[np.ndarray, list[np.ndarray]]:
        y, gradients = real(spec, case, kind)
        if kind != dtype:
            return y, gradients
        if place == "value" and y.dtype.kind == "f" and y.any():
            changed.add(spec.name)
            return y + y * y.dtype.type(relative), gradients
        if place == "gradient" and any(g.any() for g in gradients):
            changed.add(spec.name)
            return y, [g + g * g.dtype.type(relative) for g in gradients]
        return y, gradients

    monkeypatch.setattr(agreement, "seen", defaultdict(list))
    monkeypatch.setitem(globals(), "run_ours", off)
    monkeypatch.setitem(globals(), "EXAMPLES", 6)
    unseen = set()
    for spec in ROWS:
        try:
            compare(spec)
        except AssertionError:  # a CheckFailure is one
            continue
        unseen.add(spec.name)
    assert not unseen & changed, sorted(unseen & changed)
    assert len(changed) > 60
