"""A pytest plugin for tools/mutate.py: a failing example is not shrunk, for nobody looks at it. With --shrink it is,
and how many ops it has is written out."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shrink", action="store_true", help="shrink failing examples, and say how many ops they have")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    try:
        from hypothesis import Phase, settings
    except ImportError:  # tests without Hypothesis
        return
    shrink = [Phase.shrink] if config.getoption("--shrink") else []
    settings.register_profile("mutate", settings.default, phases=[Phase.explicit, Phase.generate, *shrink],
                              report_multiple_bugs=False)
    settings.load_profile("mutate")


def pytest_exception_interact(node: Any, call: pytest.CallInfo[Any], report: Any) -> None:
    nodes = getattr(call.excinfo and call.excinfo.value, "nodes", None)  # of a CheckFailure
    if nodes is not None and node.config.getoption("--shrink"):
        node.config.pluginmanager.get_plugin("terminalreporter").write_line(f"\nSHRUNK to {nodes} nodes")
