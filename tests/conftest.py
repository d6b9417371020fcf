"""What every test runs under: Hypothesis without surprises.

`make test` must give the same verdict every time, so its examples are derandomized, and no number is taken from the
sources that happen to be loaded. The nightly profile draws new examples, HYPOTHESIS_EXAMPLES (10,000) of each, and
prints what reproduces a failure:

    HYPOTHESIS_PROFILE=nightly HYPOTHESIS_EXAMPLES=300 pytest tests/ops
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import providers

_PHASES = [phase for phase in Phase if phase is not Phase.explain]  # which is slow, and our failures say what they mean
_COMMON = {"phases": _PHASES, "deadline": None, "database": None, "print_blob": True,
           "suppress_health_check": list(HealthCheck)}
settings.register_profile("test", derandomize=True, max_examples=25, **_COMMON)
settings.register_profile("quick", derandomize=True, max_examples=8, **_COMMON)
settings.register_profile("nightly", derandomize=False, **_COMMON,
                          max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "10000")))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))

# Hypothesis also draws constants that it finds in the modules loaded so far: another test before, or a line changed in
# some tool, and a derandomized search goes elsewhere. It has no setting; test_strategies.py sees that this works.
_NO_CONSTANTS = providers.Constants()
providers._get_local_constants = lambda: _NO_CONSTANTS

if threading.current_thread() is threading.main_thread():
    # A shell in the background starts its children with Ctrl-C ignored, and children hand that on. The tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def told_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of kernel threads is what was set, also where no kernels were compiled: there it is always 1, and what
    depends on it would not show."""
    from engine.backend import get_backend
    from engine.backend.cpu import CpuBackend

    backend = get_backend("cpu")
    if not isinstance(backend, CpuBackend):
        told = [1]
        monkeypatch.setattr(backend, "set_num_threads", lambda n: told.__setitem__(0, n), raising=False)
        monkeypatch.setattr(backend, "get_num_threads", lambda: told[0], raising=False)


@pytest.fixture
def unwatched() -> Iterator[None]:
    """Nobody looks at launches, as guard zones do (guarded.py): while somebody does, functions are called and not
    captured. The zones stay around every buffer."""
    from engine.backend import finishers

    kept = finishers[:]
    finishers.clear()
    yield
    finishers.extend(kept)
