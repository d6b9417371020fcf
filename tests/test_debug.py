"""The debugging aids: they name the right op and line, count the right work, and leave nothing switched on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import engine as eg
from engine import autograd
from engine.backend import finishers, observers
from engine.debug import detect_anomaly, draw, profile


def test_forward_anomaly_names_kernel_and_line() -> None:
    x = eg.tensor([1.0, 0.0])
    with pytest.raises(FloatingPointError, match=r"log: made an infinity at .*test_debug\.py:\d+: y = eg\.log"), \
            detect_anomaly():
        y = eg.log(x)
        del y


def test_backward_anomaly_names_the_forward_line() -> None:
    x = eg.tensor([1.0, 0.0], requires_grad=True)
    with pytest.raises(FloatingPointError, match=r"in the backward of sqrt, called at .*: root = eg\.sqrt\(x\)"), \
            detect_anomaly():
        root = eg.sqrt(x)
        root.sum().backward()


def test_an_infinity_that_was_there_is_nobodys_fault() -> None:
    with detect_anomaly():
        masked = eg.where(eg.tensor([True, False]), 1.0, -math.inf)
        assert eg.softmax(masked).tolist() == [1.0, 0.0]
        assert math.isnan(eg.tensor([math.nan]).exp().item())


def test_nothing_stays_switched_on() -> None:
    before = (list(observers), list(finishers), list(autograd.watchers))
    with pytest.raises(FloatingPointError), detect_anomaly():
        eg.log(eg.tensor([0.0]))
    with profile():
        eg.tensor([1.0]).exp()
    assert (observers, finishers, autograd.watchers) == before


def test_profile_counts_calls_bytes_and_flops(tmp_path: Path) -> None:
    a, b = eg.ones(8, 16), eg.ones(16, 4)
    with profile() as recorded:
        eg.matmul(a, b)
        eg.exp(a)
        eg.exp(a)
    rows = {name: (calls, size, flops) for name, calls, _, size, flops in recorded.rows()}
    assert rows["gemm"] == (1, 4 * (8 * 16 + 16 * 4 + 8 * 4), 2 * 8 * 16 * 4)
    assert rows["exp"][:2] == (2, 2 * 2 * 4 * 8 * 16)
    assert "gemm" in str(recorded) and "of peak" in str(recorded)
    seconds = next(row[2] for row in recorded.rows() if row[0] == "gemm")
    line = next(line for line in recorded.table(peak_gflops=100).splitlines() if line.startswith("gemm"))
    assert line.endswith(f"{rows['gemm'][2] / seconds / 1e9 / 100:.1%}")
    recorded.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events].count("exp") == 2 and all(e["dur"] > 0 for e in events)


@pytest.mark.parametrize("causal", [False, True])
def test_profile_counts_the_pairs_that_attention_sees(causal: bool) -> None:
    q, k, v = (eg.ones(2, heads, time, 8, requires_grad=True) for heads, time in ((6, 3), (2, 5), (2, 5)))
    with profile() as recorded:
        eg.scaled_dot_product_attention(q, k, v, causal=causal).sum().backward()
    flops = {name: flops for name, *_, flops in recorded.rows()}
    pairs = 2 * 6 * (3 + 4 + 5 if causal else 3 * 5)
    assert flops["attention"] == 2 * 2 * pairs * 8 and flops["attention_vjp"] == 5 * 2 * pairs * 8


def test_profile_counts_both_products_of_a_network() -> None:
    x, up, down = eg.ones(2, 3, 8, requires_grad=True), eg.ones(12, 8), eg.ones(5, 12)
    with profile() as recorded:
        eg.feed_forward(x, up, down).sum().backward()
    flops = {name: flops for name, *_, flops in recorded.rows()}
    assert flops["linear_activation"] == 2 * 6 * 8 * 12 and flops["linear_activation_vjp"] == 2 * 6 * 12 * 5


def test_drawing_has_every_op_leaf_and_shape() -> None:
    x = eg.ones(2, 3, requires_grad=True)
    picture = draw((eg.exp(x) * x).sum())
    assert [picture.dot.count(f'label="{name}"') for name in ("exp", "multiply", "sum", "leaf 2×3 float32")] == [1] * 4
    assert picture.dot.count('label="2×3"') == 4  # x into exp and multiply, exp into multiply, multiply into sum
    assert picture.svg.startswith("<svg") and picture.svg.count("<rect") == 5


def test_drawing_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(RuntimeError, match="no graph behind"):
        draw(eg.ones(2))
    x = eg.ones(2, requires_grad=True)
    for _ in range(20):
        x = x + 1.0
    with pytest.raises(ValueError, match="more than 10 boxes"):
        draw(x, limit=10)


def test_guards_see_a_write_outside_and_name_the_kernel() -> None:
    """A copy with a layout of one element too many, before or after, lands in a zone."""
    program = """
import engine as eg
from engine.backend import get_backend
from engine.debug import guards
k = get_backend("cpu")
guards.install(k)
x, y = eg.ones(5).array, eg.zeros(5).array
k.copy(y, x, k.layout(y, x))                                    # as it should be
assert y.data.tolist() == [1] * 5
for layout, side in (([1, 6, 1, 0], "after"), ([1, 2, -1, 0], "before")):
    try:
        k.copy(y, x, k.ffi.new("int64_t[]", layout))
        raise SystemExit("not seen")
    except MemoryError as error:
        assert str(error).startswith("copy: wrote 4 of the 64 bytes " + side), error
        print(error)
    y = eg.zeros(5).array
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("copy: wrote") == 2
