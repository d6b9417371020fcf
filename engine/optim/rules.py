"""Update rules: from a parameter θ, its state and its gradient g to the next θ and state.

A rule is a frozen set of hyper-parameters and one kernel launch. It knows nothing of tensors, modules or groups, so an
optimizer (optimizers.py) and the shards of a parameter server run the same one. It works element by element: an
element's new bits do not depend on what lies beside it, or on where a shard begins. η is the learning rate `lr`, λ is
`weight_decay`, t the number of the update, from 1.

    rule = AdamWRule(lr=1e-3)
    state = rule.init(k, theta.shape, theta.dtype)
    rule.apply(k, theta, state, theta, state, gradient, step=1)             # in place
    rule.apply(k, theta, state, theta, state, gradient, step=2, lr=5e-4)    # with another learning rate
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from engine.backend import Array, Backend
from engine.dtypes import DType

State = Mapping[str, Array]
Self = TypeVar("Self", bound="Rule")


@dataclass(frozen=True)
class Rule:
    """What all rules share. Subclasses add hyper-parameters, the names of their state, and the launch.

    Raises ValueError with one line for a hyper-parameter outside its range, here and in with_().
    """

    lr: float = 1e-3
    weight_decay: float = 0.0

    below_one: ClassVar[tuple[str, ...]] = ()  # hyper-parameters that must lie in [0, 1)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            highest = 1.0 if field.name in self.below_one else math.inf
            number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
            if not (isinstance(value, bool) if field.type == "bool" else number and 0 <= value < highest):
                expected = "True or False" if field.type == "bool" else f"a number in [0, {highest})"
                raise ValueError(f"{type(self).__name__}: {field.name} is {value!r}, expected {expected}")

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of what is kept for each element between updates."""
        return ()

    @property
    def stays_without_gradient(self) -> bool:
        """Whether an update with g = 0 leaves θ and the state as they are."""
        return False

    @property
    def stays_at_zero(self) -> bool:
        """Whether an update with g = 0 leaves θ as it is, and a state of zeros at zero."""
        return not self.weight_decay

    def with_(self: Self, **hyper: Any) -> Self:
        """The same rule with some hyper-parameters replaced."""
        unknown = hyper.keys() - {field.name for field in fields(self)}
        if unknown:
            raise ValueError(f"{type(self).__name__}: got a hyper-parameter {min(unknown)!r}, expected "
                             f"{', '.join(field.name for field in fields(self))}")
        return replace(self, **hyper)

    def init(self, k: Backend, shape: int | tuple[int, ...], dtype: DType) -> dict[str, Array]:
        """The state before the first update: zeros, for a number of elements or a shape."""
        sizes = (shape,) if isinstance(shape, int) else shape
        return {slot: k.zeros(sizes, dtype) for slot in self.slots}

    def apply(self, k: Backend, new_param: Array, new_state: State, param: Array, state: State, grad: Array, step: int,
              divisor: float = 1.0, scale: float = 1.0, **hyper: Any) -> None:
        """new_param, new_state = update number `step` of (param, state, g); new_* may be the old ones.

        g = grad / divisor · scale, rounded twice: the mean of a sum over `divisor` tokens, clipped by `scale`, with no
        pass of its own. All arrays are dense and of one size and dtype. hyper: replaces this rule's own
        hyper-parameters for this update.
        """
        rule = self.with_(**hyper) if hyper else self
        rule.launch(k, new_param, new_state, param, state, grad, step, divisor, scale)

    def launch(self, k: Backend, new_param: Array, new_state: State, param: Array, state: State, grad: Array,
               step: int, divisor: float, scale: float) -> None:
        raise NotImplementedError


def divides(eps: float) -> bool:
    """Whether 0 / (0 + ε) is 0 and not NaN, also in float32."""
    return eps >= 2.0**-126


@dataclass(frozen=True)
class SGDRule(Rule):
    """Stochastic gradient descent with momentum μ and dampening τ.

        g ← g + λ θ
        m ← g at t = 1, else μ m + (1 − τ) g          (only if μ > 0; without, the step is g)
        θ ← θ − η m, or with Nesterov's momentum θ − η (g + μ m)

    Robbins, Monro 1951; Polyak 1964; Nesterov 1983 in the form of Sutskever, Martens, Dahl, Hinton 2013.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError(f"SGDRule: nesterov with momentum {self.momentum!r} and dampening {self.dampening!r}, "
                             "expected a momentum above 0 and no dampening")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def stays_without_gradient(self) -> bool:
        return not (self.momentum or self.weight_decay)

    def launch(self, k: Backend, new_param: Array, new_state: State, param: Array, state: State, grad: Array,
               step: int, divisor: float, scale: float) -> None:
        new_m, m = (new_state["momentum_buffer"], state["momentum_buffer"]) if self.momentum else (None, None)
        k.sgd(new_param, new_m, param, m, grad, param.size, divisor, scale, self.lr, self.momentum, self.dampening,
              self.weight_decay, int(self.nesterov), step)


@dataclass(frozen=True)
class AdamRule(Rule):
    """Adam: steps of the mean gradient m, measured in its own root mean square √v.

        g ← g + λ θ
        m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
        θ ← θ − η m̂ / (√v̂ + ε)         m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)

    Kingma, Ba 2014, arXiv:1412.6980, algorithm 1.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    below_one: ClassVar[tuple[str, ...]] = ("beta1", "beta2")
    decoupled: ClassVar[bool] = False  # AdamW's weight decay

    @property
    def slots(self) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    @property
    def stays_at_zero(self) -> bool:
        return not self.weight_decay and divides(self.eps)

    def launch(self, k: Backend, new_param: Array, new_state: State, param: Array, state: State, grad: Array,
               step: int, divisor: float, scale: float) -> None:
        k.adam(new_param, *(new_state[slot] for slot in self.slots), param, *(state[slot] for slot in self.slots), grad,
               param.size, divisor, scale, self.lr, self.beta1, self.beta2, self.eps, self.weight_decay,
               int(self.decoupled), step)


@dataclass(frozen=True)
class AdamWRule(AdamRule):
    """Adam whose weight decay does not go through the moments: instead of g ← g + λ θ,

        θ ← (1 − η λ) θ, then Adam's step

    Loshchilov, Hutter 2017, arXiv:1711.05101, algorithm 2.
    """

    weight_decay: float = 0.01

    decoupled: ClassVar[bool] = True


@dataclass(frozen=True)
class AdagradRule(Rule):
    """AdaGrad: each element's steps shrink with the squares it has seen. d is `lr_decay`.

        g ← g + λ θ
        s ← s + g²
        θ ← θ − η / (1 + (t − 1) d) · g / (√s + ε)

    Duchi, Hazan, Singer 2011, "Adaptive Subgradient Methods", figure 1.
    """

    lr: float = 1e-2
    lr_decay: float = 0.0
    eps: float = 1e-10

    @property
    def slots(self) -> tuple[str, ...]:
        return ("sum",)

    @property
    def stays_without_gradient(self) -> bool:
        return self.stays_at_zero  # s stays, and 0 over anything positive is 0

    @property
    def stays_at_zero(self) -> bool:
        return not self.weight_decay and divides(self.eps)

    def launch(self, k: Backend, new_param: Array, new_state: State, param: Array, state: State, grad: Array,
               step: int, divisor: float, scale: float) -> None:
        k.adagrad(new_param, new_state["sum"], param, state["sum"], grad, param.size, divisor, scale, self.lr,
                  self.lr_decay, self.eps, self.weight_decay, step)


@dataclass(frozen=True)
class RMSpropRule(Rule):
    """RMSprop: the gradient over its own running root mean square, with momentum μ.

        g ← g + λ θ
        v ← α v + (1 − α) g²
        m ← μ m + g / (√v + ε)         (only if μ > 0; without, the step is g / (√v + ε))
        θ ← θ − η m

    Tieleman, Hinton 2012, "Neural Networks for Machine Learning", lecture 6.5.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0

    below_one: ClassVar[tuple[str, ...]] = ("alpha",)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("square_avg", "momentum_buffer") if self.momentum else ("square_avg",)

    @property
    def stays_at_zero(self) -> bool:
        return not self.weight_decay and divides(self.eps)

    def launch(self, k: Backend, new_param: Array, new_state: State, param: Array, state: State, grad: Array,
               step: int, divisor: float, scale: float) -> None:
        new_m, m = (new_state["momentum_buffer"], state["momentum_buffer"]) if self.momentum else (None, None)
        k.rmsprop(new_param, new_state["square_avg"], new_m, param, state["square_avg"], m, grad, param.size, divisor,
                  scale, self.lr, self.alpha, self.eps, self.weight_decay, self.momentum, step)
