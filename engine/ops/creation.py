"""Making tensors: constants, ranges, random draws; and moving them between types and devices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine import autograd
from engine.backend import Array, devices, get_backend
from engine.dtypes import DType, as_dtype, float32, float64, int64
from engine.ops.registry import attach, cast, composite, op
from engine.random import Generator, Key, default_generator
from engine.tensor import Tensor, default_device, tensor

Shape = int | tuple[int, ...]


def _size(name: str, shape: Any) -> tuple[int, ...]:
    """A shape from `zeros(2, 3)` or `zeros((2, 3))`."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = shape[0]
    if not all(isinstance(n, (int, np.integer)) and n >= 0 for n in shape):
        raise ValueError(f"{name}: shape is {tuple(shape)}, expected whole numbers of at least 0")
    return tuple(int(n) for n in shape)


def _made(array: Array, device: str, requires_grad: bool) -> Tensor:
    out = Tensor(array, device)
    return out.requires_grad_(True) if requires_grad else out


def full(shape: Shape, value: bool | int | float, *, dtype: Any = None, device: str | None = None,
         requires_grad: bool = False) -> Tensor:
    """A tensor of `shape` with every element `value`; dtype by default that of tensor(value)."""
    device = device or default_device()
    kind = as_dtype(dtype) if dtype is not None else as_dtype(type(value))
    sizes = _size("full", shape if isinstance(shape, (tuple, list)) else (shape,))
    return _made(get_backend(device).full(sizes, value, kind), device, requires_grad)


def zeros(*shape: Any, dtype: Any = float32, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """A tensor of zeros: zeros(2, 3) or zeros((2, 3))."""
    return full(_size("zeros", shape), 0, dtype=dtype, device=device, requires_grad=requires_grad)


def ones(*shape: Any, dtype: Any = float32, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """A tensor of ones: ones(2, 3) or ones((2, 3))."""
    return full(_size("ones", shape), 1, dtype=dtype, device=device, requires_grad=requires_grad)


def empty(*shape: Any, dtype: Any = float32, device: str | None = None) -> Tensor:
    """A tensor whose elements are whatever was in memory."""
    device = device or default_device()
    return Tensor(get_backend(device).empty(_size("empty", shape), as_dtype(dtype)), device)


def zeros_like(x: Tensor, dtype: Any = None) -> Tensor:
    return zeros(x.shape, dtype=dtype or x.dtype, device=x.device)


def ones_like(x: Tensor, dtype: Any = None) -> Tensor:
    return ones(x.shape, dtype=dtype or x.dtype, device=x.device)


def full_like(x: Tensor, value: bool | int | float, dtype: Any = None) -> Tensor:
    return full(x.shape, value, dtype=dtype or x.dtype, device=x.device)


def arange(start: float, stop: float | None = None, step: float = 1, *, dtype: Any = None,
           device: str | None = None) -> Tensor:
    """start, start + step, ... below stop (arange(n): 0 to n − 1). Each is start + i·step, so errors do not add up."""
    if stop is None:
        start, stop = 0, start
    if step == 0:
        raise ValueError("arange: step is 0, expected any other number")
    whole = all(isinstance(v, (int, np.integer)) for v in (start, stop, step))
    kind = as_dtype(dtype) if dtype is not None else int64 if whole else float32
    device = device or default_device()
    k = get_backend(device)
    count = max(0, -((stop - start) // -step) if whole else math.ceil((stop - start) / step))
    y = k.empty((int(count),), kind)
    k.arange(y, start, step)
    return Tensor(y, device)


def linspace(start: float, stop: float, num: int, *, dtype: Any = float32, endpoint: bool = True,
             device: str | None = None) -> Tensor:
    """`num` equally spaced numbers from start to stop, which is the last one unless endpoint is False."""
    return tensor(np.linspace(start, stop, num, endpoint=endpoint), dtype=dtype, device=device)


def eye(rows: int, columns: int | None = None, *, k: int = 0, dtype: Any = float32,
        device: str | None = None) -> Tensor:
    """Ones on the k-th diagonal, zeros elsewhere."""
    return tensor(np.eye(rows, columns, k), dtype=dtype, device=device)


def one_hot(index: Tensor, classes: int, dtype: Any = float32) -> Tensor:
    """y[..., c] = 1 where index[...] = c, else 0."""
    return (index.expand_dims(-1) == arange(classes, device=index.device)).to(dtype=dtype)


@op("...ij -> ...ij", reference=lambda x, k=0: np.tril(x, k), types="any")
def tril(_k: Any, x: Array, k: int = 0) -> Array:
    """x on and below the k-th diagonal, 0 above."""
    return _triangle(_k, x, np.tril(np.ones(x.shape[-2:], bool), k))


@tril.vjp
def _(g: Tensor, k: int) -> Tensor:
    return tril(g, k)


@op("...ij -> ...ij", reference=lambda x, k=0: np.triu(x, k), types="any")
def triu(_k: Any, x: Array, k: int = 0) -> Array:
    """x on and above the k-th diagonal, 0 below."""
    return _triangle(_k, x, np.triu(np.ones(x.shape[-2:], bool), k))


@triu.vjp
def _(g: Tensor, k: int) -> Tensor:
    return triu(g, k)


def _triangle(k: Any, x: Array, keep: np.ndarray) -> Array:
    return k.map("where", k.from_numpy(keep), x, k.constant(0, x.dtype))


# ── random draws ──────────────────────────────────────────────────────────────────────────────────────

def _key(generator: Generator | None) -> Key:
    return (generator or default_generator()).key()


def rand(*shape: Any, low: float = 0.0, high: float = 1.0, dtype: Any = float32, device: str | None = None,
         generator: Generator | None = None, requires_grad: bool = False) -> Tensor:
    """Uniform in [low, high): low + (high − low) u, u of 24 bits (float32) or 53 (float64)."""
    device = device or default_device()
    k = get_backend(device)
    y = k.empty(_size("rand", shape), _floating("rand", dtype))
    k.random_uniform(y, y.size, low, high, *_key(generator))
    return _made(y, device, requires_grad)


def randn(*shape: Any, mean: float = 0.0, std: float = 1.0, dtype: Any = float32, device: str | None = None,
          generator: Generator | None = None, requires_grad: bool = False) -> Tensor:
    """Normal with the given mean and standard deviation. Box, Muller 1958."""
    device = device or default_device()
    k = get_backend(device)
    y = k.empty(_size("randn", shape), _floating("randn", dtype))
    k.random_normal(y, y.size, mean, std, *_key(generator))
    return _made(y, device, requires_grad)


def randint(low: int, high: int, shape: Shape, *, device: str | None = None,
            generator: Generator | None = None) -> Tensor:
    """Whole numbers in [low, high), int64: low + ⌊u (high − low)⌋ with u of 53 bits."""
    if high <= low:
        raise ValueError(f"randint: the range [{low}, {high}) is empty")
    u = rand(shape if isinstance(shape, tuple) else (shape,), dtype=float64, device=device, generator=generator)
    return (u * float(high - low)).to(dtype=int64) + low


def _floating(name: str, dtype: Any) -> DType:
    kind = as_dtype(dtype)
    if not kind.is_floating:
        raise TypeError(f"{name}: dtype is {kind}, expected float32 or float64")
    return kind


@op("... -> ...", types="float!", public=False)
def masked_scale(k: Any, x: Array, p: float, key: Key) -> Array:
    """x · keep / (1 − p), keep = [u ≥ p] with u the uniform draw of each element's index under `key`."""
    x = k.contiguous(x)
    y = k.empty_like(x)
    k.dropout(y, x, x.size, p, *key)
    return y


@masked_scale.vjp
def _(g: Tensor, p: float, key: Key) -> Tensor:
    return masked_scale(g, p, key)  # linear in x, and the mask is drawn again instead of stored


@composite("... -> ...")
def dropout(x: Tensor, p: float = 0.5, generator: Generator | None = None) -> Tensor:
    """Each element 0 with probability p, else x/(1 − p), so the mean stays. Srivastava et al. 2014.

    The draw is keyed (engine/random.py): no mask is stored. Raises ValueError for p outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is {p!r}, expected a probability in [0, 1]")
    return masked_scale(x, p, _key(generator)) if p else x


# ── types and devices ─────────────────────────────────────────────────────────────────────────────────

@op("... -> ...", types="any", public=False)
def convert(k: Any, x: Array, dtype: DType, source: DType) -> Array:
    """x, of type source, as dtype."""
    return cast(k, x, dtype)


@convert.vjp
def _(g: Tensor, dtype: DType, source: DType) -> Tensor:
    return convert(g, source, dtype)


@composite("... -> ...", reference=lambda x, dtype: x.astype(str(dtype)), method="astype")
def astype(x: Tensor, dtype: Any) -> Tensor:
    """x in another element type; float to integer drops the fraction. The gradient is converted back."""
    kind = as_dtype(dtype)
    if not (kind.is_floating and x.dtype.is_floating):  # integers carry no gradients
        x = x.detach() if x.requires_grad else x
    return x if kind is x.dtype else convert(x, kind, x.dtype)


@op("... -> ...", types="any", public=False)
def transfer(k: Any, x: Array, source: str) -> Array:
    """x moved here from device `source`."""
    return k.array(get_backend(source).to_numpy(x), x.dtype)


@transfer.vjp
def _(g: Tensor, source: str) -> Tensor:
    return move(g, source)


def move(x: Tensor, device: str) -> Tensor:
    """x on another device: the one op whose output lives elsewhere than its input."""
    array = transfer.forward(get_backend(device), x.array, x.device)
    if not (autograd.is_grad_enabled() and x.requires_grad):
        return Tensor(array, device)
    node = autograd.Node(transfer, (autograd.edge_of(x),), (x.shape,), {}, {"source": x.device}, device)
    return Tensor(array, device, True, node)


def _to(self: Tensor, target: Any = None, *, dtype: Any = None, device: str | None = None) -> Tensor:
    if isinstance(target, str) and target in devices():
        device = target
    elif target is not None:
        dtype = target
    out = self if device is None or device == self.device else move(self, device)
    return out if dtype is None else astype(out, dtype)


_to.__doc__ = Tensor.to.__doc__
attach("to", _to)
