"""One planted bug."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A wrong edit of one file.

    name:  short and unique
    file:  path from the root of the tree
    old:   what stands there, exactly once
    new:   what stands there instead
    what:  the mistake, in one line
    tests: pytest's arguments for the tests that should notice, run before the wider suite
    sanitizer: "thread" for a data race, which no result need show: the kernels are built with that sanitizer, and it
           should notice while these tests run
    then:  what runs when those have noticed nothing, in this order; the wider suite by default
    """

    name: str
    file: str
    old: str
    new: str
    what: str
    tests: str
    sanitizer: str = ""
    then: tuple[str, ...] | None = None
