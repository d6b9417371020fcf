"""The array API standard, 2025.12: `xp = x.__array_namespace__()`, or `from engine import array_api as xp`.

The namespace is the op registry under the standard's names, with what is said differently there: shapes as one
argument, a dtype or device of None, inspection of types and devices. There are no complex types and no extensions
(linalg, fft). Whatever an op does with gradients it does here too.
"""

from __future__ import annotations

import math
import sys
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from engine import ops
from engine.backend import broadcast_shapes as common_shape
from engine.backend import present_devices, walkable
from engine.dtypes import ALL, DType, as_dtype, float32, int64, promote, promote_scalar
from engine.ops.registry import attach
from engine.tensor import Tensor, default_device, from_numpy, tensor

__array_api_version__ = "2025.12"

VERSIONS = ("2021.12", "2022.12", "2023.12", "2024.12", "2025.12")
e, inf, nan, pi, newaxis = math.e, math.inf, math.nan, math.pi, None
Shape = int | tuple[int, ...]
Scalar = bool | int | float

_NAMED = {**{dtype.name: dtype for dtype in ALL}, **{name: getattr(ops, name) for name in ops.__all__}}


def __getattr__(name: str) -> Any:
    """What this file does not define: the types, and the ops."""
    try:
        return _NAMED[name]
    except KeyError:
        raise AttributeError(f"module 'engine.array_api' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMED})


# ── creation ──────────────────────────────────────────────────────────────────────────────────────────

def asarray(obj: Any, /, *, dtype: DType | None = None, device: str | None = None, copy: bool | None = None
            ) -> Tensor:
    """A tensor of `obj`: a tensor, an array, a buffer, a number or nested lists of them.

    copy: True always copies, False raises ValueError where it would have to, None copies where it has to.
    """
    if isinstance(obj, Tensor):
        return _converted("asarray", obj, dtype, device, copy)
    if hasattr(obj, "__array__") or _is_buffer(obj):
        obj = np.asarray(obj)
        if walkable(obj) and not copy and (dtype is None or as_dtype(dtype).numpy == obj.dtype):
            return _converted("asarray", from_numpy(obj), None, device or default_device(), copy)
    if copy is False:
        raise ValueError(f"asarray: copy is False, but this {type(obj).__name__} must be copied into a tensor")
    return tensor(obj, dtype=dtype, device=device)


def _is_buffer(obj: Any) -> bool:
    try:
        memoryview(obj)
    except TypeError:
        return False
    return True


def _converted(name: str, x: Tensor, dtype: Any, device: str | None, copy: bool | None) -> Tensor:
    """x in this type and on this device; the same tensor where nothing changes and no copy is asked for."""
    y = x.to(dtype=dtype, device=device)
    if copy is False and y.array is not x.array:
        raise ValueError(f"{name}: copy is False, but {x.dtype} on {x.device} must be copied to be {y.dtype} on "
                         f"{y.device}")
    return ops.positive(y) if copy and y.array is x.array else y


def from_dlpack(x: Any, /, *, device: str | None = None, copy: bool | None = None) -> Tensor:
    """A tensor over the memory of anything that speaks DLPack; copied if that is asked for or the device differs."""
    if not isinstance(x, Tensor):
        x = from_numpy(np.from_dlpack(x))
    return _converted("from_dlpack", x.detach(), None, device, copy)


def full(shape: Shape, fill_value: Scalar, *, dtype: DType | None = None, device: str | None = None) -> Tensor:
    """A tensor of `shape` with every element fill_value; its type by default is that of the number."""
    return ops.full(shape, fill_value, dtype=dtype, device=device)


def zeros(shape: Shape, *, dtype: DType | None = None, device: str | None = None) -> Tensor:
    """A tensor of zeros, float32 by default."""
    return ops.full(shape, 0, dtype=dtype or float32, device=device)


def ones(shape: Shape, *, dtype: DType | None = None, device: str | None = None) -> Tensor:
    """A tensor of ones, float32 by default."""
    return ops.full(shape, 1, dtype=dtype or float32, device=device)


def empty(shape: Shape, *, dtype: DType | None = None, device: str | None = None) -> Tensor:
    """A tensor whose elements are whatever was in memory, float32 by default."""
    return ops.empty(shape, dtype=dtype or float32, device=device)


def full_like(x: Tensor, /, fill_value: Scalar, *, dtype: DType | None = None, device: str | None = None) -> Tensor:
    """A tensor like x in shape, type and device, with every element fill_value."""
    return ops.full(x.shape, fill_value, dtype=dtype or x.dtype, device=device or x.device)


def zeros_like(x: Tensor, /, *, dtype: DType | None = None, device: str | None = None) -> Tensor:
    """Zeros like x in shape, type and device."""
    return full_like(x, 0, dtype=dtype, device=device)


def ones_like(x: Tensor, /, *, dtype: DType | None = None, device: str | None = None) -> Tensor:
    """Ones like x in shape, type and device."""
    return full_like(x, 1, dtype=dtype, device=device)


def empty_like(x: Tensor, /, *, dtype: DType | None = None, device: str | None = None) -> Tensor:
    """A tensor like x in shape, type and device, whose elements are whatever was in memory."""
    return ops.empty(x.shape, dtype=dtype or x.dtype, device=device or x.device)


def eye(n_rows: int, n_cols: int | None = None, /, *, k: int = 0, dtype: DType | None = None, device: str | None = None
        ) -> Tensor:
    """Ones on the k-th diagonal, zeros elsewhere."""
    return ops.eye(n_rows, n_cols, k=k, dtype=dtype or float32, device=device)


def linspace(start: float, stop: float, /, num: int, *, dtype: DType | None = None, device: str | None = None,
             endpoint: bool = True) -> Tensor:
    """`num` equally spaced numbers from start to stop, which is the last one unless endpoint is False."""
    return ops.linspace(start, stop, num, dtype=dtype or float32, endpoint=endpoint, device=device)


# ── types ─────────────────────────────────────────────────────────────────────────────────────────────

class FInfo(NamedTuple):
    """What finfo gives: eps is the distance from 1 to the next number."""

    bits: int
    eps: float
    max: float
    min: float
    smallest_normal: float
    dtype: DType


class IInfo(NamedTuple):
    """What iinfo gives."""

    bits: int
    max: int
    min: int
    dtype: DType


def _dtype_of(x: Tensor | DType) -> DType:
    return x.dtype if isinstance(x, Tensor) else as_dtype(x)


def finfo(type: DType | Tensor, /) -> FInfo:
    """The limits of a floating-point type, or of a tensor's. Raises TypeError for another type."""
    dtype = _dtype_of(type)
    if not dtype.is_floating:
        raise TypeError(f"finfo: got dtype {dtype}, expected float32 or float64")
    found = np.finfo(dtype.numpy)
    return FInfo(8 * dtype.itemsize, float(found.eps), float(found.max), float(found.min), float(found.tiny), dtype)


def iinfo(type: DType | Tensor, /) -> IInfo:
    """The limits of an integer type, or of a tensor's. Raises TypeError for another type."""
    dtype = _dtype_of(type)
    if dtype.kind not in "iu":
        raise TypeError(f"iinfo: got dtype {dtype}, expected an integer type")
    found = np.iinfo(dtype.numpy)
    return IInfo(8 * dtype.itemsize, int(found.max), int(found.min), dtype)


KINDS = {"bool": "b", "signed integer": "i", "unsigned integer": "u", "integral": "iu", "real floating": "f",
         "complex floating": "", "numeric": "iuf"}


def isdtype(dtype: DType, kind: DType | str | tuple[DType | str, ...]) -> bool:
    """Whether dtype is `kind`: a type, one of the standard's kinds ("integral", "numeric"...), or any of several."""
    for one in kind if isinstance(kind, tuple) else (kind,):
        if isinstance(one, str) and one not in KINDS:
            raise ValueError(f"isdtype: kind is {one!r}, expected a dtype or one of {', '.join(KINDS)}")
        if dtype.kind in KINDS[one] if isinstance(one, str) else dtype is one:
            return True
    return False


def can_cast(from_: DType | Tensor, to: DType, /) -> bool:
    """Whether type promotion can turn the one type into the other."""
    try:
        return promote(_dtype_of(from_), to) is to
    except TypeError:  # they have no common type
        return False


def result_type(*arrays_and_dtypes: Tensor | DType | Scalar) -> DType:
    """The type of an operation on these; Python numbers take the type of the others where that can hold their kind."""
    numbers = [x for x in arrays_and_dtypes if isinstance(x, (bool, int, float))]
    kinds = [_dtype_of(x) for x in arrays_and_dtypes if not isinstance(x, (bool, int, float))]
    if not kinds:
        raise ValueError("result_type: got no tensor and no dtype, expected at least one")
    return reduce(lambda found, number: promote_scalar(found, type(number).__name__), numbers, reduce(promote, kinds))


def astype(x: Tensor, dtype: DType, /, *, copy: bool = True, device: str | None = None) -> Tensor:
    """x in another element type and on another device; a copy in any case unless copy is False."""
    return _converted("astype", x, dtype, device, copy or None)


# ── functions that the ops have in another form ───────────────────────────────────────────────────────

bitwise_invert = ops.bitwise_not


def conj(x: Tensor, /) -> Tensor:
    """The complex conjugate, which of real numbers is the number."""
    return ops.positive(x)


def real(x: Tensor, /) -> Tensor:
    """The real part, which of real numbers is the number."""
    return ops.positive(x)


def imag(x: Tensor, /) -> Tensor:
    """The imaginary part, which of real numbers is 0."""
    return zeros_like(x)


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that tensors of these shapes have together. Raises ValueError where they do not broadcast."""
    return common_shape("broadcast_shapes", *shapes) if shapes else ()


def concat(arrays: tuple[Tensor, ...] | list[Tensor], /, *, axis: int | None = 0) -> Tensor:
    """The tensors one after the other along `axis` (None: flattened)."""
    return ops.concat([ops.flatten(x) for x in arrays] if axis is None else arrays, 0 if axis is None else axis)


def reshape(x: Tensor, /, shape: tuple[int, ...], *, copy: bool | None = None) -> Tensor:
    """The elements in the same order under another shape. copy: True always copies, False never: ValueError instead."""
    y = ops.reshape(ops.positive(x) if copy else x, shape)
    if copy is False and y.array.storage is not x.array.storage:
        raise ValueError(f"reshape: copy is False, but x of shape {x.shape} must be copied into {tuple(shape)}")
    return y


# ── inspection ────────────────────────────────────────────────────────────────────────────────────────

class Info:
    """What this namespace can do: its types and devices."""

    def capabilities(self) -> dict[str, Any]:
        """Boolean indexing and shapes that depend on data; how many axes a tensor may have."""
        return {"boolean indexing": True, "data-dependent shapes": True, "max dimensions": 32}

    def default_device(self) -> str:
        return default_device()

    def devices(self) -> tuple[str, ...]:
        return present_devices()

    def default_dtypes(self, *, device: str | None = None) -> dict[str, DType]:
        """The types that numbers become when none is named, and that indices have."""
        return {"real floating": float32, "integral": int64, "indexing": int64}

    def dtypes(self, *, device: str | None = None, kind: str | tuple[str, ...] | None = None) -> dict[str, DType]:
        """The types by name, of one kind or several if that is asked for."""
        return {dtype.name: dtype for dtype in ALL if kind is None or isdtype(dtype, kind)}


def __array_namespace_info__() -> Info:
    """Types, devices and capabilities."""
    return Info()


def _array_namespace(self: Tensor, *, api_version: str | None = None) -> Any:
    """The array API standard's functions for tensors: engine.array_api. Raises ValueError for a later version of it."""
    if api_version is not None and api_version not in VERSIONS:
        raise ValueError(f"__array_namespace__: api_version is {api_version!r}, expected one of {', '.join(VERSIONS)}")
    return sys.modules[__name__]


def _to_device(self: Tensor, device: str, /, *, stream: Any = None) -> Tensor:
    """This tensor on another device, differentiably; itself if it is there."""
    if stream is not None:
        raise ValueError(f"to_device: stream is {stream!r}, expected None")
    return self.to(device=device)


attach("__array_namespace__", _array_namespace)
attach("to_device", _to_device)
