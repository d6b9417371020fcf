"""What of some C sources a function is made of: its own definition, and those that it uses, directly or not.

    parts = definitions(texts)     every top-level definition: a function, a macro, a type, a constant
    needed(parts, "exp")           those that define exp, all that they use, and #include <...>, #pragma, #undef

By names alone: whatever defines a name that occurs is taken along, in every branch of an #if, with its condition. So it
may be more than the compiler looks at, never less. Comments do not count, nor in which file a definition stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

COMMENT = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)
CONDITION = re.compile(r"#(if|else|elif|endif)")
GUARD = re.compile(r"#ifndef \w+_H$")
ATTRIBUTE = re.compile(r"__attribute__\s*\(\(.*?\)\)\)*")
PASTED = re.compile(r"(\w+)?##name(?:##(\w+))?|\bname##(\w+)")
NAMED = tuple(map(re.compile, (
    r"#define (\w+)",
    r"[A-Z][A-Z_]+\((\w+)",                   # a macro that defines what it is given: UNARY(exp, vf_exp)
    r"typedef [^{]*\(\*?(\w+)\)\(",           # of a function
    r"typedef .*?(\w+) ?(?:\[.*\] ?)?;$",
    r"(?:struct|union) (\w+)",
    r"[\w\s*]*?\b(\w+) ?[(\[=;]")))


@dataclass(frozen=True)
class Part:
    """A definition: under which conditions of #if, its text, the names that it gives a meaning to; none: to everything.
    """

    when: tuple[str, ...]
    text: str
    names: frozenset[str]


def definitions(texts: Iterable[str]) -> list[Part]:
    """The top-level definitions of C sources, in their order, and the directives that are neither #if nor local files.
    """
    found, lines, depth = [], [], 0
    for text in texts:
        when: list[str] = []
        plain = COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else " ", text).replace("\\\n", " ")
        for line in plain.split("\n"):
            if not depth and CONDITION.match(line):
                when = _conditions(when, line.split())
                continue
            lines += [line] if line.strip() and not line.startswith('#include "') else []
            code = "" if line.startswith("#") else COMMENT.sub("", line)  # without strings
            depth += sum(code.count(c) for c in "{(") - sum(code.count(c) for c in "})")
            if lines and not depth and (lines[0].startswith("#") or line.rstrip().endswith((";", "}", ")"))):
                whole = re.sub(r"\s+", " ", "\n".join(lines)).strip()
                found.append(Part(tuple(w for w in when if not GUARD.match(w)), whole, _names(whole)))
                lines = []
    return found


def _conditions(when: list[str], line: list[str]) -> list[str]:
    """The conditions after a directive: those of an #else are all that failed."""
    if line[0] == "#endif":
        return when[:-1]
    if line[0] in ("#else", "#elif"):
        return [*when[:-1], " ".join((when[-1], *line))]
    return [*when, " ".join(line)]


def _names(text: str) -> frozenset[str]:
    if text.startswith("#") and not text.startswith("#define"):
        return frozenset()
    if text.startswith("enum"):
        return frozenset(re.findall(r"\w+", text))
    plain = ATTRIBUTE.sub("", text)
    return frozenset(next(([m[1]] for pattern in NAMED if (m := pattern.match(plain))), []))


def needed(parts: list[Part], name: str) -> list[Part]:
    """All that the function `name` is made of. Raises LookupError if nothing defines it."""
    waiting = [part for part in parts if name in part.names]
    if not waiting:
        raise LookupError(f"nothing defines {name!r}")
    pastes = {next(iter(part.names)): PASTED.findall(part.text) for part in parts if "##" in part.text and part.names}
    taken = {part for part in parts if not part.names}
    while waiting:
        part = waiting.pop()
        if part in taken:
            continue
        taken.add(part)
        used = set(re.findall(r"\w+", " ".join((*part.when, part.text))))
        for macro, argument in re.findall(r"\b(\w+)\((\w+)", part.text):
            used |= {before + argument + (after or alone) for before, after, alone in pastes.get(macro, ())}
        waiting += [other for other in parts if other.names & used]
    return [part for part in parts if part in taken]
