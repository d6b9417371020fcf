"""Numbers with units, from flags and for people."""

from __future__ import annotations

import argparse
import re
from math import inf

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
RATES = {prefix + unit: scale * size for prefix, scale in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))
         for unit, size in (("bit/s", 0.125), ("B/s", 1.0))}


def seconds(text: str) -> float:
    """ "50us" → 5e-05 """
    return _with_unit(text, SECONDS, "50us")


def rate(text: str) -> float:
    """Bytes a second: "10Gbit/s" → 1.25e9; "inf"."""
    return inf if text == "inf" else _with_unit(text, RATES, "10Gbit/s")


def _with_unit(text: str, units: dict[str, float], example: str) -> float:
    parts = re.fullmatch(r"([\d.]+(?:e[-+]?\d+)?)\s*([a-zA-Z/]+)", text)
    try:
        value = float(parts[1]) * units[parts[2]] if parts else None
    except (ValueError, KeyError):
        value = None
    if value is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number and one of {', '.join(units)}, "
                                         f"as in {example}")
    return value


def number(text: str) -> float:
    """ "124M" → 124e6 """
    parts = re.fullmatch(r"([\d.]+(?:e\+?\d+)?)([kMGT]?)", text)
    try:
        return float(parts[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[parts[2]]  # type: ignore[index]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number, as in 124M or 6.7e9") from None


def show_seconds(value: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if value >= (2 * size if size > 1 else size):
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs" if value else "0"


def show_bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
