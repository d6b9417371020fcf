"""Optimizers: an update rule over the parameters of a model, in groups with hyper-parameters of their own.

    optimizer = AdamW([{"params": matrices}, {"params": gains, "weight_decay": 0.0}], lr=3e-4)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

As in PyTorch, param_groups is a list of dicts that a program may change between steps (a learning rate schedule
does), and a parameter without gradient is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, cast

import numpy as np

from engine.backend import Array, Backend, get_backend, refuse
from engine.optim.clip import clip_scale, norm_of_gradients, scaled
from engine.optim.postponed import Postponed, update_rows
from engine.optim.rules import AdagradRule, AdamRule, AdamWRule, RMSpropRule, Rule, SGDRule
from engine.rowsparse import Gradient, RowSparse, dense
from engine.tensor import Tensor


class Optimizer:
    """Updates parameters in place by `rule`.

    params: tensors, or dicts {"params": tensors, ...} with hyper-parameters of the group

    A row-sparse gradient (eg.RowSparse) gives the bits of the dense one, at the cost of the rows that it touches; what
    the rule does to the other rows is done when somebody looks at them (postponed.py).

    Raises TypeError or ValueError with one line for what cannot be optimized.
    """

    lazy: ClassVar[bool] = False  # whether rows without gradient are left out for good

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], rule: Rule):
        self.rule = rule
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[int, dict[str, Any]] = {}  # by id(parameter): "step", and the rule's slots
        self.postponed: dict[int, Postponed] = {}  # by id(parameter)
        if isinstance(params, Tensor) or not isinstance(params, Iterable):
            raise TypeError(f"{self.name}: params is {type(params).__name__}, expected a list of tensors or of groups")
        several: list[Any] = list(params)
        if not several:
            raise ValueError(f"{self.name}: got no parameters")
        for group in several if isinstance(several[0], dict) else [{"params": several}]:
            self.add_param_group(group)

    @property
    def name(self) -> str:
        return type(self).__name__

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add {"params": tensors, hyper-parameters ...}; what it does not name is as in the constructor."""
        group = dict(group)
        if "params" not in group:
            raise ValueError(f"{self.name}: a group has {', '.join(map(repr, group)) or 'nothing'}, expected 'params' "
                             "and hyper-parameters")
        params = group.pop("params")
        params = [params] if isinstance(params, Tensor) else list(params)
        if "betas" in group:  # as PyTorch names the pair
            group["beta1"], group["beta2"] = _pair(self.name, group.pop("betas"))
        rule = self.rule.with_(**group)
        known = {id(p) for other in self.param_groups for p in other["params"]}
        for i, p in enumerate(params):
            if not isinstance(p, Tensor):
                raise TypeError(f"{self.name}: parameter {i} is {type(p).__name__}, expected a tensor")
            if p.node is not None or not p.requires_grad:
                raise ValueError(f"{self.name}: parameter {i} of shape {p.shape} "
                                 + ("does not require grad" if p.node is None else f"was made by {p.node.op.name}")
                                 + ", expected a leaf that requires grad")
            if id(p) in known:
                raise ValueError(f"{self.name}: parameter {i} of shape {p.shape} is given more than once")
            known.add(id(p))
        self.param_groups.append({"params": params, **{f.name: getattr(rule, f.name) for f in fields(rule)}})

    # ── the step ────────────────────────────────────────────────────────────────────────────────────

    def step(self, *, clip_norm: float | None = None) -> float | None:
        """Update every parameter that has a gradient.

        clip_norm: the gradients count as if clip_grad_norm_ had brought them to this global norm, with the same bits,
                   but on their way into the rule: that saves a pass over them, and .grad stays as it is

        Returns the norm before clipping, None without clip_norm. Raises ValueError with one line, and changes nothing,
        if a gradient or a state does not fit its parameter.
        """
        refuse(f"{self.name}.step")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"{self.name}.step: clip_norm is {clip_norm!r}, expected a positive number or None")
        due: list[tuple[Rule, Tensor, Gradient]] = []
        for group in self.param_groups:
            rule = self.rule.with_(**{f.name: group[f.name] for f in fields(self.rule)})
            due += [(rule, p, p.grad) for p in group["params"] if p.grad is not None]
        for _, p, grad in due:
            self._check(p, grad)
        norm, scale = None, 1.0
        if clip_norm is not None:
            norm = norm_of_gradients([grad for _, _, grad in due])
            scale = clip_scale(norm, clip_norm)
        for rule, p, grad in due:
            self._update(rule, p, grad, scale)
        return norm

    def _check(self, p: Tensor, grad: Gradient) -> None:
        if grad.shape != p.shape or grad.dtype is not p.dtype or grad.device != p.device:
            raise ValueError(f"{self.name}.step: the gradient is {grad.dtype} {grad.shape} on {grad.device}, "
                             f"expected {p.dtype} {p.shape} on {p.device} as its parameter")
        if not p.array.writeable:
            raise ValueError(f"{self.name}.step: a parameter of shape {p.shape} is read-only; if it belongs to a "
                             "parameter server, that updates it")
        for slot, value in self.state.get(id(p), {}).items():
            if isinstance(value, Array) and value.dtype is not p.dtype:
                raise ValueError(f"{self.name}.step: {slot} of a parameter is {value.dtype} and the parameter "
                                 f"{p.dtype}; make the optimizer after .to()")

    def _update(self, rule: Rule, p: Tensor, grad: Gradient, scale: float) -> None:
        k = get_backend(p.device)
        state = self.state.setdefault(id(p), {"step": 0})
        missing = [slot for slot in rule.slots if slot not in state]
        if missing:
            fresh = rule.init(k, p.shape, p.dtype)
            state.update({slot: fresh[slot] for slot in missing})
        if isinstance(grad, RowSparse) and p.array.data.flags.c_contiguous:
            self._update_rows(k, rule, p, state, grad if scale == 1 else cast(RowSparse, scaled(grad, scale)))
        else:
            self.postponed.pop(id(p), None)  # made before the kernel that reads the table here, as before any
            target, dense_grad = k.contiguous(p.array), k.contiguous(dense(grad).array)
            rule.apply(k, target, state, target, state, dense_grad, state["step"] + 1, scale=scale)
            if target is not p.array:
                k.copy(p.array, target, k.layout(p.array, target))
        state["step"] += 1
        p.array.storage.version += 1

    def _update_rows(self, k: Backend, rule: Rule, p: Tensor, state: dict[str, Any], grad: RowSparse) -> None:
        if self.lazy:
            if p.array.storage.postponed is not None:  # another optimizer's updates of these rows
                p.array.storage.postponed.settle(grad.rows)
            table = Array(p.array.data.reshape(p.shape[0], -1), p.dtype)
            return update_rows(k, rule, table, state, grad, state["step"] + 1)
        known = self.postponed.get(id(p))
        if known is None or p.array.storage.postponed is not known:
            if known is not None:  # p has other memory now
                known.settle()
            known = self.postponed[id(p)] = Postponed(k, p.array, state, state["step"])
        known.update(rule, grad, state["step"] + 1)

    def settle(self) -> None:
        """Make all postponed updates. To be called before `state`, or a NumPy view that was taken earlier, is read;
        tensors and state_dict() see to it themselves."""
        for known in self.postponed.values():
            known.settle()

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """{"state": {index: {"step": int, slot: array ...}}, "param_groups": [{"params": [index ...], ...}]}.

        Parameters are numbered from 0 in the order of the groups. The arrays are copies.
        """
        parameters = {id(p): p for p in self._parameters()}
        self.settle()
        number = {key: i for i, key in enumerate(parameters)}
        state = {number[key]: {name: np.array(get_backend(parameters[key].device).to_numpy(value))
                               if isinstance(value, Array) else value for name, value in entry.items()}
                 for key, entry in self.state.items()}
        groups = [{**group, "params": [number[id(p)] for p in group["params"]]} for group in self.param_groups]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a state_dict() of an optimizer with groups of the same sizes.

        Raises ValueError with one line, and changes nothing, if it does not fit.
        """
        if not {"state", "param_groups"} <= set(saved) or not all("params" in group for group in saved["param_groups"]):
            raise ValueError(f"{self.name}.load_state_dict: got {', '.join(map(repr, saved)):.200}, expected "
                             "'state' and 'param_groups', each with its 'params'")
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != saved_sizes:
            raise ValueError(f"{self.name}.load_state_dict: the saved groups have {saved_sizes} parameters, "
                             f"expected {sizes}")
        rules = [self.rule.with_(**{name: v for name, v in group.items() if name != "params"})
                 for group in saved["param_groups"]]
        # As the saving optimizer numbered them; zip cannot be shorter, since the groups are of the same sizes.
        order = [(i, rule) for group, rule in zip(saved["param_groups"], rules) for i in group["params"]]
        unknown = saved["state"].keys() - {i for i, _ in order}
        if unknown:
            raise ValueError(f"{self.name}.load_state_dict: there is a state of {min(map(repr, unknown))}, which is no "
                             "parameter of a saved group")
        loaded = {id(p): self._loaded(i, rule, p, saved["state"][i])
                  for p, (i, rule) in zip(self._parameters(), order) if i in saved["state"]}
        self.settle()
        self.postponed.clear()
        self.state = loaded
        for group, rule in zip(self.param_groups, rules):
            group.update({f.name: getattr(rule, f.name) for f in fields(rule)})

    def _loaded(self, index: int, rule: Rule, p: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
        k, slots = get_backend(p.device), {"step", *rule.slots}
        optional = {"momentum_buffer"} if hasattr(rule, "momentum") else set()  # momentum may come and go between steps
        if not slots - optional <= entry.keys() <= slots | optional:
            raise ValueError(f"{self.name}.load_state_dict: parameter {index} has {sorted(map(str, entry))!r:.200}, "
                             f"expected {sorted(slots)}")
        state: dict[str, Any] = {"step": int(entry["step"])}
        for name, value in entry.items():
            if name == "step":
                continue
            if np.shape(value) != p.shape:
                raise ValueError(f"{self.name}.load_state_dict: {name} of parameter {index} has shape "
                                 f"{np.shape(value)}, expected {p.shape}")
            state[name] = k.array(value, p.dtype)
        return state

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __repr__(self) -> str:
        groups = [", ".join(f"{key}={len(value) if key == 'params' else value}" for key, value in group.items())
                  for group in self.param_groups]
        return f"{self.name}({'; '.join(groups)})"


def _pair(name: str, betas: Any) -> tuple[float, float]:
    """Adam's two decay rates."""
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise ValueError(f"{name}: betas is {betas!r}, expected two numbers in [0, 1)") from None
    return beta1, beta2


class SGD(Optimizer):
    """Stochastic gradient descent with momentum: rules.SGDRule."""

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False):
        super().__init__(params, SGDRule(lr, weight_decay, momentum, dampening, nesterov))


class Adam(Optimizer):
    """Adam: rules.AdamRule."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0):
        super().__init__(params, AdamRule(lr, weight_decay, *_pair(self.name, betas), eps))


class AdamW(Optimizer):
    """Adam with decoupled weight decay: rules.AdamWRule."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01):
        super().__init__(params, AdamWRule(lr, weight_decay, *_pair(self.name, betas), eps))


class LazyAdam(Adam):
    """Adam that, given a row-sparse gradient, updates the touched rows and leaves the others out: no decay of their
    moments, no step by what they remember. Cheaper than Adam, and another algorithm; PyTorch's SparseAdam is it, but
    adds ε to √v instead of √v̂. The bias corrections count all steps; of a dense gradient every row was touched."""

    lazy = True


class Adagrad(Optimizer):
    """AdaGrad: rules.AdagradRule."""

    def __init__(self, params: Any, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
                 eps: float = 1e-10):
        super().__init__(params, AdagradRule(lr, weight_decay, lr_decay, eps))


class RMSprop(Optimizer):
    """RMSprop: rules.RMSpropRule."""

    def __init__(self, params: Any, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
                 weight_decay: float = 0.0, momentum: float = 0.0):
        super().__init__(params, RMSpropRule(lr, weight_decay, alpha, eps, momentum))
