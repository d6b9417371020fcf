"""`pytest tests/ops --ops sum,prod` makes tests of these ops' rows only: quicker than to make all and choose by -k."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import table

import engine as eg


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops", default="", metavar="NAME,...", help="make tests of the rows of these ops only")


def pytest_configure(config: pytest.Config) -> None:
    table.only.update(filter(None, config.getoption("--ops", "").split(",")))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One after the other, so many threads for the kernels of a test."""
    before = eg.get_num_threads()
    eg.set_num_threads(request.param)
    yield
    eg.set_num_threads(before)
