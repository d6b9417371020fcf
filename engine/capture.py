"""Capture: a function of tensors recorded once, and from then on run as one call into C.

    step = eg.capture(lambda tokens, targets: loss_and_backward(tokens, targets), model)
    for tokens, targets in batches:
        loss = step(tokens, targets)             the gradients are in .grad, as ever
        optimizer.step(); optimizer.zero_grad()

Forward and backward of a small model are some hundred launches of a few microseconds, and the way of each through
Python, its checks, shapes, the tape, takes as long. Which launches there are depends on the shapes alone: so they are
recorded once (backend/recording.py) and run again without Python (backend/program.py), to the same bits, with every
temporary at a place known beforehand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.autograd import is_grad_enabled
from engine.backend import Array, finishers, get_backend, observers
from engine.backend.program import Key, Program
from engine.backend.recording import Pointer, Recording, recording
from engine.precision import product_format
from engine.random import Generator, default_generator
from engine.tensor import Tensor, default_device


def capture(function: Callable[..., Any], reads: Any = ()) -> Captured:
    """`function`, recorded when it is called in the same way for the second time, and from then on run again.

    reads: a module, or tensors and modules: what the function reads besides its arguments and may have other memory
           in the next call, and where it leaves gradients or writes to: parameters and buffers

    Arguments are tensors, which are others in each call, and what can be hashed, which is part of how it is called:
    so are shapes, dtypes, and modes (no_grad, autocast, train(), requires_grad). It returns tensors, alone or in
    tuples, lists and dicts; they are new in each call, bit for bit those of the function, and have no graph.
    backward() inside leaves gradients in .grad of arguments and of what it reads. Dropout draws from the default
    generator, and goes on with it.

    Only launches happen again. What else the function does (append to a list, keep a tensor for the next call, print)
    it does while it is recorded and never after, and what else it looks at is as it was then. RuntimeError with one
    line says what cannot be recorded: reading elements on the host (item(), nonzero(), an index that is a tensor, a
    sparse gradient), writing to or leaving gradients in tensors that are neither arguments nor named in reads, an
    optimizer's step, a cache of keys and values, another generator than the default one. While kernels are observed
    (eg.profile), and on other devices than a CPU with compiled kernels, the function is called as it is.
    """
    return Captured(function, reads)


KEPT = 256  # recordings of one function: a further kind of call takes the place of the oldest


class Captured:
    """A captured function. Each thread that calls it records for itself."""

    def __init__(self, function: Callable[..., Any], reads: Any = ()):
        self.function = function
        several = [reads] if isinstance(reads, Tensor) or hasattr(reads, "named_modules") else reads
        if not isinstance(several, (list, tuple)) or not all(
                isinstance(x, Tensor) or hasattr(x, "named_modules") for x in several):
            raise TypeError(f"capture: reads is {reads!r:.60}, expected a module, a tensor, or a list of them")
        self._several = several
        self._recorded: dict[Any, _Recorded | None] = {}  # None: called once
        self._look()

    def _look(self) -> None:
        """Find what the function reads: tensors, and where modules keep theirs."""
        self._modules = [m for x in self._several if not isinstance(x, Tensor) for _, m in x.named_modules()]
        self._slots = [(vars(m), name, t) for m in self._modules for name, t in vars(m).items()
                       if isinstance(t, Tensor)]
        found = [*(x for x in self._several if isinstance(x, Tensor)), *(t for _, _, t in self._slots)]
        self._reads = list({id(t): t for t in found}.values())

    @property
    def programs(self) -> list[Program]:
        """What was recorded, a Program for each kind of call: how many launches, how many bytes in their arena."""
        return [found.program for found in self._recorded.values() if found is not None]

    def __call__(self, *args: Any, **options: Any) -> Any:
        if any([room.get(name) is not t for room, name, t in self._slots]):  # another tensor under a name
            self._recorded.clear()
            self._look()
        call = _Call(self.function, self._reads, args, options)
        if not call.is_plain():
            key = (call.key(), tuple([m.training for m in self._modules]))
            found = self._recorded.get(key)
            if found is not None and found.fits(call):
                return found.run(call)
            if key in self._recorded and call.is_separate():
                made = _record(call)
                if made is not None:
                    self._recorded[key], result = made
                    return result
            if found is None:
                self._recorded[key] = None  # worth recording when it comes again
                if len(self._recorded) > KEPT:
                    del self._recorded[next(iter(self._recorded))]
        return _rebuilt(self.function(*args, **options), _without_graph)


class _Call:
    """A call of a function. tensors: what it reads, its arguments, and the gradients that are there, each once."""

    def __init__(self, function: Callable[..., Any], reads: Sequence[Tensor], args: tuple[Any, ...],
                 options: dict[str, Any]):
        self.function, self.positional, self.reads = function, len(args), len(reads)
        self.names, self.values = (*range(len(args)), *options), (*args, *options.values())
        named = {id(t): t for t in (*reads, *(x for x in self.values if x.__class__ is Tensor))}
        self.leaves = list(named.values())  # what may have gradients: reads first
        self.number = {key: i for i, key in enumerate(named)}
        self.gradients = [t.grad for t in self.leaves]
        self.tensors: list[Any] = [*self.leaves, *(g for g in self.gradients if g is not None)]
        self.device = default_device()
        self.k: Any = get_backend(self.device)

    def is_plain(self) -> bool:
        """Whether the function is to be called as it is. Raises RuntimeError for an argument that has a graph."""
        for name, x in zip(self.names, self.values):
            if x.__class__ is Tensor and x.node is not None and is_grad_enabled():
                raise RuntimeError(f"capture: argument {name} was made by {x.node.op.name}, and no gradient flows back "
                                   "through what is captured; detach() it")
        return (recording() is not None or bool(observers) or bool(finishers) or not self.k.records
                or any([not isinstance(t, Tensor) or t.device != self.device for t in self.tensors])
                or any([t.hooks for t in self.leaves]))

    def key(self) -> Any:
        """All that decides which launches there are, but for modules' modes."""
        kinds = tuple([(name, self.number[id(x)]) if x.__class__ is Tensor else (name, _identity(name, x))
                       for name, x in zip(self.names, self.values)])
        layouts = tuple([(t.array.data.shape, t.array.dtype.name, t.requires_grad) for t in self.leaves])
        there = tuple([g is not None for g in self.gradients])
        return threading.get_ident(), kinds, layouts, there, is_grad_enabled(), product_format.get()

    def is_separate(self) -> bool:
        """Whether it can be recorded: gradients that are there lie dense, in memory of their own. Raises ValueError if
        what it reads does not."""
        own = [i for i in range(len(self.tensors)) if i < self.reads or i >= len(self.leaves)]
        wrong = [i for i in own if not self.tensors[i].array.data.flags.c_contiguous] or self.in_common(own, own)
        if wrong and wrong[0] < self.reads:
            raise ValueError(f"capture: reads has a tensor of shape {self.tensors[wrong[0]].shape} that is not dense, "
                             "or shares its memory with another")
        return not wrong

    def in_common(self, some: Sequence[int], among: Iterable[int]) -> list[int]:
        """Which of some tensors, by number, have memory in common with another one of those among."""
        reach = {i: Pointer(self.k.address_of(self.tensors[i].array), self.tensors[i].array.data).extent()
                 for i in {*some, *among}} if some else {}
        return [i for i in some if any(i != j and reach[i][0] < reach[j][1] and reach[j][0] < reach[i][1]
                                       for j in among)]

    def with_arguments(self, leaves: Sequence[Tensor]) -> Any:
        """The function's result with these in place of its arguments; what it reads it finds by itself."""
        values = [leaves[self.number[id(x)]] if x.__class__ is Tensor else x for x in self.values]
        options = dict(zip(self.names[self.positional:], values[self.positional:]))
        return self.function(*values[:self.positional], **options)


def _identity(name: Any, x: Any) -> Any:
    """What tells an argument that is no tensor from others: 1, 1.0 and True, 0.0 and −0.0 are five."""
    if isinstance(x, Tensor):
        raise TypeError(f"capture: argument {name} holds a tensor, expected tensors as arguments of their own")
    if isinstance(x, tuple):
        return x.__class__, tuple([_identity(name, part) for part in x])
    if x.__class__.__hash__ is None:
        raise TypeError(f"capture: argument {name} is {x.__class__.__name__}, expected a tensor or something that can "
                        "be hashed")
    return x.__class__, repr(x) if isinstance(x, (bool, int, float, complex, np.generic)) else x


class _Result(NamedTuple):
    """Stands for a tensor among what a function returned."""

    number: int


@dataclass
class _Recorded:
    """A program, and how what a function leaves is made of its Arrays.

    dense:     the numbers of the tensors that it writes to, or that results are views of; written: of the former
    result:    what the function returned, with _Results for tensors
    gradients: of each leaf: None, the number of an Array, or the _Result 0, which stands for what is there
    drawn:     how many keys were drawn
    """

    program: Program
    dense: list[int]
    written: list[int]
    result: Any
    gradients: list[Any]
    drawn: int

    def fits(self, call: _Call) -> bool:
        """Whether it can be run for a call of its key: what reads and gradients lie in, and what is written to, is
        dense, and what is written to shares no memory."""
        return (all([call.tensors[i].array.data.flags.c_contiguous for i in self.dense])
                and not call.in_common(self.written, range(len(call.tensors))))

    def run(self, call: _Call) -> Any:
        generator = default_generator()
        key = _key_of(generator)
        generator.site += self.drawn
        for i in self.written:
            call.tensors[i].array.storage.version += 1
        made = self.program.run([call.k.contiguous(t.array) for t in call.tensors], key)
        for leaf, there, number in zip(call.leaves, call.gradients, self.gradients):
            leaf.grad = there if number.__class__ is _Result else \
                None if number is None else Tensor(made[number], call.device)
        return _rebuilt(self.result, lambda x: Tensor(made[x.number], call.device) if x.__class__ is _Result else x)


class _Watcher:
    """What a recording asks about draws and gradients."""

    def __init__(self, generator: Generator, leaves: Sequence[Tensor]):
        self.generator, self.leaves = generator, {id(t) for t in leaves}

    def drawn(self, generator: Generator) -> None:
        if generator is not self.generator and generator.repeats is not self.generator:
            raise RuntimeError("capture: numbers are drawn from a generator of their own, which would not go on; draw "
                               "from the default generator (eg.seed)")

    def reached(self, leaf: Tensor) -> None:
        now = recording()
        if leaf.node is None and id(leaf) not in self.leaves and now is not None and not now.made_here(
                Pointer(now.k.address_of(leaf.array), leaf.array.data)):
            raise RuntimeError(f"capture: a gradient goes to a leaf of shape {leaf.shape} that is neither an argument "
                               "nor named in reads; name it there")


def _record(call: _Call) -> tuple[_Recorded, Any] | None:
    """Make the call and record it: what was recorded, and the result. None, and nothing has changed, if the function
    writes to arguments that share memory."""
    k, originals = call.k, call.leaves
    # Arguments in memory that nothing else points to: an address is then an argument's and no closure's.
    leaves = [t if i < call.reads else Tensor(k.map("copy", t.array), call.device, t.requires_grad)
              for i, t in enumerate(originals)]
    for leaf, gradient in zip(leaves, call.gradients):
        leaf.grad = gradient
    arrays = [t.array for t in (*leaves, *call.tensors[len(leaves):])]
    versions = [a.storage.version for a in arrays]
    generator = default_generator()
    start = _key_of(generator)
    with Recording(k, arrays, watcher=_Watcher(generator, leaves)) as launches:
        result = _rebuilt(call.with_arguments(leaves), _without_graph)
    for i, (leaf, array, original) in enumerate(zip(leaves, arrays, originals)):
        if leaf.array is not array or leaf.node is not None or leaf.requires_grad != original.requires_grad:
            raise RuntimeError(f"capture: tensor {i} of shape {original.shape} becomes another, by a change in place "
                               "inside a graph or by requires_grad_(); do that outside of what is captured")
    results, template, gradients = _left(result, leaves, call.gradients)
    written = [i for i, (a, version) in enumerate(zip(arrays, versions)) if a.storage.version != version]
    if call.in_common(written, range(len(arrays))):
        if any(i < call.reads for i in written):
            raise RuntimeError("capture: what is written to in place shares memory with an argument; pass a copy")
        generator.site = start[3]
        for leaf, there in zip(originals, call.gradients):
            leaf.grad = there
        return None
    program = Program(launches, results, start)
    for i, (leaf, original) in enumerate(zip(leaves, originals)):
        original.grad = leaf.grad
        if i in written and leaf is not original:
            k.copy(original.array, leaf.array, k.layout(original.array, leaf.array))
            original.array.storage.version += 1
    views = [y.base for y in program.results if 0 <= y.base < len(arrays)]
    lie = [i for i in range(len(arrays)) if i < call.reads or i >= len(leaves)]
    return _Recorded(program, [*written, *views, *lie], written, template, gradients, generator.site - start[3]), result


def _left(result: Any, leaves: Sequence[Tensor], there: Sequence[Any]) -> tuple[list[Array], Any, list[Any]]:
    """What a call leaves: the Arrays of it all; the result, and each leaf's gradient, by their numbers (_Recorded)."""
    results: list[Array] = []

    def number(x: Any) -> Any:
        if isinstance(x, Tensor):
            results.append(x.array)
            return _Result(len(results) - 1)
        return x

    template, gradients = _rebuilt(result, number), []
    for leaf, before in zip(leaves, there):
        if leaf.grad is not None and leaf.grad is not before:
            if not isinstance(leaf.grad, Tensor) or leaf.grad.node is not None:
                raise RuntimeError("capture: a gradient is row-sparse or has a graph, which would be lost")
            gradients.append(number(leaf.grad).number)
        else:
            gradients.append(None if leaf.grad is None else _Result(0))
    return results, template, gradients


def _key_of(generator: Generator) -> Key:
    return generator.seed, generator.step, generator.microbatch, generator.site


def _rebuilt(value: Any, each: Callable[[Any], Any]) -> Any:
    """A result with each(x) for what stands in its tuples, lists and dicts."""
    if value.__class__ is dict:
        return {name: _rebuilt(x, each) for name, x in value.items()}
    if isinstance(value, (tuple, list)) and value.__class__ is not _Result:
        parts = [_rebuilt(x, each) for x in value]
        return value.__class__(*parts) if hasattr(value, "_fields") else value.__class__(parts)
    return each(value)


def _without_graph(x: Any) -> Any:
    """A result as it is given. Raises RuntimeError for a tensor that somebody could still differentiate, TypeError for
    what would be the same in each call."""
    if isinstance(x, Tensor):
        if x.node is not None and x.node.saved is not None:
            raise RuntimeError(f"capture: a result was made by {x.node.op.name}, and its graph would be lost; call "
                               "backward() inside, or detach() it")
        return Tensor(x.array, x.device)
    if x is None or isinstance(x, (bool, int, float, str, np.generic)):
        return x
    raise TypeError(f"capture: a result is {type(x).__name__}, expected tensors, alone or in tuples, lists and dicts")
