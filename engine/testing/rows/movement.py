"""Rows of the ops that move elements: exact, and their gradients move the cotangent's elements back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import engine as eg
from engine.testing import formulas, rounded
from engine.testing.opspec import Drawing, ErrorCase, OpSpec, register
from engine.testing.source import Source

Draw = tuple[list[Any], dict[str, Any]]


def moving(name: str, draw: Drawing, reference: Callable[..., Any] | None = None, view: bool = True,
           **row: Any) -> OpSpec:
    return register(OpSpec(name, draw, reference=reference, view=view, linear=(0,), special=True, **row))


def operand(attributes: Callable[[Source, np.ndarray], dict[str, Any]], least: int = 0, low: int = 0) -> Drawing:
    """One operand, and attributes that depend on it."""
    def draw(s: Source) -> Draw:
        x = s.array(s.shape(least, low=low))
        return [x], attributes(s, x)
    return draw


def _new_shape(s: Source, x: np.ndarray) -> dict[str, Any]:
    """A shape of the same size: axes merged or cut in two, perhaps with −1."""
    sizes: list[int] = []
    rest = x.size
    for _ in range(s.integer(0, 2)):
        divisors = [d for d in range(1, rest + 1) if rest % d == 0] or [1]
        sizes.append(s.choice(divisors))
        rest //= sizes[-1]
    sizes.append(-1 if rest and x.size and s.boolean() else rest)
    return {"shape": tuple(sizes) if x.size else x.shape[::-1]}


def _order(s: Source, ndim: int) -> tuple[int, ...]:
    left = list(range(ndim))
    return tuple(left.pop(s.integer(0, len(left) - 1)) for _ in range(ndim))


def _wider(s: Source, x: np.ndarray) -> dict[str, Any]:
    grown = tuple(s.side(1) if n == 1 and s.boolean() else n for n in x.shape)
    return {"shape": (*[s.side(1) for _ in range(s.integer(0, 2))], *grown)}


def _broadcastable(s: Source) -> Draw:
    x = s.array(tuple(s.choice([1, 2, 3]) for _ in range(s.integer(0, 3))))
    return [x], _wider(s, x)


moving("reshape", operand(_new_shape), errors=(
    ErrorCase(lambda: eg.reshape(eg.zeros(2, 3), (4, -1)), ValueError, ("reshape", "(2, 3)", "(4, -1)")),
    ErrorCase(lambda: eg.reshape(eg.zeros(2, 3), (7,)), ValueError, ("reshape", "6 elements", "(7,)")),
    ErrorCase(lambda: eg.reshape(eg.zeros(2), (1.5,)), TypeError, ("reshape", "1.5"))))
moving("permute_dims", operand(lambda s, x: {"axes": _order(s, x.ndim)}), errors=(
    ErrorCase(lambda: eg.permute_dims(eg.zeros(2, 3), (0, 0)), ValueError, ("permute_dims", "(0, 0)")),
    ErrorCase(lambda: eg.permute_dims(eg.zeros(2, 3), (0, 2)), IndexError, ("permute_dims", "2", "[-2, 2)"))))
moving("broadcast_to", _broadcastable, errors=(
    ErrorCase(lambda: eg.broadcast_to(eg.zeros(2, 3), (3, 2)), ValueError, ("broadcast_to", "(2, 3)", "(3, 2)")),))
moving("flip", operand(lambda s, x: {"axis": s.axes(x.ndim)}), errors=(
    ErrorCase(lambda: eg.flip(eg.zeros(2), 1), IndexError, ("flip", "[-1, 1)")),))
moving("expand_dims", operand(lambda s, x: {"axis": s.integer(-x.ndim - 1, x.ndim)}), errors=(
    ErrorCase(lambda: eg.expand_dims(eg.zeros(2), 3), IndexError, ("expand_dims", "3")),))


def _squeezable(s: Source) -> Draw:
    x = s.array(tuple(s.choice([1, 2, 3]) for _ in range(s.integer(0, 3))))
    ones = tuple(i for i, n in enumerate(x.shape) if n == 1)
    return [x], {"axis": s.choice([None, ones, ones[:1]])}


moving("squeeze", _squeezable, errors=(
    ErrorCase(lambda: eg.squeeze(eg.zeros(2, 1), 0), ValueError, ("squeeze", "axis 0", "(2, 1)")),))
moving("matrix_transpose", operand(lambda s, x: {}, least=2), errors=(
    ErrorCase(lambda: eg.matrix_transpose(eg.zeros(2)), ValueError, ("matrix_transpose", "(2,)", "2 axes")),))
moving("moveaxis", operand(lambda s, x: {"source": s.axis(x.ndim), "destination": s.axis(x.ndim)}, least=1), errors=(
    ErrorCase(lambda: eg.moveaxis(eg.zeros(2), 1, 0), IndexError, ("moveaxis", "1")),
    ErrorCase(lambda: eg.moveaxis(eg.zeros(2, 2), (0, 0), (0, 1)), ValueError, ("moveaxis", "(0, 0)", "(0, 1)"))))
moving("moveaxis: several", operand(lambda s, x: {"source": _order(s, x.ndim)[:2],
                                                  "destination": _order(s, x.ndim)[:2]}, least=2))
moving("swapaxes", operand(lambda s, x: {"a": s.axis(x.ndim), "b": s.axis(x.ndim)}, least=1),
       lambda x, a, b: np.swapaxes(x, a, b), errors=(
    ErrorCase(lambda: eg.swapaxes(eg.zeros(2), 0, -2), IndexError, ("swapaxes", "-2")),))
moving("flatten", operand(lambda s, x: {}))


def _cut(s: Source, x: np.ndarray) -> dict[str, Any]:
    axis = s.axis(x.ndim)
    n = x.shape[axis]
    first = s.integer(0, n)
    equal = next((d for d in (3, 2) if n and n % d == 0), 1)
    return {"sections": s.choice([equal, (first, n - first)]), "axis": axis}


def _pieces(x: np.ndarray, sections: Any, axis: int) -> np.ndarray:
    """What split gives, end to end."""
    cuts = sections if isinstance(sections, int) else list(np.cumsum(sections)[:-1])
    return np.concatenate([p.reshape(-1) for p in np.split(x, cuts, axis)])


def _split(x: Any, sections: Any, axis: int) -> Any:
    parts: Any = eg.split(x, sections, axis)
    return eg.concat([p.reshape(-1) for p in parts])


def _repeats(s: Source, x: np.ndarray) -> dict[str, Any]:
    axis = s.choice([None, s.axis(x.ndim)])
    return {"repeats": s.generator().integers(0, 4, x.size if axis is None else x.shape[axis]), "axis": axis}


moving("unstack", operand(lambda s, x: {"axis": s.axis(x.ndim)}, least=1, low=1),
       lambda x, axis: np.moveaxis(x, axis, 0), view=False, call=lambda x, axis: eg.stack(eg.unstack(x, axis)))
moving("split", operand(_cut, least=1), _pieces, view=False, call=_split, errors=(
    ErrorCase(lambda: eg.split(eg.zeros(5), 2), ValueError, ("split", "5", "2")),
    ErrorCase(lambda: eg.split(eg.zeros(5), (2, 2)), ValueError, ("split", "[2, 2]", "5"))))
moving("repeat", operand(lambda s, x: {"repeats": s.integer(0, 3), "axis": s.axis(x.ndim)}, least=1),
       lambda x, repeats, axis: np.repeat(x, repeats, axis), view=True)
moving("repeat: one number an element", operand(_repeats, least=1), errors=(
    ErrorCase(lambda: eg.repeat(eg.zeros(3), eg.tensor([1, 2])), ValueError, ("repeat", "(2,)", "3")),))
moving("roll", operand(lambda s, x: {"shift": s.integer(-7, 7),
                                     "axis": s.axis(x.ndim) if x.ndim and s.boolean() else None}), errors=(
    ErrorCase(lambda: eg.roll(eg.zeros(2, 2), (1, 2)), ValueError, ("roll", "(1, 2)")),
    ErrorCase(lambda: eg.roll(eg.zeros(2, 2), (1, 2), 0), ValueError, ("roll", "(1, 2)"))))
moving("tile", operand(lambda s, x: {"repetitions": tuple(s.integer(0, 2) for _ in range(s.integer(1, 3)))}),
       lambda x, repetitions: np.tile(x, repetitions))
moving("pad", operand(lambda s, x: {"widths": [(s.integer(0, 2), s.integer(0, 2)) for _ in x.shape],
                                    "value": s.choice([0.0, 1.5])}),
       lambda x, widths, value: np.pad(x, widths, constant_values=value) if x.ndim else x, view=False, errors=(
    ErrorCase(lambda: eg.pad(eg.zeros(2), [(1, -1)]), ValueError, ("pad", "(1, -1)", "(2,)")),
    ErrorCase(lambda: eg.pad(eg.zeros(2, 2), [(1, 1)]), ValueError, ("pad", "(2, 2)"))))
moving("tril", operand(lambda s, x: {"k": s.integer(-2, 2)}, least=2), view=False)
moving("triu", operand(lambda s, x: {"k": s.integer(-2, 2)}, least=2), view=False)


def _several(s: Source) -> Draw:
    """One to three arrays that differ along one axis only."""
    shape = s.shape(1)
    axis = s.axis(len(shape))
    shapes = []
    for _ in range(s.integer(1, 3)):
        own = list(shape)
        own[axis] = s.side()
        shapes.append(tuple(own))
    return [[s.array(own) for own in shapes]], {"axis": axis}


def _alike(s: Source) -> Draw:
    shape = s.shape()
    return [[s.array(shape) for _ in range(s.integer(1, 3))]], {"axis": s.integer(-len(shape) - 1, len(shape))}


moving("concat", _several, view=False, errors=(
    ErrorCase(lambda: eg.concat([]), ValueError, ("concat", "no tensors")),
    ErrorCase(lambda: eg.concat(eg.zeros(2)), TypeError, ("concat", "list or tuple")),
    ErrorCase(lambda: eg.concat([eg.zeros(2, 3), eg.zeros(2, 4)]), ValueError,
              ("concat", "tensor 1", "(2, 4)", "(2, 3)")),
    ErrorCase(lambda: eg.concat([eg.tensor(1.0)]), ValueError, ("concat", "0-d"))))
moving("stack", _alike, lambda arrays, axis: np.stack(arrays, axis), view=False, errors=(
    ErrorCase(lambda: eg.stack([eg.zeros(2), eg.zeros(3)]), ValueError, ("concat", "tensor 1")),))



def _vectors(s: Source) -> Draw:
    return [[s.array((s.side(),)) for _ in range(s.integer(1, 3))]], {"indexing": s.choice(["xy", "ij"])}


def _together(s: Source) -> Draw:
    return [[s.array(shape) for shape in s.broadcastable(s.integer(1, 3))]], {}


moving("meshgrid", _vectors, lambda xs, indexing: np.stack(np.meshgrid(*xs, indexing=indexing)), view=False,
       call=lambda xs, indexing: eg.stack(eg.meshgrid(*xs, indexing=indexing)), errors=(
    ErrorCase(lambda: eg.meshgrid(eg.zeros(2, 2)), ValueError, ("meshgrid", "(2, 2)")),
    ErrorCase(lambda: eg.meshgrid(eg.zeros(2), indexing="yx"), ValueError, ("meshgrid", "'yx'"))))
moving("broadcast_arrays", _together, lambda xs: np.stack(np.broadcast_arrays(*xs)), view=False,
       call=lambda xs: eg.stack(eg.broadcast_arrays(*xs)), errors=(
    ErrorCase(lambda: eg.broadcast_arrays(eg.zeros(2), eg.zeros(3)), ValueError, ("broadcast_arrays", "(3,)")),))

register(OpSpec("astype", lambda s: ([s.array(s.shape(), special=False)],
                                     {"dtype": s.choice(["float64", "float32", "int32"])}), wrt=(), view=True,
                reference=lambda x, dtype: x.astype(dtype), errors=(
    ErrorCase(lambda: eg.astype(eg.zeros(2), "float31"), TypeError, ("dtype", "'float31'", "float32")),)))
register(OpSpec("astype: float64", lambda s: ([s.array(s.shape())], {"dtype": "float64"}), linear=(0,), view=True,
                special=True, reference=lambda x, dtype: x))


def _dropout(s: Source) -> Draw:
    return [s.array(s.shape(), special=False)], {"p": s.choice([0.0, 0.25, 0.9, 1.0]), "seed": s.integer(0, 9),
                                                 "dtype": str(s.dtype)}


def _dropout_formula(x: Any, p: float, seed: int, dtype: str) -> Any:
    scale = formulas.dropout_scale(x.shape, p, seed, dtype)
    return rounded.where(scale != 0, x * scale, 0.0)  # what is dropped is +0, not 0 x


register(OpSpec("dropout", _dropout, linear=(0,), view=True, formula=_dropout_formula,
                call=lambda x, p, seed, dtype: eg.dropout(x, p, eg.Generator(seed)), errors=(
    ErrorCase(lambda: eg.dropout(eg.zeros(2), 1.5), ValueError, ("dropout", "1.5", "[0, 1]")),)))
