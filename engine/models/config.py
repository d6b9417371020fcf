"""What a Transformer is made of: the choices, and the published models as sets of them."""

from __future__ import annotations

import math
import reprlib
from dataclasses import asdict, dataclass, fields
from typing import Any

CHOICES = {
    "kind": ("decoder", "encoder", "encoder_decoder"),
    "positions": ("learned", "sinusoidal", "rotary"),
    "norm": ("layer_norm", "rms_norm"),
    "activation": ("gelu", "gelu_tanh", "relu", "swiglu"),
}


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100


def shown(value: Any) -> str:
    """What came, for a line that says what was expected: short, whatever it is."""
    return _short.repr(value)


@dataclass(frozen=True)
class TransformerConfig:
    """The choices that make a Transformer. The defaults are those of GPT-2, small.

    vocab_size:     how many tokens there are
    context_length: how many positions the model can look at
    layers:         Transformer blocks; an encoder-decoder has as many in each of the two
    heads:          attention heads
    kv_heads:       heads of keys and values, a divisor of heads (default: heads)
    width:          features of a position, a multiple of heads
    hidden:         features inside the feed-forward (default: 4 · width; with "swiglu" 8/3 · width, which makes its
                    three matrices as large as the two of the others, rounded up to a multiple of 64)
    dropout:        probability for embeddings, attention weights and what each sublayer adds
    positions:      "learned", "sinusoidal" (Vaswani et al. 2017) or "rotary" (Su et al. 2021)
    norm:           "layer_norm" or "rms_norm"
    norm_first:     normalize before each sublayer (GPT, Llama) or after the sum (BERT, the original)
    norm_eps:       the norms' ε
    activation:     of the feed-forward: "gelu", "gelu_tanh", "relu" or "swiglu"
    bias:           whether linear maps and LayerNorms have one
    tie_weights:    whether the output layer is the embedding (Press, Wolf 2016, arXiv:1608.05859)
    embedding_norm: whether the embeddings are normalized (BERT)
    segments:       kinds of text that an encoder tells apart by an embedding each (BERT: 2, its two sentences)
    output_layer:   whether another layer and norm stand before the logits, which have a bias then (BERT)
    rotary_base:    the slowest rotation turns by about 1/rotary_base a position
    kind:           "decoder", "encoder" or "encoder_decoder"

    Raises ValueError with one line for choices that do not fit.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    layers: int = 12
    heads: int = 12
    kv_heads: int = 0
    width: int = 768
    hidden: int = 0
    dropout: float = 0.0
    positions: str = "learned"
    norm: str = "layer_norm"
    norm_first: bool = True
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    bias: bool = True
    tie_weights: bool = True
    embedding_norm: bool = False
    segments: int = 0
    output_layer: bool = False
    rotary_base: float = 10000.0
    kind: str = "decoder"

    def __post_init__(self) -> None:
        self._check_types()
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.hidden:
            hidden = -(-8 * self.width // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * self.width
            object.__setattr__(self, "hidden", hidden)
        for name in ("vocab_size", "context_length", "layers", "heads", "kv_heads", "width", "hidden"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"TransformerConfig: {name} is {shown(value)}, expected a whole number of at least 1")
        if self.segments < 0 or (self.segments and self.kind != "encoder"):
            raise ValueError(f"TransformerConfig: segments is {shown(self.segments)} for kind {shown(self.kind)}, "
                             "expected 0, or for an 'encoder' a whole number of at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"TransformerConfig: {name} is {shown(getattr(self, name))}, "
                                 f"expected one of {', '.join(choices)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"TransformerConfig: dropout is {shown(self.dropout)}, expected a number in [0, 1)")
        for name in ("norm_eps", "rotary_base"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"TransformerConfig: {name} is {shown(value)}, expected a positive number")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"TransformerConfig: width {self.width}, heads {self.heads} and kv_heads {self.kv_heads}: "
                             "expected each to be a multiple of the next")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"TransformerConfig: a head has {self.width // self.heads} features (width / heads), "
                             "expected an even number, since rotary positions turn them in pairs")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"TransformerConfig: width is {self.width}, expected an even number for sinusoidal "
                             "positions")

    def _check_types(self) -> None:
        kinds: dict[str, Any] = {
            "int": (int, "a whole number"), "float": ((int, float), "a number"), "bool": (bool, "true or false"),
            "str": (str, "a word")}
        for field in fields(self):
            value, (kind, words) = getattr(self, field.name), kinds[str(field.type)]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"TransformerConfig: {field.name} is {shown(value)}, expected {words}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def matrix_parameters(self) -> int:
        """How many numbers the matrices and tables have that a model cannot be without: nearly all of its parameters.

        Known before the model is made, so that a file can be held against it before memory is taken.
        """
        stacks = 2 if self.kind == "encoder_decoder" else 1
        table = self.vocab_size + (self.context_length if self.positions == "learned" else 0) + self.segments
        return self.width * (table + stacks * self.layers * 2 * (self.width + self.hidden))

    def asdict(self) -> dict[str, Any]:
        """The choices as a dict; TransformerConfig(**config.asdict()) is the same again."""
        return asdict(self)

    # ── published models ────────────────────────────────────────────────────────────────────────────

    @classmethod
    def gpt2(cls, **changes: Any) -> TransformerConfig:
        """GPT-2 small, 124 M parameters. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""
        return cls(**changes)

    @classmethod
    def llama(cls, **changes: Any) -> TransformerConfig:
        """Llama 2, 7 B parameters. Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288."""
        preset: dict[str, Any] = {
            "vocab_size": 32000, "context_length": 4096, "layers": 32, "heads": 32, "width": 4096,
            "positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "bias": False, "tie_weights": False}
        if not changes.keys() & {"width", "hidden"}:
            preset["hidden"] = 11008
        return cls(**{**preset, **changes})

    @classmethod
    def bert(cls, **changes: Any) -> TransformerConfig:
        """BERT base, 110 M parameters, as it predicts masked tokens. Devlin et al. 2018, arXiv:1810.04805."""
        preset: dict[str, Any] = {
            "kind": "encoder", "vocab_size": 30522, "context_length": 512, "layers": 12, "heads": 12, "width": 768,
            "norm_first": False, "norm_eps": 1e-12, "activation": "gelu", "embedding_norm": True, "dropout": 0.1,
            "segments": 2, "output_layer": True}
        return cls(**{**preset, **changes})

    @classmethod
    def original(cls, **changes: Any) -> TransformerConfig:
        """The base model of Vaswani et al. 2017, arXiv:1706.03762, table 3: an encoder-decoder for translation."""
        preset: dict[str, Any] = {
            "kind": "encoder_decoder", "vocab_size": 37000, "context_length": 512, "layers": 6, "heads": 8,
            "width": 512, "positions": "sinusoidal", "norm_first": False, "activation": "relu", "dropout": 0.1}
        return cls(**{**preset, **changes})
