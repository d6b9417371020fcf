"""The CUDA sources: where they are, what to hand to the run-time compiler, and which kernels they hold.

The kernels are compiled when they are first called, so an installation carries their text (engine/_kernels/cuda);
a checkout reads kernels/cuda. A header is put in place of its #include, so that one string is the whole program: the
compiler needs no search path, and a cache keyed by the string sees every change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
OPTIONS = ("-fmad=false",)  # a multiply-add is fused where the source says fma, as in the C kernels

# float and double kernels are `KERNEL(name)(...)`, those without an element type `EXPORT void name(...)`.
PROTOTYPE = re.compile(r"^(?:KERNEL\((\w+)\)|EXPORT void (\w+))\s*\(([^()]*)\)", re.MULTILINE)
INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its C type without const and without blanks ("real*", "int64_t"), and its name."""

    type: str
    name: str

    @property
    def is_pointer(self) -> bool:
        return self.type.endswith("*")


@dataclass(frozen=True)
class Prototype:
    """A kernel's interface. `typed`: it exists for float and double, as <name>_f32 and <name>_f64."""

    name: str
    typed: bool
    parameters: tuple[Parameter, ...]

    def symbol(self, bits: int) -> str:
        return f"{self.name}_f{bits}" if self.typed else self.name

    @property
    def selector(self) -> int:
        """Which parameter's element type says whether the float or the double kernel is meant."""
        return next((i for i, p in enumerate(self.parameters) if p.type == "real*"), 0)


def prototypes(text: str) -> dict[str, Prototype]:
    """The kernels that C or CUDA source, or kernels.h, declares or defines, by name."""
    found = {}
    for typed, plain, parameters in PROTOTYPE.findall(text):
        name = typed or plain
        found[name] = Prototype(name, bool(typed), tuple(map(parameter, parameters.split(","))))
    return found


def parameter(text: str) -> Parameter:
    """`const real *x` as Parameter("real*", "x")."""
    match = re.fullmatch(r"\s*(?:const\s+)?(\w+)(\s*\*\s*|\s+)(\w+)\s*", text)
    if match is None:
        raise ValueError(f"CUDA source: cannot read the parameter {text.strip()!r}")
    return Parameter(match[1] + match[2].strip(), match[3])


@cache
def folder() -> Path:
    """Where the .cu files are. Raises FileNotFoundError with one line when an installation lacks them."""
    for place in (PACKAGE / "_kernels" / "cuda", PACKAGE.parent / "kernels" / "cuda"):
        if (place / "common.cuh").exists():
            return place
    raise FileNotFoundError(f"cuda: no CUDA sources in {PACKAGE / '_kernels' / 'cuda'}; install shardgrad again")


@cache
def sources() -> dict[str, Path]:
    """The file of each kernel."""
    return {name: path for path in sorted(folder().glob("*.cu")) for name in prototypes(path.read_text("utf-8"))}


@cache
def kernels() -> dict[str, Prototype]:
    """Every CUDA kernel by name."""
    return {name: prototypes(path.read_text("utf-8"))[name] for name, path in sources().items()}


def program(path: Path) -> str:
    """The text of a .cu file with its headers in place; the compiler's messages still name file and line."""
    def header(match: re.Match[str]) -> str:
        inner = path.parent / match[1]
        after = path.read_text("utf-8").count("\n", 0, match.start()) + 2
        return f'#line 1 "{inner.name}"\n{inner.read_text("utf-8")}#line {after} "{path.name}"'

    return f'#line 1 "{path.name}"\n' + INCLUDE.sub(header, path.read_text("utf-8"))


def defines(bits: int) -> tuple[str, ...]:
    """The compiler options that choose the element type."""
    return (*OPTIONS, f"-DREAL_BITS={bits}")
