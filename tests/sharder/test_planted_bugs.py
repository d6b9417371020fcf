"""The simulator finds bugs: each protocol bug of sharder_bugs.py is found among the drawn histories, and shrunk.

A bug is found when some history breaks an invariant, ends with an error, or does not end.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from sharder_bugs import BUGS
from sharder_problems import HISTORIES, MODES, strikes, tiny_drawn


def breaks(history):
    try:
        tiny_drawn(*history)
    except (AssertionError, RuntimeError, ValueError, LookupError):
        return True
    return False


def test_there_are_bugs():
    assert len(BUGS) == 52


def smaller(history):
    """The histories that lack one fault, worker or shard of this one; of many faults, also with other seeds."""
    mode, seed, workers, shards, faults = history
    fewer = [faults[:i] + faults[i + 1:] for i in range(len(faults))]
    yield from ((mode, seed, workers, shards, kept) for kept in fewer)
    if workers > 1:
        yield mode, seed, workers - 1, shards, faults
    if shards > 1:
        yield mode, seed, workers, shards - 1, faults
    if len(faults) > 4:
        yield from ((mode, other, workers, shards, kept) for other in range(40) for kept in fewer)


def shrunk(history):
    """The history without anything that the bug does not need."""
    while simpler := next(filter(breaks, smaller(history)), None):
        history = simpler
    return history


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(bug, monkeypatch):
    """Within as many histories as test_schedules.py draws in every test run."""
    bug(monkeypatch.setattr)
    modes = st.sampled_from((bug.__defaults__ or (tuple(MODES),))[0])
    histories = st.tuples(modes, st.integers(0, 2**20), st.integers(1, 3), st.integers(1, 3), strikes)
    found = shrunk(find(histories, breaks, settings=settings(
        max_examples=HISTORIES, database=None, derandomize=True, phases=[Phase.generate])))
    print(f"{bug.__name__}: {found}")
    assert len(found[-1]) <= 4, found
