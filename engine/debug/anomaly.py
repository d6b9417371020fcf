"""Find the first operation that made a NaN or an infinity, forward or backward, and the user's line it came from."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from engine import autograd
from engine.backend import Array, finishers, observers

_ENGINE = str(Path(__file__).resolve().parent.parent)


def _user_line() -> str:
    """The innermost line of the stack that is not the engine's own."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_ENGINE):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "a line inside the engine"


def _kinds(array: Any) -> tuple[bool, bool]:
    """(holds a NaN, holds an infinity)."""
    if not isinstance(array, Array) or not array.dtype.is_floating:
        return False, False
    data = np.asarray(array.data)
    return bool(np.isnan(data).any()), bool(np.isinf(data).any())


@contextmanager
def detect_anomaly() -> Iterator[None]:
    """Within the block, a kernel that makes a NaN out of numbers, or an infinity out of finite ones, raises.

    Raises FloatingPointError with one line: the kernel; in backward also the op whose rule it was and the line that
    called that op. An infinity or NaN that was there before (a −∞ mask, bad input data) is nobody's fault here and is
    passed on. Every kernel's arguments are scanned, so it is slow: for looking, not for training.
    """
    lines: WeakKeyDictionary[autograd.Node, str] = WeakKeyDictionary()
    in_backward: list[autograd.Node] = []

    def watch(node: autograd.Node, event: str) -> None:
        if event == "made":
            lines[node] = _user_line()
        else:
            in_backward[:] = [node]

    before: list[tuple[bool, bool]] = []

    def note_inputs(_name: str, arguments: tuple[Any, ...]) -> None:
        # An output may be an input too (in place), so inputs are looked at before the kernel runs.
        kinds = [_kinds(a) for a in arguments[1:]]
        before[:] = [(any(nan for nan, _ in kinds), any(inf for _, inf in kinds))]

    def check_output(name: str, arguments: tuple[Any, ...], _seconds: float) -> None:
        nan, inf = _kinds(arguments[0])
        had_nan, had_inf = before[0]
        made_nan = nan and not had_nan
        if not made_nan and not (inf and not had_inf and not had_nan):
            return
        what = "a NaN" if made_nan else "an infinity"
        where = f"at {_user_line()}"
        if in_backward and in_backward[0] in lines:
            node = in_backward[0]
            where = f"in the backward of {node.op.name}, called at {lines[node]}"
        raise FloatingPointError(f"{name}: made {what} {where}")

    observers.append(note_inputs)
    finishers.append(check_output)
    autograd.watchers.append(watch)
    try:
        yield
    finally:
        observers.remove(note_inputs)
        finishers.remove(check_output)
        autograd.watchers.remove(watch)
