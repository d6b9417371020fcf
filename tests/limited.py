"""For tests that limit the address space of a process."""

import os

import pytest

limited_memory = pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason=(
    "a sanitizer (libasan.so, libtsan.so) reserves terabytes of addresses for itself and cannot begin within a limit"))
