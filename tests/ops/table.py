"""The rows of the op table, and how many examples a check takes of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.testing.rows  # noqa: F401  (registers the engine's rows)
from engine.testing import OpSpec, specs
from engine.testing.row_checks import CHECKS
from engine.testing.strategies import row_examples

only: set[str] = set()  # ops, by --ops (conftest.py); empty: all


def rows(choose: Callable[[OpSpec], Any] = lambda spec: True) -> Any:
    """Run a test once for each row that is chosen, named by it; of some ops only, with --ops."""
    return pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in specs.values()
                                            if choose(s) and (not only or s.op in only)])


def share(fraction: float) -> settings:
    """A part of the profile's examples, for the checks that cost more."""
    return settings(max_examples=max(3, int(settings.default.max_examples * fraction)))


def generated(name: str) -> Callable[..., None]:
    """The test of every row that has the check (engine/testing/row_checks.py), on its part of the examples."""
    check = CHECKS[name]

    @rows(check.applies)
    @share(check.share)
    @given(data=st.data())
    def test(spec: OpSpec, data: Any) -> None:
        check.run(spec, data.draw(row_examples(check, spec)))

    test.__doc__ = check.check.__doc__
    return test
