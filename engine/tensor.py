"""Tensor: an Array on a device, and where it came from.

A tensor made by an op holds the Node that made it (engine/autograd.py); a leaf with `requires_grad` collects
`.grad`. The operators and methods (`+`, `.sum()`, `.reshape()`...) are attached by the op decorator
(engine/ops/registry.py) and typed in tensor.pyi.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import autograd
from engine.backend import Array, get_backend, walkable
from engine.dtypes import DType, as_dtype, float32, uint64
from engine.rowsparse import Gradient, RowSparse

if TYPE_CHECKING:
    from engine.autograd import Node

_default_device: ContextVar[str] = ContextVar("default_device", default="cpu")


@contextmanager
def device(name: str) -> Iterator[None]:
    """Within the block, new tensors are made on device `name` ("cpu", "reference" or "cuda")."""
    get_backend(name)
    token = _default_device.set(name)
    try:
        yield
    finally:
        _default_device.reset(token)


def default_device() -> str:
    """The device on which a tensor is made when none is named."""
    return _default_device.get()


class Tensor:
    """A multidimensional array with gradients. Make one with `eg.tensor(data)`.

    requires_grad: whether operations on it are recorded
    grad:          what backward() accumulated here (a leaf, or after retain_grad()), else None; a Tensor, or RowSparse
                   where only embeddings with sparse=True came here
    node:          the operation that made it, None for a leaf
    """

    __slots__ = ("__weakref__", "array", "device", "grad", "hooks", "late", "node", "requires_grad")
    __array_priority__ = 1000  # numpy_array * tensor is the tensor's business

    def __init__(self, array: Array, device: str, requires_grad: bool = False, node: Node | None = None):
        self.array = array
        self.device = device
        self.requires_grad = requires_grad
        self.node = node
        self.grad: Tensor | RowSparse | None = None
        self.hooks: list[Callable[[Any], Gradient | None]] | None = None

    # ── memory that comes late ──────────────────────────────────────────────────────────────────────

    def release(self, late: Callable[[], Array]) -> None:
        """Let go of the memory. When it is next needed, late() is asked for it."""
        self.late = late
        try:
            del self.array
        except AttributeError:  # it is gone already
            pass

    def __getattr__(self, name: str) -> Any:
        if name != "array":
            raise AttributeError(f"Tensor has no attribute {name!r}")
        self.array = self.late()
        return self.array

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.data.shape

    @property
    def ndim(self) -> int:
        return self.array.data.ndim

    @property
    def size(self) -> int:
        return self.array.data.size

    @property
    def dtype(self) -> DType:
        return self.array.dtype

    @property
    def is_leaf(self) -> bool:
        return self.node is None

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len: a 0-d tensor has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        body = np.array2string(self.numpy(), separator=", ", prefix="tensor(", threshold=100)
        extra = "" if self.dtype is float32 else f", dtype={self.dtype}"
        if self.device != "cpu":
            extra += f", device={self.device!r}"
        if self.node is not None:
            extra += f", node={self.node.op.name}"
        elif self.requires_grad:
            extra += ", requires_grad=True"
        return f"tensor({body}{extra})"

    # ── out of the engine ───────────────────────────────────────────────────────────────────────────

    def numpy(self) -> np.ndarray:
        """The elements as a NumPy array that shares this tensor's memory (on the CPU). Do not write to it
        if the tensor is part of a graph: the version counter cannot see that."""
        if self.array.storage.postponed is not None:
            self.array.storage.postponed.look()
        return get_backend(self.device).to_numpy(self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        data = self.numpy()
        if copy is False and dtype is not None and data.dtype != dtype:
            raise ValueError(f"__array__: {self.dtype} to {dtype} needs a copy, and copy=False was asked for")
        return np.array(data, dtype=dtype, copy=bool(copy) or None)

    def __buffer__(self, flags: int) -> memoryview:
        """The buffer protocol: `memoryview(x)`, `file.write(x)` on Python 3.12 and later (PEP 688), nothing copied."""
        if self.requires_grad:
            raise BufferError("__buffer__: this tensor requires grad, which the other side would not see; detach() it")
        return self.numpy().__buffer__(flags)

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None,
                   dl_device: tuple[Any, int] | None = None, copy: bool | None = None) -> Any:
        """A DLPack capsule over this tensor's memory: `torch.from_dlpack(x)`, `np.from_dlpack(x)`, nothing copied."""
        if self.requires_grad:
            raise RuntimeError("__dlpack__: this tensor requires grad, which the other side would not see; detach() it")
        options = {"stream": stream, "max_version": max_version, "dl_device": dl_device, "copy": copy}
        return self.numpy().__dlpack__(**{name: value for name, value in options.items() if value is not None})

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickling and copy.copy: the elements, the device and requires_grad. A graph cannot be pickled."""
        if self.node is not None:
            raise TypeError(f"pickle: this tensor was made by {self.node.op.name} and has a graph; detach() it first")
        return tensor, (np.array(self.numpy(), order="C"), self.dtype, self.device, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        function, arguments = self.__reduce__()
        copied = memo[id(self)] = function(*arguments)
        return copied

    def item(self) -> Any:
        """The one element as a Python number. Raises ValueError unless there is exactly one."""
        if self.size != 1:
            raise ValueError(f"item: the tensor has shape {self.shape}, expected one element")
        return self.numpy().item()

    def tolist(self) -> Any:
        return self.numpy().tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        if self.dtype.is_floating:
            raise TypeError(f"index: got a {self.dtype} tensor, expected an integer")
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    # ── gradients ───────────────────────────────────────────────────────────────────────────────────

    def backward(self, grad: Tensor | None = None, *, retain_graph: bool = False, create_graph: bool = False) -> None:
        """Add d self/d leaf · grad to the `.grad` of every leaf behind this (grad defaults to 1 for one element).

        Frees the graph unless retain_graph or create_graph. Raises RuntimeError when there is no graph.
        """
        autograd.backward([self], [grad], retain_graph=retain_graph, create_graph=create_graph)

    def detach(self) -> Tensor:
        """The same memory, outside any graph."""
        return Tensor(self.array.view(self.array.data), self.device)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set requires_grad of a leaf."""
        if self.node is not None:
            raise RuntimeError(f"requires_grad_: this tensor was made by {self.node.op.name}; only a leaf can be set")
        if requires_grad and not self.dtype.is_floating:
            raise TypeError(f"requires_grad: got dtype {self.dtype}, expected a floating one")
        self.requires_grad = requires_grad
        return self

    def register_hook(self, hook: Callable[[Any], Gradient | None]) -> Callable[[], None]:
        """Call hook(grad) when this tensor's whole gradient is known; what it returns, if not None, replaces it.

        grad is a Tensor, or RowSparse where only embeddings with sparse=True use this tensor. Returns a function that
        removes the hook.
        """
        if not self.requires_grad:
            raise RuntimeError("register_hook: this tensor does not require grad")
        if self.node is not None:
            hooks = self.node.hooks = [] if self.node.hooks is None else self.node.hooks
        else:
            hooks = self.hooks = [] if self.hooks is None else self.hooks
        hooks.append(hook)
        return lambda: hooks.remove(hook)

    def retain_grad(self) -> None:
        """Let backward() put into `.grad` what hooks leave of this tensor's gradient, although it is not a leaf."""
        if self.node is not None:
            self.node.keeper = weakref.ref(self)

    def to(self, target: DType | str | None = None, *, dtype: Any = None, device: str | None = None) -> Tensor:
        """This tensor in another dtype or on another device, differentiably; itself if nothing changes.

        x.to("float64"), x.to(eg.float64), x.to("reference"), x.to(dtype=..., device=...)
        """
        raise NotImplementedError  # attached by engine/ops/creation.py


def tensor(data: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """A new tensor holding a copy of `data`: a number, a nested list, a NumPy array or a tensor.

    dtype: default float32 for Python floats, int64 for ints, bool for bools, and an array's own type.
    Raises ValueError for ragged lists and TypeError for data that are not numbers.
    """
    device = device or (data.device if isinstance(data, Tensor) else default_device())
    if isinstance(data, Tensor):
        data = data.numpy()
    try:
        source = np.asarray(data)
    except ValueError as error:
        raise ValueError(f"tensor: data is not a rectangular array of numbers ({error})") from None
    if dtype is not None:
        kind = as_dtype(dtype)
        if kind is uint64 and source.dtype.kind in "fO" and source is not data:
            source = np.asarray(data, kind.numpy)  # NumPy guesses float64 for numbers on both sides of 2⁶³
    elif isinstance(data, (np.ndarray, np.generic)):
        kind = _dtype_of(source)
    else:  # Python numbers: float means float32
        kind = float32 if source.dtype.kind == "f" else _dtype_of(source)
    if source.dtype.kind not in "biuf":
        raise TypeError(f"tensor: data has elements of type {source.dtype}, expected numbers")
    array = get_backend(device).array(source.astype(kind.numpy, copy=False), kind)
    return Tensor(array, device).requires_grad_(True) if requires_grad else Tensor(array, device)


def _dtype_of(source: np.ndarray) -> DType:
    try:
        return as_dtype(source.dtype)
    except TypeError:
        raise TypeError(f"tensor: data has elements of type {source.dtype}, expected numbers that the engine has "
                        "(bool, int8-64, uint8-64, float32, float64)") from None


def from_dlpack(source: Any) -> Tensor:
    """A tensor over the memory of anything that speaks DLPack (a NumPy array, a PyTorch CPU tensor), nothing copied."""
    return from_numpy(np.from_dlpack(source))


def from_numpy(data: np.ndarray, requires_grad: bool = False) -> Tensor:
    """A tensor over the memory of a NumPy array: writing to either is seen by both.

    Raises ValueError for memory that kernels cannot walk; eg.tensor copies it.
    """
    if not walkable(data):
        raise ValueError(f"from_numpy: data has strides {data.strides} of {data.itemsize}-byte elements"
                         f"{'' if data.flags.aligned else ' that are not aligned'}, expected whole strides of aligned "
                         "elements; eg.tensor makes a copy")
    out = Tensor(get_backend("cpu").from_numpy(data), "cpu")
    return out.requires_grad_(True) if requires_grad else out
