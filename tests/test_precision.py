"""Mixed precision: products of rounded factors on every unit of this machine, held against float64."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine.backend import get_backend
from engine.backend.cpu import BF16_UNITS, CpuBackend
from engine.ops.matmul import joined_linear
from engine.precision import FORMATS, product_format
from engine.testing.bounds import matmul_bound

TINIEST = 2.0**-126  # the smallest normal float32 and bfloat16
SHORT = ["bfloat16", "float16"]


def units() -> list[int]:
    """The numbers of the units for bfloat16 that this machine has."""
    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        return [0]
    chosen = BF16_UNITS.index(backend.bf16_unit)
    best = backend.lib.bf16_unit(len(BF16_UNITS))
    backend.lib.bf16_unit(chosen)
    return list(range(best + 1))


def set_unit(unit: int) -> None:
    backend = get_backend("cpu")
    if isinstance(backend, CpuBackend):
        assert backend.lib.bf16_unit(unit) == unit


@pytest.fixture(autouse=True)
def unit_as_it_was() -> Iterator[None]:
    yield
    backend = get_backend("cpu")
    if isinstance(backend, CpuBackend):
        set_unit(BF16_UNITS.index(backend.bf16_unit))
    eg.set_num_threads(1)


def nearest(x: np.ndarray, dtype: str) -> np.ndarray:
    """The number of a format nearest to each float32, in float64; of two as near the even one."""
    if dtype == "float32":
        return x.astype(np.float64)
    digits, least, largest = {"bfloat16": (8, -133, 2.0**128 - 2.0**120), "float16": (11, -24, 65504.0)}[dtype]
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64)
        spacing = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - digits, least))
        steps = np.abs(exact) / spacing
        down = np.floor(steps)
        up = (steps - down > 0.5) | ((steps - down == 0.5) & (down % 2 == 1))
        rounded = np.copysign((down + up) * spacing, exact)
        rounded = np.where(np.abs(rounded) > largest, np.copysign(np.inf, exact), rounded)
    return np.where(np.isfinite(exact), rounded, exact)


def product(a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
    with eg.autocast(dtype):
        return eg.matmul(eg.from_numpy(a), eg.from_numpy(b)).numpy()  # as they lie


# ── the rounding ──────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", SHORT)
def test_factors_are_rounded_to_the_nearest(dtype: str, device: str) -> None:
    """x · 1 is the rounded x: all 65,536 upper halves, with lower ones at, beside and far from each half-way."""
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = ((np.arange(65536, dtype=np.uint32) << 16)[:, None] | low).reshape(-1, 1).view(np.float32)
    want = nearest(x, dtype)
    for unit in units() if dtype == "bfloat16" and device == "cpu" else [0]:
        set_unit(unit)
        with eg.autocast(dtype), eg.device(device):
            got = eg.matmul(eg.tensor(np.repeat(x, 2, 1)), eg.tensor([[1.0], [0.0]])).numpy()
        allowed = np.where(np.isinf(want), np.nan, want)  # ∞ · 0
        if unit:  # subnormal numbers are zeros
            allowed = np.where(np.abs(x) < TINIEST, 0, allowed)
        np.testing.assert_array_equal(got, allowed)


def test_subnormal_float16_numbers_are_kept() -> None:
    assert product(np.float32([[3 * 2.0**-24]]), np.float32([[1.0]]), "float16") == 3 * 2.0**-24
    assert product(np.float32([[65519.0]]), np.float32([[1.0]]), "float16") == 65504
    assert product(np.float32([[65520.0]]), np.float32([[1.0]]), "float16") == np.inf


# ── the product ───────────────────────────────────────────────────────────────────────────────────────

def laid_out(rng: np.random.Generator, rows: int, columns: int, how: int) -> np.ndarray:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return [normal(rows, columns), normal(columns, rows).T, normal(2 * rows, 3 * columns)[::2, ::3],
            normal(rows, columns)[::-1], normal(rows, columns)[:, ::-1], normal(rows, columns + 7)[:, 3:columns + 3],
            np.broadcast_to(normal(columns), (rows, columns)), np.broadcast_to(normal(rows, 1), (rows, columns))][how]


@given(st.sampled_from(SHORT), st.integers(0, 2**32 - 1), st.sampled_from([4, 20, 70, 300]), st.integers(0, 7),
       st.integers(0, 7))
def test_a_product_is_within_the_bound_on_every_unit(dtype: str, seed: int, most: int, left: int, right: int) -> None:
    """|C − round(A) round(B)| ≤ γ_k |A||B| in any order of the sums; a unit that has no subnormal numbers may lose as
    much as the smallest normal one at every step. The same bits with three threads."""
    rng = np.random.default_rng(seed)
    m, n, k = rng.integers(1, most, 3, endpoint=True)
    a, b = laid_out(rng, m, k, left), laid_out(rng, k, n, right)
    exact_a, exact_b = nearest(a, dtype), nearest(b, dtype)
    bound = matmul_bound(exact_a, exact_b, "float32") + k * TINIEST
    for unit in units() if dtype == "bfloat16" else [0]:
        set_unit(unit)
        eg.set_num_threads(1)
        got = product(a, b, dtype)
        assert (np.abs(got - exact_a @ exact_b) <= bound).all(), f"unit {BF16_UNITS[unit]}"
        eg.set_num_threads(3)
        assert product(a, b, dtype).tobytes() == got.tobytes(), f"unit {BF16_UNITS[unit]}"


def whole(unit: int, m: int, n: int, inner: int, accumulate: bool) -> None:
    """Whole numbers are exact: C = A B + bias (+ C), a batch of two with one B."""
    set_unit(unit)
    rng = np.random.default_rng(inner)
    k = get_backend("cpu")
    a, b, bias, c = (rng.integers(-8, 9, s).astype(np.float32) for s in ((2, m, inner), (inner, n), n, (2, m, n)))
    got = k.array(c, eg.float32)
    k.gemm(got, k.array(a), k.array(b), k.array(bias), 2, m, n, inner, m * inner, inner, 1, 0, n, 1, m * n, n,
           int(accumulate), FORMATS["bfloat16"])
    np.testing.assert_array_equal(k.to_numpy(got), a @ b + bias + (c if accumulate else 0))


@pytest.mark.parametrize("unit", units())
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("inner", [0, 1, 31, 32, 33, 255, 256, 257, 700])
def test_every_depth_with_bias_and_what_is_there(unit: int, accumulate: bool, inner: int) -> None:
    """k around a block of pairs and of sums; rows and columns around tiles."""
    for m, n in ((1, 1), (5, 40), (16, 16), (17, 33), (33, 31), (64, 64), (70, 100)):
        whole(unit, m, n, inner, accumulate)


@pytest.mark.parametrize("unit", units())
@pytest.mark.parametrize(("m", "n", "inner"), [(40, 900, 300), (2100, 33, 40), (3, 4200, 300)])
def test_as_much_as_the_buffers_hold(unit: int, m: int, n: int, inner: int) -> None:
    """More columns than a span, more rows than a group, more columns than are summed in scratch."""
    for accumulate in (False, True):
        whole(unit, m, n, inner, accumulate)


@pytest.mark.parametrize("unit", units())
def test_a_row_does_not_depend_on_its_neighbours(unit: int) -> None:
    """Without kernels NumPy's BLAS sums in an order that depends on the sizes: two of them are within their bounds."""
    set_unit(unit)
    compiled = isinstance(get_backend("cpu"), CpuBackend)
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((75, 300), (300, 70)))
    whole = product(a, b, "bfloat16")
    bound = 2 * matmul_bound(nearest(a, "bfloat16"), nearest(b, "bfloat16"), "float32")
    for rows in (slice(0, 1), slice(3, 20), slice(40, 75)):
        of_rows, of_columns = product(a[rows], b, "bfloat16"), product(a, b[:, rows], "bfloat16")
        for part, at in ((of_rows, np.s_[rows]), (of_columns, np.s_[:, rows])):
            if compiled:
                assert part.tobytes() == whole[at].tobytes()
            assert (np.abs(part.astype(np.float64) - whole[at]) <= bound[at]).all()


@pytest.mark.parametrize("unit", units())
def test_nan_and_infinity_stay_in_their_row_and_column(unit: int) -> None:
    """Also where what packs them rounds up the depth: a lower half beside an infinite upper one is no NaN."""
    set_unit(unit)
    a, b = np.full((40, 37), 1.5, np.float32), np.full((37, 50), 1.25, np.float32)
    a[3, 5], a[20, 36], b[7, 9] = np.inf, np.nan, -np.inf
    with np.errstate(invalid="ignore"):
        want = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(product(a, b, "bfloat16"), want)


def test_float64_is_left_alone() -> None:
    a, b = np.random.default_rng(6).standard_normal((2, 40, 40))
    assert product(a, b, "bfloat16").tobytes() == eg.matmul(eg.tensor(a), eg.tensor(b)).numpy().tobytes()


# ── gradients ─────────────────────────────────────────────────────────────────────────────────────────

def normal(seed: int, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [eg.tensor((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32), requires_grad=True)
            for shape in shapes]


@pytest.mark.parametrize("dtype", SHORT)
def test_backward_rounds_as_forward_did_wherever_it_is_called(dtype: str) -> None:
    x, w, b, g = normal(1, (9, 50), (33, 50), (33,), (9, 33))
    with eg.autocast(dtype):
        y = eg.linear(x, w, b)
    dx, dw, db = eg.grad(y, [x, w, b], g)
    exact = {name: nearest(t.numpy(), dtype) for name, t in (("x", x), ("w", w), ("g", g))}
    for got, left, right in ((dx, exact["g"], exact["w"]), (dw, exact["g"].T, exact["x"])):
        assert (np.abs(got.numpy() - left @ right) <= matmul_bound(left, right, "float32") + 50 * TINIEST).all()
    np.testing.assert_array_equal(db.numpy(), eg.sum(g, 0).numpy())  # no product: nothing is rounded
    assert eg.get_autocast() == "float32"


def test_a_product_outside_is_not_rounded_though_backward_passes_one_that_was() -> None:
    x, w, v, g = normal(2, (6, 20), (20, 20), (20, 20), (6, 20))
    z = eg.linear(x, w)
    with eg.autocast():
        y = eg.linear(z, v)
    dz = eg.grad(y, z, g, retain_graph=True)
    assert eg.grad(y, x, g).numpy().tobytes() == eg.matmul(dz, w).numpy().tobytes()


@pytest.mark.parametrize("dtype", SHORT)
def test_second_derivatives_round_too(dtype: str) -> None:
    """d/dw of the gradient dx = g W is gᵀ u, in the format of the product."""
    x, w, g, u = normal(3, (5, 40), (7, 40), (5, 7), (5, 40))
    with eg.autocast(dtype):
        y = eg.linear(x, w)
    dx = eg.grad(y, x, g, create_graph=True)
    got = eg.grad(dx, w, u).numpy()
    left, right = nearest(g.numpy(), dtype).T, nearest(u.numpy(), dtype)
    assert (np.abs(got - left @ right) <= matmul_bound(left, right, "float32") + 5 * TINIEST).all()


@pytest.mark.parametrize("dtype", SHORT)
def test_fused_ops_have_the_bits_of_their_parts(dtype: str) -> None:
    def results(f: Any, operands: list[Any], g: Any) -> list[bytes]:
        with eg.autocast(dtype):
            y = f(*operands)
        return [t.numpy().tobytes() for t in (y, *eg.grad(y, operands, g))]

    x, up, down, b, c, g = normal(4, (40, 30), (70, 30), (20, 70), (70,), (20,), (40, 20))
    assert (results(lambda *o: eg.feed_forward(*o, "gelu"), [x, up, down, b, c], g)
            == results(lambda x, up, down, b, c: eg.linear(eg.gelu(eg.linear(x, up, b)), down, c),
                       [x, up, down, b, c], g))
    q, k, v, g = normal(5, (30, 30), (20, 30), (20, 30), (40, 70))
    assert (results(lambda x, *w: joined_linear(x, *w), [x, q, k, v], g)[0]
            == results(lambda x, *w: eg.concat([eg.linear(x, m) for m in w], -1), [x, q, k, v], g)[0])
    target = eg.tensor(np.arange(40) % 20)
    loss = eg.tensor(np.float32(1))
    assert (results(lambda x, w: eg.linear_cross_entropy(x, w, target), [x, k], loss)
            == results(lambda x, w: eg.cross_entropy(eg.linear(x, w), target), [x, k], loss))


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_attention_itself_stays_in_float32(device: str, create_graph: bool) -> None:
    """By its kernel, and by its composition, which runs where there is none and for second derivatives."""
    def results() -> list[bytes]:
        with eg.device(device):
            q, k, v, g = normal(6, (2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8))
            y = eg.scaled_dot_product_attention(q, k, v, causal=True)
        dq, *others = eg.grad(y, [q, k, v], g, create_graph=create_graph)
        second = [eg.grad((dq * g).sum(), k)] if create_graph else []
        return [t.numpy().tobytes() for t in (y, dq, *others, *second)]

    plain = results()
    with eg.autocast():
        assert results() == plain


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("store", [eg.pack, eg.quantize])
def test_stored_weights_stay_in_float32(device: str, store: Any) -> None:
    def results() -> list[bytes]:
        with eg.device(device):
            x, w, g = normal(10, (5, 64), (40, 64), (5, 40))
            y = eg.linear(x, store(w.detach()))
        return [y.numpy().tobytes(), eg.grad(y, x, g).numpy().tobytes()]

    plain = results()
    with eg.autocast():
        assert results() == plain


def test_what_is_computed_again_is_rounded_again() -> None:
    x, w, g = normal(7, (6, 40), (40, 40), (6, 40))

    def f(x: Any) -> Any:
        return eg.tanh(eg.linear(eg.tanh(eg.linear(x, w)), w))

    with eg.autocast():
        plain, kept = f(x), eg.checkpoint(f, x)
    for one, other in zip(eg.grad(plain, [x, w], g), eg.grad(kept, [x, w], g)):
        assert one.numpy().tobytes() == other.numpy().tobytes()


# ── the setting ───────────────────────────────────────────────────────────────────────────────────────

def test_it_nests_and_ends() -> None:
    assert eg.get_autocast() == "float32"
    with eg.autocast():
        assert eg.get_autocast() == "bfloat16"
        with eg.autocast("float16"):
            assert eg.get_autocast() == "float16"
            with eg.autocast(enabled=False):
                assert eg.get_autocast() == "float32"
        with pytest.raises(KeyError), eg.autocast("float32"):
            assert eg.get_autocast() == "float32"
            raise KeyError
        assert eg.get_autocast() == "bfloat16"
    assert eg.get_autocast() == "float32"


def test_it_decorates() -> None:
    @eg.autocast("float16")
    def inner(depth: int) -> list[str]:
        """What it says."""
        return [eg.get_autocast(), *(inner(depth - 1) if depth else [])]

    assert inner(2) == ["float16"] * 3 and inner.__doc__ == "What it says." and eg.get_autocast() == "float32"


def test_a_thread_has_its_own() -> None:
    """Also where two threads are in the same decorated function and leave it in the order that they came."""
    seen: list[str] = []
    entered, left = threading.Event(), threading.Event()

    @eg.autocast()
    def stay(until: threading.Event) -> None:
        entered.set()
        assert until.wait(30)

    def work() -> None:
        seen.append(eg.get_autocast())
        stay(left)
        seen.append(eg.get_autocast())

    with eg.autocast():
        thread = threading.Thread(target=work)
        thread.start()
        stay(entered)
    assert eg.get_autocast() == "float32"
    left.set()
    thread.join()
    assert seen == ["float32", "float32"]


def test_a_rule_that_raises_leaves_the_setting_as_it_was() -> None:
    x, w = normal(8, (3, 4), (5, 4))
    with eg.autocast():
        y = eg.linear(x, w)
    with eg.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()
    assert product_format.get() == 0


@pytest.mark.parametrize("dtype", ["int8", "half", None, eg.float32])
def test_another_type_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"autocast: dtype is .*, expected one of float32, bfloat16, float16"):
        eg.autocast(dtype)


def run_with_unit(unit: str) -> subprocess.CompletedProcess[str]:
    program = "import engine as eg; print(eg.backend.get_backend('cpu').bf16_unit)"
    return subprocess.run([sys.executable, "-c", program], env={**os.environ, "ENGINE_BF16": unit}, text=True,
                          capture_output=True)


@pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend),
                    reason="ENGINE_BF16 chooses among the units of compiled kernels; without them NumPy multiplies")
def test_the_unit_can_be_named() -> None:
    for unit in units():
        assert run_with_unit(BF16_UNITS[unit]).stdout.strip() == BF16_UNITS[unit]
    wrong = run_with_unit("tpu")
    assert wrong.returncode and "ENGINE_BF16: got 'tpu', expected one of fma" in wrong.stderr.splitlines()[-1]


def test_machines_whose_units_differ_are_told_apart() -> None:
    """By what decides the bits; a machine of the level alone has the level's name, as before there were units."""
    names = {}
    for unit in BF16_UNITS:
        machine = CpuBackend.__new__(CpuBackend)  # with no more than what names it
        machine.__dict__.update(level="v4", bf16_unit=unit, _module=__file__)
        names[unit] = machine.identity
        assert names[unit].startswith(f"{machine.instructions} ")
    assert len(set(names.values())) == 3 and names["fma"].startswith("v4 ") and len(names["fma"].split()) == 2


# ── training ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("dtype", SHORT)
def test_a_model_learns_as_in_float32(dtype: str) -> None:
    """A small Transformer on a text of one sentence. The losses differ by their rounding; both learn it."""
    text = np.frombuffer(b"the cat sat on the mat and the dog sat on the log. " * 8, np.uint8)
    tokens = eg.tensor(np.stack([text[i:i + 33] for i in range(0, 256, 32)]).astype(np.int64))

    def losses(dtype: str) -> list[float]:
        with eg.seed(1):
            model = eg.models.Transformer(vocab_size=128, context_length=32, layers=2, heads=2, width=32)
        optimizer = eg.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = eg.optim.GradScaler(enabled=dtype == "float16")
        found = []
        for _ in range(40):
            optimizer.zero_grad()
            with eg.autocast(dtype):
                loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            scaler.scale(loss).backward()
            scaler.step(optimizer, clip_norm=1.0)
            scaler.update()
            found.append(float(loss.numpy()))
        return found

    exact, rounded = losses("float32"), losses(dtype)
    assert exact != rounded
    assert max(exact[-1], rounded[-1]) < 0.5 * exact[0]
