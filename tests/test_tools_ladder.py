"""tools/ladder: every rung computes what it says, with the bits that it promises; planted bugs; the picture."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.backend import get_backend, get_num_threads, roofs, set_num_threads
from engine.backend.cpu import CpuBackend
from tools.benchmarks import contest
from tools.build_kernels import BuildError, find_compiler
from tools.ladder import ladder, rungs


def can_compile() -> bool:
    try:
        return bool(find_compiler())
    except BuildError:
        return False


pytestmark = pytest.mark.skipif(not (isinstance(get_backend("cpu"), CpuBackend) and can_compile()),
                                reason="compiles C beside the engine's own kernels")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture(scope="module")
def loaded(build: Path) -> dict[str, rungs.Loaded]:
    return {rung.rung.function: rung for rung in rungs.load_rungs(rungs.find_rungs(), build)}


def test_there_are_seven_and_four() -> None:
    for family, count in (("gemm", 7), ("attention", 4)):
        assert [r.number for r in rungs.find_rungs() if r.family == family] == list(range(1, count + 1))


def test_every_rung_agrees_with_float64(loaded: dict[str, rungs.Loaded]) -> None:
    for rung in loaded.values():
        rungs.validate(rung)


def test_rungs_that_add_in_the_same_order_have_the_same_bits(loaded: dict[str, rungs.Loaded]) -> None:
    """The first three by ascending k, the last three by ascending blocks of 256, whatever the number of threads."""
    sizes = (235, 410, 519)
    for ideas in (("triple_loop", "loop_order", "blocking"), ("vectors", "packing", "threads")):
        results = [rungs.check(loaded[f"gemm_{idea}"], sizes) for idea in ideas]
        results += [rungs.check(loaded["gemm_threads"], sizes, threads) for threads in (2, 3) if "threads" in ideas]
        for result in results[1:]:
            np.testing.assert_array_equal(result.view(np.int32), results[0].view(np.int32))


@pytest.mark.parametrize(("name", "old", "new"), [
    ("gemm_3_blocking", "lesser(k - p, DEPTHS)", "lesser(k - p, DEPTHS - 1)"),
    ("gemm_4_register_tile", "c[i * n + j] += sum[i][j]", "c[i * n + j] = sum[i][j]"),
    ("gemm_6_packing", "packed_b + j * depths", "packed_b"),
    ("attention_2_online_softmax", "l = c * l + p", "l = l + p"),
    ("attention_4_register_tiles", "lesser(first + i, KEYS)", "lesser(first + i + 1, KEYS)"),
    ("gemm_1_triple_loop", "c[i * n + j] = sum;", "c[i * n + j] = sum * 1.000001f;"),  # 17 roundings: more than allowed
    ("attention_1_whole_matrix", "out[i * d + e] = sum;", "out[i * d + e] = sum * 1.00001f;"),
])
def test_a_planted_bug_is_caught(name: str, old: str, new: str, tmp_path: Path, build: Path) -> None:
    text = (rungs.FOLDER / f"{name}.c").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / f"{name}.c").write_text(text.replace(old, new), encoding="utf-8")
    for team in build.glob("*.o"):
        shutil.copy2(team, tmp_path)  # need not be compiled again
    (rung,) = rungs.load_rungs(rungs.find_rungs(tmp_path), tmp_path)
    with pytest.raises(rungs.RungError, match=f"^{name}.c: .* elements wrong"):
        rungs.validate(rung)


def test_a_write_outside_of_the_arrays_is_caught(loaded: dict[str, rungs.Loaded],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    rung = loaded["gemm_packing"]
    bind = rung.bind

    def one_too_many(*arrays: np.ndarray) -> object:
        arrays[0].base[rungs.MARGIN + arrays[0].size] = 0
        return bind(*arrays)

    monkeypatch.setattr(rung, "bind", one_too_many)
    with pytest.raises(rungs.RungError, match="wrote outside of its arrays"):
        rungs.validate(rung)


def test_times_tables_and_the_picture(loaded: dict[str, rungs.Loaded], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(contest, "TURN_SECONDS", 0)
    monkeypatch.setattr(roofs, "peak_flops", lambda repeats: 1e12)
    before = get_num_threads()
    try:
        tables = ladder.climb(list(loaded.values()), argparse.Namespace(size=16, time=16, threads=1, seconds=0))
    finally:
        set_num_threads(before)
    gemm, attention = tables.values()
    assert [bar.who for bar in gemm] == [f"{r.number} {r.idea.replace('_', ' ')}" for r in rungs.find_rungs()[:6]] + [
        "engine", "7 threads", "engine", "OpenBLAS"]
    assert [bar.who[0] for bar in attention] == ["1", "2", "3", "4", "e"]
    assert all(0 < bar.low <= bar.share <= bar.high and bar.peak == 1000 for bar in gemm + attention)
    text = ladder.table("GEMM", gemm)
    gain = gemm[1].share / gemm[0].share  # of the same peak
    assert f"| 2 loop order | 1 | {gemm[1].rate:.3g} | {gain:.1f} |" in text
    pytest.importorskip("matplotlib")
    ladder.draw(tmp_path / "ladder.png", tables)
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


def test_without_matplotlib_there_is_a_line_and_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ladder.show(tmp_path / "ladder.png", {"GEMM": [ladder.Bar("1 triple loop", 1, 0.5, 0.5, 0.5, 2.0)]})
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "ladder.png").exists()
