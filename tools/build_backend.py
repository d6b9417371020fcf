"""The build backend that pyproject.toml names (PEP 517, PEP 660): setuptools, and the kernels.

    setuptools writes a pure wheel           shardgrad-0.1.0-py3-none-any.whl
    build_kernels.py compiles the kernels    engine/_kernels/cpu_<level>.abi3.so, one for each level
    the modules are put into the wheel       shardgrad-0.1.0-cp310-abi3-<platform>.whl
    and the sources of the CUDA kernels      engine/_kernels/cuda/*.cu, compiled when a GPU runs them

Where the kernels cannot be compiled the pure wheel is the result: the installation works, on the NumPy
reference backend. An editable installation compiles them in place.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from build_kernels import BuildError, build
from setuptools import build_meta
from setuptools.build_meta import (
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = ["build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable",
           "get_requires_for_build_sdist", "get_requires_for_build_wheel", "prepare_metadata_for_build_editable",
           "prepare_metadata_for_build_wheel"]

ROOT = Path(__file__).resolve().parent.parent
# A source distribution holds what a wheel is built from, and what its tests need. setuptools asks for a file
# of this name at the top of the tree; it is there only while the distribution is being made.
MANIFEST = """\
include Makefile
graft kernels
graft tests
graft tools
global-exclude __pycache__ *.py[cod] *.so
"""


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would pack what an older build left there
    wheel = Path(wheel_directory, build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))
    add_cuda_sources(wheel)
    with tempfile.TemporaryDirectory() as folder:
        modules = compiled(Path(folder))
        if modules:
            wheel = add_modules(wheel, modules)
    return wheel.name


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    compiled(ROOT / "engine" / "_kernels")
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    manifest = ROOT / "MANIFEST.in"
    manifest.write_text(MANIFEST)
    try:
        return build_meta.build_sdist(sdist_directory, config_settings)
    finally:
        manifest.unlink()


def compiled(into: Path) -> list[Path]:
    """The extension modules, compiled into a folder; none, and one line that says why, where that cannot be done."""
    try:
        return build(into)
    except (BuildError, OSError) as error:
        print(f"shardgrad: the C kernels were not compiled ({error}); the slow NumPy reference backend will be used. "
              "To fix it, install a C compiler (Debian, Ubuntu: apt install gcc python3-dev; macOS: xcode-select "
              "--install) and repeat the pip command with --force-reinstall --no-cache-dir", file=sys.stderr)
        return []


def add_cuda_sources(wheel: Path) -> None:
    """Put the CUDA kernels into a wheel as they are: they are compiled where a GPU runs them."""
    with tempfile.TemporaryDirectory() as folder:
        run_wheel("unpack", "--dest", folder, str(wheel))
        [tree] = Path(folder).iterdir()
        sources = tree / "engine" / "_kernels" / "cuda"
        sources.mkdir(parents=True, exist_ok=True)
        for source in (*(ROOT / "kernels" / "cuda").glob("*.cu"), *(ROOT / "kernels" / "cuda").glob("*.cuh")):
            shutil.copy(source, sources)
        run_wheel("pack", "--dest-dir", str(wheel.parent), str(tree))


def add_modules(wheel: Path, modules: list[Path]) -> Path:
    """Put extension modules into a pure wheel, and what they need into its tag; returns its new path.

    cp310-abi3: CPython's stable interface, so one module serves 3.10 and every later version.
    """
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    with tempfile.TemporaryDirectory() as folder:
        run_wheel("unpack", "--dest", folder, str(wheel))
        [tree] = Path(folder).iterdir()
        (tree / "engine" / "_kernels").mkdir(exist_ok=True)
        for module in modules:
            shutil.copy(module, tree / "engine" / "_kernels")
        [metadata] = tree.glob("*.dist-info/WHEEL")
        text = metadata.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
        metadata.write_text(re.sub(r"(?m)^Tag: .*$", f"Tag: cp310-abi3-{platform}", text))
        wheel.unlink()
        run_wheel("pack", "--dest-dir", str(wheel.parent), str(tree))  # writes RECORD and names the file by its tag
    return wheel.parent / f"{tree.name}-cp310-abi3-{platform}.whl"


def run_wheel(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "wheel", *arguments], check=True, stdout=subprocess.DEVNULL)
