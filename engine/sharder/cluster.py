"""What every driver runs: the parameters and optimizer state over some shards, and the machines that work on them.

A Cluster holds what lasts (memory); the machines of the protocol are made anew for each run on top of it, with every
worker in a new epoch. Between runs, and while a driver stands between two clocks, the memory of all shards is of one
version, and state() and load() read and replace it. They speak of whole parameters by name, so a state that was saved
with 3 shards loads into 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.backend import Array, get_backend
from engine.dtypes import as_dtype
from engine.optim import Rule
from engine.sharder.binding import named
from engine.sharder.consistency import Consistency, Damping
from engine.sharder.coordinator import Coordinator
from engine.sharder.learners import Learners
from engine.sharder.memory import Checkpoint, gather, place
from engine.sharder.messages import Term
from engine.sharder.partition import Partition
from engine.sharder.setup import Hyper, Setup, as_hyper
from engine.sharder.shard import Shard
from engine.sharder.versions import Counter, Traffic, Versions, assemble
from engine.sharder.worker import Worker


class Cluster:
    """Parameters under an update rule, in `shards` shards, trained by `workers` workers.

    parameters:   a module, or a mapping name -> Tensor, Array or NumPy array; of one floating dtype. They are copied.
    rule:         an update rule (engine.optim.rules), of the server
    microbatches: how many make one clock; with them fixed, BSP's results do not depend on shards or workers
    clip_norm:    the mean gradient of a clock is clipped to this global norm; None: it is not
    hyper:        hyper-parameters that override the rule's own: a dict, or a pure function (step, parameter name) ->
                  dict for schedules and parameter groups, where step counts updates from 1; with `local`, of that rule
    consistency:  "bsp", "ssp:3" (a staleness of at most 3), "asp", or a Consistency
    damping:      damping(staleness) -> factor on the learning rate of late updates, as inverse_staleness
    placement:    "ranges" or "hashing" (partition.py)
    compress:     how gradients travel, with error feedback: "fp16", "bf16", "int8", "topk:0.01", "1bit" (codecs.py);
                  None: as they are
    local:        a rule by which workers update for themselves; what they push, and `rule` is given the mean of, is
                  where that has led them (local.py). Programs call client.localize(). Not in asp, with backups, or
                  with zero=3; with zero=2 gradients leave when all are there
    save_every:   so many clocks lie between two snapshots, in drivers that keep any; 0: there are none
    zero:         the stage of ZeRO: what workers do not hold. 1: the optimizer's state, which is always the shards';
                  2: nor all gradients, which client.backward() sends as soon as they are final; 3: nor all parameters,
                  which are pulled when they are used, and let go of (not in asp)
    """

    shared = True  # whether all shards write into one buffer

    def __init__(self, parameters: Any, rule: Any, *, microbatches: int, shards: int = 1, workers: int = 1,
                 clip_norm: float | None = None, hyper: Mapping[str, Any] | Hyper | None = None,
                 consistency: Consistency | str = "bsp", damping: Damping | None = None, placement: str = "ranges",
                 compress: str | None = None, local: Any = None, save_every: int = 0, zero: int = 2,
                 device: str = "cpu"):
        if isinstance(consistency, str):
            consistency = Consistency.parse(consistency)
        for name, value, holds, expected in (
                *((name, value, isinstance(value, int) and value >= 1, "a whole number of at least 1")
                  for name, value in (("microbatches", microbatches), ("shards", shards), ("workers", workers))),
                ("save_every", save_every, isinstance(save_every, int) and save_every >= 0,
                 "a whole number of at least 0"),
                ("rule", rule, hasattr(rule, "apply"), "an update rule, as optim.AdamWRule()"),
                ("local", local, local is None or hasattr(local, "apply"), "an update rule, as optim.AdamWRule(), or "
                 "None"),
                ("clip_norm", clip_norm, clip_norm is None or
                 (isinstance(clip_norm, (int, float, np.number)) and clip_norm > 0), "a positive number or None"),
                ("hyper", hyper, isinstance(hyper, (Mapping, type(None))) or callable(hyper),
                 "a dict, a function or None"),
                ("consistency", consistency, isinstance(consistency, Consistency),
                 "bsp, ssp:3, asp or a Consistency"),
                ("damping", damping, damping is None or callable(damping), "a function or None"),
                ("placement", placement, placement in ("ranges", "hashing"), "ranges or hashing"),
                ("compress", compress, isinstance(compress, (str, type(None))), "the name of a codec or None"),
                ("zero", zero, zero in (1, 2, 3), "1, 2 or 3")):
            if not holds:
                raise ValueError(f"ParameterServer: {name} is {value!r:.100}, expected {expected}")
        taught = rule if local is None else local
        if isinstance(hyper, Mapping) and isinstance(taught, Rule):
            taught.with_(**hyper)  # refuses what it does not know
        if local is not None and (consistency.asynchronous or consistency.backups or zero == 3):
            which = "asp" if consistency.asynchronous else "with backups" if consistency.backups else "with zero 3"
            raise ValueError(f"ParameterServer: local is {local!r:.100} and the training {which}; expected bsp or ssp, "
                             "no backups and zero 1 or 2: every step of a microbatch counts, and needs all parameters")
        if consistency.asynchronous and clip_norm is not None:
            raise ValueError("ParameterServer: clip_norm needs the whole gradient of a clock, which asp never sees")
        if consistency.asynchronous and zero == 3:
            raise ValueError("ParameterServer: zero is 3, and what is pulled again for the backward pass must be what "
                             "the forward pass had, which asp does not keep")
        if consistency.backups >= microbatches:
            raise ValueError(f"ParameterServer: backups is {consistency.backups}, expected fewer than the "
                             f"{microbatches} microbatches of a clock")
        self.rule, self.workers = rule, workers
        self.k, self.device = get_backend(device), device
        self.copied, self.pushed = Counter(), Traffic()
        self.returns = 0  # machines that were lost and came back, in drivers where any can be lost
        self.epoch = -1  # of the workers of the latest run
        self.active = False  # whether a run has begun and not ended
        self.busy = False  # whether parameters may be changing at this moment
        values = {name: to_numpy(value) for name, value in named(parameters).items()}
        self.dtype = as_dtype(one_dtype(values))
        self.setup = Setup(
            shapes={name: value.shape for name, value in values.items()}, dtype=self.dtype, k=self.k, rule=rule,
            hyper=as_hyper(hyper), microbatches=microbatches, clip_norm=clip_norm, consistency=consistency,
            damping=damping, placement=placement, compress=compress, local=local,
            zero=zero if local is None else 1,
            save_every=0 if self.shared else save_every)  # what shares its memory lives and dies together
        self.learners = Learners(self.setup, goes_back=False)
        self.term = Term(0, shards, 0)
        self._place(Checkpoint(0, values, dict.fromkeys(rule.slots)))

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def partition(self) -> Partition:
        return self.setup.partition(self.term.shards)

    def _place(self, checkpoint: Checkpoint) -> None:
        """Make the memory of every shard."""
        partition, older = self.partition, self.setup.consistency.staleness
        number, shards = self.setup.updates(checkpoint.clock), self.term.shards
        if self.shared and not self.setup.consistency.asynchronous:
            one = Versions(self.k, partition.size, self.dtype, number, writers=shards, shared=True, older=older)
            versions = [one] * shards
        else:  # in ASP each shard has versions of its own
            versions = [Versions(self.k, size, self.dtype, number, older=older) for size in partition.sizes]
        self.memories = [place(self.k, self.rule, pieces, of_shard, checkpoint)
                         for pieces, of_shard in zip(partition.pieces, versions)]

    @property
    def clock(self) -> int:
        """How many clocks are done. Raises RuntimeError after an update failed in its middle."""
        versions = {memory.version for memory in self.memories}
        clocks = {version // self.setup.updates(1) for version in versions}
        if len(versions) != 1 or any(memory.torn for memory in self.memories):
            raise RuntimeError(f"ParameterServer: the update of clock {min(clocks)} failed before every shard had "
                               "done it; load() a saved state")
        return clocks.pop()

    def parameters(self) -> dict[str, np.ndarray]:
        """name -> the current parameters, read-only. They stay as they are when training goes on."""
        values = tuple(memory.versions.current for memory in self.memories)
        return assemble(self.partition, values, self.k, self.copied)

    def checkpoint(self) -> Checkpoint:
        """Copies of everything a resumed run needs, whole."""
        return gather(self.partition, self.clock, [memory.versions.current for memory in self.memories],
                      [memory.slots for memory in self.memories], self.rule.slots)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, independent of the number of shards and workers; arrays are copies.

        {"clock": int, "parameters/<name>": array, "<slot>/<name>": array for each slot of the rule, and with
        compression "residual.<microbatch>/<name>": flat array, and with a local rule "local_<slot>.<microbatch>/<name>"
        for each slot of that}
        """
        if self.busy:
            raise RuntimeError("state: a clock is running; ask between two clocks, in the loop over run()")
        saved = self.checkpoint()
        kinds = {"parameters": saved.parameters, **saved.slots}
        return {"clock": saved.clock, **{f"{kind}/{name}": array for kind, values in kinds.items()
                                         for name, array in (values or {}).items()},
                **self.learners.state(self.partition.parameters, saved.clock)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state(). Raises ValueError with one line, and changes nothing, if it does not fit."""
        if self.active:
            raise RuntimeError("load: training is running; end the loop over run() first")
        clock = state.get("clock", 0)
        if np.shape(clock) or np.asarray(clock).dtype.kind not in "iu" or clock < 0:
            raise ValueError(f"load: 'clock' is {clock!r:.100}, expected a whole number of at least 0")
        kept, state = self.learners.split(state)
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
        self.learners.load(self.partition.parameters, kept, int(state["clock"]))
        self._place(Checkpoint(int(state["clock"]), values, dict(zip(self.rule.slots, slots))))

    def reshard(self, shards: int) -> None:
        """Go on with so many shards, to the same bits."""
        self._check_shards(shards)
        if self.active:
            raise RuntimeError("reshard: training is running; end the loop over run() first")
        self._split(shards)

    def _split(self, shards: int) -> None:
        saved = self.checkpoint()
        self.term = Term(self.term.number, shards, saved.clock)
        self._place(saved)

    @staticmethod
    def _check_shards(shards: int) -> None:
        if not isinstance(shards, int) or shards < 1:
            raise ValueError(f"reshard: shards is {shards!r}, expected a whole number of at least 1")

    # ── machines ────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def check_run(clocks: int | None, stride: int) -> None:
        """Raise ValueError unless a run may have so many clocks, and such a stride."""
        for name, value, least, rest in (("clocks", clocks, 0, " or None"), ("stride", stride, 1, "")):
            if value is None and rest:
                continue
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"run: {name} is {value!r}, expected a whole number of at least {least}{rest}")

    def start(self, clocks: int | None = None) -> tuple[Coordinator, list[Shard], list[Worker]]:
        """The machines of a new run of so many clocks. Whatever an interrupted run had not committed is forgotten."""
        if self.active:
            raise RuntimeError("run: training is running already; end the loop over run() first")
        self.term = Term(self.term.number + 1, self.term.shards, self.clock)
        self.epoch += 1
        for memory in self.memories:
            memory.versions.discard()
        shards = [Shard(s, self.setup, self.term, memory) for s, memory in enumerate(self.memories)]
        workers = [self.make_worker(w, self.epoch) for w in range(self.workers)]
        coordinator = self.make_coordinator(None if clocks is None else self.clock + clocks)
        self.active = True
        return coordinator, shards, workers

    def make_worker(self, number: int, epoch: int) -> Worker:
        return Worker(number, epoch, self.setup, self.term, self.learners)

    def make_coordinator(self, last: int | None = None) -> Coordinator:
        return Coordinator(self.setup, self.term, self.workers, last)


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
