"""Properties that bugs planted by tools/mutate.py showed to be untested, and that belong to no other file here."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import engine as eg
from engine.backend import get_backend
from engine.ops import op, registry
from engine.ops.registry import internal


def test_promotion_takes_the_wider_float() -> None:
    single, double = eg.ones(2), eg.ones(2, dtype="float64")
    assert (single + double).dtype is eg.float64
    assert (double + single).dtype is eg.float64
    assert (single + eg.ones(2, dtype="int64")).dtype is eg.float32


def test_no_two_live_blocks_share_memory() -> None:
    """However many small blocks are alive at once, on slabs that are new as well as on reused ones."""
    k = get_backend("cpu")
    for _ in range(2):
        blocks = [k.empty((size,), eg.float32) for size in (1, 16, 48, 80, 1000, 16384, 20000) for _ in range(40)]
        for i, block in enumerate(blocks):
            block.data[...] = i
        assert all(np.all(block.data == i) for i, block in enumerate(blocks))


def test_leaves_of_one_sum_get_memory_of_their_own() -> None:
    """The rule of a sum hands the same g to both operands; no view is involved that would force a copy."""
    a, b = eg.ones(3, requires_grad=True), eg.ones(3, requires_grad=True)
    g = eg.full((3,), 2.0)
    (a + b).backward(g)
    found = [a.grad.numpy(), b.grad.numpy(), g.numpy()]
    assert not any(np.shares_memory(one, other) for i, one in enumerate(found) for other in found[i + 1:])


def test_a_matrix_times_a_column_in_any_layout() -> None:
    """Exact: products of small whole numbers. The kernel turns A b into bᵀ Aᵀ, and their strides with them."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, shape).astype("float32") for shape in ((5, 7), (7, 3)))
    for left in (a, np.asfortranarray(a), a[::-1], np.repeat(a, 2, axis=1)[:, ::2]):
        for column in (b[:, :1], b[:, 2:], np.asfortranarray(b)[:, 1:2], b[::-1, :1], np.ascontiguousarray(b[:, :1])):
            got = eg.from_numpy(left) @ eg.from_numpy(column)
            np.testing.assert_array_equal(got.numpy(), left @ column)


def test_no_piece_of_a_job_is_left_out() -> None:
    """Lengths that do not divide into equal pieces, on 2 and 3 threads, into memory that held something else."""
    before = eg.get_num_threads()
    try:
        for threads in (2, 3):
            eg.set_num_threads(threads)
            for pieces in range(2, 24):
                x = np.arange(8192 * pieces + 1, dtype="float32")
                get_backend("cpu").full(x.shape, -1.0, eg.float32)  # the pool hands this memory out next
                np.testing.assert_array_equal((eg.from_numpy(x) + 1.0).numpy(), x + 1)
    finally:
        eg.set_num_threads(before)


def test_jobs_that_follow_each_other_at_once() -> None:
    """So that threads still spin when the next job is opened: those that have gone to sleep are woken under a lock."""
    k, before = get_backend("cpu"), eg.get_num_threads()
    x, ys = k.full((1 << 15,), 1.5, eg.float32), [k.empty((1 << 15,), eg.float32) for _ in range(4)]
    try:
        eg.set_num_threads(2)
        for _ in range(200):
            for y, left in zip(ys, (x, *ys)):
                k.add(y, left, x, k.layout(y, left, x))
    finally:
        eg.set_num_threads(before)
    for i, y in enumerate(ys):
        np.testing.assert_array_equal(y.data, np.full(1 << 15, 1.5 * (i + 2), np.float32))


def test_python_numbers_keep_their_digits() -> None:
    """A weak scalar takes the tensor's type before it takes part: 0.1 is not rounded to float32 on the way."""
    assert (eg.ones(1, dtype="float64") * 0.1).item() == 0.1
    assert (0.1 + eg.zeros(1, dtype="float64")).item() == 0.1
    assert eg.ones(2, dtype=float).dtype is eg.float32


def test_sums_of_small_integers_do_not_wrap_round() -> None:
    x = eg.full((3, 100), 100, dtype="int8")
    for total, want in ((eg.sum(x, 1), 10_000), (eg.cumulative_sum(x)[:, -1], 10_000), (eg.prod(x[:, :4], 1), 10**8)):
        assert total.dtype is eg.int64 and total.tolist() == [want] * 3
    assert eg.sum(eg.ones(300, dtype="bool")).item() == 300


def test_a_bool_index_of_no_axes_adds_one() -> None:
    x = eg.arange(3)
    for index, length in ((eg.tensor(True), 1), (np.bool_(False), 0), (True, 1)):
        assert x[index].shape == (length, 3)


def test_a_wrong_row_of_a_table_is_named() -> None:
    table = eg.zeros(4, 2)
    for index, wrong in (([0, -2, 3], -2), ([0, 4], 4), ([-1, 9], -1)):
        with pytest.raises(IndexError, match=f"index holds {wrong},"):
            eg.embedding(table, eg.tensor(index))


def test_help_shows_what_a_caller_passes() -> None:
    """The forward's parameters without the backend; a composite has none."""
    for public, names in ((eg.exp, "x"), (eg.sum, "x axis keepdims dtype"), (eg.mean, "x axis keepdims")):
        assert list(inspect.signature(public).parameters) == names.split()


def test_what_is_made_requires_no_grad_unless_asked() -> None:
    for make, shape in ((eg.zeros, 2), (eg.ones, 2), (eg.rand, 2), (eg.randn, 2), (eg.tensor, [1.0])):
        assert not make(shape).requires_grad and make(shape, requires_grad=True).requires_grad
    assert not eg.full((2,), 1.0).requires_grad and eg.full((2,), 1.0, requires_grad=True).requires_grad


def test_padding_is_zero_unless_asked() -> None:
    assert eg.pad(eg.ones(2), [(1, 2)]).tolist() == [0, 1, 1, 0, 0]


def test_weighted_targets_of_length_one_along_an_axis() -> None:
    """Losses of targets (3, 1) are (3, 1): only the axis of the classes is taken away."""
    logits = eg.tensor(np.random.default_rng(0).uniform(-1, 1, (3, 1, 4)))
    target, weight = eg.tensor([[0], [3], [1]]), eg.tensor([1.0, 2.0, 3.0, 4.0], dtype="float64")
    logp = eg.log_softmax(logits, -1).numpy()
    want = [[-1.0 * logp[0, 0, 0]], [-4.0 * logp[1, 0, 3]], [-2.0 * logp[2, 0, 1]]]
    np.testing.assert_array_equal(eg.cross_entropy(logits, target, weight, reduction="none").numpy(), want)


LAST = "vecdot cumulative_sum cumulative_prod diff softmax log_softmax take_along_axis argsort sort topk".split()
FIRST = "concat expand_dims stack unstack split take".split()
USUAL = {"keepdims": False, "dtype": None, "reduction": "mean", "generator": None, "descending": False, "stable": True,
         "include_initial": False, "min": None, "max": None, "indexing": "xy", "value": 0.0, "stride": 1, "padding": 0,
         "dilation": 1, "groups": 1, "axes": 2, "k": 0, "p": 0.5, "correction": 0.0, "n": 1, "prepend": None,
         "append": None, "eps": 1e-5, "running_mean": None, "running_var": None, "training": True, "momentum": 0.1,
         "mask": None, "causal": False, "lengths": None, "scale": None, "dropout": 0.0, "interleaved": False,
         "sparse": False, "side": "left", "sorter": None, "weight": None, "ignore_index": -100, "label_smoothing": 0.0,
         "delta": 1.0, "invert": False, **dict.fromkeys([("axis", op) for op in LAST], -1),
         **dict.fromkeys([("axis", op) for op in FIRST], 0), "axis": None, ("eps", "rms_norm"): 1e-6,
         "activation": "gelu"}  # of the layer that the op is made for


def test_what_is_left_out_is_as_published() -> None:
    """The defaults of the array API standard, and for what it does not have those of PyTorch."""
    for public in registry.values():
        for name, value in public.attributes.items():
            if value is not inspect.Parameter.empty:
                want = USUAL.get((name, public.name), USUAL.get(name, "none given"))
                assert value == want and type(value) is type(want), f"{public.name}: {name}={value!r}, want {want!r}"


def test_what_is_written_in_place_takes_the_type_of_what_it_overwrites() -> None:
    for dtype, other in (("float32", "float64"), ("float64", "float32"), ("int32", "int64")):
        x = eg.full((3,), 2, dtype=dtype)
        x += eg.tensor([1, 2, 5], dtype=other)
        assert x.dtype.name == dtype and x.tolist() == [3, 4, 7]


def test_integers_are_drawn_from_the_given_generator_with_all_their_bits() -> None:
    def drawn(seed: int) -> list[int]:
        return list(eg.randint(0, 1 << 50, (40,), generator=eg.Generator(seed)).tolist())

    assert drawn(1) == drawn(1) != drawn(2)
    assert len({n & 0xFFFF for n in drawn(1)}) > 30  # a float32 has 24 bits


def test_rotations_and_statistics_at_their_edges() -> None:
    """The published base of rotary positions; one row has no variance, and leaves that of the others finite."""
    for one, other in zip(eg.rope_table(5, 8), eg.rope_table(5, 8, 10000.0)):
        assert one.tolist() == other.tolist()
    mean, var = eg.zeros(3), eg.ones(3)
    eg.batch_norm(eg.ones(1, 3), eg.ones(3), eg.zeros(3), mean, var, momentum=0.5)
    assert mean.tolist() == [0.5] * 3 and var.tolist() == [0.5] * 3


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_row_that_is_looked_up_by_one_number_is_a_copy(device: str) -> None:
    with eg.device(device):
        table = eg.ones(3, 2)
        row = eg.embedding(table, eg.tensor(1))
        table *= 5
    assert row.tolist() == [1, 1]


def test_what_never_happens_adds_nothing_to_a_divergence() -> None:
    """0 ln 0 = 0, and so is its gradient."""
    p = eg.log(eg.tensor([0.25, 0.5, 0.25])).detach().requires_grad_()
    loss = eg.kl_div(p, eg.tensor([0.0, 1.0, 0.0]), reduction="none")
    np.testing.assert_allclose(loss.numpy(), [0, np.log(2), 0], rtol=2.0**-22)
    np.testing.assert_array_equal(eg.grad(loss.sum(), p).numpy(), [0, -1, 0])


@pytest.mark.parametrize("signature", ["n, n -> ", "..., n, n -> ..."])
def test_named_axes_are_checked_wherever_they_stand(signature: str) -> None:
    """Also where the result has none of them, or the first operand."""
    operands = signature.count(",") + 1
    forward = {2: lambda k, a, b: a, 3: lambda k, a, b, c: a}[operands]
    made = op(signature, public=False)(forward)
    try:
        made(*[eg.ones(2)] * operands)
        with pytest.raises(ValueError, match="expected"):
            made(*[eg.ones(2)] * (operands - 1), eg.ones(3))
    finally:
        del internal[made.name]


def test_einsum_sums_a_letter_as_soon_as_nothing_later_needs_it() -> None:
    a, b, c = (eg.ones(16, 16) for _ in range(3))
    with eg.profile() as profile:
        eg.einsum("ij,jk,kl->il", a, b, c)
    assert max(event.bytes for event in profile.events) <= 3 * 4 * 16 * 16  # two matrices and their product
