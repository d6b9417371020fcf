"""Which window of text is read at which step: a pure function of (seed, step, microbatch), with no state to save.

The training tokens are cut into windows of `context` tokens. A pass over them (an epoch) visits every window
once, in an order given by a keyed permutation of the window numbers that is computed, not stored: a Feistel
network (Luby and Rackoff 1988) permutes the numbers below a power of four, and walking its cycle until the
number is a valid window makes it a permutation of exactly the windows. Each epoch starts its windows at
another offset, so the cuts fall elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.training.errors import ProgramError

ROUNDS = 4  # four rounds are a strong pseudo-random permutation
MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014): every bit of the result depends on every bit of value."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def permute(index: int, size: int, key: int) -> int:
    """Where index goes under the permutation of range(size) that key names."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low_bits = (1 << half) - 1
    while True:
        left, right = index >> half, index & low_bits
        for round_number in range(ROUNDS):
            left, right = right, left ^ (mix(mix(key + round_number) ^ right) & low_bits)
        index = (left << half) | right
        if index < size:
            return index


@dataclass(frozen=True)
class Loader:
    """Microbatches of shape (batch, context): `tokens` and, one token further on, `targets`."""

    data: np.ndarray        # one row of tokens, usually a memory map
    context: int            # tokens in a window
    batch: int              # windows in a microbatch
    microbatches: int       # microbatches in a step
    seed: int

    def __post_init__(self) -> None:
        if len(self.data) < 2 * self.context + 1:
            raise ProgramError(f"the training text has {len(self.data)} tokens; a context of {self.context} needs at "
                               f"least {2 * self.context + 1}: give more text or a smaller --context")

    @property
    def windows(self) -> int:
        """Windows in an epoch: as many as fit behind the largest offset, each with its last target."""
        return (len(self.data) - 1) // self.context - 1

    def start(self, position: int) -> int:
        """The token at which the window begins that is visited as number `position` since step 0."""
        epoch, index = divmod(position, self.windows)
        key = mix(mix(self.seed) ^ epoch)
        return key % self.context + permute(index, self.windows, key) * self.context

    def microbatch(self, step: int, microbatch: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), both int64 of shape (batch, context)."""
        first = (step * self.microbatches + microbatch) * self.batch
        starts = [self.start(first + row) for row in range(self.batch)]
        windows = np.stack([self.data[s:s + self.context + 1] for s in starts]).astype(np.int64)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def epoch(self, step: int) -> float:
        """Passes over the training text before this step."""
        return step * self.microbatches * self.batch / self.windows
