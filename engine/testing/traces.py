"""Traces of optimizers: random sequences of updates against the papers' formulas, written naively.

    trace = Trace("Adam", {"lr": 0.1}, shapes=((3,),), events=(Update((0,)), Update((None,)), Save(), Update((1,))))
    print(trace.source())
    check_trace(trace, "float32")

The formulas run over Rounded numbers (rounded.py), from the first update to the last, so the bound on what an optimizer
in float32 may be off grows with the trace, as its error does, and no tolerance is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import engine as eg
from engine.testing.checks import check_close
from engine.testing.failure import CheckFailure
from engine.testing.programs import values
from engine.testing.rounded import Number, Rounded, sqrt

State = dict[str, Any]

# ── the papers' formulas: (θ, g, state, t, hyper-parameters) -> θ, of arrays or Rounded numbers ───────────


def sgd(p: Number, g: Number, s: State, t: int, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.0,
        dampening: float = 0.0, nesterov: bool = False) -> Number:
    """Sutskever, Martens, Dahl, Hinton 2013, in PyTorch's form."""
    g = g + p * weight_decay
    if momentum:
        s["m"] = g if t == 1 else s["m"] * momentum + g * (1 - dampening)
        g = g + s["m"] * momentum if nesterov else s["m"]
    return p - g * lr


def adam(p: Number, g: Number, s: State, t: int, *, lr: float, weight_decay: float = 0.0, beta1: float = 0.9,
         beta2: float = 0.999, eps: float = 1e-8) -> Number:
    """Kingma, Ba 2014, arXiv:1412.6980, algorithm 1."""
    g = g + p * weight_decay
    s["m"] = g * (1 - beta1) if t == 1 else s["m"] * beta1 + g * (1 - beta1)
    s["v"] = g * g * (1 - beta2) if t == 1 else s["v"] * beta2 + g * g * (1 - beta2)
    return p - s["m"] / (1 - beta1**t) * lr / (sqrt(s["v"] / (1 - beta2**t)) + eps)


def adamw(p: Number, g: Number, s: State, t: int, *, lr: float, weight_decay: float = 0.01, **hyper: float) -> Number:
    """Loshchilov, Hutter 2017, arXiv:1711.05101, algorithm 2."""
    return adam(p, g, s, t, lr=lr, **hyper) - p * (lr * weight_decay)


def adagrad(p: Number, g: Number, s: State, t: int, *, lr: float, weight_decay: float = 0.0, lr_decay: float = 0.0,
            eps: float = 1e-10) -> Number:
    """Duchi, Hazan, Singer 2011, figure 1."""
    g = g + p * weight_decay
    s["s"] = g * g if t == 1 else s["s"] + g * g
    return p - g * (lr / (1 + (t - 1) * lr_decay)) / (sqrt(s["s"]) + eps)


def rmsprop(p: Number, g: Number, s: State, t: int, *, lr: float, weight_decay: float = 0.0, alpha: float = 0.99,
            eps: float = 1e-8, momentum: float = 0.0) -> Number:
    """Tieleman, Hinton 2012, lecture 6.5."""
    g = g + p * weight_decay
    s["v"] = g * g * (1 - alpha) if t == 1 else s["v"] * alpha + g * g * (1 - alpha)
    step = g / (sqrt(s["v"]) + eps)
    if momentum:
        s["m"] = step if t == 1 else s["m"] * momentum + step
        step = s["m"]
    return p - step * lr


FORMULAS: dict[str, Callable[..., Number]] = {"SGD": sgd, "Adam": adam, "AdamW": adamw, "Adagrad": adagrad,
                                              "RMSprop": rmsprop}
"""By the optimizer's name, the simplest first."""

# ── traces ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Update:
    """A step. seeds: one for each parameter's gradient, None where it has none; clip: to this global norm first."""

    seeds: tuple[int | None, ...]
    clip: float | None = None


@dataclass(frozen=True)
class Change:
    """A hyper-parameter of one group takes another value."""

    group: int
    name: str
    value: float


@dataclass(frozen=True)
class Save:
    """The state goes into a new optimizer."""


@dataclass(frozen=True)
class Trace:
    """An optimizer and what happens to it. `second`: the learning rate of a group of its own for the last parameter."""

    optimizer: str
    hyper: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    events: tuple[Update | Change | Save, ...] = ()
    second: float | None = None

    def source(self, dtype: str = "float32", device: str = "cpu") -> str:
        """The same as a script."""
        head = ["import numpy as np", "import engine as eg", "", "def values(shape, seed):",
                "    return np.random.default_rng(seed).integers(-64, 65, shape) / 32", "",
                f'with eg.device("{device}"):']
        return "\n".join([*head, *(f"    {line}" for line in self._body(dtype))]) + "\n"

    def _body(self, dtype: str) -> list[str]:
        """The lines of the script after its head."""
        count = len(self.shapes)
        lines = [f'p{i} = eg.tensor(values({shape}, {i}), "{dtype}", requires_grad=True)'
                 for i, shape in enumerate(self.shapes)]
        hyper = "".join(f", {name}={value!r}" for name, value in _arguments(self.hyper).items())
        names = [f"p{i}" for i in range(count)]
        groups = f"[{', '.join(names)}]" if self.second is None else \
            f'[{{"params": [{", ".join(names[:-1])}]}}, {{"params": [{names[-1]}], "lr": {self.second!r}}}]'
        make = f"eg.optim.{self.optimizer}({groups}{hyper})"
        lines.append(f"optimizer = {make}")
        for event in self.events:
            if isinstance(event, Save):
                lines += ["state = optimizer.state_dict()", f"optimizer = {make}", "optimizer.load_state_dict(state)"]
            elif isinstance(event, Change):
                lines.append(f'optimizer.param_groups[{event.group}]["{event.name}"] = {event.value!r}')
            else:
                for i, seed in enumerate(event.seeds):
                    g = "None" if seed is None else f'eg.tensor(values({self.shapes[i]}, {seed}), "{dtype}")'
                    lines.append(f"p{i}.grad = {g}")
                if event.clip is not None:
                    lines.append(f"eg.optim.clip_grad_norm_([{', '.join(names)}], {event.clip!r})")
                lines.append("optimizer.step()")
        return [*lines, f"print({', '.join(names)})"]


class _Naive:
    """The trace by the formulas."""

    def __init__(self, trace: Trace, dtype: str):
        self.trace, self.formula = trace, FORMULAS[trace.optimizer]
        self.dtype = dtype
        self.params: list[Number] = [Rounded(values(shape, i), dtype=dtype) for i, shape in enumerate(trace.shapes)]
        self.state: list[State] = [{} for _ in trace.shapes]
        self.updates = [0] * len(trace.shapes)
        rates = [{}] if trace.second is None else [{}, {"lr": trace.second}]
        self.hyper: list[dict[str, Any]] = [{**trace.hyper, **rate} for rate in rates]

    def update(self, event: Update) -> None:
        exact = [None if seed is None else values(shape, seed) for seed, shape in zip(event.seeds, self.trace.shapes)]
        gradients: list[Any] = [None if g is None else Rounded(g, dtype=self.dtype) for g in exact]
        if event.clip is not None and any(g is not None for g in exact):
            norm = float(np.sqrt(sum(float(np.sum(g * g)) for g in exact if g is not None)))
            scale = event.clip / (norm + 1e-6)
            gradients = [g if g is None or scale >= 1 else g * scale for g in gradients]
        for i, g in enumerate(gradients):
            if g is not None:
                self.updates[i] += 1
                hyper = self.hyper[-1 if i == len(gradients) - 1 else 0]
                self.params[i] = self.formula(self.params[i], g, self.state[i], self.updates[i], **hyper)


def check_trace(trace: Trace, dtype: str = "float32", device: str = "cpu") -> None:
    """Every parameter after every update, within the bound of its formula."""
    naive = _Naive(trace, dtype)
    with eg.device(device), np.errstate(all="ignore"):
        params = [eg.tensor(values(shape, i), dtype, requires_grad=True) for i, shape in enumerate(trace.shapes)]
        optimizer = _made(trace, params)
        for number, event in enumerate(trace.events):
            if isinstance(event, Save):
                state, optimizer = optimizer.state_dict(), _made(trace, params)
                optimizer.load_state_dict(state)
            elif isinstance(event, Change):
                optimizer.param_groups[event.group][event.name] = event.value
                naive.hyper[event.group][event.name] = event.value
            else:
                for p, seed in zip(params, event.seeds):
                    p.grad = None if seed is None else eg.tensor(values(p.shape, seed), dtype)
                if event.clip is not None:
                    eg.optim.clip_grad_norm_(params, event.clip)
                optimizer.step()
                naive.update(event)
            for i, (p, want) in enumerate(zip(params, naive.params)):
                _check(trace, f"p{i} after event {number}", p, want, dtype, device)


def _made(trace: Trace, params: list[eg.Tensor]) -> Any:
    groups: Any = params if trace.second is None else [{"params": params[:-1]},
                                                       {"params": params[-1:], "lr": trace.second}]
    return getattr(eg.optim, trace.optimizer)(groups, **_arguments(trace.hyper))


def _arguments(hyper: dict[str, Any]) -> dict[str, Any]:
    """As an optimizer takes them: β₁ and β₂ together."""
    made = {name: value for name, value in hyper.items() if name not in ("beta1", "beta2")}
    if len(made) < len(hyper):
        made["betas"] = (hyper.get("beta1", 0.9), hyper.get("beta2", 0.999))
    return made


def _check(trace: Trace, where: str, p: eg.Tensor, want: Number, dtype: str, device: str) -> None:
    try:
        check_close(p, want.value, want.tolerance, check=f"trace: {where}, {dtype} on {device}",
                    origin="running error analysis")
    except CheckFailure as failure:
        raise failure.with_reproduction(
            f"{trace.source(dtype, device)}\n# held against the formula of {trace.optimizer}:\n"
            "from engine.testing.traces import Change, Save, Trace, Update, check_trace\n"
            f"check_trace({trace!r}, {dtype!r}, {device!r})\n") from None
