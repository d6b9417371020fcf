"""shardgrad: a deep-learning engine to read, to embed, and to test numerics with. `import engine as eg`."""

from __future__ import annotations

from engine import models, nn, ops, optim
from engine.autograd import enable_grad, grad, is_grad_enabled, no_grad
from engine.backend import get_num_threads, set_num_threads
from engine.checkpoint import checkpoint
from engine.dtypes import DType, bool_, float32, float64, int8, int16, int32, int64, uint8, uint16, uint32, uint64
from engine.functional import jvp, vjp
from engine.ops import *  # noqa: F403  (every op of the registry is a public name)
from engine.random import Generator, default_generator, seed
from engine.tensor import Tensor, default_device, device, from_dlpack, from_numpy, tensor

__version__ = "0.1.0"

__all__ = [
    "DType", "Generator", "Tensor", "bool_", "checkpoint", "default_device", "default_generator", "device",
    "enable_grad", "float32", "float64", "from_dlpack", "from_numpy", "get_num_threads", "grad", "int16", "int32",
    "int64", "int8", "is_grad_enabled", "jvp", "models", "nn", "no_grad", "ops", "optim", "seed", "set_num_threads",
    "tensor", "uint16", "uint32", "uint64", "uint8", "vjp",
    *ops.__all__,
]
