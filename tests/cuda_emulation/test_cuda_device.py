"""The op suite on device "cuda": every row of the op table, forward and backward, and a training run.

By default that device is the stand-in (cupy_stand_in.py), which proves the Python of the GPU backend and, under the
emulation, its kernels. `make test-gpu` runs the same tests on a real GPU.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device
import emulation
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as eg
import engine.testing.rows
from engine.backend import cuda_source, get_backend, observers
from engine.backend.numpy_rows import random_words
from engine.ops.attention import attend_joined
from engine.sharder import ParameterServer
from engine.testing import OpSpec, check_bits, check_close, specs
from engine.testing.opspec import Case
from engine.testing.strategies import cases

pytestmark = pytest.mark.skipif(not device.REAL and not emulation.available(), reason="no C++ compiler")
HARDWARE = Path(__file__).resolve().parent.parent.parent / "kernels" / "cuda" / "hardware.json"
launched: set[str] = set()
agreed: set[str] = set()  # ops whose forward did


@pytest.fixture(scope="module", autouse=True)
def on_cuda() -> Iterator[None]:
    def note(name: str, _arguments: tuple[Any, ...]) -> None:
        launched.add(name)

    with device.cuda() as description, eg.device("cuda"):
        observers.append(note)
        print(f"\ndevice cuda: {description}")
        yield
        observers.remove(note)
        ran = sorted(launched & set(cuda_source.kernels()))
        print(f"\nCUDA kernels that ran: {len(ran)} of {len(cuda_source.kernels())}: {', '.join(ran)}")
        if device.REAL:  # what tools/op_table.py reports
            record = {"device": description, "date": datetime.date.today().isoformat(), "ops": sorted(agreed),
                      "kernels": ran}
            HARDWARE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in specs.values()])
@settings(max_examples=3)
@given(data=st.data())
def test_forward(spec: OpSpec, data: Any) -> None:
    """Value within its bound, type and shape as the reference's."""
    case = data.draw(cases(spec, special=spec.special and data.draw(st.booleans())))
    want, bound = spec.expected(case)
    got = spec.run(case.operands, case.attributes)
    assert got.device == "cuda"
    check_close(got, want, bound, check=f"{spec.name}: forward on cuda", origin="the bound of its formula")
    if want.dtype.kind == "f" and spec.op != "astype":
        assert got.dtype.name == str(case.dtype)
    agreed.add(spec.op)


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in specs.values() if s.wrt])
@settings(max_examples=2)
@given(data=st.data())
def test_gradient(spec: OpSpec, data: Any) -> None:
    """In float64, the device's gradients are those of the reference device, to 2²⁰ roundings of the largest number.

    (The gradients of the kernels have tighter bounds, from their equations: test_cuda_kernels.py.)"""
    case = data.draw(cases(spec, "float64", smooth=True))
    found = [gradients(spec, case, name) for name in ("cuda", "reference")]
    size = max([np.abs(x).max(initial=1.0) for x in (*found[1], *spec.points(case))])
    for got, want in zip(*found):
        check_close(got + 0.0, want + 0.0, 2.0**-33 * size, check=f"{spec.name}: gradient", origin="2²⁰ roundings")


def gradients(spec: OpSpec, case: Case, name: str) -> list[np.ndarray]:
    with eg.device(name):
        leaves = [eg.tensor(x, requires_grad=True) for x in spec.points(case)]
        y = spec.function(case)(*leaves)
        g = np.random.default_rng(5).uniform(-1, 1, y.shape)
        grads = eg.grad(y, leaves, eg.tensor(g), allow_unused=True)
        return [y.numpy()] + [np.zeros(x.shape) if d is None else d.numpy() for x, d in zip(leaves, grads)]


# ── training ──────────────────────────────────────────────────────────────────────────────────────────

OPTIMIZERS = {"sgd": lambda p: eg.optim.SGD(p, lr=0.05, momentum=0.9), "adam": lambda p: eg.optim.AdamW(p, lr=0.01),
              "adagrad": lambda p: eg.optim.Adagrad(p, lr=0.05), "rmsprop": lambda p: eg.optim.RMSprop(p, lr=0.01)}


def trained(name: str, optimizer: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """The losses of a small Transformer, and its parameters after the last step."""
    # No biases: the gradient of a key's is 0 but for rounding errors, which Adam divides by their own size.
    config = eg.models.TransformerConfig(vocab_size=23, context_length=8, layers=1, heads=2, width=8, hidden=16,
                                         dropout=0.1, bias=False)
    with eg.device("reference"), eg.seed(1):
        start = {key: value.numpy() for key, value in eg.models.Transformer(config).state_dict().items()}
    tokens = np.random.default_rng(0).integers(0, 23, (4, 9))
    with eg.device(name), eg.seed(3):
        model = eg.models.Transformer(config).to("float64")
        model.load_state_dict(start)
        optim = OPTIMIZERS[optimizer](model.parameters())
        losses = []
        for _ in range(4):
            loss = eg.cross_entropy(model(eg.tensor(tokens[:, :-1])), eg.tensor(tokens[:, 1:]))
            optim.zero_grad()
            loss.backward()
            eg.optim.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            losses.append(loss.item())
        optim.load_state_dict(optim.state_dict())
        return losses, {key: value.numpy() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_the_reference(optimizer: str) -> None:
    """The same draws and, in float64, the same losses and parameters as on the reference device, dropout included."""
    (losses, parameters), (wanted, exact) = trained("cuda", optimizer), trained("reference", optimizer)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, wanted, rtol=2.0**-30)
    for key, value in exact.items():
        check_close(parameters[key], value, 2.0**-24 * np.abs(value).max(), check=f"{optimizer}: {key}")


def test_replicas_on_the_device_train_on_the_parameter_server() -> None:
    """Workers compute on the GPU, the server keeps and updates the parameters on the CPU: the same as all on the CPU,
    but for rounding; and the same bits for any number of workers and shards."""
    def train(name: str, workers: int, shards: int) -> dict[str, np.ndarray]:
        def worker(client: Any) -> None:
            with eg.device(name):
                w = eg.zeros(5, 3, dtype="float64", requires_grad=True)
                while client.clock():
                    client.pull({"w": w})
                    for index in client.microbatches:
                        x = np.random.default_rng((client.step, index)).uniform(-1, 1, (8, 5))
                        loss = ((eg.tensor(x) @ w - eg.tensor(x[:, :3])) ** 2).sum()
                        client.backward(index, {"w": w}, loss, x.size)

        server = ParameterServer({"w": np.ones((5, 3))}, eg.optim.AdamWRule(lr=0.1), workers=workers, shards=shards,
                                 microbatches=4)
        for _ in server.run(worker, clocks=3):
            pass
        return server.parameters()

    several, one, cpu = train("cuda", 2, 2), train("cuda", 1, 1), train("cpu", 1, 1)
    check_bits(several["w"], one["w"], check="workers and shards")
    check_close(several["w"], cpu["w"], 2.0**-40, check="cuda against cpu")


def test_special_values_are_those_of_the_cpu() -> None:
    """Rows with NaN and infinities: NaN, infinities and numbers come out in the same places."""
    inf, nan = np.inf, np.nan
    x = np.array([[nan, 1, 2], [inf, 1, 2], [-inf] * 3, [-inf, 1, 2], [inf, -inf, 0], [0, -0.0, 1e-310]])
    hidden = np.where(np.eye(6, 3, dtype=bool), x[:, ::-1], x)
    for f in (eg.softmax, eg.log_softmax, eg.relu, eg.silu, eg.gelu, eg.gelu_tanh, lambda x: eg.rms_norm(x, x[5]),
              lambda x: eg.layer_norm(x, x[5], x[5]),
              lambda x: eg.cross_entropy(x, eg.tensor(np.array([0, 1, 2, 0, 2, 1])), reduction="none"),
              lambda x: eg.cross_entropy(x, eg.tensor(np.array([1] * 6)), reduction="none", label_smoothing=0.1),
              lambda x: eg.scaled_dot_product_attention(x[3:], x[5:], x[5:], mask=x.detach()[:3, :1])):
        for rows in (x, hidden):
            found = []
            for name in ("cuda", "cpu"):
                with eg.device(name):
                    leaf = eg.tensor(rows, requires_grad=True)
                    y = f(leaf)
                    y.sum().backward()
                    found.append([y.detach().numpy(), leaf.grad.numpy()])
            for got, want in zip(*found):
                np.testing.assert_allclose(got, want, rtol=2.0**-40)


def test_queries_keys_and_values_may_be_one_array() -> None:
    """And so may their gradients, as one projection has them: fewer heads of keys than of queries, several tiles."""
    x, g = (np.random.default_rng(3).uniform(-1, 1, (2, 40, heads, 5)) for heads in (8, 4))
    found = []
    for name in ("cuda", "cpu"):
        with eg.device(name):
            leaf = eg.tensor(x, requires_grad=True)
            y = attend_joined(leaf, 2, causal=True)
            y.backward(eg.tensor(g))
            found.append((y.detach(), leaf.grad))
    for got, want in zip(*found):
        check_close(got, want, 2.0**-45, check="attention over one array")


def test_random_draws_are_those_of_the_reference() -> None:
    """The same words on every device; a normal number differs by the roundings of its functions at most."""
    for draw, close in ((eg.rand, 0), (eg.randn, 2.0**-45)):
        found = []
        for name in ("cuda", "reference"):
            with eg.seed(5):
                found.append(draw(1001, dtype="float64", device=name).numpy())
        check_close(found[0], found[1], close * 8, check=draw.__name__)


# ── what a GPU would do in an order of its own ────────────────────────────────────────────────────────

def test_gathering_twice_adds_in_order() -> None:
    """Rows named many times: the gradient is the sum in ascending order, the same bits every time."""
    index, g = np.array([3, 1, 3, 3, 0, 3]), np.random.default_rng(0).uniform(-1, 1, (6, 5)).astype("float32")
    x = eg.tensor(np.zeros((4, 5), "float32"), requires_grad=True)
    x[index].backward(eg.tensor(g))
    want = np.zeros((4, 5), "float32")
    np.add.at(want, index, g)
    check_bits(x.grad, want, check="rows named many times")


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "float64"])
def test_index_assignment_and_addition(dtype: str) -> None:
    """The last of several values for one position stays; sums of integers are exact."""
    x, index = np.arange(12).reshape(3, 4).astype(dtype), np.array([2, 0, 2])
    y, want = eg.tensor(x), x.copy()
    y[index] = eg.tensor(np.arange(12).reshape(3, 4).astype(dtype))
    want[index] = np.arange(12).reshape(3, 4)
    check_bits(y, want, check="index assignment")
    added = x.copy()
    np.add.at(added, index, x)
    k = get_backend("cuda")
    target = k.array(x)
    k.scatter_add(target, k.array(x), (index,))
    check_bits(k.to_numpy(target), added, check="scatter_add")


def test_indices_outside_are_errors() -> None:
    """CuPy wraps them round; the engine says so before."""
    x = eg.zeros(3, 4)
    with pytest.raises(IndexError, match="index 3 is out of bounds"):
        x[eg.tensor([3])]
    with pytest.raises(IndexError, match="index 3 is out of bounds"):
        x[eg.tensor([3])] = 1.0
    with pytest.raises(IndexError, match="index holds 3"):
        eg.embedding(x, eg.tensor([3]))


def test_a_broadcast_operand_of_a_kernel() -> None:
    """An elementwise CUDA kernel over operands of other shapes than its output's."""
    k, x = get_backend("cuda"), np.linspace(-2, 2, 6).reshape(2, 3)
    g, column = np.arange(3.0), np.array([[2.0], [-1.0]])
    y = k.map("relu_vjp", k.array(g), k.array(x))
    check_bits(k.to_numpy(y), np.where(x > 0, g, 0.0), check="a row broadcast")
    y = k.map("relu_vjp", k.array(column), k.array(x))
    check_bits(k.to_numpy(y), np.where(x > 0, column, 0.0), check="a column broadcast")


def test_transfers() -> None:
    """Only .to moves elements between devices; it is differentiable; mixing devices is an error."""
    x = eg.tensor([1.0, 2.0], device="cpu", requires_grad=True)
    y = x.to("cuda")
    assert (y.device, y.to("cpu").device) == ("cuda", "cpu")
    (y * y).sum().backward()
    assert x.grad.device == "cpu" and x.grad.tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match="different devices"):
        x + y
    assert repr(y.detach()) == "tensor([1., 2.], device='cuda')"
    assert "1" in repr(y.array)


def test_every_cuda_kernel_ran() -> None:
    """This file comes to every kernel, so that a run of it on a GPU is a run of all of them."""
    k = get_backend("cuda")
    bits = k.empty((10,), eg.uint32)
    k.random_bits(bits, 10, 1, 2, 3, 4)
    check_bits(k.to_numpy(bits), random_words(10, 1, 2, 3, 4), check="random_bits")
    x = eg.tensor(np.ones((2, 3)), requires_grad=True)
    for optimizer in OPTIMIZERS:
        trained("cuda", optimizer)
    eg.rand(3)
    for f in (eg.relu, eg.silu, eg.gelu, eg.gelu_tanh, eg.softmax, eg.log_softmax, lambda x: eg.rms_norm(x, x[0]),
              lambda x: eg.rope(x[:, :2], x[:, :1], x[:, 1:2])):
        f(x).sum().backward()
    eg.randn(3)
    assert launched >= set(cuda_source.kernels())
