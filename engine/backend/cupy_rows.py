"""One row a kernel, in CuPy: what the GPU backend runs where there is no CUDA kernel.

Most are the NumPy rows, which hold for any module with NumPy's interface. Here is what differs: functions that CuPy
writes into the output by itself, and operations that CuPy does by atomic additions, or in no particular order, where
the engine promises the same bits every time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy

from engine.backend.numpy_rows import Rows, numpy_rows, to_format

# f(*inputs, out=y): one launch, no temporary. Where the names differ: kernel=function.
UFUNCS = """
    negative abs=absolute sign square sqrt reciprocal exp expm1 log log1p log2 log10 logaddexp
    sin cos tan asin=arcsin acos=arccos atan=arctan atan2=arctan2 hypot signbit copysign nextafter
    sinh cosh tanh asinh=arcsinh acosh=arccosh atanh=arctanh
    add subtract multiply divide maximum minimum equal not_equal less less_equal
    logical_and logical_or logical_xor logical_not
    bitwise_and bitwise_or bitwise_xor bitwise_not=invert bitwise_left_shift=left_shift bitwise_right_shift=right_shift
    isnan isinf isfinite
"""


def cupy_rows(cp: Any, scatter_sums: Callable[[Any, Any, Any], None]) -> Rows:
    """The table over `cp`, which is CuPy. scatter_sums(sums, g, index) adds floats by index in a fixed order."""
    def ufunc(function: Any) -> Callable[..., None]:
        def run(y: Any, *inputs_and_layout: Any) -> None:
            function(*inputs_and_layout[:-1], out=y)
        return run

    rows = numpy_rows(cp)
    for word in UFUNCS.split():
        kernel, _, function = word.partition("=")
        rows[kernel] = ufunc(getattr(cp, function or kernel))
    rows.update(round=rounded(cp.rint), floor=rounded(cp.floor), ceil=rounded(cp.ceil), trunc=rounded(cp.trunc))
    rows = {**rows, **division_rows(cp, rows)}
    return {**rows, "erf": ufunc(error_function), "gemm": lambda *a: gemm(cp, *a), **scattering_rows(cp, scatter_sums)}


def rounded(function: Callable[..., Any]) -> Callable[..., None]:
    def run(y: Any, x: Any, _layout: Any) -> None:
        if x.dtype.kind == "f":
            function(x, out=y)
        else:  # of integers CuPy makes floats
            y[...] = x
    return run


def division_rows(cp: Any, of_integers: Rows) -> Rows:
    """⌊a/b⌋ and a − ⌊a/b⌋ b of floats from the exact remainder of the truncated quotient; a/b where one is infinite.

    (CuPy's own remainder multiplies the rounded quotient back, and is NaN where b is infinite.)
    """
    def parts(a: Any, b: Any) -> tuple[Any, Any, Any]:
        truncated = cp.fmod(a, b)  # exact, with the sign of a
        return truncated, (truncated != 0) & ((truncated < 0) != (b < 0)), b

    def remainder(y: Any, a: Any, b: Any, layout: Any) -> None:
        if y.dtype.kind != "f":
            return of_integers["remainder"](y, a, b, layout)
        truncated, other_sign, b = parts(a, b)
        found = cp.where(other_sign, truncated + b, truncated)
        y[...] = cp.where(found == 0, cp.copysign(found, b), found)

    def floor_divide(y: Any, a: Any, b: Any, layout: Any) -> None:
        if y.dtype.kind != "f":
            return of_integers["floor_divide"](y, a, b, layout)
        truncated, other_sign, b = parts(a, b)
        quotient = (a - truncated) / b - other_sign.astype(y.dtype)  # whole but for its own rounding
        whole = cp.floor(quotient)
        whole = whole + (quotient - whole > 0.5).astype(y.dtype)
        whole = cp.where(quotient == 0, cp.copysign(cp.zeros_like(whole), a / b), whole)
        y[...] = cp.where((b == 0) | cp.isinf(a) | cp.isinf(b), a / b, whole)

    return {"remainder": remainder, "floor_divide": floor_divide}


def error_function(x: Any, out: Any) -> None:
    importlib.import_module("cupyx.scipy.special").erf(x, out=out)


def gemm(cp: Any, c: Any, a: Any, b: Any, bias: Any, batch: int, m: int, n: int, k: int,
         a_batch: int, a_row: int, a_col: int, b_batch: int, b_row: int, b_col: int,
         c_batch: int, c_row: int, accumulate: int, format: int) -> None:
    """cuBLAS, on views that walk the operands by their strides; the product is written in place where it can be."""
    strided = cp.lib.stride_tricks.as_strided

    def walk(x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return strided(x, shape, [s * x.dtype.itemsize for s in strides])

    target = walk(c, (batch, m, n), (c_batch, c_row, 1))
    if not k and not accumulate:
        target[...] = 0
    elif k:
        left, right = walk(a, (batch, m, k), (a_batch, a_row, a_col)), walk(b, (batch, k, n), (b_batch, b_row, b_col))
        left, right = to_format(cp, left, format), to_format(cp, right, format)
        if accumulate or not target.flags.c_contiguous:
            product = cp.matmul(left, right)
            target[...] = target + product if accumulate else product
        else:
            cp.matmul(left, right, out=target)
    if bias is not None:
        target += bias


def scattering_rows(cp: Any, scatter_sums: Callable[[Any, Any, Any], None]) -> Rows:
    """Writing by index. An index names positions; the same position may be named twice."""
    def positions(y: Any, index: Any) -> Any:
        """The flat position in y of each element that the index names. Raises IndexError outside y: CuPy would wrap."""
        numpy.broadcast_to(numpy.int8(0), y.shape)[index]
        return cp.arange(y.size).reshape(y.shape)[index]

    def scatter_add(y: Any, g: Any, index: Any) -> None:
        at = positions(y, index)
        g = cp.ascontiguousarray(cp.broadcast_to(g, at.shape)).reshape(-1)
        if y.dtype.kind == "f":
            sums = cp.empty(y.size, y.dtype)
            scatter_sums(sums, g, at.reshape(-1))
        else:  # integers: any order gives the same sum; unsigned ones, which CuPy can add atomically, wrap alike
            sums = cp.zeros(y.size, "uint64")
            cp.add.at(sums, at.reshape(-1), g.astype("int64").view("uint64"))
        y += sums.reshape(y.shape).astype(y.dtype)

    def scatter(y: Any, value: Any, index: Any) -> None:
        if not any(isinstance(part, numpy.ndarray) for part in index):
            y[index] = value  # no element twice
            return
        at = positions(y, index)
        value = cp.broadcast_to(value, at.shape).reshape(-1)
        order = cp.argsort(at.reshape(-1), kind="stable")  # of the values for one position, the last stands last
        place = at.reshape(-1)[order]
        last = cp.ones(place.shape, bool)
        last[:-1] = place[1:] != place[:-1]
        flat = cp.ascontiguousarray(y).reshape(-1)
        flat[place[last]] = value[order[last]].astype(y.dtype)
        y[...] = flat.reshape(y.shape)

    return {"scatter_add": scatter_add, "scatter": scatter}
