"""Matrices that are only read: what their bytes mean, how far quantised weights are from what they were, and that a
model of them gives the bits of the weights that they stand for."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as eg
from engine.backend import get_backend
from engine.models import Transformer, TransformerConfig
from engine.nn import attention
from engine.ops.stored import SCHEMES, StoredMatrix
from engine.testing import blocks, check_bits, check_threads
from engine.testing.bounds import smallest_subnormal, unit_roundoff

FORMS = ["packed", *SCHEMES]
SCALED = ["q8_0", "q4_0", "q4_1"]  # those whose blocks have scales
HALF = 2.0**-11  # the unit roundoff of float16; its subnormal numbers are 2⁻²⁴ apart


def weights(n: int, k: int, seed: int, size: float = 1.0, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, k)) * size * 2.0 ** rng.integers(-6, 7, (n, 1))).astype(dtype)


# ── the bytes ─────────────────────────────────────────────────────────────────────────────────────────

def test_a_block_of_each_scheme_byte_by_byte() -> None:
    """Known values: w = q/4 for whole q, scales that float16 has exactly."""
    q = np.arange(32) - 16
    q[0] = 127
    block = eg.quantize(eg.tensor(q[None] / 4, dtype="float32"), "q8_0").blocks.numpy()[0]
    assert block[:2].view(np.float16)[0] == 0.25 and (block[2:].view(np.int8) == q).all()

    x = np.zeros((1, 32))
    x[0, :8] = [-127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.49999997]  # halves go away from 0
    block = eg.quantize(eg.tensor(x, dtype="float32"), "q8_0").blocks.numpy()[0]
    assert block[2:].view(np.int8)[:8].tolist() == [-127, 1, 2, 3, -1, -2, 127, 0]

    q = np.arange(32) % 16
    block = eg.quantize(eg.tensor((q[None] - 8) / 4, dtype="float32"), "q4_0").blocks.numpy()[0]
    assert block[:2].view(np.float16)[0] == 0.25
    assert (block[2:] & 15 == q[:16]).all() and (block[2:] >> 4 == q[16:]).all()

    block = eg.quantize(eg.tensor(q[None] / 4 - 3, dtype="float32"), "q4_1").blocks.numpy()[0]
    assert block[:4].view(np.float16).tolist() == [0.25, -3.0]
    q = np.roll(q, 5)
    block = eg.quantize(eg.tensor(q[None] / 4 - 3, dtype="float32"), "q4_1").blocks.numpy()[0]
    assert (block[4:] & 15 == q[:16]).all() and (block[4:] >> 4 == q[16:]).all()

    x[0, :8] = [1, -1.5, 1 + 2**-8, 1 + 3 * 2**-8, 1.99999, 2.0**-133, 2.0**-135, -0.0]  # ties go to even
    block = eg.quantize(eg.tensor(x, dtype="float32"), "bf16").blocks.numpy()[0].view(np.uint16)
    assert block[:8].tolist() == [0x3F80, 0xBFC0, 0x3F80, 0x3F82, 0x4000, 1, 0, 0x8000]


@settings(deadline=None)
@given(st.sampled_from([*SCHEMES]), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**16),
       st.sampled_from([1.0, 1e-6, 1e-9, 1e4, 0.0]))
def test_blocks_are_those_of_the_definition(scheme: str, n: int, steps: int, seed: int, size: float) -> None:
    weight = weights(n, 32 * steps, seed, size / 2.0**6)
    weight[::3, ::5] = weight[0, 0]  # ties, and numbers halfway between two
    weight[-1, :32] = 0
    made = eg.quantize(eg.tensor(weight), scheme)
    want = blocks.encoded(weight, scheme)
    check_bits(made.blocks.numpy(), want, check=f"{scheme}: blocks")
    meant = blocks.decoded(want, scheme).astype(np.float32)
    check_bits(made.dequantize().numpy() + 0.0, meant + 0.0, check=f"{scheme}: what they stand for")
    again = eg.QuantizedTensor(eg.tensor(want), scheme)
    check_bits(again.blocks.numpy(), want, check=f"{scheme}: bytes of a file, there and back")


@settings(deadline=None)
@given(st.sampled_from(SCALED), st.integers(0, 2**16), st.sampled_from([1.0, 1e-5, 1e3]))
def test_a_weight_moves_by_half_a_step(scheme: str, seed: int, size: float) -> None:
    """|w − ŵ| ≤ d/2, the exact d, and besides: what rounding d and m to float16 does to d q and m, at most 2⁻¹¹ of them
    or half of 2⁻²⁴ each; what the roundings of float32 do on the way to q, at most 4 u of x/d (x/d is at most 127, or
    16) steps. In Q4_0 the quant 16 is cut to 15: half a step more."""
    weight = weights(6, 128, seed, size / 2.0**6).reshape(-1, 32)
    got = eg.quantize(eg.tensor(weight), scheme).dequantize().numpy().astype(np.float64)
    wide, u = weight.astype(np.float64), unit_roundoff("float32")
    low, high, most = wide.min(1), wide.max(1), np.abs(wide).max(1)
    step, largest, minimum = {"q8_0": (most / 127, 127, 0 * low), "q4_0": (most / 8, 8, 0 * low),
                              "q4_1": ((high - low) / 15, 15, low)}[scheme]
    half_scale = largest * np.maximum(HALF * step, 2.0**-25) + np.maximum(HALF * np.abs(minimum), 2.0**-25)
    bound = step * (0.5 + 4 * u * (largest + 1)) + half_scale + u * most
    error = np.abs(got - wide)
    if scheme == "q4_0":
        signed = wide * -np.sign(wide[np.arange(len(wide)), np.abs(wide).argmax(1)])[:, None]
        cut = signed > 7.5 * (step * (1 - 4 * u))[:, None]
        assert (error[cut] <= (bound + step / 2).repeat(32).reshape(-1, 32)[cut]).all()
        error = np.where(cut, 0, error)
    assert (error <= bound[:, None]).all()
    assert (error.max(1) > 0.25 * step).any()  # and it is no better than it should be


@settings(deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1.0, 1e-39, 1e30]))
def test_a_weight_in_bfloat16_moves_by_half_of_its_last_digit(seed: int, size: float) -> None:
    """|w − ŵ| ≤ 2⁻⁸ |w|, or half of 2⁻¹³³ where numbers are subnormal."""
    weight = weights(6, 128, seed, size / 2.0**6)
    error = np.abs(eg.quantize(eg.tensor(weight), "bf16").dequantize().numpy().astype(np.float64) - weight)
    bound = np.maximum(2.0**-8 * np.abs(weight.astype(np.float64)), 2.0**-134)
    assert (error <= bound).all() and (error > bound / 4).any()


# ── linear ────────────────────────────────────────────────────────────────────────────────────────────

def stored(weight: eg.Tensor, form: str) -> Any:
    return eg.pack(weight) if form == "packed" else eg.quantize(weight, form)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 18), st.integers(1, 100), st.sampled_from([32, 64, 224, 256, 288, 544]), st.integers(0, 99),
       st.booleans())
def test_linear_has_the_bits_of_the_weights_that_it_stands_for(form: str, m: int, n: int, k: int, seed: int,
                                                               biased: bool) -> None:
    """A few rows and many, odd numbers of outputs, every tail of the depth; x in float32."""
    x, bias = eg.tensor(weights(m, k, seed)), eg.tensor(weights(1, n, seed + 1)[0]) if biased else None
    matrix = stored(eg.tensor(weights(n, k, seed + 2)), form)
    check_bits(eg.linear(x, matrix, bias).numpy(), eg.linear(x, matrix.tensor(), bias).numpy(), check=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [1, 2, 8, 9, 70])
def test_threads_do_not_show(form: str, m: int) -> None:
    matrix, x = stored(eg.tensor(weights(3000, 288, 0)), form), eg.tensor(weights(m, 288, 1))

    def run() -> list[np.ndarray]:
        eg.full((m, 3000), np.nan)  # the memory that the result gets: what is not written shows
        return [eg.linear(x, matrix).numpy().copy()]

    assert np.isfinite(run()[0]).all()
    check_threads(run)


@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize("m", [1, 9])
def test_scales_of_any_size_and_sign(scheme: str, m: int) -> None:
    """Files may hold what quantize() never makes: negative, subnormal and the largest scales, all quants, −0."""
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (70, 6 * blocks.BLOCK_BYTES[scheme]), dtype=np.uint8)
    heads = data.reshape(70, 6, -1)
    scales = np.array([65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, 1.0, -0.333, 1e-3], np.float16)
    for at in range(0, {"bf16": 0, "q4_1": 4}.get(scheme, 2), 2):
        heads[..., at:at + 2] = rng.choice(scales, (70, 6, 1)).view(np.uint8)
    if scheme == "bf16":  # every upper half of a float below 2^112: no sum of products is infinite
        halves = heads.view(np.uint16)
        halves[(halves & 0x7F80) > (127 + 111 << 7)] &= 0x807F
    matrix = eg.QuantizedTensor(eg.tensor(data), scheme)
    meant = blocks.decoded(data, scheme)
    check_bits(matrix.dequantize().numpy() + 0.0, meant.astype(np.float32) + 0.0, check=scheme)
    x = rng.standard_normal((m, 192)).astype(np.float32)
    got = eg.linear(eg.tensor(x), matrix).numpy()
    u, k = unit_roundoff("float32"), 192
    size = np.abs(x.astype(np.float64)) @ np.abs(meant).T
    bound = (k + 1) * u / (1 - (k + 1) * u) * size + k * smallest_subnormal("float32")  # k products and sums, and m's
    assert (np.abs(got - x.astype(np.float64) @ meant.T) <= bound).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_by_index(form: str) -> None:
    matrix = stored(eg.tensor(weights(70, 64, 0)), form)
    index = eg.tensor([[69, 0, 31], [32, 32, 5]])
    check_bits(eg.embedding(matrix, index).numpy(), matrix.tensor().numpy()[index.numpy()], check=form)
    for wrong in (-1, 70):
        with pytest.raises(IndexError, match=rf"embedding: index holds {wrong}, expected whole numbers in \[0, 70\)"):
            eg.embedding(matrix, eg.tensor([wrong]))
    with pytest.raises(TypeError, match="embedding: index has dtype float32, expected an integer type"):
        eg.embedding(matrix, eg.tensor([1.0]))


@pytest.mark.parametrize("form", FORMS)
def test_what_it_is(form: str) -> None:
    weight = eg.tensor(weights(64, 96, 0))
    matrix = stored(weight, form)
    bits = {"packed": 32, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5}[form]
    assert matrix.shape == (64, 96) and matrix.ndim == 2 and matrix.size == 64 * 96 and matrix.dtype is eg.float32
    assert matrix.nbytes == 64 * 96 * bits / 8 and matrix.device == weight.device
    again = pickle.loads(pickle.dumps(matrix))
    check_bits(again.tensor().numpy(), matrix.tensor().numpy(), check="pickle")
    assert repr(again) == repr(matrix) and "(64, 96)" in repr(matrix)
    weight.array.data[...] = 0  # it is a copy
    check_bits(again.tensor().numpy(), matrix.tensor().numpy(), check="a copy")


@pytest.mark.parametrize("form", FORMS)
def test_operands_may_be_lists_and_arrays(form: str) -> None:
    x, bias, matrix = weights(2, 32, 0), weights(1, 3, 1)[0], stored(eg.tensor(weights(3, 32, 2)), form)
    want = eg.linear(eg.tensor(x), matrix, eg.tensor(bias)).numpy()
    for kind in (np.asarray, np.ndarray.tolist):
        check_bits(eg.linear(kind(x), matrix, kind(bias)).numpy(), want, check=form)


def test_a_bias_of_numbers_has_the_type_of_x() -> None:
    """In float64 with all their digits, as for a weight that is not stored."""
    x, weight = (eg.tensor(weights(m, 7, m, dtype="float64")) for m in (2, 3))
    bias = [0.1, 0.2, 0.3]
    check_bits(eg.linear(x, eg.pack(weight), bias), eg.linear(x, weight, eg.tensor(bias, "float64")), check="float64")


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_a_bias_of_another_type_widens_the_product(scheme: str) -> None:
    """The blocks stand for exact numbers, in either type: q is small, and d has 11 bits."""
    x, bias = weights(3, 64, 0), weights(1, 40, 1, dtype="float64")[0]
    matrix = eg.quantize(eg.tensor(weights(40, 64, 2)), scheme)
    meant = eg.tensor(blocks.decoded(matrix.blocks.numpy(), scheme))
    want = eg.linear(eg.tensor(x).to("float64"), meant, eg.tensor(bias))
    for given_as in (eg.tensor(bias), bias):
        check_bits(eg.linear(eg.tensor(x), matrix, given_as).numpy(), want.numpy(), check=scheme)


@pytest.mark.parametrize(("scheme", "at"), [("q8_0", 0), ("q4_0", 0), ("q4_1", 0), ("q4_1", 2)])
def test_each_number_of_a_block_is_finite(scheme: str, at: int) -> None:
    data = np.zeros((3, 5 * blocks.BLOCK_BYTES[scheme]), np.uint8)
    for half in (np.inf, -np.inf, np.nan):
        data.reshape(3, 5, -1)[2, 4, at:at + 2] = np.array([half], np.float16).view(np.uint8)
        with pytest.raises(ValueError, match="QuantizedTensor: blocks hold a scale or minimum that is infinite or NaN"):
            eg.QuantizedTensor(eg.tensor(data), scheme)


def test_a_packed_matrix_is_the_matrix() -> None:
    for n, k in ((0, 5), (1, 1), (33, 7), (64, 32), (31, 0)):
        weight = weights(n, k, 1)
        for layout in (weight, np.asfortranarray(weight)):
            check_bits(eg.pack(eg.from_numpy(layout)).tensor().numpy(), weight, check=f"{n} × {k}")


# ── models ────────────────────────────────────────────────────────────────────────────────────────────

SIZES: dict[str, Any] = {"vocab_size": 45, "context_length": 24, "layers": 2, "heads": 2, "width": 32}


def models() -> list[Transformer]:
    made = []
    for kind, changes in (("gpt2", {}), ("llama", {"hidden": 96, "kv_heads": 1}), ("original", {"dropout": 0.0})):
        with eg.seed(0):
            model = Transformer(getattr(TransformerConfig, kind)(**SIZES, **changes)).eval()
            with eg.no_grad():
                for p in model.parameters():
                    p += eg.randn(*p.shape, std=0.3)
        made.append(model)
    return made


def as_stored(model: Transformer, form: str) -> Transformer:
    """An ordinary model of the weights that a model for inference stands for."""
    twin, small = model.twin(), dict(model.for_inference(form).named_modules())
    for name, module in twin.named_modules():
        read = small.get(name)
        if isinstance(module, eg.nn.MultiHeadAttention) and read.joined:
            whole = read.joined.weight.tensor()
            for part in (module.query, module.key, module.value):
                part.weight, whole = eg.nn.Parameter(whole[:len(part.weight)]), whole[len(part.weight):]
        elif isinstance(getattr(read, "weight", None), StoredMatrix):
            module.weight = eg.nn.Parameter(read.weight.tensor())
    return twin


@pytest.mark.parametrize("form", FORMS)
def test_a_model_for_inference_writes_what_its_weights_write(form: str) -> None:
    for model in models():
        source = {"source": eg.tensor([[3, 4, 5]])} if model.encoder is not None else {}
        small, wide = model.for_inference(form), as_stored(model, form)
        texts = [list(m.generate([1, 2, 3], 30, generator=eg.Generator(0), num_samples=3, **source))
                 for m in (small, wide)]
        assert texts[0] == texts[1]
        if form == "packed":
            assert texts[0] == list(model.generate([1, 2, 3], 30, generator=eg.Generator(0), num_samples=3, **source))
        tokens = eg.tensor(np.random.default_rng(0).integers(0, 45, (2, 11)))
        losses = [m.loss(tokens[:, :-1], tokens[:, 1:], *[eg.tensor([[1, 2], [3, 4]])] * len(source))
                  for m in (small, wide)]
        assert losses[0].item() == losses[1].item()
        assert small.flops_per_token() == model.flops_per_token()


def test_every_matrix_is_stored_and_the_model_is_left_alone() -> None:
    gpt, llama, _ = models()
    before = {name: value.numpy().copy() for name, value in gpt.state_dict().items()}
    small = gpt.for_inference("q4_0")
    assert not gpt.train().for_inference("packed").decoder.blocks[0].training and gpt.decoder.blocks[0].training
    kept = {name for name, _ in small.named_parameters()}
    joined = {name: re.sub(r"\b(query|key|value)\b", "joined", name) for name in before}
    assert kept == {joined[name] for name, p in gpt.named_parameters() if p.ndim == 1} | {"position_embedding.weight"}
    assert "joined: Linear(32, 96)" in repr(small) and "query" not in repr(small)
    assert llama.for_inference("packed").decoder.blocks[0].attention.joined.bias is None
    assert isinstance(llama.for_inference("q8_0").embedding.weight, eg.Tensor)  # looked up, not multiplied
    for name, value in gpt.state_dict().items():
        check_bits(value.numpy(), before[name], check=name)
    with pytest.raises(ValueError, match=r"Transformer.state_dict: embedding.weight is QuantizedTensor.*only read"):
        small.state_dict()
    with pytest.raises(ValueError, match=r"Transformer.to: embedding.weight is QuantizedTensor.*which is only read"):
        small.to("float64")
    with pytest.raises(ValueError, match=r"Transformer.for_inference: embedding.weight is QuantizedTensor.*only read"):
        small.for_inference("packed")
    with pytest.raises(ValueError, match=r"for_inference: weights is 'q5', expected .* packed, q8_0, q4_0, q4_1, bf16"):
        gpt.for_inference("q5")
    narrow = Transformer(TransformerConfig.gpt2(**{**SIZES, "width": 34}))
    with pytest.raises(ValueError, match=r"for_inference: embedding: quantize: weight has shape \(45, 34\), expected"):
        narrow.for_inference("q8_0")


class Doubled(eg.nn.Linear):
    """A map that is something else than its weight says."""

    def forward(self, x: eg.Tensor) -> eg.Tensor:
        return x @ self.weight.T * 2.0


@pytest.mark.parametrize("which", ["query", "key", "value", "output"])
def test_a_map_of_its_own_kind_is_called(which: str) -> None:
    model, tokens = models()[0], eg.tensor([[1, 2, 3, 4]])
    attention = model.decoder.blocks[0].attention
    old = getattr(attention, which)
    for made in (Doubled(32, 32), eg.nn.Linear(32, 32, bias=False)):
        made.weight = old.weight
        setattr(attention, which, made)
        small = model.for_inference("packed")
        with eg.no_grad():
            check_bits(small(tokens).numpy(), model(tokens).numpy(), check=f"{which}, {type(made).__name__}")
            through = small.logits(small.decode(tokens, cache=small.make_cache(1)))
        check_bits(through.numpy(), model(tokens).detach().numpy(), check=f"{which} with a cache")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
def test_a_model_of_float64_computes_in_it(form: str, positions: str) -> None:
    model = Transformer(TransformerConfig.gpt2(**SIZES)).eval() if positions == "learned" else Transformer(
        kind="decoder", **SIZES, positions=positions, tie_weights=True).eval()
    small = model.to("float64").for_inference(form)
    assert small(eg.tensor([[1, 2]])).dtype is eg.float64
    assert len(list(small.generate([1, 2], 5, temperature=0.0))) == 5


@pytest.mark.parametrize("changes", [{}, {"rotary": True}, {"kv_heads": 1, "rotary": True}, {"lengths": True}])
def test_the_short_way_of_new_tokens_has_the_bits_of_the_long_one(monkeypatch: pytest.MonkeyPatch,
                                                                  changes: dict[str, Any]) -> None:
    """Several tokens at once and one by one, over a cache that is not empty; the caches are the same afterwards. On a
    device without kernels the short way is not taken."""
    layer = eg.nn.MultiHeadAttention(24, 4, changes.get("kv_heads")).eval()
    layer.join()
    x, table = eg.randn(3, 9, 24), eg.rope_table(9, 6)
    lengths = eg.tensor([9, 2, 5]) if "lengths" in changes else None
    results: list[list[np.ndarray]] = []
    ways: list[str] = []

    def watched(name: str, whole: Any) -> Any:
        return lambda *args, **kwargs: ways.append(name) or whole(*args, **kwargs)

    for name in ("attend_kept", "attend"):
        monkeypatch.setattr(attention, name, watched(name, getattr(attention, name)))
    for short in (True, False):
        if not short:
            monkeypatch.setattr(eg.nn.MultiHeadAttention, "_only_read", lambda *args: False)
        cache, made = eg.nn.KeyValueCache(3, layer.kv_heads, 10, 6), []
        for first, last in ((0, 4), (4, 5), (5, 8), (8, 9)):
            rotary = (table[0][first:last], table[1][first:last]) if "rotary" in changes else None
            with eg.no_grad():
                made.append(layer(x[:, first:last], causal=True, lengths=lengths, rotary=rotary, cache=cache).numpy())
        results.append([*made, *[kept.numpy() for kept in cache.filled()]])
    assert ways == ["attend_kept" if get_backend("cpu").has_fused("attention") else "attend"] * 4 + ["attend"] * 4
    for one, other in zip(*results):
        check_bits(one, other, check="the short way")
    if lengths is None and get_backend("cpu").has_fused("attention"):  # kernels give a row the same bits in any company
        with eg.no_grad():
            whole = layer(x, causal=True, rotary=table if "rotary" in changes else None).numpy()
        check_bits(np.concatenate(results[0][:4], 1), whole, check="all tokens at once, without a cache")


def test_what_does_not_fit_a_token_is_refused() -> None:
    """Each by its line, before a kernel reads beyond it."""
    layer = eg.nn.MultiHeadAttention(24, 4).eval()
    layer.join()
    x, (cosine, sine) = eg.randn(3, 2, 24), eg.rope_table(2, 6)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("KeyValueCache: got keys .* at most 1 positions", {"cache": eg.nn.KeyValueCache(3, 4, 1, 6)}),
        ("KeyValueCache: got keys .*expected", {"cache": eg.nn.KeyValueCache(2, 4, 9, 6)}),
        ("KeyValueCache: got float32 on cpu, expected float64", {"cache": eg.nn.KeyValueCache(3, 4, 9, 6, eg.float64)}),
        ("KeyValueCache: got float64 on cpu, expected float32", {"rotary": (cosine.to("float64"), sine.to("float64"))}),
        ("rope: cosine has shape", {"rotary": (cosine[:1], sine[:1])}),
        ("attention: .*lengths", {"lengths": eg.tensor([1, 2])})]
    for line, options in wrong:
        with eg.no_grad(), pytest.raises(ValueError, match=line):
            layer(x, **{"cache": eg.nn.KeyValueCache(3, 4, 9, 6), **options})


def test_decoding_reads_no_weight_that_is_not_stored() -> None:
    """Of the kernels that a token takes, no gemm: every matrix goes through the kernel of its form."""
    from engine.backend import observers

    gpt = models()[0]
    for form, kernel in (("packed", "packed_linear"), ("q8_0", "quantized_linear")):
        small, seen = gpt.for_inference(form), []
        observers.append(lambda name, _arguments, seen=seen: seen.append(name))
        try:
            next(small.generate([1], 1))
        finally:
            observers.pop()
        fused = get_backend("cpu").has_fused(kernel)
        assert seen.count("gemm") == (0 if fused else 9) and seen.count(kernel) == (9 if fused else 0)
