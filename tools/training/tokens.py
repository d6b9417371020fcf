"""Text as numbers. Bytes are their own tokens; or, with a vocabulary size, byte-pair encoding (Sennrich et al. 2016).

Both tokenizers map bytes to ids and ids to bytes. A token's bytes may end inside a UTF-8 character, so
decoding for a reader goes through `StreamDecoder`, which holds an unfinished character back.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.files import write_durably
from tools.training.errors import ProgramError, require

TOKENIZER_FILE = "tokenizer.json"  # the Hugging Face layout


class Tokenizer(Protocol):
    name: str  # identifies it in cache keys and reports
    vocab_size: int

    def encode(self, text: bytes) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> bytes: ...
    def byte_lengths(self) -> np.ndarray: ...
    def save(self, folder: Path) -> None: ...

NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # as Python's surrogateescape writes such bytes


class ByteTokenizer:
    """Each byte is its own token: 256 ids, nothing to learn, nothing unknown."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for."""
        return np.ones(256, np.int64)

    def save(self, folder: Path) -> None:
        """Nothing to keep: the absence of a tokenizer.json means bytes."""


class BPETokenizer:
    """Byte-level BPE by the `tokenizers` library, which reads UTF-8. Other bytes are tokens of one byte each: nothing
    is lost."""

    def __init__(self, backend: Any):
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.name = f"bpe-{self.vocab_size}"
        to_byte = {character: byte for byte, character in enumerate(byte_characters())}
        pieces = [backend.id_to_token(i) for i in range(self.vocab_size)]
        self.pieces = [bytes(to_byte[character] for character in piece) for piece in pieces]
        self.of_byte = {piece[0]: i for i, piece in enumerate(self.pieces) if len(piece) == 1}

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
        library = require("tokenizers", "--vocab")
        backend = library.Tokenizer(library.models.BPE())
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                              initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator((text.decode(errors="ignore") for text in texts), trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> BPETokenizer:
        library = require("tokenizers", "a checkpoint with a tokenizer.json")
        try:
            return cls(library.Tokenizer.from_file(str(path)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the library raises bare Exception, or panics, which is not even an Exception
            raise ProgramError(f"cannot read the tokenizer {path}: {error}") from error

    def encode(self, text: bytes) -> np.ndarray:
        ids: list[int] = []
        for i, part in enumerate(NOT_UTF8.split(text.decode(errors="surrogateescape"))):
            ids += [self.of_byte[ord(c) - 0xDC00] for c in part] if i % 2 else self.backend.encode(part).ids
        return np.array(ids, np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self.pieces], np.int64)

    def save(self, folder: Path) -> None:
        write_durably(folder / TOKENIZER_FILE, self.backend.to_str().encode())


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the others get the code points from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a checkpoint folder was written with."""
    path = folder / TOKENIZER_FILE
    return BPETokenizer.load(path) if path.exists() else ByteTokenizer()


class StreamDecoder:
    """Bytes in, text out as soon as its last byte has come; bytes that are no UTF-8 show as U+FFFD."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        return self.decoder.decode(data)

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)
