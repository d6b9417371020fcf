"""The checks that one row of the op table (opspec.py) generates.

    check = CHECKS["adjoint"]
    if check.applies(spec):
        drawn = check.draw(spec, make)      # make(**options) gives a Source: Hypothesis', or a seeded one
        check.run(spec, drawn)

Drawing and checking are apart, so that a failure can be shown as Python that fails again: CheckFailure.reproduction.
strategies.checks_of(spec) makes them Hypothesis tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import engine as eg
from engine.ops import registry
from engine.testing.bounds import unit_roundoff
from engine.testing.checks import (
    as_tensor,
    check_adjoint,
    check_bits,
    check_close,
    check_errors,
    check_inputs_unmutated,
    check_linear_vjp,
    check_no_alias,
    check_second_order,
    check_threads,
)
from engine.testing.failure import CheckFailure, rendered
from engine.testing.layouts import LAYOUTS
from engine.testing.opspec import Case, OpSpec
from engine.testing.rounded import Rounded
from engine.testing.source import Seeded, Source

Make = Callable[..., Source]
Drawn = dict[str, Any]


@dataclass(frozen=True)
class RowCheck:
    """One check of one row.

    applies: whether a row has it
    draw:    (row, make) -> arguments of check, or None where an example will not do
    check:   (row, **arguments); raises CheckFailure
    share:   the part of a profile's examples that it takes: less for what costs more
    """

    name: str
    applies: Callable[[OpSpec], Any]
    draw: Callable[[OpSpec, Make], Drawn | None]
    check: Callable[..., None]
    share: float = 1.0

    def run(self, spec: OpSpec, drawn: Drawn) -> None:
        """The check; its failure says how to see it again."""
        try:
            self.check(spec, **drawn)
        except CheckFailure as failure:
            arguments = "".join(f", {name}={rendered(value)}" for name, value in drawn.items())
            registered = "import engine.testing.rows\n" if spec.op in registry else f"# once {spec!r} is registered\n"
            raise failure.with_reproduction(
                "from numpy import array, dtype, inf, nan\n"
                f"{registered}"
                "from engine.testing import Case, placed, specs, unpacked\n"
                "from engine.testing.row_checks import CHECKS\n"
                f"CHECKS[{self.name!r}].check(specs[{spec.name!r}]{arguments})", nodes=1) from None


CHECKS: dict[str, RowCheck] = {}


def _row_check(applies: Callable[[OpSpec], Any], draw: Callable[[OpSpec, Make], Drawn | None],
               share: float = 1.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def made(check: Callable[..., None]) -> Callable[..., None]:
        CHECKS[check.__name__] = RowCheck(check.__name__, applies, draw, check, share)
        return check
    return made


# ── which rows, and how their examples are drawn ──────────────────────────────────────────────────────

def ours(spec: OpSpec) -> bool:
    """Whether it is an op of the engine, not a function of NumPy arrays with a vjp of its own."""
    return spec.vjp is None


def some_case(spec: OpSpec, make: Make, dtype: str | None = None, **options: Any) -> Case:
    kind = dtype or ("float32", "float64")[make().integer(0, 1)]
    return spec.example(make(kind, **options))


def _any(**options: Any) -> Callable[[OpSpec, Make], Drawn]:
    return lambda spec, make: {"case": some_case(spec, make, **options)}


def _seed(make: Make) -> int:
    return make().integer(0, 99)


def _smooth(spec: OpSpec, make: Make) -> Drawn | None:
    case = some_case(spec, make, "float64", smooth=True, arrange=ours(spec))
    return {"case": case, "seed": _seed(make)} if spec.points(case) else None


def _flat(operands: list[Any]) -> list[np.ndarray]:
    """All arrays among the operands."""
    out: list[np.ndarray] = []
    for operand in operands:
        out += _flat(operand) if isinstance(operand, list) else [operand] if isinstance(operand, np.ndarray) else []
    return out


# ── values ────────────────────────────────────────────────────────────────────────────────────────────

@_row_check(lambda spec: ours(spec) or spec.formula or spec.reference, _any(arrange=True))
def forward(spec: OpSpec, case: Case) -> None:
    """Value within its bound, type and shape as the reference's, inputs left alone, memory of its own."""
    arrays = _flat(case.operands)
    want, bound = spec.expected(case)
    got = check_inputs_unmutated(lambda *_: spec.run(case.operands, case.attributes), *arrays)
    check_close(got, want, bound, check=f"{spec.name}: forward", origin="the bound of its formula")
    if not ours(spec):
        return
    kind = str(case.attributes.get("dtype") or case.dtype) if want.dtype.kind == "f" else want.dtype.name
    if got.dtype.name != kind:
        raise CheckFailure(f"{spec.name}: type", got=got.dtype.name, want=kind, bound="equal types",
                           origin="the reference's type")
    if not spec.view and any(np.shares_memory(got.numpy(), x) for x in arrays):
        raise CheckFailure(f"{spec.name}: memory", got="the result shares memory with an operand", want="its own",
                           bound="no byte in common", origin="its row does not say that it gives views")


@_row_check(lambda spec: spec.special and ours(spec), _any(arrange=True, special=True))
def special_values(spec: OpSpec, case: Case) -> None:
    """±0, ±∞, NaN, subnormals and the largest numbers among the operands, in any lane."""
    forward(spec, case)


@_row_check(lambda spec: ours(spec) and ":" not in spec.name, _any(dtype="float64"), share=0.2)
def reference_device(spec: OpSpec, case: Case) -> None:
    """The NumPy backend in float64, which is the oracle of much else, against the same references."""
    attributes = dict(case.attributes)
    if spec.op == "scaled_dot_product_attention":
        attributes["lengths"] = None  # its row makes a tensor of it on the CPU
    want, bound = spec.expected(Case(case.operands, attributes, case.dtype))

    def moved(x: Any) -> Any:
        return [moved(o) for o in x] if isinstance(x, list) else x if x is None else eg.tensor(x, device="reference")

    with eg.device("reference"):
        got = spec.run([moved(o) for o in case.operands], attributes)
    bound = bound + spec.cancels * unit_roundoff("float64")  # fused ops run as their compositions here
    check_close(got, want, bound, check=f"{spec.name}: reference device",
                origin="the bound of its formula, and what its composition cancels")


# ── gradients ─────────────────────────────────────────────────────────────────────────────────────────

def _either_rule(spec: OpSpec, make: Make) -> Drawn | None:
    drawn = _smooth(spec, make)
    return drawn and {**drawn, "create_graph": ours(spec) and make().integer(0, 2) == 2}


@_row_check(lambda spec: bool(spec.wrt), _either_rule)
def adjoint(spec: OpSpec, case: Case, seed: int, create_graph: bool) -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀu⟩, for the kernel's vjp and for the differentiable one; or for the row's own vjp."""
    analytic = spec.complex_function(case)
    check_adjoint(spec.function(case), *spec.points(case), reference=analytic or spec.numpy_function(case), seed=seed,
                  vjp=spec.vjp_function(case), rounding=spec.rounding(case), analytic=analytic is not None,
                  create_graph=create_graph)


@_row_check(lambda spec: bool(spec.wrt) and ours(spec), _smooth, share=0.3)
def second_order(spec: OpSpec, case: Case, seed: int) -> None:
    """The vjp's own vjp, with respect to the operands and to the cotangent."""
    check_second_order(spec.function(case), *spec.points(case), reference=spec.numpy_function(case),
                       rounding=spec.rounding(case), seed=seed)


@_row_check(lambda spec: bool(spec.wrt) and not ours(spec), _smooth)
def linear_vjp(spec: OpSpec, case: Case, seed: int) -> None:
    """A hand-written vjp is linear in its cotangent."""
    shape = np.shape(spec.run(case.operands, case.attributes))
    vjp = spec.vjp_function(case)
    assert vjp is not None
    check_linear_vjp(vjp, spec.points(case), shape, seed=seed)


def _typed(spec: OpSpec, make: Make) -> Drawn:
    return {"case": some_case(spec, make, arrange=True), "seed": _seed(make)}


@_row_check(lambda spec: spec.gradient is not None, _typed)
def kernel_vjp(spec: OpSpec, case: Case, seed: int) -> None:
    """A kernel's gradient in either type against the textbook's equation, within its error bound."""
    y, _ = spec.expected(case)
    g = np.asarray(np.random.default_rng(seed).uniform(-1, 1, y.shape)).astype(case.dtype)
    leaves = [as_tensor(x, True) for x in spec.points(case)]
    found = eg.grad(spec.function(case)(*leaves), leaves, as_tensor(g), allow_unused=True)
    wanted = [w for i, w in enumerate(spec.gradient_expected(case, g)) if i in spec.differentiable(case)]
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert isinstance(want, Rounded)
        if got is None or got.dtype.name != str(case.dtype):
            raise CheckFailure(f"{spec.name}: gradient {i}", got=got, want=f"a gradient in {case.dtype}",
                               bound="equal types", origin="a gradient is what may be added to its operand")
        check_close(got, want.value, want.tolerance, check=f"{spec.name}: gradient {i}",
                    origin="the bound of its equation")


def _scaled(spec: OpSpec, make: Make) -> Drawn | None:
    case, index = some_case(spec, make, "float64"), make().choice(spec.linear)
    return {"case": case, "index": index} if case.operands[index] is not None else None


@_row_check(lambda spec: bool(spec.linear) and ours(spec), _scaled, share=0.3)
def linear(spec: OpSpec, case: Case, index: int) -> None:
    """f(2a) − f(0) = 2 (f(a) − f(0)) in each operand in which f is affine: scaling by two is exact.

    Each of the three values is within its op's bound, or rounded once; for that, and for the sums of this check, there
    is 4 u (|f(2a)| + |f(a)| + |f(0)|).
    """
    several = isinstance(case.operands[0], list)

    def run(factor: float) -> tuple[np.ndarray, np.ndarray]:
        """The value, and the bound of its error."""
        operands: list[Any] = [[factor * x for x in case.operands[0]]] if several else list(case.operands)
        if not several:
            operands[index] = factor * operands[index]
        return (spec.run(operands, case.attributes).numpy(),
                spec.expected(Case(operands, case.attributes, case.dtype))[1])

    (y, error), (twice, error_of_twice), (zero, error_of_zero) = run(1.0), run(2.0), run(0.0)
    size = np.abs(twice) + np.abs(y) + np.abs(zero)
    check_close(twice - zero, 2 * (y - zero),
                error_of_twice + 2 * error + error_of_zero + 4 * unit_roundoff("float64") * size,
                check=f"{spec.name}: f(2a) = 2f(a)", origin="the op's own bounds and the roundings of this check")


def _single(spec: OpSpec) -> bool:
    return ours(spec) and (len(spec.wrt) > 1 or spec.op in ("concat", "stack", "einsum"))


@_row_check(_single, _any(dtype="float32"), share=0.3)
def unneeded_gradients(spec: OpSpec, case: Case) -> None:
    """With one operand requiring grad, its gradient has the bits that it has when all do."""
    points, f = spec.points(case), spec.function(case)
    leaves = [as_tensor(x, True) for x in points]
    y = f(*leaves)
    g = as_tensor(np.asarray(np.random.default_rng(1).uniform(-1, 1, y.shape)).astype(y.numpy().dtype))
    every = eg.grad(y, leaves, g, allow_unused=True)
    for i in range(len(points)):
        mixed = [as_tensor(p, i == j) for j, p in enumerate(points)]
        y = f(*mixed)
        if not y.requires_grad:
            continue
        alone = eg.grad(y, mixed[i], g, allow_unused=True)
        if alone is None and every[i] is not None:
            check_bits(np.zeros_like(every[i].numpy()), every[i].numpy() + 0.0, check=f"{spec.name}: gradient {i}")
        elif alone is not None:
            check_bits(alone.numpy() + 0.0, every[i].numpy() + 0.0, check=f"{spec.name}: gradient {i} alone")


@_row_check(lambda spec: bool(spec.wrt) and ours(spec), _any(arrange=True), share=0.1)
def no_alias(spec: OpSpec, case: Case) -> None:
    """After backward each gradient has memory of its own."""
    if points := spec.points(case):
        check_no_alias(spec.function(case), *points)


# ── the same bits ─────────────────────────────────────────────────────────────────────────────────────

def with_gradients(spec: OpSpec, case: Case) -> list[np.ndarray]:
    """The op's result, and its gradients for a fixed cotangent."""
    points = spec.points(case) if spec.wrt else []
    leaves = [as_tensor(x, True) for x in points]
    y = spec.function(case)(*leaves) if leaves else spec.run(case.operands, case.attributes)
    results = [y]
    if leaves and y.requires_grad:
        g = np.asarray(np.random.default_rng(5).uniform(-1, 1, y.shape)).astype(y.numpy().dtype)
        results += [d for d in eg.grad(y, leaves, as_tensor(g), allow_unused=True) if d is not None]
    return [r.numpy().copy() for r in results]


def _rearranged(operand: Any, name: str, rng: np.random.Generator) -> Any:
    if isinstance(operand, list):
        return [_rearranged(o, name, rng) for o in operand]
    return LAYOUTS[name](operand, rng) if isinstance(operand, np.ndarray) else operand


def _some_layouts(spec: OpSpec, make: Make) -> Drawn:
    names = list(LAYOUTS)[1:]
    first = make().integer(0, len(names) - 1)
    return {"case": some_case(spec, make), "names": [names[(first + i) % len(names)] for i in (0, 2, 3)]}


@_row_check(ours, _some_layouts, share=0.3)
def layouts(spec: OpSpec, case: Case, names: list[str]) -> None:
    """Result and gradients of operands in any layout have the bits of those in C order."""
    want = with_gradients(spec, case)
    rng = np.random.default_rng(1)
    for name in names:
        other = Case([_rearranged(o, name, rng) for o in case.operands], case.attributes, case.dtype)
        for got, expected in zip(with_gradients(spec, other), want):
            check_bits(got, expected, check=f"{spec.name}: {name} against C order")


def _large(spec: OpSpec, make: Make) -> Drawn:
    """Of an example of 100,000 elements no more than what it is made from: it can be printed, and cut down."""
    return {"dtype": make().choice(("float32", "float64")), "arrange": make().boolean(), "seed": _seed(make)}


@_row_check(lambda spec: spec.large and ours(spec), _large, share=0.1)
def threads(spec: OpSpec, dtype: str, arrange: bool, seed: int) -> None:
    """Result and gradients have the same bits with 1, 2, 3 and 7 threads, and with 1 again. Only rows that say how to
    draw a large example: one thread does all of a small one, or there is nothing in the op to share out."""
    case = spec.example(Seeded(seed, dtype, arrange=arrange), spec.large)
    check_threads(lambda: with_gradients(spec, case))


def _batch(spec: OpSpec, make: Make) -> Drawn:
    assert spec.batch is not None
    draw, batched = spec.batch
    case = spec.example(make(("float32", "float64")[make().integer(0, 1)]), draw)
    rows = len(case.operands[batched[0]])
    return {"case": case, "row": make().integer(0, rows - 1), "seed": _seed(make)}


def _run_rows(spec: OpSpec, operands: list[Any], attributes: dict[str, Any],
              g: np.ndarray | None) -> list[np.ndarray]:
    """The result, and the gradients of the operands that have rows."""
    assert spec.batch is not None
    shown = [i for i in spec.batch[1] if i in spec.wrt] if g is not None else []
    tensors = [as_tensor(x, i in shown) for i, x in enumerate(operands)]
    y = spec.run(tensors, attributes)
    grads = eg.grad(y, [tensors[i] for i in shown], as_tensor(g)) if shown else []
    return [y.numpy(), *[d.numpy() for d in grads]]


@_row_check(lambda spec: spec.batch, _batch)
def batch_invariance(spec: OpSpec, case: Case, row: int, seed: int) -> None:
    """A row's bits, and those of its gradients, depend on nothing but the row: they are the same alone, in another
    order of the batch, and beside rows of NaN, ∞ or huge numbers."""
    assert spec.batch is not None
    rng, batched = np.random.default_rng(seed), spec.batch[1]
    (y,) = _run_rows(spec, case.operands, case.attributes, None)
    g = np.asarray(rng.uniform(-1, 1, y.shape)).astype(y.dtype)
    whole = _run_rows(spec, case.operands, case.attributes, g)
    count = len(y)
    order = rng.permutation(count)
    place = int(np.flatnonzero(order == row)[0])
    one = slice(row, row + 1)

    def compared(what: str, pick: Callable[[np.ndarray], np.ndarray], at: slice) -> None:
        operands = [pick(x) if i in batched else x for i, x in enumerate(case.operands)]
        for i, (got, want) in enumerate(zip(_run_rows(spec, operands, case.attributes, pick(g)), whole)):
            part = f"gradient {i - 1} of row" if i else "row"
            check_bits(got[at], want[one], check=f"{spec.name}: {part} {row} {what} against in the batch of {count}")

    def poisoned(x: np.ndarray) -> np.ndarray:
        y = np.array(x)
        if x.dtype.kind == "f":
            y[:] = rng.choice([np.nan, np.inf, -np.inf, float(np.finfo(x.dtype).max)], x.shape)
        y[row] = x[row]
        return y

    compared("alone", lambda x: x[one], slice(0, 1))
    compared("in another order", lambda x: x[order], slice(place, place + 1))
    with np.errstate(all="ignore"):
        compared("beside NaN and infinities", poisoned, one)


# ── manners ───────────────────────────────────────────────────────────────────────────────────────────

@_row_check(lambda spec: spec.errors, lambda spec, make: {})
def errors(spec: OpSpec) -> None:
    """Each of the row's bad calls gives one line that names what it should."""
    for case in spec.errors:
        check_errors(case.call, case.kind, *case.words)
