"""For tools/mutate.py: a process that has imported what all tests import but the engine, and forks for each run.

It reads orders, one line of JSON each: pytest's arguments, the folder to run in, the file for the output, limits as
setrlimit knows them, and the seconds that a run may take. It answers with the exit status, negative for a signal.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

import pytest

OUT_OF_TIME = -999


def preload() -> None:
    import numpy  # noqa: F401
    try:
        import hypothesis.extra.numpy
        import hypothesis.stateful  # noqa: F401
    except ImportError:  # tests without Hypothesis
        pass


def run(order: dict[str, Any]) -> int:
    """Never returns to the server's loop: the child's work."""
    os.setsid()
    for which, most in order["limits"]:
        resource.setrlimit(which, (most, most))
    os.chdir(order["folder"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[0:1] = [order["folder"], *sys.path[0:1]]
    sys.argv = ["pytest", *order["arguments"]]
    status = int(pytest.main(order["arguments"]))
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def answer(order: dict[str, Any]) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            status = run(order)
        finally:
            os._exit(status)
    late = False

    def stop(*_: Any) -> None:
        nonlocal late
        late = True
        os.killpg(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(order["seconds"])
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    try:
        os.killpg(child, signal.SIGKILL)  # what it started
    except ProcessLookupError:
        pass
    return OUT_OF_TIME if late else os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    preload()
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)
