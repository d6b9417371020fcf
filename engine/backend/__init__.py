"""The boundary between the engine and its devices.

    k = get_backend("cpu")        "cpu": C kernels, or the NumPy rows where none were compiled
                                  "reference": NumPy
                                  "cuda": CuPy and the CUDA kernels

Nothing above this package asks what device it runs on.
"""

from __future__ import annotations

import sys
from functools import cache

from engine.backend.array import Array, walkable
from engine.backend.launch import Backend, broadcast_shapes, finishers, observers
from engine.backend.recording import refuse

__all__ = [
    "Array", "Backend", "broadcast_shapes", "devices", "finishers", "get_backend", "get_num_threads", "observers",
    "present_devices", "refuse", "set_num_threads", "walkable",
]


def _cpu() -> Backend:
    from engine.backend.cpu import CpuBackend, built_levels

    try:
        return CpuBackend()
    except ImportError as error:
        if built_levels():  # kernels are there, but the user asked for what cannot run
            raise
        print(f"engine: {error}; until then the NumPy reference backend runs (slow)", file=sys.stderr)
        from engine.backend.reference import ReferenceBackend

        return ReferenceBackend("cpu")


def _reference() -> Backend:
    from engine.backend.reference import ReferenceBackend

    return ReferenceBackend()


def _cuda() -> Backend:
    from engine.backend.cupy import CupyBackend

    return CupyBackend()


_MAKERS = {"cpu": _cpu, "reference": _reference, "cuda": _cuda}


def devices() -> tuple[str, ...]:
    """The devices that can be named."""
    return tuple(_MAKERS)


@cache
def present_devices() -> tuple[str, ...]:
    """The devices that this machine has."""
    found = []
    for name in _MAKERS:
        try:
            get_backend(name)
        except (ImportError, RuntimeError):
            continue
        found.append(name)
    return tuple(found)


@cache
def get_backend(device: str) -> Backend:
    """The backend of a device, made on first use. Raises ValueError for an unknown device."""
    maker = _MAKERS.get(device)
    if maker is None:
        raise ValueError(f"device: got {device!r}, expected one of {', '.join(_MAKERS)}")
    return maker()


def set_num_threads(n: int) -> None:
    """Let kernels called from this Python thread use n threads, itself included. It does not change any result."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"set_num_threads: n is {n!r}, expected a whole number of at least 1")
    get_backend("cpu").set_num_threads(n)


def get_num_threads() -> int:
    """How many threads kernels called from this Python thread use."""
    return get_backend("cpu").get_num_threads()
