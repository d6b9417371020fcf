"""Random numbers without sequential state: Philox4x32-10, keyed by (seed, step, microbatch, site).

An element's value depends on its logical index and the key of the draw, and on nothing else: not on threads, on
shards, or on what was drawn before elsewhere. A Generator is such a key with a cursor: each draw takes the next
`site`. A training loop calls `generator.at(step, microbatch)`, so that dropout in microbatch 3 of step 40 is the
same whoever computes it, and computing it again (checkpointing, a resumed run) gives the same mask.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from engine.backend.recording import recording, refuse


class Key(NamedTuple):
    """What identifies one draw: seed is 64 bits, the others 32."""

    seed: int
    step: int
    microbatch: int
    site: int


class Generator:
    """A stream of keys. `key()` gives the next; state_dict() and load_state_dict() save and restore the cursor."""

    def __init__(self, seed: int = 0):
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"Generator: seed is {seed!r}, expected a whole number in [0, 2**64)")
        self.seed, self.step, self.microbatch, self.site = seed, 0, 0, 0
        self.repeats: Generator | None = None  # the one whose draws this one repeats (checkpoint.py)

    def at(self, step: int, microbatch: int = 0) -> Generator:
        """Move to the first site of a step and microbatch; returns itself."""
        refuse("Generator.at")
        for name, value in (("step", step), ("microbatch", microbatch)):
            if not 0 <= value < 2**32:
                raise ValueError(f"Generator.at: {name} is {value!r}, expected a whole number in [0, 2**32)")
        self.step, self.microbatch, self.site = step, microbatch, 0
        return self

    def key(self) -> Key:
        """The key of the next draw; advances the cursor."""
        if (now := recording()) is not None and now.watcher is not None:
            now.watcher.drawn(self)
        key = Key(self.seed, self.step, self.microbatch, self.site)
        self.site += 1
        return key

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "step": self.step, "microbatch": self.microbatch, "site": self.site}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.step, self.microbatch, self.site = (
            state[name] for name in ("seed", "step", "microbatch", "site"))

    def __repr__(self) -> str:
        return f"Generator(seed={self.seed}, step={self.step}, microbatch={self.microbatch}, site={self.site})"


_process_wide = Generator(0)
_current: ContextVar[Generator | None] = ContextVar("generator", default=None)


def default_generator() -> Generator:
    """The generator that draws use when none is passed: the innermost `with eg.seed(n)`, else one seeded with 0."""
    return _current.get() or _process_wide


@contextmanager
def seed(n: int | Generator) -> Iterator[Generator]:
    """`with eg.seed(n):` every draw inside comes from Generator(n), the same each time (or from a given Generator)."""
    generator = n if isinstance(n, Generator) else Generator(n)
    token = _current.set(generator)
    try:
        yield generator
    finally:
        _current.reset(token)
