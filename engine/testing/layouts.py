"""The ways in which the same elements can lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _permuted(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The axes in another order in memory."""
    order = rng.permutation(x.ndim)
    return np.array(x.transpose(order), order="C").transpose(np.argsort(order))


def _negative(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some axes run backwards in memory."""
    axes = tuple(i for i in range(x.ndim) if rng.integers(2) or i == x.ndim - 1)
    return np.flip(np.array(np.flip(x, axes), order="C"), axes) if x.ndim else np.array(x)


def _poison(dtype: np.dtype) -> Any:
    """What stands where no element is, so that a kernel that reads it shows: NaN, the largest integer, True."""
    return np.nan if dtype.kind == "f" else np.iinfo(dtype).max if dtype.kind in "iu" else True


def _inside(x: np.ndarray, steps: list[int]) -> np.ndarray:
    """x in a larger block of poison, of which an axis with step s takes every s-th element."""
    block = np.full([n * s for n, s in zip(x.shape, steps)], _poison(x.dtype), x.dtype)
    index: Any = (..., *[slice(s - 1, None, s) for s in steps])  # the ellipsis keeps a 0-d view an array
    view = block[index]
    view[...] = x
    return view


def _strided(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every axis takes each first, second or third element of a larger block."""
    return _inside(x, [int(s) for s in rng.integers(1, 4, x.ndim)])


def _rows(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The last axis is dense, the one before it strided: columns cut out of a wider matrix."""
    return _inside(x, [1] * (x.ndim - 2) + [2, 1]) if x.ndim > 1 else _inside(x, [2] * x.ndim)


def _offset(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dense, but one element off the alignment that a vector has."""
    block = np.empty(x.size + 1, x.dtype)
    view = block[1:].reshape(x.shape)
    view[...] = x
    return view


def _read_only(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dense, and nobody may write to it."""
    view = np.array(x, order="C")
    view.flags.writeable = False
    return view


def zero_stride(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One axis repeats its first slice: stride 0. The only layout that changes the values."""
    if not x.size or not x.ndim:
        return x
    axis = int(rng.integers(x.ndim))
    first = np.array(x[(slice(None),) * axis + (slice(1),)], order="C")
    return np.broadcast_to(first, x.shape)


def _misaligned(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dense, at an address that is no multiple of the element's size: no kernel may read it as it is."""
    block = np.empty((x.size + 1) * x.itemsize, np.uint8)
    view = block[1:1 + x.size * x.itemsize].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _odd_stride(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A field of packed records: the stride is no multiple of the element's size."""
    block = np.empty(x.shape, np.dtype([("before", "u1"), ("element", x.dtype)]))
    view = np.asarray(block["element"])
    view[...] = x
    return view


Layout = Callable[[np.ndarray, np.random.Generator], np.ndarray]

LAYOUTS: dict[str, Layout] = {
    "C": lambda x, rng: np.array(x, order="C"), "F": lambda x, rng: np.array(x, order="F"),
    "permuted": _permuted, "negative": _negative, "strided": _strided, "rows": _rows, "offset": _offset,
    "read-only": _read_only,
}
"""By name, the simplest first; each takes an array and a generator and gives equal elements laid out so."""

FOREIGN: dict[str, Layout] = {"misaligned": _misaligned, "odd stride": _odd_stride}
"""Layouts that NumPy has and C cannot walk: what takes arrays from outside must copy them, or refuse."""


# ── a layout as numbers ───────────────────────────────────────────────────────────────────────────────

ALIGNED = 16  # bytes: every block that an allocator gives begins at a multiple of it (C's max_align_t)


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int]:
    """How far below the address of the first element the lowest one begins, and how far above the highest, in bytes."""
    steps = [stride * (n - 1) for stride, n in zip(strides, shape)] if 0 not in shape else []
    return -sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)


def placement(x: np.ndarray) -> dict[str, Any]:
    """How x lies in memory, for `placed`; nothing where it is in C order, aligned and may be written to."""
    found: dict[str, Any] = {} if x.flags.c_contiguous or not x.size else {"strides": x.strides}
    shift = (x.ctypes.data - _reach(x.shape, x.strides)[0]) % ALIGNED
    found |= {"shift": shift} if shift and x.size else {}
    return found if x.flags.writeable else {**found, "writeable": False}


def placed(x: np.ndarray, strides: tuple[int, ...] | None = None, shift: int = 0, writeable: bool = True) -> np.ndarray:
    """An array equal to x that lies so, as a failed check prints it: with these strides (of C order by default), its
    lowest byte so many bytes beyond a multiple of ALIGNED, perhaps read-only. What lies between is poison."""
    strides = np.empty(x.shape, x.dtype).strides if strides is None else strides
    below, above = _reach(x.shape, strides)
    size = below + above + x.itemsize
    block = np.full((size + ALIGNED) // x.itemsize + 1, _poison(x.dtype), x.dtype).view(np.uint8)
    start = (shift - block.ctypes.data) % ALIGNED
    view: np.ndarray = np.ndarray(x.shape, x.dtype, block[start:start + size], below, strides)
    view[...] = x
    view.flags.writeable = writeable
    return view
