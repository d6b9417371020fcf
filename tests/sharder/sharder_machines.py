"""The state machines of a small cluster, to be driven one event at a time."""

from __future__ import annotations

from sharder_problems import Momentum, make, start

import engine as eg
from engine.backend import get_backend
from engine.sharder.drivers.simulator import Simulation
from engine.sharder.messages import Identity, Push, Term

K = get_backend("reference")
TERM = Term(1, 2, 0)


def machines(parameters_of=None, **arguments):
    """parameters_of: other shapes than those of the suite's problem."""
    arguments = {"shards": 2, "workers": 2, "microbatches": 2, "save_every": 0, **arguments}
    cluster = (make(Simulation, **arguments) if parameters_of is None
               else Simulation(start(parameters_of), Momentum(), device="reference", **arguments))
    coordinator, shards, workers = cluster.start()
    return cluster, coordinator, shards, workers


def push_to(shard, worker=0, epoch=0, sequence=0, clock=0, microbatch=0, value=1.0, term=1, version=None):
    gradients = tuple(K.full((piece.size,), value, eg.float32) for piece in shard.pieces)
    version = clock if version is None else version
    return Push(Identity(worker, epoch, sequence), term, clock, version, microbatch, 0.5, 1, gradients)
