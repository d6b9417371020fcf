"""Where temporaries lie: each block of memory gets a place in one arena, for as long as it lives.

Two blocks may share bytes if they do not live at once. The least arena for given lifetimes is NP-hard to find (dynamic
storage allocation); best fit in the order of birth comes close to the peak of what is live, below which none can be.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter


@dataclass
class Lifetime:
    """A block: its bytes, the first and last launch that mention it, and where it lies in the arena."""

    size: int
    first: int
    last: int
    offset: int = 0


def place(blocks: Iterable[Lifetime]) -> int:
    """Give each block an offset such that no two that live at once overlap; returns the bytes of the arena."""
    living: list[Lifetime] = []  # by offset
    total = 0
    for block in sorted(blocks, key=lambda b: (b.first, -b.size)):
        living = [b for b in living if b.last >= block.first]
        gaps, end = [], 0
        for b in living:
            if b.offset - end >= block.size:
                gaps.append((b.offset - end, end))
            end = b.offset + b.size
        block.offset = min(gaps)[1] if gaps else end
        total = max(total, block.offset + block.size)
        living.insert(bisect_right(living, block.offset, key=attrgetter("offset")), block)
    return total


def peak(blocks: Iterable[Lifetime]) -> int:
    """The most bytes that live at once: no arena is smaller."""
    changes = sorted((when, size) for b in blocks for when, size in ((b.first, b.size), (b.last + 0.5, -b.size)))
    live = most = 0
    for _, size in changes:
        live += size
        most = max(most, live)
    return most
