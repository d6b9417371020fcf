"""What a sanitizer does not let tests do, or does slowly (libasan.so, libtsan.so are loaded first then)."""

import os

import pytest

LOADED = os.environ.get("LD_PRELOAD", "")

# A Python that does nothing has 20.0 TiB of addresses with the address sanitizer, whose shadow is an eighth of all that
# there are, and 124.5 with the thread sanitizer; the tests limit a process to some GiB. The undefined-behaviour
# sanitizer has no shadow, so they run with it.
limited_memory = pytest.mark.skipif("libasan.so" in LOADED or "libtsan.so" in LOADED, reason=(
    "this sanitizer reserves terabytes of addresses for itself and cannot begin within a limit"))

# Of every byte that is mapped the thread sanitizer resets two bytes of shadow: of 16 MiB, 8,192 pages, each a page
# fault, where a test counts 500 (8,796 were seen). And it takes a turn at every allocation, which is what an import
# mostly does: 0.074 s of the processor for 0.050. The tests run with the other sanitizers, which stay within bounds.
counted = pytest.mark.skipif("libtsan.so" in LOADED, reason="the thread sanitizer takes pages and time of its own")

# How many times as long a program takes: tools/examples/tiny_gpt.py 39.4 s with the thread sanitizer, 2.8 without.
SLOWNESS = 14 if "libtsan.so" in LOADED else 1
