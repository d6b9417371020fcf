"""The criterion itself: what it lets pass, and what not."""

from __future__ import annotations

from collections import defaultdict

import agreement
import numpy as np
import pytest
from agreement import agree

WIDE = np.array([3.0, 4.0])  # of length 5
ALONG = np.array([0.6, 0.8])


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "seen", defaultdict(list))


def test_twice_the_peers_error_and_the_slack() -> None:
    allowed = 2 * 1e-3 + 5e-6
    agree("part", "x", WIDE + 0.999 * allowed * ALONG, WIDE - 1e-3 * ALONG, WIDE)
    with pytest.raises(AssertionError, match=r"x: ours is 0\.00201 from the wide result, the peer 0\.001; allowed"):
        agree("part", "x", WIDE + 1.001 * allowed * ALONG, WIDE - 1e-3 * ALONG, WIDE)


def test_float64_is_held_to_what_float32_showed() -> None:
    allowed = 2 * 2.0**-29 * (2 * 1e-3 + 5e-6)
    agree("part", "x", WIDE, WIDE - 1e-3 * ALONG, WIDE, ours_wide=WIDE + 0.99 * allowed * ALONG)
    with pytest.raises(AssertionError):
        agree("part", "x", WIDE, WIDE - 1e-3 * ALONG, WIDE, ours_wide=WIDE + 1.01 * allowed * ALONG)


@pytest.mark.parametrize("ours", [np.array([3.0, np.nan]), np.array([np.inf, 4.0]), WIDE[:1], WIDE[None]])
def test_what_is_no_result_at_all(ours: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        agree("part", "x", ours, WIDE, WIDE)


def test_a_peer_without_a_result_allows_nothing() -> None:
    with pytest.raises(AssertionError):
        agree("part", "x", WIDE, np.array([np.nan, 4.0]), WIDE + 1e-3)


def test_the_table_names_the_worst() -> None:
    for name, error in (("near", 1e-6), ("far", 4e-6), ("equal", 0.0)):
        agree("part", name, WIDE + error * ALONG, WIDE + 2e-6 * ALONG, WIDE)
    line = agreement.table()[1].split()
    assert line[:3] == ["part", "3", "1.25"] and line[3:] == ["0.44", "far"]
