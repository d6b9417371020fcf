"""Einstein summation: any product of tensors, with sums over repeated letters.

    einsum("bhtd,bhsd->bhts", q, k)       every letter that the result does not name is summed over

Two operands at a time become one batched matrix product: letters in both and in the rest of the expression are the
batch, letters in both and nowhere else are summed (the inner axis), the others are rows and columns. So the work is
gemm's, and the gradient is that of the ops used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.ops.matmul import matmul
from engine.ops.movement import permute_dims, reshape
from engine.ops.reductions import sum
from engine.ops.registry import composite
from engine.tensor import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _parse(subscripts: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, with "..." replaced by unused letters, aligned from the right."""
    text = subscripts.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise ValueError(f"einsum: {subscripts!r} names {len(terms)} operands, got {len(ranks)}")
    for term in (*terms, right):
        plain = term.replace("...", "", 1)
        if not all(c in LETTERS for c in plain):
            raise ValueError(f"einsum: {subscripts!r} has the term {term!r}, expected letters and at most one '...'")
    free = [c for c in LETTERS if c not in text]
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks)]
    for i, (term, rank, n) in enumerate(zip(terms, ranks, hidden)):
        if n < 0 or (n and "..." not in term):
            raise ValueError(f"einsum: operand {i} has {rank} axes, expected {rank - n} as in {term!r}")
    longest = max([n for term, n in zip(terms, hidden) if "..." in term], default=0)
    spread = "".join(free[:longest])
    terms = [term.replace("...", spread[longest - n:]) for term, n in zip(terms, hidden)]
    if not arrow:  # implicit: the hidden axes, then the letters that occur once, in alphabetical order
        letters = "".join(terms)
        right = "..." + "".join(sorted(c for c in set(letters) - set(spread) if letters.count(c) == 1))
    result = right.replace("...", spread)
    if len(set(result)) != len(result) or not set(result) <= set("".join(terms)):
        raise ValueError(f"einsum: the result {right!r} of {subscripts!r} repeats a letter or names one of no operand")
    return terms, result


def _diagonal(x: Tensor, term: str) -> tuple[Tensor, str]:
    """x with each repeated letter's axes replaced by their diagonal."""
    for letter in dict.fromkeys(term):
        while term.count(letter) > 1:
            i, j = term.index(letter), term.rindex(letter)
            if x.shape[i] != x.shape[j]:
                raise ValueError(f"einsum: axis {letter!r} is {x.shape[i]} and {x.shape[j]} in one operand, "
                                 "expected equal lengths")
            order = [a for a in range(x.ndim) if a not in (i, j)] + [i, j]
            at = np.arange(x.shape[i])
            x = permute_dims(x, order)[(..., at, at)]
            term = "".join(term[a] for a in order[:-2]) + letter
    return x, term


def _summed(x: Tensor, term: str, keep: str) -> tuple[Tensor, str]:
    """x summed over the letters that nothing else needs."""
    gone = [i for i, c in enumerate(term) if c not in keep]
    return (sum(x, gone), "".join(c for c in term if c in keep)) if gone else (x, term)


def _pair(a: Tensor, ta: str, b: Tensor, tb: str, keep: str) -> tuple[Tensor, str]:
    """Two operands as one batched matrix product; `keep` is what the rest of the expression still needs."""
    shared = [c for c in ta if c in tb]
    batch = [c for c in shared if c in keep]
    inner = [c for c in shared if c not in keep]
    rows, columns = [c for c in ta if c not in shared], [c for c in tb if c not in shared]
    lengths = {**dict(zip(ta, a.shape)), **{c: n for c, n in zip(tb, b.shape) if n != 1 or c not in ta}}

    def arranged(x: Tensor, term: str, groups: Sequence[Sequence[str]]) -> Tensor:
        x = permute_dims(x, [term.index(c) for group in groups for c in group])
        batch_shape = [x.shape[i] for i in range(len(groups[0]))]
        inner_at = len(groups[0])
        sizes = []
        for group in groups[1:]:
            sizes.append(math.prod(x.shape[inner_at:inner_at + len(group)]))
            inner_at += len(group)
        return reshape(x, (*batch_shape, *sizes))

    for c in inner:  # a summed axis of length 1 on one side only is repeated
        if a.shape[ta.index(c)] != b.shape[tb.index(c)]:
            a = a.broadcast_to(tuple(lengths[d] if d == c else n for d, n in zip(ta, a.shape)))
            b = b.broadcast_to(tuple(lengths[d] if d == c else n for d, n in zip(tb, b.shape)))
    product = matmul(arranged(a, ta, (batch, rows, inner)), arranged(b, tb, (batch, inner, columns)))
    letters = "".join((*batch, *rows, *columns))
    return reshape(product, tuple(lengths[c] for c in letters)), letters


def _check_lengths(terms: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    seen: dict[str, int] = {}
    for i, (term, shape) in enumerate(zip(terms, shapes)):
        for letter, n in zip(term, shape):
            if seen.setdefault(letter, n) != n and 1 not in (n, seen[letter]):
                raise ValueError(f"einsum: axis {letter!r} of operand {i} is {n}, expected {seen[letter]} "
                                 f"(operand {i} has shape {shape})")
            seen[letter] = max(seen[letter], n)


@composite("*... -> ...", reference=lambda operands, subscripts: np.einsum(subscripts, *operands))
def einsum(subscripts: str, *operands: Tensor) -> Tensor:
    """Σ over every letter that the result does not name, of the product of the operands.

    subscripts: "ij,jk->ik"; without "->" the result names the letters that occur once, in alphabetical order;
    "..." stands for leading axes that broadcast; a letter twice in one operand takes its diagonal.
    Operands are combined from left to right. Raises ValueError for subscripts or lengths that do not fit.
    """
    for i, x in enumerate(operands):
        if not isinstance(x, Tensor):
            raise TypeError(f"einsum: operand {i} is {type(x).__name__}, expected a tensor")
    terms, result = _parse(subscripts, [x.ndim for x in operands])
    _check_lengths(terms, [x.shape for x in operands])
    diagonals = [_diagonal(x, term) for x, term in zip(operands, terms)]
    x, term = diagonals[0]
    for i, (y, other) in enumerate(diagonals[1:], start=1):
        later = set(result).union(*[t for _, t in diagonals[i + 1:]])
        x, term = _summed(x, term, "".join(later | set(other)))
        y, other = _summed(y, other, "".join(later | set(term)))
        x, term = _pair(x, term, y, other, "".join(later))
    x, term = _summed(x, term, result)
    return permute_dims(x, [term.index(c) for c in result])
