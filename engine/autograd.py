"""Reverse-mode automatic differentiation over a tape of nodes.

Every op that touches a tensor requiring grad makes one Node. It holds its op, the edges to where its inputs came
from, and what its vjp rule asked to keep. backward() walks the nodes from the outputs down, each one once, when
all its consumers are done, later-made ones first: so the order in which gradients are added is fixed. It is a
loop over a heap, not a recursion, and frees each node as it leaves it.

    vjp: given g = dL/dy, an op's rule returns dL/dx = gᵀ ∂y/∂x for each input x.

Baydin, Pearlmutter, Radul, Siskind 2018, "Automatic Differentiation in Machine Learning: a Survey", section 3.2.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

from engine.backend import Array, get_backend
from engine.backend.recording import recording
from engine.precision import product_format
from engine.rowsparse import Gradient, RowSparse, add_gradients, dense

if TYPE_CHECKING:
    from engine.ops.registry import Op
    from engine.tensor import Tensor

_grad_mode: ContextVar[bool] = ContextVar("grad_mode", default=True)
_saving: ContextVar[Any] = ContextVar("saving", default=None)  # the checkpoint being recorded, if any (checkpoint.py)
_order = itertools.count()

watchers: list[Callable[[Node, str], None]] = []
"""Each is called as watcher(node, "made" | "backward") when a node is recorded, and before its rule runs."""


# ── grad mode ─────────────────────────────────────────────────────────────────────────────────────────

class _GradMode:
    """A context manager and decorator that sets whether operations are recorded."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._tokens: list[Any] = []

    def __enter__(self) -> None:
        self._tokens.append(_grad_mode.set(self._enabled))

    def __exit__(self, *_: Any) -> None:
        _grad_mode.reset(self._tokens.pop())

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with _GradMode(self._enabled):
                return function(*args, **kwargs)
        return run


def no_grad() -> _GradMode:
    """`with eg.no_grad():` or `@eg.no_grad()`: operations inside are not recorded."""
    return _GradMode(False)


def enable_grad() -> _GradMode:
    """`with eg.enable_grad():` records operations even inside no_grad."""
    return _GradMode(True)


def is_grad_enabled() -> bool:
    return _grad_mode.get()


# ── the tape ──────────────────────────────────────────────────────────────────────────────────────────

class Saved:
    """An Array kept for the rule, with the version it had."""

    __slots__ = ("array", "version")

    def __init__(self, array: Array):
        self.array = array
        self.version = array.storage.version

    def get(self, op: str, name: str) -> Array:
        if self.array.storage.version != self.version:
            raise RuntimeError(f"{op}: its {name} was modified in place after it was saved for backward "
                               f"(version {self.array.storage.version}, saved at {self.version})")
        return self.array


class Node:
    """One application of an op.

    edges:  for each input, the Node that made it, the leaf Tensor itself, or None if no gradient is wanted
    saved:  what the op's rule needs, by name: Saved arrays (or what stands for them in a checkpoint)
    shapes: each input's shape, to bring its gradient back to after broadcasting
    format: what the factors of its products are rounded to, forward and so in its rule
    keeper: the tensor that keeps its gradient (retain_grad), by a weak reference: a node does not keep its output alive
    """

    __slots__ = ("__weakref__", "attributes", "device", "edges", "format", "hooks", "keeper", "op", "order", "saved",
                 "shapes")

    def __init__(self, op: Op, edges: tuple[Any, ...], shapes: tuple[Any, ...], saved: dict[str, Any],
                 attributes: dict[str, Any], device: str):
        self.op = op
        self.edges = edges
        self.shapes = shapes
        self.saved: dict[str, Any] | None = saved
        self.attributes = attributes
        self.device = device
        self.format = product_format.get()
        self.order = next(_order)
        self.hooks: list[Callable[[Any], Gradient | None]] | None = None
        self.keeper: Callable[[], Tensor | None] | None = None
        for watcher in watchers:
            watcher(self, "made")

    def array(self, name: str) -> Array:
        """A saved array by name, checked to be unmodified."""
        if self.saved is None:
            raise RuntimeError(f"{self.op.name}: backward through a graph that has been freed; "
                               "pass retain_graph=True the first time")
        return self.saved[name].get(self.op.name, name)

    def release(self) -> None:
        self.saved = None
        self.edges = ()


def save(array: Array) -> Any:
    """How a node keeps an array: as it is, or, inside eg.checkpoint, as a promise to compute it again."""
    recorder = _saving.get()
    return kept(array) if recorder is None else recorder.save(array)


def kept(array: Array) -> Any:
    """The array itself, or what fetches it again if its memory is not to be kept."""
    again = array.storage.again
    return Saved(array) if again is None else again(array)


def edge_of(tensor: Tensor) -> Any:
    """Where gradients of this tensor go."""
    if not tensor.requires_grad:
        return None
    return tensor.node if tensor.node is not None else tensor


# ── the walk ──────────────────────────────────────────────────────────────────────────────────────────

def _consumers(roots: list[Any], targets: dict[int, Any] | None) -> dict[int, int]:
    """How many edges lead to each node and leaf, by id: of those that the roots reach and, given targets, that lead
    to a target. A node made before every target cannot lead to one, so the search does not go there.
    """
    oldest = min((_order_of(t) for t in targets.values()), default=0) if targets is not None else -1
    seen = {id(root): root for root in roots}
    count = dict.fromkeys(seen, 0)
    stack = list(seen.values())
    while stack:
        for edge in _edges(stack.pop()):
            key = id(edge)
            if key in count:
                count[key] += 1
            elif targets is None or _order_of(edge) >= oldest:
                seen[key], count[key] = edge, 1
                stack.append(edge)
    if targets is None:
        return count
    leads = set(targets)
    for edge in sorted(seen.values(), key=_order_of):  # inputs are older than what they make: one pass in that order
        if any(id(e) in leads for e in _edges(edge)):
            leads.add(id(edge))
    return {key: edges for key, edges in count.items() if key in leads}  # what has an edge to one of them is one


def _edges(edge: Any) -> list[Any]:
    return [e for e in edge.edges if e is not None] if isinstance(edge, Node) else []


def _order_of(edge: Any) -> int:
    return edge.order if isinstance(edge, Node) else -1  # a leaf is older than any node


def _walk(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], retain_graph: bool, create_graph: bool,
          deliver: Callable[[Any, Gradient], None], targets: dict[int, Any] | None = None) -> None:
    """Push cotangents through the graph; deliver(leaf or node, its whole gradient) for each one reached.

    With targets (by id), only what leads to one of them is walked. Gradients may be RowSparse; an op's rule gets a
    dense one.
    """
    gradients: dict[int, Gradient] = {}
    ready: list[tuple[float, int, Any]] = []  # a heap: later-made nodes first; leaves as soon as they are complete
    arrival = itertools.count()  # leaves among themselves: in order of completion

    def arrive(edge: Any, gradient: Gradient | None) -> None:
        if gradient is not None:
            known = gradients.get(id(edge))
            gradients[id(edge)] = gradient if known is None else add_gradients(known, gradient)
        if waiting[id(edge)] == 0:
            heapq.heappush(ready, (-edge.order if isinstance(edge, Node) else -math.inf, next(arrival), edge))

    def spread(edges: Sequence[Any], grads: Sequence[Gradient | None], shapes: Sequence[tuple[int, ...]]) -> None:
        for target, grad, shape in zip(edges, grads, shapes):
            if target is not None and id(target) in waiting:
                waiting[id(target)] -= 1
                arrive(target, None if grad is None else _fit(grad, shape))

    roots = [edge_of(out) for out in outputs]
    waiting = _consumers(roots, targets)
    given = [(root, cotangent) for root, cotangent in zip(roots, cotangents) if id(root) in waiting]
    for root, _ in given:
        waiting[id(root)] += 1
    for root, cotangent in given:
        waiting[id(root)] -= 1
        arrive(root, cotangent)
    with _GradMode(create_graph):
        while ready:
            edge = heapq.heappop(ready)[2]
            gradient = gradients.pop(id(edge), None)
            if gradient is not None and edge.hooks:
                for hook in tuple(edge.hooks):
                    replaced = hook(gradient)
                    gradient = gradient if replaced is None else replaced
            if gradient is not None:
                deliver(edge, gradient)
            if not isinstance(edge, Node):
                continue
            if edge.saved is None:
                edge.array("graph")  # raises: freed
            edges = edge.edges
            for watcher in watchers:
                watcher(edge, "backward")
            if gradient is None:
                grads: Sequence[Gradient | None] = (None,) * len(edges)
            else:
                token = product_format.set(edge.format)
                try:
                    grads = edge.op.gradients(edge, dense(gradient), create_graph)
                finally:
                    product_format.reset(token)
            if not (retain_graph or create_graph):
                edge.release()
            spread(edges, grads, edge.shapes)
            del grads  # what is delivered is its receiver's alone, who may free it while the walk goes on


def _fit(gradient: Gradient, shape: tuple[int, ...]) -> Gradient:
    """Bring a gradient back to its input's shape: sum over the axes that broadcasting added.

    The transpose of broadcasting is summing: y = x repeated, so dL/dx = Σ of the repeats' dL/dy.
    """
    if gradient.shape != shape:
        gradient = dense(gradient)
        added = gradient.ndim - len(shape)
        axes = (*range(added), *(added + i for i, n in enumerate(shape) if n == 1 and gradient.shape[added + i] != 1))
        gradient = gradient.sum(axis=axes, keepdims=True).reshape(shape)
    return gradient


def _cotangents(what: str, outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The given cotangents, checked, or ones for single-element outputs."""
    full = []
    for i, (out, grad) in enumerate(zip(outputs, grads, strict=True)):
        if not out.requires_grad:
            raise RuntimeError(f"{what}: output {i} does not require grad, so there is no graph behind it")
        if grad is None:
            if out.size != 1:
                raise RuntimeError(f"{what}: output {i} has shape {out.shape}; pass its gradient, "
                                   "or reduce it to one element first")
            k = get_backend(out.device)
            grad = type(out)(k.full(out.shape, 1, out.dtype), out.device)
        elif grad.shape != out.shape:
            raise ValueError(f"{what}: the gradient of output {i} has shape {grad.shape}, expected {out.shape}")
        full.append(grad)
    return full


def _unaliased(cotangents: Sequence[Tensor], create_graph: bool) -> Callable[[Gradient], Gradient]:
    """A function that copies a gradient if its memory was handed out before, or is a view, or was given by the user.

    A rule may pass its g on as it is, or a view of it: y = a + b gives both operands the same g.
    """
    handed_out = {id(c.array.storage): c.array.storage for c in cotangents}

    def own(gradient: Gradient) -> Gradient:
        if isinstance(gradient, RowSparse):  # made by its rule for one weight
            return gradient
        storage = gradient.array.storage
        if not create_graph and (storage.has_views or id(storage) in handed_out):
            gradient = +gradient  # in memory of its own, with the same bits
            storage = gradient.array.storage
        handed_out[id(storage)] = storage
        return gradient

    return own


# ── what users call ───────────────────────────────────────────────────────────────────────────────────

def backward(outputs: Sequence[Tensor], grads: Sequence[Tensor | None], *, retain_graph: bool = False,
             create_graph: bool = False, completed: Callable[[Tensor], None] | None = None) -> None:
    """Accumulate Σ gᵢ · d outputᵢ / d leaf into every leaf's `.grad`.

    completed(leaf) is called when no node that leads to this leaf is left, so its `.grad` is final, while the walk goes
    on towards others.
    """
    cotangents = _cotangents("backward", outputs, grads)
    own = _unaliased(cotangents, create_graph)

    def deliver(edge: Any, gradient: Gradient) -> None:
        target = edge
        if isinstance(edge, Node):
            target = edge.keeper() if edge.keeper is not None else None
        if target is not None:
            if (now := recording()) is not None and now.watcher is not None:
                now.watcher.reached(target)
            target.grad = own(gradient) if target.grad is None else add_gradients(target.grad, gradient)
        if completed is not None and not isinstance(edge, Node):
            completed(edge)

    _walk(outputs, cotangents, retain_graph, create_graph, deliver)


def grad(outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor],
         grad_outputs: Tensor | Sequence[Tensor | None] | None = None, *, create_graph: bool = False,
         retain_graph: bool | None = None, allow_unused: bool = False) -> Any:
    """Σ gᵢ · d outputᵢ / d input for each input: a tensor for one input, a tuple for a sequence. `.grad` is untouched.

    create_graph records the computation, so the result can be differentiated again.
    Raises RuntimeError for an input that the outputs do not depend on, unless allow_unused (then None).
    """
    single = not isinstance(inputs, (tuple, list))
    wanted: Any = (inputs,) if single else inputs
    outs: Any = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    cots: Any = grad_outputs if isinstance(grad_outputs, (tuple, list)) else (grad_outputs,) * len(outs)
    for i, x in enumerate(wanted):
        if not x.requires_grad:
            raise RuntimeError(f"grad: input {i} does not require grad")
    targets = {id(edge_of(x)): edge_of(x) for x in wanted}
    found: dict[int, Gradient] = {}
    cotangents = _cotangents("grad", outs, cots)
    own = _unaliased(cotangents, create_graph)

    def deliver(edge: Any, gradient: Gradient) -> None:
        if id(edge) in targets:
            found[id(edge)] = own(gradient)

    retain = create_graph if retain_graph is None else retain_graph
    _walk(outs, cotangents, retain, create_graph, deliver, targets)
    results = [found.get(id(edge_of(x))) for x in wanted]
    unused = [i for i, result in enumerate(results) if result is None]
    if unused and not allow_unused:
        raise RuntimeError(f"grad: the outputs do not depend on input {unused[0]}; allow_unused=True gives None")
    return results[0] if single else tuple(results)
