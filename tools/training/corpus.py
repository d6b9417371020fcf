"""The corpus: a list of documents in a fixed order, split into training and validation by file.

The default corpus is on every machine that can run this program: the sources of the running Python's own
standard library. Its test folders are left out, since distributions disagree on shipping them. Documents
are sorted by path and every twentieth, from the first, is held out for validation. The SHA-256 of all names
and contents names the corpus in caches, checkpoints and reports: two runs with the same digest read the
same bytes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.training import fallback
from tools.training.errors import ProgramError

HELD_OUT = 20  # one document in so many is validation
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text: a name that does not depend on the machine, and how to read its bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Corpus:
    """What is trained on, what is held out, and the digest of both."""

    description: str
    training: tuple[Document, ...]
    validation: tuple[Document, ...]
    sha256: str

    def text(self, split: str, limit: int | None = None) -> bytes:
        """The documents of "training" or "validation" one after the other, at most `limit` bytes of them."""
        parts: list[bytes] = []
        size = 0
        for document in self.documents(split):
            parts.append(document.read())
            size += len(parts[-1])
            if limit is not None and size >= limit:
                break
        return b"".join(parts)[:limit]

    def documents(self, split: str) -> tuple[Document, ...]:
        return {"training": self.training, "validation": self.validation}[split]


def digest(documents: list[Document]) -> str:
    """SHA-256 over every document's name, length and bytes, in order: no two corpora share a hashed string."""
    total = hashlib.sha256()
    for document in documents:
        data = document.read()
        total.update(os.fsencode(document.name) + f"\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def split_documents(description: str, documents: list[Document]) -> Corpus:
    """Hold out every twentieth document; a lone document is cut at the line where its last twentieth begins."""
    sha256 = digest(documents)
    if len(documents) == 1:
        training, validation = cut_in_two(documents[0])
        return Corpus(description, (training,), (validation,), sha256)
    training_part = tuple(d for i, d in enumerate(documents) if i % HELD_OUT != 0)
    validation_part = tuple(d for i, d in enumerate(documents) if i % HELD_OUT == 0)
    return Corpus(description, training_part, validation_part, sha256)


def cut_in_two(document: Document) -> tuple[Document, Document]:
    data = document.read()
    target = len(data) - len(data) // HELD_OUT
    cut = data.rfind(b"\n", 0, target) + 1 or target
    return (Document(document.name, lambda: data[:cut]), Document(document.name, lambda: data[cut:]))


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProgramError(f"cannot read {path}: {error.strerror}") from error


def documents_under(root: Path, paths: Iterator[Path]) -> list[Document]:
    """Documents named by their path below root, in the order of those names."""
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return [Document(name, lambda path=path: read_file(path)) for name, path in named]  # type: ignore[misc]


def is_text(path: Path) -> bool:
    """Text has no zero byte near its start; programs, images and archives almost always do."""
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def folder_corpus(folder: Path) -> Corpus:
    """Every text file below a folder, hidden files and folders left out."""
    def wanted(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return not any(part.startswith(".") for part in parts) and path.is_file() and is_text(path)

    try:
        documents = [d for d in documents_under(folder, filter(wanted, folder.rglob("*"))) if d.read()]
    except OSError as error:
        raise ProgramError(f"--data {folder}: {error.strerror}: {error.filename}") from error
    if not documents:
        raise ProgramError(f"--data {folder}: no text files in this folder (hidden and binary files are left out)")
    return split_documents(f"text files under {folder}", documents)


def file_corpus(path: Path) -> Corpus:
    """One text file; its last twentieth is held out."""
    size = len(read_file(path))
    if size < 1000:
        raise ProgramError(f"--data {path}: {size} bytes are too few to train on and hold out from; give at least 1000")
    return split_documents(f"the file {path}", [Document(path.name, lambda: read_file(path))])


def standard_library_corpus(root: Path | None = None) -> Corpus:
    """The running Python's standard library; where only compiled files are shipped, generated text instead."""
    root = root or Path(sysconfig.get_path("stdlib"))

    def wanted(path: Path) -> bool:
        return not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts) and path.is_file()

    documents = documents_under(root, filter(wanted, root.rglob("*.py")))
    if len(documents) < 2 * HELD_OUT:
        generated = [Document(name, lambda text=text: text) for name, text in fallback.documents()]  # type: ignore[misc]
        return split_documents("generated text (this Python ships no library sources)", generated)
    return split_documents(f"the standard library of Python {platform.python_version()}", documents)


def open_corpus(data: str | None) -> Corpus:
    """The corpus that --data names: a folder, a file, or without it the standard library."""
    if data is None:
        return standard_library_corpus()
    path = Path(data)
    if path.is_dir():
        return folder_corpus(path)
    if path.is_file():
        return file_corpus(path)
    raise ProgramError(f"--data {data}: no such file or folder")
