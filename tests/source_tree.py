"""The engine's source as a mapping from paths to texts, for the tests that read it (and plant breaches in it)."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent

Sources = dict[str, str]  # path from the root -> text
parse = cache(ast.parse)  # of a text; a planted breach changes one file, and only that is read again


def sources(*folders: str) -> Sources:
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
            for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def functions_of(text: str) -> list[tuple[str, ast.AST]]:
    """(qualified name, node) for each node, the name being that of the innermost function or class around it.

    Not what stands in the `reference=` of a decorator: that is an oracle, which no call of an op runs.
    """
    found, stack = [], [("", parse(text))]
    while stack:
        name, node = cast("tuple[str, Any]", stack.pop())
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{name}.{node.name}".lstrip(".")
        found.append((name, node))
        stack += [(name, child) for child in ast.iter_child_nodes(node)
                  if not (isinstance(child, ast.keyword) and child.arg == "reference")]
    return found
