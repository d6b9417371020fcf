"""The cost model: from what a cluster is to what everything in it weighs and takes.

P parameters of 4 bytes, W workers, S shards, M microbatches a step; shard s owns n elements (whole blocks of 4096, as
the partition does). B: bytes a second of a node's link, each way; L: latency; A: bytes a second of a node's memory; k:
numbers that the optimizer keeps for each parameter (0, 1, 2); x: the straggler's factor, drawn for each microbatch.

    work      = t x                     t given, or 6 P tokens / FLOP/s (Kaplan et al. 2020, arXiv:2001.08361, § 2.1)
    push      = 4 n, or what the codec writes (engine/sharder/codecs.py), to each shard for each microbatch
    pull      = 4 n                     from each shard to each worker, once a step
    sum       = 12 n / A                of a push: two numbers are read, one written
    update    = 4 n (3 + 2 k) / A       θ and g read, θ written; each of the k read and written
    snapshot  = 4 n (1 + k)
    messages    share links as fluids (engine/sharder/drivers/network.py); deciding and acknowledging take L each

These go into the simulator, which runs the protocol's own machines (engine/sharder/drivers/priced.py): what comes of
them is not computed here. Where all is even it is a closed form. BSP, no stragglers, every machine a node, M = W, no
overlap:

    step = pull + t + push + W sum + update + 7 L,   with   pull = W 4 n / B  and  push = W push / B   if W ≥ S

(the shard's link is full; with W < S the worker's is: Σ over the shards / B). 7 L: Begin, Pull, Parameters, Push,
Reduced, Apply, Applied.

Memory, in bytes, of what grows with the model; a program's own activations come on top:

    a worker  4 P parameters, 4 P gradients, and with compression, for each microbatch, 4 P (s + 2) left to say
    a shard   4 n (2 + s) versions (the current, the next, and those that clocks of SSP(s) still compute on),
              4 n k, and 4 n (⌈log₂ M⌉ + 1)(s + 1) of sums in the making; with backups the M − b pushes that are held

Failures. Nodes die independently, each after `mtbf` seconds on average, and are back `restart` seconds later. What a
death costs is what the end of a training is later for it, the same luck otherwise, in the mean over deaths at
different times. Deaths are rare beside what they cost, so to first order

    lost a day = Σ over nodes 86400 / mtbf · cost of this node's death

The simulated snapshots are at most SIMULATED clocks apart (predict.py). What lies beyond, e clocks, is linear, and is
added: a roll-back repeats half of it on average, e / 2 steps; a log of it is read and summed again, e / 2 (M (push /
disk + sum) + update).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf, log2
from typing import Any

from engine.dtypes import float32
from engine.optim import SGDRule
from engine.optim.clip import BLOCK
from engine.sharder import Consistency
from engine.sharder.codecs import HEADER, codec_of
from engine.sharder.drivers.priced import Costs, PricedSimulation
from engine.sharder.drivers.simulator import DURABILITIES
from engine.sharder.events import Address
from tools.planning import stragglers
from tools.training.errors import ProgramError

OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2}
PLACEMENTS = ("dedicated", "shared")
ITEM = 4  # bytes of a parameter
RULE = SGDRule(lr=0.1)  # of the numbers that stand for the model


@dataclass(frozen=True)
class Plan:
    """A cluster and what it trains. Seconds, bytes a second, numbers; inf bandwidths cost nothing.

    work: seconds of a microbatch, of `tokens` tokens       overlap: the share of it in which gradients leave already
    placement: shards have nodes of their own, or shard s lives with worker s modulo W
    """

    parameters: float
    workers: int
    work: float
    shards: int = 1
    microbatches: int = 0  # 0: one for each worker
    tokens: float = 0.0
    straggler: str = "none"
    consistency: str = "bsp"
    backups: int = 0
    compress: str = "none"
    optimizer: str = "adam"
    placement: str = "dedicated"
    bandwidth: float = inf
    latency: float = 0.0
    local: float = inf
    memory: float = inf
    overlap: float = 0.0
    disk: float = inf
    fsync: float = 0.0
    durability: str = ""  # "": snapshots where they are enough, else a log
    snapshot_every: int = 100
    mtbf: float = inf
    restart: float = 60.0
    timeout: float = 0.0  # 0: ten steps

    def __post_init__(self) -> None:
        """Refuse what cannot be, each with one line that names the flag."""
        for name in ("workers", "shards", "snapshot_every"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("parameters", "bandwidth", "local", "memory", "disk", "mtbf"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        if not self.microbatches:
            object.__setattr__(self, "microbatches", self.workers)
        self._expect("microbatches", self.microbatches >= self.workers, f"at least --workers ({self.workers}): a "
                     "microbatch is computed by one worker")
        self._expect("overlap", 0 <= self.overlap < 1, "a share from 0 to below 1")
        self._expect("parameters", self.parameters >= self.shards, f"at least --shards ({self.shards})")
        for name, choices in (("optimizer", tuple(OPTIMIZERS)), ("placement", PLACEMENTS),
                              ("durability", ("", *DURABILITIES))):
            self._expect(name, getattr(self, name) in choices, "one of " + ", ".join(filter(None, choices)))
        self._expect("backups", self.backups >= 0 and not (self.backups and self.consistency == "asp"),
                     "at least 0, and 0 with asp, which waits for nobody")
        try:
            stragglers.parse(self.straggler)
            consistency = self.rules
            if self.compress != "none":
                codec_of(self.compress)
        except ValueError as error:
            raise ProgramError(f"--{error}") from None
        self._expect("backups", self.backups < self.microbatches, f"fewer than --microbatches ({self.microbatches})")
        self._expect("durability", self.kept != "snapshot" or consistency.replays, "log or backup: only bsp without "
                     "backups can compute again what came after a snapshot")

    def _expect(self, name: str, possible: bool, expected: str) -> None:
        if not possible:
            raise ProgramError(f"--{name.replace('_', '-')} is {getattr(self, name):g}, expected {expected}"
                               if not isinstance(getattr(self, name), str) else
                               f"--{name} is {getattr(self, name)}, expected {expected}")

    @property
    def rules(self) -> Consistency:
        return Consistency.parse(self.consistency, self.backups)

    @property
    def kept(self) -> str:
        """What a shard that dies comes back with."""
        return self.durability or ("snapshot" if self.rules.replays else "log")

    @property
    def slots(self) -> int:
        return OPTIMIZERS[self.optimizer]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each shard: the blocks between the boundaries nearest to s/S and (s + 1)/S."""
        total = int(self.parameters)
        ends = [min(round(total * s / self.shards / BLOCK) * BLOCK, total) for s in range(self.shards)] + [total]
        return tuple(end - start for start, end in pairwise(ends))

    def pushed(self, elements: int) -> int:
        """Bytes of the gradient of so many parameters, as it travels."""
        if self.compress == "none":
            return ITEM * elements
        sections = codec_of(self.compress).sections(elements, float32)
        return HEADER.size + sum(dtype.itemsize * length for dtype, length in sections)

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def node(self, address: Address) -> int:
        """The node of a machine: workers first. A replica has one to itself."""
        kind, number = address
        shared, workers, shards = self.placement == "shared", self.workers, self.shards
        if kind == "worker":
            return number
        if kind == "shard":
            return number % workers if shared else workers + number
        if kind == "coordinator":
            return 0 if shared else workers + shards
        return workers + shards + 1 + number

    def nodes(self) -> dict[str, list[int]]:
        """The nodes that can die, by what is lost with them."""
        workers, shards = range(self.workers), [self.node(("shard", s)) for s in range(self.shards)]
        kinds = {"worker": [w for w in workers if w not in shards], "shard": sorted(set(shards)),
                 "coordinator": [n for n in [self.node(("coordinator", 0))] if n not in shards and n >= self.workers]}
        return {kind: numbers for kind, numbers in kinds.items() if numbers}

    # ── costs ───────────────────────────────────────────────────────────────────────────────────────

    def costs(self, seed: int) -> Costs:
        sizes, read = self.sizes, 1 / self.memory
        return Costs(
            push=tuple(map(self.pushed, sizes)), pull=tuple(ITEM * n for n in sizes),
            sum=tuple(3 * ITEM * n * read for n in sizes),
            update=tuple((3 + 2 * self.slots) * ITEM * n * read for n in sizes),
            snapshot=tuple((1 + self.slots) * ITEM * n for n in sizes),
            work=stragglers.drawn(stragglers.parse(self.straggler), self.work, seed, self.workers),
            bandwidth=self.bandwidth, local=self.local, latency=self.latency, overlap=self.overlap, disk=self.disk,
            fsync=self.fsync, node=self.node)

    def simulation(self, seed: int, save_every: int = 0, failures: tuple[tuple[float, int], ...] = ()
                   ) -> PricedSimulation:
        return PricedSimulation(self.costs(seed), RULE, failures=failures, workers=self.workers,
                                microbatches=self.microbatches, consistency=self.rules, durability=self.kept,
                                save_every=save_every)

    def memory_bytes(self) -> dict[str, dict[str, float]]:
        """Of a worker and of the largest shard, by what it holds."""
        staleness, parameters, n = self.rules.staleness, int(self.parameters), max(self.sizes)
        own = ceil(self.microbatches / self.workers)
        left = parameters * (staleness + 2) * own if self.compress != "none" else 0
        sums = 1 if self.rules.asynchronous else (ceil(log2(self.microbatches)) + 1) * (staleness + 1)
        held = (self.microbatches - self.backups) * self.pushed(n) if self.backups else 0
        return {"worker": {"parameters": ITEM * parameters, "gradients": ITEM * (parameters + left)},
                "shard": {"versions": ITEM * n * (2 + staleness), "optimizer": ITEM * n * self.slots,
                          "gradients": ITEM * n * sums + held}}

    def with_(self, **changes: Any) -> Plan:
        return replace(self, **changes)
