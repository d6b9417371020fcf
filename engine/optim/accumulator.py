"""Gradient accumulation over microbatches, by a tree whose shape depends on their number alone.

A step on a large batch is the sum of the gradients of its microbatches. Floating-point addition is not associative,
so a sum in order of arrival would depend on who was faster. Here the order is fixed: n leaves split at the largest
power of two below n, and each half splits again,

    n = 6:   ((g0 + g1) + (g2 + g3)) + (g4 + g5)

and two siblings are added as soon as both are there. So the result has the same bits for every order of arrival, and
at most one finished subtree per level waits in memory. Plain training and the parameter server share this class.

Let microbatch i have the loss sum L_i over its t_i tokens. Its gradient is that of L_i, not of L_i / t_i, and the
mean over the whole batch divides once, at the end, by the tokens of all microbatches:

    loss = Σ L_i / Σ t_i,     gradient = Σ ∇L_i / Σ t_i

so a microbatch with few tokens weighs no more than its tokens do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.backend import Array, Backend, get_backend
from engine.rowsparse import RowSparse, add_row_sparse
from engine.tensor import Tensor


@dataclass(frozen=True)
class Accumulated:
    """The sum over a range of microbatches: gradients (one Array or RowSparse a parameter), loss, tokens."""

    gradients: tuple[Any, ...]
    loss: float
    tokens: float


class Accumulator:
    """Collects the gradients of `microbatches` microbatches, in any order, each once.

        accumulator = Accumulator(4)
        for i in range(4):
            optimizer.zero_grad()
            loss = loss_sum(model, batch[i])
            loss.backward()
            accumulator.add(i, [p.grad for p in parameters], loss.item(), tokens=batch[i].size)
        mean_loss = accumulator.assign(parameters)
        optimizer.step()

    The gradients given are kept, not copied, and never written to. A parameter's sum is row-sparse while all that was
    added for it is, and has the same bits either way.
    """

    def __init__(self, microbatches: int, k: Backend | None = None):
        if microbatches < 1:
            raise ValueError(f"Accumulator: microbatches is {microbatches}, expected at least 1")
        self.microbatches = microbatches
        self.k = k or get_backend("cpu")
        self._added: set[int] = set()
        self._finished: dict[tuple[int, int], Accumulated] = {}  # subtrees [start, stop) that wait for their sibling

    def __contains__(self, index: int) -> bool:
        return index in self._added

    def __copy__(self) -> Accumulator:
        """One that goes its own way from here; what was summed so far is shared."""
        twin = Accumulator(self.microbatches, self.k)
        twin._added, twin._finished = set(self._added), dict(self._finished)
        return twin

    @property
    def complete(self) -> bool:
        return len(self._added) == self.microbatches

    def add(self, index: int, gradients: Sequence[Array | Tensor | RowSparse], loss: float = 0.0,
            tokens: float = 1) -> None:
        """Give microbatch `index` (from 0): the gradients of its loss sum, that sum, and its number of tokens.

        Raises ValueError, and adds nothing, for an index outside the range or one that was added before, and for
        gradients that are not as many, of the shapes and of the types that the others are.
        """
        if not 0 <= index < self.microbatches:
            raise ValueError(f"Accumulator.add: index is {index}, expected one in [0, {self.microbatches})")
        if index in self._added:
            raise ValueError(f"Accumulator.add: microbatch {index} was added before")
        arrays = tuple(g.array if isinstance(g, Tensor) else g for g in gradients)
        self._expect_alike(index, arrays)
        self._added.add(index)
        self._finished[index, index + 1] = Accumulated(arrays, float(loss), float(tokens))
        for left, right in reversed(list(splits_above(index, self.microbatches))):
            if left not in self._finished or right not in self._finished:
                break
            total = self._sum(self._finished.pop(left), self._finished.pop(right))
            self._finished[left[0], right[1]] = total

    def _expect_alike(self, index: int, gradients: tuple[Any, ...]) -> None:
        missing = [i for i, g in enumerate(gradients) if g is None]
        if missing:
            raise ValueError(f"Accumulator.add: gradient {missing[0]} of microbatch {index} is None, expected an array")
        known = next(iter(self._finished.values()), None)
        if known is not None and len(gradients) != len(known.gradients):
            raise ValueError(f"Accumulator.add: microbatch {index} has {len(gradients)} gradients, expected "
                             f"{len(known.gradients)} as before")
        for i, (g, like) in enumerate(zip(gradients, known.gradients if known is not None else ())):
            if g.shape != like.shape or g.dtype is not like.dtype:
                raise ValueError(f"Accumulator.add: gradient {i} of microbatch {index} is {g.dtype} {g.shape}, "
                                 f"expected {like.dtype} {like.shape} as before")

    def _sum(self, a: Accumulated, b: Accumulated) -> Accumulated:
        gradients = tuple(_add(self.k, x, y) for x, y in zip(a.gradients, b.gradients, strict=True))
        return Accumulated(gradients, a.loss + b.loss, a.tokens + b.tokens)

    def total(self) -> Accumulated:
        """The sum over all microbatches.

        Raises ValueError while microbatches are missing, and when there were no tokens at all.
        """
        if not self.complete:
            missing = sorted(set(range(self.microbatches)) - self._added)
            raise ValueError(f"Accumulator: microbatches {missing} of {self.microbatches} are missing")
        total = self._finished[0, self.microbatches]
        if not total.tokens > 0:
            raise ValueError(f"Accumulator: the tokens of all microbatches sum to {total.tokens:g}, expected > 0")
        return total

    def mean(self) -> Accumulated:
        """The gradients divided by the tokens of all microbatches; `loss` and `tokens` stay sums. Raises as total()."""
        total = self.total()
        gradients = tuple(_divide(self.k, g, total.tokens) for g in total.gradients)
        return Accumulated(gradients, total.loss, total.tokens)

    def assign(self, parameters: Sequence[Tensor]) -> float:
        """Make the mean gradient the `.grad` of each parameter; returns the mean loss.

        Raises as total() does, and ValueError, assigning nothing, for parameters of other shapes than the gradients.
        """
        mean = self.mean()
        shapes, given = [g.shape for g in mean.gradients], [p.shape for p in parameters]
        if given != shapes:
            raise ValueError(f"Accumulator.assign: the parameters have shapes {given}, expected {shapes}")
        for parameter, gradient in zip(parameters, mean.gradients, strict=True):
            parameter.grad = gradient if isinstance(gradient, RowSparse) else Tensor(gradient, parameter.device)
        return mean.loss / mean.tokens


def _add(k: Backend, a: Array | RowSparse, b: Array | RowSparse) -> Array | RowSparse:
    if isinstance(a, RowSparse) and isinstance(b, RowSparse):
        return add_row_sparse(a, b)
    return k.map("add", *(g.dense().array if isinstance(g, RowSparse) else g for g in (a, b)))


def _divide(k: Backend, gradient: Array | RowSparse, divisor: float) -> Array | RowSparse:
    def divided(g: Array) -> Array:
        return k.map("divide", g, k.constant(divisor, g.dtype))

    return gradient.map(divided) if isinstance(gradient, RowSparse) else divided(gradient)


def splits_above(leaf: int, leaves: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The (left, right) halves, as ranges [start, stop), of every subtree that holds `leaf`, from the root down."""
    start, stop = 0, leaves
    while stop - start > 1:
        middle = start + (1 << (stop - start - 1).bit_length() - 1)  # the largest power of two below the length
        yield (start, middle), (middle, stop)
        start, stop = (start, middle) if leaf < middle else (middle, stop)
