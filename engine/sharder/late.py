"""Parameters that come when they are needed, and go when others are: ZeRO's third stage, and late pulls.

    forward    gather shard 0 | layers 1, 2 | gather 1 | layers 3, 4 | gather 2, release 0 | layers 5, 6
    backward                    layers 6, 5 | layers 4, 3 | gather 0, release 2 | layers 2, 1

A replica's tensors are bound without memory. Whatever asks for a tensor's array asks for the parameter, and so for the
shards that own it; it waits for those and no others. That is all of a late pull: every shard was asked at once, and the
first layers are computed while the last are on their way.

To release, the worker holds the HELD shards that it gathered last, and takes the memory back from all tensors of the
others. So that backward finds what forward had, a tape keeps of such a parameter not the array but its name (`kept` in
autograd.py), and gathers it again. It is the same version, so the bits are the same: a shard keeps the version of a
clock until the clock is over. (In ASP it does not, so there is no third stage.) Of a clock that is over without this
worker, what comes late may be of a later version; no shard takes what is computed from that.

Rajbhandari, Rasley, Ruwase, He 2020, "ZeRO", arXiv:1910.02054, section 5.3: 4Ψ bytes of fp32 parameters become about
HELD · 4Ψ/S, for one more pull of everything in each microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.backend import Array, get_backend
from engine.backend.array import LateStorage
from engine.sharder.binding import check_fits, named, refuse_others
from engine.sharder.events import Received
from engine.sharder.versions import Version, assemble_one
from engine.tensor import Tensor

if TYPE_CHECKING:
    from engine.sharder.client import Client

HELD = 2  # shards: an op whose operands lie in two of them gathers each once


class LateParameters(Mapping[str, np.ndarray]):
    """name -> the parameters of the client's clock, read-only, each fetched when it is first looked at.

    release: whether a shard is let go of when others are needed
    """

    def __init__(self, client: Client, release: bool):
        self.client, self.release = client, release
        self.partition, self.clock, self.over = client.partition, client.step, False
        self.shards: dict[int, Version] = {}  # that are here, in the order in which they were gathered
        self.arrays: dict[str, Array] = {}  # made of them
        self.tensors: dict[str, list[Tensor]] = {name: [] for name in self.partition.parameters}
        self.most = 0  # bytes of them that were held at a time
        if not release:
            client.fetch(tuple(self.tensors))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise KeyError(name)
        data: np.ndarray = self.array(name).data
        return data

    def bind(self, replica: Any) -> None:
        """Let each parameter of the replica fetch its memory when it is used; its gradient is dropped. Raises as
        binding.bind does."""
        parameters = named(replica)
        refuse_others(parameters, self.tensors)
        for name, tensor in parameters.items():
            if not hasattr(tensor, "late"):  # else it was looked at when it was bound first
                check_fits(name, tensor, self.partition.parameters[name].shape, self.client.dtype)
        for name, tensor in parameters.items():
            tensor.release(partial(self.array, name, tensor.device))
            tensor.grad = None
            self.tensors[name].append(tensor)

    def array(self, name: str, device: str | None = None) -> Array:
        """A parameter, gathered if it is not here."""
        if name not in self.arrays:
            self._gather(name)
            client = self.client
            value = assemble_one(self.partition, name, self.shards, client.dtype, client.k, client.copied)
            array = self.arrays[name] = (get_backend(device) if device else client.k).from_numpy(value)
            if self.release and isinstance(array.data, np.ndarray):
                array.storage = LateStorage(partial(Kept, self, name, array.data))
            self._count()
        return self.arrays[name]

    def _gather(self, name: str) -> None:
        """Have the shards that own a parameter."""
        if self.over:
            raise RuntimeError(f"pull: {name!r} of clock {self.clock} is not here any more; it is fetched while its "
                               "clock runs, so pull again")
        client = self.client
        while True:
            if client.partition is not self.partition:  # another term, with other shards
                self._let_go(tuple(self.shards))
                self.partition = client.partition
            owners = self.partition.owners[name]
            missing = [s for s in owners if s not in self.shards]
            if not missing:
                return
            if self.release:
                spare = [s for s in self.shards if s not in owners]
                self._let_go(spare[:max(0, len(spare) + len(owners) - HELD)])
            if not client.fetching.issuperset(missing):
                client.fetch((name,))
            client.hear()

    def receive(self, received: Received) -> None:
        """A shard's answer."""
        self.shards[received.shard] = received.values
        self._count()

    def _let_go(self, shards: Sequence[int]) -> None:
        """Forget these shards, and every parameter of which they own a part."""
        gone = {piece.parameter.name for s in shards for piece in self.partition.pieces[s]} & self.arrays.keys()
        for name in gone:
            del self.arrays[name]
            for tensor in self.tensors[name]:
                tensor.release(tensor.late)
        for s in shards:
            del self.shards[s]

    def close(self) -> None:
        """The clock is over: what is here stays, unless it is to be released."""
        if self.release:
            self._let_go(tuple(self.shards))
        self.over = True

    def _count(self) -> None:
        whole = [array.data for name, array in self.arrays.items() if len(self.partition.owners[name]) > 1]
        flats = {id(version.flat): version.flat.data for version in self.shards.values()}
        self.most = max(self.most, sum(data.nbytes for data in (*flats.values(), *whole)))


class Kept:
    """What a tape keeps of an array over the memory `base` of a parameter that is released: its name, and which view of
    it, to gather it again."""

    __slots__ = ("name", "of", "view")

    def __init__(self, of: LateParameters, name: str, base: np.ndarray, array: Array):
        self.of, self.name = of, name
        offset = _address(array.data) - _address(base)
        self.view = None if array.data is base else (array.data.shape, offset, array.data.strides)

    def get(self, op: str, name: str) -> Array:
        """The array, as the rule of `op` needs it for its `name`."""
        base = self.of.array(self.name)
        if self.view is None:
            return base
        shape, offset, strides = self.view
        return base.view(np.ndarray(shape, base.data.dtype, base.data, offset, strides))


def _address(data: np.ndarray) -> int:
    address: int = data.__array_interface__["data"][0]
    return address
