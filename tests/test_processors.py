"""On which processors the threads of a team may run: where they could before, whatever a job moves about."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import engine as eg
from engine.backend import get_backend
from engine.backend.cpu import CpuBackend

TASKS = Path("/proc/self/task")
pytestmark = [
    pytest.mark.skipif(not TASKS.exists(), reason="needs Linux's /proc to find the threads"),
    pytest.mark.skipif(not isinstance(get_backend("cpu"), CpuBackend), reason="teams are of the compiled kernels"),
]


def tasks() -> set[int]:
    return {int(path.name) for path in TASKS.iterdir()}


def processor_of(task: int) -> int:
    """That it runs on, or ran on last (proc(5))."""
    return int((TASKS / str(task) / "stat").read_text().rpartition(")")[2].split()[36])


def job(x: eg.Tensor) -> np.ndarray:
    return eg.matmul(x, x).numpy()


def jobs_of_a_worker_beside_its_caller() -> list[tuple[set[int], set[int], bool, bool]]:
    """(where its worker might run before a job, where after it, whether it was still on its caller's processor then,
    whether the result was right) of several jobs, each of which wakes the worker, that last ran on that processor."""
    everywhere, caller = os.sched_getaffinity(0), threading.get_native_id()
    here = min(everywhere)
    x = eg.tensor(np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32), device="cpu")
    eg.set_num_threads(1)
    right = job(x)
    others = tasks()
    eg.set_num_threads(2)
    job(x)
    (worker,) = tasks() - others
    seen = []
    try:
        os.sched_setaffinity(caller, {here})
        for allowed in [everywhere] * 10 + [{here}] * 3 + [everywhere]:
            os.sched_setaffinity(worker, {here})
            os.sched_setaffinity(worker, allowed)
            time.sleep(0.01)  # it sleeps after a millisecond
            equal = bool((job(x) == right).all())
            seen.append((allowed, os.sched_getaffinity(worker), processor_of(worker) == here, equal))
    finally:
        os.sched_setaffinity(caller, everywhere)
        eg.set_num_threads(1)  # ends the worker
    return seen


def test_a_worker_moves_and_may_run_where_it_could_before() -> None:
    with ThreadPoolExecutor(1) as pool:  # a thread of its own has a team of its own
        seen = pool.submit(jobs_of_a_worker_beside_its_caller).result()
    assert len(seen) == 14
    for before, after, _, right in seen:
        assert after == before and right
    if len(os.sched_getaffinity(0)) > 1:  # the other one may be busy, and the kernel move it back: not every time
        assert not all(stayed for _, _, stayed, _ in seen[:10])
