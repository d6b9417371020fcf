"""Hypothesis strategies for arrays, tensors, programs and lives. Hypothesis is imported here and in machine.py only.

    from engine.testing import strategies as st_eg

    @given(st_eg.tensors(dtype="float32"))
    def test_exp(x): ...

Values come from a seed that Hypothesis draws, not element by element: an example of a thousand elements costs as much
as one of three, and what shrinks is what matters here, the shape, the layout, the attributes, and then the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine.backend import Array
from engine.testing.forms import FORMS
from engine.testing.layouts import FOREIGN, LAYOUTS, zero_stride
from engine.testing.machine import EngineMachine
from engine.testing.opspec import OpSpec
from engine.testing.programs import SHAPES, build
from engine.testing.row_checks import CHECKS, Make, RowCheck, some_case
from engine.testing.source import Source, special_values
from engine.testing.traces import FORMULAS, Change, Save, Trace, Update

__all__ = ["Drawn", "EngineMachine", "arrays", "broadcastable", "cases", "checks_of", "dtypes", "exact_tensors",
           "floats", "layouts", "optim_traces", "programs", "row_examples", "shapes", "tensors"]


class Drawn(Source):
    """A Source whose numbers Hypothesis draws: each shrinks towards its lower end."""

    def __init__(self, draw: Callable[[Any], Any], dtype: str = "float64", **options: Any):
        super().__init__(dtype, **options)
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return low if low == high else int(self._draw(_integers(low, high)))

    def axis(self, ndim: int) -> int:  # shrinks towards axis 0, not towards −ndim
        return self.choice([*range(ndim), *range(-ndim, 0)])


_known: dict[tuple[int, int], Any] = {}


def _integers(low: int, high: int) -> Any:
    """st.integers, made once for each range: making it costs more than drawing from it."""
    found = _known.get((low, high))
    if found is None:
        found = _known[low, high] = st.integers(low, high)
    return found


def dtypes(kinds: str = "f") -> Any:
    """The names of element types of the given kinds ("b", "i", "u", "f"); shrinks towards the first of its kind."""
    from engine.dtypes import ALL

    return st.sampled_from([t.name for kind in kinds for t in ALL if t.kind == kind])


def shapes(least: int = 0, most: int = 3, low: int = 0, largest_side: int = 6) -> Any:
    """Shapes of `least` to `most` axes; shrinks towards fewer and shorter axes."""
    @st.composite
    def draw_shape(draw: Any) -> tuple[int, ...]:
        return Drawn(draw, largest_side=largest_side).shape(least, most, low)
    return draw_shape()


def broadcastable(count: int, most: int = 3, largest_side: int = 6) -> Any:
    """Lists of `count` shapes that broadcast together; shrinks towards equal, small ones."""
    @st.composite
    def draw_shapes(draw: Any) -> list[tuple[int, ...]]:
        return Drawn(draw, largest_side=largest_side).broadcastable(count, most)
    return draw_shapes()


def floats(dtype: str = "float32", special: bool = True) -> Any:
    """Numbers that `dtype` holds. With `special` also ±0, subnormals, ±∞, NaN, the edges of exp, the neighbours of
    ± every power of two, and what makes reducing an argument hard (source.reduction_killers); shrinks towards 0."""
    width: Any = np.dtype(dtype).itemsize * 8
    plain = st.floats(-1e4, 1e4, width=width)
    if not special:
        return plain
    kind = np.finfo(dtype)
    power = st.integers(kind.minexp - kind.nmant, kind.maxexp - 1).map(lambda e: np.ldexp(np.dtype(dtype).type(1), e))
    near_power = st.builds(lambda p, to, sign: float(sign * np.nextafter(p, p.dtype.type(to))), power,
                           st.sampled_from([0.0, np.inf]), st.sampled_from([1, -1]))
    return plain | st.sampled_from(special_values(np.dtype(dtype)).tolist()) | near_power


def layouts(walkable: bool = True, equal: bool = True) -> Any:
    """Functions (array, generator) -> an equal array that lies otherwise in memory: in F order, permuted, backwards,
    with gaps, at an offset, read-only. Unless `walkable` also misaligned, or with a stride of no whole elements. Unless
    `equal` also with an axis of stride 0, which repeats its first slice: the others' values are lost. Shrinks towards
    C order."""
    foreign, repeating = [] if walkable else FOREIGN.values(), [] if equal else [zero_stride]
    return st.sampled_from([*LAYOUTS.values(), *foreign, *repeating])


def arrays(dtype: str = "float32", shape: tuple[int, ...] | None = None, *, low: float = -4.0, high: float = 4.0,
           special: bool = False, arrange: bool = True) -> Any:
    """NumPy arrays of floats in any layout, one axis perhaps of stride 0; shrinks towards small ones in C order."""
    @st.composite
    def draw_array(draw: Any) -> np.ndarray:
        source = Drawn(draw, dtype, special=special, arrange=arrange)
        return source.array(source.shape() if shape is None else shape, low, high)
    return draw_array()


def tensors(dtype: str = "float32", shape: tuple[int, ...] | None = None, *, requires_grad: bool = False,
            device: str = "cpu", **options: Any) -> Any:
    """Tensors over such arrays, in their layout; shrinks as they do."""
    def make(x: np.ndarray) -> eg.Tensor:
        out = eg.Tensor(Array(x), device)
        return out.requires_grad_(requires_grad)
    return arrays(dtype, shape, **options).map(make)


def exact_tensors(dtype: str = "float32", shape: tuple[int, ...] | None = None) -> Any:
    """Tensors of small whole numbers: sums and products of a few hundred of them are exact in any order. Shrinks
    towards small ones in C order."""
    @st.composite
    def draw_tensor(draw: Any) -> eg.Tensor:
        source = Drawn(draw, dtype, arrange=True)
        whole = source.whole(source.shape() if shape is None else shape, -8, 8, dtype)
        return eg.Tensor(Array(whole), "cpu")
    return draw_tensor()


def programs(ops: Sequence[str] | None = None, max_nodes: int = 12) -> Any:
    """Random programs (programs.py) of the named forms; shrinks towards one short input and few instructions, those
    early in the list of forms, on the newest values."""
    forms = list(FORMS) if ops is None else list(ops)
    unknown = [name for name in forms if name not in FORMS]
    if unknown:
        raise ValueError(f"programs: there is no form {unknown[0]!r}, expected some of {', '.join(FORMS)}")
    pick = _integers(0, 5)
    inputs = st.tuples(_integers(0, len(SHAPES) - 1), _integers(0, 49), st.sampled_from([True, True, False]))
    steps = st.tuples(_integers(0, len(forms) + 3), pick, pick, pick)  # the last numbers make checkpoints
    return st.builds(build, st.tuples(_integers(1, 4), _integers(1, 4)), st.lists(inputs, min_size=1, max_size=4),
                     st.lists(steps, max_size=max_nodes), st.just(tuple(forms)))


@st.composite
def optim_traces(draw: Any, optimizers: Sequence[str] = tuple(FORMULAS), max_events: int = 8) -> Trace:
    """Traces of an optimizer (traces.py): updates with and without gradients, changed rates, clipping, saved and loaded
    state, in one group or two. Shrinks towards SGD on one number, and few updates."""
    name = draw(st.sampled_from(list(optimizers)))
    shapes = draw(st.lists(st.sampled_from([(), (2,), (3, 5), (17,)]), min_size=1, max_size=3))
    hyper = {"lr": draw(RATES), **{key: draw(value) for key, value in HYPER[name].items()}}
    if hyper.get("nesterov"):
        hyper.update(dampening=0.0, momentum=hyper["momentum"] or 0.5)
    second = draw(st.none() | RATES)
    second = second if len(shapes) > 1 else None
    seeds = st.tuples(*[st.sampled_from([7, 8, 9, None])] * 3).map(lambda drawn: drawn[:len(shapes)])
    groups = 1 if second is None else 2
    events = st.builds(Update, seeds, st.sampled_from([None, None, 0.5])) | st.just(Save()) | st.builds(
        Change, _integers(0, groups - 1), st.sampled_from(["lr", "weight_decay"]), RATES)
    return Trace(name, hyper, tuple(shapes), tuple(draw(st.lists(events, max_size=max_events))), second)


def _sources(draw: Any) -> Make:
    return lambda dtype="float64", **options: Drawn(draw, dtype, **options)


@st.composite
def _row_examples(draw: Any, check: RowCheck, spec: OpSpec) -> Any:
    return check.draw(spec, _sources(draw))


def row_examples(check: str | RowCheck, spec: OpSpec) -> Any:
    """The arguments of one check of a row (row_checks.py): CHECKS[check].run(spec, drawn). Shrinks as its cases do."""
    found = CHECKS[check] if isinstance(check, str) else check
    return _row_examples(found, spec).filter(lambda drawn: drawn is not None)


def checks_of(spec: OpSpec) -> list[Callable[[], None]]:
    """Every check that a row has, as a function without arguments that draws examples and shrinks what fails:

        @pytest.mark.parametrize("check", checks_of(my_row), ids=lambda check: check.__name__)
        def test_my_op(check):
            check()
    """
    def made(check: RowCheck) -> Callable[[], None]:
        def run(drawn: Any) -> None:
            check.run(spec, drawn)
        test = given(row_examples(check, spec))(run)
        test.__name__ = f"{spec.name}: {check.name}"
        return test
    return [made(check) for check in CHECKS.values() if check.applies(spec)]


RATES = st.sampled_from([0.125, 0.01, 0.5, 1e-3])
_DECAY, _EPS = st.sampled_from([0.0, 0.1]), st.sampled_from([1e-8, 1e-2])
_BETA = st.sampled_from([0.5, 0.0, 0.9, 0.999])
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"weight_decay": _DECAY, "momentum": st.sampled_from([0.0, 0.5, 0.9]), "nesterov": st.booleans(),
            "dampening": st.sampled_from([0.0, 0.25])},
    "Adam": {"weight_decay": _DECAY, "beta1": _BETA, "beta2": _BETA, "eps": _EPS},
    "AdamW": {"weight_decay": _DECAY, "beta1": _BETA, "beta2": _BETA, "eps": _EPS},
    "Adagrad": {"weight_decay": _DECAY, "lr_decay": st.sampled_from([0.0, 0.1]), "eps": _EPS},
    "RMSprop": {"weight_decay": _DECAY, "alpha": _BETA, "eps": _EPS, "momentum": st.sampled_from([0.0, 0.9])},
}
"""What each optimizer's hyper-parameters are drawn from."""


def cases(spec: Any, dtype: str | None = None, **options: Any) -> Any:
    """Examples of an op (opspec.Case), drawn as its row says; dtype None draws float32 or float64. Shrinks towards
    float32 and what the row draws first: small shapes, default attributes, C order."""
    @st.composite
    def draw_case(draw: Any) -> Any:
        return some_case(spec, _sources(draw), dtype, **options)
    return draw_case()
