"""What a failed check says."""

from __future__ import annotations

from typing import Any


class CheckFailure(AssertionError):
    """A check that did not hold: which, where, what came, what was expected, how far off, and by what right.

    check:        the name of the check
    index:        the element that is furthest beyond its bound, None for a scalar
    got, want:    what came there and what was expected
    ulps:         their distance in units in the last place, where that means something
    bound:        what was allowed
    origin:       where the bound comes from
    reproduction: a few lines of Python that fail in the same way, where the check knows them
    """

    def __init__(self, check: str, *, index: Any = None, got: Any = None, want: Any = None, ulps: float | None = None,
                 bound: Any = None, origin: str = "", reproduction: str = ""):
        self.check, self.index, self.got, self.want = check, index, got, want
        self.ulps, self.bound, self.origin, self.reproduction = ulps, bound, origin, reproduction
        super().__init__(self._text())

    def with_reproduction(self, reproduction: str) -> CheckFailure:
        """The same failure with other lines that show it."""
        return CheckFailure(self.check, index=self.index, got=self.got, want=self.want, ulps=self.ulps,
                            bound=self.bound, origin=self.origin, reproduction=reproduction)

    def _text(self) -> str:
        at = "" if self.index is None else f" at {tuple(int(i) for i in self.index)}"
        text = f"{self.check}{at}: got {self.got!r}, want {self.want!r}"
        if self.ulps is not None:
            text += f", {self.ulps:.4g} ULP apart"
        if self.bound is not None:
            text += f"; allowed {self.bound}" + (f" ({self.origin})" if self.origin else "")
        return text + (f"\nreproduce:\n{self.reproduction}" if self.reproduction else "")
