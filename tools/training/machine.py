"""What this machine is and what it was measured to do, for reports."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def measured_peak() -> float | None:
    """float32 flops per second of multiply-adds that never leave the registers; None without compiled kernels."""
    from engine.backend.roofs import peak_flops

    return peak_flops()


def usable_cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def description() -> str:
    """Processor, cores, system."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {usable_cores()} cores, {platform.system()}"
