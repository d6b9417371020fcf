"""Three raylets on this machine, and what is seen of the actors on them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

TESTS, ROOT = Path(__file__).parent, Path(__file__).parents[2]
STORE = 200 << 20  # bytes of each node's object store
NODES = 3
# A raylet that is gone is noticed within a second, not within Ray's usual fifteen.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_timeout_ms": 2000,
          "health_check_failure_threshold": 5}


@contextlib.contextmanager
def raylets():
    """A cluster of three nodes on this machine, to which this process is connected."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'shardgrad[cluster]'")
    from ray.cluster_utils import Cluster

    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tools", TESTS)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": paths, "ENGINE_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=2, object_store_memory=STORE, include_dashboard=False, _system_config=HEALTH)
            for _ in range(NODES - 1):
                cluster.add_node(num_cpus=2, object_store_memory=STORE)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@contextlib.contextmanager
def one_less(cluster):
    """A node that may be removed; there are as many as before afterwards."""
    node = next(iter(cluster.worker_nodes))
    yield node
    assert node not in cluster.worker_nodes
    cluster.add_node(num_cpus=2, object_store_memory=STORE)


def machines():
    """The processes of our actors: Ray names each after its class."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::Machine"):
                found.add(path.parent.name)
    return found
