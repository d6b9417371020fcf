"""Ctrl-C as a request: the first asks the loop to save and leave, the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within `with Interrupts() as interrupts:`, interrupts.requested says whether to stop after this step."""

    def __init__(self, message: str = "finishing this step and saving; once more to leave at once"):
        self.requested = False
        self.message = message

    def __enter__(self) -> Interrupts:
        self.previous = [signal.signal(number, self.handle) for number in SIGNALS]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in zip(SIGNALS, self.previous):
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # Worker threads may be deep in a kernel; nothing on the disk needs them, so do not wait.
            os._exit(128 + number)
        self.requested = True
        os.write(sys.stderr.fileno(), f"\n{signal.Signals(number).name}: {self.message}\n".encode())
