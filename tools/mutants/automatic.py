"""Mutants that nobody chose: a seeded sample of the small wrong edits that a library of mutation operators can make.

The operators are mutmut's: functions from a node of the syntax tree (LibCST) to the nodes that may stand in its place.
Nothing else of mutmut is used; what they give is planted by tools/mutate.py like a record that a person wrote.

    numbers by one · arithmetic, comparison and boolean operators by their neighbours · `not` and `~` left out ·
    True and False · an assignment of None · an argument left out, or None · a lambda that gives None · a branch
    always taken, or never

A place is a node; each place has the same chance whatever the number of its mutants, of which one is taken. The order
of places is that of a hash of the seed and of what stands there, so that an edit elsewhere leaves the sample as it was.

Left alone, since no test of values can or should notice: docstrings and every other string (names of kernels, types and
ops, and words of errors), annotations and aliases of types, imports, blocks for type checkers, and `raise` statements
(their condition is mutated; that the line names what came is the concern of tests/ops/test_errors.py).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.mutants.record import Mutant

if TYPE_CHECKING:
    import libcst as cst

FILES = ("engine/autograd.py", "engine/rowsparse.py", "engine/functional.py", "engine/ops/*.py")
ROWS = "tests/ops --deselect=tests/ops/test_accuracy.py"  # accuracy of C functions, over millions of floats
GRAPHS = "tests/test_autograd.py tests/test_derivatives.py tests/test_inplace.py tests/test_fused.py"
TENSORS = "tests/test_tensor.py tests/test_survivors.py tests/test_array_api.py tests/test_random.py"
RANDOM = "tests/test_programs.py tests/test_machine.py"
ROOMS = ("tests/test_nn.py tests/test_models.py tests/test_optim.py tests/test_learning_rates.py "
         "tests/test_launch_point.py tests/sharder/test_late.py")
QUICK, MANY = "--hypothesis-profile=quick", 20
FIRST = {  # the tests of files whose meaning is not that of single ops
    "engine/autograd.py": GRAPHS,
    "engine/rowsparse.py": "tests/test_rowsparse.py tests/test_postponed.py",
    "engine/functional.py": "tests/test_derivatives.py",
    "engine/ops/registry.py": f"{GRAPHS} tests/test_tensor.py tests/test_rowsparse.py tests/ops/test_errors.py",
    "engine/ops/__init__.py": TENSORS,
    "engine/ops/inplace.py": "tests/test_inplace.py tests/test_tensor.py",
    "engine/ops/stored.py": "tests/test_stored.py",
}


class Place(NamedTuple):
    """A node of a statement at the top of a module, what may stand in its place, and which of equal nodes it is."""

    file: str
    statement: Any
    node: Any
    others: list[Any]
    nth: int

    @property
    def within(self) -> str:
        return name_of(self.statement)

    def rank(self, seed: int) -> int:
        return rank(seed, self.file, self.within, code_of(self.node), self.nth)


def rank(*what: Any) -> int:
    return int(hashlib.sha256(repr(what).encode()).hexdigest(), 16)


def code_of(node: Any) -> str:
    import libcst as cst
    return cst.Module([]).code_for_node(node)


# ── what can be wrong ─────────────────────────────────────────────────────────────────────────────────

def _left_alone(node: cst.CSTNode) -> bool:
    """Whether neither the node nor what is in it is mutated."""
    import libcst as cst
    if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom, cst.Raise, cst.BaseString)):
        return True
    if isinstance(node, cst.If):
        return code_of(node.test) == "TYPE_CHECKING"
    if isinstance(node, cst.Assign):
        name = code_of(node.targets[0].target)
        return name == "__all__" or re.fullmatch(r"[A-Z][a-z]\w*", name) is not None  # an alias of a type
    return False


def _operators() -> list[tuple[type, Any]]:
    try:
        from mutmut.mutation.mutators import mutation_operators
    except ImportError:
        raise ImportError("automatic mutants need mutmut: pip install 'shardgrad[mutation]'") from None
    return list(mutation_operators)


def _nodes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    if not _left_alone(node):
        yield node
        for child in node.children:
            yield from _nodes(child)


def name_of(statement: cst.CSTNode) -> str:
    """The definition that a statement at the top of a module is, or completes: `@exp.vjp def _` completes exp."""
    import libcst as cst
    if isinstance(statement, (cst.FunctionDef, cst.ClassDef)):
        for decorator in statement.decorators:
            if isinstance(decorator.decorator, cst.Attribute) and statement.name.value == "_":
                return code_of(decorator.decorator.value)
        return statement.name.value
    return code_of(statement).strip().partition(" ")[0]


def places(file: str, module: cst.Module) -> list[Place]:
    operators, found, seen = _operators(), [], Counter[tuple[str, str]]()
    for statement in module.body:
        within = name_of(statement)
        for node in _nodes(statement):
            others = [other for kind, operator in operators if isinstance(node, kind) for other in operator(node)]
            if others:
                key = within, code_of(node)
                found.append(Place(file, statement, node, others, seen[key]))
                seen[key] += 1
    return found


# ── from a node to a record ───────────────────────────────────────────────────────────────────────────

def edit(before: str, after: str) -> tuple[str, str, int]:
    """The lines that differ, with as many around them as make the old text unique; and the number of the first."""
    a, b = before.splitlines(keepends=True), after.splitlines(keepends=True)
    first = next(i for i, (x, y) in enumerate(zip([*a, ""], [*b, ""])) if x != y)
    same = next(i for i, (x, y) in enumerate(zip([*reversed(a), ""], [*reversed(b), ""])) if x != y)
    last = min(same, len(a) - first, len(b) - first)
    for around in range(len(a)):
        low, high = max(0, first - around), max(0, last - around)
        old, new = "".join(a[low:len(a) - high]), "".join(b[low:len(b) - high])
        if old.strip() and before.count(old) == 1:
            break
    return old, new, first + 1


def users_of(name: str, module: cst.Module, ops: Container[str]) -> set[str]:
    """The public ops of a module that are the definition `name`, or use it, directly or through others."""
    texts: dict[str, str] = {}
    for statement in module.body:
        texts[name_of(statement)] = texts.get(name_of(statement), "") + code_of(statement)
    names = {name}
    while True:
        more = {other for other, text in texts.items() for n in names
                if n.isidentifier() and n not in ops and re.search(rf"\b{n}\b", text)}
        if more <= names:
            return {n for n in names if n in ops}
        names |= more


def stages(file: str, named: set[str]) -> list[str]:
    """pytest's arguments, from the tests that should notice in seconds to those that may."""
    rows = f"{ROWS} --ops={','.join(sorted(named))}" if 0 < len(named) < MANY else ROWS
    first = FIRST.get(file) or (f"{rows} {QUICK}" if named else TENSORS)
    others = [test for test in f"{GRAPHS} {TENSORS}".split() if test not in first.split()]
    last = [rows] if rows != ROWS else [f"{ROWS} {QUICK}"] if file in FIRST or not named else []
    return [first, " ".join(others), *last, f"{RANDOM} {ROOMS} tests/test_architecture.py"]


def sample(root: Path, count: int, seed: int, patterns: Sequence[str] = FILES) -> list[Mutant]:
    """`count` mutants of the files, each of another place; all there are, if those are fewer."""
    import libcst as cst

    from engine.ops import registry
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in files}
    modules = {file: cst.parse_module(text) for file, text in texts.items()}
    every = [place for file, module in modules.items() for place in places(file, module)]
    mutants: dict[str, Mutant] = {}
    for place in sorted(every, key=lambda p: p.rank(seed)):
        if len(mutants) == count:
            break
        module, text, whole = modules[place.file], texts[place.file], code_of(place.statement)
        other = min(place.others, key=lambda node: rank(seed, code_of(node)))
        wrong = code_of(place.statement.deep_replace(place.node, other))
        if wrong == whole or text.count(whole) != 1:
            continue
        old, new, line = edit(text, text.replace(whole, wrong))
        first, *then = stages(place.file, users_of(place.within, module, registry))
        mark = rank(code_of(place.node), place.nth, code_of(other)) % 16**6
        name = f"{Path(place.file).stem}:{line} {mark:06x}"
        what = f"{place.within}: {code_of(place.node)} becomes {code_of(other)}"
        mutants[name] = Mutant(name, place.file, old, new, " ".join(what.split()), first, then=tuple(then))
    return list(mutants.values())
