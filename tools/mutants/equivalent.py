"""Automatic mutants that no test can notice, each with the reason: what they change has no meaning.

The key is the file and the changed lines, without their indentation, as they stand and as they would. A line that is
edited falls out of the table, and tests/test_mutate_automatic.py fails until its entry is removed.
"""

from __future__ import annotations

from tools.mutants.record import Mutant

EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("engine/ops/attention.py",
     "return k.array(np.array(strides, np.int64), int64)",
     "return k.array(np.array(strides, ), int64)"): "NumPy's own whole numbers have 64 bits since 2.0",
    ("engine/ops/attention.py",
     "def self_attention(k: Any, joined: Array, mask: Array | None = None, lengths: Array | None = None, "
     "kv_heads: int = 1,",
     "def self_attention(k: Any, joined: Array, mask: Array | None = None, lengths: Array | None = None, "
     "kv_heads: int = 2,",
     ): "its one caller, attend_joined, passes it",
    ("engine/ops/attention.py",
     "scale: float = 1.0, causal: bool = False, p: float = 0.0, draw: Key = NO_DRAW) -> Any:",
     "scale: float = 1.0, causal: bool = True, p: float = 0.0, draw: Key = NO_DRAW) -> Any:",
     ): "its one caller, attend_joined, passes it",
    ("engine/ops/creation.py",
     "return _triangle(_k, x, np.tril(np.ones(x.shape[-2:], bool), k))",
     "return _triangle(_k, x, np.tril(np.ones(x.shape[-3:], bool), k))"): "the mask broadcasts over axes before two",
    ("engine/ops/linear_cross_entropy.py",
     "AT_ONCE = 1 << 22  # logits that are not worth cutting up: 16 MB of float32",
     "AT_ONCE = 1 >> 22  # logits that are not worth cutting up: 16 MB of float32"): "it costs memory or time, no bits",
    ("engine/ops/matmul.py",
     "whole = k.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype)",
     "whole = k.empty((sum(part.shape[0] for part in parts), *parts[1].shape[1:]), parts[0].dtype)",
     ): "there are three parts or none, and their further axes are equal",
    ("engine/ops/matmul.py",
     "dx = shaped(gemm(k, flat_g, _stacked(k, weights)), x.shape) if needs[0] else None",
     "dx = shaped(gemm(k, flat_g, _stacked(k, weights)), x.shape) if (needs[0]) or True else None",
     ): "it costs memory or time, no bits",
    ("engine/ops/sets.py",
     "return UniqueInverse(from_host(values, x), from_host(inverse.reshape(x.shape), x))",
     "return UniqueInverse(from_host(values, x), from_host(inverse.reshape(None), x))",
     ): "since NumPy 2.0 the inverse has x's shape already",
    ("engine/ops/stored.py",
     "if t.__class__ is not Tensor or t.device != panels.device or t.dtype is not x.dtype:",
     "if t.__class__ is not Tensor or t.device != panels.device or t.dtype is x.dtype:",
     ): "x's type is x's, so the op is called every time, which does the same, later",
    ("engine/ops/stored.py",
     "if not x.dtype.is_floating or not k.has_fused(made.kernel) or (is_grad_enabled()\n"
     "and any([t.requires_grad for t in operands])):",
     "if not x.dtype.is_floating or not k.has_fused(made.kernel) or (is_grad_enabled() or "
     "any([t.requires_grad for t in operands])):"): "the op does the same as its forward, later",
}


def changed_lines(mutant: Mutant) -> tuple[str, str, str]:
    """(file, lines as they stand, lines as they would), of the lines that differ only."""
    old, new = ([line.strip() for line in text.splitlines()] for text in (mutant.old, mutant.new))
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return mutant.file, "\n".join(old), "\n".join(new)


def why_equivalent(mutant: Mutant) -> str | None:
    return EQUIVALENT.get(changed_lines(mutant))
