"""Matrices of weights in a form that is only read, for inference: `linear` and `embedding` take them as their weight.

    packed = eg.pack(weight)               float, in panels of rows: one stream from memory, and the same bits
    small = eg.quantize(weight, "q8_0")    8 or 4 bits a weight and a scale for each 32, or 16 bits, as in GGUF files

    y = eg.linear(x, small, bias)          x stays float; gradients flow to x and bias

Both deal a matrix (n, k) out to panels: the weights that one step of the sum wants from many rows stand side by side
(kernels.h has the order). So the kernels that multiply a few rows by it, decoding a text, read it once from end to end,
and those that multiply many find it packed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.autograd import is_grad_enabled
from engine.backend import Array, get_backend
from engine.backend.stored_rows import BLOCK, SCHEMES, Scheme
from engine.dtypes import DType, float32, int64, uint8
from engine.ops.indexing import checked_index
from engine.ops.matmul import gemm, linear
from engine.ops.movement import permute_dims, reshape
from engine.ops.registry import Op, op, operand_classes
from engine.precision import autocast
from engine.tensor import Tensor, tensor


class StoredMatrix:
    """A matrix of weights (n, k) in a form that is only read. `shape`, `dtype` and `device` are a tensor's."""

    __slots__ = ("dtype", "panels", "shape")
    shape: tuple[int, int]
    dtype: DType
    panels: Tensor

    def __init_subclass__(cls) -> None:
        operand_classes[cls] = _apply

    @property
    def ndim(self) -> int:
        return 2

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def device(self) -> str:
        return self.panels.device

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.panels.size * self.panels.dtype.itemsize

    def rows(self, index: Any) -> Tensor:
        """Its rows at integers (...) in [0, n), as floats (..., k). Raises IndexError for others."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """The matrix as an ordinary tensor."""
        raise NotImplementedError

    def _linear(self, x: Tensor, bias: Any) -> Tensor:
        raise NotImplementedError

    def _positions(self, index: Any) -> Array:
        index = index if isinstance(index, Tensor) else tensor(index, device=self.device)
        if index.dtype.is_floating:
            raise TypeError(f"embedding: index has dtype {index.dtype}, expected an integer type")
        return checked_index(get_backend(self.device), "embedding", index.array, self.shape[0])


def _apply(made: Op, values: Sequence[Any], _attributes: dict[str, Any]) -> Tensor:
    """What op `made` computes where an operand is a StoredMatrix."""
    weight = WEIGHT_OF.get(made.name)
    for i, (name, value) in enumerate(zip(made.operand_names(values), values)):
        if isinstance(value, StoredMatrix) and i != weight:
            raise TypeError(f"{made.name}: {name} is {value!r}, which only linear and embedding take, as their weight; "
                            ".tensor() makes an ordinary tensor of it")
    if made.name == "embedding":
        return values[0].rows(values[1])
    x, matrix, bias = values
    x = x if isinstance(x, Tensor) else tensor(x, device=matrix.device)
    n, inner = matrix.shape
    if not x.ndim or x.shape[-1] != inner:
        raise ValueError(f"linear: x has shape {x.shape}, expected (..., {inner}) for weight {matrix!r}")
    if bias is not None and not isinstance(bias, Tensor):
        bias = tensor(bias, None if isinstance(bias, np.ndarray) else x.dtype, matrix.device)
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"linear: bias has shape {bias.shape}, expected ({n},) for weight {matrix!r}")
    return matrix._linear(x, bias)


WEIGHT_OF = {"linear": 1, "embedding": 0}
"""Which operand of an op may be a StoredMatrix."""


def _run(made: Op, x: Tensor, panels: Tensor, bias: Any, *attributes: Any) -> Tensor:
    """The op `made`, or where no gradient is wanted its forward at once: a token is a hundred of them."""
    operands = (x,) if bias is None else (x, bias)
    k = get_backend(panels.device)
    for t in operands:
        if t.__class__ is not Tensor or t.device != panels.device or t.dtype is not x.dtype:
            return made(x, panels, bias, *attributes)
    if not x.dtype.is_floating or not k.has_fused(made.kernel) or (is_grad_enabled()
                                                                   and any([t.requires_grad for t in operands])):
        return made(x, panels, bias, *attributes)
    return Tensor(made.forward(k, x.array, panels.array, None if bias is None else bias.array, *attributes), x.device)


def _matrix_of(name: str, weight: Any) -> Tensor:
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.dtype.is_floating:
        got = f"{weight.dtype} {weight.shape}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: weight is {got}, expected a floating tensor (n, k)")
    return weight


@autocast("float32")  # as forward
def _gradients(k: Any, g: Array, weight: Array, x_shape: tuple[int, ...], bias: bool, needs: tuple[bool, ...]) -> Any:
    """Of y = x Wᵀ + b: dx = g W, db = Σ g."""
    n, rows = weight.shape[0], math.prod(x_shape[:-1])
    flat = g.seen_as(g.data.reshape(rows, n))
    dx = gemm(k, flat, weight) if needs[0] else None
    dbias = k.empty((n,), g.dtype) if bias and needs[2] else None
    if dbias is not None:
        k.sum(dbias, flat, 1, rows, n)
    return dx and dx.seen_as(dx.data.reshape(x_shape)), None, dbias


# ── float weights in panels ───────────────────────────────────────────────────────────────────────────

class PackedTensor(StoredMatrix):
    """The floats of a matrix (n, k) in panels (⌈n/c⌉, k, c): panels[j, p, i] = weight[j·c + i, p], 0 beyond row n.

    c is what the machine's vectors make of it, so a packed matrix is made where it is used. Made by pack().
    """

    __slots__ = ()

    def __init__(self, panels: Tensor, n: int):
        self.panels, self.shape, self.dtype = panels, (n, panels.shape[1]), panels.dtype

    def rows(self, index: Any) -> Tensor:
        k, at = get_backend(self.device), self._positions(index)
        y = k.empty((at.size, self.shape[1]), self.dtype)
        k.packed_rows(y, self.panels.array, at.seen_as(at.data.reshape(-1)))
        return Tensor(y.reshaped((*at.shape, self.shape[1])), self.device)

    def tensor(self) -> Tensor:
        return _unpacked(self.panels, self.shape[0])

    def _linear(self, x: Tensor, bias: Any) -> Tensor:
        for name, t in (("x", x), ("bias", bias)):  # panels of another type would have another width
            if t is not None and t.dtype is not self.dtype:
                raise TypeError(f"linear: {name} has dtype {t.dtype}, expected {self.dtype} as in {self!r}")
        return _run(packed_linear, x, self.panels, bias, self.shape[0])

    def __repr__(self) -> str:
        return f"PackedTensor({self.shape}, {self.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        return pack, (self.tensor(),)


def pack(weight: Tensor) -> PackedTensor:
    """A copy of a float matrix (n, k) in panels of rows, which linear multiplies by at the speed of memory.

    It takes the memory that the matrix takes, and as long as both are kept, twice. Raises TypeError for anything else.
    """
    weight = _matrix_of("pack", weight)
    k, (n, inner), array = get_backend(weight.device), weight.shape, weight.array
    width, size = k.panel_width(weight.dtype), weight.dtype.itemsize
    panels = k.empty((-(-n // width), inner, width), weight.dtype)
    row, column = (stride // size for stride in array.data.strides)
    k.pack_weight(panels, array, n, inner, row, column)
    return PackedTensor(Tensor(panels, weight.device), n)


def _unpacked(panels: Tensor, n: int) -> Tensor:
    count, inner, width = panels.shape
    return reshape(permute_dims(panels, (0, 2, 1)), (count * width, inner))[:n]


@op("...i, pic, o -> ...o", types="float!", public=False, part_of="linear")
def packed_linear(k: Any, x: Array, panels: Array, bias: Array | None = None, n: int = 0) -> Array:
    """y = x Wᵀ + b for a W (n, i) in panels (p, i, c): the bits of linear."""
    x, bias = k.contiguous(x), bias if bias is None else k.contiguous(bias)
    y = k.empty((*x.shape[:-1], n), x.dtype)
    k.packed_linear(y, x, panels, bias, math.prod(x.shape[:-1]), n, x.shape[-1])
    return y


@packed_linear.kernel_vjp
def _(k: Any, g: Array, panels: Array, bias: Array | None, x_shape: tuple[int, ...], n: int,
      needs: tuple[bool, ...]) -> Any:
    weight = _unpacked(Tensor(panels, k.device), n).array
    return _gradients(k, g, weight, x_shape, bias is not None, needs)


@packed_linear.composition
@autocast("float32")  # as the kernel
def _(x: Tensor, panels: Tensor, bias: Tensor | None = None, n: int = 0) -> Tensor:
    return linear(x, _unpacked(panels, n), bias)


# ── weights of 16, 8 or 4 bits ────────────────────────────────────────────────────────────────────────

class QuantizedTensor(StoredMatrix):
    """A matrix (n, k), k a multiple of 32, of blocks of 32 weights in a row with a scale of their own, or of bfloat16.

    blocks: uint8 (n, k/32 · bytes of a block), in the very bytes of a GGUF file's tensor
    scheme: "q8_0", "q4_0", "q4_1" or "bf16" (equations: backend/stored_rows.py), whose blocks have 34, 18, 20, 64 bytes

    Raises TypeError or ValueError for anything else, and for a scale or minimum that is not finite.
    """

    __slots__ = ("scheme",)
    scheme: str

    def __init__(self, blocks: Tensor, scheme: str):
        size = _scheme("QuantizedTensor", scheme).bytes
        if not isinstance(blocks, Tensor) or blocks.dtype is not uint8 or blocks.ndim != 2 or blocks.shape[1] % size:
            got = f"{blocks.dtype} {blocks.shape}" if isinstance(blocks, Tensor) else type(blocks).__name__
            raise TypeError(f"QuantizedTensor: blocks is {got}, expected uint8 (n, a multiple of {size}) for {scheme}")
        n, steps = blocks.shape[0], blocks.shape[1] // size
        self.scheme, self.shape, self.dtype = scheme, (n, steps * BLOCK), float32
        k = get_backend(blocks.device)
        panels = k.empty((-(-n // BLOCK), steps, BLOCK * size), uint8)
        k.deal_blocks(panels, k.contiguous(blocks.array), SCHEMES[scheme].number)
        self.panels = Tensor(panels, blocks.device)
        self._check_finite()

    def _check_finite(self) -> None:
        """A float16 whose five bits of exponent are all set is infinite or NaN."""
        exponents = self.panels[..., 1:BLOCK * SCHEMES[self.scheme].header:2] & 0x7C
        if bool((exponents == 0x7C).any()):
            raise ValueError("QuantizedTensor: blocks hold a scale or minimum that is infinite or NaN, expected finite "
                             f"ones ({self!r})")

    @property
    def blocks(self) -> Tensor:
        """The bytes as a GGUF file has them, uint8 (n, k/32 · bytes of a block)."""
        k, (n, inner), scheme = get_backend(self.device), self.shape, SCHEMES[self.scheme]
        blocks = k.empty((n, inner // BLOCK * scheme.bytes), uint8)
        k.gather_blocks(blocks, self.panels.array, scheme.number)
        return Tensor(blocks, self.device)

    def rows(self, index: Any) -> Tensor:
        return Tensor(_dequantized(get_backend(self.device), self.panels.array, self._positions(index), self.scheme,
                                   float32), self.device)

    def tensor(self) -> Tensor:
        k = get_backend(self.device)
        return Tensor(_whole(k, self.panels.array, self.shape[0], self.scheme, float32), self.device)

    dequantize = tensor

    def _linear(self, x: Tensor, bias: Any) -> Tensor:
        return _run(quantized_linear, x, self.panels, bias, self.shape[0], self.scheme)

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.shape}, {self.scheme!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedTensor, (self.blocks, self.scheme)


def quantize(weight: Tensor, scheme: str = "q8_0") -> QuantizedTensor:
    """A matrix (n, k) in 16 ("bf16"), 8.5 ("q8_0"), 5 ("q4_1") or 4.5 bits ("q4_0") a weight, rounded as ggml does.

    Each weight w of a block becomes a number at most half a step d from it, apart from the rounding of d (and m) to
    float16: d = max |w|/127 for q8_0, max |w|/8 for q4_0 (a whole step where w/d rounds to 8, which is cut to 7) and
    (max w − min w)/15 for q4_1. bf16 is w rounded to bfloat16, at most 2⁻⁸ |w| from it.
    Raises ValueError for k that is not a multiple of 32, for weights that are infinite or NaN, and for scales beyond
    float16, 65504 (bf16: weights beyond bfloat16); TypeError for anything but a floating tensor (n, k).
    """
    weight, found = _matrix_of("quantize", weight), _scheme("quantize", scheme)
    n, inner = weight.shape
    if inner % BLOCK:
        raise ValueError(f"quantize: weight has shape {weight.shape}, expected rows of a multiple of {BLOCK} numbers")
    k = get_backend(weight.device)
    x = weight.detach().to(dtype=float32)
    blocks = k.empty((n, inner // BLOCK * found.bytes), uint8)
    k.quantize(blocks, k.contiguous(x.array), found.number)
    return QuantizedTensor(Tensor(blocks, weight.device), scheme)


def _scheme(name: str, scheme: str) -> Scheme:
    if scheme not in SCHEMES:
        raise ValueError(f"{name}: scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")
    return SCHEMES[scheme]


def _dequantized(k: Any, panels: Array, index: Array, scheme: str, dtype: DType) -> Array:
    """Rows index (...) of a quantised matrix, (..., k)."""
    y = k.empty((index.size, panels.shape[1] * BLOCK), dtype)
    k.dequantize(y, panels, index.seen_as(index.data.reshape(-1)), SCHEMES[scheme].number)
    return y.reshaped((*index.shape, y.shape[1]))


def _whole(k: Any, panels: Array, n: int, scheme: str, dtype: DType) -> Array:
    every = k.empty((n,), int64)
    k.arange(every, 0, 1)
    return _dequantized(k, panels, every, scheme, dtype)


@op("...i, pbj, o -> ...o", types="float!", fixed=("panels",), public=False, part_of="linear")
def quantized_linear(k: Any, x: Array, panels: Array, bias: Array | None = None, n: int = 0,
                     scheme: str = "q8_0") -> Array:
    """y = x Wᵀ + b for a W (n, i) of quantised blocks: the bits of linear on what the blocks stand for."""
    x, bias = k.contiguous(x), bias if bias is None else k.contiguous(bias)
    y = k.empty((*x.shape[:-1], n), x.dtype)
    k.quantized_linear(y, x, panels, bias, math.prod(x.shape[:-1]), n, x.shape[-1], SCHEMES[scheme].number)
    return y


@quantized_linear.kernel_vjp
def _(k: Any, g: Array, panels: Array, bias: Array | None, x_shape: tuple[int, ...], n: int, scheme: str,
      needs: tuple[bool, ...]) -> Any:
    return _gradients(k, g, _whole(k, panels, n, scheme, g.dtype), x_shape, bias is not None, needs)


@quantized_linear.composition
@autocast("float32")  # as the kernel
def _(x: Tensor, panels: Tensor, bias: Tensor | None = None, n: int = 0, scheme: str = "q8_0") -> Tensor:
    weight = _whole(get_backend(x.device), panels.array, n, scheme, x.dtype)
    return linear(x, Tensor(weight, x.device), bias)
