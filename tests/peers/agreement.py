"""What agreement with another library means, in float32 and in float64, and a record of how near everything came.

Two implementations of one formula round differently, so neither is right to the bit. A third, the peer's in float64,
tells how far each of them is off:

    float32    ‖ours − wide‖₂ ≤ 2 ‖peer − wide‖₂ + 1e-6 size

We may be twice as far off as the peer, whose error is thereby the tolerance: it knows the conditioning of the problem.
The last term, 17 units roundoff of the size of the whole, is there for tensors that the peer happens to hit.

In float64 there is nothing wider to compare with. But rounding errors are proportional to the unit roundoff, which is
2⁻²⁹ times that of float32: what is allowed there is allowed here, scaled, and twice, since both are off:

    float64    ‖ours − wide‖₂ ≤ 2 · 2⁻²⁹ (2 ‖peer − wide‖₂ + 1e-6 size)

which is eight digits more than float32 shows, and which no other formula passes for the same one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]

SLACK = 1e-6
NARROWER = 2.0**-29  # unit roundoff of float64 over that of float32


@dataclass(frozen=True)
class Comparison:
    """One tensor: how large the errors were, and what was allowed."""

    what: str
    error: float
    peer: float
    allowed: float

    @property
    def share(self) -> float:
        """The error as a part of what is allowed; above 1 is disagreement. NaN counts as infinitely far."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.error <= np.inf and self.allowed > 0 else float("inf")


seen: dict[str, list[Comparison]] = defaultdict(list)
"""All comparisons by part ("ops", "models" ...), for the table at the end."""


def distance(a: Any, b: Any) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ"
    return float(np.linalg.norm((a - b).reshape(-1)))


def agree(part: str, what: str, ours: Any, peer: Any, wide: Any, size: float | None = None,
          ours_wide: Any = None) -> None:
    """Hold a float32 tensor of ours, and with `ours_wide` its float64 twin, against a peer's in both types.

    size: of the whole that the tensor is a part of, such as the norm of all gradients; by default ‖wide‖₂
    """
    size = distance(wide, np.zeros(np.shape(wide))) if size is None else size
    peers_error = distance(peer, wide)
    allowed = 2 * peers_error + SLACK * size
    judge(part, Comparison(what, distance(ours, wide), peers_error, allowed))
    if ours_wide is not None:
        judge(part + ", float64", Comparison(what, distance(ours_wide, wide), peers_error * NARROWER,
                                             2 * NARROWER * allowed))


def agree_all(part: str, what: str, ours: Tensors, peer: Tensors, wide: Tensors, ours_wide: Tensors,
              together: bool = False) -> None:
    """agree() for every tensor of a result; `together`: each as a part of them all, since some are nothing but rounding
    errors (the gradient of a key's bias, which softmax takes away again)."""
    assert ours.keys() == peer.keys() == wide.keys() == ours_wide.keys()
    size = norm(wide) if together else None
    for name, value in wide.items():
        agree(part, f"{what}: {name}", ours[name], peer[name], value, size, ours_wide[name])


def norm(tensors: Tensors) -> float:
    """‖all of them‖₂."""
    return float(np.sqrt(sum(distance(x, np.zeros(np.shape(x))) ** 2 for x in tensors.values())))


def judge(part: str, found: Comparison) -> None:
    """Record a comparison, and raise AssertionError if it is one of disagreement."""
    seen[part].append(found)
    assert found.share <= 1, (f"{found.what}: ours is {found.error:.3g} from the wide result, "
                              f"the peer {found.peer:.3g}; allowed {found.allowed:.3g}")


def table() -> list[str]:
    """A line for each part: what was compared, the worst share of the allowed, and how our errors relate to theirs."""
    lines = [f"{'compared with the peer':32} {'tensors':>8} {'our error / theirs':>19} {'worst share':>12}  of"]
    for part, found in seen.items():
        worst = max(found, key=lambda c: c.share)
        both = [(c.error, c.peer) for c in found if c.error > 0 and c.peer > 0 and "float64" not in part]
        middle = f"{np.median([ours / theirs for ours, theirs in both]):.2f}" if both else "-"
        lines.append(f"{part:32} {len(found):8,} {middle:>19} {worst.share:12.2f}  {worst.what}")
    return lines
