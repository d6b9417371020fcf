"""Local steps: a worker updates by itself, and sends where that has led it.

A codec that sends little, as topk:0.01 does, sends an element of a gradient seldom, and by then much of what it sends
is old: it was computed where the parameters were. With a local rule each microbatch of a clock is a learner of its own,
which stands where its own steps have led it, whether they were sent already or not. For the server's parameters θ,
what the microbatch has left to say e, and its local state s, each clock

    p     = θ − e                         where it stands
    g     = ∇ of its mean loss at p       clipped to clip_norm, if there is one
    p′, s ← local rule(p, s, g)           as AdamW
    d     = p − p′                        its step, which is pushed as a gradient would be
    q, e  ← what is sent of d + e, and the rest (compression.py; without a codec q = d and e = 0)
    θ     ← rule(θ, mean of all q)        of the server; plain SGD with learning rate η: θ − η · mean(q)

With one microbatch, plain SGD and η = 1 the learner walks as the local rule alone does, whatever the codec leaves out,
up to roundings; with M of them each sees the steps of the others when they are sent. A learner's gradient has the noise
of one microbatch, not of M, and by its √v Adam makes steps that are smaller than those of the mean gradient would be:
η between 1 and √M or a little more makes up for that.

The state s is remembered by microbatch, as e is (shelves.py): another array for each of the rule's slots.

Stich 2018, arXiv:1805.09767 (local steps); Basu, Data, Karakus, Diggavi 2019, arXiv:1906.02367 (their difference sent
with error feedback); Douillard et al. 2023, arXiv:2311.08105 (AdamW inside, another optimizer outside).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.backend import Array
from engine.optim.clip import sums_of_squares
from engine.rowsparse import RowSparse
from engine.sharder.compression import Compression
from engine.sharder.setup import Setup
from engine.sharder.shelves import Remembered, whole


class LocalSteps:
    """The learners that the microbatches are. slots: of the local rule's state, by name; left: what was not sent"""

    def __init__(self, setup: Setup, slots: Mapping[str, Remembered], left: Compression | None):
        self.setup, self.k, self.slots, self.left = setup, setup.k, slots, left

    def place(self, clock: int, microbatch: int, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """name -> where a microbatch stands in a clock, p = θ − e, for the θ that was pulled for it."""
        left, known = self.left, self.setup.partition(1).parameters
        if left is None:
            return dict(parameters)
        place = {}
        for name, value in parameters.items():
            e = left.before(clock, microbatch, whole(known[name]))
            theta = self.k.from_numpy(value.reshape(-1))
            place[name] = value if e is None else self.k.to_numpy(self.k.map("subtract", theta, e)).reshape(value.shape)
        return place

    def step(self, clock: int, microbatch: int, place: Mapping[str, np.ndarray],
             gradients: Mapping[str, Array | RowSparse], tokens: float, term: int = 0, floor: int = 0
             ) -> dict[str, Array]:
        """name -> d = p − p′, flat, of the gradients of a loss sum over so many tokens. floor: as keep() has it."""
        setup, k, known = self.setup, self.k, self.setup.partition(1).parameters
        if not tokens:  # it has seen nothing
            return {name: k.zeros((known[name].size,), setup.dtype) for name in gradients}
        flat = {name: Array(g.dense().array.data.reshape(-1), g.dtype) if isinstance(g, RowSparse) else g
                for name, g in gradients.items()}
        scale = 1.0
        if setup.clip_norm is not None:
            _, scale = setup.clip(np.concatenate([sums_of_squares(k, g, tokens).data for g in flat.values()]))
        steps = {}
        for name, gradient in flat.items():
            piece, old = whole(known[name]), k.from_numpy(place[name].reshape(-1))
            found = {slot: memory.before(clock, microbatch, piece) for slot, memory in self.slots.items()}
            state = {slot: k.zeros((piece.size,), old.dtype) if s is None else s for slot, s in found.items()}
            new, after = k.empty_like(old), {slot: k.empty_like(s) for slot, s in state.items()}
            setup.local_update_at(clock + 1, name)(k, new, after, old, state, gradient, clock + 1, tokens, scale)
            steps[name] = k.map("subtract", old, new)
            for slot, kept in after.items():
                if found[slot] is not None:  # else nobody waits for this
                    self.slots[slot].keep(clock, microbatch, piece, kept, term, floor)
        return steps
