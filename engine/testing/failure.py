"""What a failed check says, and how it writes itself as Python that fails again."""

from __future__ import annotations

import base64
import inspect
import textwrap
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.testing.layouts import placement

Reproduction = str | Callable[[], str]
PRINTED = 100  # elements of an array that are printed as numbers; larger ones as compressed bytes


class CheckFailure(AssertionError):
    """A check that did not hold: which, where, what came, what was expected, how far off, and by what right.

    check:        the name of the check
    index:        the element that is furthest beyond its bound, None for a scalar
    got, want:    what came there and what was expected
    ulps:         their distance in units in the last place, where that means something
    bound:        what was allowed
    origin:       where the bound comes from
    reproduction: a few lines of Python that fail in the same way; given as text, or as a function that writes it. Of
                  a state machine (machine.py) it is the steps that Hypothesis prints.
    nodes:        how many ops those lines apply, where that is known
    """

    def __init__(self, check: str, *, index: Any = None, got: Any = None, want: Any = None, ulps: float | None = None,
                 bound: Any = None, origin: str = "", reproduction: Reproduction = "", nodes: int | None = None):
        self.check, self.index, self.got, self.want = check, index, got, want
        self.ulps, self.bound, self.origin = ulps, bound, origin
        self.reproduction = reproduction if isinstance(reproduction, str) else reproduction()
        self.nodes = nodes
        super().__init__(self._text())

    def with_reproduction(self, reproduction: str, nodes: int | None = None) -> CheckFailure:
        """The same failure with other lines that show it."""
        return CheckFailure(self.check, index=self.index, got=self.got, want=self.want, ulps=self.ulps,
                            bound=self.bound, origin=self.origin, reproduction=reproduction, nodes=nodes)

    def _text(self) -> str:
        at = "" if self.index is None else f" at {tuple(int(i) for i in self.index)}"
        text = f"{self.check}{at}: got {self.got!r}, want {self.want!r}"
        if self.ulps is not None:
            text += f", {self.ulps:.4g} ULP apart"
        if self.bound is not None:
            text += f"; allowed {self.bound}" + (f" ({self.origin})" if self.origin else "")
        return text + (f"\nreproduce:\n{self.reproduction}" if self.reproduction else "")


# ── as Python ─────────────────────────────────────────────────────────────────────────────────────────

def rendered(value: Any) -> str:
    """An expression that gives the value again: numbers to the bit, arrays in their memory layout, which is strides,
    alignment, and whether they may be written to.

    It takes the names array, dtype, inf, nan from numpy, and Case, placed, unpacked from engine.testing.
    """
    if isinstance(value, np.ndarray):
        return _rendered_array(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {rendered(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(rendered, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(f"{rendered(v)}, " for v in value) + ")"
    if type(value).__name__ == "Case":
        return f"Case({rendered(value.operands)}, {rendered(value.attributes)}, dtype({str(value.dtype)!r}))"
    return f"dtype({value.dtype.name!r}).type({value.item()!r})" if isinstance(value, np.generic) else repr(value)


def _rendered_array(x: np.ndarray) -> str:
    if x.size > PRINTED:
        packed = base64.b85encode(zlib.compress(x.tobytes())).decode()
        text = f"unpacked({packed!r}, {x.shape}, {x.dtype.name!r})"
    else:
        text = f"array({x.tolist()!r}, {x.dtype.name!r})" + (f".reshape{x.shape}" if not x.size else "")
    lies = "".join(f", {name}={value!r}" for name, value in placement(x).items())
    return f"placed({text}{lies})" if lies else text


def unpacked(packed: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The array that rendered() has packed into letters."""
    return np.frombuffer(zlib.decompress(base64.b85decode(packed)), dtype).reshape(shape).copy()


def defined(name: str, f: Callable[..., Any]) -> str:
    """Lines that define `name` as f: an import, its source where that is enough, or a line that says what lacks."""
    module, own = getattr(f, "__module__", None), getattr(f, "__qualname__", "")
    closed = getattr(f, "__closure__", None) is not None
    if module and module != "__main__" and own.isidentifier():
        return f"from {module} import {own} as {name}"
    if own and "<lambda>" not in own and not closed:
        try:
            return f"{textwrap.dedent(inspect.getsource(f)).rstrip()}\n{name} = {own.rpartition('.')[2]}"
        except (OSError, TypeError):
            pass
    return f"{name} = ...  # {own or f!r}, which cannot be printed"


def called(check: str, *values: Any, **options: Any) -> Callable[[], str]:
    """Writes a program that calls `check` again on these values, such as those of the one element that failed."""
    def program() -> str:
        words = [*map(rendered, values), *(f"{name}={rendered(value)}" for name, value in options.items())]
        return "\n".join(["from numpy import array, dtype, inf, nan",
                          f"from engine.testing import {check}, placed", f"{check}({', '.join(words)})"])
    return program


def reproduction(check: str, functions: dict[str, Callable[..., Any] | None], arrays: Any, first: str = "f",
                 **options: Any) -> Callable[[], str]:
    """Writes a program that calls `check` again: on the functions named in `first`, on xs, and, as keywords, on the
    other functions and the options."""
    return lambda: _program(check, functions, arrays, first, options)


def _program(check: str, functions: dict[str, Callable[..., Any] | None], arrays: Any, first: str,
             options: dict[str, Any]) -> str:
    given, leading = {name: f for name, f in functions.items() if f is not None}, first.split()
    words = [*leading, "*xs", *(f"{name}={name}" for name in given if name not in leading),
             *(f"{name}={rendered(value)}" for name, value in options.items())]
    lines = ["from __future__ import annotations", "import numpy as np", "import engine as eg",
             "from numpy import array, dtype, inf, nan",
             f"from engine.testing import {check}, placed, unpacked", *[defined(name, f) for name, f in given.items()],
             f"xs = {rendered(list(arrays))}"]
    return "\n".join([*lines, f"{check}({', '.join(words)})"])
