"""`pytest tests/ops --ops sum,prod` makes tests of these ops' rows only: quicker than to make all and choose by -k."""

from __future__ import annotations

import pytest
import table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops", default="", metavar="NAME,...", help="make tests of the rows of these ops only")


def pytest_configure(config: pytest.Config) -> None:
    table.only.update(filter(None, config.getoption("--ops", "").split(",")))
