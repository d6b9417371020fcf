"""Which shard owns which elements: size-balanced key ranges over all parameters laid end to end.

Every parameter is a row of blocks of 4096 elements, the last of which may be short; the blocks of all parameters,
in order, are numbered 0, 1, 2 ... The gradient norm is summed block by block, so a shard owns whole blocks, and the
norm has the same bits for every number of shards. Shard s owns the blocks between the boundaries nearest to
s/S and (s + 1)/S of all elements: no shard is further from its fair share than one block. With fewer blocks than
shards some shards own nothing, which is legal.

    parameters    embedding (6000)        bias (3)   weight (5000)
    blocks        0: 4096     1: 1904     2: 3       3: 4096     4: 904
    2 shards      shard 0 ............... |          shard 1 .........

In memory every parameter starts at a multiple of 64 bytes of one flat buffer, so that a view of it is aligned.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from engine.optim.clip import BLOCK

ALIGNMENT = 16  # elements; 64 bytes of float32


@dataclass(frozen=True)
class Parameter:
    """One parameter and where it stands: flat[offset : offset + size], its blocks from number first_block on."""

    name: str
    shape: tuple[int, ...]
    size: int
    offset: int
    first_block: int


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of one parameter, owned by one shard."""

    parameter: Parameter
    start: int
    stop: int

    @property
    def offset(self) -> int:
        """Where the piece begins in the flat buffer."""
        return self.parameter.offset + self.start

    @property
    def size(self) -> int:
        return self.stop - self.start


class Partition:
    """The parameters `shapes` (name -> shape, in order) over `shards` shards.

    parameters: all of them, in order        pieces[s]: what shard s owns, in order
    size:       elements of the flat buffer  ranges[s]: the part of the flat buffer that holds them, [begin, end)
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], shards: int):
        self.shards = shards
        self.parameters: dict[str, Parameter] = {}
        ends: list[int] = []  # the number of elements up to the end of each block
        elements = offset = 0
        for name, shape in shapes.items():
            size = prod(shape)
            self.parameters[name] = Parameter(name, tuple(shape), size, offset, len(ends))
            ends += [elements + min(start + BLOCK, size) for start in range(0, size, BLOCK)]
            elements += size
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        self.size = offset
        self.blocks = len(ends)
        boundaries = [_nearest(ends, elements * s / shards) for s in range(shards)] + [self.blocks]
        self.pieces = tuple(self._pieces(*boundaries[s:s + 2]) for s in range(shards))
        self.ranges = tuple((own[0].offset, own[-1].offset + own[-1].size) if own else (0, 0) for own in self.pieces)

    def _pieces(self, first: int, last: int) -> tuple[Piece, ...]:
        """The pieces that blocks [first, last) make."""
        pieces = []
        for p in self.parameters.values():
            start, stop = ((block - p.first_block) * BLOCK for block in (first, last))
            start, stop = max(start, 0), min(stop, p.size)
            if start < stop:
                pieces.append(Piece(p, start, stop))
        return tuple(pieces)


def _nearest(ends: list[int], target: float) -> int:
    """The number of blocks whose elements come nearest to `target`."""
    block = bisect_left(ends, target)  # blocks [0, block) hold fewer elements than target
    below = ends[block - 1] if block else 0
    if block < len(ends) and ends[block] - target < target - below:
        return block + 1
    return block
