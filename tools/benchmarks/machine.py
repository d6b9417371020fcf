"""What the machine can do: measured before each table, with the threads that its contestants get."""

from __future__ import annotations

from functools import partial
from typing import cast

from engine.backend import set_num_threads
from engine.backend.roofs import copy_bandwidth, peak_flops, read_bandwidth
from tools.benchmarks.contest import Machine, Probe

PROBE_BYTES = 1 << 26  # written and read in a turn: some milliseconds


def measure_machine(threads: int) -> Machine:
    set_num_threads(threads)
    peak, read, copy = peak_flops(), read_bandwidth(), copy_bandwidth()
    if peak is None or read is None or copy is None:
        raise SystemExit("bench: no compiled kernels to measure; run `make` first")
    return Machine(threads, peak, read, copy)


def probes() -> tuple[Probe, Probe]:
    """The peak and the copy bandwidth, each measured once, quickly."""
    return cast(Probe, partial(peak_flops, repeats=2)), cast(Probe, partial(copy_bandwidth, PROBE_BYTES, repeats=2))
