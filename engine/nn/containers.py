"""Modules that hold other modules in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from engine.nn.module import Module


class ModuleList(Module):
    """A list of modules; they are named "0", "1" ..."""

    def __init__(self, modules: Iterable[Module] = ()):
        super().__init__()
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> None:
        """Add one at the end. Raises TypeError for what is not a Module, like a function."""
        if not isinstance(module, Module):
            raise TypeError(f"{type(self).__name__}: item {len(self)} is {type(module).__name__}, expected a Module")
        setattr(self, str(len(self)), module)

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def __iter__(self) -> Iterator[Any]:
        return (module for _, module in self.named_children())

    def __getitem__(self, index: int) -> Any:
        return list(self)[index]


class Sequential(ModuleList):
    """The modules one after the other: Sequential(f, g)(x) = g(f(x))."""

    def __init__(self, *modules: Module):
        super().__init__(modules)

    def forward(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x
