"""Every piece of compute passes the one launch point (engine/backend/launch.py): nothing above it touches elements.

Seen in two ways: by reading the source for NumPy that computes, with a list of exceptions and their reasons; and by
running every op, its gradient and a training step on a device whose kernels do nothing, where nothing may come out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
from source_tree import Sources, functions_of, sources

import engine as eg
import engine.testing.rows
from engine import backend, optim
from engine.backend import Array
from engine.backend.cpu import CpuBackend, built_levels
from engine.dtypes import DType
from engine.ops import registry
from engine.ops.registry import internal, op
from engine.tensor import Tensor
from engine.testing import OpSpec, Seeded, specs

compiled = pytest.mark.skipif(not built_levels(), reason="no kernels were compiled")


@pytest.fixture(scope="module")
def tree() -> Sources:
    return sources("engine")


# ── no compute outside the launch point: by reading ───────────────────────────────────────────────────

ABOVE_THE_BOUNDARY = ("ops", "nn", "optim", "models", "sharder", "autograd.py", "rowsparse.py", "tensor.py",
                      "checkpoint.py", "functional.py", "random.py")
# What NumPy is called for without computing on elements: types, shapes, views, memory, conversion, printing.
HARMLESS = {"array", "array2string", "asarray", "ascontiguousarray", "bool_", "broadcast_shapes", "broadcast_to",
            "dtype", "empty", "errstate", "flip", "from_dlpack", "int8", "int64", "shape"}
# (file, function): why NumPy may compute or move elements there. None of it is work that grows with a model.
HOST_WORK = {
    ("engine/ops/attention.py", "rope_table"): "a table of angles in float64, made once",
    ("engine/ops/creation.py", "linspace"): "a small table, exact at both ends",
    ("engine/ops/creation.py", "eye"): "a small table",
    ("engine/ops/creation.py", "tril"): "prepares a mask, which a launch applies",
    ("engine/ops/creation.py", "triu"): "prepares a mask, which a launch applies",
    ("engine/ops/einsum.py", "_diagonal"): "prepares an index",
    ("engine/ops/sets.py", "_unique"): "the result's shape depends on the data",
    ("engine/ops/sets.py", "isin"): "a search on the host",
    ("engine/ops/indexing.py", "nonzero"): "the result's shape depends on the data",
    ("engine/ops/indexing.py", "searchsorted"): "a search on the host",
    ("engine/ops/matmul.py", "conv1d"): "prepares an index",
    ("engine/ops/movement.py", "repeat"): "prepares an index",
    ("engine/ops/elementwise.py", ""): "the reference of erf",
    ("engine/ops/reductions.py", "_logsumexp"): "the reference of logsumexp",
    ("engine/rowsparse.py", "*"): "row numbers: which there are",
    ("engine/optim/clip.py", "norm_of_gradients"): "joins the sums of blocks, one number each",
    ("engine/optim/clip.py", "_sparse_sums"): "block numbers: which hold touched rows",
    ("engine/optim/postponed.py", "*"): "row numbers: how many updates each has had",
    ("engine/models/transformer.py", "sinusoids"): "a table of angles in float64, made once",
    ("engine/models/generation.py", "*"): "sampling: decisions on the host, in float64, about one row of logits",
    ("engine/models/huggingface.py", "*"): "rearranges files' arrays on the host",
    ("engine/sharder/shard.py", "Shard._report"): "joins the sums of blocks, one number each",
    ("engine/sharder/local.py", "LocalSteps.step"): "joins the sums of blocks, one number each",
    ("engine/sharder/drivers/plain.py", "Plain._clipped"): "joins the sums of blocks, one number each",
    ("engine/sharder/drivers/network.py", "fair_rates"): "a simulated network: a rate a flow, no model's elements",
    ("engine/sharder/drivers/priced.py", "*"): "one number a shard, which stands for the model",
    ("engine/sharder/encoding.py", "_read_array"): "the bytes of an array that has travelled",
    ("engine/sharder/drivers/residual_files.py", "InFiles.read"): "the bytes of an array that lay in a file",
    ("engine/sharder/late.py", "Kept.get"): "a view of an array that was gathered again, where it was one before",
    ("engine/sharder/codecs.py", "*"): "positions and row numbers of what travels",
}
METHODS = {"all", "any", "argmax", "argmin", "argsort", "clip", "cumprod", "cumsum", "dot", "fill", "max", "mean",
           "min", "prod", "repeat", "round", "sort", "std", "sum", "take", "trace", "var"}


def is_raw(node: ast.AST) -> bool:
    """Whether an expression is the NumPy array behind an Array or a Tensor: x.data, x.data[...], x.numpy()."""
    if isinstance(node, ast.Subscript):
        return is_raw(node.value)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in ("numpy", "to_numpy")
    return isinstance(node, ast.Attribute) and node.attr == "data"


def computes(node: ast.AST) -> str | None:
    """What a node computes on elements, if anything."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner, name = node.func.value, node.func.attr
        if isinstance(owner, ast.Name) and owner.id in ("np", "numpy") and name not in HARMLESS:
            return f"np.{name}"
        if name in METHODS and is_raw(owner):
            return f"{ast.unparse(owner)}.{name}()"
    if isinstance(node, ast.BinOp) and (is_raw(node.left) or is_raw(node.right)):
        return ast.unparse(node)
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Subscript) and is_raw(t) for t in node.targets):
        return ast.unparse(node)
    if isinstance(node, ast.AugAssign) and is_raw(node.target):
        return ast.unparse(node)
    return None


@cache
def computed_at(text: str) -> list[tuple[str, str]]:
    """(function, what it computes) for a file."""
    return [(where, what) for where, node in functions_of(text) for what in [computes(node)] if what]


def compute_outside(tree: Sources) -> list[str]:
    """Where elements are computed on, other than by a launch and other than in HOST_WORK."""
    found = []
    for path, text in tree.items():
        if not any(path == f"engine/{room}" or path.startswith(f"engine/{room}/") for room in ABOVE_THE_BOUNDARY):
            continue
        for where, what in computed_at(text):
            if (path, where) not in HOST_WORK and (path, "*") not in HOST_WORK:
                found.append(f"{path}: {where or 'the module'}: {what}")
    return found


def test_no_compute_outside_the_launch_point(tree: Sources) -> None:
    assert compute_outside(tree) == []


def test_every_exception_is_still_needed(tree: Sources) -> None:
    """An entry of the lists above that nothing uses any more would hide the next breach."""
    for key in HOST_WORK:
        reduced = {k: v for k, v in HOST_WORK.items() if k != key}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "HOST_WORK", reduced)
            assert compute_outside({key[0]: tree[key[0]]}), f"{key}: no longer needed"


@pytest.mark.parametrize("body", ["return np.exp(x)", "return k.from_numpy(x.data * 2)", "return x.data.sum()",
                                  "y.data[...] = x.data", "y.data += 1", "return (x.numpy() + 1)",
                                  "return np.matmul(x.data, y.data)", "return k.from_numpy(np.dot(x, y))"])
def test_compute_outside_the_launch_point_is_found(tree: Sources, body: str) -> None:
    planted = {**tree, "engine/ops/matmul.py": f"import numpy as np\ndef f(k, x, y):\n    {body}\n"}
    assert any(line.startswith("engine/ops/matmul.py: f:") for line in compute_outside(planted))


# ── no compute outside the launch point: by running ───────────────────────────────────────────────────

class Inert(CpuBackend):
    """The CPU, with kernels that do nothing, in memory that holds NaN (floats) or 0."""

    device = "inert"

    def bind(self, name: str) -> Callable[..., None]:
        super().bind(name)  # a kernel that does not exist is an error here too
        return lambda *_: None

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        made = super().empty(shape, dtype)
        made.data.fill(np.nan if dtype.is_floating else 0)
        return made


@pytest.fixture
def inert(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inert]:
    monkeypatch.setitem(backend._MAKERS, "inert", Inert)
    with eg.device("inert"):
        yield cast(Inert, backend.get_backend("inert"))


def on_inert(x: Any, requires_grad: bool = False) -> Any:
    if isinstance(x, list):
        return [on_inert(o, requires_grad) for o in x]
    if not isinstance(x, np.ndarray):
        return x
    return Tensor(Array(x.copy()), "inert", requires_grad and x.dtype.kind == "f")


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for r in result for t in tensors_of(r)] \
        if isinstance(result, (tuple, list)) else []


def computed(result: Any, operands: list[np.ndarray]) -> list[str]:
    """Which of the tensors hold something: neither views of the operands, nor memory as it was handed out."""
    found = []
    for t in tensors_of(result):
        data = t.array.data
        if any(np.shares_memory(data, x) for x in operands):
            continue
        untouched = np.isnan(data).all() if data.dtype.kind == "f" else not data.any()
        if not untouched:
            found.append(f"{data.dtype} {data.shape}")
    return found


def flat(operands: Any) -> list[Tensor]:
    return tensors_of(list(operands))


def run_inert(call: Callable[..., Any], operands: list[Any], attributes: dict[str, Any]) -> list[str]:
    """What a call and its gradients compute on the inert device: nothing, if all compute is launched."""
    moved = [on_inert(o, True) for o in operands]
    result = call(*moved, **attributes)
    arrays = [t.array.data for t in flat(moved)]
    found = computed(result, arrays)
    for y in tensors_of(result):
        leaves = [t for t in flat(moved) if t.requires_grad]
        if y.requires_grad and leaves:
            g = on_inert(np.ones(y.shape, y.dtype.numpy))
            grads = eg.grad(y, leaves, g, retain_graph=True, allow_unused=True)
            found += [f"gradient {line}" for line in computed([d for d in grads if d is not None], arrays)]
    return found


@compiled
@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in specs.values()])
def test_without_kernels_an_op_computes_nothing(inert: Inert, spec: OpSpec) -> None:
    case = spec.example(Seeded(4, "float32", side=4))
    attributes = {name: None if isinstance(value, Tensor) else value for name, value in case.attributes.items()}
    assert run_inert(spec.call or registry[spec.op], case.operands, attributes) == []


@compiled
def test_without_kernels_nothing_is_made(inert: Inert) -> None:
    made = [eg.zeros(2, 3), eg.ones(3), eg.full((2,), 4.0), eg.arange(1, 5, dtype="float32"), eg.linspace(0, 1, 5),
            eg.eye(3), eg.rand(4), eg.randn(4), eg.one_hot(eg.tensor([1, 2]), 4), eg.tensor([1.0, 2.0]),
            *eg.ops.rope_table(4, 8), eg.ones(3) + 2.5, eg.tensor([1.0]).to("float64")]
    assert computed(made, []) == []


@compiled
def test_without_kernels_a_training_step_computes_nothing(inert: Inert) -> None:
    model = eg.models.Transformer(vocab_size=11, width=8, heads=2, layers=1, context_length=6)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    tokens = Tensor(Array(np.arange(12).reshape(2, 6) % 11), "inert")
    loss = model.loss(tokens, tokens)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    optim.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert computed([loss, *gradients, *model.parameters()], []) == []


@compiled
def test_an_op_that_computes_by_itself_is_found(inert: Inert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["engine.ops.registry"], "internal", dict(internal))

    @op("... -> ...", public=False)
    def own_square(k: Any, x: Array) -> Array:
        y = k.empty_like(x)
        np.multiply(x.data, x.data, out=y.data)
        return y

    @own_square.vjp
    def _(g: Tensor, x: Tensor) -> Tensor:
        return Tensor(Array(2 * x.numpy()), g.device)

    assert run_inert(own_square, [np.ones(3, "float32")], {}) == ["float32 (3,)", "gradient float32 (3,)"]
