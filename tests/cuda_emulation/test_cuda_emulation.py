"""The emulation itself: it computes what a GPU would, and it sees each kind of fault that it is there to see."""

from __future__ import annotations

import emulation
import numpy as np
import pytest
from emulation import Fault, Schedule

pytestmark = pytest.mark.skipif(not emulation.available(), reason=f"no C++ compiler ({emulation.COMPILER})")

# One kernel for each way to go wrong; `good` is as it should be.
PROGRAM = """#line 1 "faulty.cu"
#define KERNEL(name) extern "C" __global__ void name##_f32
#define real float
#define EXPORT extern "C" __global__
#define ALL 0xffffffffu
__shared__ float box[256];

KERNEL(good)(real *y, const real *x, int64_t n) {
    for (int64_t start = blockIdx.x * 256; start < n; start += gridDim.x * 256) {
        int64_t i = start + threadIdx.x;
        box[threadIdx.x] = i < n ? x[i] : 0;
        __syncthreads();
        if (i < n) y[i] = box[255 - threadIdx.x];
        __syncthreads();
    }
}
KERNEL(shuffled)(real *y, const real *x, int64_t n) {
    y[threadIdx.x] = __shfl_xor_sync(ALL, x[threadIdx.x], 1) + 100 * __shfl_sync(ALL, x[threadIdx.x], 3);
    if (__ballot_sync(ALL, threadIdx.x % 2) != 0xaaaaaaaa) y[threadIdx.x] = -1;
}
KERNEL(read_too_early)(real *y, const real *x, int64_t n) {
    box[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = box[threadIdx.x ^ 1];
}
KERNEL(written_too_early)(real *y, const real *x, int64_t n) {
    box[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = box[255 - threadIdx.x];
    box[threadIdx.x] = 0;
}
KERNEL(two_writers)(real *y, const real *x, int64_t n) { box[threadIdx.x / 2] = x[threadIdx.x]; }
KERNEL(two_blocks)(real *y, const real *x, int64_t n) { y[threadIdx.x] = blockIdx.x; }
KERNEL(hole)(real *y, const real *x, int64_t n) { y[threadIdx.x] = box[threadIdx.x]; }
KERNEL(beyond)(real *y, const real *x, int64_t n) { y[threadIdx.x] = x[threadIdx.x + 1]; }
KERNEL(divergent)(real *y, const real *x, int64_t n) {
    if (threadIdx.x < 128) __syncthreads();
}
KERNEL(two_barriers)(real *y, const real *x, int64_t n) {
    if (threadIdx.x < 128)
        __syncthreads();
    else
        __syncthreads();
}
KERNEL(lonely_shuffle)(real *y, const real *x, int64_t n) {
    if (threadIdx.x % 32 < 7) y[threadIdx.x] = __shfl_xor_sync(ALL, 1.0f, 1);
}
KERNEL(part_of_a_warp)(real *y, const real *x, int64_t n) { y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }
"""
ORDERS = list(emulation.ORDERS)


def launch(name: str, schedule: Schedule, n: int = 256) -> np.ndarray:
    x = np.arange(n + 16, dtype="float32")[:n]  # what lies beyond its end is no other operand
    y = np.zeros(n, "float32")
    emulation.build(PROGRAM, 32).launch(name, [y, x, n], schedule)
    return y


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_order_the_threads(order: str) -> None:
    y = launch("good", Schedule(grid=3, order=order, seed=9, watch=True), 1024)
    assert (y.reshape(4, 256) == np.arange(1024).reshape(4, 256)[:, ::-1]).all()


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(order: str) -> None:
    y = launch("shuffled", Schedule(grid=1, order=order, seed=4))
    lanes = np.arange(256)
    assert (y == (lanes ^ 1) + 100 * (lanes // 32 * 32 + 3)).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "words"), [
    ("read_too_early", "race on shared memory|hole"),
    ("written_too_early", "race on shared memory"),
    ("two_writers", "race on shared memory"),
    ("hole", "hole: .* reads shared memory that nobody wrote"),
    ("beyond", "stray access: thread 255 of block 0"),
    ("divergent", "divergence: .* waits for ever at faulty.cu"),
    ("two_barriers", "waits at faulty.cu:.*, thread 0 at faulty.cu"),
    ("lonely_shuffle", "divergence: .* waits for ever at faulty.cu"),
    ("part_of_a_warp", "names part of a warp"),
])
def test_faults_are_seen(name: str, words: str, order: str) -> None:
    with pytest.raises(Fault, match=words):
        launch(name, Schedule(grid=1, order=order, seed=2, watch=True))


def test_blocks_are_not_ordered() -> None:
    with pytest.raises(Fault, match=r"race on y, byte .*: thread . of block 0 wrote, thread . of block 1 writes"):
        launch("two_blocks", Schedule(grid=2, watch=True))


def test_without_the_watch_a_race_gives_what_the_schedule_gives() -> None:
    """Each order of the threads is one that a GPU might take, and shows another wrong result."""
    results = {launch("written_too_early", Schedule(grid=1, order=o, seed=3)).tobytes() for o in ORDERS}
    assert len(results) > 1


def test_a_schedule_repeats_itself() -> None:
    schedule = Schedule(grid=1, order="random", seed=7)
    first, second = launch("written_too_early", schedule), launch("written_too_early", schedule)
    assert first.tobytes() == second.tobytes()


def test_wrong_calls_are_errors() -> None:
    with pytest.raises(TypeError, match="good: got 1 arguments, expected 3"):
        emulation.build(PROGRAM, 32).launch("good", [None])
    with pytest.raises(RuntimeError, match="error"):
        emulation.build("this is no program", 32)
