"""Array: what a kernel sees of a tensor, a NumPy array over pool memory plus its address.

An Array knows no gradients. It is the currency below the ops: the launch turns it into a pointer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.dtypes import DType, as_dtype


def walkable(data: np.ndarray) -> bool:
    """Whether a kernel can walk `data`: aligned elements, and strides of whole elements (not a field of a record)."""
    return data.flags.aligned and not any([stride % data.itemsize for stride in data.strides])


class Storage:
    """What all views of one buffer share.

    version:   how often it was written in place         has_views: whether there are any
    postponed: the updates of rows that an optimizer makes when somebody looks (optim/postponed.py), or None
    again:     None, or how to have an array once more instead of keeping it (LateStorage)
    """

    __slots__ = ("has_views", "postponed", "version")
    again: Any = None

    def __init__(self) -> None:
        self.version = 0
        self.has_views = False
        self.postponed: Any = None


class LateStorage(Storage):
    """Of memory that is fetched when it is needed: a tape does not keep it, but what again(array) gives."""

    __slots__ = ("again",)

    def __init__(self, again: Callable[[Array], Any]) -> None:
        super().__init__()
        self.again = again


class Array:
    """A strided block of elements on one device.

    data:    the NumPy (or CuPy) array; slicing, reshaping and transposing are its business
    dtype:   our DType
    ptr:     the address as a cffi `void *`, cached; None until a C kernel first asks for a view's address
    storage: shared by every view of the same buffer
    """

    __slots__ = ("data", "dtype", "ptr", "storage")

    def __init__(self, data: Any, dtype: DType | None = None, ptr: Any = None, storage: Storage | None = None):
        self.data = data
        self.dtype = dtype or as_dtype(data.dtype)
        self.ptr = ptr
        self.storage = storage or Storage()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def writeable(self) -> bool:
        """Whether elements may be written in place. NumPy marks arrays as read-only, CuPy knows no such mark."""
        return getattr(self.data.flags, "writeable", True)

    def view(self, data: Any) -> Array:
        """An Array over `data`, which must be a view of this one's memory."""
        self.storage.has_views = True
        return Array(data, self.dtype, None, self.storage)

    def turned(self, data: Any) -> Array:
        """A view from the same element on, with axes permuted, repeated or of length 1: its address is this one's."""
        self.storage.has_views = True
        return Array(data, self.dtype, self.ptr, self.storage)

    def reshaped(self, shape: tuple[int, ...]) -> Array:
        """A C-contiguous Array under another shape: same memory, same address."""
        self.storage.has_views = True
        return Array(self.data.reshape(shape), self.dtype, self.ptr, self.storage)

    def seen_as(self, data: Any) -> Array:
        """A view for one launch, which no tensor gets: the storage is not marked as having views."""
        return Array(data, self.dtype, None, self.storage)

    def __repr__(self) -> str:
        data = self.data if isinstance(self.data, np.ndarray) else self.data.get()
        return f"Array({np.array2string(data, threshold=8)}, {self.dtype})"
