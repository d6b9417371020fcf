"""Generation: what is drawn from, what stops it, and that a sample is a function of its key alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine as eg
from engine.backend.program import Program
from engine.models import Decoding, Transformer, TransformerConfig
from engine.models.decoding import ATTEMPTS
from engine.models.generation import _Draw, distribution, penalized

VOCABULARY = 13


@pytest.fixture(scope="module")
def model() -> Transformer:
    with eg.seed(0):
        config = TransformerConfig.llama(vocab_size=VOCABULARY, context_length=16, layers=2, heads=2, width=16)
        made = Transformer(config)
        with eg.no_grad():
            for p in made.parameters():
                p += eg.randn(*p.shape, std=0.3)
        return made.eval()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


logit_rows = st.lists(st.floats(-20, 20), min_size=1, max_size=12).map(lambda row: np.array([row]))


# ── what is drawn from ────────────────────────────────────────────────────────────────────────────────

@given(logit_rows, st.floats(0.05, 5))
def test_without_limits_it_is_softmax(logits: np.ndarray, temperature: float) -> None:
    p = distribution(logits, temperature)
    np.testing.assert_allclose(p, softmax(logits / temperature), rtol=1e-12, atol=1e-300)


@given(logit_rows, st.integers(1, 14))
def test_top_k_keeps_the_k_most_probable(logits: np.ndarray, k: int) -> None:
    p = distribution(logits, top_k=k)[0]
    kept = np.flatnonzero(p)
    assert len(kept) == min(k, logits.size) and p.sum() == pytest.approx(1)
    if len(kept) < logits.size:
        assert logits[0, kept].min() >= np.delete(logits[0], kept).max()
    full = softmax(logits)[0]
    np.testing.assert_allclose(p[kept], full[kept] / full[kept].sum(), rtol=1e-12)


@given(logit_rows, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_together_have_p(logits: np.ndarray, top_p: float) -> None:
    p, full = distribution(logits, top_p=top_p)[0], softmax(logits)[0]
    kept = np.flatnonzero(p)
    assert full[kept].sum() >= top_p - 1e-12 and p.sum() == pytest.approx(1)
    assert full[kept].sum() - full[kept].min() < top_p + 1e-12  # one fewer would not be enough
    if len(kept) < logits.size:
        assert full[kept].min() >= np.delete(full, kept).max()
    np.testing.assert_allclose(p[kept], full[kept] / full[kept].sum(), rtol=1e-12)


def test_top_p_is_measured_among_the_top_k() -> None:
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    assert distribution(logits, top_k=2, top_p=0.5)[0] == pytest.approx([1, 0, 0, 0])  # 0.4/0.7 is enough
    assert distribution(logits, top_p=0.5)[0] == pytest.approx([4 / 7, 3 / 7, 0, 0])


def test_equal_logits_are_kept_in_the_order_of_their_index() -> None:
    assert distribution(np.zeros((1, 4)), top_k=2)[0] == pytest.approx([0.5, 0.5, 0, 0])


def test_repetition_penalty() -> None:
    logits, text = np.array([[2.0, -2.0, 1.0, -1.0]] * 2), np.array([[0, 1, 1], [2, 2, 2]])
    assert penalized(logits, text, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0], [2.0, -2.0, 0.5, -1.0]]
    assert penalized(logits, text, 1.0) is logits


@given(st.integers(0, 99))
def test_tokens_are_drawn_as_often_as_they_are_probable(seed: int) -> None:
    """The count of a token among n draws is within 5 standard deviations √(n p (1 − p)) of n p, and 0 where p is."""
    n, logits = 2000, np.log([0.5, 0.25, 0.15, 0.1])
    draw = _Draw(1.0, 3, None, 1.0, eg.Generator(seed))
    counts = np.bincount(draw(np.tile(logits, (n, 1)), np.zeros((n, 1), int)), minlength=4)
    p = np.array([0.5, 0.25, 0.15]) / 0.9
    assert counts[3] == 0 and (np.abs(counts[:3] - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full((5000, 6), -math.inf)
    logits[:, [1, 4]] = 0.0
    assert set(_Draw(1.0, None, None, 1.0, eg.Generator(0))(logits, np.zeros((5000, 1), int))) == {1, 4}


# ── texts ─────────────────────────────────────────────────────────────────────────────────────────────

def test_greedy_takes_the_largest_logit_of_the_full_forward(model: Transformer) -> None:
    text = [1, 2, 3]
    for token in model.generate(text, 10, temperature=0):
        with eg.no_grad():
            assert token == int(model(eg.tensor([text])).numpy()[0, -1].argmax())
        text = [*text, token]
    assert len(text) == 13


def test_a_text_is_a_function_of_its_generator(model: Transformer) -> None:
    def text(seed: int, **options: Any) -> list[int]:
        return list(model.generate([1, 2], 20, generator=eg.Generator(seed), **options))

    assert text(5) == text(5) != text(6)
    assert text(5, top_k=1) == list(model.generate([1, 2], 20, temperature=0))
    with eg.seed(5):
        assert list(model.generate([1, 2], 20)) == text(5)


def test_a_sample_is_the_same_alone_and_among_others(model: Transformer) -> None:
    together = list(model.generate([4], 25, num_samples=4, generator=eg.Generator(1)))
    assert all(len(step) == 4 for step in together)
    alone = list(model.generate([4], 25, generator=eg.Generator(1)))
    assert [step[0] for step in together] == alone
    assert len({tuple(step[i] for step in together) for i in range(4)}) == 4


def test_prompts_may_be_lists_arrays_and_tensors(model: Transformer) -> None:
    texts = [list(model.generate(prompt, 5, temperature=0)) for prompt in (
        [3, 1], np.array([3, 1]), np.array([[3, 1]], np.int32), eg.tensor([3, 1]), eg.tensor([[3, 1]]))]
    assert all(text == texts[0] for text in texts) and all(type(token) is int for token in texts[0])


def test_tokens_come_one_at_a_time_and_the_callers_mode_is_kept(model: Transformer,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *a, **k: calls.append(a[0].shape) or decode(*a, **k))
    stream = model.generate([1, 2, 3], 5)
    assert calls == []
    next(stream)
    assert calls == [(1, 3)]
    assert (eg.ones(1, requires_grad=True) * 2).requires_grad  # no_grad did not leak out of the generator
    next(stream)
    assert calls == [(1, 3), (1, 1)]


def test_stop_ends_a_sample_after_its_token(model: Transformer) -> None:
    free = list(model.generate([1, 2], 30, generator=eg.Generator(3)))
    stop = free[4]
    assert list(model.generate([1, 2], 30, generator=eg.Generator(3), stop=stop)) == free[:free.index(stop) + 1]
    steps = list(model.generate([1, 2], 200, num_samples=3, generator=eg.Generator(3), stop={stop, 0}))
    assert len(steps) < 200 and any(token is not None for token in steps[-1])
    for i in range(3):
        text = [step[i] for step in steps]
        end = next(j for j, token in enumerate(text) if token in (stop, 0))
        assert all(token is None for token in text[end + 1:])


def test_a_repetition_penalty_makes_texts_less_repetitive(model: Transformer) -> None:
    plain = list(model.generate([1], 12, temperature=0))
    varied = list(model.generate([1], 12, temperature=0, repetition_penalty=1e6))
    assert len(set(varied)) > len(set(plain))


def test_a_full_context_goes_on_from_its_last_half(model: Transformer) -> None:
    """Context 16: predictions 1 to 14 see the whole text of 3 + n tokens, then it is cut to 8, and grows again."""
    text = [1, 2, 3]
    begin = 0
    for token in model.generate(text, 40, temperature=0):
        if len(text) - begin > 16:
            begin = len(text) - 8
        with eg.no_grad():
            assert token == int(model(eg.tensor([text[begin:]])).numpy()[0, -1].argmax())
        text = [*text, token]
    assert len(text) == 43


@pytest.mark.parametrize("kind", ["original", "llama"])
def test_an_encoder_decoder_continues_what_it_translates(kind: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "context_length": 8, "layers": 2, "heads": 2, "width": 8,
                             "dropout": 0.0, "kind": "encoder_decoder"}
    with eg.seed(0):
        model = Transformer(getattr(TransformerConfig, kind)(**sizes)).eval()
        with eg.no_grad():
            for p in model.parameters():
                p += eg.randn(*p.shape, std=0.3)
    source, lengths = eg.tensor([[3, 4, 5, 0]]), eg.tensor([3])
    text = [1]
    for token in model.generate(text, 7, temperature=0, source=source, source_lengths=lengths):
        with eg.no_grad():
            logits = model(eg.tensor([text]), source, source_lengths=lengths).numpy()
        assert token == int(logits[0, -1].argmax())
        text = [*text, token]

    def samples(padding: int) -> list[Any]:
        padded = eg.tensor([[3, 4, 5, padding]])
        return list(model.generate([1], 20, num_samples=4, source=padded, source_lengths=lengths,
                                   generator=eg.Generator(0)))

    assert samples(0) == samples(9) and len(samples(0)) == 20
    for wrong in (None, eg.tensor([3, 4]), eg.tensor([[3], [4]])):
        with pytest.raises(ValueError, match=r"generate: source is .*, expected \(1, source time\) for an encoder-dec"):
            model.generate([1], 1, source=wrong)


@pytest.mark.parametrize("changes, message", [
    ({"prompt": []}, r"the prompt's length is 0, expected 1 to context_length = 16"),
    ({"prompt": [1] * 17}, "the prompt's length is 17"),
    ({"prompt": [1.5]}, r"the prompt is float64 \(1,\), expected integers"),
    ({"prompt": [[1], [2]]}, r"the prompt is int64 \(2, 1\)"),
    ({"prompt": [13]}, r"holds tokens from 13 to 13, expected \[0, 13\)"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1, expected a whole number of at least 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
    ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
    ({"stop": "x"}, "stop is 'x', expected a token or several"),
    ({"stop": ["3"]}, "stop is .*'3'.*, expected a token or several"),
    ({"stop": None}, "stop is None, expected a token or several"),
    ({"temperature": -0.1}, "temperature is -0.1, expected a number of at least 0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"top_k": 0}, "top_k is 0, expected a whole number of at least 1, or None"),
    ({"top_p": 0.0}, r"top_p is 0.0, expected a number in \(0, 1\], or None"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a positive number"),
    ({"num_samples": 0}, "num_samples is 0"),
    ({"source": eg.tensor([[1]])}, r"source is \(1, 1\), expected .* None for a decoder"),
])
def test_wrong_arguments_are_refused_at_the_call(model: Transformer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="generate: .*" + message):
        model.generate(**{"prompt": [1], "max_new_tokens": 1, **changes})


def test_models_that_cannot_generate_say_so(model: Transformer) -> None:
    sizes: dict[str, Any] = {"vocab_size": 5, "context_length": 8, "layers": 1, "heads": 2, "width": 8}
    with pytest.raises(ValueError, match="a model of kind 'encoder' does not generate"):
        Transformer(TransformerConfig.bert(**sizes)).eval().generate([1], 1)
    with pytest.raises(ValueError, match=r"model.training is True, expected False: call model.eval\(\) first"):
        Transformer(TransformerConfig.gpt2(**sizes, dropout=0.1)).generate([1], 1)
    broken = Transformer(TransformerConfig.gpt2(**sizes))
    with eg.no_grad():
        broken.embedding.weight[0] = math.nan
    with pytest.raises(ValueError, match="generate: the largest logit is nan"):
        next(broken.generate([0], 1))
    with pytest.raises(ValueError, match="generate: the largest logit is inf, expected a finite number"):
        next(model.generate(list(range(13)), 1, repetition_penalty=1e-320))
    assert list(model.generate([1], 0)) == []


# ── token by token, as a program ──────────────────────────────────────────────────────────────────────

KINDS: list[dict[str, Any]] = [
    {"positions": "learned", "norm": "layer_norm", "activation": "gelu_tanh", "tie_weights": True},
    {"positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "kv_heads": 1, "bias": False},
    {"kind": "encoder_decoder", "positions": "sinusoidal"}]


def decoder(kind: dict[str, Any], form: str | None) -> Transformer:
    with eg.seed(1):
        made = Transformer(vocab_size=VOCABULARY, context_length=16, layers=2, heads=2, width=32, **kind).eval()
    return made if form is None else made.for_inference(form)


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("form", [None, "packed", "bf16", "q4_0"])
@pytest.mark.parametrize("kind", KINDS, ids=["gpt2", "llama", "encoder_decoder"])
@pytest.mark.parametrize("samples", [1, 3])
def test_decoding_has_the_bits_of_the_model(kind: dict[str, Any], form: str | None, samples: int) -> None:
    model, source = decoder(kind, form), None
    with eg.no_grad():
        if model.encoder is not None:
            source = eg.repeat(model.encode(eg.tensor([[3, 1, 4]])), samples, 0)
        caches = [model.make_cache(samples, source_length=3 if source is not None else 0) for _ in range(2)]
        decoding = Decoding(model, caches[0], source)
        rng = np.random.default_rng(0)
        for step, length in enumerate([4, *[1] * 12, 3, *[1] * 8]):
            if caches[0].length + length > 16:
                for cache in caches:
                    cache.clear()
            tokens = eg.tensor(rng.integers(0, VOCABULARY, (samples, length)))
            with eg.autocast("bfloat16" if step > 17 else "float32"):
                found = decoding.logits(tokens)
                want = model.logits(model.decode(tokens, source, cache=caches[1])[:, -1])
            assert found.numpy().tobytes() == want.numpy().tobytes() and caches[0].length == caches[1].length
            if step == 12:
                assert decoding._program is not None
        for a, b in zip(caches[0].layers, caches[1].layers):
            filled = slice(None), slice(None), slice(caches[0].length)
            assert a.own.keys.numpy()[filled].tobytes() == b.own.keys.numpy()[filled].tobytes()


@pytest.mark.usefixtures("unwatched")
def test_decoding_notices_other_parameters() -> None:
    model = decoder(KINDS[1], None)
    decoding = Decoding(model, model.make_cache(1))
    other = model.make_cache(1)
    with eg.no_grad():
        for step in range(16):
            if step == 10:
                for p in model.parameters():
                    p.array = (p * 1.5).array
            tokens = eg.tensor([[step % VOCABULARY]])
            want = model.logits(model.decode(tokens, cache=other)[:, -1])
            assert decoding.logits(tokens).numpy().tobytes() == want.numpy().tobytes()
    assert decoding._program is not None


@pytest.mark.usefixtures("unwatched")
def test_decoding_gives_up_where_steps_are_unequal(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "goes_on", lambda self, *others: False)
    decoding, other = Decoding(model, model.make_cache(1)), model.make_cache(1)
    with eg.no_grad():
        for step in range(16):
            tokens = eg.tensor([[step % VOCABULARY]])
            want = model.logits(model.decode(tokens, cache=other)[:, -1])
            assert decoding.logits(tokens).numpy().tobytes() == want.numpy().tobytes()
    assert decoding._program is None and decoding._attempts == ATTEMPTS + 1
