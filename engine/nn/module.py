"""Module: parameters, buffers and submodules under names, as PyTorch has them.

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 32), nn.Linear(32, 2)

        def forward(self, x):
            return self.last(relu(self.first(x)))

What an attribute is follows from what is assigned to it: a module is a submodule, a leaf tensor that requires grad is
a parameter (and stays one when it is frozen with requires_grad_(False)); a buffer, a tensor that belongs to the model
but is not trained, is announced with register_buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from engine.autograd import no_grad
from engine.backend import devices, get_backend
from engine.dtypes import as_dtype
from engine.tensor import Tensor

Self = TypeVar("Self", bound="Module")


def Parameter(data: Tensor) -> Tensor:
    """A leaf tensor over the memory of `data` that requires grad: assigned to a module, it is one of its parameters."""
    return data.detach().requires_grad_(True)


class Module:
    """A function with parameters. Subclasses define forward(); calling the module calls it."""

    training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: forward() is not defined")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    # ── what it has ─────────────────────────────────────────────────────────────────────────────────

    def __setattr__(self, name: str, value: Any) -> None:
        roles: dict[str, str] = self.__dict__.setdefault("_roles", {})
        if isinstance(value, Module):
            roles[name] = "module"
        elif isinstance(value, Tensor):
            if value.requires_grad and value.node is None:
                roles[name] = "parameter"
            elif roles.get(name) == "module":
                del roles[name]
            elif roles.get(name) == "parameter":
                raise TypeError(f"{type(self).__name__}: {name} is a parameter, and what is assigned to it is not a "
                                "leaf tensor that requires grad; wrap it in nn.Parameter")
        elif roles.get(name) == "module":
            del roles[name]
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._roles_of().pop(name, None)

    def register_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """self.<name> = value, a tensor that moves with the module and, if persistent, is in its state_dict."""
        setattr(self, name, value)
        self._roles_of()[name] = "buffer" if persistent else "buffer, not saved"

    def register_stored(self, name: str, value: Any) -> None:
        """self.<name> = value, where a parameter was: it multiplies as one, and is neither trained, moved nor saved."""
        self._roles_of()[name] = "stored"
        self.__dict__[name] = value

    def _refuse_stored(self, what: str) -> None:
        for name, value in self._named("stored", False):
            raise ValueError(f"{type(self).__name__}.{what}: {name} is {value!r}, which is only read; use the "
                             "model that this one was made from")

    def _roles_of(self) -> dict[str, str]:
        roles: dict[str, str] = self.__dict__.setdefault("_roles", {})
        return roles

    def _own(self, role: str) -> Iterator[tuple[str, Any]]:
        """(name, value) of this module's own attributes of a role, in the order in which they were first assigned."""
        for name, known in self._roles_of().items():
            if known.startswith(role) and self.__dict__[name] is not None:
                yield name, self.__dict__[name]

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, submodule) of the modules directly inside this one."""
        return self._own("module")

    def named_modules(self, prefix: str = "", remove_duplicate: bool = True) -> Iterator[tuple[str, Module]]:
        """(name, module) of this module and all inside it, outer ones first."""
        return self._walk(prefix, set() if remove_duplicate else None)

    def _walk(self, prefix: str, seen: set[int] | None) -> Iterator[tuple[str, Module]]:
        if seen is not None:
            if id(self) in seen:
                return
            seen.add(id(self))
        yield prefix, self
        for name, child in self.named_children():
            yield from child._walk(f"{prefix}.{name}" if prefix else name, seen)

    def _named(self, role: str, remove_duplicate: bool) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for prefix, module in self.named_modules("", remove_duplicate):
            for name, value in module._own(role):
                if not (remove_duplicate and id(value) in seen):
                    seen.add(id(value))
                    yield (f"{prefix}.{name}" if prefix else name), value

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of this module and all inside it; one that is shared comes once, under its first name."""
        return self._named("parameter", remove_duplicate)

    def parameters(self) -> Iterator[Tensor]:
        return (value for _, value in self.named_parameters())

    def named_buffers(self, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        return self._named("buffer", remove_duplicate)

    def num_parameters(self) -> int:
        """The number of elements of all parameters; a shared one counts once."""
        return sum(p.size for p in self.parameters())

    def twin(self: Self) -> Self:
        """A module of its own over the same tensors: what is assigned to one does not show in the other."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, _roles=dict(self._roles_of()))
        for name, child in self.named_children():
            made.__dict__[name] = child.twin()
        return made

    # ── modes ───────────────────────────────────────────────────────────────────────────────────────

    def train(self: Self, mode: bool = True) -> Self:
        """Training mode (dropout drops) here and in all submodules, or with False what eval() sets."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self: Self) -> Self:
        """Evaluation mode: dropout lets everything through."""
        return self.train(False)

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Freeze (False) or thaw all parameters."""
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for p in self.parameters():
            p.grad = None

    def apply(self: Self, function: Callable[[Module], Any]) -> Self:
        """Call function(module) for every module inside and this one, inner ones first."""
        for _, module in reversed(list(self.named_modules())):
            function(module)
        return self

    def to(self: Self, target: Any = None, *, dtype: Any = None, device: str | None = None) -> Self:
        """Convert parameters and floating buffers, with their gradients, to a dtype or device: to("float64"),
        to("reference"), to(dtype=..., device=...). The tensors stay the same objects, with other memory."""
        if isinstance(target, str) and target in devices():
            device = target
        elif target is not None:
            dtype = target
        kind = None if dtype is None else as_dtype(dtype)
        if kind is not None and not kind.is_floating:
            raise TypeError(f"Module.to: dtype is {kind}, expected float32 or float64")
        self._refuse_stored("to")
        with no_grad():
            for value in (*self.parameters(), *(buffer for _, buffer in self.named_buffers())):
                moved = value.to(dtype=kind if value.dtype.is_floating else None, device=device)
                value.array, value.device = moved.array, moved.device
                if value.grad is not None:
                    value.grad = value.grad.to(dtype=kind, device=device)
        return self

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Tensor]:
        """name -> parameter or persistent buffer, detached; the tensors share the module's memory."""
        return {name: value.detach() for name, value in self._saved(remove_duplicate=True)}

    def _saved(self, remove_duplicate: bool) -> Iterator[tuple[str, Tensor]]:
        self._refuse_stored("state_dict")
        yield from self._named("parameter", remove_duplicate)
        volatile = {f"{prefix}.{name}" if prefix else name for prefix, module in self.named_modules("", False)
                    for name, role in module._roles_of().items() if role == "buffer, not saved"}
        yield from ((name, value) for name, value in self._named("buffer", remove_duplicate) if name not in volatile)

    def load_state_dict(self, state: Mapping[str, Tensor | np.ndarray], strict: bool = True) -> None:
        """Overwrite parameters and buffers with those of `state`, converted to the module's dtypes.

        A shared parameter may come under any of its names. strict: every name must be there, and no other.
        Raises ValueError, and loads nothing, for missing, unexpected or (strict or not) misshapen entries, and
        TypeError for what holds no real numbers.
        """
        targets = dict(self._saved(remove_duplicate=False))
        given = {id(targets[name]) for name in state if name in targets}
        missing = [name for name, value in self._saved(remove_duplicate=True) if id(value) not in given]
        unexpected = [name for name in state if name not in targets]
        misshapen = [f"{name} is {np.shape(state[name])}, expected {value.shape}" for name, value in targets.items()
                     if name in state and np.shape(state[name]) != value.shape]
        read_only = [name for name, value in targets.items() if not value.array.writeable]
        problems = [("missing", missing if strict else []), ("unexpected", unexpected if strict else []),
                    ("of another shape", misshapen), ("read-only here", read_only)]
        if any(names for _, names in problems):
            raise ValueError(f"{type(self).__name__}.load_state_dict: "
                             + "; ".join(f"{what}: {listed(names)}" for what, names in problems if names))
        arrays = {name: np.asarray(state[name]) for name in targets if name in state}
        if wrong := [f"{name} is {array.dtype}" for name, array in arrays.items() if array.dtype.kind not in "biuf"]:
            raise TypeError(f"{type(self).__name__}.load_state_dict: expected real numbers; {listed(wrong)}")
        for name, array in arrays.items():
            value = targets[name]
            k = get_backend(value.device)
            source = k.array(array, value.dtype)
            k.copy(value.array, source, k.layout(value.array, source))
            value.array.storage.version += 1

    # ── looks ───────────────────────────────────────────────────────────────────────────────────────

    def extra_repr(self) -> str:
        """What stands between the parentheses of a module without submodules."""
        return ""

    def __repr__(self) -> str:
        """The tree of modules, each with the number of its parameters; equal neighbours on one line."""
        head = f"{type(self).__name__}({self.extra_repr()})"
        count = self.num_parameters()
        lines = [head + (f"  {count:,} parameters" if count else "")]
        for names, child in _runs(list(self.named_children())):
            first, *rest = repr(child).split("\n")
            label = f"{names[0]}: " if len(names) == 1 else f"{names[0]}–{names[-1]}: {len(names)} × "
            lines += [f"  {label}{first}", *("  " + line for line in rest)]
        return "\n".join(lines)


def listed(names: list[str], most: int = 5) -> str:
    """The first of some names, for an error's one line, whatever they are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = [name if name.isprintable() and len(name) <= 200 else repr(name[:100]) + "..." for name in names[:most]]
    return ", ".join(shown) + more


def _runs(children: list[tuple[str, Module]]) -> list[tuple[list[str], Module]]:
    """Neighbours that look the same, as (their names, the first of them)."""
    runs: list[tuple[list[str], Module]] = []
    for name, child in children:
        if runs and name.isdigit() and repr(runs[-1][1]) == repr(child):
            runs[-1][0].append(name)
        else:
            runs.append(([name], child))
    return runs
