"""shardgrad: a deep-learning engine to read, to embed, and to test numerics with. `import engine as eg`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from engine import array_api, nn, ops, optim
from engine.autograd import enable_grad, grad, is_grad_enabled, no_grad
from engine.backend import get_num_threads, set_num_threads
from engine.capture import capture
from engine.checkpoint import checkpoint
from engine.dtypes import DType, bool_, float32, float64, int8, int16, int32, int64, uint8, uint16, uint32, uint64
from engine.functional import jvp, vjp
from engine.ops import *  # noqa: F403  (every op of the registry is a public name)
from engine.precision import autocast, get_autocast
from engine.random import Generator, default_generator, seed
from engine.rowsparse import RowSparse
from engine.tensor import Tensor, default_device, device, from_dlpack, from_numpy, tensor

if TYPE_CHECKING:
    from engine import models, sharder
    from engine.debug import detect_anomaly, draw, profile

__version__ = "0.1.0"

__all__ = [
    "DType", "Generator", "RowSparse", "Tensor", "array_api", "autocast", "bool_", "capture", "checkpoint",
    "default_device", "default_generator", "detect_anomaly", "device", "draw", "enable_grad", "float32", "float64",
    "from_dlpack", "from_numpy", "get_autocast", "get_num_threads", "grad", "int16", "int32", "int64", "int8",
    "is_grad_enabled", "jvp", "models", "nn", "no_grad", "ops", "optim", "profile", "seed", "set_num_threads",
    "sharder", "tensor", "uint16", "uint32", "uint64", "uint8", "vjp",
    *ops.__all__,
]


def __getattr__(name: str) -> Any:
    """What few scripts need is imported when it is first asked for, so that a small script starts sooner."""
    if name in ("models", "sharder"):
        return importlib.import_module(f"engine.{name}")
    if name in ("detect_anomaly", "draw", "profile"):
        return getattr(importlib.import_module("engine.debug"), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
