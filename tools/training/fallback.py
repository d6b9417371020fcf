"""Text for a Python that ships no sources: small programs from a random grammar, the same on every machine.

Only `Random.random` is used, whose sequence for a seed Python promises to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

NOUNS = ("value", "index", "total", "count", "items", "result", "name", "width", "offset", "limit", "buffer", "node")
VERBS = ("read", "write", "find", "update", "merge", "split", "count", "check", "build", "parse", "remove", "copy")
OPERATORS = ("+", "-", "*", "//", "%", "<", ">", "==", "!=")
SENTENCES = ("Return the {noun} that the {other} has.", "Raise ValueError if the {noun} is negative.",
             "The {noun} must not be larger than the {other}.", "{verb} each {noun} before the {other} is used.")
DOCUMENTS, FUNCTIONS = 400, 20


def documents(count: int = DOCUMENTS) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each generated document: about 9 KB of code-like text each."""
    for number in range(count):
        random = Random(number)
        text = "\n\n".join(function(random) for _ in range(FUNCTIONS))
        yield f"generated_{number:04d}.py", text.encode()


def choose(random: Random, options: tuple[str, ...]) -> str:
    return options[int(random.random() * len(options))]


def expression(random: Random, depth: int) -> str:
    kind = random.random()
    if depth == 0 or kind < 0.4:
        return choose(random, NOUNS) if kind < 0.3 else str(int(random.random() * 100))
    left, right = expression(random, depth - 1), expression(random, depth - 1)
    if kind < 0.8:
        return f"({left} {choose(random, OPERATORS)} {right})"
    return f"{choose(random, VERBS)}_{choose(random, NOUNS)}({left}, {right})"


def statement(random: Random, indent: str, depth: int) -> str:
    kind = random.random()
    if depth == 0 or kind < 0.5:
        return f"{indent}{choose(random, NOUNS)} = {expression(random, 2)}\n"
    body = "".join(statement(random, indent + "    ", depth - 1) for _ in range(1 + int(random.random() * 3)))
    if kind < 0.75:
        return f"{indent}if {expression(random, 1)}:\n{body}"
    return f"{indent}for {choose(random, NOUNS)} in range({choose(random, NOUNS)}):\n{body}"


def function(random: Random) -> str:
    noun, other = choose(random, NOUNS), choose(random, NOUNS)
    verb = choose(random, VERBS)
    sentence = choose(random, SENTENCES).format(noun=noun, other=other, verb=verb.capitalize())
    body = "".join(statement(random, "    ", 2) for _ in range(2 + int(random.random() * 4)))
    return f'def {verb}_{noun}({noun}, {other}):\n    """{sentence}"""\n{body}    return {expression(random, 1)}\n'
