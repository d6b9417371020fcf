"""The rules that make this project what it is, each a check of the source, and each check tested on planted breaches.

    imports point down            engine/README.md
    one owner for each backend    compiled kernels in the CPU backend, CuPy in the GPU backend, both when first used
    nobody asks for the device    outside engine.backend
    the protocol is pure          no time, chance, threads, files or sockets in engine.sharder outside its drivers
    nothing is forgotten          every op has a row, every kernel is launched, the stub is up to date

The rule of the one launch point has a file of its own, test_launch_point.py.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import build_kernels
import make_stubs
import numpy as np
import pytest
from source_tree import ROOT, Sources, functions_of, parse, sources

import engine as eg
import engine.testing.rows
from engine import backend
from engine.backend.numpy_rows import numpy_rows
from engine.ops import registry
from engine.ops.registry import internal
from engine.testing import specs


@pytest.fixture(scope="module")
def tree() -> Sources:
    return sources("engine")


# ── imports point down ────────────────────────────────────────────────────────────────────────────────

# Each room, from the bottom up, and what it may know besides itself.
BOTTOM = ("engine.dtypes", "engine.precision", "engine.files", "engine.backend")
GRAPH = ("engine.autograd", "engine.rowsparse", "engine.tensor", "engine.random", "engine.checkpoint",
         "engine.capture", "engine.functional")
ROOMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("engine.dtypes", "engine.precision", "engine.files"): (),
    ("engine.backend",): ("engine.dtypes", "engine.precision"),
    GRAPH: BOTTOM,
    ("engine.ops",): (*GRAPH, *BOTTOM),
    ("engine.debug",): (*GRAPH, *BOTTOM),
    ("engine.array_api",): ("engine.ops", *GRAPH, *BOTTOM),
    ("engine.nn",): ("engine.ops", *GRAPH, *BOTTOM),
    ("engine.optim",): ("engine.ops", *GRAPH, *BOTTOM),
    ("engine.models",): ("engine.nn", "engine.ops", *GRAPH, *BOTTOM),
    ("engine.sharder",): ("engine.optim", *GRAPH, *BOTTOM),  # arrays and update rules: no modules, no models
    ("engine.testing",): ("engine",),
    ("engine.doctor", "engine.__main__"): ("engine",),
    ("engine._kernels",): (),
    ("engine",): ("engine",),  # the front: engine/__init__.py
}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@cache
def import_nodes(text: str) -> list[ast.Import | ast.ImportFrom]:
    """All imports but those under `if TYPE_CHECKING:`."""
    found, stack = [], [parse(text)]
    while stack:
        node: Any = stack.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        stack += ast.iter_child_nodes(node)
    return found


def imported(path: str, tree: Sources) -> Iterator[str]:
    """The modules that a file imports, at its top or inside a function: "from engine import ops" names engine.ops."""
    modules = {module_name(p) for p in tree}
    for node in import_nodes(tree[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")[:None if path.endswith("__init__.py") else -1]
                base = ".".join([*package[:len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


def upward_imports(tree: Sources) -> list[str]:
    """Breaches of ROOMS: one line each."""
    found = []
    for path in tree:
        own = module_name(path)
        room, known = next((rooms, known) for rooms, known in ROOMS.items() if any(inside(own, r) for r in rooms))
        if room == ("engine",) and own != "engine":
            found.append(f"{path}: stands in no room; name one in ROOMS")
            continue
        allowed = (*room, *known)
        for module in imported(path, tree):
            if inside(module, "engine") and not any(inside(module, a) if a != "engine" or "engine" in known
                                                    else module == a for a in allowed):
                found.append(f"{path}: imports {module}")
    return found


def test_imports_point_down(tree: Sources) -> None:
    assert upward_imports(tree) == []


@pytest.mark.parametrize(("path", "text"), [
    ("engine/dtypes.py", "from engine.backend import Array"),
    ("engine/backend/pool.py", "import engine.tensor"),
    ("engine/tensor.py", "def f():\n    from engine.ops import add"),
    ("engine/ops/matmul.py", "from engine import nn"),
    ("engine/ops/matmul.py", "from engine import __version__"),
    ("engine/ops/matmul.py", "from ..nn import Linear"),
    ("engine/nn/layers.py", "from engine.optim import SGD"),
    ("engine/optim/rules.py", "import engine.nn.layers as layers"),
    ("engine/models/transformer.py", "from engine.sharder import ParameterServer"),
    ("engine/sharder/shard.py", "from engine.nn import Module"),
    ("engine/sharder/shard.py", "import engine as eg"),
    ("engine/backend/array.py", "from engine.testing import specs"),
    ("engine/attic.py", "x = 1"),
])
def test_an_import_that_points_up_is_found(tree: Sources, path: str, text: str) -> None:
    assert any(line.startswith(path) for line in upward_imports({**tree, path: text}))


def test_what_only_the_type_checker_imports_does_not_count(tree: Sources) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine.ops import add\n"
    assert upward_imports({**tree, "engine/tensor.py": text}) == []


# ── what is imported lazily, and by whom ──────────────────────────────────────────────────────────────

CORE = {"numpy", "cffi", "engine"}  # cffi is imported by the compiled modules themselves
HYPOTHESIS_AT = ("engine/testing/strategies.py", "engine/testing/machine.py")  # the first imports the second


def early_imports(tree: Sources) -> list[str]:
    """Imports of anything but the core and the standard library that run when their file is imported."""
    found = []
    for path, text in tree.items():
        stack: list[Any] = [parse(text)]
        while stack:
            node = stack.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or "engine"] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                if top not in CORE | sys.stdlib_module_names and not (top == "hypothesis" and path in HYPOTHESIS_AT):
                    found.append(f"{path}: imports {name} at once")
            stack += ast.iter_child_nodes(node)
    return found


def strings_of(text: str) -> list[tuple[str, bool]]:
    """(string, whether it stands in a function) for every string that is not a docstring."""
    found, stack = [], [(parse(text), False)]
    while stack:
        node, within = cast("tuple[Any, bool]", stack.pop())
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.value, within))
        within = within or isinstance(node, (ast.FunctionDef, ast.Lambda))
        stack += [(child, within) for child in ast.iter_child_nodes(node)]
    return found


def backend_secrets(tree: Sources) -> list[str]:
    """Who else than the CPU backend names the compiled kernels, and who else than one file of engine.backend CuPy."""
    found, cupy_at = [], set()
    for path, text in tree.items():
        for module in imported(path, tree):
            if inside(module, "engine._kernels"):
                found.append(f"{path}: imports {module}; the CPU backend does so by importlib")
            if inside(module, "cupy"):
                cupy_at.add(path)
        for string, within in strings_of(text) if "engine._kernels" in text else []:
            if "engine._kernels" in string and not (path == "engine/backend/cpu.py" and within):
                found.append(f"{path}: names engine._kernels")
    found += [f"{path}: imports cupy" for path in cupy_at if not path.startswith("engine/backend/") or len(cupy_at) > 1]
    return found


def test_only_the_core_is_imported_at_once(tree: Sources) -> None:
    assert early_imports(tree) == []


@pytest.mark.parametrize("text", ["import hypothesis", "from cupy import ndarray",
                                  "try:\n    import torch\nexcept ImportError:\n    torch = None",
                                  "class A:\n    import matplotlib.pyplot"])
def test_an_early_import_is_found(tree: Sources, text: str) -> None:
    assert len(early_imports({**tree, "engine/ops/matmul.py": text})) == 1


def test_compiled_kernels_and_cupy_have_one_owner(tree: Sources) -> None:
    assert backend_secrets(tree) == []


@pytest.mark.parametrize(("path", "text"), [
    ("engine/ops/matmul.py", "def f():\n    from engine._kernels import cpu_v4"),
    ("engine/ops/matmul.py", "def f():\n    import importlib\n    importlib.import_module('engine._kernels.cpu_v4')"),
    ("engine/backend/cpu.py", "import importlib\nm = importlib.import_module('engine._kernels.cpu_v4')"),
    ("engine/backend/reference.py", "def f(n):\n    return __import__(f'engine._kernels.cpu_{n}')"),
    ("engine/nn/layers.py", "def f():\n    import cupy"),
])
def test_a_second_owner_is_found(tree: Sources, path: str, text: str) -> None:
    assert any(line.startswith(path) for line in backend_secrets({**tree, path: text}))


# ── nobody asks what device it runs on ────────────────────────────────────────────────────────────────

DEVICES = {*backend.devices(), "gpu", "cuda", "cupy"}
# (file, function): why it may
DEVICE_QUESTIONS = {
    ("engine/tensor.py", "Tensor.__repr__"): "prints the device where it is not the usual one",
    ("engine/doctor.py", "gpu"): "reports which devices there are",
}


def constants_of(node: ast.AST) -> list[Any]:
    """What an operand or pattern names: a constant, or those of a tuple, list, set or alternative."""
    parts = getattr(node, "elts", None) or getattr(node, "patterns", None)
    if parts:
        return [constant for part in parts for constant in constants_of(part)]
    value = node.value if isinstance(node, ast.MatchValue) else node
    return [value.value] if isinstance(value, ast.Constant) else []


def device_questions(tree: Sources) -> list[str]:
    """Comparisons of anything with a device's name, outside engine.backend."""
    found = []
    for path, text in tree.items():
        if path.startswith("engine/backend/"):
            continue
        for where, node in functions_of(text):
            cases: list[ast.AST] = []
            if isinstance(node, ast.Compare):
                cases = [node.left, *node.comparators]
            elif isinstance(node, ast.match_case):
                cases = [node.pattern]
            named = {constant for case in cases for constant in constants_of(case)} & DEVICES
            if named and (path, where) not in DEVICE_QUESTIONS:
                found.append(f"{path}: {where or 'the module'} asks for {min(named)!r}")
    return found


def test_nobody_asks_for_the_device(tree: Sources) -> None:
    assert device_questions(tree) == []


def test_every_exception_is_still_needed(tree: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = list(DEVICE_QUESTIONS)
    monkeypatch.setattr(sys.modules[__name__], "DEVICE_QUESTIONS", {})
    for path, where in exceptions:
        assert any(where in line for line in device_questions({path: tree[path]})), f"{path} {where}: no longer needed"


@pytest.mark.parametrize("text", [
    "def f(x):\n    if x.device == 'cpu':\n        return x",
    "def f(k):\n    return 1 if 'reference' != k.device else 2",
    "def f(x):\n    while x.device in ('cuda', 'cpu'):\n        pass",
    "def f(x):\n    match x.device:\n        case 'cpu':\n            return 1",
])
def test_a_question_for_the_device_is_found(tree: Sources, text: str) -> None:
    assert len(device_questions({**tree, "engine/ops/matmul.py": text})) == 1


# ── the protocol is pure ──────────────────────────────────────────────────────────────────────────────

MACHINES = {"engine/sharder/shard.py", "engine/sharder/worker.py", "engine/sharder/coordinator.py",
            "engine/sharder/journal.py", "engine/sharder/memory.py"}
IMPURE = {"asyncio", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "queue", "random", "secrets",
          "selectors", "signal", "socket", "subprocess", "tempfile", "threading", "time", "uuid"}
# (file, what it imports): why it may
IMPURITIES = {
    ("engine/sharder/versions.py", "threading"): "shards that are threads write one version together: its locks keep "
                                                 "counts whole, and decide nothing",
}


def impurities(tree: Sources) -> list[str]:
    """What the protocol's files, all of engine.sharder but its drivers, know of the world; what machines know of their
    drivers."""
    found = []
    for path, text in tree.items():
        if not path.startswith("engine/sharder/") or path.startswith("engine/sharder/drivers/"):
            continue
        for module in imported(path, tree):
            if module.partition(".")[0] in IMPURE and (path, module) not in IMPURITIES:
                found.append(f"{path}: imports {module}")
            if path in MACHINES and inside(module, "engine.sharder.drivers"):
                found.append(f"{path}: imports {module}")
        for where, node in functions_of(text):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ("open", "__import__") or (isinstance(node, ast.Attribute) and node.attr == "random"):
                found.append(f"{path}: {where} uses {ast.unparse(node)}")
    return found


def test_the_protocol_is_pure(tree: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tree.keys() >= MACHINES and impurities(tree) == []
    exceptions = {f"{path}: imports {module}" for path, module in IMPURITIES}
    monkeypatch.setattr(sys.modules[__name__], "IMPURITIES", {})
    assert set(impurities(tree)) == exceptions, "an exception that is no longer needed"


@pytest.mark.parametrize(("path", "text"), [
    ("engine/sharder/shard.py", "import time"),
    ("engine/sharder/worker.py", "def f():\n    from random import random"),
    ("engine/sharder/journal.py", "import os.path"),
    ("engine/sharder/memory.py", "import numpy as np\ndef f():\n    return np.random.default_rng()"),
    ("engine/sharder/codecs.py", "def f(path):\n    return open(path).read()"),
    ("engine/sharder/coordinator.py", "from engine.sharder.drivers import threads"),
    ("engine/sharder/partition.py", "from threading import Lock"),
])
def test_an_impurity_is_found(tree: Sources, path: str, text: str) -> None:
    assert len(impurities({**tree, path: text})) == 1


# ── nothing is forgotten ──────────────────────────────────────────────────────────────────────────────

def without_partner(ops: Any, rows: Any) -> set[str]:
    """Ops without a row, and ops of rows that there are not."""
    return set(ops) ^ {spec.op for spec in rows}


def test_every_public_op_has_a_row_and_is_exported() -> None:
    assert without_partner(registry, specs.values()) == set()
    assert set(registry) <= set(eg.ops.__all__) <= set(eg.__all__)


def test_an_op_without_a_row_is_found_and_a_row_without_an_op() -> None:
    assert without_partner([*registry, "wedge"], specs.values()) == {"wedge"}
    assert without_partner(registry, [s for s in specs.values() if s.op != "tanh"]) == {"tanh"}
    assert without_partner(set(registry) - {"tanh"}, specs.values()) == {"tanh"}


def kernels_of(header: str) -> list[str]:
    """The typed kernels that kernels.h declares."""
    return sorted({line.split("(")[0].split()[-1].removesuffix("_f32")
                   for line in build_kernels.declarations(header).splitlines() if "_f32(" in line})


LAUNCHERS = {"map", "_reduce", "_running"}  # functions that are given a kernel's name


@cache
def launched(text: str) -> set[str]:
    """The names by which a file launches kernels: k.name(...), k.map("name", ...)."""
    names = set()
    for _, node in functions_of(text):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        names.add(called if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") != "np" else "")
        if called in LAUNCHERS:
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return names


def forgotten_kernels(header: str, tree: Sources, rows: set[str], fused: set[str]) -> list[str]:
    """Kernels that nothing launches, and kernels without a NumPy row that belong to no fused op."""
    names = {name for path, text in tree.items() if path != "engine/backend/numpy_rows.py" for name in launched(text)}
    return [f"{kernel}: nothing launches it" for kernel in kernels_of(header) if kernel not in names] \
        + [f"{kernel}: no NumPy row, and no fused op's" for kernel in kernels_of(header)
           if kernel not in rows and kernel.removesuffix("_vjp") not in fused]


def fused_kernels() -> set[str]:
    return {made.kernel for made in (*registry.values(), *internal.values()) if made.fused}


HEADER = (ROOT / "kernels" / "kernels.h").read_text(encoding="utf-8")


def test_every_kernel_is_launched_and_has_a_row_or_a_composition(tree: Sources) -> None:
    assert len(kernels_of(HEADER)) > 60
    assert forgotten_kernels(HEADER, tree, set(numpy_rows(np)), fused_kernels()) == []


def test_a_forgotten_kernel_is_found(tree: Sources) -> None:
    header = HEADER + "\nKERNEL(wedge)(real *y, const real *x, int64_t n);\n"
    rows = set(numpy_rows(np))
    assert forgotten_kernels(header, tree, rows | {"wedge"}, fused_kernels()) == ["wedge: nothing launches it"]
    launching = {**tree, "engine/ops/wedge.py": "def wedge(k, x):\n    return k.map('wedge', x)\n"}
    assert forgotten_kernels(header, launching, rows, fused_kernels()) == ["wedge: no NumPy row, and no fused op's"]
    assert forgotten_kernels(header, launching, rows | {"wedge"}, fused_kernels()) == []


def test_every_fused_op_has_a_kernel_of_the_header() -> None:
    assert fused_kernels() <= set(kernels_of(HEADER))


def test_the_stub_is_up_to_date() -> None:
    assert make_stubs.TARGET.read_text(encoding="utf-8") == make_stubs.stub(), "run python tools/make_stubs.py"


def test_a_stale_stub_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "tensor.pyi"
    stale.write_text(make_stubs.stub().replace("def exp(", "def expo("))
    monkeypatch.setattr(make_stubs, "TARGET", stale)
    monkeypatch.setattr(sys, "argv", ["make_stubs.py", "--check"])
    assert make_stubs.main() == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
