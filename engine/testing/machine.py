"""EngineMachine: random lives of tensors, against the naive model (model.py).

Tensors are made, computed with, viewed, written to, detached, differentiated, hooked, freed, in any order, inside
no_grad or not; after every step all values and gradients have the model's bits, and what must be refused is refused.

    from hypothesis.stateful import run_state_machine_as_test
    run_state_machine_as_test(EngineMachine)
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import engine as eg
from engine.backend import get_backend
from engine.testing import model
from engine.testing.checks import check_bits
from engine.testing.failure import CheckFailure
from engine.testing.model import ModelTensor, Refused

SHAPES = [(2,), (2,), (2,), (2, 2), (2, 2), (), (3, 2), (1, 2)]
MOST_ALIVE = 12
pick = st.integers(0, MOST_ALIVE - 1)

ENGINE_VIEWS: dict[str, Callable[[eg.Tensor], eg.Tensor]] = {
    "transpose": lambda x: x.permute_dims(tuple(range(x.ndim))[::-1]), "tail": lambda x: x[1:],
    "first": lambda x: x[0], "every second": lambda x: x[..., ::2], "backwards": lambda x: x[::-1],
    "expand": lambda x: x.expand_dims(0),
}


MODEL: dict[str, Any] = {"origin": "the naive model (model.py)", "reproduction": "# the steps that Hypothesis prints"}


def _failure(what: str, got: Any, want: Any) -> CheckFailure:
    return CheckFailure(f"EngineMachine: {what}", got=got, want=want, bound="no difference", **MODEL)


class EngineMachine(RuleBasedStateMachine):
    """Shrinks towards few steps on few tensors of shape (2,)."""

    def __init__(self) -> None:
        super().__init__()
        self.real: list[eg.Tensor] = []
        self.naive: list[ModelTensor] = []
        self.removers: list[tuple[Callable[[], None], model.Node]] = []
        k = get_backend("cpu")
        for constant in (0, 0.0, 1.0, 2.0):  # which a backend keeps once it has seen them
            k.constant(constant, eg.float64)
        self.pool = getattr(k, "pool", None)
        self.blocks = self.pool.figures().blocks_live if self.pool else 0

    def teardown(self) -> None:
        """Nothing keeps memory alive, no cycle among nodes either: all of it is back in the pool at once."""
        self.real.clear()
        self.removers.clear()
        failing = sys.exc_info()[0] is not None  # an error on its way holds on to memory
        if self.pool and not failing and self.pool.figures().blocks_live > self.blocks:
            raise _failure("memory", f"{self.pool.figures().blocks_live} blocks alive",
                           f"at most {self.blocks}, as at the start")

    # ── helpers ─────────────────────────────────────────────────────────────────────────────────────

    def keep(self, real: eg.Tensor, naive: ModelTensor) -> None:
        self.real.append(real)
        self.naive.append(naive)
        if len(self.real) > MOST_ALIVE:
            self.forget(0)

    def forget(self, i: int) -> None:
        naive = self.naive.pop(i)
        gone = weakref.ref(self.real.pop(i))
        if gone() is not None and not naive.leaf:
            raise _failure("free", "a tensor outlives its last reference", "it dies")

    def chosen(self, i: int, wanted: Callable[[ModelTensor], bool] = lambda x: True) -> int:
        """The index of a wanted tensor, counted back from the newest."""
        among = [c for c, x in enumerate(self.naive) if wanted(x)]
        return among[-1 - i % len(among)]

    def preferred(self, i: int, wanted: Callable[[ModelTensor], bool]) -> int:
        """The same, but of all tensors where none is wanted, and for the last number."""
        return self.chosen(i, wanted) if i < MOST_ALIVE - 1 and any(map(wanted, self.naive)) else self.chosen(i)

    def fitting(self, i: int, name: str, a: np.ndarray) -> int:
        """The index of a tensor that may be the op's second operand beside a, if there is one."""
        return self.preferred(i, lambda x: self._fits(name, a, x.data))

    def refused(self, run: Callable[[], Any], *words: str) -> None:
        """run() raises RuntimeError with one of the words."""
        try:
            run()
        except RuntimeError as error:
            if not any(word in str(error) for word in words) or "\n" in str(error):
                raise _failure("refusal", str(error), f"one line with {words!r}") from None
            return
        raise _failure("refusal", "no error", f"a RuntimeError with {words!r}")

    # ── making ──────────────────────────────────────────────────────────────────────────────────────

    @rule(shape=st.sampled_from(SHAPES), seed=st.integers(0, 20), requires_grad=st.sampled_from([True, True, False]))
    def make(self, shape: tuple[int, ...], seed: int, requires_grad: bool) -> None:
        data = np.asarray(np.random.default_rng(seed).integers(-3, 4, shape), np.float64)
        self.keep(eg.tensor(data, requires_grad=requires_grad), model.leaf(np.array(data), requires_grad))

    @precondition(lambda self: self.real)
    @rule(names=st.lists(st.sampled_from(list(model.OPS)), min_size=1, max_size=4), i=pick, j=pick,
          recording=st.sampled_from([True, True, True, False]))
    def compute(self, names: list[str], i: int, j: int, recording: bool) -> None:
        """A chain of ops: each takes the last result, and something that fits it."""
        for name in names:
            c = self.chosen(i)
            self._compute(name, [c, self.fitting(j, name, self.naive[c].data)], recording)
            i = 0

    @staticmethod
    def _fits(name: str, a: np.ndarray, b: np.ndarray) -> bool:
        if name == "matmul":
            return a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
        return all(m == n or 1 in (m, n) for m, n in zip(a.shape[::-1], b.shape[::-1]))

    def _compute(self, name: str, chosen: list[int], recording: bool) -> None:
        count, value, _ = model.OPS[name]
        operands = [self.naive[c] for c in chosen[:count]]
        if count == 2 and not self._fits(name, *[x.data for x in operands]):
            return
        expected = np.asarray(value(*[x.data for x in operands]))
        if expected.size > 24 or not model.exact([expected]):
            return
        with contextlib.nullcontext() if recording else eg.no_grad():
            y = getattr(eg, name)(*[self.real[c] for c in chosen[:count]])
        self.keep(y, model.apply(name, operands, recording))

    @precondition(lambda self: self.real)
    @rule(name=st.sampled_from(list(model.VIEWS)), i=pick, recording=st.sampled_from([True, True, True, False]))
    def view(self, name: str, i: int, recording: bool) -> None:
        c = self.chosen(i)
        x = self.naive[c]
        if (x.data.ndim == 0 and name not in ("transpose", "expand")) or x.data.ndim > 3 or not x.data.size:
            return
        with contextlib.nullcontext() if recording else eg.no_grad():
            y = ENGINE_VIEWS[name](self.real[c])
        self.keep(y, model.view(name, x, recording))

    @precondition(lambda self: self.real)
    @rule(i=pick)
    def detach(self, i: int) -> None:
        c = self.chosen(i)
        self.keep(self.real[c].detach(), model.detach(self.naive[c]))

    @precondition(lambda self: self.real)
    @rule(i=pick)
    def checkpoint(self, i: int) -> None:
        """x² + x, computed again in backward."""
        c = self.chosen(i)
        x = self.naive[c]
        if not model.exact([x.data * x.data]):
            return
        y = eg.checkpoint(lambda t: eg.square(t) + t, self.real[c])
        self.keep(y, model.apply("add", [model.apply("square", [x], True), x], True))

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.real)
    @rule(name=st.sampled_from(list(model.WRITES)), i=pick, j=pick, recording=st.booleans())
    def write(self, name: str, i: int, j: int, recording: bool) -> None:
        c = self.chosen(i)
        x = self.naive[c]
        d = self.fitting(j, name, x.data)
        value = self.naive[d]
        if not self._fits(name, x.data, value.data) or np.broadcast(x.data, value.data).shape != x.data.shape:
            return
        result = model.WRITES[name](x.data, value.data)
        if result.shape != x.data.shape or not model.exact([result]):
            return
        data, memory, node = x.data, x.memory, x.node
        with contextlib.nullcontext() if recording else eg.no_grad():
            try:
                bound = model.write(name, x, value, recording, self.naive)
            except Refused as words:
                self.refused(lambda: self._write(name, c, d), str(words))
                return
            try:
                self._write(name, c, d)
            except RuntimeError as error:  # a rule's kept view of it counts as one that would not see the change
                if not bound or "view" not in str(error):
                    raise
                x.data, x.memory, x.node = data, memory, node

    def _write(self, name: str, c: int, d: int) -> None:
        x, value = self.real[c], self.real[d]
        if name == "+=":
            x += value
        elif name == "*=":
            x *= value
        else:
            x.copy_(value)

    # ── gradients ───────────────────────────────────────────────────────────────────────────────────

    def _walk(self, c: int) -> tuple[dict[int, np.ndarray], np.ndarray] | None:
        """(the gradients that backward from tensor c must give, its cotangent); None where nothing can be said."""
        node = self.naive[c].node
        if node is None or any(n.state == "unknown" for n in model.reached(node)):
            return None
        g = np.arange(1.0, 1 + self.naive[c].data.size).reshape(self.naive[c].data.shape)
        sums = model.gradients(node, g)
        return (sums, g) if model.exact(list(sums.values())) else None

    @precondition(lambda self: self.real)
    @rule(i=pick, retain=st.booleans())
    def backward(self, i: int, retain: bool) -> None:
        c = self.preferred(i, lambda x: x.needs and not x.leaf)
        node = self.naive[c].node
        if node is None:
            self.refused(lambda: self.real[c].sum().backward(), "does not require grad")
            return
        nodes = model.reached(node)
        try:
            found = self._walk(c)
        except Refused as words:  # or something was written to as well: whichever is met first
            also = ["modified in place"] if any(n.stale for n in nodes) else []
            self.refused(lambda: self.real[c].backward(eg.ones_like(self.real[c])), str(words), *also)
            self._lose(nodes)
            return
        if found is None:
            return
        try:
            self.real[c].backward(eg.tensor(found[1]), retain_graph=retain)
        except RuntimeError as error:
            if "modified in place" not in str(error) or not any(n.stale for n in nodes):
                raise
            self._lose(nodes)
            return
        self._deliver(nodes, found[0])
        for n in nodes:
            n.state = n.state if retain or not n.parents else "freed"

    def _deliver(self, nodes: list[model.Node], sums: dict[int, np.ndarray]) -> None:
        """Add what arrived to the gradients of leaves, and of tensors that keep theirs."""
        by_node = {id(x.node): x for x in self.naive if x.leaf}
        for n in nodes:
            receivers = [x for x in n.retainers if any(x is alive for alive in self.naive)]
            if id(n) in by_node:
                receivers.append(by_node[id(n)])
            for x in receivers:
                x.grad = np.array(sums[id(n)]) if x.grad is None else x.grad + sums[id(n)]

    def _lose(self, nodes: list[model.Node]) -> None:
        """After an error half-way: what was freed and delivered until then is nobody's promise."""
        for n in nodes:
            n.state = "unknown" if n.parents else n.state
        for real, naive in zip(self.real, self.naive):
            real.grad = naive.grad = None

    @precondition(lambda self: self.real)
    @rule(i=pick, j=pick)
    def gradient_of_one(self, i: int, j: int) -> None:
        """eg.grad leaves .grad alone and frees nothing when told so."""
        c, d = self.preferred(i, lambda x: x.needs and not x.leaf), self.preferred(j, lambda x: x.leaf)
        target, node = self.naive[d].node, self.naive[c].node
        if node is None or target is None or any(n.state != "whole" or n.stale for n in model.reached(node)):
            return
        found = self._walk(c)
        if found is None:
            return
        got = eg.grad(self.real[c], self.real[d], eg.tensor(found[1]), retain_graph=True, allow_unused=True)
        want = found[0].get(id(target))
        if (got is None) != (want is None):
            raise _failure("grad", got, want)
        if got is not None and want is not None:
            check_bits(got.numpy() + 0.0, want + 0.0, check="EngineMachine: grad", **MODEL)

    @precondition(lambda self: any(x.grad is not None for x in self.naive))
    @rule(i=pick, clear=st.booleans())
    def change_grad(self, i: int, clear: bool) -> None:
        """Forget a gradient, or clip it: to write to it must change nothing else."""
        c = self.chosen(i, lambda x: x.grad is not None)
        real, naive = self.real[c], self.naive[c]
        if clear:
            real.grad = naive.grad = None
        elif naive.grad is not None and isinstance(real.grad, eg.Tensor):
            real.grad.copy_(1.0)
            naive.grad = np.ones_like(naive.grad)

    @precondition(lambda self: any(x.leaf for x in self.naive))
    @rule(i=pick)
    def update(self, i: int) -> None:
        """A step of training: a leaf is written to, whoever has kept it."""
        c = self.chosen(i, lambda x: x.leaf)
        with eg.no_grad():
            self.real[c] += 1.0
        self.naive[c].data += 1.0
        self.naive[c].memory.version += 1

    # ── hooks ───────────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: any(x.needs for x in self.naive))
    @rule(i=pick)
    def hook(self, i: int) -> None:
        """A hook that doubles the gradient."""
        c = self.chosen(i, lambda x: x.needs)
        node = self.naive[c].node
        assert node is not None
        self.removers.append((self.real[c].register_hook(lambda g: g * 2.0), node))
        node.factors.append(2.0)

    @precondition(lambda self: self.removers)
    @rule(i=pick)
    def unhook(self, i: int) -> None:
        remove, node = self.removers.pop(i % len(self.removers))
        remove()
        node.factors.pop()

    @precondition(lambda self: any(x.needs and not x.leaf for x in self.naive))
    @rule(i=pick)
    def retain_grad(self, i: int) -> None:
        c = self.chosen(i, lambda x: x.needs and not x.leaf)
        node = self.naive[c].node
        assert node is not None
        self.real[c].retain_grad()
        node.retainers = [self.naive[c]]

    # ── freeing ─────────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.real)
    @rule(i=pick)
    def free(self, i: int) -> None:
        self.forget(self.chosen(i))

    # ── what holds at all times ─────────────────────────────────────────────────────────────────────

    @invariant()
    def same_bits(self) -> None:
        for real, naive in zip(self.real, self.naive):
            check_bits(real.numpy() + 0.0, naive.data + 0.0, check="EngineMachine: value", **MODEL)  # −0 is 0
            if real.requires_grad != naive.needs or real.is_leaf != (naive.leaf or not naive.needs):
                raise _failure("graph", f"requires_grad {real.requires_grad}, {real.is_leaf=}",
                               f"requires_grad {naive.needs}, leaf {naive.leaf}")
            if (real.grad is None) != (naive.grad is None):
                raise _failure("grad", real.grad, naive.grad)
            if naive.grad is not None:
                assert isinstance(real.grad, eg.Tensor)
                check_bits(real.grad.numpy() + 0.0, naive.grad + 0.0, check="EngineMachine: grad", **MODEL)

    @invariant()
    def gradients_of_their_own(self) -> None:
        """No two tensors' gradients are one memory, none a broadcast view: each can be written to alone."""
        holders: dict[int, eg.Tensor] = {}
        for x in self.real:
            if not isinstance(x.grad, eg.Tensor):
                continue
            if holders.setdefault(id(x.grad.array.storage), x) is not x:
                raise _failure("gradients", "two in one memory", "each in its own")
            if not x.grad.array.writeable:
                raise _failure("gradients", "a read-only one", "one to write to")
