"""Gradients leave while the backward pass goes on: ZeRO's second stage, and the overlap of computing and sending.

    backward   ... layer 6 | layer 5 | layer 4 | layer 3 | layer 2 | layer 1
    leave             shard 2 ──────>     shard 1 ──────>     shard 0 ──────>

Backward reaches the last layers first, and with placement "ranges" a shard owns a run of layers. A parameter's gradient
is final when no node that leads to it is left (autograd's `completed`), however often the parameter was used. When all
that a shard owns is final, the shard is sent its part, and the worker forgets it once the shard has acknowledged it. At
most WAITING parts wait for that; then backward waits too. So with S shards of equal size a worker holds the gradients
of about (WAITING + 1)/S of the parameters, where one that sends when backward is over holds all.

Rajbhandari, Rasley, Ruwase, He 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054, section 5.2; Zhang et al. 2017, "Poseidon" (wait-free backpropagation), arXiv:1706.03292, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine import autograd
from engine.backend import Array
from engine.rowsparse import RowSparse
from engine.sharder.binding import flat_gradient, named, refuse_unknown
from engine.tensor import Tensor

if TYPE_CHECKING:
    from engine.sharder.client import Client

WAITING = 1  # parts on their way while the next one is computed


class Departure:
    """The gradients of microbatch `index`, from the leaves of `replica` to the shards."""

    def __init__(self, client: Client, index: int, replica: Any, loss: float, tokens: float):
        self.client, self.index, self.loss, self.tokens = client, index, loss, tokens
        self.parameters: dict[str, Tensor] = named(replica)
        self.partition = client.partition  # if another term begins meanwhile, all of this is void
        refuse_unknown(self.partition, self.parameters)
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        # By shard, parameters that are not final; when there is none left, the shard is sent its part.
        self.missing = [{piece.parameter.name for piece in own} for own in self.partition.pieces]
        self.flat: dict[str, Array | RowSparse] = {}  # final, and not with all their shards

    def backward(self, loss: Tensor, early: bool) -> None:
        """Compute the gradients, and send each shard its part; early: as soon as it is there.

        When this ends by an exception, no gradient is left in the replica, and the microbatch is still due; what has
        left by then is not sent again.
        """
        try:
            autograd.backward([loss], [None], completed=self._completed if early else None)
            for name in self.partition.parameters:
                if self._is_needed(name):
                    self._take(name)
            self.client.send_gradients(self.index, self.flat, self.loss, self.tokens)
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None

    def _is_needed(self, name: str) -> bool:
        """Whether a shard that owns some of a parameter has not been sent it, or none owns any: it has no elements."""
        owners = self.partition.owners[name]
        return not owners or any(self.missing[shard] for shard in owners)

    def _take(self, name: str) -> None:
        """Have the gradient of a parameter, if it is not here already."""
        if name not in self.flat:
            client, parameter = self.client, self.parameters.get(name)
            self.flat[name] = flat_gradient(self.partition.parameters[name], client.dtype,
                                            None if parameter is None else parameter.grad, client.copied)

    def _completed(self, leaf: Tensor) -> None:
        name = self.names.get(id(leaf))
        if name is None:  # a leaf of somebody else
            return
        self._take(name)
        leaf.grad = None
        for shard in self.partition.owners[name]:
            self.missing[shard].remove(name)
            if not self.missing[shard]:
                self._send(shard)

    def _send(self, shard: int) -> None:
        self.client.send_gradients(self.index, self.flat, self.loss, self.tokens, shard)
        for piece in self.partition.pieces[shard]:
            if not self._is_needed(piece.parameter.name):
                self.flat.pop(piece.parameter.name, None)
        self.client.settle(WAITING)
