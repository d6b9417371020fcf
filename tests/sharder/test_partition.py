"""Partitions: every element has one owner, pieces are whole blocks, shares are fair, and hashing moves little."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.optim.clip import BLOCK
from engine.sharder.partition import ALIGNMENT, Partition

PLACEMENTS = ("ranges", "hashing")
sizes = st.one_of(st.integers(0, 40), st.integers(0, 5 * BLOCK), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1]))
cases = st.tuples(st.lists(sizes, min_size=1, max_size=8), st.integers(1, 9), st.sampled_from(PLACEMENTS))


def partition_of(case, placement=None):
    lengths, shards, drawn = case
    return Partition({f"p{i}": (n,) for i, n in enumerate(lengths)}, shards, placement or drawn)


@given(cases)
def test_every_element_has_exactly_one_owner(case):
    partition = partition_of(case)
    owned = {name: [] for name in partition.parameters}
    for pieces in partition.pieces:
        for piece in pieces:
            owned[piece.parameter.name].append((piece.start, piece.stop))
    for name, parameter in partition.parameters.items():
        position = 0
        for begin, end in sorted(owned[name]):
            assert begin == position < end
            position = end
        assert position == parameter.size


@given(cases)
def test_boundaries_are_boundaries_of_blocks(case):
    for pieces in partition_of(case).pieces:
        for piece in pieces:
            assert piece.start % BLOCK == 0
            assert piece.stop % BLOCK == 0 or piece.stop == piece.parameter.size


@given(cases)
def test_no_shard_is_further_than_a_block_from_its_share(case):
    partition = partition_of(case, "ranges")
    share = sum(p.size for p in partition.parameters.values()) / partition.shards
    for pieces in partition.pieces:
        assert abs(sum(piece.size for piece in pieces) - share) <= BLOCK


@given(cases)
def test_parameters_and_pieces_are_aligned_and_apart(case):
    partition = partition_of(case)
    end = 0
    for parameter in partition.parameters.values():
        assert parameter.offset % ALIGNMENT == 0 and parameter.offset >= end
        end = parameter.offset + parameter.size
    assert end <= partition.size
    for pieces, size in zip(partition.pieces, partition.sizes):
        end = 0
        for piece in pieces:
            assert piece.local % ALIGNMENT == 0 and piece.local >= end
            end = piece.local + piece.size
        assert end <= size


@given(cases)
def test_blocks_are_numbered_in_order(case):
    partition = partition_of(case)
    count = 0
    for parameter in partition.parameters.values():
        assert parameter.first_block == count
        count += -(-parameter.size // BLOCK)
    assert partition.blocks == count


@given(cases)
def test_numbers_of_blocks_go_back_into_their_order(case):
    partition = partition_of(case)
    of_shards = [np.array([block for p in pieces for block in p.blocks], "float64") for pieces in partition.pieces]
    assert partition.in_block_order(of_shards).tolist() == list(range(partition.blocks))


def owners(shards):
    partition = Partition({f"p{i}": (7 * BLOCK,) for i in range(300)}, shards, "hashing")
    return {(p.parameter.name, start): s for s, pieces in enumerate(partition.pieces) for p in pieces
            for start in range(p.start, p.stop, BLOCK)}


def test_hashing_moves_to_a_new_shard_and_nowhere_else():
    before, after = owners(4), owners(5)
    moved = [block for block, owner in before.items() if after[block] != owner]
    assert {after[block] for block in moved} == {4}
    assert 0.5 / 5 < len(moved) / len(before) < 1.5 / 5  # 1/5, give or take three times 1/√64 of it


def test_hashing_gives_fair_shares():
    counts = [list(owners(4).values()).count(s) for s in range(4)]
    assert max(counts) < 1.5 * sum(counts) / 4 and min(counts) > 0.5 * sum(counts) / 4
