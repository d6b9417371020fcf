"""A pytest plugin: runs the array API standard's own test suite (data-apis/array-api-tests) on engine.array_api.

    make test-array-api ARRAY_API_TESTS=path/to/array-api-tests

It skips what skips.txt names, with the reason that stands there, and fails on a line that matches no test. The suite
takes every namespace to have complex types; what it works out from them when it is imported gets real ones here.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

SKIPS = Path(__file__).with_name("skips.txt")
COMPLEX = "the engine has no complex types"

os.environ["ARRAY_API_TESTS_MODULE"] = "engine.array_api"
os.environ["ARRAY_API_TESTS_SKIP_DTYPES"] = "complex64,complex128"


def pytest_load_initial_conftests(early_config: Any) -> None:
    """Import the suite's helpers with a `max` that knows what the widest of no complex types is."""
    sys.path.insert(0, str(early_config.rootpath))
    found = importlib.util.find_spec("array_api_tests.dtype_helpers")
    if found is None or found.loader is None:
        raise pytest.UsageError(f"array_api_tests: not in {early_config.rootpath}, expected a checkout of "
                                "https://github.com/data-apis/array-api-tests with its submodule")
    helpers: Any = importlib.util.module_from_spec(found)

    def widest(values: Any, **options: Any) -> Any:
        return builtins.max(values, default=(helpers.xp.float64, 64), **options)

    helpers.max = widest
    sys.modules[helpers.__name__] = helpers
    found.loader.exec_module(helpers)
    del helpers.max
    vars(sys.modules["array_api_tests"])["dtype_helpers"] = helpers  # as an import would have set it


def reasons() -> dict[str, str]:
    """The beginnings of test names, and why tests called so are skipped."""
    found = {}
    for line in SKIPS.read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, reason = line.partition("  ")
            found[name] = reason.strip()
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    skips = reasons()
    unused = set(skips)
    for item in items:
        own = item.nodeid.split("array_api_tests/")[-1]
        matching = [name for name in skips if own == name or own.startswith((name + "[", name + "::"))
                    or ("[" in name and not name.endswith("]") and own.startswith(name))]
        unused.difference_update(matching)
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if matching:
            item.add_marker(pytest.mark.skip(reason=skips[matching[0]]))
        elif getattr(case, "is_complex", False):  # a special case of the standard for complex numbers: no input to give
            item.add_marker(pytest.mark.skip(reason=COMPLEX))
    whole = Path(config.args[0]).resolve() == config.rootpath / "array_api_tests"
    if unused and whole:
        raise pytest.UsageError(f"{SKIPS.name}: no test is called {', '.join(sorted(unused))}")
