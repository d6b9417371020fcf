"""The Transformer against a NumPy one written from the papers, and what every member of the family promises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine.backend import get_backend
from engine.models import Transformer, TransformerConfig

SMALL: dict[str, Any] = {"vocab_size": 23, "context_length": 12, "layers": 2, "heads": 4, "width": 16, "dropout": 0.0}
FAMILY = {
    "gpt2": TransformerConfig.gpt2(**SMALL),
    "llama": TransformerConfig.llama(**SMALL),
    "grouped": TransformerConfig.llama(**SMALL, kv_heads=2, tie_weights=True),
    "sinusoidal": TransformerConfig.gpt2(**SMALL, positions="sinusoidal", activation="relu", bias=False),
    "post-norm": TransformerConfig.gpt2(**SMALL, norm_first=False, tie_weights=False),
    "bert": TransformerConfig.bert(**SMALL),
    "original": TransformerConfig.original(**SMALL),
    "modern": TransformerConfig.llama(**SMALL, kind="encoder_decoder", kv_heads=1),
}
DECODERS = [name for name, config in FAMILY.items() if config.kind != "encoder"]


@pytest.fixture(params=["cpu", "reference"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with eg.device(request.param), eg.seed(0):
        yield request.param


def tokens(batch: int, time: int) -> eg.Tensor:
    return eg.randint(0, SMALL["vocab_size"], (batch, time))


def source_of(config: TransformerConfig, batch: int, time: int = 7) -> eg.Tensor | None:
    return tokens(batch, time) if config.kind == "encoder_decoder" else None


def spread_out(model: Transformer) -> Transformer:
    """Weights of a size at which every part of the model shows in the result, gains and biases too."""
    with eg.no_grad():
        for p in model.parameters():
            p += eg.randn(*p.shape, std=0.3, dtype=p.dtype, device=p.device)
    return model


# ── the whole model by hand ───────────────────────────────────────────────────────────────────────────

class ByHand:
    """A forward pass in float64 NumPy, from the state_dict of a model: one text, one head, one position at a time."""

    def __init__(self, model: Transformer):
        self.config = model.config
        self.weights = {name: value.numpy().astype(np.float64) for name, value in model.state_dict().items()}

    def affine(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.config.norm == "layer_norm":
            x = x - x.mean(-1, keepdims=True)
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_eps)
        return scaled * self.weights[name + ".weight"] + self.weights.get(name + ".bias", 0.0)

    def positioned(self, vectors: np.ndarray) -> np.ndarray:
        """Rotary: pair i of position t turns by t · base^(−2i/d)."""
        if self.config.positions != "rotary":
            return vectors
        d = self.config.head_width
        angle = np.outer(np.arange(len(vectors)), self.config.rotary_base ** (-2 * np.arange(d // 2) / d))
        a, b = vectors[:, :d // 2], vectors[:, d // 2:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=1)

    def attention(self, name: str, x: np.ndarray, context: np.ndarray | None, causal: bool) -> np.ndarray:
        c, d = (x if context is None else context), self.config.head_width
        q, k, v = self.affine(name + ".query", x), self.affine(name + ".key", c), self.affine(name + ".value", c)
        heads = []
        for h in range(self.config.heads):
            g = h // (self.config.heads // self.config.kv_heads)
            qh, kh, vh = q[:, h * d:h * d + d], k[:, g * d:g * d + d], v[:, g * d:g * d + d]
            if context is None:
                qh, kh = self.positioned(qh), self.positioned(kh)
            rows = []
            for t in range(len(x)):
                seen = t + 1 if causal else len(c)
                scores = np.exp(qh[t] @ kh[:seen].T / math.sqrt(d))
                rows.append(scores / scores.sum() @ vh[:seen])
            heads.append(np.stack(rows))
        return self.affine(name + ".output", np.concatenate(heads, axis=1))

    def feed_forward(self, name: str, x: np.ndarray) -> np.ndarray:
        up = self.affine(name + ".up", x)
        if self.config.activation == "swiglu":
            gate = self.affine(name + ".gate", x)
            return self.affine(name + ".down", gate / (1 + np.exp(-gate)) * up)
        return self.affine(name + ".down", self.activation(up))

    def activation(self, z: np.ndarray) -> np.ndarray:
        inner = {"relu": lambda: np.maximum(z, 0),
                 "gelu": lambda: z * np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)(z),
                 "gelu_tanh": lambda: z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))}
        return inner[self.config.activation]()

    def embed(self, text: np.ndarray, segments: np.ndarray | int = 0) -> np.ndarray:
        x, width = self.weights["embedding.weight"][text], self.config.width
        if self.config.positions == "learned":
            x = x + self.weights["position_embedding.weight"][:len(text)]
        if self.config.positions == "sinusoidal":
            i = np.arange(width)
            angle = np.outer(np.arange(len(text)), 10000.0 ** (-(i - i % 2) / width))
            x = x * math.sqrt(width) + np.where(i % 2, np.cos(angle), np.sin(angle))
        if self.config.segments:
            x = x + self.weights["segment_embedding.weight"][segments]
        return self.norm("embedding_norm", x) if self.config.embedding_norm else x

    def stack(self, name: str, x: np.ndarray, causal: bool, context: np.ndarray | None = None) -> np.ndarray:
        for i in range(self.config.layers):
            block = f"{name}.blocks.{i}."
            sublayers = [("attention", lambda y, b=block: self.attention(b + "attention", y, None, causal))]
            if context is not None:
                sublayers.append(("cross_attention",
                                  lambda y, b=block: self.attention(b + "cross_attention", y, context, False)))
            sublayers.append(("feed_forward", lambda y, b=block: self.feed_forward(b + "feed_forward", y)))
            for kind, f in sublayers:
                norm = block + kind + "_norm"
                x = x + f(self.norm(norm, x)) if self.config.norm_first else self.norm(norm, x + f(x))
        return self.norm(name + ".norm", x) if self.config.norm_first else x

    def logits(self, text: np.ndarray, source: np.ndarray | None, segments: np.ndarray | int = 0) -> np.ndarray:
        x = self.embed(text, segments)
        if self.config.kind == "encoder":
            x = self.stack("encoder", x, causal=False)
        else:
            context = None if source is None else self.stack("encoder", self.embed(source), causal=False)
            x = self.stack("decoder", x, causal=True, context=context)
        if self.config.output_layer:
            x = self.norm("output_layer.norm", self.activation(self.affine("output_layer.dense", x)))
        x = x @ self.weights["embedding.weight" if self.config.tie_weights else "output.weight"].T
        return x + self.weights["output_layer.bias"] if self.config.output_layer else x


@pytest.mark.parametrize("name", list(FAMILY))
def test_the_model_is_the_one_by_hand(device: str, name: str) -> None:
    config = FAMILY[name]
    model = spread_out(Transformer(config).to("float64"))
    text, source = tokens(2, 9), source_of(config, 2)
    logits = model(text, source).numpy()
    for b in range(2):
        expected = ByHand(model).logits(text.numpy()[b], None if source is None else source.numpy()[b])
        # Some thousand roundings of 1.1e-16, amplified by a condition of at most 100 a layer.
        np.testing.assert_allclose(logits[b], expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def test_segments_are_told_apart() -> None:
    with eg.seed(3):
        model = spread_out(Transformer(FAMILY["bert"]).to("float64"))
        text, segments = tokens(2, 9), eg.randint(0, 2, (2, 9))
    logits = model(text, segments=segments).numpy()
    for b in range(2):
        expected = ByHand(model).logits(text.numpy()[b], None, segments.numpy()[b])
        np.testing.assert_allclose(logits[b], expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    assert not np.array_equal(logits, model(text).numpy())
    with pytest.raises(ValueError, match="got segments, and this model's config has none"):
        Transformer(FAMILY["gpt2"])(text, segments=segments)


# ── promises of every model ───────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", list(FAMILY))
def test_every_parameter_has_the_gradient_that_differences_show(name: str) -> None:
    """⟨∇loss, v⟩ against (loss(θ + hv) − loss(θ − hv)) / 2h in float64, one random direction a parameter.

    With h = 1e-5 the difference is off by about h² = 1e-10 and by 1e-16/h = 1e-11, times the size of the derivatives.
    """
    with eg.seed(1):
        config = dataclasses.replace(FAMILY[name], layers=1)
        model = spread_out(Transformer(config).to("float64"))
        text, targets, source = tokens(2, 5), tokens(2, 5), source_of(config, 2, 4)
        model.loss(text, targets, source).backward()
        for label, p in model.named_parameters():
            assert p.grad is not None, label
            v, start, h = eg.randn(*p.shape, dtype=eg.float64).numpy(), p.numpy().copy(), 1e-5
            with eg.no_grad():
                p.copy_(eg.tensor(start + h * v))
                above = model.loss(text, targets, source).item()
                p.copy_(eg.tensor(start - h * v))
                below = model.loss(text, targets, source).item()
                p.copy_(eg.tensor(start))
            terms = p.grad.numpy() * v
            assert abs((above - below) / (2 * h) - terms.sum()) < 1e-6 * np.abs(terms).sum() + 1e-9, label


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_does_not_see_what_comes_later(device: str, name: str) -> None:
    config = FAMILY[name]
    model, text, source = spread_out(Transformer(config)), tokens(1, 10), source_of(config, 1)
    changed = text.numpy().copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % config.vocab_size
    before, after = model(text, source).numpy(), model(eg.tensor(changed), source).numpy()
    assert np.array_equal(before[:, :6], after[:, :6]) and not np.array_equal(before[:, 6], after[:, 6])


def test_an_encoder_sees_the_real_tokens_only(device: str) -> None:
    model = spread_out(Transformer(FAMILY["bert"]))
    text, lengths = tokens(2, 10), eg.tensor([6, 10])
    changed = text.numpy().copy()
    changed[0, 6:] = 0
    logits, padded = model(text, lengths=lengths).numpy(), model(eg.tensor(changed), lengths=lengths).numpy()
    assert np.array_equal(logits[0, :6], padded[0, :6]) and np.array_equal(logits[1], padded[1])
    alone = model(text[:1, :6]).numpy()
    np.testing.assert_allclose(alone[0], logits[0, :6], rtol=1e-4, atol=1e-5)  # float32, another order of sums
    changed[1, 9] = (changed[1, 9] + 1) % 23
    assert not np.array_equal(model(eg.tensor(changed), lengths=lengths).numpy()[1, 0], logits[1, 0])


def test_source_lengths_hide_the_sources_padding(device: str) -> None:
    config = FAMILY["original"]
    model, text, source = spread_out(Transformer(config)), tokens(2, 5), tokens(2, 7).numpy()
    lengths = eg.tensor([4, 7])
    before = model(text, eg.tensor(source), source_lengths=lengths).numpy()
    source[0, 4:] = 0
    assert np.array_equal(model(text, eg.tensor(source), source_lengths=lengths).numpy(), before)


# ── bits: a position's logits do not depend on how they are asked for ─────────────────────────────────

def expect_same(device: str, a: np.ndarray, b: np.ndarray) -> None:
    """Equal to the bit on the C kernels, which promise it; NumPy's matrix products only nearly."""
    if hasattr(get_backend(device), "level"):
        assert a.tobytes() == b.tobytes()
    else:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def decode_in_pieces(device: str, name: str, pieces: list[int]) -> None:
    config = FAMILY[name]
    with eg.device(device), eg.seed(2), eg.no_grad():
        model = spread_out(Transformer(config))
        text, source = tokens(2, 12), source_of(config, 2)
        full, cache, at = model(text, source).numpy(), model.make_cache(2, source_length=7), 0
        for n in pieces:
            part = model(text[:, at:at + n], source, cache=cache).numpy()
            expect_same(device, part, np.ascontiguousarray(full[:, at:at + n]))
            at += n
        assert cache.length == at == 12


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_gives_the_full_forwards_logits(device: str, name: str) -> None:
    decode_in_pieces(device, name, [5, 1, 1, 1, 4])


@pytest.mark.parametrize("name", ["gpt2", "grouped"])
@given(cuts=st.sets(st.integers(1, 11)))
def test_the_pieces_may_be_any(name: str, cuts: set[int]) -> None:
    decode_in_pieces("cpu", name, np.diff([0, *sorted(cuts), 12]).tolist())


@pytest.mark.parametrize("name", list(FAMILY))
def test_a_text_has_the_same_logits_alone_and_in_a_batch(device: str, name: str) -> None:
    config = FAMILY[name]
    model, text, source = spread_out(Transformer(config)), tokens(5, 11), source_of(config, 5)
    batch = model(text, source).numpy()
    alone = model(text[3:4], None if source is None else source[3:4]).numpy()
    expect_same(device, alone[0], np.ascontiguousarray(batch[3]))


# ── configuration ─────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", list(FAMILY))
def test_a_config_and_a_state_make_the_model_again(name: str) -> None:
    model = spread_out(Transformer(FAMILY[name]))
    config = TransformerConfig(**model.config.asdict())
    again = Transformer(config)
    again.load_state_dict(model.state_dict())
    text, source = tokens(1, 6), source_of(config, 1)
    assert config == model.config and np.array_equal(again(text, source).numpy(), model(text, source).numpy())


def test_presets_are_the_published_sizes() -> None:
    """Parameters counted from the configurations: building 7 billion of them is not needed to know how many."""
    def count(config: TransformerConfig) -> int:
        w, h, inner = config.width, config.hidden, config.kv_heads * config.head_width
        norm = w * (2 if config.norm == "layer_norm" and config.bias else 1)
        block = 2 * w * w + 2 * w * inner + (3 if config.activation == "swiglu" else 2) * w * h + 2 * norm
        block += (2 * w + 2 * inner + h + w) * config.bias
        total = config.vocab_size * w * (1 if config.tie_weights else 2) + config.layers * block
        total += config.output_layer * (w * w + w + norm + config.vocab_size)
        return (total + config.context_length * w * (config.positions == "learned") + config.segments * w
                + norm * (config.norm_first + config.embedding_norm))

    for preset, published in [(TransformerConfig.gpt2(), 124_439_808), (TransformerConfig.llama(), 6_738_415_616),
                              (TransformerConfig.bert(), 109_514_298)]:
        assert count(preset) == published
    for name in ("gpt2", "llama", "grouped", "sinusoidal", "post-norm", "bert"):
        assert Transformer(FAMILY[name]).num_parameters() == count(FAMILY[name]), name


def test_hidden_follows_from_width() -> None:
    assert TransformerConfig(width=192, heads=6).hidden == 768
    assert TransformerConfig(width=192, heads=6, activation="swiglu").hidden == 512
    assert TransformerConfig(width=192, heads=6, hidden=100).hidden == 100


@pytest.mark.parametrize("choices, message", [
    ({"width": 10, "heads": 4}, "width 10, heads 4 and kv_heads 4: expected each to be a multiple of the next"),
    ({"kv_heads": 5}, "heads 12 and kv_heads 5"),
    ({"layers": 0}, "layers is 0, expected a whole number of at least 1"),
    ({"width": 1.5}, "width is 1.5"),
    ({"positions": "absolute"}, "positions is 'absolute', expected one of learned, sinusoidal, rotary"),
    ({"kind": "rnn"}, "kind is 'rnn'"),
    ({"segments": 2}, "segments is 2 for kind 'decoder', expected 0"),
    ({"dropout": 1.0}, r"dropout is 1.0, expected a number in \[0, 1\)"),
    ({"width": 12, "heads": 4, "positions": "rotary"}, "a head has 3 features"),
    ({"width": 5, "heads": 5, "positions": "sinusoidal"}, "width is 5, expected an even number"),
])
def test_choices_that_do_not_fit(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**choices)


def test_inputs_that_do_not_fit() -> None:
    gpt, bert, pair = (Transformer(FAMILY[name]) for name in ("gpt2", "bert", "original"))
    with pytest.raises(ValueError, match="13 positions, expected at most context_length = 12"):
        gpt(tokens(1, 13))
    with pytest.raises(ValueError, match=r"tokens are int64 \(3,\), expected integers \(batch, time\)"):
        gpt(eg.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"tokens are float32 \(1, 2\)"):
        gpt(eg.ones(1, 2))
    with pytest.raises(IndexError, match=r"embedding: index holds 23, expected whole numbers in \[0, 23\)"):
        gpt(eg.tensor([[23]]))
    with pytest.raises(ValueError, match="no source, which an encoder-decoder needs"):
        pair(tokens(1, 3))
    with pytest.raises(ValueError, match="got source, which an encoder-decoder needs and no other"):
        gpt(tokens(1, 3), tokens(1, 3))
    with pytest.raises(ValueError, match="'encoder' has no decoder"):
        bert.decode(tokens(1, 3))
    with pytest.raises(ValueError, match="no context, which an encoder-decoder needs"):
        pair.decode(tokens(1, 3))
    with pytest.raises(ValueError, match="'decoder' has no encoder"):
        gpt.encode(tokens(1, 3))
    with pytest.raises(TypeError, match="got a config and fields of one"):
        Transformer(FAMILY["gpt2"], layers=2)
    with pytest.raises(TypeError, match="config is dict, expected a TransformerConfig"):
        Transformer({"layers": 2})
    for wrong in ([[1, 2]], np.array([[1, 2]])):
        with pytest.raises(TypeError, match=r"tokens are (list|ndarray), expected a tensor \(batch, time\)"):
            gpt(wrong)
    for model in (gpt, bert):
        with pytest.raises(ValueError, match="got source_lengths, which belong to a source"):
            model(tokens(1, 3), source_lengths=eg.tensor([2]))
    with pytest.raises(ValueError, match="a model of kind 'encoder' has nothing to keep in one"):
        bert(tokens(1, 3), cache=gpt.make_cache(1))
    assert gpt.make_cache(1, capacity=0).capacity == 0


# ── initial weights, size, training ───────────────────────────────────────────────────────────────────

def test_what_adds_to_the_residual_stream_begins_smaller() -> None:
    with eg.seed(0):
        model = Transformer(TransformerConfig.gpt2(**{**SMALL, "width": 64, "layers": 3}))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert np.array_equal(p.numpy(), np.full(p.shape, 1.0 if "norm.weight" in name else 0.0))
            continue
        adds = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        std = 0.02 / math.sqrt(6) if adds else 0.02
        assert abs(p.numpy().var() / std**2 - 1) < 5 * math.sqrt(2 / p.size), name


def test_a_new_model_knows_nothing() -> None:
    """The loss of an untrained model is that of a uniform guess, up to the small size of its logits."""
    with eg.seed(0):
        model = Transformer(FAMILY["llama"])
        loss = model.loss(tokens(4, 12), tokens(4, 12)).item()
    assert loss == pytest.approx(math.log(23), abs=0.02)


def test_flops_of_training_a_token() -> None:
    model = Transformer(FAMILY["grouped"])
    matrices = 23 * 16 + 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * model.config.hidden)
    assert model.flops_per_token() == 6 * matrices + 12 * 2 * 16 * 6.5
    untied = Transformer(FAMILY["post-norm"])  # its embedding and positions are looked up, not multiplied
    matrices = 23 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert untied.flops_per_token(time=3) == 6 * matrices + 12 * 2 * 16 * 2


def test_dropout_is_the_generators_and_off_in_evaluation() -> None:
    config = TransformerConfig.gpt2(**{**SMALL, "dropout": 0.2})
    with eg.seed(0):
        model, text = Transformer(config), tokens(2, 8)

    def logits(seed: int) -> np.ndarray:
        with eg.seed(seed):
            return model(text).numpy()

    assert np.array_equal(logits(1), logits(1)) and not np.array_equal(logits(1), logits(2))
    model.eval()
    assert np.array_equal(logits(1), logits(2))


@pytest.mark.parametrize("name", ["gpt2", "grouped", "original"])
def test_a_model_learns_a_text_by_heart(name: str) -> None:
    with eg.seed(0):
        model, text = Transformer(FAMILY[name]), tokens(2, 12)
        source = source_of(model.config, 2)
        optimizer = eg.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(40):
            loss = model.loss(text[:, :-1], text[:, 1:], source)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss.item() < 0.3
