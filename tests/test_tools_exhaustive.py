"""The proof over all floats: its units, its exact decisions, its ledger; and a function that is wrong in one place."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tools import exhaustive
from tools.accuracy import FUNCTIONS, TAIL, units
from tools.c_parts import definitions, needed

ONE = 0x3F800000  # the bits of 1.0


def halves(name: str, x: Any) -> Any:
    """A backend's map with NumPy's float64 rounded once: right to half a unit."""
    with np.errstate(all="ignore"):
        return SimpleNamespace(data=np.asarray(FUNCTIONS[name].reference(x.astype(np.float64))).astype(np.float32))


def backend(compute: Any = halves) -> Any:
    return SimpleNamespace(map=compute, from_numpy=lambda x: x)


def test_a_zero_of_the_other_sign_is_no_result() -> None:
    """Of what is zero, and of what rounds to it; where there is no result a zero is wrong anyway."""
    got, want = np.float32([0, -0.0, 0, -0.0, 0]), np.array([0, 0, -1e-60, -1e-60, np.nan])
    assert units(got, want).tolist() == [0, np.inf, np.inf, pytest.approx(0, abs=1e-14), np.inf]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_units_are_those_of_the_slower_program(name: str) -> None:
    """In every binade, next to zero and infinity too, for results that are off by a few units."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 1 << 14, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        want = np.asarray(FUNCTIONS[name].reference(x.astype(np.float64)))
        got = want.astype(np.float32)
        got = np.where(rng.integers(0, 2, x.shape), np.nextafter(got, np.float32(0)), got)
        np.testing.assert_allclose(exhaustive.errors(got, want, exhaustive.scale_of(want)), units(got, want), rtol=1e-9)


@pytest.mark.parametrize("name", ["exp", "log", "sin", "erf", "gelu", "gelu_tanh", "softplus", "rsqrt"])
def test_eighty_digits_agree_with_float64(name: str) -> None:
    for x in (0.3, 1.7, 2.5):
        want = float(FUNCTIONS[name].reference(np.array([x]))[0])
        got = np.float32(want * (1 + 2.0**-22))
        slow = units(np.array([got]), np.array([want]))[0]
        assert exhaustive.exact_units(name, x, got) == pytest.approx(slow, rel=1e-6)


def test_one_wrong_float_is_found() -> None:
    """Two neighbours are exchanged at one argument of one level: that argument is the worst one, and only there."""
    wrong = np.array([ONE + 77], np.uint32).view(np.float32)[0]

    def off(name: str, x: Any) -> Any:
        y = halves(name, x)
        y.data = np.where(x == wrong, np.nextafter(np.nextafter(y.data, np.float32(9)), np.float32(9)), y.data)
        return y

    found = exhaustive.sweep("exp", {"right": backend(), "wrong": backend(off)}, ONE, ONE + 1000)
    assert found["right"][0] <= 0.5 and found["wrong"][0] > 1.4
    assert np.float32(found["wrong"][1]) == wrong


def test_a_wrong_infinity_is_found() -> None:
    def finite(name: str, x: Any) -> Any:
        return SimpleNamespace(data=np.minimum(halves(name, x).data, np.finfo(np.float32).max))

    start = int(np.float32(100).view(np.uint32))
    found = exhaustive.sweep("exp", {"right": backend(), "wrong": backend(finite)}, start, start + 10)
    assert found["right"][0] == 0 and not found["wrong"][0] <= 1


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


@pytest.mark.parametrize(("name", "first"), [("sin", bits(-0.0)), ("exp", bits(-200.0)), ("gelu", bits(-30.0))])
def test_a_zero_of_the_wrong_sign_is_found(name: str, first: int) -> None:
    """At zero, and where a result rounds to zero."""
    def flipped(name: str, x: Any) -> Any:
        y = halves(name, x).data
        return SimpleNamespace(data=np.where(y == 0, -y, y))

    found = exhaustive.sweep(name, {"right": backend(), "wrong": backend(flipped)}, first, first + 10)
    assert found["right"][0] <= 0.5 and found["wrong"][0] == np.inf


@pytest.mark.parametrize(("name", "x"), [("silu", -95.0), ("gelu", -12.9), ("gelu_tanh", -10.0),
                                         *((name, x) for name in TAIL for x in (-3e-38, 2e-37))])
def test_below_the_floor_results_are_still_held_to_it(name: str, x: float) -> None:
    """70 units of the least float are allowed there; 1,400 are not, nor is NaN."""
    def off(by: float) -> Any:
        return lambda name, x: SimpleNamespace(data=halves(name, x).data + np.float32(by))

    first = bits(x)
    found = exhaustive.sweep(name, {str(by): backend(off(by)) for by in (0.0, 1e-43, 2e-42, np.nan)}, first, first + 10)
    assert found["0.0"][0] == found["1e-43"][0] == 0
    assert found["2e-42"][0] > 4 and not found["nan"][0] <= 4


def test_the_ledger_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    swept: list[tuple[int, int]] = []

    def sweep(name: str, backends: Any, first: int, last: int) -> dict[str, tuple[float, float]]:
        swept.append((first, last))
        if len(swept) == 3:
            raise KeyboardInterrupt
        return {"v": (0.25 * len(swept), float(first))}

    monkeypatch.setattr(exhaustive, "sweep", sweep)
    level: Any = {"v": backend()}
    ledger = tmp_path / "made" / "ledger.json"
    with pytest.raises(KeyboardInterrupt):
        exhaustive.run(["exp"], level, ledger, 1e9)
    assert json.loads(ledger.read_text())[exhaustive.digests(level, ["exp"])["exp"]]["exp"]["segments"] == 2
    done = exhaustive.run(["exp"], level, ledger, 1e9)["exp"]
    size = 2**32 // exhaustive.SEGMENTS
    assert [first for first, _ in swept[3:]] == [i * size for i in range(2, exhaustive.SEGMENTS)]
    assert swept[-1][1] == 2**32 and done["segments"] == exhaustive.SEGMENTS
    assert done["worst"]["v"] == [0.25 * len(swept), float(swept[-1][0])]
    assert "all 2³²" in capsys.readouterr().out


def test_a_proof_holds_for_what_decides_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which levels took part, the flags, and every definition that the function uses, in whatever file; no other."""
    real = exhaustive.sources()
    assert {"elementwise.c", "elementwise.h", "simd.h", "simd_math.h", "simd_math_wide.h", "kernels.h",
            "activations.h"} <= real.keys()

    before = exhaustive.digests(["v2"], FUNCTIONS)

    def changed(file: str, old: str, new: str) -> set[str]:
        """The functions whose proofs end with this change."""
        text = real[file].decode()
        assert text.count(old) == 1, old
        with monkeypatch.context() as patch:
            patch.setattr(exhaustive, "sources", lambda: {**real, file: text.replace(old, new).encode()})
            return {name for name, digest in exhaustive.digests(["v2"], FUNCTIONS).items() if digest != before[name]}

    assert changed("simd_math.h", "vf vf_log(vf x) {", "vf vf_log(vf x) { x += 1;") == {"log"}
    assert changed("simd_math.h", "-0x1.e824ecp-16f", "-0x1.e824eep-16f") == {"gelu", "erf"}
    assert changed("activations.h", "#define TANH_3 0.0713548", "#define TANH_3 0.0713549") == {"gelu_tanh"}
    assert changed("activations.h", "return (activated){x * cdf,", "return (activated){cdf * x,") == {"gelu"}
    assert changed("elementwise.h", "#define RUN 8192", "#define RUN 4096") == FUNCTIONS.keys()
    assert changed("simd.h", "#ifndef SIMD_H", "#pragma STDC FP_CONTRACT ON\n#ifndef SIMD_H") == FUNCTIONS.keys()
    assert changed("elementwise.c", "/* y = condition ? a : b */", "/* y = a or b */") == set()
    assert changed("elementwise.c", "BINARY(add, sum_of)", "BINARY(add, difference)") == set()
    known = {before["exp"], exhaustive.digests(["v2", "v3"], ["exp"])["exp"]}
    monkeypatch.setattr(exhaustive, "FLAGS", ["-ffast-math"])
    assert len({*known, exhaustive.digests(["v2"], ["exp"])["exp"]}) == 3


def test_definitions_are_told_apart() -> None:
    """By their names, over several lines, with comments, strings and pasted names."""
    parts = definitions(["""\
#if LEVEL > 1 /* a { that opens nothing */
#define HALF(name) \\
    static int name##_half(int x) { return name##_of(x) / 2; }
#endif
typedef struct { int a, b; } pair;
static const int table[] = {
    1, 2,

    3};
/* odd { */ static inline __attribute__((always_inline)) int odd_of(int x) {
    const char *s = "}";
    return x % 2 + (int)s[0];
}
#ifdef SLOW
static int even_of(int x) { return x % 2 == 0; }
#else
static int even_of(int x) { return !odd_of(x); }
#endif
#pragma once
static int unused(pair p) { return p.a + table[1]; }
HALF(odd)
HALF(even)
"""])
    assert [sorted(part.names) for part in parts] == [
        ["HALF"], ["pair"], ["table"], ["odd_of"], ["even_of"], ["even_of"], [], ["unused"], ["odd"], ["even"]]
    assert [part.when for part in parts if part.when] == [
        ("#if LEVEL > 1",), ("#ifdef SLOW",), ("#ifdef SLOW #else",)]
    assert [part.text for part in parts if not part.names] == ["#pragma once"]

    def names(name: str) -> set[str]:
        return {one for part in needed(parts, name) for one in part.names}

    assert names("odd") == {"odd", "HALF", "odd_of"} and len(needed(parts, "even")) == 6
    assert definitions(["#ifndef A_H\n#define A_H\nint a;\n#endif"])[1:] == definitions(["int a;"])
    assert names("even") == {"even", "HALF", "even_of", "odd_of"}
    assert names("unused") == {"unused", "pair", "table"}
    with pytest.raises(LookupError, match="'third'"):
        needed(parts, "third")


def test_a_failed_bound_and_a_wrong_name_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(exhaustive, "levels", lambda: {"v": backend()})
    monkeypatch.setattr(exhaustive, "sweep", lambda *_: {"v": (2.5, 1.0)})
    monkeypatch.setattr("sys.argv", ["exhaustive.py", "exp", "--ledger", str(tmp_path / "l.json")])
    assert exhaustive.main() == 1 and "beyond its bound: exp at v" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["exhaustive.py", "expo"])
    with pytest.raises(SystemExit):
        exhaustive.main()
    assert "got expo" in capsys.readouterr().err
