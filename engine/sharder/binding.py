"""Between a replica and the parameter server: parameters in, gradients out, without copying.

A replica is anything with named_parameters() (an nn.Module), or a mapping name -> Tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from engine.backend import Array, get_backend
from engine.dtypes import DType, as_dtype
from engine.rowsparse import RowSparse
from engine.sharder.partition import Parameter, Partition
from engine.sharder.versions import Counter
from engine.tensor import Tensor


def named(replica: Any) -> dict[str, Any]:
    """name -> Tensor (or array), of a module or a mapping."""
    return dict(replica.named_parameters() if hasattr(replica, "named_parameters") else replica)


def bind(replica: Any, values: Mapping[str, np.ndarray]) -> None:
    """Make each parameter of the replica a view of `values[its name]`; its gradient is dropped.

    The memory stays the server's: it must not be written to. A tape recorded before keeps the values it saw.
    Raises ValueError with one line, and binds nothing, for a missing name, or another shape or dtype.
    """
    parameters = named(replica)
    refuse_others(parameters, values)
    for name, parameter in parameters.items():
        check_fits(name, parameter, values[name].shape, as_dtype(values[name].dtype))
    for name, parameter in parameters.items():
        parameter.array = get_backend(parameter.device).from_numpy(values[name])
        parameter.grad = None


def refuse_others(parameters: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter of a replica that the server does not have, or one under two names."""
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        if name not in known:
            raise ValueError(f"bind: the server has no parameter {name!r}; it has {', '.join(known)}")
        if first.setdefault(id(parameter), name) != name:
            raise ValueError(f"bind: {first[id(parameter)]!r} and {name!r} are one tensor, expected one for each name")


def check_fits(name: str, parameter: Any, shape: tuple[int, ...], dtype: DType) -> None:
    """Raise ValueError unless a replica's parameter has the server's shape and dtype."""
    if shape != parameter.shape or dtype is not parameter.dtype:
        raise ValueError(f"bind: {name!r} is {parameter.dtype} {parameter.shape} in the replica, "
                         f"and {dtype} {shape} on the server")


def take_gradients(replica: Any) -> dict[str, Tensor | None]:
    """name -> gradient of each parameter, which the parameters give up."""
    gradients = {}
    for name, parameter in named(replica).items():
        gradients[name], parameter.grad = parameter.grad, None
    return gradients


def flat_gradients(partition: Partition, dtype: DType, gradients: Mapping[str, Any],
                   counter: Counter) -> dict[str, Array | RowSparse]:
    """name -> flat Array, of Tensors, Arrays or NumPy arrays; a copy only of what does not lie dense in memory. What is
    RowSparse stays so.

    Raises ValueError with one line for a missing or unknown name, or another shape or dtype.
    """
    refuse_unknown(partition, gradients)
    return {name: flat_gradient(parameter, dtype, gradients.get(name), counter)
            for name, parameter in partition.parameters.items()}


def refuse_unknown(partition: Partition, names: Iterable[str]) -> None:
    """Raise ValueError for a name that the server does not have."""
    unknown = set(names) - partition.parameters.keys()
    if unknown:
        raise ValueError(f"push: the server has no parameter {min(unknown)!r}; "
                         f"it has {', '.join(partition.parameters)}")


def flat_gradient(parameter: Parameter, dtype: DType, gradient: Any, counter: Counter) -> Array | RowSparse:
    """The gradient of one parameter, as flat_gradients has it."""
    if gradient is None:
        raise ValueError(f"push: {parameter.name!r} has no gradient; every parameter of the server needs one in every "
                         "microbatch (leave frozen parameters out of the server, and give pull and backward a mapping "
                         "without them)")
    if isinstance(gradient, Tensor) and gradient.requires_grad and gradient.node is None:
        raise ValueError(f"push: the gradient of {parameter.name!r} is a parameter; expected its .grad, or the module")
    sparse = isinstance(gradient, RowSparse)
    data = gradient.data if isinstance(gradient, Array) else \
        gradient if sparse else np.asarray(gradient)  # from a GPU: a copy
    if data.shape != parameter.shape or as_dtype(data.dtype) is not dtype:
        raise ValueError(f"push: the gradient of {parameter.name!r} is {data.dtype} {data.shape}, "
                         f"expected {dtype} {parameter.shape}")
    if sparse:
        return gradient
    if not data.flags.c_contiguous:
        counter.copied(data.nbytes)
    return Array(data.reshape(-1), dtype)
