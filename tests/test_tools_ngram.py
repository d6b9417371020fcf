"""The baselines against Witten and Bell's recursion written out, and against a case worked by hand."""

from __future__ import annotations

import lzma
from collections import Counter
from math import log2
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.training.corpus import open_corpus
from tools.training.ngram import baselines, interpolated_bits, lzma_bits


def plain_bits(training: bytes, validation: bytes, n: int) -> float:
    """The definition, one byte at a time, with dictionaries."""
    text = bytes(n - 1) + training
    counts = [Counter(text[i - k:i + 1] for i in range(n - 1, len(text))) for k in range(n)]
    padded = bytes(n - 1) + validation

    def probability(k: int, i: int) -> float:
        if k < 0:
            return 1 / 256
        context = padded[i - k:i]
        following = {gram: c for gram, c in counts[k].items() if gram[:-1] == context}
        total, kinds = sum(following.values()), len(following)
        lower = probability(k - 1, i)
        return (following.get(padded[i - k:i + 1], 0) + kinds * lower) / (total + kinds) if total else lower

    return -sum(log2(probability(n - 1, i)) for i in range(n - 1, len(padded))) / len(validation)


def test_by_hand() -> None:
    # "aab": N(a) = 2, N(b) = 1, T() = 2, so p1(a) = (2 + 2/256)/5 and p1(b) = (1 + 2/256)/5.
    # After a came a and b: T(a) = 2, N(a·) = 2, so p2(b | a) = (1 + 2 p1(b))/4; after the start came a.
    p1_a, p1_b = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5
    start_a = (1 + 1 * p1_a) / 2
    bits = interpolated_bits(b"aab", b"ab", (1, 2))
    assert bits[1] == pytest.approx(-(log2(p1_a) + log2(p1_b)) / 2, rel=1e-14)
    assert bits[2] == pytest.approx(-(log2(start_a) + log2((1 + 2 * p1_b) / 4)) / 2, rel=1e-14)


@given(training=st.binary(min_size=1, max_size=60), validation=st.binary(min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_against_the_definition(training: bytes, validation: bytes) -> None:
    bits = interpolated_bits(training, validation, (1, 2, 3, 5))
    for n, value in bits.items():
        assert value == pytest.approx(plain_bits(training, validation, n), rel=1e-12)


def test_lzma_counts_what_the_validation_text_adds() -> None:
    text = bytes(range(256)) * 40
    expected = (len(lzma.compress(text + b"tail" * 30)) - len(lzma.compress(text))) * 8 / 120
    assert lzma_bits(text, b"tail" * 30) == expected


def test_baselines_are_computed_once(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 50)
    corpus = open_corpus(str(path))
    table = baselines(corpus, tmp_path)
    assert list(table) == ["1-gram", "3-gram", "4-gram", "5-gram", "lzma"]
    (kept,) = tmp_path.glob("baselines-*.json")
    kept.write_text('{"1-gram": 1.0}')
    assert baselines(corpus, tmp_path) == {"1-gram": 1.0}
    kept.write_text("{")
    assert baselines(corpus, tmp_path) == table
