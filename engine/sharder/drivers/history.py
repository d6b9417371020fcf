"""What happened in a simulated run: the committed clocks, every event, and how often each fault struck."""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import numpy as np

from engine.backend import Array
from engine.sharder.events import Address, Committed
from engine.sharder.messages import Push, Reduced
from engine.sharder.setup import Setup


class History:
    """What a run leaves.

    committed: the clocks, in order; committed_at: when each was      faults: how often each struck
    time: virtual; log: one line an event
    carried: each message that was sent: when, when it arrives (None: it is lost), from whom, to whom
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.committed: list[Committed] = []
        self.committed_at: list[float] = []
        self.faults: Counter[str] = Counter()
        self.time = 0.0
        self.events: list[tuple[float, Address, Any, list[str]]] = []
        self.carried: list[tuple[float, float | None, Address, Address, Any]] = []

    def record(self, to: Address, event: Any) -> None:
        self.events.append((self.time, to, event, []))

    def note(self, what: str) -> None:
        """Something that strikes at the present event."""
        if self.events:
            self.events[-1][3].append(what)

    @property
    def log(self) -> list[str]:
        """Every event in one line, with a checksum of the arrays it carries, and the faults that struck at it."""
        return [self._line(*event) for event in self.events]

    def tail(self, lines: int) -> list[str]:
        return [self._line(*event) for event in self.events[-lines:]]

    def _line(self, time: float, to: Address, event: Any, notes: list[str]) -> str:
        return " ".join([f"{time:g} {to[0]} {to[1]} {describe(event)}", *(f"[{note}]" for note in notes)])


def describe(event: Any) -> str:
    """The event in one line, with a checksum of the arrays it carries."""
    arrays: list[np.ndarray] = []
    if isinstance(event, Push):
        arrays = [gradient.data for gradient in event.gradients if isinstance(gradient, Array)]
    elif isinstance(event, Reduced):
        arrays = [event.squares]
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"{event!r} {checksum:08x}" if arrays else repr(event)
