"""A pytest plugin for tools/mutate.py: a failing example need not be shrunk, for nobody looks at it."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    try:
        from hypothesis import Phase, settings
    except ImportError:  # tests without Hypothesis
        return
    settings.register_profile("mutate", settings.default, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutate")
