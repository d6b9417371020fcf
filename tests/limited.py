"""For tests that cannot run under a sanitizer (libasan.so, libtsan.so are loaded first then)."""

import os

import pytest

_SANITIZED = "san.so" in os.environ.get("LD_PRELOAD", "")

limited_memory = pytest.mark.skipif(_SANITIZED, reason=(
    "a sanitizer reserves terabytes of addresses for itself and cannot begin within a limit"))
measured = pytest.mark.skipif(_SANITIZED, reason="a sanitizer takes time and memory pages of its own")
