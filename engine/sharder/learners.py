"""What workers keep between clocks, by the setup: what a codec has left to say, and the state of local rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.sharder.compression import Compression, codec_for
from engine.sharder.local import LocalSteps
from engine.sharder.partition import Parameter
from engine.sharder.setup import Setup
from engine.sharder.shelves import Remembered, Shelf


class Learners:
    """goes_back: whether a shard that is lost takes all back to a snapshot; shelves: by name, where what is kept lies;
    None: in memory

    Raises ValueError as codec_for does.
    """

    def __init__(self, setup: Setup, goes_back: bool, shelves: Callable[[str], Shelf] | None = None):
        every = setup.save_every if goes_back else None

        def keeping(name: str) -> tuple[Any, ...]:
            return setup.dtype, setup.consistency.staleness, every, shelves(name) if shelves else None

        self.compression: Compression | None = None
        self.local: LocalSteps | None = None
        self.memories: list[Remembered] = []
        if setup.compress is not None:
            self.compression = Compression(setup.k, codec_for(setup.compress, setup.rule), *keeping("residual"))
            self.memories.append(self.compression)
        if setup.local is not None:
            slots = {slot: Remembered(f"local_{slot}", setup.k, *keeping(f"local_{slot}"))
                     for slot in setup.local.slots}
            self.local = LocalSteps(setup, slots, self.compression)
            self.memories.extend(slots.values())

    def state(self, parameters: Mapping[str, Parameter], clock: int) -> dict[str, np.ndarray]:
        """"residual.<microbatch>/<parameter>", "local_<slot>.<microbatch>/<parameter>" -> what a clock begins with,
        flat; copies."""
        return {key: value for memory in self.memories for key, value in memory.state(parameters, clock).items()}

    def split(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The part of a state that is theirs, and the rest."""
        own = {key: value for key, value in state.items() if any(memory.owns(key) for memory in self.memories)}
        return own, {key: value for key, value in state.items() if key not in own}

    def load(self, parameters: Mapping[str, Parameter], state: Mapping[str, Any], clock: int) -> None:
        """Go on with a clock from a state(). Raises ValueError with one line, changing nothing, if it does not fit."""
        kept = [memory.checked(parameters, {key: value for key, value in state.items() if memory.owns(key)})
                for memory in self.memories]
        for memory, own in zip(self.memories, kept, strict=True):
            memory.replace(parameters, own, clock)


def expect_repeatable(driver: str, setup: Setup) -> None:
    """Raise ValueError, with one line, if a driver in which workers die would have residuals that depend on it."""
    consistency = setup.consistency
    if setup.compress is not None and (consistency.asynchronous or consistency.backups):
        which = "asp" if consistency.asynchronous else "has backups"
        raise ValueError(f"{driver}: compress is {setup.compress!r} and consistency {which}: what a microbatch has "
                         "left to say would depend on who died when; expected bsp or ssp, without backups")
