"""What is missing for device "cuda" is said in one line: the CuPy wheel, the driver, a device."""

from __future__ import annotations

import sys
from collections.abc import Callable

import cupy_stand_in
import pytest

import engine as eg
from engine.backend.cupy import load_cupy


def failing(name: str) -> Callable[[], int]:
    def count() -> int:
        raise cupy_stand_in.CUDARuntimeError(f"{name}: as CuPy says it")
    return count


@pytest.mark.parametrize(("modules", "line"), [
    ({"cupy": None}, r"cuda: CuPy cannot be imported \(.*\); pip install 'shardgrad\[gpu\]' for CUDA 12, .*"),
    (cupy_stand_in.make(failing("cudaErrorInsufficientDriver"), driver=0), r"cuda: no NVIDIA driver .*"),
    (cupy_stand_in.make(failing("cudaErrorInsufficientDriver"), driver=11000),
     r"cuda: the NVIDIA driver is older than this CuPy's CUDA; .*"),
    (cupy_stand_in.make(failing("cudaErrorNoDevice")), r"cuda: the NVIDIA driver shows no device; .*"),
    (cupy_stand_in.make(lambda: 0), r"cuda: the NVIDIA driver shows no device; .*"),
], ids=["wheel", "driver", "old driver", "no device", "hidden device"])
def test_what_is_missing_is_named(modules: dict, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(RuntimeError, match=f"^{line}$") as error:
        load_cupy()
    assert "\n" not in str(error.value)


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="got 'gpu', expected one of cpu, reference, cuda"):
        eg.zeros(2, device="gpu")
