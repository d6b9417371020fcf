"""Files that are replaced whole: whoever opens one finds what it held before or what it holds now, never a mixture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def replace_file(path: Path, parts: bytes | Iterable[bytes]) -> None:
    """Make `parts`, end to end, what the file at `path` holds; on return it is on the disk, under its name.

    Raises OSError, as on a full disk; then the file is as it was, and nothing new lies beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, parts)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, parts: bytes | Iterable[Any]) -> None:
    """Write a file, of bytes or of whatever has memory, and wait until the disk has it; its name is there once its
    folder is too."""
    several: Iterable[Any] = (parts,) if isinstance(parts, bytes) else parts
    with path.open("wb") as file:
        file.writelines(several)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder: those of new files, and of renamed ones."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
