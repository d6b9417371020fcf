"""Scoring and streaming: every prediction counts once, whatever the stride; no text after a stop string."""

from __future__ import annotations

from math import inf, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as eg
from tools.training.errors import ProgramError
from tools.training.evaluation import Score, sampled_score, score, windows
from tools.training.generation import until, visible

BIGRAM = np.random.default_rng(0).normal(0, 2, (7, 7))


def bigram(tokens: eg.Tensor) -> eg.Tensor:
    """A model that looks back on one token only, so its score cannot depend on windows."""
    return eg.tensor(BIGRAM[tokens.numpy()])


def log_probabilities() -> np.ndarray:
    return BIGRAM - np.log(np.exp(BIGRAM).sum(axis=1, keepdims=True))


@given(length=st.integers(1, 60), context=st.integers(1, 20), data=st.data())
@settings(max_examples=100, deadline=None)
def test_windows_score_every_prediction_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    width = min(context, length)
    scored = []
    for begin, count in windows(length, context, stride):
        assert 0 <= begin <= length - width and 1 <= count <= width
        scored += range(begin + width - count, begin + width)
        if begin > 0 and begin + width < length:  # neither the first nor the last: sees what was promised
            assert count <= stride
    assert scored == list(range(length))


@given(tokens=st.lists(st.integers(0, 6), min_size=2, max_size=60), context=st.integers(1, 20), data=st.data())
@settings(max_examples=30, deadline=None)
def test_score_is_the_sum_of_its_parts(tokens: list[int], context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    lengths = np.array([1, 2, 3, 1, 1, 4, 1])
    row = np.array(tokens, np.uint8)
    result = score(bigram, row, lengths, context, stride, batch=3)
    expected = -log_probabilities()[row[:-1], row[1:]].sum() / np.log(2)
    assert result.bits == pytest.approx(expected, rel=1e-12)
    assert (result.tokens, result.bytes) == (len(tokens) - 1, lengths[row[1:]].sum())
    assert log2(result.perplexity) == pytest.approx(result.bits / result.tokens, rel=1e-12)


def test_sampled_score_covers_the_whole_text_evenly() -> None:
    row = np.arange(100, dtype=np.uint8) % 7
    result = sampled_score(bigram, row, np.ones(7, np.int64), context=10, count=4)
    assert result.tokens == 40
    everything = sampled_score(bigram, row[:8], np.ones(7, np.int64), context=10, count=1)
    assert everything.tokens == 7


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    assert Score(bits=1023.0, tokens=1, bytes=1).perplexity == 2.0**1023
    assert Score(bits=2e4, tokens=3, bytes=3).perplexity == inf


@pytest.mark.parametrize("tokens, stride, message", [([1], 4, "has 1 tokens"), ([1, 2, 3], 9, "--stride is 9"),
                                                     ([1, 2, 3], 0, "--stride is 0, expected 1 to 8")])
def test_unusable_input_is_one_line(tokens: list[int], stride: int, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        score(bigram, np.array(tokens, np.uint8), np.ones(7, np.int64), 8, stride)


@given(text=st.text("aäb\U0001f600", max_size=30), stop=st.none() | st.text("aäb", min_size=1, max_size=3),
       data=st.data())
@settings(max_examples=200, deadline=None)
def test_streaming_ends_before_the_stop_string(text: str, stop: str | None, data: st.DataObject) -> None:
    encoded, pieces = text.encode(), []
    while encoded:
        size = data.draw(st.integers(1, 5))
        pieces.append(encoded[:size])
        encoded = encoded[size:]
    expected = text.partition(stop)[0] if stop else text
    assert "".join(until(iter(pieces), stop)) == expected


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert visible("a\tb\nä\x1b[2J\x07\x9b") == "a\tb\nä�[2J��"
