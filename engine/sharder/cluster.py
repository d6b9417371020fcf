"""What every driver runs: the parameters and optimizer state over some shards, and the machines that work on them.

A Cluster holds what lasts (memory); the machines of the protocol are made anew for each run on top of it, with every
worker in a new epoch. Between runs, and while a driver stands between two clocks, the memory of all shards is of one
version, and state() and load() read and replace it. They speak of whole parameters by name, so a state that was saved
with 3 shards loads into 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.backend import Array, get_backend
from engine.dtypes import as_dtype
from engine.optim import clip
from engine.sharder.binding import named
from engine.sharder.coordinator import Coordinator
from engine.sharder.partition import Partition, Piece
from engine.sharder.shard import Hyper, Memory, Shard
from engine.sharder.versions import Counter, Versions, assemble
from engine.sharder.worker import Worker


class Cluster:
    """Parameters under an update rule, in `shards` shards, trained by `workers` workers in BSP.

    parameters:   a module, or a mapping name -> Tensor, Array or NumPy array; of one floating dtype. They are copied.
    rule:         an update rule (engine.optim.rules)
    microbatches: how many make one clock; with them fixed, results do not depend on shards or workers
    clip_norm:    the mean gradient of a clock is clipped to this global norm; None: it is not
    hyper:        hyper-parameters that override the rule's own: a dict, or a pure function (step, parameter name) ->
                  dict for schedules and parameter groups, where step counts from 1
    """

    shared = True  # whether all shards write into one buffer

    def __init__(self, parameters: Any, rule: Any, *, microbatches: int, shards: int = 1, workers: int = 1,
                 clip_norm: float | None = None, hyper: Mapping[str, Any] | Hyper | None = None, device: str = "cpu"):
        for name, value in (("microbatches", microbatches), ("shards", shards), ("workers", workers)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ParameterServer: {name} is {value!r}, expected a whole number of at least 1")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"ParameterServer: clip_norm is {clip_norm!r}, expected a positive number or None")
        self.rule, self.microbatches, self.workers, self.clip_norm = rule, microbatches, workers, clip_norm
        self.hyper: Hyper = hyper if callable(hyper) else lambda step, name: fixed
        fixed = {} if hyper is None or callable(hyper) else dict(hyper)
        self.k, self.device = get_backend(device), device
        self.copied = Counter()
        self.epoch = -1  # of the workers of the latest run
        self.active = False  # whether a run has begun and not ended
        self.busy = False  # whether a clock of it is running at this moment
        values = {name: to_numpy(value) for name, value in named(parameters).items()}
        self.dtype = as_dtype(one_dtype(values))
        self.partition = Partition({name: value.shape for name, value in values.items()}, shards)
        zeros = dict.fromkeys(rule.slots)
        self._place(0, values, zeros)

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────

    def _place(self, clock: int, values: Mapping[str, np.ndarray],
               slots: Mapping[str, Mapping[str, np.ndarray] | None]) -> None:
        """Make the memory of every shard: parameters, and each slot (None: as the rule begins)."""
        k, dtype, ranges = self.k, self.dtype, self.partition.ranges
        if self.shared:
            versions = [Versions(k, 0, self.partition.size, dtype, clock, writers=len(ranges))] * len(ranges)
        else:
            versions = [Versions(k, begin, end - begin, dtype, clock) for begin, end in ranges]
        self.memories = []
        for pieces, of_shard in zip(self.partition.pieces, versions):
            fresh = [self.rule.init(k, piece.size, dtype) for piece in pieces]
            own = {slot: tuple(state[slot] for state in fresh) for slot in self.rule.slots}
            for i, piece in enumerate(pieces):
                self._write(of_shard.current.piece(piece), piece, values)
                for slot, saved in slots.items():
                    if saved is not None:
                        self._write(own[slot][i], piece, saved)
            self.memories.append(Memory(of_shard, own, clock))

    def _write(self, target: Array, piece: Piece, source: Mapping[str, np.ndarray]) -> None:
        elements = np.ascontiguousarray(source[piece.parameter.name]).reshape(-1)[piece.start:piece.stop]
        self.k.cast(target, self.k.from_numpy(elements))

    @property
    def clock(self) -> int:
        """How many clocks are done. Raises RuntimeError after an update failed in its middle."""
        versions = {memory.version for memory in self.memories}
        if len(versions) != 1 or any(memory.torn for memory in self.memories):
            raise RuntimeError(f"ParameterServer: the update of clock {min(versions)} failed before every shard had "
                               "done it; load() a saved state")
        return versions.pop()

    def parameters(self) -> dict[str, np.ndarray]:
        """name -> the current parameters, read-only. They stay as they are when training goes on."""
        values = tuple(memory.versions.current for memory in self.memories)
        return assemble(self.partition, values, self.k, self.copied)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, independent of the number of shards and workers; arrays are copies.

        {"clock": int, "parameters/<name>": array, "<slot>/<name>": array for each slot of the rule}
        """
        if self.busy:
            raise RuntimeError("state: a clock is running; ask between two clocks, in the loop over run()")
        state: dict[str, Any] = {"clock": self.clock}
        state.update({f"parameters/{name}": value.copy() for name, value in self.parameters().items()})
        for slot in self.rule.slots:
            for name, p in self.partition.parameters.items():
                parts = [memory.slots[slot][i].data for pieces, memory in zip(self.partition.pieces, self.memories)
                         for i, piece in enumerate(pieces) if piece.parameter is p]
                whole = np.concatenate(parts) if parts else np.empty(0, self.dtype.numpy)
                state[f"{slot}/{name}"] = whole.reshape(p.shape)
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state(). Raises ValueError with one line, and changes nothing, if it does not fit."""
        if self.active:
            raise RuntimeError("load: training is running; end the loop over run() first")
        kinds = ("parameters", *self.rule.slots)
        expected = {f"{kind}/{name}": p.shape for kind in kinds for name, p in self.partition.parameters.items()}
        difference = state.keys() ^ (expected.keys() | {"clock"})
        if difference:
            name = min(difference)
            raise ValueError(f"load: {name!r} is {'not expected' if name in state else 'missing'}; the state of "
                             f"{type(self.rule).__name__} has clock and {', '.join(kinds)} of every parameter")
        for name, shape in expected.items():
            if np.shape(state[name]) != shape or np.asarray(state[name]).dtype != self.dtype.numpy:
                raise ValueError(f"load: {name!r} is {np.asarray(state[name]).dtype} {np.shape(state[name])}, "
                                 f"expected {self.dtype} {shape}")
        values, *slots = ({name: np.asarray(state[f"{kind}/{name}"]) for name in self.partition.parameters}
                          for kind in kinds)
        self._place(int(state["clock"]), values, dict(zip(self.rule.slots, slots)))

    # ── machines ────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> tuple[Coordinator, list[Shard], list[Worker]]:
        """The machines of a new run. Whatever an interrupted run had not committed is forgotten."""
        if self.active:
            raise RuntimeError("run: training is running already; end the loop over run() first")
        self.epoch += 1
        for memory in self.memories:
            memory.versions.discard()
        shards = [self.make_shard(s) for s in range(self.partition.shards)]
        workers = [self.make_worker(w, self.epoch) for w in range(self.workers)]
        coordinator = self.make_coordinator()
        self.active = True
        return coordinator, shards, workers

    def make_shard(self, number: int) -> Shard:
        return Shard(number, self.partition, self.memories[number], self.rule, self.hyper, self.k, self.microbatches,
                     clip=self.clip_norm is not None)

    def make_worker(self, number: int, epoch: int) -> Worker:
        return Worker(number, epoch, self.partition)

    def make_coordinator(self) -> Coordinator:
        clipping: Callable[[np.ndarray], tuple[float, float]] | None = None
        if self.clip_norm is not None:
            clipping = self._clip
        return Coordinator(self.partition.shards, self.workers, self.microbatches, self.clock, clipping)

    def _clip(self, squares: np.ndarray) -> tuple[float, float]:
        assert self.clip_norm is not None
        norm = clip.norm_of_blocks(self.k, squares)
        return norm, clip.clip_scale(norm, self.clip_norm)


def to_numpy(value: Any) -> np.ndarray:
    """The elements of a Tensor, an Array or anything NumPy understands."""
    return value.data if isinstance(value, Array) else np.asarray(value)


def one_dtype(values: Mapping[str, np.ndarray]) -> np.dtype:
    """The dtype all parameters share. Raises ValueError if there is none."""
    if not values:
        raise ValueError("ParameterServer: got no parameters")
    first, dtype = next((name, value.dtype) for name, value in values.items())
    for name, value in values.items():
        if value.dtype != dtype or dtype.kind != "f":
            raise ValueError(f"ParameterServer: {name!r} is {value.dtype}, and {first!r} is {dtype}; expected one "
                             "floating dtype for all parameters")
    return dtype
