"""One clear line instead of a traceback: what every program here raises for a mistake that a user can mend."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Callable
from math import isfinite
from types import ModuleType
from typing import Any


class ProgramError(Exception):
    """A mistake in the input, the flags or the machine's state. The message is one line that says how to go on."""

    def __init__(self, message: str, longest: int = 900):
        line = " ".join(message.split())
        super().__init__(line if len(line) <= longest else line[:longest] + "...")


def json_object(data: bytes) -> dict[str, Any]:
    """The object that a JSON text is. Raises ValueError in one line for anything else."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"JSON of a {type(found).__name__}, expected an object")
    return found


def finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def require(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Import an optional dependency, or say in one line what it is for and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ProgramError(f"{purpose} needs the package {package!r}, which is not installed ({error}); "
                           f"run: {sys.executable} -m pip install 'shardgrad[{extra}]'") from error


def run_program(name: str, main: Callable[[], int]) -> int:
    """Call a program's main and turn the errors a user can mend into one line and exit status 1.

    Returns the status: main's own, 1 after such an error, 130 after Ctrl-C (128 + SIGINT, as shells count it). A
    character that standard output cannot take is shown as another.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        status = main()
        sys.stdout.flush()
        return status
    except ProgramError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        return 0
    except OSError as error:  # a full disk, a missing right: the system says it in one line
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
