"""`make test-peers` runs what is here; `make test` never looks into this folder (norecursedirs in pyproject.toml)."""

from __future__ import annotations

import os
from typing import Any

import agreement
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars of progress and advice are not what the table at the end is read for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section(f"agreement with PyTorch {torch.__version__}")
    for line in agreement.table():
        terminalreporter.write_line(line)
