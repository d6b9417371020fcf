"""Programs of recorded launches: how arguments travel, what shares memory, when a program goes on in equal steps."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captured import block_bytes
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine.backend import Array, get_backend
from engine.backend.arena import Lifetime, peak, place
from engine.backend.program import Program
from engine.backend.recording import Recording, recording, refuse
from engine.dtypes import float32, float64

k: Any = get_backend("cpu")
pytestmark = pytest.mark.usefixtures("unwatched")
HEADER = (Path(__file__).parents[1] / "kernels" / "kernels.h").read_text()


# ── the arena ─────────────────────────────────────────────────────────────────────────────────────────

lifetimes = st.lists(st.builds(lambda size, first, more: Lifetime(64 * size, first, first + more),
                               st.integers(1, 50), st.integers(0, 30), st.integers(0, 12)), max_size=60)


@given(lifetimes)
def test_what_lives_at_once_does_not_overlap(blocks: list[Lifetime]) -> None:
    total = place(blocks)
    assert peak(blocks) <= total <= sum(b.size for b in blocks)
    for i, a in enumerate(blocks):
        assert a.offset >= 0 and a.offset + a.size <= total and a.offset % 64 == 0
        for b in blocks[:i]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


def test_memory_is_used_again_as_soon_as_it_is_free() -> None:
    chain = [Lifetime(64, i, i + 1) for i in range(20)]
    assert place(chain) == peak(chain) == 128
    held = [Lifetime(640, 0, 9), Lifetime(192, 0, 2), Lifetime(128, 0, 9), Lifetime(96, 0, 2), Lifetime(64, 0, 9)]
    late = Lifetime(64, 4, 5)
    place([*held, late])
    assert late.offset == held[3].offset == 960  # the smallest of the two gaps


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────────

def test_every_kernel_has_its_prototype() -> None:
    """Held against cffi's view of each function, and the words of kernels.h."""
    text = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)
    found = re.findall(r"^(?:KERNEL\((\w+)\)|EXPORT void (random_bits))\((.*)\);", text, flags=re.M)
    assert len(found) > 70
    for typed, plain, parameters in found:
        for name in [f"{typed}_f32", f"{typed}_f64"] if typed else [plain]:
            number, letters = k.prototype(name)
            words, kinds = parameters.split(", "), k.ffi.typeof(getattr(k.lib, name)).args
            assert number < k.lib.kernel_number(b"no such kernel") and len(letters) == len(words) == len(kinds)
            for letter, word, kind in zip(letters, words, kinds):
                if kind.kind == "pointer":
                    assert letter == ("p" if word.startswith("const ") else "w"), (name, word)
                else:
                    last = word.split()[-1]
                    key = "seed" in parameters and last in ("seed", "step", "microbatch", "site")
                    assert letter == ("d" if kind.cname == "double" else "#" if key else "i"), (name, word)


def recorded(run: Any, *given: Array) -> tuple[Program, list[Array]]:
    with Recording(k, given, allowed=("writing",)) as launches:
        made = run(*given)
    return Program(launches, made), made


def of(values: Any) -> Array:
    array: Array = k.array(np.asarray(values))
    return array


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("low, high", [(-0.0, 1.0), (-3.25, 1e30), (0.1, 0.1 + 1e-9)])
def test_keys_and_doubles_arrive_as_they_are(seed: int, low: float, high: float) -> None:
    def run(*key: int) -> list[Array]:
        y = k.empty((10,), float64)
        k.random_uniform(y, 10, low, high, *key)
        return [y]

    with Recording(k) as launches:
        run(seed, 2**32 - 2, 7, 5)
    program = Program(launches, [Array(launches.launches[0].arguments[0].data)], (seed, 2**32 - 2, 7, 4))
    for key in ((seed, 2**32 - 2, 7, 4), (seed ^ 1, 2**32 - 1, 0, 40)):
        [found] = program.run([], key)
        assert found.data.tobytes() == run(*key[:3], key[3] + 1)[0].data.tobytes()


def test_a_null_pointer_a_row_and_what_was_there_before() -> None:
    fixed = of([1, 2, 3])

    def run(index: Array) -> list[Array]:
        y = k.empty((3,), fixed.dtype)
        k.add(y, index, fixed, k.layout(y, index, fixed))  # of integers: a row
        z = k.empty((1, 1), float32)
        k.gemm(z, of(np.ones((1, 2), np.float32)), of(np.ones((2, 1), np.float32)), None, 1, 1, 1, 2, 0, 2, 1, 0, 1, 1,
               0, 1, 0, 0)
        return [y, z]

    program, _ = recorded(run, of([10, 20, 30]))
    for values in ([5, 6, 7], [0, 0, 0]):
        y, z = program.run([of(values)])
        assert y.data.tolist() == [a + b for a, b in zip(values, [1, 2, 3])] and z.data.tolist() == [[2.0]]
    fixed.data[:] = 100
    assert program.run([of([1, 1, 1])])[0].data.tolist() == [101, 101, 101]


def test_temporaries_share_the_arena() -> None:
    def chain(x: Array) -> list[Array]:
        for _ in range(10):
            x = k.map("exp", k.map("negative", x))
        return [x]

    x = of(np.linspace(-1, 1, 500).astype(np.float32))
    program, [want] = recorded(chain, x)
    assert len(program.lifetimes) == 19 and program.memory == 2 * block_bytes(2000)
    assert program.run([x])[0].data.tobytes() == want.data.tobytes()


# ── one place further on ──────────────────────────────────────────────────────────────────────────────

def at(place: int, memory: Array) -> tuple[Program, list[Array]]:
    """The sum of the first `place` numbers, which are written to as well."""
    def run(x: Array) -> list[Array]:
        target = memory.view(memory.data[place:place + 1])
        k.copy(target, x, k.layout(target, x))
        y = k.empty((1,), float32)
        k.sum(y, memory, 1, place + 1, 1)
        return [y]
    return recorded(run, of(np.array([place], np.float32)))


def test_a_program_that_goes_on() -> None:
    memory = of(np.zeros(50, np.float32))
    programs = [at(n, memory)[0] for n in range(3)]
    assert programs[0].goes_on(*programs[1:])
    for n in range(3, 50):
        [y] = programs[0].run([of(np.array([n], np.float32))], places=n)
        assert y.data.tolist() == [n * (n + 1) / 2]


def test_unequal_steps_and_other_launches_do_not_go_on() -> None:
    memory = of(np.zeros(50, np.float32))
    assert not at(0, memory)[0].goes_on(at(1, memory)[0], at(3, memory)[0])

    ones = np.ones(256, np.float32)

    def sized(n: int) -> Program:
        return recorded(lambda x: [k.map("exp", k.map("exp", of(ones[:64 * n])))], of([1.0]))[0]

    def row(n: int) -> Program:
        y = of([0, 0])
        return recorded(lambda x: [k.fill(y, n), y][1:], of([1.0]))[0]

    assert not sized(1).goes_on(sized(2), sized(3)) and not row(1).goes_on(row(2), row(3))
    assert sized(1).goes_on(sized(1), sized(1))


# ── recording ─────────────────────────────────────────────────────────────────────────────────────────

def test_only_the_own_thread_is_recorded_and_others_wait() -> None:
    order: list[str] = []

    def other() -> None:
        eg.exp(eg.tensor([1.0]))
        refuse("something")  # not of this thread
        with Recording(k) as launches:
            order.append("second")
            eg.tanh(eg.tensor([1.0]))
        assert [each.function for each in launches.launches if each.function] == ["tanh_f32"]

    with Recording(k) as launches:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        eg.sin(eg.tensor([1.0]))
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and recording() is None
    assert [each.function for each in launches.launches if each.function] == ["sin_f32"]


def test_a_recording_inside_another_is_refused() -> None:
    with Recording(k), pytest.raises(RuntimeError, match="capture: a recording would not happen again"), Recording(k):
        pass
    with Recording(k, allowed=("this",)):
        refuse("this")
        with pytest.raises(RuntimeError, match="capture: that would not happen again"):
            refuse("that")
