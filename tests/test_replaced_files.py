"""A file is what it was, or what was to be written; there is nothing beside it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from engine.files import replace_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for parts, want in ((b"one", b"one"), ([b"t", b"", b"wo"], b"two"), ([], b"")):
        replace_file(path, parts)
        assert path.read_bytes() == want
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str,
                                         error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        replace_file(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
