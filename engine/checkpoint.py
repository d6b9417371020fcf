"""Activation checkpointing: keep the inputs of a function, compute its insides again when backward needs them.

A function of n layers normally keeps every layer's activations until backward. `checkpoint(f, *args)` records the
same graph but keeps no arrays: each saved array becomes a promise, and the first one asked for runs f again and
fills them all. With one checkpoint per √n layers, memory is O(√n) for one more forward pass.

Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine import autograd
from engine.autograd import Saved
from engine.backend import Array
from engine.precision import autocast, get_autocast
from engine.random import default_generator, seed
from engine.tensor import Tensor


class _Promise:
    """Stands for the index-th array that f saves."""

    __slots__ = ("index", "recomputation")

    def __init__(self, recomputation: _Recomputation, index: int):
        self.recomputation = recomputation
        self.index = index

    def get(self, op: str, name: str) -> Array:
        return self.recomputation.saved(self.index).get(op, name)


class _Recomputation:
    """Runs f a second time, when its first saved array is asked for, and collects what it saves."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.f = f
        self.args = tuple([_as_it_is(x) for x in args])
        self.kwargs = {name: _as_it_is(x) for name, x in kwargs.items()}
        self.generator = default_generator()
        self.cursor = self.generator.state_dict()
        self.precision = get_autocast()
        self.first: list[tuple[int, int]] = []  # of each array that f saves: its storage, by id, and its version
        self.again: list[Any] | None = None
        self.versions = [Saved(x.array) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]

    def save(self, array: Array) -> _Promise:
        self.first.append((id(array.storage), array.storage.version))
        return _Promise(self, len(self.first) - 1)

    def saved(self, index: int) -> Any:
        if self.again is None:
            for i, version in enumerate(self.versions):
                version.get("checkpoint", f"input {i}")
            collector = _Collector()
            replay = type(self.generator)(0)
            replay.load_state_dict(self.cursor)  # dropout draws the same masks
            replay.repeats = self.generator
            token = autograd._saving.set(collector)
            try:
                with seed(replay), autocast(self.precision), autograd.enable_grad():
                    self.f(*self.args, **self.kwargs)
            finally:
                autograd._saving.reset(token)
            if len(collector.arrays) != len(self.first):
                raise RuntimeError(f"checkpoint: f saved {len(self.first)} arrays the first time and "
                                   f"{len(collector.arrays)} the second; it must do the same both times")
            # What f makes has another storage now, or the same history. What it finds outside must be as it was.
            for (storage, before), (found, now, shape) in zip(self.first, collector.versions):
                if storage == found and now != before:
                    raise RuntimeError(f"checkpoint: an array of shape {shape} that f closes over was modified in "
                                       f"place before backward (version {now}, at first {before})")
            self.again = collector.arrays
        return self.again[index]


def _as_it_is(x: Any) -> Any:
    """An argument for the second run: x itself may be bound to other elements by then (y += 1 inside a graph)."""
    return Tensor(x.array, x.device, x.requires_grad, x.node) if isinstance(x, Tensor) else x


class _Collector:
    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self.versions: list[tuple[int, int, tuple[int, ...]]] = []

    def save(self, array: Array) -> Any:
        self.versions.append((id(array.storage), array.storage.version, array.shape))
        self.arrays.append(autograd.kept(array))
        return self.arrays[-1]


def checkpoint(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """f(*args, **kwargs), keeping none of its intermediate results for backward: they are computed again there.

    The result and every gradient have the same bits as without it. f must do the same when it is called twice
    (random draws from the default generator are repeated). Gradients flow to args and to whatever f closes over. If an
    array of these that backward needs was modified in place meanwhile, it raises RuntimeError.
    """
    token = autograd._saving.set(_Recomputation(f, args, kwargs))
    try:
        return f(*args, **kwargs)
    finally:
        autograd._saving.reset(token)
