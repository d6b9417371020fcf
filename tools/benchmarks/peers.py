"""The libraries that we compare ourselves with: those asked for that are installed, with their threads set."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

MODULES = {"torch": ["torch"], "torch.compile": ["torch"], "jax": ["jax"], "llama.cpp": ["llama_cpp", "gguf"],
           "openblas": ["numpy"]}
"""What each peer is imported as."""
TUNED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_PROC_BIND", "MKL_DEBUG_CPU_TYPE")  # would change a peer's code


def prepare_environment(threads: int) -> None:
    """Before anything is imported: every library gets as many threads, and none a setting that changes its kernels."""
    if any(name in os.environ for name in TUNED):
        found = ", ".join(name for name in TUNED if name in os.environ)
        raise SystemExit(f"bench: {found} set in the environment; unset it, since peers are measured as they come")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ENGINE_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if hasattr(os, "sched_setaffinity"):  # JAX asks the system for the number of processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class Peers:
    """`peers.torch`, `jax`, `llama_cpp`, `gguf` are modules, or None; `"openblas" in peers`: whether it takes part."""

    def __init__(self, names: list[str], threads: int):
        unknown = set(names) - set(MODULES)
        if unknown:
            raise SystemExit(f"bench: --peers names {', '.join(sorted(unknown))}, "
                             f"expected some of {', '.join(MODULES)}")
        self.threads = threads
        self.names = [name for name in names if self._installed(name)]
        self.torch: Any = importlib.import_module("torch") if "torch" in self.names else None
        self.jax: Any = importlib.import_module("jax") if "jax" in self.names else None
        self.llama_cpp, self.gguf = (importlib.import_module(name) if "llama.cpp" in self.names else None
                                     for name in MODULES["llama.cpp"])
        if self.torch:
            self.torch.set_num_threads(threads)
            self.torch.set_grad_enabled(True)
            self.torch.manual_seed(0)

    @staticmethod
    def _installed(name: str) -> bool:
        found = all(importlib.util.find_spec(module) is not None for module in MODULES[name])
        if not found:
            print(f"bench: {name} is not installed, so its column is missing", file=sys.stderr)
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.names
