"""Optimizers, clipping and schedules against torch.optim, each in its own training of 100 steps."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import agreement
import numpy as np
import pytest
import torch
from agreement import Comparison, agree, agree_all, distance, judge
from torch.nn import functional as F
from torch.optim import lr_scheduler

import engine as eg
from engine import optim
from engine.optim import rules, schedules
from engine.testing.bounds import gamma, unit_roundoff

STEPS = 100
DTYPES = ("float32", "float64")

# Ours, and what is given to both; torch.optim's class has the same arguments, and the same name but for PEERS.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.05}),
    "SGD with weight decay": ("SGD", {"lr": 0.05, "weight_decay": 0.02}),
    "SGD with momentum": ("SGD", {"lr": 0.02, "momentum": 0.9}),
    "SGD with dampening": ("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02}),
    "SGD with Nesterov's momentum": ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    "Adam": ("Adam", {"lr": 0.01}),
    "Adam, other constants": ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.05}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "AdamW, other constants": ("AdamW", {"lr": 0.01, "betas": (0.7, 0.99), "eps": 1e-4, "weight_decay": 0.3}),
    "Adagrad": ("Adagrad", {"lr": 0.05}),
    "Adagrad, other constants": ("Adagrad", {"lr": 0.05, "lr_decay": 0.02, "weight_decay": 0.05, "eps": 1e-3}),
    "RMSprop": ("RMSprop", {"lr": 0.005}),
    "RMSprop, other constants": ("RMSprop", {"lr": 0.002, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.05,
                                             "momentum": 0.8}),
}
# SparseAdam adds ε to √v and not to √v̂; so small a one counts in neither.
LAZY: tuple[str, dict[str, Any]] = ("LazyAdam", {"lr": 0.01, "eps": 1e-20})
PEERS = {"LazyAdam": "SparseAdam"}


def test_every_update_rule_is_compared() -> None:
    classes = {name for name, kind in vars(optim).items()
               if inspect.isclass(kind) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer}
    assert classes == {name for name, _ in (*OPTIMIZERS.values(), LAZY)}
    made = {type(getattr(optim, name)([eg.zeros(1, requires_grad=True)]).rule) for name in classes}
    assert made == {kind for kind in vars(rules).values()
                    if inspect.isclass(kind) and issubclass(kind, rules.Rule) and kind is not rules.Rule}


# ── three problems: a network that learns, gradients of all sizes, and a table that is looked up in ───

def network() -> dict[str, np.ndarray]:
    """Two layers, with inputs, outputs and weights of their own."""
    rng = np.random.default_rng(1)
    shapes = {"first": (24, 10), "bias": (24,), "last": (3, 24)}
    return {name: rng.normal(size=shape) / 3 for name, shape in shapes.items()}


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2)
    for _ in range(STEPS):
        x = rng.normal(size=(16, 10))
        yield x, np.stack([np.sin(x[:, 0] * 2), x[:, 1] * x[:, 2], np.abs(x[:, 3])], axis=1)


def prescribed() -> Iterator[dict[str, np.ndarray]]:
    """Gradients that range over six decades, change their signs, drift, and are 0 at times."""
    rng = np.random.default_rng(3)
    sizes = {name: 10.0 ** rng.uniform(-4, 2, p.shape) for name, p in network().items()}
    for step in range(STEPS):
        yield {name: size * (rng.normal(size=size.shape) + 0.5) * (rng.uniform(size=size.shape) < 0.9) * (step != 7)
               for name, size in sizes.items()}


class Library(NamedTuple):
    """Where each library keeps what a training takes; the names are the same."""

    arrays: Any
    functions: Any
    optimizers: Any


OURS, PEER = Library(eg, eg, optim), Library(torch, F, torch.optim)


def train(library: Library, name: str, options: dict[str, Any], dtype: str, learning: bool) -> dict[str, np.ndarray]:
    arrays, f, optimizers = library
    tensor = partial(arrays.tensor, dtype=getattr(arrays, dtype))
    params = {key: tensor(value, requires_grad=True) for key, value in start().items()}
    optimizer = getattr(optimizers, name)(list(params.values()), **options)
    for (x, y), gradients in zip(batches(), prescribed()):
        if learning:
            hidden = f.tanh(f.linear(tensor(x), params["first"], params["bias"]))
            f.mse_loss(f.linear(hidden, params["last"]), tensor(y)).backward()
        else:
            for key, p in params.items():
                p.grad = tensor(gradients[key])
        optimizer.step()
        optimizer.zero_grad()
    return {key: p.detach().numpy() for key, p in params.items()}


def start() -> dict[str, np.ndarray]:
    """Numbers that float32 holds, so that both types begin at the same place."""
    return {key: value.astype(np.float32).astype(np.float64) for key, value in network().items()}


def compare(label: str, learning: bool) -> None:
    name, options = OPTIMIZERS[label]
    ours, ours_wide, peer, wide = (train(library, name, options, dtype, learning)
                                   for library in (OURS, PEER) for dtype in DTYPES)
    agree_all("optimizers, 100 steps", f"{label}, {'learning' if learning else 'prescribed'}", ours, peer, wide,
              ours_wide)
    assert all(np.abs(wide[key] - value).max() > 1e-3 for key, value in start().items()), "nothing moved"


@pytest.mark.parametrize("learning", [True, False], ids=["a network learns", "prescribed gradients"])
@pytest.mark.parametrize("label", list(OPTIMIZERS))
def test_a_hundred_steps(label: str, learning: bool) -> None:
    compare(label, learning)


def lookups() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Eight sets of three of 40 words, most of them rare, and what their vectors' mean should be."""
    rng = np.random.default_rng(4)
    for _ in range(STEPS):
        words = np.minimum(rng.geometric(0.1, (8, 3)), 40) - 1
        yield words, np.sin(words.sum(axis=1, keepdims=True) * np.arange(1, 7))


def table() -> np.ndarray:
    return np.random.default_rng(6).normal(size=(40, 6)).astype(np.float32)


def embed_ours(name: str, options: dict[str, Any], dtype: str) -> np.ndarray:
    weight = eg.tensor(table(), dtype=dtype, requires_grad=True)
    optimizer = getattr(optim, name)([weight], **options)
    for words, target in lookups():
        found = eg.embedding(weight, eg.tensor(words), sparse=True).mean(axis=1)
        eg.mse_loss(found, eg.tensor(target, dtype=dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight.numpy()


def embed_peer(name: str, options: dict[str, Any], dtype: str) -> np.ndarray:
    kind, theirs = getattr(torch, dtype), PEERS.get(name, name)
    weight = torch.tensor(table(), dtype=kind, requires_grad=True)
    optimizer = getattr(torch.optim, theirs)([weight], **options)
    for words, target in lookups():
        found = F.embedding(torch.tensor(words), weight, sparse=theirs == "SparseAdam").mean(1)
        F.mse_loss(found, torch.tensor(target, dtype=kind)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach().numpy()


def compare_table(label: str, name: str, options: dict[str, Any]) -> None:
    ours, ours_wide, peer, wide = (f(name, options, dtype) for f in (embed_ours, embed_peer) for dtype in DTYPES)
    agree("optimizers, 100 steps", f"{label}, a table", ours, peer, wide, ours_wide=ours_wide)
    assert np.abs(wide - table()).max() > 1e-3, "nothing moved"


@pytest.mark.parametrize("label", [*OPTIMIZERS, "LazyAdam"])
def test_a_table_that_is_looked_up_in(label: str) -> None:
    """Its gradients are row-sparse here and dense there: rows of 0 are updated, too, but for LazyAdam's."""
    compare_table(label, *(OPTIMIZERS.get(label) or LAZY))


def test_lazy_updates_are_told_from_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "seen", defaultdict(list))
    monkeypatch.setitem(PEERS, "LazyAdam", "Adam")
    with pytest.raises(AssertionError, match="from the wide result, the peer"):
        compare_table("LazyAdam", *LAZY)


PLANTED = {  # a rule whose formula is slightly another: (optimizer, what is passed to the engine instead)
    "epsilon": ("Adam, other constants", {"eps": 1.0005e-3}),
    "weight decay coupled": ("AdamW", {"weight_decay": 0.0}),
    "beta2": ("Adam", {"betas": (0.9, 0.99901)}),
    "dampening": ("SGD with dampening", {"dampening": 0.3001}),
    "lr_decay": ("Adagrad, other constants", {"lr_decay": 0.02001}),
}


@pytest.mark.parametrize("planted", list(PLANTED))
def test_planted_differences_are_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    label, other = PLANTED[planted]
    monkeypatch.setattr(agreement, "seen", defaultdict(list))
    real = train
    monkeypatch.setitem(globals(), "train", lambda library, name, options, *rest: real(
        library, name, {**options, **other} if library is OURS else options, *rest))
    with pytest.raises(AssertionError, match="from the wide result, the peer"):
        compare(label, learning=True)


def test_adam_with_epsilon_under_the_root_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """θ ← θ − η m̂ / √(v̂ + ε²) is Adam but for where ε stands."""
    def launch(self: Any, k: Any, new_param: Any, new_state: Any, param: Any, state: Any, grad: Any, step: int,
               divisor: float, scale: float) -> None:
        m, v, g = new_state["exp_avg"].data, new_state["exp_avg_sq"].data, grad.data
        m += (1 - self.beta1) * (g - m)
        v += (1 - self.beta2) * (g * g - v)
        root = np.sqrt(v / (1 - self.beta2**step) + self.eps**2)
        param.data[...] -= self.lr * m / (1 - self.beta1**step) / root

    monkeypatch.setattr(agreement, "seen", defaultdict(list))
    monkeypatch.setattr(rules.AdamRule, "launch", launch)
    with pytest.raises(AssertionError, match="from the wide result, the peer"):
        compare("Adam", learning=False)


# ── clipping ──────────────────────────────────────────────────────────────────────────────────────────

def gradients(largest: float) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [(largest * rng.normal(size=shape)).astype("float32") for shape in ((3, 5000), (7,), (), (64, 65))]


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_by_norm(max_norm: float) -> None:
    """The scaled gradients, and the norm: in float64 √Σ of n squares is γ_n/2 off in either library (Higham 4.4)."""
    def ours(dtype: str) -> tuple[float, dict[str, np.ndarray]]:
        params = [eg.zeros(*g.shape, dtype=dtype, requires_grad=True) for g in gradients(3.0)]
        for p, g in zip(params, gradients(3.0)):
            p.grad = eg.tensor(g, dtype=dtype)
        norm = optim.clip_grad_norm_(params, max_norm)
        return norm, {str(i): np.asarray(p.grad) for i, p in enumerate(params)}

    def peer(dtype: str) -> tuple[float, dict[str, np.ndarray]]:
        params = [torch.zeros(g.shape, dtype=getattr(torch, dtype), requires_grad=True) for g in gradients(3.0)]
        for p, g in zip(params, gradients(3.0)):
            p.grad = torch.tensor(g, dtype=p.dtype)
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        return float(norm), {str(i): p.grad.numpy() for i, p in enumerate(params)}

    (norm, grads), (norm_wide, grads_wide) = (ours(dtype) for dtype in DTYPES)
    (peers_norm, peers_grads), (wide, wide_grads) = (peer(dtype) for dtype in DTYPES)
    what = f"norm at most {max_norm}"
    agree("clipping", what, norm, peers_norm, wide)
    allowed = gamma(sum(g.size for g in gradients(1.0)), unit_roundoff("float64")) * wide
    judge("clipping, float64", Comparison(what, abs(norm_wide - wide), 0.0, allowed))
    for name, grad in wide_grads.items():
        agree("clipping", f"{what}: {name}", grads[name], peers_grads[name], grad)
        within = (2 * allowed / wide + 4 * unit_roundoff("float64")) * np.linalg.norm(grad)  # norms, products
        judge("clipping, float64", Comparison(f"{what}: {name}", distance(grads_wide[name], grad), 0.0, within))


def test_clip_by_value() -> None:
    """Selection: the same bits, signs of zero and NaN included."""
    g = np.append(gradients(1.0)[0], np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], "float32"))
    ours, peer = eg.zeros(g.size, requires_grad=True), torch.zeros(g.size, requires_grad=True)
    ours.grad, peer.grad = eg.tensor(g), torch.tensor(g)
    optim.clip_grad_value_(ours, 0.7)
    torch.nn.utils.clip_grad_value_(peer, 0.7)
    assert np.array_equal(np.asarray(ours.grad), peer.grad.numpy(), equal_nan=True)
    agree("clipping", "by value", np.asarray(ours.grad)[:-5], peer.grad.numpy()[:-5], peer.grad.numpy()[:-5])


# ── schedules ─────────────────────────────────────────────────────────────────────────────────────────

Scheduled = Callable[[torch.optim.Optimizer], Any]


def warmed_up(steps: int, after: Scheduled) -> Scheduled:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        rising = lr_scheduler.LinearLR(optimizer, 1 / steps, 1.0, steps - 1)
        return lr_scheduler.SequentialLR(optimizer, [rising, after(optimizer)], [steps])
    return make


# Ours reaches the end after `steps` updates, OneCycleLR with its last; so that has one update more.
SCHEDULES: dict[str, tuple[schedules.Schedule, Scheduled]] = {
    "constant": (schedules.constant(0.3), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    "linear": (schedules.linear(0.3, 20, 0.06), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, 20)),
    "cosine": (schedules.cosine(0.3, 40, 0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, 40, 0.01)),
    "step_decay": (schedules.step_decay(0.3, 7, 0.5), lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
    "exponential": (schedules.exponential(0.3, 0.93), lambda o: lr_scheduler.ExponentialLR(o, 0.93)),
    "warmup": (schedules.warmup(8, schedules.exponential(0.3, 0.9)),
               warmed_up(8, lambda o: lr_scheduler.ExponentialLR(o, 0.9))),
    "warmup_cosine": (schedules.warmup_cosine(0.3, 10, 40, 0.02),
                      warmed_up(10, lambda o: lr_scheduler.CosineAnnealingLR(o, 30, 0.02))),
    "one_cycle": (schedules.one_cycle(0.3, 39), lambda o: lr_scheduler.OneCycleLR(o, 0.3, 40, pct_start=13 / 40)),
}


def test_every_schedule_is_compared() -> None:
    public = {name for name, f in vars(schedules).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert public == set(SCHEDULES)


def rates(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The learning rate of the first 40 updates, ours and the peer's."""
    schedule, make = SCHEDULES[name]
    ours = optim.SGD([eg.zeros(1, requires_grad=True)], lr=0.3)
    peer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, other = schedules.Scheduler(ours, schedule), make(peer)
    found = []
    for _ in range(40):
        found.append((ours.param_groups[0]["lr"], peer.param_groups[0]["lr"]))
        ours.step()
        peer.step()
        scheduler.step()
        other.step()
    return np.array(found).T[0], np.array(found).T[1]


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_schedules(name: str) -> None:
    """The peer goes from rate to rate, with four roundings or fewer each time: 4 · 40 u of the highest at most."""
    ours, peer = rates(name)
    allowed = 160 * unit_roundoff("float64") * 0.3
    judge("schedules, float64", Comparison(name, float(np.abs(ours - peer).max()), 0.0, allowed))


def test_a_schedule_one_update_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "seen", defaultdict(list))
    schedule, make = SCHEDULES["cosine"]
    monkeypatch.setitem(SCHEDULES, "cosine", (lambda t: schedule(max(t - 1, 1)), make))
    with pytest.raises(AssertionError):
        test_schedules("cosine")
