"""Training in one loop, without the protocol: what every version must be, bit for bit.

A run in BSP or SSP is a function of its *course*: for each clock, the version it was computed on and the microbatches
that make it up. In BSP the course is always the same one. With compression, what each microbatch has left to say is
part of the state; with a local rule, so is where each of them stands and its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from engine.backend import Array
from engine.optim.accumulator import Accumulator
from engine.optim.clip import sums_of_squares
from engine.sharder.codecs import codec_of
from engine.sharder.memory import Checkpoint
from engine.sharder.setup import Setup

Values = Mapping[str, np.ndarray]
Gradient = Callable[[Values, int, int], "tuple[Values, float, float]"]
Course = tuple[tuple[int, tuple[int, ...]], ...]


class Plain:
    """The states that training with `gradient` goes through from `origin` on; each is computed once."""

    def __init__(self, setup: Setup, origin: Checkpoint, gradient: Gradient):
        self.setup, self.origin, self.gradient, self.k = setup, origin, gradient, setup.k
        self.codec = codec_of(setup.compress) if setup.compress else None
        self.states: dict[Course, Checkpoint] = {(): origin}
        self.left: dict[tuple[Course, int, str], Array] = {}  # to be said after a course, by microbatch and parameter
        self.local: dict[tuple[Course, int, str], dict[str, Array]] = {}  # state of the local rule after it

    def after(self, course: Course) -> Checkpoint:
        """The state after the clocks of this course."""
        found = self.states.get(course)
        if found is None:
            found = self.states[course] = self._next(self.after(course[:-1]), course)
        return found

    def _next(self, before: Checkpoint, course: Course) -> Checkpoint:
        setup, k, start = self.setup, self.k, self.origin.clock
        version, microbatches = course[-1]
        read = self.after(course[:version - start]).parameters
        accumulator = Accumulator(len(microbatches), k)
        for rank, index in enumerate(microbatches):
            place = read if setup.local is None else self._place(course, index, read)
            gradients, loss, tokens = self.gradient(place, before.clock, index)
            flat = {name: self._array(gradients[name]) for name in setup.shapes}
            if setup.local is not None:
                flat = self._stepped(course, index, place, flat, tokens)
            arriving = [self._arriving(course, index, name, flat[name]) for name in setup.shapes]
            accumulator.add(rank, arriving, loss, tokens)
        scale, total = 1.0, accumulator.total()
        divisor = total.tokens if setup.local is None else float(len(microbatches))
        means = [k.map("divide", g, k.constant(divisor, g.dtype)) for g in total.gradients]
        if setup.clip_norm is not None and setup.local is None:
            scale = self._clipped(means)
        return self.update(before, dict(zip(setup.shapes, means)), scale, before.clock - version)

    def _clipped(self, means: Iterable[Array]) -> float:
        """What clips a gradient."""
        return self.setup.clip(np.concatenate([sums_of_squares(self.k, g).data for g in means]))[1]

    def _place(self, course: Course, index: int, read: Values) -> Values:
        """Where a microbatch stands: p = θ − e."""
        k, before = self.k, course[:-1]
        return {name: value if (before, index, name) not in self.left else
                k.map("subtract", self._array(value), self.left[before, index, name]).data.reshape(value.shape)
                for name, value in read.items()}

    def _stepped(self, course: Course, index: int, place: Values, sums: Mapping[str, Array], tokens: float
                 ) -> dict[str, Array]:
        """p − p′ of the local rule's update."""
        k, setup, clock = self.k, self.setup, self.origin.clock + len(course)
        means = {name: k.map("divide", g, k.constant(tokens, g.dtype)) for name, g in sums.items()}
        scale = 1.0 if setup.clip_norm is None else self._clipped(means.values())
        steps = {}
        for name, mean in means.items():
            old = self._array(place[name])
            state = self.local.get((course[:-1], index, name)) or setup.local.init(k, old.size, old.dtype)
            after, new = {slot: k.empty_like(s) for slot, s in state.items()}, k.empty_like(old)
            clipped = mean if scale == 1.0 else k.map("multiply", mean, k.constant(scale, mean.dtype))
            setup.local_update_at(clock, name)(k, new, after, old, state, clipped, clock)
            self.local[course, index, name], steps[name] = after, k.map("subtract", old, new)
        return steps

    def _arriving(self, course: Course, index: int, name: str, gradient: Array) -> Array:
        """What arrives of a gradient: p of x = g + e, and e ← x − p."""
        if self.codec is None:
            return gradient
        k, before = self.k, self.left.get((course[:-1], index, name))
        x = gradient if before is None else k.map("add", gradient, before)
        arriving = self.codec.write(k, x).decode(k, x.size, x.dtype)
        self.left[course, index, name] = k.map("subtract", x, arriving)
        return arriving

    def _array(self, values: Any) -> Array:
        return self.k.array(np.asarray(values).reshape(-1))

    def update(self, before: Checkpoint, gradients: Mapping[str, Array], scale: float, staleness: int) -> Checkpoint:
        """One update of every parameter."""
        setup, k, parameters = self.setup, self.k, {}
        slots: dict[str, dict[str, np.ndarray]] = {slot: {} for slot in setup.rule.slots}
        step = before.clock + 1
        for name, gradient in gradients.items():
            if scale != 1.0:
                gradient = k.map("multiply", gradient, k.constant(scale, gradient.dtype))
            old = self._array(before.parameters[name])
            state = setup.rule.init(k, old.size, old.dtype)
            for slot, saved in before.slots.items():
                if saved is not None:
                    state[slot] = self._array(saved[name])
            new = k.empty_like(old)
            setup.update_at(step, name, staleness)(k, new, state, old, state, gradient, step)
            parameters[name] = new.data.reshape(setup.shapes[name])
            for slot in slots:
                slots[slot][name] = state[slot].data.reshape(setup.shapes[name])
        return Checkpoint(step, parameters, slots)
