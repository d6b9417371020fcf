"""The op decorator: one definition, from which calls, gradients, methods, checks and documentation follow.

    @op("... -> ...", reference=np.exp, method="exp")
    def exp(k, x):                      # forward: k launches kernels, x is an Array
        '''y = eˣ.'''
        return k.map("exp", x)

    @exp.vjp
    def _(g, y):                        # dL/dx from g = dL/dy, in Tensor ops: so it can be differentiated again
        return g * y

A rule's parameter names say what backward needs, and only that is kept:

    g               the output's cotangent
    y               the output
    x, weight ...   an input, or an attribute (axis, eps ...), by its name in the forward
    x_shape         an input's shape, keeping none of its data
    needs           a tuple of bools: which inputs want a gradient
    anything else   what the forward returned beside y, in a dict: `return y, {"rstd": rstd}`

It returns the gradient of the one input, or a tuple with one for each, None where there is none.

A fused op's rule is written on raw Arrays, for speed: `@layer_norm.kernel_vjp def _(k, g, x, mean, rstd)`. It also
has a composition of primitive ops: `@layer_norm.composition def _(x, weight, bias, *, eps)`, which documents it,
is its float64 oracle, runs on devices without its kernel, and is differentiated for higher derivatives.

The signature names axes: "...i, oi, o -> ...o" reads: x (..., i), weight (o, i), bias (o), y (..., o). Equal letters
are equal lengths, and the error that says otherwise is made from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from engine import autograd
from engine.autograd import Node, _grad_mode, edge_of, save
from engine.backend import Array, get_backend
from engine.dtypes import DType, as_dtype, float32, promote, promote_scalar
from engine.rowsparse import Gradient, RowSparse
from engine.tensor import Tensor, default_device, tensor

registry: dict[str, Op] = {}
"""Every public op by name: the rows that tests, documentation and benchmarks are generated from."""

internal: dict[str, Op] = {}
"""The ops that public ones are made of, and users do not call."""

operand_classes: dict[type, Callable[[Op, Sequence[Any], dict[str, Any]], Tensor]] = {}
"""Classes of operands that are no tensors and cannot become any (stored.py): f(op, operands, attributes) computes."""

Value = Any  # a Tensor, or what becomes one: a NumPy array or a Python number


class Op:
    """An op; calling it computes, and records a node if a gradient is wanted."""

    def __init__(self, forward: Callable[..., Any], signature: str, *, reference: Callable[..., Any] | None,
                 types: str, fixed: tuple[str, ...], kernel: str | None, composite: bool, part_of: str | None):
        self.name = part_of or forward.__name__
        self.forward = forward
        self.signature = signature
        self.reference = reference
        self.types = types
        self.fixed = fixed
        self.kernel = kernel or forward.__name__
        self.composite = composite
        self.variadic = signature.startswith("*")
        self.named_axes = not self.variadic and any(c.isalpha() for c in signature.split("->")[0])
        self.rule: Callable[..., Any] | None = None
        self.kernel_rule: Callable[..., Any] | None = None
        self.composed: Callable[..., Any] | None = None
        self.differentiable = False
        self.needed: tuple[str, ...] = ()
        self.inputs, self.attributes, self.optional = self._parameters()
        self.binds = self.variadic or bool(self.attributes)  # a call's arguments are not just its operands
        self.required = [name for name, default in self.attributes.items() if default is inspect.Parameter.empty]
        self.__doc__ = forward.__doc__
        self.__name__ = self.name
        self.__wrapped__ = forward

    def _parameters(self) -> tuple[tuple[str, ...], dict[str, Any], set[str]]:
        """The forward's parameters after k: the tensors that the signature counts, the attributes with their defaults,
        and which of all may be None."""
        parameters = parameters_of(self.forward)
        names = list(parameters)[0 if self.composite else 1:]
        left = self.signature.split("->")[0].strip()
        count = 1 if self.variadic else len(left.split(",")) if left else 0  # variadic: one sequence of tensors
        optional = {name for name in names if parameters[name] is None}
        return tuple(names[:count]), {name: parameters[name] for name in names[count:]}, optional

    @property
    def __signature__(self) -> inspect.Signature:
        """What help() shows: the forward's parameters without k, which a caller does not pass."""
        whole = inspect.signature(self.forward)
        return whole if self.composite else whole.replace(parameters=list(whole.parameters.values())[1:])

    # ── the decorators that complete a definition ───────────────────────────────────────────────────

    def vjp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Register a rule on Tensors: rule(g, ...)."""
        self.rule, self.differentiable = rule, True
        self.needed = tuple(parameters_of(rule))[1:]
        return rule

    def kernel_vjp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Register a rule on raw Arrays: rule(k, g, ...)."""
        self.kernel_rule, self.differentiable = rule, True
        self.needed = tuple(parameters_of(rule))[2:]
        return rule

    def composition(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Register the op as a composition of primitive ops."""
        self.composed = function
        return function

    @property
    def fused(self) -> bool:
        return self.composed is not None

    def __repr__(self) -> str:
        return f"<op {self.name}: {self.signature}>"

    # ── the call ────────────────────────────────────────────────────────────────────────────────────

    def __call__(self, *args: Value, **attributes: Any) -> Tensor:
        if self.composite:
            operands = self._composite_operands(args)
            return _keeping_views(operands, lambda: self.forward(*operands, **attributes))
        values: Sequence[Any] = args
        if attributes or self.binds or len(args) != len(self.inputs):
            values, attributes = self._bind(args, attributes)
        tensors = values
        if not self._alike(values):
            for value in values:
                if value.__class__ in operand_classes:
                    return operand_classes[value.__class__](self, values, attributes)
            tensors = self._promoted(self._as_tensors(values))
        first = tensors[0] if tensors else None
        device = first.device if first is not None else self._device_of(tensors)
        k = get_backend(device)
        arrays = [None if t is None else t.array for t in tensors]
        if self.named_axes:
            check_shapes(self.name, self.signature, self.inputs,
                         tuple([None if a is None else a.data.shape for a in arrays]))
        if self.composed is not None and not k.has_fused(self.kernel):
            composed = self.composed
            return _keeping_views(tensors, lambda: composed(*tensors, **attributes))
        y = self.forward(k, arrays, **attributes) if self.variadic else self.forward(k, *arrays, **attributes)
        extra: dict[str, Array | None] = {}
        if y.__class__ is tuple:
            y, extra = y
        if self.differentiable and _grad_mode.get():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return Tensor(y, device, True, self._record(tensors, arrays, attributes, y, extra, device))
        return Tensor(y, device)

    def _device_of(self, tensors: Sequence[Tensor | None]) -> str:
        return next((t.device for t in tensors if t is not None), default_device())

    def _composite_operands(self, args: tuple[Any, ...]) -> Sequence[Any]:
        """A composite's arguments, with operands that are arrays, lists or numbers as tensors (indices as they are)."""
        if self.variadic or all([a.__class__ is Tensor or name in self.fixed for name, a in zip(self.inputs, args)]):
            return args
        count = len(self.inputs)
        device = next((a.device for a in args[:count] if isinstance(a, Tensor)), default_device())
        k = get_backend(device)
        made = list(args)
        for i, (name, value) in enumerate(zip(self.inputs, args)):
            if name not in self.fixed and value is not None and not isinstance(value, Tensor):
                made[i] = self._operand(name, value, args[:count], k, device)
        return made

    def _alike(self, values: Sequence[Any]) -> bool:
        """Whether the operands are what most calls pass: tensors on one device, of the one type to compute in."""
        if self.fixed or not values or values[0].__class__ is not Tensor:
            return False
        device, dtype = values[0].device, values[0].array.dtype
        for t in values:
            if t.__class__ is not Tensor or t.device != device or t.array.dtype is not dtype:
                return False
        return dtype.is_floating or self.types == "same" or self.types == "any"

    def _bind(self, args: tuple[Any, ...], attributes: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Split a call's arguments into tensor operands and attributes, with defaults filled in."""
        count = len(self.inputs)
        if len(args) > count + len(self.attributes):
            raise TypeError(f"{self.name}: got {len(args)} arguments, expected at most {count + len(self.attributes)}")
        values = list(args[:count])
        for name in self.inputs[len(values):]:
            if name in attributes:
                values.append(attributes.pop(name))
            elif name in self.optional:
                values.append(None)
            else:
                raise TypeError(f"{self.name}: argument {name!r} is missing")
        bound = {**self.attributes, **dict(zip(self.attributes, args[count:])), **attributes}
        if len(bound) > len(self.attributes):
            unknown = next(name for name in bound if name not in self.attributes)
            raise TypeError(f"{self.name}: got an unexpected argument {unknown!r}, "
                            f"expected {', '.join((*self.inputs, *self.attributes))}")
        for name in self.required:
            if bound[name] is inspect.Parameter.empty:
                raise TypeError(f"{self.name}: argument {name!r} is missing")
        if self.variadic:
            if isinstance(values[0], Tensor) or not hasattr(values[0], "__iter__"):
                raise TypeError(f"{self.name}: {self.inputs[0]} is {type(values[0]).__name__}, "
                                "expected a list or tuple of tensors")
            return list(values[0]), bound
        return values, bound

    def _as_tensors(self, values: Sequence[Any]) -> list[Tensor | None]:
        """Operands as tensors on one device."""
        tensors: list[Any] = list(values)
        device = next((v.device for v in tensors if isinstance(v, Tensor)), default_device())
        k = get_backend(device)
        for i, (name, value) in enumerate(zip(self.operand_names(values), values)):
            if value is None:
                if name not in self.optional:
                    raise TypeError(f"{self.name}: {name} is None, expected a tensor")
            elif not isinstance(value, Tensor):
                tensors[i] = self._operand(name, value, values, k, device)
        on = [t.device for t in tensors if t is not None]
        if len(set(on)) > 1:
            raise ValueError(f"{self.name}: operands are on different devices ({', '.join(on)}); move them with .to()")
        return tensors

    def _operand(self, name: str, value: Any, values: Sequence[Any], k: Any, device: str) -> Tensor:
        """One of the operands `values` that is no tensor yet: a number, a nested list or a NumPy array."""
        if isinstance(value, (bool, int, float)):
            return Tensor(k.constant(value, self._weak_type(type(value), values)), device)
        try:
            if isinstance(value, (np.ndarray, np.generic)):
                return Tensor(k.from_numpy(np.asarray(value)), device)
            data = np.asarray(value)  # floats in lists are weak too: by way of float32 they would lose digits
            return tensor(data, self._weak_type(float, values) if data.dtype.kind == "f" else None, device)
        except (TypeError, ValueError):
            raise TypeError(f"{self.name}: {name} is {type(value).__name__}, expected a tensor or numbers") from None

    def _weak_type(self, kind: type, values: Sequence[Any]) -> DType:
        """A Python number is weak: it takes the type of the tensors in the call where that can hold its kind."""
        typed = (v for name, v in zip(self.operand_names(values), values)
                 if name not in self.fixed and isinstance(v, (Tensor, np.ndarray, np.generic)))
        kinds = [v.dtype if isinstance(v, Tensor) else as_dtype(v.dtype) for v in typed]
        if not kinds:
            return as_dtype(kind)
        return promote_scalar(reduce(promote, kinds), kind.__name__)

    def operand_names(self, values: Sequence[Any]) -> Sequence[str]:
        """The name of each operand; those of one sequence share its name."""
        return self.inputs if not self.variadic else self.inputs * len(values)

    def _promoted(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """The operands in the one type that the op computes in."""
        if self.types == "any":
            return tensors
        present = [t for t in tensors if t is not None]
        first = present[0].dtype if present else float32
        if not self.fixed and all(t.dtype is first for t in present) and (first.is_floating or self.types == "same"):
            return tensors
        names = self.operand_names(tensors)
        for name, t in zip(names, tensors):
            if name in self.fixed and t is not None and t.dtype.is_floating:
                raise TypeError(f"{self.name}: {name} has dtype {t.dtype}, expected an integer or bool type")
        moving = [t for name, t in zip(names, tensors) if t is not None and name not in self.fixed]
        dtype = reduce(promote, [t.dtype for t in moving])
        if self.types != "same" and not dtype.is_floating:
            if self.types == "float!":  # fused kernels do not guess
                raise TypeError(f"{self.name}: {names[0]} has dtype {moving[0].dtype}, expected float32 or float64")
            dtype = float32
        return [t if t is None or t.dtype is dtype or name in self.fixed else t.to(dtype=dtype)
                for name, t in zip(names, tensors)]

    # ── gradients ───────────────────────────────────────────────────────────────────────────────────

    def _record(self, tensors: Sequence[Tensor | None], arrays: Sequence[Array | None], attributes: dict[str, Any],
                y: Array, extra: dict[str, Array | None], device: str) -> Node:
        """The node of this application: edges to the inputs, and the arrays that the rule's names ask for."""
        edges = tuple([None if t is None else edge_of(t) for t in tensors])
        shapes = tuple([() if t is None else t.shape for t in tensors])
        saved: dict[str, Any] = {}
        needed = self.needed
        if self.kernel_rule is not None:  # the composition may be replayed, from the inputs
            needed = (*needed, *self.inputs)
        for name in needed:
            if name == "y":
                saved[name] = save(y)
            elif name in extra or (name in self.inputs and not self.variadic):
                array = extra[name] if name in extra else arrays[self.inputs.index(name)]
                saved[name] = None if array is None else save(array)
        return Node(self, edges, shapes, saved, attributes, device)

    def gradients(self, node: Node, g: Tensor, create_graph: bool) -> Sequence[Gradient | None]:
        """gᵀ ∂y/∂x for each input x of a node, as its rule has it."""
        if self.rule is not None:
            grads = self.rule(g, *[self._argument(node, name, create_graph) for name in self.needed])
        elif create_graph:
            return self._replay(node, g)
        else:
            assert self.kernel_rule is not None
            k = get_backend(node.device)
            raw = self.kernel_rule(k, k.contiguous(g.array), *[self._raw_argument(node, name) for name in self.needed])
            grads = tuple([d if d is None or d.__class__ is RowSparse else Tensor(d, node.device)
                           for d in (raw if isinstance(raw, tuple) else (raw,))])
        return grads if isinstance(grads, (tuple, list)) else (grads,)

    def _argument(self, node: Node, name: str, create_graph: bool) -> Any:
        """What a Tensor rule asked for by name."""
        if name in self.inputs and node.saved is not None and name in node.saved:
            if node.saved[name] is None:
                return None
            edge = node.edges[self.inputs.index(name)] if create_graph else None
            return _tensor_at(node.array(name), edge, node)
        if node.saved is not None and name in node.saved:
            return _tensor_at(node.array(name), node if create_graph and name == "y" else None, node)
        return self._plain_argument(node, name)

    def _raw_argument(self, node: Node, name: str) -> Any:
        """What a kernel rule asked for by name."""
        if node.saved is not None and name in node.saved:
            return None if node.saved[name] is None else node.array(name)
        return self._plain_argument(node, name)

    def _plain_argument(self, node: Node, name: str) -> Any:
        if name in node.attributes:
            return node.attributes[name]
        if name == "needs":
            return tuple(edge is not None for edge in node.edges)
        if name.endswith("_shapes"):
            return node.shapes
        if name.endswith("_shape"):
            return node.shapes[self.inputs.index(name.removesuffix("_shape"))]
        raise RuntimeError(f"{self.name}: its vjp rule asks for {name!r}, which is no input, attribute or saved value")

    def _replay(self, node: Node, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of a fused op as differentiable tensors: replay its composition and differentiate that."""
        # An alias of each input: differentiating stops there instead of running on into the inputs' own graphs.
        inputs = [_alias(self._argument(node, name, True)) for name in self.inputs]
        assert self.composed is not None
        with autograd.enable_grad():
            y = self.composed(*inputs, **node.attributes)
            wanted: Any = [x for x, edge in zip(inputs, node.edges) if edge is not None]
            found = iter(autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
        return tuple([None if edge is None else next(found) for edge in node.edges])


def _tensor_at(array: Array, edge: Any, node: Node) -> Tensor:
    """A tensor over a saved array, joined to the graph where it was: by its leaf, or by the node that made it."""
    if isinstance(edge, Tensor):
        return edge
    if edge is None:
        return Tensor(array, node.device)
    return Tensor(array, node.device, True, edge)


def _alias(x: Tensor | None) -> Tensor | None:
    """The same tensor behind a node of its own, whose rule passes g on."""
    if x is None or not x.requires_grad:
        return x
    return Tensor(x.array, x.device, True, Node(ALIAS, (edge_of(x),), (x.shape,), {}, {}, x.device))


def _keeping_views(operands: Sequence[Any], run: Callable[[], Any]) -> Any:
    """run(), an op that is made of others. A view that it makes of an operand, and that the tape may keep, is nobody
    else's: it does not keep the operand from being changed in place (inplace.py), unless it is the result."""
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    unseen = [x.array.storage for x in given if x.__class__ is Tensor and not x.array.storage.has_views]
    result = run()
    if unseen and isinstance(result, (Tensor, tuple, list)):
        results = (result,) if isinstance(result, Tensor) else result
        shared = {id(y.array.storage) for y in results if isinstance(y, Tensor)}
        for storage in unseen:
            storage.has_views = id(storage) in shared
    return result


def cast(k: Any, x: Array, dtype: DType) -> Array:
    """x in another element type, without gradients: for indices and the like."""
    y = k.empty(x.data.shape, dtype)
    k.cast(y, x)
    return y


def parameters_of(function: Any) -> dict[str, Any]:
    """A plain function's parameters and their defaults, as inspect.signature has them, in a hundredth of the time:
    importing the engine asks for some five hundred."""
    code, defaults = function.__code__, function.__defaults__ or ()
    plain, only = code.co_argcount, code.co_kwonlyargcount
    names = code.co_varnames[:plain + only]
    if code.co_flags & inspect.CO_VARARGS:  # *xs: its name comes last, its place is before the keywords
        names = (*names[:plain], code.co_varnames[plain + only], *names[plain:])
    given = dict(zip(names[plain - len(defaults):], defaults)) | (function.__kwdefaults__ or {})
    return {name: given.get(name, inspect.Parameter.empty) for name in names}


# ── shapes ────────────────────────────────────────────────────────────────────────────────────────────

@lru_cache(maxsize=8192)
def check_shapes(name: str, signature: str, inputs: tuple[str, ...],
                 shapes: tuple[tuple[int, ...] | None, ...]) -> None:
    """Hold the operands' shapes against the signature; raises ValueError with the line that says which does not fit."""
    sizes: dict[str, tuple[int, str]] = {}
    for operand, pattern, shape in zip(inputs, signature.split("->")[0].split(","), shapes):
        if shape is None:
            continue
        pattern = pattern.strip()
        axes = pattern.removeprefix("...")
        if len(shape) < len(axes) or (len(shape) > len(axes) and not pattern.startswith("...")):
            at_least = "at least " if pattern.startswith("...") else ""
            raise ValueError(f"{name}: {operand} has shape {shape}, expected {at_least}{len(axes)} axes "
                             f"({', '.join(axes) or 'none'}) as in {signature!r}")
        for axis, n in zip(axes, shape[len(shape) - len(axes):]):
            known, owner = sizes.setdefault(axis, (n, operand))
            if known != n:
                raise ValueError(f"{name}: {operand} has shape {shape}, where axis {axis!r} is {n}, expected {known} "
                                 f"as in {owner} {shapes[inputs.index(owner)]} (signature {signature!r})")


def axis_index(name: str, axis: int, ndim: int) -> int:
    """A non-negative axis; raises IndexError naming the op."""
    if not isinstance(axis, (int, np.integer)) or not -ndim <= axis < ndim:
        raise IndexError(f"{name}: axis is {axis!r}, expected a whole number in [{-ndim}, {ndim})")
    return int(axis) % ndim


def axes_tuple(name: str, axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """The axes named by None (all), a number or several, sorted and checked for repeats."""
    if axis is None:
        return tuple(range(ndim))
    several = axis if isinstance(axis, (tuple, list)) else (axis,)
    axes = tuple(sorted(axis_index(name, a, ndim) for a in several))
    if len(set(axes)) != len(axes):
        raise ValueError(f"{name}: axis {axis} names an axis twice")
    return axes


# ── the decorators ────────────────────────────────────────────────────────────────────────────────────

def op(signature: str, *, reference: Callable[..., Any] | None = None, types: str = "same",
       fixed: tuple[str, ...] = (), method: str | None = None, kernel: str | None = None, public: bool = True,
       composite: bool = False, part_of: str | None = None) -> Callable[[Callable[..., Any]], Op]:
    """Register an op.

    signature: shapes, "...i, oi, o -> ...o"; "*" before it for one sequence of tensors
    reference: the same in NumPy on float64 arrays; None where the op's row has an equation of its own
    types:     "same": operands are promoted to one type; "float": and integers become float32; "float!": integers
               are refused; "any": operands are left alone
    fixed:     operands that are indices or conditions: integer or bool, and no part of the promotion
    method:    the Tensor method to attach ("" for the op's own name)
    kernel:    a fused op's kernel in kernels.h, if it is not called as the op is
    part_of:   the public op whose arguments these are, for one that is not public: errors name what a user has called
    """
    def register(forward: Callable[..., Any]) -> Op:
        made = Op(forward, signature, reference=reference, types=types, fixed=fixed, kernel=kernel, composite=composite,
                  part_of=part_of)
        (registry if public else internal)[forward.__name__] = made
        if method is not None:
            name = method or made.name
            attach(name, _as_method(made, name))
        return made
    return register


def composite(signature: str, **row: Any) -> Callable[[Callable[..., Any]], Op]:
    """Register a public op that is nothing but a few lines of other ops: its gradient is theirs."""
    return op(signature, composite=True, **row)


def attach(name: str, method: Any) -> None:
    """Make `method` an attribute of Tensor; tools/make_stubs.py writes its type to tensor.pyi."""
    setattr(Tensor, name, method)


def _as_method(made: Op, name: str) -> Callable[..., Tensor]:
    def run(self: Tensor, *args: Any, **attributes: Any) -> Tensor:
        return made(self, *args, **attributes)
    run.__name__, run.__doc__ = name, made.__doc__
    return run


@op("... -> ...", public=False)
def _same(k: Any, x: Array) -> Array:
    return x


@_same.vjp
def _(g: Tensor) -> Tensor:
    return g


ALIAS = _same
