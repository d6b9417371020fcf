"""Keyed random numbers: the published words, the same on every backend, and distributed as they should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine.backend import get_backend
from engine.backend.numpy_rows import philox
from engine.dtypes import float32, float64, uint32
from engine.ops.creation import masked_scale
from engine.random import Key

U32 = st.integers(0, 2**32 - 1)
KEYS = st.builds(Key, st.integers(0, 2**64 - 1), U32, U32, U32)

# Random123 1.14, kat_vectors: philox4x32-10 of counter and key.
KNOWN = [
    ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_published_words(counter: tuple[int, ...], key: tuple[int, int], words: str) -> None:
    got = philox(np.array([counter], "uint32"), key)[0]
    assert " ".join(f"{w:08x}" for w in got) == words


def bits(device: str, n: int, key: Key) -> np.ndarray:
    k = get_backend(device)
    y = k.empty((n,), uint32)
    k.random_bits(y, n, *key)
    return k.to_numpy(y)


def test_the_kernel_has_the_first_of_them_too() -> None:
    """The other two have a counter word 0 that only a draw of gigabytes reaches; the next test compares instead."""
    assert " ".join(f"{w:08x}" for w in bits("cpu", 4, Key(0, 0, 0, 0))) == KNOWN[0][2]


@given(n=st.integers(0, 70), key=KEYS)
def test_cpu_and_reference_draw_the_same_words_and_uniforms(n: int, key: Key) -> None:
    np.testing.assert_array_equal(bits("cpu", n, key), bits("reference", n, key))
    for dtype in (float32, float64):
        drawn = []
        for device in ("cpu", "reference"):
            k = get_backend(device)
            y = k.empty((n,), dtype)
            k.random_uniform(y, n, 0.0, 1.0, *key)
            drawn.append(k.to_numpy(y))
        np.testing.assert_array_equal(*drawn)
        assert ((drawn[0] >= 0) & (drawn[0] < 1)).all()


@given(n=st.integers(0, 70), key=KEYS, p=st.floats(0, 0.99))
def test_cpu_and_reference_drop_the_same_elements(n: int, key: Key, p: float) -> None:
    x = np.linspace(1, 2, n).astype("float32")
    kept = [masked_scale(eg.tensor(x, device=device), p, key).numpy() for device in ("cpu", "reference")]
    np.testing.assert_array_equal(*kept)


@given(key=KEYS)
def test_normals_agree_within_the_rounding_of_log_and_cosine(key: Key) -> None:
    """√(−2 ln u) cos 2πv in float: ln and cos within 2 ulp, the angle rounded to 2π·2⁻²⁴, the radius at most 5.8."""
    drawn = []
    for device in ("cpu", "reference"):
        k = get_backend(device)
        y = k.empty((64,), float32)
        k.random_normal(y, 64, 0.0, 1.0, *key)
        drawn.append(k.to_numpy(y).astype("float64"))
    radius = math.sqrt(2 * 24 * math.log(2))
    np.testing.assert_allclose(*drawn, rtol=0, atol=radius * (2 * math.pi + 8) * 2.0**-24)


def test_a_value_depends_on_its_index_alone() -> None:
    key = Key(3, 1, 4, 1)
    whole = bits("cpu", 1000, key)
    for n in (1, 2, 3, 4, 5, 17, 333):
        np.testing.assert_array_equal(bits("cpu", n, key), whole[:n])
    before = eg.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            eg.set_num_threads(threads)
            np.testing.assert_array_equal(bits("cpu", 1000, key), whole)
    finally:
        eg.set_num_threads(before)


def test_every_part_of_the_key_counts() -> None:
    base = Key(0, 0, 0, 0)
    draws = [bits("cpu", 8, base)] + [bits("cpu", 8, base._replace(**{part: value}))
                                      for part in Key._fields for value in (1, 2**31)]
    draws.append(bits("cpu", 8, base._replace(seed=2**32)))
    assert len({d.tobytes() for d in draws}) == len(draws)


def test_moments() -> None:
    """n = 10⁶ draws: the mean of m of them is within 5 standard errors."""
    n = 1_000_000
    g = eg.Generator(12)
    u, z = eg.rand(n, generator=g).numpy().astype("float64"), eg.randn(n, generator=g).numpy().astype("float64")
    for sample, moment, mean, variance in ((u, 1, 1 / 2, 1 / 12), (u, 2, 1 / 3, 4 / 45), (z, 1, 0, 1), (z, 2, 1, 2),
                                           (z, 3, 0, 15), (z, 4, 3, 96)):
        assert abs((sample**moment).mean() - mean) < 5 * math.sqrt(variance / n), (moment, mean)
    assert abs(np.corrcoef(z[::2], z[1::2])[0, 1]) < 5 / math.sqrt(n / 2)


def test_randint_covers_its_range_evenly() -> None:
    drawn = eg.randint(-3, 4, (70_000,), generator=eg.Generator(5)).numpy()
    counts = np.bincount(drawn + 3, minlength=7)
    assert drawn.min() == -3 and drawn.max() == 3
    assert (np.abs(counts - 10_000) < 5 * math.sqrt(70_000 * (1 / 7) * (6 / 7))).all()
    with pytest.raises(ValueError, match=r"the range \[2, 2\) is empty"):
        eg.randint(2, 2, (1,))


def test_generators() -> None:
    with eg.seed(7):
        a, b = eg.rand(4), eg.rand(4)
    with eg.seed(7):
        np.testing.assert_array_equal(eg.rand(4).numpy(), a.numpy())
        with eg.seed(8):
            inner = eg.rand(4)
        np.testing.assert_array_equal(eg.rand(4).numpy(), b.numpy())  # the outer cursor was not moved by the inner
    assert not np.array_equal(a.numpy(), b.numpy()) and not np.array_equal(inner.numpy(), a.numpy())
    g = eg.Generator(1).at(5, 2)
    g.key()
    state = g.state_dict()
    first = g.key()
    g.load_state_dict(state)
    assert g.key() == first == Key(1, 5, 2, 1)
    for wrong in (-1, 2**64, 1.5):
        with pytest.raises(ValueError, match="expected a whole number in"):
            eg.Generator(wrong)
    with pytest.raises(ValueError, match=r"Generator\.at: step"):
        g.at(2**32)


def test_dropout_scales_what_it_keeps_and_its_gradient_has_the_same_mask() -> None:
    x = eg.ones(10_000, requires_grad=True)
    y = eg.dropout(x, 0.25, eg.Generator(3))
    values = y.numpy()
    assert set(np.unique(values)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((values == 0).mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 10_000)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), values)
    np.testing.assert_array_equal(eg.dropout(eg.ones(5), 1.0).numpy(), np.zeros(5))
    assert eg.dropout(x, 0.0) is x
    with pytest.raises(ValueError, match=r"dropout: p is 1\.5"):
        eg.dropout(x, 1.5)
