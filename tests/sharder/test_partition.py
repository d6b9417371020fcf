"""Key ranges: every element has one owner, ranges are blocks, and nobody has much more than a fair share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.optim.clip import BLOCK
from engine.sharder.partition import ALIGNMENT, Partition

sizes = st.one_of(st.integers(0, 40), st.integers(0, 5 * BLOCK), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1]))
cases = st.tuples(st.lists(sizes, min_size=1, max_size=8), st.integers(1, 9))


def partition_of(case):
    lengths, shards = case
    return Partition({f"p{i}": (n,) for i, n in enumerate(lengths)}, shards)


@given(cases)
def test_every_element_has_exactly_one_owner(case):
    partition = partition_of(case)
    owned = {name: [] for name in partition.parameters}
    for pieces in partition.pieces:
        for piece in pieces:
            owned[piece.parameter.name].append((piece.start, piece.stop))
    for name, parameter in partition.parameters.items():
        position = 0
        for begin, end in owned[name]:  # ascending, since pieces come in the order of shards and parameters
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
    partition = partition_of(case)
    share = sum(p.size for p in partition.parameters.values()) / partition.shards
    for pieces in partition.pieces:
        assert abs(sum(piece.size for piece in pieces) - share) <= BLOCK


@given(cases)
def test_parameters_are_aligned_and_apart_and_ranges_hold_their_pieces(case):
    partition = partition_of(case)
    end = 0
    for parameter in partition.parameters.values():
        assert parameter.offset % ALIGNMENT == 0 and parameter.offset >= end
        end = parameter.offset + parameter.size
    assert end <= partition.size
    for pieces, (begin, stop) in zip(partition.pieces, partition.ranges):
        assert all(begin <= piece.offset and piece.offset + piece.size <= stop for piece in pieces)


@given(cases)
def test_blocks_are_numbered_in_order(case):
    partition = partition_of(case)
    count = 0
    for parameter in partition.parameters.values():
        assert parameter.first_block == count
        count += -(-parameter.size // BLOCK)
    assert partition.blocks == count
