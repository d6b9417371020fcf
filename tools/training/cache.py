"""Tokens on disk, memory-mapped: a corpus is tokenised once, and opening it again reads nothing.

A cache entry is a folder named by a digest of all that its tokens depend on: the corpus's SHA-256, the split,
the tokenizer. So an entry is never stale, only unused. It is written beside its place and renamed into it:
an interrupted write leaves no entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.training.corpus import HELD_OUT, Corpus
from tools.training.errors import ProgramError, json_object
from tools.training.tokens import TOKENIZER_FILE, BPETokenizer, ByteTokenizer, Tokenizer

SPLITS = ("training", "validation")
DTYPES = {name: np.dtype(name) for name in ("uint8", "uint16", "uint32")}  # what a tokenizer gives


@dataclass(frozen=True)
class TokenCache:
    """The tokens of both splits as read-only memory maps, with the tokenizer that made them."""

    folder: Path
    tokenizer: Tokenizer
    training: np.ndarray
    validation: np.ndarray


def entry_key(corpus: Corpus, vocab: int | None) -> str:
    tokens = "bytes" if vocab is None else f"bpe {vocab}, other bytes as they are"
    parts = [corpus.sha256, f"every {HELD_OUT}th held out", tokens]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def open_cache(corpus: Corpus, cache_folder: Path, vocab: int | None = None) -> TokenCache:
    """The corpus's tokens, tokenised now if no entry has them. `vocab` None: bytes; else BPE of that size."""
    entry = cache_folder / f"tokens-{entry_key(corpus, vocab)}"
    opened = open_entry(entry, vocab)
    if opened is None:
        shutil.rmtree(entry, ignore_errors=True)
        write_entry(entry, corpus, vocab)
        opened = open_entry(entry, vocab)
    if opened is None:
        raise ProgramError(f"the token cache {entry} was written but cannot be read back; is the disk sound?")
    return opened


def write_entry(entry: Path, corpus: Corpus, vocab: int | None) -> None:
    """Tokenise both splits into a temporary folder and rename it into place."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tokens-", dir=entry.parent))
    except OSError as error:
        raise ProgramError(f"cannot write the token cache {entry.parent}: {error.strerror}") from error
    try:
        tokenizer: Tokenizer = ByteTokenizer()
        if vocab is not None:
            tokenizer = BPETokenizer.train((d.read() for d in corpus.training), vocab)
            tokenizer.save(temporary)
        facts: dict[str, object] = {"corpus": corpus.description, "corpus_sha256": corpus.sha256}
        for split in SPLITS:
            written = facts[split] = write_split(temporary / f"{split}.tokens", corpus, split, tokenizer)
            if written["tokens"] < 2:
                raise ProgramError(f"{corpus.description}: the part for {split} has {written['tokens']} tokens, "
                                   "expected at least 2, to predict one from another; give more text")
        (temporary / "facts.json").write_text(json.dumps(facts, indent=1))
        os.replace(temporary, entry)
    except OSError as error:
        if (entry / "facts.json").exists():
            return  # another process was first with the same content: its entry is as good
        raise ProgramError(f"cannot write the token cache {entry}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_split(path: Path, corpus: Corpus, split: str, tokenizer: Tokenizer) -> dict[str, Any]:
    count, dtype = 0, "uint8"
    with path.open("wb") as file:
        for document in corpus.documents(split):
            tokens = tokenizer.encode(document.read())
            file.write(tokens.tobytes())
            count, dtype = count + len(tokens), tokens.dtype.name
        file.flush()
        os.fsync(file.fileno())
    return {"tokens": count, "dtype": dtype}


def open_entry(entry: Path, vocab: int | None) -> TokenCache | None:
    """Map an entry's files, or None where there is no entry or its files are not as long as it says."""
    try:
        facts = json_object((entry / "facts.json").read_bytes())
        splits = {}
        for split in SPLITS:
            path, dtype = entry / f"{split}.tokens", DTYPES[facts[split]["dtype"]]
            if path.stat().st_size != facts[split]["tokens"] * dtype.itemsize or not facts[split]["tokens"]:
                return None
            splits[split] = np.memmap(path, dtype, mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    tokenizer = ByteTokenizer() if vocab is None else BPETokenizer.load(entry / TOKENIZER_FILE)
    return TokenCache(entry, tokenizer, splits["training"], splits["validation"])
