"""Which shard owns which elements.

Every parameter is a row of blocks of 4096 elements, the last of which may be short; the blocks of all parameters,
in order, are numbered 0, 1, 2 ... The gradient norm is summed block by block, so a shard owns whole blocks, and the
norm has the same bits for every number of shards. With fewer blocks than shards some shards own nothing, which is
legal. Two ways to place blocks:

ranges   size-balanced: shard s owns the blocks between the boundaries nearest to s/S and (s + 1)/S of all elements.
         No shard is further from its fair share than one block.
hashing  consistent hashing: shards and blocks are hashed onto a ring, and a block belongs to the next shard clockwise.
         One shard more or less moves 1/S of the blocks. Karger et al. 1997, "Consistent hashing and random trees".

    parameters    embedding (6000)        bias (3)   weight (5000)
    blocks        0: 4096     1: 1904     2: 3       3: 4096     4: 904
    ranges        shard 0 ............... |          shard 1 .........

In memory every parameter starts at a multiple of 64 bytes of one flat buffer, so that a view of it is aligned. Shards
that do not share the whole buffer have one of their own, in which every piece starts at such a multiple.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod

import numpy as np

from engine.optim.clip import BLOCK

ALIGNMENT = 16  # elements; 64 bytes of float32
POINTS = 64  # of each shard on the ring: shares differ by about 1/√64


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
    """Elements [start, stop) of one parameter, owned by one shard; `local`: where they begin in its own buffer."""

    parameter: Parameter
    start: int
    stop: int
    local: int

    @property
    def offset(self) -> int:
        """Where the piece begins in the shared flat buffer."""
        return self.parameter.offset + self.start

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        first = self.parameter.first_block + self.start // BLOCK
        return range(first, first + -(-self.size // BLOCK))


class Partition:
    """The parameters `shapes` (name -> shape, in order) over `shards` shards.

    parameters: all of them, in order        pieces[s]: what shard s owns, in order
    size:       elements of the flat buffer  sizes[s]:  elements of the buffer of shard s alone
    parts:      by parameter name, (shard, piece) of each of its pieces, by ascending shard
    owners:     by parameter name, the shards that own any of it, ascending
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], shards: int, placement: str = "ranges"):
        self.shards = shards
        self.parameters: dict[str, Parameter] = {}
        keys: list[tuple[str, int]] = []  # of each block
        ends: list[int] = []  # the number of elements up to the end of each block
        elements = offset = 0
        for name, shape in shapes.items():
            size = prod(shape)
            self.parameters[name] = Parameter(name, tuple(shape), size, offset, len(ends))
            ends += [elements + min(start + BLOCK, size) for start in range(0, size, BLOCK)]
            keys += [(name, start) for start in range(0, size, BLOCK)]
            elements += size
            offset += _aligned(size)
        self.size, self.blocks = offset, len(ends)
        owners = _by_range(ends, elements, shards) if placement == "ranges" else _by_hash(keys, shards)
        pieces, self.sizes = self._pieces(owners)
        self.pieces = tuple(map(tuple, pieces))
        self.parts: dict[str, list[tuple[int, Piece]]] = {name: [] for name in self.parameters}
        for s, own in enumerate(pieces):
            for piece in own:
                self.parts[piece.parameter.name].append((s, piece))
        self.owners = {name: tuple(dict.fromkeys(s for s, _ in parts)) for name, parts in self.parts.items()}

    def _pieces(self, owners: Sequence[int]) -> tuple[list[list[Piece]], list[int]]:
        """The runs of blocks with one owner, and how much memory they need."""
        pieces: list[list[Piece]] = [[] for _ in range(self.shards)]
        sizes = [0] * self.shards
        for p in self.parameters.values():
            of_parameter = owners[p.first_block:p.first_block + -(-p.size // BLOCK)]
            first = 0
            for i, owner in enumerate(of_parameter, 1):
                if i < len(of_parameter) and of_parameter[i] == owner:
                    continue
                piece = Piece(p, first * BLOCK, min(i * BLOCK, p.size), sizes[owner])
                pieces[owner].append(piece)
                sizes[owner] += _aligned(piece.size)
                first = i
        return pieces, sizes

    def in_block_order(self, of_shards: Sequence[np.ndarray]) -> np.ndarray:
        """One number a block, given by the shards in the order of their pieces, in the order of the blocks."""
        numbers = np.empty(self.blocks)
        for pieces, own in zip(self.pieces, of_shards):
            numbers[[block for piece in pieces for block in piece.blocks]] = own
        return numbers


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _by_range(ends: list[int], elements: int, shards: int) -> list[int]:
    """The owner of each block."""
    boundaries = [_nearest(ends, elements * s / shards) for s in range(shards)] + [len(ends)]
    return [s for s in range(shards) for _ in range(boundaries[s], boundaries[s + 1])]


def _nearest(ends: list[int], target: float) -> int:
    """The number of blocks whose elements come nearest to `target`."""
    block = bisect_left(ends, target)  # blocks [0, block) hold fewer elements than target
    below = ends[block - 1] if block else 0
    if block < len(ends) and ends[block] - target < target - below:
        return block + 1
    return block


def _by_hash(keys: Sequence[tuple[str, int]], shards: int) -> list[int]:
    """The owner of each block."""
    ring = sorted((_hash(f"shard {s} point {i}"), s) for s in range(shards) for i in range(POINTS))
    return [ring[bisect_left(ring, (_hash(f"{name} {start}"), -1)) % len(ring)][1] for name, start in keys]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
