"""Text from a model, a piece at a time, as soon as the bytes of a character are complete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import engine as eg
from tools.training.errors import ProgramError
from tools.training.tokens import StreamDecoder, Tokenizer


def generate_text(model: Any, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, *, temperature: float = 1.0,
                  top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
                  stop: str | None = None, seed: int = 0) -> Iterator[str]:
    """Yield pieces of the continuation of `prompt`, which come before the first occurrence of `stop`."""
    ids = tokenizer.encode(prompt.encode(errors="surrogateescape"))  # bytes of a command line that are no UTF-8
    if not len(ids):
        raise ProgramError("the prompt is empty; give at least one character for the model to go on from")
    ids = ids[-model.config.context_length:]  # the model looks back no further
    tokens = model.generate(ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                            repetition_penalty=repetition_penalty, generator=eg.Generator(seed))
    yield from until((tokenizer.decode([token]) for token in tokens), stop)


def until(pieces: Iterator[bytes], stop: str | None) -> Iterator[str]:
    """Decode bytes as UTF-8, ending before the first occurrence of `stop`, which may come in several pieces."""
    decoder, held = StreamDecoder(), ""
    for piece in pieces:
        held += decoder.push(piece)
        if stop:
            if stop in held:
                yield held[:held.index(stop)]
                return
            keep = overlap(held, stop)
        else:
            keep = 0
        if len(held) > keep:
            yield held[:len(held) - keep]
            held = held[len(held) - keep:]
    yield held + decoder.finish()


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of text may be the beginning of stop: they are held back."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def visible(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters other than tab and newline as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\t\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
