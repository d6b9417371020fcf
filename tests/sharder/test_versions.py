"""A ring of versions: what is current, what is kept, and that no half of a version is ever seen."""

from __future__ import annotations

import numpy as np
import pytest

import engine as eg
from engine.backend import get_backend
from engine.sharder.partition import Parameter, Piece
from engine.sharder.versions import Versions

K = get_backend("reference")
X = Parameter("x", (8,), size=8, offset=0, first_block=0)
HALVES = [Piece(X, start, start + 4, local=0) for start in (0, 4)]


def versions(**arguments):
    made = Versions(K, 8, eg.float32, writers=2, shared=True, **arguments)
    K.fill(made.current.flat, 0)
    return made


def write(made, half, value):
    K.fill(made.reserve().piece(HALVES[half]), value)
    made.commit()


def test_a_version_is_current_when_its_last_writer_has_committed():
    made = versions()
    for number, order in enumerate([(0, 1), (1, 0), (0, 1)], start=1):
        before = made.current
        write(made, order[0], number)
        assert made.current is before and made.at(number) is before
        assert before.flat.data.tolist() == [number - 1.0] * 8
        write(made, order[1], number)
        assert made.current.number == number and made.current.flat.data.tolist() == [float(number)] * 8


@pytest.mark.parametrize("older", [0, 1, 3])
def test_as_many_older_versions_are_kept_as_was_asked_for(older):
    made = versions(older=older)
    for number in range(1, 6):
        for half in (0, 1):
            write(made, half, number)
    assert [version.number for version in made.kept()] == list(range(5 - older, 6))
    assert [made.at(number).number for number in range(7)] == [n if n >= 5 - older else 5 for n in range(6)] + [5]


def test_what_was_half_written_is_forgotten():
    made = versions(older=1)
    kept = made.kept()
    write(made, 0, 7)
    made.discard()
    for half in (1, 0):
        write(made, half, 1)
    assert made.current.number == 1 and made.current.flat.data.tolist() == [1.0] * 8
    write(made, 1, 2)
    made.reset(kept)
    assert made.kept() == kept and made.current.number == 0
    for half in (0, 1):
        write(made, half, 3)
    assert made.current.number == 1 and made.current.flat.data.tolist() == [3.0] * 8


def test_a_reader_keeps_what_it_holds_and_cannot_write_to_it():
    made = versions()
    held = made.current.whole(X)
    for half in (0, 1):
        write(made, half, 1)
    np.testing.assert_array_equal(held, np.zeros(8, np.float32))
    np.testing.assert_array_equal(made.current.read(HALVES[1]), np.ones(4, np.float32))
    for view in (held, made.current.read(HALVES[0])):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 5
