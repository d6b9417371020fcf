"""A naive engine: tensors, tape, views and in-place writes in the plainest NumPy. machine.py holds the real one to it.

Everything is a whole number in float64, so that every sum is exact in any order and all is compared bit for bit. Nodes
keep copies of what their pullbacks need; versions of the memory are kept beside them, to know when the real engine,
which keeps no copies, may refuse.

What it says of writing in place (engine/ops/inplace.py): on what is recorded a write binds the tensor to a new node and
is refused on leaves and where another tensor sees the memory; otherwise it changes the memory that all views see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Pull = Callable[[np.ndarray], np.ndarray]
LARGEST = 2.0**45  # beyond, a sum of a few is no longer exact
_order = itertools.count()


class Refused(Exception):
    """What the engine must refuse; the words that its message must contain."""


class Memory:
    """What views share: how often it was written to."""

    def __init__(self) -> None:
        self.version = 0


class Node:
    """A leaf, or one application of an op.

    parents: (node, pullback) for each operand that wants a gradient
    kept:    (memory, its version) of operands and result, which a rule may have kept
    state:   "whole"; "freed" by backward; "unknown" where an error stopped a backward half-way
    """

    def __init__(self, parents: Sequence[tuple[Node, Pull]] = (), kept: Sequence[Memory] = ()):
        self.parents = list(parents)
        self.kept = [(memory, memory.version) for memory in kept]
        self.state = "whole"
        self.order = next(_order)
        self.factors: list[float] = []  # what hooks multiply its gradient by
        self.retainers: list[ModelTensor] = []

    @property
    def stale(self) -> bool:
        return any(memory.version != version for memory, version in self.kept)


class ModelTensor:
    """data is a NumPy array; views are NumPy views, so that writes go through."""

    def __init__(self, data: np.ndarray, memory: Memory, node: Node | None = None, leaf: bool = False):
        self.data, self.memory, self.node, self.leaf = data, memory, node, leaf
        self.grad: np.ndarray | None = None

    @property
    def needs(self) -> bool:
        return self.node is not None


def _fit(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over the axes that broadcasting added."""
    for _ in range(g.ndim - len(shape)):
        g = g.sum(0)
    for axis, n in enumerate(shape):
        if n == 1 and g.shape[axis] != 1:
            g = g.sum(axis, keepdims=True)
    return np.array(g)


# Each op: its value, and the pullback to each operand, from copies of the operands.
OPS: dict[str, tuple[int, Callable[..., Any], Callable[..., list[Pull]]]] = {
    "add": (2, np.add, lambda a, b: [lambda g: g, lambda g: g]),
    "subtract": (2, np.subtract, lambda a, b: [lambda g: g, lambda g: -g]),
    "multiply": (2, np.multiply, lambda a, b: [lambda g: g * b, lambda g: g * a]),
    "negative": (1, np.negative, lambda a: [lambda g: -g]),
    "square": (1, np.square, lambda a: [lambda g: g * 2 * a]),
    "relu": (1, lambda a: np.maximum(a, 0.0), lambda a: [lambda g: np.where(a > 0, g, 0.0)]),
    "sum": (1, lambda a: np.asarray(a.sum()), lambda a: [lambda g: np.broadcast_to(g, a.shape)]),
    "matmul": (2, np.matmul, lambda a, b: [lambda g: g @ b.T, lambda g: a.T @ g]),
}

# Each view: how NumPy makes it, and how a gradient goes back into zeros of the operand's shape.
VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transpose": lambda x: x.T, "tail": lambda x: x[1:], "first": lambda x: x[0, ...],
    "every second": lambda x: x[..., ::2], "backwards": lambda x: x[::-1], "expand": lambda x: x[None],
}

WRITES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "+=": lambda a, b: a + b, "*=": lambda a, b: a * b, "copy_": lambda a, b: np.broadcast_to(b, a.shape),
}


def leaf(data: np.ndarray, requires_grad: bool) -> ModelTensor:
    return ModelTensor(data, Memory(), Node() if requires_grad else None, requires_grad)


def apply(name: str, operands: Sequence[ModelTensor], recording: bool) -> ModelTensor:
    """An op of OPS."""
    _, value, pulls = OPS[name]
    data, memory = np.array(value(*[x.data for x in operands])), Memory()
    return ModelTensor(data, memory, _node(operands, pulls(*[x.data.copy() for x in operands]), recording, memory))


def _node(operands: Sequence[ModelTensor], pulls: Sequence[Pull], recording: bool, memory: Memory) -> Node | None:
    if not recording or not any(x.needs for x in operands):
        return None

    def fitted(pull: Pull, shape: tuple[int, ...]) -> Pull:
        return lambda g: _fit(pull(g), shape)

    parents = [(x.node, fitted(pull, x.data.shape)) for x, pull in zip(operands, pulls) if x.node is not None]
    return Node(parents, [*[x.memory for x in operands], memory])


def view(name: str, x: ModelTensor, recording: bool) -> ModelTensor:
    shape, f = x.data.shape, VIEWS[name]

    def pull(g: np.ndarray) -> np.ndarray:
        whole = np.zeros(shape)
        f(whole)[...] = g
        return whole

    return ModelTensor(f(x.data), x.memory, _node([x], [pull], recording, x.memory))


def detach(x: ModelTensor) -> ModelTensor:
    return ModelTensor(x.data, x.memory)


def write(name: str, x: ModelTensor, value: ModelTensor, recording: bool, others: Sequence[ModelTensor]) -> bool:
    """x op= value, or raises Refused. Whether x was bound to a new node; others: all tensors alive."""
    result = np.array(WRITES[name](x.data, value.data))
    if not (recording and (x.needs or value.needs)):
        x.data[...] = result
        x.memory.version += 1
        return False
    if x.leaf:
        raise Refused("leaf")
    if any(other is not x and other.memory is x.memory for other in others):
        raise Refused("view")
    pulls: dict[str, list[Pull]] = {
        "+=": [lambda g: g, lambda g: g], "copy_": [lambda g: g * 0.0, lambda g: g],
        "*=": OPS["multiply"][2](x.data.copy(), value.data.copy())}
    memory = Memory()
    x.node = _node([x, value], pulls[name], True, memory)
    x.data, x.memory = result, memory
    return True


# ── backward ──────────────────────────────────────────────────────────────────────────────────────────

def reached(root: Node) -> list[Node]:
    """The nodes behind root, later-made first."""
    found, stack = {id(root): root}, [root]
    while stack:
        for parent, _ in stack.pop().parents:
            if id(parent) not in found:
                found[id(parent)] = parent
                stack.append(parent)
    return sorted(found.values(), key=lambda node: -node.order)


def gradients(root: Node, g: np.ndarray) -> dict[int, np.ndarray]:
    """The whole gradient of every node behind root, hooks applied, by id. Raises Refused where the graph was freed."""
    nodes = reached(root)
    if any(node.state == "freed" and node.parents for node in nodes):
        raise Refused("freed")
    sums = {id(root): g}
    for node in nodes:
        for factor in node.factors:
            sums[id(node)] = sums[id(node)] * factor
        for parent, pull in node.parents:
            part = pull(sums[id(node)])
            sums[id(parent)] = sums[id(parent)] + part if id(parent) in sums else part
    return sums


def exact(arrays: Sequence[np.ndarray]) -> bool:
    """Whether numbers are small enough for sums of a few to be exact."""
    return all(bool(np.all(np.abs(x) <= LARGEST)) for x in arrays)
