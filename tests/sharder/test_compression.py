"""Codecs and error feedback: nothing is lost, to the bit; what is read was written; nothing else is accepted."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import engine as eg
from engine import optim
from engine.backend import get_backend
from engine.dtypes import as_dtype
from engine.optim.clip import BLOCK
from engine.sharder.codecs import CODECS, HEADER, Float16, Int8, OneBit, Payload, Rows, TopK, codec_of
from engine.sharder.compression import Compression, codec_for
from engine.sharder.partition import Partition

K = get_backend("cpu")
EXACT = ["fp16", "bf16", "int8", "topk:0.01", "topk:0.5"]
ALL = [*EXACT, "1bit"]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 6e-8, 2.0**-25, 65503.9, 65504.0, 65519.99, 65520.0, -65536.0, 1e6,
           2.0**29, 2.0**40, 3.38953e38, 3.3895314e38, 3.3961776e38, 3.4028235e38, -3.4028235e38]


def numbers(width: int = 32, **which: Any) -> st.SearchStrategy[np.ndarray]:
    """Arrays of any bits: a few drawn numbers among many of one magnitude, of lengths around those of blocks."""
    dtype = np.dtype(f"float{width}")
    drawn = st.one_of(st.floats(width=width, **which), st.sampled_from([float(dtype.type(x)) for x in SPECIAL]))

    @st.composite
    def arrays(draw: st.DrawFn) -> np.ndarray:
        n = draw(st.one_of(st.integers(0, 20), st.sampled_from([255, 256, 257, 1024, BLOCK - 1, BLOCK, BLOCK + 3])))
        some = draw(hnp.arrays(dtype, min(n, 20), elements=drawn))
        seed, magnitude = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 1.0, 1e-44, 1e-30, 1e30]))
        x = (np.random.default_rng(seed).standard_normal(n) * magnitude).astype(dtype)
        x[np.random.default_rng(seed).permutation(n)[:len(some)]] = some
        return x

    return arrays()


FINITE = {"allow_nan": False, "allow_infinity": False}


def sent(codec: Any, x: np.ndarray) -> np.ndarray:
    """What arrives of x."""
    payload = codec.write(K, K.array(x))
    return payload.decode(K, x.size, as_dtype(x.dtype)).data


def is_exact_sum(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether x = a + b: the rounded sum is x, and its error, which TwoSum gives exactly (Knuth, 4.2.2), is 0."""
    s = a + b
    from_b = s - a
    from_a = s - from_b
    return (s == x) & ((a - from_a) + (b - from_b) == 0)


# ── nothing is lost ───────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
def test_what_is_sent_and_what_is_left_are_all_there_is(name: str, width: int, data: st.DataObject) -> None:
    x = data.draw(numbers(width, **FINITE))
    y = sent(codec_of(name), x)
    left = x - y
    assert y.dtype == x.dtype and np.isfinite(y).all() and left.dtype == x.dtype
    assert is_exact_sum(x, y, left).all()


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("name", EXACT)
def test_every_power_of_two_and_its_neighbours(name: str, width: int) -> None:
    """Together, and each as the largest of its block; so too the 2,000 largest numbers."""
    dtype = np.dtype(f"float{width}")
    info = np.finfo(dtype)
    powers = np.ldexp(dtype.type(1), np.arange(info.minexp - info.nmant, info.maxexp))
    last = info.max.view(f"u{width // 8}")
    edges = np.concatenate([powers, np.nextafter(powers, dtype.type(0)), np.nextafter(powers, info.max),
                            (last - np.arange(2000, dtype=last.dtype)).view(dtype)])
    edges[::2] *= -1
    alone = np.zeros((len(edges), Int8.block), dtype)
    alone[:, 7] = edges
    for x in (edges, alone.reshape(-1)):
        y = sent(codec_of(name), x)
        assert np.isfinite(y).all() and is_exact_sum(x, y, x - y).all()


@given(data=st.data())
def test_signs_lose_half_an_ulp_of_the_residual(data: st.DataObject) -> None:
    x = data.draw(numbers(32, **FINITE))
    y = sent(OneBit(), x)
    with np.errstate(over="ignore"):
        left = x - y
    for a, b, c in list(zip(x, y, left))[:300]:
        if np.isfinite(c):  # numbers of opposite sign near the largest have no difference
            lost = Fraction(float(a)) - Fraction(float(b)) - Fraction(float(c))
            assert abs(lost) <= Fraction(float(np.spacing(abs(c)))) / 2


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_error_feedback_step_by_step(name: str, data: st.DataObject) -> None:
    """e is what was not sent of g + e, in every step, also where a parameter is in pieces."""
    size = data.draw(st.sampled_from([1, 20, BLOCK, 2 * BLOCK + 17]))
    shards = data.draw(st.integers(1, 3))
    partition = Partition({"w": (size,)}, shards)
    pieces = [piece for own in partition.pieces for piece in own]
    compression = Compression(K, codec_of(name), eg.float32)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    left = np.zeros(size, np.float32)
    for clock in range(4):
        g = random.standard_normal(size).astype(np.float32)
        x = g + left
        arrived = np.concatenate([compression.encode(clock, 0, p, K.array(g[p.start:p.stop])).decode(
            K, p.size, eg.float32).data for p in pieces])
        left = x - arrived
        assert compression.state(partition.parameters, clock + 1)["residual.0/w"].tobytes() == left.tobytes()
        assert arrived.tobytes() == sent(codec_of(name), x).tobytes()  # in pieces as in one


@pytest.mark.parametrize("name", ALL)
def test_the_sum_of_what_is_sent_follows_the_sum_of_the_gradients(name: str) -> None:
    """A small element beside large ones gets through in the end: Σ sent = Σ g − e, and e stays bounded."""
    n = 256
    partition = Partition({"w": (n,)}, 1)
    compression, total = Compression(K, codec_of(name), eg.float32), np.zeros(n)
    g = np.full(n, 0.01, np.float32)
    g[0] = 1.0
    for clock in range(400):
        total += compression.encode(clock, 0, partition.pieces[0][0], K.array(g)).decode(K, n, eg.float32).data
    left = compression.state(partition.parameters, 400)["residual.0/w"]
    np.testing.assert_allclose(total + left, 400 * g.astype(np.float64), rtol=1e-3)
    assert (np.abs(left) < 5).all() and total[1] > 0


# ── the codecs are what they say ──────────────────────────────────────────────────────────────────────

@given(numbers(32, **FINITE))
def test_halves_are_the_nearest(x: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        half = x.astype(np.float16).astype(np.float32)
    inside = np.isfinite(half)
    assert sent(Float16(), x)[inside].tobytes() == half[inside].tobytes()
    beyond = np.abs(sent(Float16(), x)[~inside])
    assert (beyond <= 65504).all() and (beyond[np.abs(x[~inside]) < 2.0**29] == 65504).all()


@given(numbers(32, **FINITE))
def test_bfloat16_is_the_nearest(x: np.ndarray) -> None:
    y = sent(codec_of("bf16"), x)
    assert not (y.view(np.uint32) & 0xFFFF).any()
    step = np.maximum(np.ldexp(1.0, np.frexp(x)[1] - 8), 2.0**-133)  # between neighbours on x's side of a power of two
    over = np.abs(x) > 3.3895313892515355e38
    assert (np.abs(x.astype(np.float64) - y) <= step / 2)[~over].all()
    assert (np.abs(y[over]) == np.float32(3.3895313892515355e38)).all()


@given(numbers(32, **FINITE))
def test_int8_is_within_half_a_step(x: np.ndarray) -> None:
    y = sent(Int8(), x)
    for start in range(0, x.size, 256):
        block = x[start:start + 256].astype(np.float64)
        largest = np.abs(block).max()
        step = largest / 127 * (1 + 2.0**-20) + 2.0**-149
        # Below the normal numbers the scale itself is rounded, to a whole number of 2⁻¹⁴⁹.
        slack = 127 * 2.0**-150 if largest < 2.0**-118 else 0
        assert (np.abs(block - y[start:start + 256]) <= step / 2 * (1 + 2.0**-20) + slack).all()


@given(numbers(32), st.sampled_from([1, 41, 2000, BLOCK]))
def test_the_largest_are_sent_the_first_of_equal_ones(x: np.ndarray, count: int) -> None:
    codec, size = TopK(count), np.where(np.isfinite(x), np.abs(x), np.inf)
    values, positions = (K.empty((n,), dtype) for dtype, n in codec.sections(x.size, eg.float32))
    codec.pack(K, K.array(x), values, positions)
    start = 0
    for block in range(0, x.size, BLOCK):
        own = size[block:block + BLOCK]
        taken = -(-count * own.size // BLOCK)
        order = sorted(np.argsort(-own, kind="stable")[:taken])
        assert positions.data[start:start + taken].tolist() == order
        assert values.data[start:start + taken].tobytes() == x[block:block + BLOCK][order].tobytes()
        start += taken
    assert start == values.size


@given(numbers(32, **FINITE))
def test_signs_come_with_the_mean_of_their_sign(x: np.ndarray) -> None:
    y = sent(OneBit(), x)
    for start in range(0, x.size, 1024):
        block, found = x[start:start + 1024].astype(np.float64), y[start:start + 1024]
        for chosen in (block >= 0, block < 0):
            if chosen.any():
                assert len(set(found[chosen].tolist())) == 1
                np.testing.assert_allclose(found[chosen][0], block[chosen].mean(), rtol=1e-6, atol=2.0**-149)


RATIOS = {"fp16": 1.99, "bf16": 1.99, "int8": 3.9, "topk:0.01": 40.0, "1bit": 30.0}


@pytest.mark.parametrize("name", list(RATIOS))
def test_bytes(name: str) -> None:
    x = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    partition = Partition({"w": x.shape}, 3)
    compression = Compression(K, codec_of(name), eg.float32)
    sent = sum(len(compression.encode(0, 0, piece, K.array(x[piece.start:piece.stop])).data)
               for own in partition.pieces for piece in own)
    assert x.nbytes / sent >= RATIOS[name]


# ── what is not finite ────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_what_is_not_finite_arrives_and_leaves_nothing(name: str, data: st.DataObject) -> None:
    x = data.draw(numbers(32))
    partition, codec = Partition({"w": x.shape}, 1), codec_of(name)
    compression = Compression(K, codec, eg.float32)
    for piece in partition.pieces[0]:
        with np.errstate(all="ignore"):
            y = compression.encode(0, 0, piece, K.array(x)).decode(K, x.size, eg.float32).data
        left = compression.state(partition.parameters, 1)["residual.0/w"]
        assert np.isfinite(left).all()
        bad = ~np.isfinite(x)
        assert not left[bad].any()
        assert np.isfinite(y).all() or bad.any() or name == "1bit"
        if name in ("fp16", "bf16"):
            assert np.array_equal(y[bad], x[bad], equal_nan=True)
        elif name == "int8":
            assert np.isnan(y[bad]).all() and np.isfinite(y[~bad]).all()
        elif bad.any():
            assert not np.isfinite(y).all()  # of topk as many as there is room for, but at least one


# ── payloads ──────────────────────────────────────────────────────────────────────────────────────────

def payloads() -> list[tuple[Payload, int]]:
    x = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    table = x[:40].reshape(4, 10)
    rows = Rows.of(eg.RowSparse([1, 4, 20, 29], eg.tensor(table), 30), 15, 280)
    return [*((codec_of(name).write(K, K.array(x)), x.size) for name in ALL), (rows, 280)]


@pytest.mark.parametrize("number", range(len(CODECS)))
def test_a_payload_of_another_length_is_refused(number: int) -> None:
    payload, size = payloads()[number]
    assert len(payload.decode(K, size, eg.float32).data) == size
    for data in (*(payload.data[:n] for n in range(len(payload.data))), payload.data + b"\0", payload.data * 2):
        with pytest.raises(ValueError, match=r"^payload: [^\n]*$"):
            Payload(data).decode(K, size, eg.float32)
    for other in (size - 1, size + 1, 0, 1 << 50):
        with pytest.raises(ValueError, match=f"payload: {size} numbers of 4 bytes, expected {other} of 4"):
            payload.decode(K, other, eg.float32)
    with pytest.raises(ValueError, match=f"payload: {size} numbers of 4 bytes, expected {size} of 8"):
        payload.decode(K, size, eg.float64)


@given(number=st.integers(0, len(CODECS) - 1), changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)),
                                                                 min_size=1, max_size=4))
def test_a_changed_payload_is_read_or_refused(number: int, changes: list[tuple[int, int]]) -> None:
    payload, size = payloads()[number]
    data = bytearray(payload.data)
    for place, value in changes:
        data[place % len(data)] = value
    try:
        assert Payload(bytes(data)).decode(K, size, eg.float32).shape == (size,)
    except ValueError as error:
        assert str(error).startswith("payload: ") and "\n" not in str(error)


@given(st.binary(max_size=200), st.integers(0, 40), st.sampled_from([0, *CODECS]))
def test_noise_is_read_or_refused(noise: bytes, size: int, tag: int) -> None:
    for data in (noise, HEADER.pack(b"grad", tag, 4, noise[0] if noise else 0, size) + noise):
        try:
            assert Payload(data).decode(K, size, eg.float32).shape == (size,)
        except ValueError as error:
            assert str(error).startswith("payload: ") and "\n" not in str(error)


def rows_body(width: int, lead: int, count: int, values: int, steps: list[int]) -> bytes:
    return HEADER.pack(b"grad", 6, 4, 1, 100) + Rows.FACTS.pack(width, lead, count) + bytes(4 * values) + bytes(steps)


@pytest.mark.parametrize("data, message", [
    (HEADER.pack(b"grab", 1, 4, 0, 100), "begins with b'grab.x01', which no codec writes"),
    (HEADER.pack(b"grad", 9, 4, 0, 100), "which no codec writes"),
    (HEADER.pack(b"grad", 4, 4, 0, 100), "topk: 0 elements of a block of 4096"),
    (HEADER.pack(b"grad", 4, 4, 4097, 100), "topk: 4097 elements of a block"),
    (HEADER.pack(b"grad", 4, 4, 82, 100) + bytes(17), "topk: 17 bytes, expected 18"),
    (HEADER.pack(b"grad", 4, 4, 82, 100) + bytes(12) + b"\1\0\0\0\2\0", "positions that do not ascend"),
    (HEADER.pack(b"grad", 4, 4, 82, 100) + bytes(12) + b"\0\0\1\0\x64\0", "positions that do not ascend"),
    (HEADER.pack(b"grad", 5, 4, 0, 100) + bytes(8) + bytes(12) + b"\x1f", "1bit: bits beyond the last element"),
    (HEADER.pack(b"grad", 6, 4, 3, 100) + bytes(24), "rows: 24 bytes with row numbers of 3 bytes each"),
    (rows_body(0, 0, 0, 0, []), "rows: 0 rows of 0 elements"),
    (rows_body(10, 10, 0, 0, []), "from element 10 on"),
    (rows_body(1 << 50, 0, 0, 0, []), "rows of 1125899906842624 elements"),
    (rows_body(10, 0, 1 << 60, 0, []), "in 24 bytes"),
    (rows_body(10, 0, 2, 20, [3, 0]), "row numbers that do not ascend within the piece"),
    (rows_body(10, 0, 1, 10, [10]), "row numbers that do not ascend within the piece"),
    (rows_body(10, 0, 2, 19, [3, 1]), "76 bytes of elements in 2 rows of 10"),
    (rows_body(10, 5, 1, 10, [0]), "40 bytes of elements in 1 rows of 10"),
])
def test_what_no_codec_writes(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^payload: .*({message})"):
        Payload(data).decode(K, 100, eg.float32)


@given(height=st.integers(1, 30), width=st.integers(1, 12), data=st.data())
def test_rows_in_any_piece(height: int, width: int, data: st.DataObject) -> None:
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, height - 1)))), np.int64)
    values = np.random.default_rng(0).standard_normal((len(rows), width)).astype(np.float32)
    table = np.zeros((height, width), np.float32)
    table[rows] = values
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, table.size)] * 2)))
    payload = Rows.of(eg.RowSparse(rows, eg.tensor(values), height), start, stop - start)
    found = payload.decode(K, stop - start, eg.float32).data
    assert found.tobytes() == table.reshape(-1)[start:stop].tobytes()


@pytest.mark.parametrize("width", [16, 64, 768])
def test_rows_take_little_more_than_their_elements(width: int) -> None:
    random = np.random.default_rng(0)
    rows = np.unique(random.integers(0, 50257, 1024))
    gradient = eg.RowSparse(rows, eg.tensor(random.standard_normal((len(rows), width)).astype(np.float32)), 50257)
    for shards in (1, 2, 7):
        pieces = [piece for own in Partition({"w": gradient.shape}, shards).pieces for piece in own]
        parts = [Rows.of(gradient, piece.start, piece.size) for piece in pieces]
        assert sum(len(part.data) for part in parts) <= 1.1 * gradient.values.numpy().nbytes


# ── configuration, and going on ───────────────────────────────────────────────────────────────────────

def test_what_is_configured() -> None:
    assert codec_of("topk:0.01") == TopK(41) and codec_of("topk:1") == TopK(BLOCK) and codec_of("1bit") == OneBit()
    for text in ("fp8", "topk", "topk:0", "topk:1.5", "topk:x", "int8:2", "topk:nan", ""):
        with pytest.raises(ValueError, match=f"compress is {text!r}, expected fp16, bf16, int8, 1bit, or topk: and"):
            codec_of(text)


@pytest.mark.parametrize("rule", [optim.AdamRule(), optim.AdamWRule(), optim.AdagradRule(), optim.RMSpropRule()])
def test_one_bit_is_refused_for_what_divides_by_root_v(rule: optim.Rule) -> None:
    with pytest.raises(ValueError, match=f"compress is '1bit' and the rule {type(rule).__name__}: .*√v .*expected SGD"):
        codec_for("1bit", rule)
    assert codec_for("1bit", optim.SGDRule(momentum=0.9)) == OneBit() and codec_for("int8", rule) == Int8()


def some(seed: int, size: int = 5000) -> Any:
    return K.array(np.random.default_rng(seed).standard_normal(size).astype(np.float32))


def left(compression: Compression, piece: Any, clock: int) -> bytes:
    """What is left to say before a clock of microbatch 0 of the only parameter."""
    (value,) = compression.state({piece.parameter.name: piece.parameter}, clock).values()
    return value.tobytes()


def test_a_microbatch_computed_again_is_sent_as_it_was() -> None:
    piece = Partition({"w": (5000,)}, 1).pieces[0][0]
    once, twice = (Compression(K, codec_of("topk:0.01"), eg.float32) for _ in range(2))
    for clock in range(3):
        first = once.encode(clock, 0, piece, some(clock))
        assert twice.encode(clock, 0, piece, some(clock)) == twice.encode(clock, 0, piece, some(clock)) == first
    assert left(once, piece, 3) == left(twice, piece, 3)


def test_clocks_that_are_not_settled_may_be_computed_again() -> None:
    """With staleness 2 a microbatch of clocks 3 and 4 is sent, and then again for whoever takes over."""
    piece, compression = Partition({"w": (5000,)}, 1).pieces[0][0], Compression(K, codec_of("int8"), eg.float32, 2)

    def states() -> list[bytes]:
        return [left(compression, piece, clock) for clock in (3, 4, 5)]

    first = [compression.encode(clock, 0, piece, some(clock)) for clock in range(5)]
    before = states()
    for clock in (4, 3, 4, 3):
        assert compression.encode(clock, 0, piece, some(clock)) == first[clock]
    assert states() == before and len(set(before)) == 3
    assert len(list(compression.shelf.marks(0, piece.parameter))) == 4  # and no more are kept


@pytest.mark.parametrize("every", [0, 1, 3, 4])
def test_all_may_go_back_to_any_version_that_a_term_may_begin_with(every: int) -> None:
    """The origin, the version 2, which a reshard seals, and every multiple of `every` that is not below these. What was
    computed of later clocks in older terms is not taken for what was left."""
    piece = Partition({"w": (5000,)}, 1).pieces[0][0]
    right = Compression(K, codec_of("int8"), eg.float32)
    payloads = [right.encode(clock, 0, piece, some(clock)) for clock in range(12)]
    compression = Compression(K, codec_of("int8"), eg.float32, every=every)
    points = [version for version in range(3, 10) if every and version % every == 0]
    courses = [(0, 0, 6), (0, 0, 2), *((version, 2, 11) for version in (2, *points))]
    for term, (version, floor, end) in enumerate(courses):
        for clock in range(version, end):
            assert compression.encode(clock, 0, piece, some(clock), term, floor) == payloads[clock], (version, clock)
    kept = {clock for clock, _ in compression.shelf.marks(0, piece.parameter)}
    assert kept == {9, 10, 1} | ({v - 1 for v in range(2, 11) if v % every == 0} if every else set())


def test_a_clock_that_left_nothing_leaves_what_was_there() -> None:
    """Clocks 2 and 3 sent rows as they were; version 4, which all go back to, begins with what clock 1 left."""
    piece = Partition({"w": (5000,)}, 1).pieces[0][0]
    compression = Compression(K, codec_of("int8"), eg.float32, every=4)
    first = {clock: compression.encode(clock, 0, piece, some(clock)) for clock in (0, 1, 4, 5, 6, 7)}
    for clock in (4, 5, 6, 7):
        assert compression.encode(clock, 0, piece, some(clock), 1, 4) == first[clock]
    for clock in (4, 5):  # and once more
        assert compression.encode(clock, 0, piece, some(clock), 2, 4) == first[clock]


def test_who_comes_late_leaves_nothing_behind() -> None:
    """What was left before its clock is gone, so what it computes is something else; nobody will hear it."""
    piece, compression = Partition({"w": (5000,)}, 1).pieces[0][0], Compression(K, codec_of("int8"), eg.float32)
    right = Compression(K, codec_of("int8"), eg.float32)
    for clock in range(4):
        assert compression.encode(clock, 0, piece, some(clock)) == right.encode(clock, 0, piece, some(clock))
    for clock, term in ((1, 0), (2, 0), (3, -1), (9, -1)):
        compression.encode(clock, 0, piece, some(10 + clock), term)
    assert sorted(compression.shelf.marks(0, piece.parameter)) == [(2, 0), (3, 0)]
    assert compression.encode(3, 0, piece, some(3)) == right.encode(3, 0, piece, some(3))
    assert compression.encode(4, 0, piece, some(4)) == right.encode(4, 0, piece, some(4))
    assert left(compression, piece, 5) == left(right, piece, 5)


def test_a_residual_belongs_to_a_microbatch_of_a_parameter() -> None:
    partition = Partition({"a": (5000,), "b": (5000,)}, 1)
    a, b = partition.pieces[0]
    mixed = Compression(K, codec_of("int8"), eg.float32)
    alone = {key: Compression(K, codec_of("int8"), eg.float32) for key in [(0, "a"), (1, "a"), (1, "b")]}
    for clock in range(3):
        for microbatch, piece in ((1, b), (0, a), (1, a)):
            seed = 10 * clock + microbatch
            assert mixed.encode(clock, microbatch, piece, some(seed)) == \
                alone[microbatch, piece.parameter.name].encode(clock, microbatch, piece, some(seed))


def test_going_on_from_a_state() -> None:
    partition = Partition({"w": (5000,)}, 1)
    piece, saved = partition.pieces[0][0], Compression(K, codec_of("int8"), eg.float32)
    for clock in range(3):
        saved.encode(clock, 1, piece, some(clock))
    resumed, state = Compression(K, codec_of("int8"), eg.float32), saved.state(partition.parameters, 3)
    expected = saved.encode(3, 1, piece, some(3))
    assert list(state) == ["residual.1/w"]
    resumed.load(partition.parameters, state, 3)
    assert resumed.encode(3, 1, piece, some(3)) == expected


@pytest.mark.parametrize("state, message", [
    ({"residual.1/v": np.zeros(5000, np.float32)}, "'residual.1/v' is not expected"),
    ({"residual.x/w": np.zeros(5000, np.float32)}, "'residual.x/w' is not expected"),
    ({"residual.1/w": np.zeros(4999, np.float32)}, r"'residual.1/w' is float32 \(4999,\), expected float32 \(5000,\)"),
    ({"residual.1/w": np.zeros(5000)}, r"is float64 \(5000,\), expected float32"),
])
def test_a_state_that_does_not_fit_changes_nothing(state: dict[str, Any], message: str) -> None:
    partition, compression = Partition({"w": (5000,)}, 1), Compression(K, codec_of("int8"), eg.float32)
    compression.encode(0, 1, partition.pieces[0][0], some(0))
    before = compression.state(partition.parameters, 1)["residual.1/w"]
    with pytest.raises(ValueError, match=f"load: .*{message}"):
        compression.load(partition.parameters, state, 1)
    assert compression.state(partition.parameters, 1)["residual.1/w"].tobytes() == before.tobytes()
