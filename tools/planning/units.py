"""Numbers with units, from flags and for people."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from math import inf, isfinite

PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
RATES = {prefix + unit: scale * size for prefix, scale in PREFIXES.items()
         for unit, size in (("bit/s", 0.125), ("B/s", 1.0))}


def seconds(text: str) -> float:
    """ "50us" → 5e-05 """
    return _with_unit(text, SECONDS, f"a number and one of {', '.join(SECONDS)}, as in 50us")


def rate(text: str) -> float:
    """Bytes a second: "10Gbit/s" → 1.25e9; "inf"."""
    return inf if text == "inf" else _with_unit(text, RATES, f"a number and one of {', '.join(RATES)}, as in 10Gbit/s")


def number(text: str) -> float:
    """ "124M" → 124e6 """
    return _with_unit(text, {"": 1.0, **PREFIXES}, "a number, as in 124M or 6.7e9")


def _with_unit(text: str, units: Mapping[str, float], expected: str) -> float:
    parts = re.fullmatch(r"([\d.]+(?:e[-+]?\d+)?)\s*([a-zA-Z/]*)", text)
    try:
        value = float(parts[1]) * units[parts[2]] if parts else inf
    except (ValueError, KeyError):
        value = inf
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return value


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
