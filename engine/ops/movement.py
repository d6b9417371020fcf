"""Movement ops: the same elements under another shape. Most are views: no element is touched, memory is shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.backend import Array, broadcast_shapes
from engine.ops.registry import attach, axes_tuple, axis_index, composite, op
from engine.tensor import Tensor

Shape = int | Sequence[int]


def _shape_tuple(name: str, shape: Shape) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if not all(isinstance(n, (int, np.integer)) for n in sizes):
        raise TypeError(f"{name}: shape is {shape!r}, expected whole numbers")
    return tuple(int(n) for n in sizes)


@op("... -> ...", reference=np.reshape, types="any")
def reshape(k: Any, x: Array, shape: Shape) -> Array:
    """The elements in the same order under another shape; one length may be −1. A view if x is contiguous."""
    new = _shape_tuple("reshape", shape)
    known = math.prod(n for n in new if n != -1)
    if -1 in new and new.count(-1) == 1 and known and x.size % known == 0:
        new = tuple(x.size // known if n == -1 else n for n in new)
    if math.prod(new) != x.size or any(n < 0 for n in new):
        raise ValueError(f"reshape: x has shape {x.shape} ({x.size} elements), which does not fit {tuple(new)}")
    if not x.data.flags.c_contiguous:
        return k.contiguous(x).reshaped(new)
    return x.reshaped(new)


@reshape.vjp
def _(g: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    return reshape(g, x_shape)


@op("... -> ...", reference=np.transpose, types="any", method="permute_dims")
def permute_dims(k: Any, x: Array, axes: Sequence[int]) -> Array:
    """Axis i of the result is axis axes[i] of x. A view."""
    order = tuple(axis_index("permute_dims", a, x.data.ndim) for a in axes)
    if sorted(order) != list(range(x.data.ndim)):
        raise ValueError(f"permute_dims: axes are {tuple(axes)}, expected each of the {x.data.ndim} axes of x once")
    return x.turned(x.data.transpose(order))


@permute_dims.vjp
def _(g: Tensor, axes: Sequence[int]) -> Tensor:
    ndim = len(axes)
    back = sorted(range(ndim), key=lambda i: axes[i] % ndim)
    return permute_dims(g, back)


@op("... -> ...", reference=np.broadcast_to, types="any", method="broadcast_to")
def broadcast_to(k: Any, x: Array, shape: Shape) -> Array:
    """x repeated along axes of length 1, and along new leading axes, to `shape`. A view."""
    new = _shape_tuple("broadcast_to", shape)
    try:
        return x.turned(np.broadcast_to(x.data, new))
    except ValueError:
        raise ValueError(f"broadcast_to: x has shape {x.shape}, which does not broadcast to {new}") from None


@broadcast_to.vjp
def _(g: Tensor) -> Tensor:
    return g  # the walk sums it back (autograd._fit)


@op("... -> ...", reference=np.flip, types="any", method="flip")
def flip(k: Any, x: Array, axis: int | Sequence[int] | None = None) -> Array:
    """x backwards along `axis` (None: every axis). A view."""
    return x.view(np.flip(x.data, axes_tuple("flip", axis, x.data.ndim)))


@flip.vjp
def _(g: Tensor, axis: Any) -> Tensor:
    return flip(g, axis)


@op("*... -> ...", reference=lambda arrays, axis=0: np.concatenate(arrays, axis))
def concat(k: Any, arrays: Sequence[Array], axis: int = 0) -> Array:
    """The tensors one after the other along `axis`."""
    if not arrays:
        raise ValueError("concat: got no tensors, expected at least one")
    shape = arrays[0].shape
    if not shape:
        raise ValueError("concat: tensor 0 is 0-d, expected at least one axis; stack joins 0-d tensors")
    at = axis_index("concat", axis, len(shape))
    for i, x in enumerate(arrays):
        if len(x.shape) != len(shape) or x.shape[:at] + x.shape[at + 1:] != shape[:at] + shape[at + 1:]:
            raise ValueError(f"concat: tensor {i} has shape {x.shape}, expected {shape} but for axis {at}")
    y = k.empty((*shape[:at], sum(x.shape[at] for x in arrays), *shape[at + 1:]), arrays[0].dtype)
    start = 0
    for x in arrays:
        piece = y.data[(slice(None),) * at + (slice(start, start + x.shape[at]),)]
        target = Array(piece, y.dtype, None, y.storage)
        k.copy(target, x, k.layout(target, x))
        start += x.shape[at]
    return y


@concat.vjp
def _(g: Tensor, arrays_shapes: Sequence[tuple[int, ...]], axis: int) -> list[Tensor]:
    at = axis % g.ndim
    pieces, start = [], 0
    for shape in arrays_shapes:
        pieces.append(g[(slice(None),) * at + (slice(start, start + shape[at]),)])
        start += shape[at]
    return pieces


@composite("... -> ...", reference=np.expand_dims, method="expand_dims")
def expand_dims(x: Tensor, axis: int | Sequence[int] = 0) -> Tensor:
    """x with an axis of length 1 inserted at `axis` of the result. A view."""
    several = axis if isinstance(axis, (tuple, list)) else (axis,)
    ndim = x.ndim + len(several)
    axes = axes_tuple("expand_dims", several, ndim)
    lengths = iter(x.shape)
    return reshape_view(x, tuple(1 if i in axes else next(lengths) for i in range(ndim)))


@composite("... -> ...", reference=np.squeeze, method="squeeze")
def squeeze(x: Tensor, axis: int | Sequence[int] | None = None) -> Tensor:
    """x without the axes of length 1 named by `axis` (None: all of them). A view."""
    axes = tuple(i for i, n in enumerate(x.shape) if n == 1) if axis is None else axes_tuple("squeeze", axis, x.ndim)
    for i in axes:
        if x.shape[i] != 1:
            raise ValueError(f"squeeze: axis {i} of shape {x.shape} has length {x.shape[i]}, expected 1")
    return reshape_view(x, tuple(n for i, n in enumerate(x.shape) if i not in axes))


@op("... -> ...", types="any", public=False)
def reshape_view(k: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """A reshape that only adds or drops axes of length 1: a view whatever the strides."""
    return x.turned(x.data.reshape(shape))


@reshape_view.vjp
def _(g: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    return reshape_view(g, x_shape)


@composite("...ij -> ...ji", reference=lambda x: np.swapaxes(x, -1, -2))
def matrix_transpose(x: Tensor) -> Tensor:
    """The last two axes swapped. A view."""
    if x.ndim < 2:
        raise ValueError(f"matrix_transpose: x has shape {x.shape}, expected at least 2 axes")
    return permute_dims(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


@composite("... -> ...", reference=np.moveaxis)
def moveaxis(x: Tensor, source: int | Sequence[int], destination: int | Sequence[int]) -> Tensor:
    """Axis source[i] moved to place destination[i], the others in their order. A view."""
    moved, places = ([axis_index("moveaxis", a, x.ndim) for a in (axes if isinstance(axes, (tuple, list)) else (axes,))]
                     for axes in (source, destination))
    if len(moved) != len(places) or len(set(moved)) != len(moved) or len(set(places)) != len(places):
        raise ValueError(f"moveaxis: source is {source!r} and destination {destination!r}, expected as many different "
                         "axes in both")
    order = [i for i in range(x.ndim) if i not in moved]
    for place, axis in sorted(zip(places, moved)):
        order.insert(place, axis)
    return permute_dims(x, order)


@composite("... -> ...", method="swapaxes")
def swapaxes(x: Tensor, a: int, b: int) -> Tensor:
    """Two axes exchanged. A view."""
    order = list(range(x.ndim))
    a, b = axis_index("swapaxes", a, x.ndim), axis_index("swapaxes", b, x.ndim)
    order[a], order[b] = order[b], order[a]
    return permute_dims(x, order)


@composite("... -> ...", reference=lambda x: x.reshape(-1), method="flatten")
def flatten(x: Tensor) -> Tensor:
    """All elements along one axis."""
    return reshape(x, (-1,))


@composite("*... -> ...", reference=np.stack)
def stack(arrays: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    return concat([expand_dims(x, axis) for x in arrays], axis)


@composite("... -> ...")
def unstack(x: Tensor, axis: int = 0) -> Any:
    """The slices of x along `axis`, without that axis: a tuple of views, which stack joins again."""
    at = axis_index("unstack", axis, x.ndim)
    return tuple(x[(slice(None),) * at + (i,)] for i in range(x.shape[at]))


@composite("... -> ...")
def broadcast_arrays(*arrays: Tensor) -> Any:
    """The tensors broadcast together: a tuple of views of one shape."""
    shape = broadcast_shapes("broadcast_arrays", *[x.shape for x in arrays]) if arrays else ()
    return tuple(broadcast_to(x, shape) for x in arrays)


@composite("... -> ...")
def meshgrid(*arrays: Tensor, indexing: str = "xy") -> Any:
    """The coordinates of a grid from those along its axes: tensor i varies along axis i ("ij"), as views of one shape.

    "xy": the first two axes exchanged, as in pictures. Raises ValueError unless all have one axis.
    """
    if indexing not in ("xy", "ij"):
        raise ValueError(f"meshgrid: indexing is {indexing!r}, expected 'xy' or 'ij'")
    axes = list(range(len(arrays)))
    if indexing == "xy" and len(arrays) > 1:
        axes[:2] = 1, 0
    for i, x in enumerate(arrays):
        if x.ndim != 1:
            raise ValueError(f"meshgrid: tensor {i} has shape {x.shape}, expected one axis")
    return broadcast_arrays(*[reshape_view(x, tuple(-1 if i == at else 1 for i in range(len(arrays))))
                              for at, x in zip(axes, arrays)])


@composite("... -> ...", method="split")
def split(x: Tensor, sections: int | Sequence[int], axis: int = 0) -> Any:
    """x cut along `axis` into `sections` equal parts, or into parts of the given lengths: a tuple of views."""
    at = axis_index("split", axis, x.ndim)
    length = x.shape[at]
    if isinstance(sections, int):
        if sections < 1 or length % sections:
            raise ValueError(f"split: axis {at} of length {length} does not divide into {sections} equal parts")
        sections = [length // sections] * sections
    if sum(sections) != length:
        raise ValueError(f"split: parts {list(sections)} add up to {sum(sections)}, expected {length}, axis {at}")
    parts, start = [], 0
    for n in sections:
        parts.append(x[(slice(None),) * at + (slice(start, start + n),)])
        start += n
    return tuple(parts)


@composite("... -> ...", reference=lambda x, repeats, axis=None: np.repeat(x, repeats, axis))
def repeat(x: Tensor, repeats: Any, axis: int | None = None) -> Tensor:
    """Each element `repeats` times in a row along `axis` (None: of the flattened x); one number, or one an element."""
    if axis is None:
        return repeat(flatten(x), repeats, 0)
    at = axis_index("repeat", axis, x.ndim)
    counts = np.asarray(repeats)
    if counts.size != 1:
        if counts.shape != (x.shape[at],):
            raise ValueError(f"repeat: repeats has shape {counts.shape}, expected one number or {x.shape[at]}, the "
                             f"length of axis {at}")
        return x[(slice(None),) * at + (np.repeat(np.arange(x.shape[at]), counts),)]
    times = int(counts.item())
    wide = expand_dims(x, at + 1).broadcast_to((*x.shape[:at + 1], times, *x.shape[at + 1:]))
    return reshape(wide, (*x.shape[:at], x.shape[at] * times, *x.shape[at + 1:]))


@composite("... -> ...", reference=np.roll)
def roll(x: Tensor, shift: int | Sequence[int], axis: int | Sequence[int] | None = None) -> Tensor:
    """x moved by `shift` along `axis`, what leaves one end entering at the other (axis None: in the flattened x)."""
    if axis is None:
        if not isinstance(shift, (int, np.integer)):
            raise ValueError(f"roll: shift is {shift!r}, expected one whole number where axis is None")
        return reshape(roll(flatten(x), shift, 0), x.shape)
    shifts = (shift,) if isinstance(shift, (int, np.integer)) else tuple(shift)
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    if len(shifts) != len(axes):
        raise ValueError(f"roll: shift is {shift!r} and axis {axis!r}, expected as many of both")
    for by, over in zip(shifts, axes):
        at = axis_index("roll", over, x.ndim)
        n = x.shape[at]
        if n and by % n:
            before = (slice(None),) * at
            cut = n - by % n
            x = concat([x[before + (slice(cut, n),)], x[before + (slice(0, cut),)]], at)
    return x


@composite("... -> ...")
def tile(x: Tensor, repetitions: Sequence[int]) -> Tensor:
    """x repeated repetitions[i] times along axis i; missing leading axes of either count as 1."""
    ndim = max(x.ndim, len(repetitions))
    shape = (1,) * (ndim - x.ndim) + x.shape
    counts = (1,) * (ndim - len(repetitions)) + tuple(repetitions)
    pairs = reshape(x, [length for n in shape for length in (1, n)])
    wide = broadcast_to(pairs, [length for r, n in zip(counts, shape) for length in (r, n)])
    return reshape(wide, tuple(r * n for r, n in zip(counts, shape)))


@op("... -> ...", types="any", reference=lambda x, widths, value=0.0: np.pad(x, widths, constant_values=value))
def pad(k: Any, x: Array, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Array:
    """x with widths[i] = (before, after) elements of `value` added to axis i."""
    if len(widths) != x.data.ndim or any(n < 0 for pair in widths for n in pair):
        raise ValueError(f"pad: widths are {widths!r}, expected a pair of whole numbers for each axis of x {x.shape}")
    y = k.full(tuple(b + n + a for n, (b, a) in zip(x.shape, widths)), value, x.dtype)
    inside = tuple(slice(b, b + n) for n, (b, _) in zip(x.shape, widths))
    target = Array(y.data[inside] if inside else y.data, y.dtype, None, y.storage)
    k.copy(target, x, k.layout(target, x))
    return y


@pad.vjp
def _(g: Tensor, x_shape: tuple[int, ...], widths: Sequence[tuple[int, int]]) -> Tensor:
    return g[tuple(slice(b, b + n) for n, (b, _) in zip(x_shape, widths))]


def _reshape_method(self: Tensor, *shape: Any) -> Tensor:
    return reshape(self, shape[0] if len(shape) == 1 else shape)


attach("reshape", _reshape_method)
attach("mT", property(matrix_transpose))
attach("T", property(lambda self: permute_dims(self, tuple(reversed(range(self.ndim))))))
