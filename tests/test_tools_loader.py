"""The loader is a pure function of (seed, step, microbatch) and visits every window once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.training.errors import ProgramError
from tools.training.loader import Loader, permute


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def loader(seed: int = 0, length: int = 1003) -> Loader:
    return Loader(np.arange(length, dtype=np.uint16), context=7, batch=3, microbatches=2, seed=seed)


@given(step=st.integers(0, 10**7), microbatch=st.integers(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_microbatch_depends_on_its_position_only(step: int, microbatch: int) -> None:
    one, two = loader(), loader()
    two.microbatch(step + 1, 0)  # what was read before does not matter
    for left, right in zip(one.microbatch(step, microbatch), two.microbatch(step, microbatch), strict=True):
        assert left.dtype == np.int64 and left.shape == (3, 7)
        assert np.array_equal(left, right)
    tokens, targets = one.microbatch(step, microbatch)
    assert np.array_equal(tokens + 1, targets)  # the data are 0, 1, 2...: the target is the next token
    assert targets.max() < 1003


def test_an_epoch_visits_every_window_once_and_the_next_one_in_another_order() -> None:
    source = loader()
    count = source.windows
    first = [source.start(i) for i in range(count)]
    second = [source.start(i) for i in range(count, 2 * count)]
    assert sorted(np.diff(sorted(first))) == [7] * (count - 1)
    assert sorted(np.diff(sorted(second))) == [7] * (count - 1)
    assert first != second
    assert source.epoch(count // 6) == pytest.approx(1, abs=0.05)


def test_seeds_give_different_orders() -> None:
    assert not np.array_equal(loader(0).microbatch(0, 0)[0], loader(1).microbatch(0, 0)[0])


@pytest.mark.parametrize("length", [15, 16, 22, 23])
def test_short_texts(length: int) -> None:
    tokens, targets = loader(length=length).microbatch(3, 1)
    assert targets.max() < length
    assert np.array_equal(tokens + 1, targets)


def test_text_shorter_than_two_windows_is_one_line() -> None:
    with pytest.raises(ProgramError, match=r"has 14 tokens; a context of 7 needs at least 15"):
        loader(length=14)
