"""The CUDA sources as texts: one interface with the C kernels, what the compilers say, where they are found."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.backend import cuda_source
from engine.backend.cuda_source import Parameter, Prototype

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER = cuda_source.prototypes((ROOT / "kernels" / "kernels.h").read_text("utf-8"))
FILES = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
ARCHITECTURES = ("75", "80", "90")


# ── the interface ─────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", sorted(cuda_source.kernels()))
def test_signature_is_that_of_the_header(name: str) -> None:
    """Names, types and order of the parameters, and whether the kernel has an element type."""
    assert name in HEADER, f"{name}: kernels.h has no such kernel"
    assert cuda_source.kernels()[name] == HEADER[name]


def test_const_is_where_the_header_has_it() -> None:
    """Which arrays are outputs is part of the interface."""
    def constants(text: str) -> dict[str, list[str]]:
        return {(m[1] or m[2]): re.findall(r"const \w+ \*(\w+)", m[3]) for m in cuda_source.PROTOTYPE.finditer(text)}

    header = constants((ROOT / "kernels" / "kernels.h").read_text("utf-8"))
    for path in FILES:
        for name, inputs in constants(path.read_text("utf-8")).items():
            assert inputs == header[name], f"{path.name}: {name}"


def test_the_parser_reads_prototypes() -> None:
    found = cuda_source.prototypes("KERNEL(f)(real *y, const real *x,\n    int64_t n) {\nEXPORT void g(uint32_t *y);\n")
    y = Parameter("real*", "y")
    assert found["f"] == Prototype("f", True, (y, Parameter("real*", "x"), Parameter("int64_t", "n")))
    assert (found["f"].symbol(64), found["f"].selector) == ("f_f64", 0)
    assert found["g"] == Prototype("g", False, (Parameter("uint32_t*", "y"),)) and found["g"].symbol(32) == "g"
    with pytest.raises(ValueError, match="cannot read the parameter 'real'"):
        cuda_source.parameter("real")


def test_a_program_has_its_headers_in_place() -> None:
    for path in FILES:
        text = cuda_source.program(path)
        assert '#include "' not in text and "#define KERNEL(name)" in text
        lines = text.splitlines()
        at = max(i for i, line in enumerate(lines) if re.fullmatch(rf'#line \d+ "{path.name}"', line))  # after the last
        number = int(lines[at].split()[1])
        assert lines[at + 1] == path.read_text("utf-8").splitlines()[number - 1]


def test_an_installation_without_sources_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_source, "PACKAGE", tmp_path / "engine")
    cuda_source.folder.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"no CUDA sources in .*; install shardgrad again"):
            cuda_source.folder()
    finally:
        cuda_source.folder.cache_clear()


# ── the compilers ─────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nvcc_compiles(path: Path, bits: int, tmp_path: Path) -> None:
    """For sm_75, sm_80 and sm_90, without a warning."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    done = subprocess.run(["nvcc", *codes, *cuda_source.defines(bits), "-Werror=all-warnings", "-fatbin", "-o",
                           str(tmp_path / "out"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def nvrtc() -> ctypes.CDLL | None:
    """The run-time compiler, which needs no GPU: of a CUDA installation, or of the wheel nvidia-cuda-nvrtc."""
    names = [ctypes.util.find_library("nvrtc")]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        names += map(str, Path(place).glob("*/lib/libnvrtc.so.*"))
    return next((ctypes.CDLL(name) for name in names if name), None)


@pytest.mark.slow
@pytest.mark.skipif(nvrtc() is None, reason="no libnvrtc (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nvrtc_compiles(path: Path, bits: int) -> None:
    """What CuPy does at run time: the very string and options that the backend hands over, for each architecture."""
    library = nvrtc()
    assert library is not None
    for architecture in ARCHITECTURES:
        made, text = ctypes.c_void_p(), cuda_source.program(path).encode()
        assert library.nvrtcCreateProgram(ctypes.byref(made), text, None, 0, None, None) == 0
        options = [*cuda_source.defines(bits), f"--gpu-architecture=sm_{architecture}", "-std=c++17"]
        failed = library.nvrtcCompileProgram(made, len(options), (ctypes.c_char_p * len(options))(
            *[option.encode() for option in options]))
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(made, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(made, log)
        library.nvrtcDestroyProgram(ctypes.byref(made))
        assert not failed and not log.value, log.value.decode()
