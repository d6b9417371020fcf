"""From a source tree to an installed engine: with a C compiler, without one, and with a broken one."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import build_backend
import build_kernels
import cffi
import lines
import pytest

from engine.backend.cpu import built_levels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; sys.path.insert(0, 'tools'); import build_backend; print(build_backend.{}(sys.argv[1]))"


def copy_of_sources(copy: Path) -> Path:
    """What a source distribution holds."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("engine", "kernels", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    for name in ("pyproject.toml", "LICENSE", "Makefile", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources in which a test may build and break things."""
    return copy_of_sources(tmp_path / "tree")


@pytest.fixture(scope="module")
def built_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which several tests build, so that the kernels are compiled once."""
    return copy_of_sources(tmp_path_factory.mktemp("sources") / "tree")


def without_compiler(folder: Path) -> dict[str, str]:
    """The environment of a machine on which no program is found."""
    folder.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "PYTHONPATH", "ENGINE_ISA")}
    return {**kept, "PATH": str(folder)}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def built(tree: Path, hook: str, env: dict[str, str] | None = None) -> tuple[Path, str]:
    """Call a hook of the tree's build backend in a process of its own: (what it made, its stderr)."""
    done = run(sys.executable, "-c", BUILD.format(hook), tree.parent, cwd=tree, env=env)
    assert done.returncode == 0, done.stderr
    return tree.parent / done.stdout.splitlines()[-1], done.stderr


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        [path] = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(path).decode()


# ── what pyproject.toml and kernels.h declare ─────────────────────────────────────────────────────────

def test_dependencies_of_the_core_are_numpy_and_cffi() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "shardgrad"
    assert project["requires-python"] == ">=3.10"
    assert sorted(re.split(r"[<>=]", name)[0] for name in project["dependencies"]) == ["cffi", "numpy"]
    assert set(project["optional-dependencies"]) == {"tasks", "train", "gpu", "testing", "cluster", "dev", "peers",
                                                     "array-api", "fuzz", "mutation"}


def test_every_prototype_reaches_python() -> None:
    header = (ROOT / "kernels" / "kernels.h").read_text()
    declared = build_kernels.declarations(header)
    cffi.FFI().cdef(declared)
    typed = re.findall(r"^KERNEL\((\w+)\)", header, flags=re.M)
    assert len(typed) > 50
    for name in typed:
        assert f"void {name}_f32(" in declared
        assert f"void {name}_f64(" in declared
    untyped = re.findall(r"^EXPORT (.*?);", header, flags=re.M)
    assert len(declared.splitlines()) == 2 * len(typed) + len(untyped)
    assert "real" not in re.findall(r"\w+", declared)


@pytest.mark.parametrize("line", ["KERNEL(exp)(real *y,", "KERNEL exp(real *y);", "KERNEL(exp)(real *y)"])
def test_prototype_that_cannot_be_read_is_named(line: str) -> None:
    with pytest.raises(build_kernels.BuildError, match=re.escape(line)):
        build_kernels.declarations(f"KERNEL(log)(real *y);\n{line}\n")


# ── build_kernels ─────────────────────────────────────────────────────────────────────────────────────

def test_no_compiler_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build_kernels.BuildError, match=r"^found no C compiler .*$"):
        build_kernels.build(tmp_path, work=tmp_path)


def test_unknown_level_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = run(sys.executable, ROOT / "tools" / "build_kernels.py", "--levels", "v9", "--work", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"kernels: unknown level v9: this machine's family has .*\n", done.stderr)


def test_kernels_are_compiled_again_only_when_something_changed(tree: Path) -> None:
    for source in (tree / "kernels").glob("*.c"):
        source.unlink()
    one = tree / "kernels" / "one.c"
    one.write_text('#include "kernels.h"\n')

    def build() -> str:
        done = run(sys.executable, "tools/build_kernels.py", "--levels", level, "--flags=-O0", cwd=tree)
        assert done.returncode == 0, done.stderr
        return done.stdout

    level = next(iter(build_kernels.levels_here()))
    module = tree / "engine" / "_kernels" / f"cpu_{level}.abi3.so"
    assert "compiling 3 objects" in build()  # one source, for float and for double, and cffi's
    assert "compiling" not in build()
    os.utime(one, (module.stat().st_mtime + 2,) * 2)
    assert "compiling 2 objects" in build()
    header = tree / "kernels" / "kernels.h"
    os.utime(header, (module.stat().st_mtime + 4,) * 2)
    assert "compiling 3 objects" in build()


# ── the build backend ─────────────────────────────────────────────────────────────────────────────────

def test_wheel_without_compiler_is_pure_and_says_why(tree: Path, tmp_path: Path) -> None:
    wheel, said = built(tree, "build_wheel", without_compiler(tmp_path / "bin"))
    assert wheel.name.endswith("-py3-none-any.whl")
    [line] = [line for line in said.splitlines() if line.startswith("shardgrad:")]
    assert "found no C compiler" in line and "NumPy reference backend" in line and "apt install gcc" in line
    names = zipfile.ZipFile(wheel).namelist()
    assert {"engine/__init__.py", "engine/py.typed", "engine/backend/reference.py"} <= set(names)
    cuda = {f"engine/_kernels/cuda/{path.name}" for path in (ROOT / "kernels" / "cuda").glob("*.cu*")}
    assert cuda and cuda <= set(names)
    assert not [n for n in names if n.endswith(".so") or not n.startswith(("engine/", "shardgrad-"))]


def test_wheel_with_failing_compiler_is_pure(tree: Path, tmp_path: Path) -> None:
    (tree / "kernels" / "broken.c").write_text("this is not C\n")
    for source in (tree / "kernels").glob("*.c"):
        if source.name != "broken.c":
            source.unlink()
    wheel, said = built(tree, "build_wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "broken.c" in said and "the C compiler failed" in said


def test_modules_that_an_older_build_left_stay_out_of_a_pure_wheel(tree: Path, tmp_path: Path) -> None:
    for folder in (tree / "engine" / "_kernels", tree / "build" / "lib" / "engine" / "_kernels"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu_v3.abi3.so").write_bytes(b"old")
    wheel, _ = built(tree, "build_wheel", without_compiler(tmp_path / "bin"))
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]


def test_modules_change_tag_and_record(tree: Path, tmp_path: Path) -> None:
    pure, _ = built(tree, "build_wheel", without_compiler(tmp_path / "bin"))
    module = tmp_path / "cpu_v3.abi3.so"
    module.write_bytes(b"compiled")
    wheel = build_backend.add_modules(pure, [module])
    assert not pure.exists()
    tag = re.search(r"-(cp310-abi3-\w+)\.whl$", wheel.name)
    assert tag is not None
    assert f"Tag: {tag[1]}\n" in metadata(wheel, "WHEEL") and "Root-Is-Purelib: false" in metadata(wheel, "WHEEL")
    record = {row[0]: row[1] for row in csv.reader(io.StringIO(metadata(wheel, "RECORD")))}
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"compiled").digest()).rstrip(b"=").decode()
    assert record["engine/_kernels/cpu_v3.abi3.so"] == f"sha256={digest}"


def test_source_distribution_holds_what_a_wheel_is_built_from(tree: Path) -> None:
    archive, _ = built(tree, "build_sdist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "LICENSE", "Makefile", "kernels/kernels.h", "tools/build_kernels.py",
            "tools/build_backend.py", "engine/py.typed"} <= names
    assert not (tree / "MANIFEST.in").exists()


# ── what an installation shows ────────────────────────────────────────────────────────────────────────

def imported() -> tuple[int, set[str]]:
    """How many calls and returns `import engine` takes in a new process that has NumPy, and the packages that are there
    afterwards. (What is called besides, where bytecode is yet to be written, counts the first time only.)"""
    code = ("import sys, numpy; seen = []; sys.setprofile(lambda frame, event, argument: seen.append(event)); "
            "import engine; sys.setprofile(None); "
            "print(len(seen), *{module.partition('.')[0] for module in sys.modules})")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = run(sys.executable, "-c", code, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    events, *packages = done.stdout.split()
    return int(events), set(packages)


def test_import_is_quick() -> None:
    """`import engine` may take 150 ms, of which NumPy's own import takes about 100: so 50 are the engine's.

    On a busy machine no clock can tell, so what is counted is calls and returns: 46,000 of them took 44 ms of an idle
    processor, so 50 ms are 52,000.
    """
    assert min(imported()[0] for _ in range(2)) <= 52_000


def test_import_loads_no_extra() -> None:
    assert not {"hypothesis", "matplotlib", "tokenizers", "ray", "cupy", "torch", "safetensors", "tqdm"} & imported()[1]


def test_doctor_reports_and_passes_its_self_test() -> None:
    done = run(sys.executable, "-m", "engine", "doctor", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("shardgrad", "backend", "level", "threads", "compiler", "GPU", "pool", "peak", "read", "self-test"):
        assert re.search(rf"^{row}\b", done.stdout, flags=re.M), row
    assert "FAILED" not in done.stdout


def test_doctor_fails_when_a_kernel_is_wrong() -> None:
    code = ("from engine import backend, doctor; k = backend.get_backend('cpu'); right = k.adam; "
            "k.adam = lambda *arguments: right(*arguments[:-1], 1); raise SystemExit(doctor.main())")
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 1
    assert re.search(r"adam.*FAILED", done.stdout)


@pytest.mark.parametrize("arguments", [["docter"], [], ["doctor", "--nonsense"]])
def test_unknown_command_is_one_line(arguments: list[str]) -> None:
    done = run(sys.executable, "-m", "engine", *arguments, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "doctor" in done.stderr


@pytest.mark.skipif(not built_levels(), reason="no kernels were compiled")
def test_unsupported_level_is_one_line() -> None:
    done = run(sys.executable, "-m", "engine", "doctor", cwd=ROOT, env={**os.environ, "ENGINE_ISA": "v9"})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "ENGINE_ISA" in done.stderr and "'v9'" in done.stderr


# ── the Makefile and the reader's budget ──────────────────────────────────────────────────────────────

def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.M)
    documented = re.findall(r"^([a-z-]+):.*## .", makefile, flags=re.M)
    assert sorted(phony.split()) == sorted(documented)


def test_every_file_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "engine" / "ops").mkdir(parents=True)
    (tmp_path / "engine" / "tensor.py").write_text('"""Doc."""\n\nx = 1\n   \n')
    (tmp_path / "engine" / "ops" / "matmul.py").write_text("y = 1\n")
    (tmp_path / "engine" / "random.py").write_text("z = 1\n")
    counted = {name: sum(files.values()) for name, _, files in lines.rooms(tmp_path)}
    assert counted["autograd + tensor + ops"] == 3
    assert counted["the rest of the engine"] == 1
    assert sum(counted.values()) == 4


# ── slow: make test-wheel ─────────────────────────────────────────────────────────────────────────────

def environment(folder: Path) -> Path:
    """A new virtual environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_wheel_runs_on_a_machine_without_a_compiler(built_tree: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    done = run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path / "dist", built_tree, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "dist").iterdir()
    assert "-cp310-abi3-" in wheel.name
    bare = without_compiler(tmp_path / "bin")
    done = run(python, "-m", "pip", "install", wheel, cwd=tmp_path, env=bare)
    assert done.returncode == 0, done.stderr
    done = run(python, "-m", "engine", "doctor", cwd=tmp_path, env=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "C kernels" in done.stdout and not done.stderr


@pytest.mark.slow
def test_source_installs_without_a_compiler_and_says_so_once(built_tree: Path, tmp_path: Path) -> None:
    python, bare = environment(tmp_path / "venv"), without_compiler(tmp_path / "bin")
    done = run(python, "-m", "pip", "install", "--verbose", built_tree, cwd=tmp_path, env=bare)
    assert done.returncode == 0, done.stderr
    assert "the slow NumPy reference backend will be used" in done.stdout + done.stderr
    done = run(python, "-m", "engine", "doctor", cwd=tmp_path, env=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NumPy reference" in done.stdout
    [line] = done.stderr.splitlines()
    assert "install a C compiler" in line and "--force-reinstall" in line


@pytest.mark.slow
def test_editable_installation_compiles_in_place(built_tree: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    done = run(python, "-m", "pip", "install", "--editable", built_tree, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((built_tree / "engine" / "_kernels").glob("cpu_*.abi3.so"))
    done = run(python, "-m", "engine", "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "C kernels" in done.stdout
