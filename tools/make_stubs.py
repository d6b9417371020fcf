"""Write engine/tensor.pyi: the types of Tensor with the methods and operators that the ops attach to it.

    python tools/make_stubs.py            write it
    python tools/make_stubs.py --check    exit 1 with one line if it is not up to date
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from engine.ops.registry import Op, registry
from engine.tensor import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = ROOT / "engine" / "tensor.py", ROOT / "engine" / "tensor.pyi"
OPERANDS = "Tensor | np.ndarray | bool | int | float"
# object's == and != return a bool: the override says so to the type checker
OVERRIDE = "  # type: ignore[override]"
COMPARISONS = {"__eq__": OVERRIDE, "__ne__": OVERRIDE, "__lt__": "", "__le__": "", "__gt__": "", "__ge__": ""}


def stub_body(node: ast.AST) -> None:
    """Replace every function body under `node` by `...` (docstrings stay in the source)."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef):
            child.body = [ast.Expr(ast.Constant(...))]


def method_line(name: str, attached: Any) -> str:
    """One attached method, with the parameters of the op behind it."""
    made: Op | None = next((cell.cell_contents for cell in attached.__closure__ or ()
                            if isinstance(cell.cell_contents, Op)), None)
    if name.startswith("__r") and made is not None:
        return f"    def {name}(self, other: {OPERANDS}) -> Tensor: ..."
    if name.startswith("__i") and name != "__invert__":
        return f"    def {name}(self, other: {OPERANDS}) -> Tensor: ..."
    if name in COMPARISONS:
        return f"    def {name}(self, other: Any) -> Tensor: ..." + COMPARISONS[name]
    if made is None:
        return f"    def {name}{inspect.signature(attached)}: ...".replace("'", "").replace("engine.tensor.", "")
    parameters = list(inspect.signature(made.forward).parameters.values())[0 if made.composite else 1:]
    operands = [f"{p.name}: {OPERANDS}" for p in parameters[1:len(made.inputs)]]
    attributes = [str(p).replace("'", "") for p in parameters[len(made.inputs):]]
    returns = "Any" if made.forward.__annotations__.get("return") == "Any" and made.composite else "Tensor"
    return f"    def {name}({', '.join(['self', *operands, *attributes])}) -> {returns}: ..."


def stub() -> str:
    tree = ast.parse(SOURCE.read_text())
    stub_body(tree)
    tree.body = [n for n in tree.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Tensor")
    written = {n.name for n in cls.body if isinstance(n, ast.FunctionDef)}
    cls.body = [n for n in cls.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
                and not (isinstance(n, ast.FunctionDef) and n.name == "__getattr__")]  # it would vouch for every name
    lines = ["    array: Array", "    device: str", "    grad: Tensor | RowSparse | None", "    requires_grad: bool",
             "    node: Node | None", "    hooks: list[Callable[[Any], Gradient | None]] | None",
             "    late: Callable[[], Array]"]
    for name, value in Tensor.__dict__.items():
        if isinstance(value, property) and name not in written:
            lines += ["    @property", f"    def {name}(self) -> Tensor: ..."]
        elif inspect.isfunction(value) and name not in written:
            lines.append(method_line(name, value))
    text = ast.unparse(tree)
    head, _, tail = text.partition("    __slots__")
    first_line_end = tail.index("\n") + 1
    body = head + "    __slots__" + tail[:first_line_end] + "\n".join(lines) + "\n" + tail[first_line_end:]
    note = "# Written by tools/make_stubs.py from tensor.py and the op registry; do not edit.\n"
    return note + body.replace("from __future__ import annotations\n", "from __future__ import annotations\n"
                               "from typing import Sequence\nfrom engine.ops.reductions import Axis\n"
                               "from engine.ops.movement import Shape\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    arguments = parser.parse_args()
    assert registry  # the ops have attached themselves
    text = stub()
    if arguments.check:
        if not TARGET.exists() or TARGET.read_text() != text:
            print(f"{TARGET.name}: not up to date; run python tools/make_stubs.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
