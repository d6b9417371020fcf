"""The boundary: memory from the pool, the one launch point and who may watch it, layouts as the kernels see them."""

from __future__ import annotations

import gc
import itertools
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine.backend import Array, finishers, get_backend, observers
from engine.backend.cpu import CpuBackend, merge_axes
from engine.backend.pool import ALIGNMENT, SMALL, Pool, size_class
from engine.testing import check_errors, check_threads

compiled = pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend), reason="no compiled kernels")


# ── the pool ──────────────────────────────────────────────────────────────────────────────────────────

@given(size=st.integers(0, 1 << 34))
def test_size_classes_hold_their_sizes_and_waste_little(size: int) -> None:
    held = size_class(size)
    assert held >= size and held % ALIGNMENT == 0 and size_class(held) == held
    if size > 4 * ALIGNMENT:
        assert held <= size * 1.25, "four classes to a power of two"
    assert size_class(size + 1) >= held


def counted_pool() -> tuple[Pool, list[int]]:
    """A pool over ordinary memory, and the sizes that it asked the system for."""
    asked: list[int] = []

    def reserve(size: int) -> tuple[memoryview, Any]:
        asked.append(size)
        return memoryview(bytearray(size)), len(asked) * (1 << 40)

    return Pool(reserve, lambda pointer, offset: pointer + offset), asked


def test_blocks_are_reused_and_figures_add_up() -> None:
    pool, asked = counted_pool()
    size = 4 * SMALL
    a, b = pool.allocate(size), pool.allocate(size)
    assert asked == [size, size] and pool.figures().live == 2 * size and pool.figures().blocks_live == 2
    pointer = a.pointer
    del a
    assert pool.figures().live == size and pool.figures().peak == 2 * size and pool.figures().fragmentation == 0.5
    c = pool.allocate(size)
    assert c.pointer == pointer and len(asked) == 2, "the freed block came back"
    del b, c
    assert pool.figures().live == 0 and pool.figures().reserved == 2 * size and pool.figures().allocations == 3
    pool.trim()
    assert pool.figures().reserved == 0 and "live 0.0 MiB" in str(pool.figures())
    pool.reset_peak()
    assert pool.figures().peak == 0


def test_small_blocks_are_cut_from_slabs_without_overlap() -> None:
    pool, asked = counted_pool()
    blocks = [pool.allocate(100) for _ in range(1000)]
    assert len(asked) == 1, "one slab serves them"
    places = sorted(block.pointer for block in blocks)
    assert all(b - a >= 128 for a, b in itertools.pairwise(places)) and all(p % ALIGNMENT == 0 for p in places)


def test_a_block_lives_as_long_as_its_last_view() -> None:
    pool, _ = counted_pool()
    block = pool.allocate(4 * SMALL)
    view = np.ndarray((100, 10), np.float32, block)[::3].T[2:5]
    view[...] = 7.0
    del block
    gc.collect()
    assert pool.figures().blocks_live == 1
    other = pool.allocate(4 * SMALL)
    other[...] = 0
    assert np.all(view == 7.0), "memory that a view shows was not handed out again"
    del view
    assert pool.figures().blocks_live == 1


@compiled
def test_numpy_views_outlive_their_tensor() -> None:
    x = eg.arange(100_000, dtype="float32")
    data = x.numpy()[::7]
    want = data.copy()
    del x
    others = [eg.zeros(100_000) for _ in range(4)]
    assert np.array_equal(data, want) and len(others) == 4


@compiled
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 70_000])
def test_memory_of_tensors_is_aligned(size: int) -> None:
    for dtype in (eg.float32, eg.float64, eg.int8):
        array = get_backend("cpu").empty((size,), dtype)
        assert array.data.ctypes.data % ALIGNMENT == 0
        assert int(get_backend("cpu").ffi.cast("uintptr_t", array.ptr)) == array.data.ctypes.data


@compiled
def test_a_loop_reserves_nothing_new() -> None:
    backend = get_backend("cpu")
    x = eg.ones(50_000)

    def step() -> None:
        (x * 2.0 + x).exp().sum()

    step()
    reserved = backend.pool.figures().reserved
    for _ in range(50):
        step()
    assert backend.pool.figures().reserved == reserved


@compiled
def test_the_system_refusing_memory_is_one_line() -> None:
    check_errors(lambda: eg.empty(1 << 55), MemoryError, "cpu", "refused", "bytes")


@compiled
def test_threads_allocate_and_free_together() -> None:
    """Blocks made in one thread and dropped in another: no block is handed out twice."""
    wrong: list[int] = []

    def work(n: int) -> None:
        kept: list[eg.Tensor] = []
        for i in range(300):
            x = eg.full((257,), float(n * 1000 + i))
            kept.append(x)
            if len(kept) > 5:
                old = kept.pop(0)
                if len(set(old.tolist())) != 1:
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ── the launch ────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_observers_see_every_launch_in_order_with_its_arguments(device: str) -> None:
    seen: list[tuple[str, tuple[Any, ...]]] = []
    finished: list[str] = []
    x = eg.tensor([1.0, 4.0], device=device)

    def see(name: str, arguments: tuple[Any, ...]) -> None:
        seen.append((name, arguments))

    def finish(name: str, arguments: tuple[Any, ...], seconds: float) -> None:
        assert seconds >= 0.0
        finished.append(name)

    observers.append(see)
    finishers.append(finish)
    try:
        (x.sqrt() + x).sum()
    finally:
        observers.remove(see)
        finishers.remove(finish)
    assert [name for name, _ in seen] == ["sqrt", "add", "sum"] == finished
    _, (y, a, b, _) = seen[1]
    assert isinstance(y, Array) and b is x.array and y.data.tolist() == [2.0, 6.0] and a.data.tolist() == [1.0, 2.0]
    x.exp()
    assert len(seen) == 3


def test_unknown_kernels_and_devices() -> None:
    check_errors(lambda: get_backend("cpu").no_such_kernel, AttributeError, "no_such_kernel")
    check_errors(lambda: get_backend("reference").no_such_kernel, AttributeError, "no_such_kernel")
    check_errors(lambda: get_backend("abacus"), ValueError, "device", "'abacus'", "cpu, reference")


def test_thread_counts() -> None:
    before = eg.get_num_threads()
    eg.set_num_threads(3)
    try:
        assert eg.get_num_threads() in (3, 1)  # 1 where nothing was compiled
    finally:
        eg.set_num_threads(before)
    check_errors(lambda: eg.set_num_threads(0), ValueError, "set_num_threads", "0")


def test_constants_are_shared_and_tell_zeros_apart() -> None:
    k = get_backend("cpu")
    assert k.constant(2.0, eg.float32) is k.constant(2.0, eg.float32)
    assert k.constant(0.0, eg.float32) is not k.constant(-0.0, eg.float32)
    assert np.signbit(k.constant(-0.0, eg.float32).data) and not np.signbit(k.constant(0.0, eg.float32).data)
    assert k.constant(1, eg.int64).data.dtype == np.int64 and k.constant(True, eg.bool_).data.dtype == bool
    for i in range(5000):
        k.constant(i + 0.5, eg.float32)
    assert len(k._constants) <= 4097


# ── layouts ───────────────────────────────────────────────────────────────────────────────────────────

@st.composite
def strided_operands(draw: Any) -> list[np.ndarray]:
    """One to three operands of one shape over blocks of their own, with any strides, 0 and negative ones among them."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    operands = []
    for _ in range(draw(st.integers(1, 3))):
        steps = [draw(st.sampled_from([1, 1, 1, 2, -1])) for _ in shape]
        order = draw(st.permutations(range(len(shape))))
        block = np.arange(float(np.prod([n * abs(s) for n, s in zip(shape, steps)], dtype=int)))
        block = block.reshape([shape[i] * abs(steps[i]) for i in order]).transpose(np.argsort(order) if shape else ())
        view = block[(..., *(slice(None, None, s) for s in steps))]
        for axis in range(len(shape)):
            if draw(st.integers(0, 5)) == 5:
                first = view[(slice(None),) * axis + (slice(0, 1),)]
                view = np.broadcast_to(first, shape)
        operands.append(view)
    return operands


@given(operands=strided_operands())
def test_merged_axes_walk_the_same_elements(operands: list[np.ndarray]) -> None:
    """Axes are merged as far as all operands allow, and the walk visits the same elements in the same order."""
    shape = operands[0].shape
    strides = tuple(tuple(s // x.itemsize for s in x.strides) for x in operands)
    merged, walks = merge_axes(shape, strides)
    assert 1 not in merged and np.prod(merged, dtype=int) == np.prod(shape, dtype=int)
    for x, walk in zip(operands, walks):
        again = np.lib.stride_tricks.as_strided(x, merged, [s * x.itemsize for s in walk])
        assert np.array_equal(again.reshape(-1), x.reshape(-1))
    for axis in range(len(merged) - 1):
        assert any(w[axis] != w[axis + 1] * merged[axis + 1] for w in walks), "two axes that could have been merged"


SIDES = st.sampled_from([1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 70])


@given(shape=st.lists(SIDES, min_size=2, max_size=4).filter(lambda shape: np.prod(shape) < 40_000),
       dtype=st.sampled_from(["float32", "float64"]), data=st.data())
def test_a_copy_from_any_layout_into_any_other(shape: list[int], dtype: str, data: st.DataObject) -> None:
    """Axes in any order, steps of 1, 2 and −1: every element arrives, and none beside them is written."""
    def laid_out(first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Memory, its numbers from `first` on; a view of it with the shape; and where in the memory the view is."""
        order = data.draw(st.permutations(range(len(shape))))
        steps = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, -1]), min_size=len(shape), max_size=len(shape)))
        room = [shape[axis] * 2 + 3 for axis in order]
        at = np.arange(np.prod(room))
        memory = (first + at % 1000).astype(dtype)

        def view(whole: np.ndarray) -> np.ndarray:
            turned = whole.reshape(room).transpose(np.argsort(order))
            taken = turned[tuple(slice(1, 1 + n * abs(step), abs(step)) for n, step in zip(shape, steps))]
            return taken[tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)]

        return memory, view(memory), view(at)

    k = get_backend("cpu")
    (_, source, _), (memory, target, places) = laid_out(0), laid_out(1000)
    want = memory.copy()
    want[places.reshape(-1)] = source.reshape(-1)
    x, y = k.from_numpy(source), Array(target)
    k.copy(y, x, k.layout(y, x))
    assert (memory == want).all()


@pytest.mark.parametrize(("shape", "order"), [
    ((1600, 1424), (1, 0)), ((1601, 1425), (1, 0)), ((3, 1100, 720), (0, 2, 1)), ((520, 20, 300), (2, 1, 0))])
def test_a_large_transposition_for_any_number_of_threads(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """More than goes past the caches, in whole vectors and not, of more than one tile."""
    k, x = get_backend("cpu"), np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    turned = k.from_numpy(x.transpose(order))

    def run() -> list[np.ndarray]:
        y = k.full(turned.shape, -1, eg.float32)
        k.copy(y, turned, k.layout(y, turned))
        assert (y.data == x.transpose(order)).all()
        return [y.data]

    check_threads(run)


@compiled
def test_a_dense_layout_is_one_axis() -> None:
    k = get_backend("cpu")
    x, y = k.empty((4, 5, 6), eg.float32), k.empty((4, 5, 6), eg.float32)
    assert list(k.layout(y, x)[0:4]) == [1, 120, 1, 1]
    record = k.layout(y, x.view(x.data[:, ::2].repeat(2, 1)[:, :5]), x.view(np.broadcast_to(x.data[0, 0], (4, 5, 6))))
    assert record[0] >= 1
    row = x.view(x.data[0, 0])  # (6,) against (4, 5, 6): two axes, the outer with stride 0
    assert list(k.layout(y, row)[0:7]) == [2, 20, 6, 6, 1, 0, 1]
