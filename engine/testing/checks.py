"""Checks of numerical code, each usable alone on any callable; each raises CheckFailure, which says what is wrong.

The gradient checks ask for float64 and for points away from kinks: central differences of float32 tell nothing apart.

What f takes and gives is said at each check. Where it takes tensors, they lie over the arrays that the check was given,
in their layout, so that a function of arrays goes in as `lambda x: f(x.numpy())`; NumPy's own take tensors as they are.
A result may be a tensor or an array wherever no gradient is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import engine as eg
from engine.backend import Array
from engine.testing.bounds import ulp_error, unit_roundoff
from engine.testing.differences import complex_step, directional, second_directional
from engine.testing.failure import CheckFailure, Reproduction, called, reproduction
from engine.testing.layouts import LAYOUTS, placed, placement, zero_stride

Function = Callable[..., Any]
THREADS = (1, 2, 3, 7)


def as_tensor(x: Any, requires_grad: bool = False) -> Any:
    """A tensor over a NumPy array in its own layout, on the CPU; anything else as it is."""
    if not isinstance(x, np.ndarray):
        return x
    out = eg.Tensor(Array(x), "cpu")
    return out.requires_grad_(True) if requires_grad else out


def as_numpy(y: Any) -> np.ndarray:
    return y.numpy() if isinstance(y, eg.Tensor) else np.asarray(y)


# ── values ────────────────────────────────────────────────────────────────────────────────────────────

def check_close(got: Any, want: Any, bound: Any, *, check: str = "check_close", origin: str = "as given",
                reproduction: Reproduction = "") -> None:
    """|got − want| ≤ bound elementwise, want and bound in float64. NaN must meet NaN, and an infinity an equal one; a
    number whose bound reaches beyond the largest float may be infinite, or the other way round. Where the bound is 0,
    zeros must agree in their signs."""
    got = as_numpy(got)
    want = np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise CheckFailure(check, got=got.shape, want=want.shape, bound="equal shapes", origin="a result has one shape",
                           reproduction=reproduction or called("check_close", got, want, 0.0))
    bound = np.broadcast_to(np.asarray(bound, np.float64), want.shape)
    if got.dtype.kind != "f":
        holds = got == want
    else:
        limit = float(np.finfo(got.dtype).max)
        wide = got.astype(np.float64)
        with np.errstate(all="ignore"):
            finite = np.abs(wide - want) <= bound
            edge = (np.abs(want) + bound > limit) & (np.abs(wide) * (1 + 16 * float(np.finfo(got.dtype).eps)) > limit)
            beyond = edge & (np.sign(wide) == np.sign(want)) & (bound > 0)
        signed = (want != 0) | (bound > 0) | (np.signbit(wide) == np.signbit(want))
        holds = ((finite & signed) | beyond | (np.isnan(wide) & np.isnan(want)) | ((wide == want) & signed))
    if not holds.all():
        with np.errstate(all="ignore"):
            excess = np.where(holds, -1.0, np.nan_to_num(np.abs(got.astype(np.float64) - want) - bound, nan=np.inf))
        at = np.unravel_index(int(np.argmax(excess)), want.shape)
        ulps = float(ulp_error(got[at], want[at])) if got.dtype.kind == "f" else None
        allowed = float(bound[at])
        raise CheckFailure(check, index=at, got=got[at], want=want[at], ulps=ulps, bound=allowed, origin=origin,
                           reproduction=reproduction or called("check_close", got[at], want[at], allowed))


def check_bits(got: Any, want: Any, *, check: str = "check_bits", origin: str = "the same computation",
               reproduction: Reproduction = "") -> None:
    """The same type, shape and bits; NaNs of any bits are equal."""
    a, b = as_numpy(got), as_numpy(want)
    if a.dtype != b.dtype or a.shape != b.shape:
        raise CheckFailure(check, got=f"{a.dtype} {a.shape}", want=f"{b.dtype} {b.shape}", origin=origin,
                           bound="equal types and shapes", reproduction=reproduction or called("check_bits", a, b))
    same = a == b
    if a.dtype.kind == "f":
        same = (same & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))
    if not same.all():
        at = np.unravel_index(int(np.argmin(same)), a.shape)
        raise CheckFailure(check, index=at, got=a[at], want=b[at], bound="equal bits", origin=origin,
                           ulps=float(ulp_error(a[at], b[at])) if a.dtype.kind == "f" else None,
                           reproduction=reproduction or called("check_bits", a[at], b[at]))


# ── gradients ─────────────────────────────────────────────────────────────────────────────────────────

def _float64(check: str, xs: Sequence[Any]) -> list[np.ndarray]:
    """The inputs, rounded to multiples of 2⁻³⁰: so x + i h v, all powers of two but v of 10 bits, is exact (|x| < 2²³),
    and the differences see no rounding of their arguments."""
    arrays = [as_numpy(x) for x in xs]
    for i, x in enumerate(arrays):
        if x.dtype != np.float64:
            raise TypeError(f"{check}: input {i} is {x.dtype}, expected float64; a difference of two float32 results "
                            "keeps 3 or 4 digits at best, which hides wrong gradients")
    snapped = [np.round(x * 2.0**30) / 2.0**30 for x in arrays]
    return [x if np.array_equal(x, s) else np.asarray(s) for x, s in zip(arrays, snapped)]


def _directions(arrays: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """One random tangent for each input, of 10 bits, never uniform: a sum over a wrong axis hides behind a constant."""
    return [np.asarray(rng.integers(256, 1024, x.shape) / 1024 * rng.choice([-1.0, 1.0], x.shape)) for x in arrays]


def _plain(f: Function) -> Callable[..., np.ndarray]:
    """f as a function of NumPy arrays."""
    def run(*arrays: np.ndarray) -> np.ndarray:
        with eg.no_grad():
            return as_numpy(f(*[as_tensor(x) for x in arrays]))
    return run


def _rounding(y: np.ndarray, given: Any) -> Any:
    """A bound on the rounding error of one evaluation of y. Without a given one 64 u (1 + max |y|): an assumption, that
    y comes of at most eight functions of 4 ULPs (8 u) each, on numbers no larger than 1 or the largest element. If it
    loses more there is a false alarm, and `rounding` says what it loses; if less, what the differences make of it,
    64 u · 11/6h, hides an error of 7·10⁻¹² (1 + max |y|) in an element of J v, and no more.
    """
    return 64 * unit_roundoff("float64") * (1 + float(np.max(np.abs(y), initial=0.0))) if given is None else given


def _differentiable(check: str, y: Any, instead: str = "") -> Any:
    """y, which gradients are asked of."""
    if not hasattr(y, "backward"):
        raise TypeError(f"{check}: f gave {type(y).__name__}, expected a tensor, for the engine's gradients{instead}")
    return y


def engine_vjp(f: Function, create_graph: bool = False) -> Callable[..., tuple[Any, list[np.ndarray]]]:
    """(y, gᵀ ∂f/∂x for each x) of a function of tensors, by the engine's reverse mode."""
    def run(xs: Sequence[np.ndarray], g: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        leaves = [as_tensor(x, True) for x in xs]
        y = _differentiable("engine_vjp", f(*leaves), "; check_adjoint takes a vjp of one's own")
        grads = eg.grad(y, leaves, as_tensor(g), create_graph=create_graph, allow_unused=True)
        return y.numpy(), [np.zeros(x.shape) if d is None else d.numpy() for x, d in zip(xs, grads)]
    return run


def check_adjoint(f: Function, *xs: Any, reference: Function | None = None, vjp: Function | None = None,
                  rounding: Any = None, analytic: bool = False, create_graph: bool = False, seed: int = 0) -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀ u⟩ for a random tangent v and cotangent u: whether vjp is the transpose of f's derivative.

    f:         the function, of tensors (or of arrays, with a vjp of its own)
    reference: f in float64 NumPy, whose central differences give J v; f itself by default. Never a jvp made from the
               vjp: that agrees with any wrong vjp that is linear.
    vjp:       vjp(xs, u) -> (y, [Jᵀu for each x]); the engine's reverse mode by default
    rounding:  a bound on the error of one evaluation of reference, elementwise or one number
    analytic:  reference takes complex arrays and is analytic: J v by a complex step, which sees errors of 10⁻¹⁴

    Both sides are sums; they may differ by what the differences are wrong by (differences.py), weighted with |u|. The
    rounding of the vjp itself is that of a few evaluations, which the differences' 1/h leaves far behind.
    """
    if analytic and reference is None and vjp is None:
        raise TypeError("check_adjoint: analytic, but reference is None, expected a NumPy function of complex arrays")
    arrays = _float64("check_adjoint", xs)
    again = reproduction("check_adjoint", {"f": f, "reference": reference, "vjp": vjp}, arrays, rounding=rounding,
                         analytic=analytic, create_graph=create_graph, seed=seed)
    rng = np.random.default_rng(seed)
    plain = reference or (f if vjp else _plain(f))
    y0 = np.asarray(plain(*arrays))
    u, vs = _directions([y0], rng)[0], _directions(arrays, rng)
    _, grads = (vjp or engine_vjp(f, create_graph))(arrays, u)
    for i, (x, d) in enumerate(zip(arrays, grads)):
        if d.shape != x.shape:
            raise CheckFailure("check_adjoint", got=f"gradient {i} of shape {d.shape}", want=f"shape {x.shape}",
                               bound="equal shapes", origin="a gradient is what may be added to its input",
                               reproduction=again)
    jv, error = complex_step(plain, arrays, vs) if analytic else directional(plain, arrays, vs, _rounding(y0, rounding))
    left, right = float(np.sum(jv * u)), float(sum(np.sum(v * d) for v, d in zip(vs, grads)))
    # u·x of the one and of the other sum: γ_n Σ|terms|
    terms = float(np.sum(np.abs(jv * u))) + float(sum(np.sum(np.abs(v * d)) for v, d in zip(vs, grads)))
    count = y0.size + sum(x.size for x in arrays)
    bound = float(np.sum(np.abs(u) * error)) + count * unit_roundoff("float64") * terms
    way = "a complex step" if analytic else "central differences: truncation + rounding/h"
    if not abs(left - right) <= bound:
        raise CheckFailure("check_adjoint", got=right, want=left, bound=bound, origin=f"⟨J v, u⟩ from {way}",
                           reproduction=again)


def check_second_order(f: Function, *xs: Any, reference: Function | None = None, rounding: Any = None,
                       seed: int = 0) -> None:
    """The derivatives of s(x, u) = ⟨v, J(x)ᵀu⟩, f a function of tensors, which the engine gets by differentiating its
    own vjp:

    along w, ∂s/∂x = ∂ₜ∂ₛ⟨f(x + t v + s w), u⟩, and ∂s/∂u = J v: both against differences of the reference.
    """
    arrays = _float64("check_second_order", xs)
    rng = np.random.default_rng(seed)
    plain = reference or _plain(f)
    again = reproduction("check_second_order", {"f": f, "reference": reference}, arrays, rounding=rounding, seed=seed)
    y0 = np.asarray(plain(*arrays))
    u, vs, ws = _directions([y0], rng)[0], _directions(arrays, rng), _directions(arrays, rng)
    leaves, cotangent = [as_tensor(x, True) for x in arrays], as_tensor(u, True)
    y = _differentiable("check_second_order", f(*leaves))
    first = eg.grad(y, leaves, cotangent, create_graph=True, allow_unused=True)
    s = [(d * as_tensor(v)).sum() for d, v in zip(first, vs) if d is not None]
    total = s[0]
    for term in s[1:]:
        total = total + term
    found = eg.grad(total, [*leaves, cotangent], allow_unused=True)
    *second, jv = [np.zeros(x.shape) if d is None else d.numpy() for x, d in zip([*arrays, u], found)]
    error = _rounding(y0, rounding)
    want, bound = directional(plain, arrays, vs, error)
    check_close(jv + 0.0, want + 0.0, bound + unit_roundoff("float64") * np.abs(want), check="check_second_order: J v",
                origin="central differences", reproduction=again)
    mixed, bound = second_directional(plain, arrays, vs, ws, error)
    left, right = float(np.sum(mixed * u)), float(sum(np.sum(w * d) for w, d in zip(ws, second)))
    allowed = float(np.sum(np.abs(u) * bound)) + y0.size * unit_roundoff("float64") * float(np.sum(np.abs(mixed * u)))
    if not abs(left - right) <= allowed:
        raise CheckFailure("check_second_order", got=right, want=left, bound=allowed,
                           origin="∂ₜ∂ₛ⟨f(x + t v + s w), u⟩ from central differences: truncation + rounding/h²",
                           reproduction=again)


def check_grads(f: Function, *xs: Any, order: int = 2, reference: Function | None = None, analytic: bool = False,
                seed: int = 0) -> None:
    """The gradients at xs (float64) of f, a function of tensors, and with order 2 the gradients of those, against
    central differences of f, or of its reference in NumPy; with a reference that is analytic and takes complex arrays,
    the gradients themselves against a complex step (check_adjoint)."""
    check_adjoint(f, *xs, reference=reference, analytic=analytic, seed=seed)
    if order > 1:
        check_adjoint(f, *xs, reference=reference, analytic=analytic, create_graph=True, seed=seed)
        check_second_order(f, *xs, reference=reference, seed=seed)


def check_linear_vjp(vjp: Function, xs: Sequence[np.ndarray], shape: tuple[int, ...], *, seed: int = 0) -> None:
    """vjp(xs, u) -> (y, [Jᵀu for each x]), of arrays, is linear in its cotangent u, of shape `shape`:

    vjp(xs, −2u) = −2 vjp(xs, u) bit for bit, since scaling by 2 is exact, and
    vjp(xs, u − 2w) = vjp(xs, u) − 2 vjp(xs, w) in half of the digits, 2⁻²⁶ of the largest terms.

    Half is an assumption: nobody knows what cancels inside a vjp, and one that loses 27 of its 53 bits is taken for
    wrong. It hides little: the elements of u and w have sizes in [¼, 1), so a rule that is not linear (clipped,
    squared, with a constant left in) is off in its first digits, not in its ninth.
    """
    rng = np.random.default_rng(seed)
    u, w = _directions([np.empty(shape)] * 2, rng)
    of_u, of_w, scaled, both = (vjp(xs, g)[1] for g in (u, w, -2.0 * u, u - 2.0 * w))
    for got, p, q, twice in zip(both, of_u, of_w, scaled):
        again = reproduction("check_linear_vjp", {"f": vjp}, [list(xs), shape], seed=seed)
        check_bits(twice + 0.0, -2.0 * p + 0.0, check="check_linear_vjp: −2u", reproduction=again)
        size = np.abs(p) + 2.0 * np.abs(q)
        check_close(got, p - 2.0 * q, 2.0**-26 * size.max(initial=0.0), check="check_linear_vjp: u − 2w",
                    origin="half of the digits", reproduction=again)


def check_no_alias(f: Function, *xs: Any) -> None:
    """After backward through f, a function of tensors, no two gradients, and no gradient and input, share memory."""
    leaves = [as_tensor(as_numpy(x), True) for x in xs]
    y = _differentiable("check_no_alias", f(*leaves))
    g = as_tensor(np.random.default_rng(0).uniform(0.5, 1, y.shape).astype(y.numpy().dtype))
    y.backward(g)
    held = [(f"gradient {i}", x.grad.numpy()) for i, x in enumerate(leaves) if x.grad is not None]
    held += [(f"input {i}", x.numpy()) for i, x in enumerate(leaves)] + [("cotangent", g.numpy())]
    for i, (name, a) in enumerate(held):
        for other, b in held[i + 1:]:
            if "gradient" in name and np.shares_memory(a, b):
                raise CheckFailure("check_no_alias", got=f"{name} and {other} share memory", want="memory of their own",
                                   bound="no byte in common", origin="whoever gets a gradient may write to it",
                                   reproduction=reproduction("check_no_alias", {"f": f}, map(as_numpy, xs)))


# ── the same bits ─────────────────────────────────────────────────────────────────────────────────────

def check_layouts(f: Function, *xs: np.ndarray, seed: int = 0) -> None:
    """f, of tensors, gives the same bits however its operands lie in memory: in every layout of layouts.py, and, with
    each operand's first slice along one axis in place of the others, with a stride of 0 there."""
    rng = np.random.default_rng(seed)
    again = reproduction("check_layouts", {"f": f}, xs, seed=seed)

    def compare(name: str, given: Sequence[np.ndarray], want: np.ndarray) -> None:
        check_bits(f(*map(as_tensor, given)), want, check=f"check_layouts: {name} against C order", reproduction=again)

    def dense(given: Sequence[np.ndarray]) -> np.ndarray:
        return as_numpy(f(*[as_tensor(LAYOUTS["C"](x, rng)) for x in given])).copy()

    want = dense(xs)
    for name, layout in LAYOUTS.items():
        compare(name, [layout(x, rng) for x in xs], want)
    repeated = [zero_stride(x, rng) for x in xs]
    compare("zero stride", repeated, dense(repeated))


def check_threads(f: Callable[[], Any], counts: Sequence[int] = THREADS) -> None:
    """f(), a tensor, an array or several, has the same bits with every number of kernel threads, and again with the
    first of them."""
    before = eg.get_num_threads()
    try:
        results = []
        for n in (*counts, counts[0]):
            eg.set_num_threads(n)
            out = f()
            results.append([as_numpy(y).copy() for y in (out if isinstance(out, (tuple, list)) else [out])])
    finally:
        eg.set_num_threads(before)
    for n, result in zip((*counts[1:], counts[0]), results[1:]):
        for got, want in zip(result, results[0]):
            check_bits(got, want, check=f"check_threads: {n} threads against {counts[0]}",
                       reproduction=reproduction("check_threads", {"f": f}, [], counts=tuple(counts)))


def check_backends(f: Function, *xs: np.ndarray, bound: Any, devices: tuple[str, str] = ("cpu", "reference")) -> None:
    """f, of tensors, gives the same on two devices, within the bound, which is elementwise or one number."""
    results = []
    for device in devices:
        with eg.device(device):
            results.append(as_numpy(f(*[eg.tensor(x, device=device) for x in xs])))
    check_close(results[0], results[1], bound, check=f"check_backends: {devices[0]} against {devices[1]}",
                reproduction=reproduction("check_backends", {"f": f}, xs, bound=bound, devices=devices))


def check_capture(f: Function, captured: Function, *xs: np.ndarray, rounds: int = 3) -> None:
    """A function of tensors, and what a capture, compilation or cache has made of it, give the same bits: every result,
    each time.

    Both get arrays of their own. The first round may record and the others replay, on other values of the same shapes:
    a replay that remembers values, or keeps memory that a caller still holds, is found.
    """
    again = reproduction("check_capture", {"f": f, "captured": captured}, xs, "f captured", rounds=rounds)
    held: list[tuple[str, np.ndarray, np.ndarray]] = []
    for n in range(rounds):
        moved = [x if x.dtype.kind != "f" else np.asarray(x * (1 - n / 8)).astype(x.dtype) for x in xs]
        wanted, found = ([as_numpy(y) for y in (out if isinstance(out, (tuple, list)) else [out])]
                         for out in (run(*[as_tensor(x.copy()) for x in moved]) for run in (f, captured)))
        if len(wanted) != len(found):
            raise CheckFailure("check_capture", got=f"{len(found)} results", want=f"{len(wanted)}",
                               bound="as many", origin="the same computation", reproduction=again)
        for i, (got, want) in enumerate(zip(found, wanted)):
            check_bits(got, want, check=f"check_capture: result {i}, round {n}", reproduction=again)
            held.append((f"check_capture: result {i} of round {n}, after round {rounds - 1}", got, want.copy()))
    for name, got, want in held:
        check_bits(got, want, check=name, reproduction=again)


# ── manners ───────────────────────────────────────────────────────────────────────────────────────────

def check_inputs_unmutated(f: Function, *xs: np.ndarray) -> Any:
    """f leaves its inputs, arrays that it gets as they are, bit for bit as they were; returns f's result."""
    before = [x.tobytes() for x in xs]
    out = f(*xs)
    for i, (x, was) in enumerate(zip(xs, before)):
        if x.tobytes() != was:
            given = [placed(np.frombuffer(b, x.dtype).reshape(x.shape), **placement(x)) for x, b in zip(xs, before)]
            raise CheckFailure("check_inputs_unmutated", got=f"input {i} changed", want="inputs left alone",
                               bound="equal bits", origin="an operand is its owner's to change",
                               reproduction=reproduction("check_inputs_unmutated", {"f": f}, given))
    return out


def check_errors(f: Callable[[], Any], kind: type[BaseException], *words: str) -> None:
    """f() raises `kind` with one line that contains each of the words."""
    try:
        f()
        got = "no error"
    except kind as error:
        text = str(error.args[0]) if error.args else ""
        if "\n" not in text and all(word in text for word in words):
            return
        got = text
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
    raise CheckFailure("check_errors", got=got, want=kind.__name__, origin="who asks, what came, what was expected",
                       bound=f"one line with {', '.join(map(repr, words))}" if words else "one line",
                       reproduction=reproduction("check_errors", {"f": f, "kind": kind}, words, "f kind"))
