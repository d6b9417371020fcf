"""The Transformer: one set of blocks, and the choices between its published forms.

    tokens → embedding (+ positions) → blocks → norm → logits

A block is attention, then a feed-forward network, each around a residual connection. A decoder's attention is causal;
an encoder's sees the whole text; an encoder-decoder's decoder has a second attention in each block, over the encoder's
result. Which norm, which positions, which activation: TransformerConfig (config.py).

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from engine import ops
from engine.dtypes import DType
from engine.models.config import TransformerConfig
from engine.models.generation import generate
from engine.nn import (
    Dropout,
    Embedding,
    FeedForward,
    KeyValueCache,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    MultiHeadAttention,
    RMSNorm,
)
from engine.nn.layers import ACTIVATIONS
from engine.ops.stored import SCHEMES
from engine.tensor import Tensor, tensor

STD = 0.02  # of initial weights, as in GPT-2 and BERT


def make_norm(config: TransformerConfig) -> Module:
    if config.norm == "rms_norm":
        return RMSNorm(config.width, config.norm_eps)
    return LayerNorm(config.width, config.norm_eps, config.bias)


class LayerCache:
    """The keys and values of one block: of its own positions, and of the encoder's in a block with cross attention."""

    def __init__(self, own: KeyValueCache, cross: KeyValueCache | None):
        self.own, self.cross = own, cross


class Cache:
    """The keys and values of all blocks of a decoder; `length` positions are filled."""

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers

    @property
    def length(self) -> int:
        return self.layers[0].own.length

    @property
    def capacity(self) -> int:
        return self.layers[0].own.capacity

    def clear(self) -> None:
        """Forget the decoder's positions; what the encoder saw stays."""
        for layer in self.layers:
            layer.own.length = 0


class Block(Module):
    """One block. With f for each sublayer in turn (attention, cross attention if any, feed-forward):

        norm_first:  x ← x + dropout(f(norm(x)))       Xiong et al. 2020, arXiv:2002.04745
        else:        x ← norm(x + dropout(f(x)))       as published in 2017
    """

    def __init__(self, config: TransformerConfig, causal: bool, cross: bool):
        super().__init__()
        self.causal, self.norm_first = causal, config.norm_first
        sublayers = 3 if cross else 2
        # The residual stream is a sum over all sublayers: each adds 1/√(their number), so that the sum keeps its size.
        output_std = STD / math.sqrt(sublayers * config.layers)

        def attention() -> MultiHeadAttention:
            return MultiHeadAttention(config.width, config.heads, config.kv_heads, config.bias, config.dropout,
                                      std=STD, output_std=output_std)

        self.attention_norm = make_norm(config)
        self.attention = attention()
        self.cross_attention_norm = make_norm(config) if cross else None
        self.cross_attention = attention() if cross else None
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config.width, config.hidden, config.activation, config.bias,
                                        std=STD, output_std=output_std)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *, lengths: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None,
                context: Tensor | None = None, context_lengths: Tensor | None = None,
                cache: LayerCache | None = None) -> Tensor:
        """x (batch, time, width) to the same shape; the rest as in MultiHeadAttention."""
        x = self._residual(self.attention, self.attention_norm, x, causal=self.causal, lengths=lengths, rotary=rotary,
                           cache=cache and cache.own)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            x = self._residual(self.cross_attention, self.cross_attention_norm, x, context=context,
                               lengths=context_lengths, cache=cache and cache.cross)
        return self._residual(self.feed_forward, self.feed_forward_norm, x)

    def _residual(self, f: Module, norm: Module, x: Tensor, **inputs: Any) -> Tensor:
        if self.norm_first:
            return x + self.dropout(f(norm(x), **inputs))
        return norm(x + self.dropout(f(x, **inputs)))


class Stack(Module):
    """Blocks one after the other; with norm_first a last norm, since nothing normalizes the residual stream else."""

    def __init__(self, config: TransformerConfig, causal: bool, cross: bool = False):
        super().__init__()
        self.blocks = ModuleList(Block(config, causal, cross) for _ in range(config.layers))
        self.norm = make_norm(config) if config.norm_first else None

    def forward(self, x: Tensor, cache: Cache | None = None, **inputs: Any) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, cache=cache and cache.layers[i], **inputs)
        return x if self.norm is None else self.norm(x)


class OutputLayer(Module):
    """One more layer before the logits, h ← norm(f(W h + b)), and their bias. Devlin et al. 2018, arXiv:1810.04805."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.dense = Linear(config.width, config.width, config.bias, std=STD)
        self.norm = make_norm(config)
        self.bias = ops.zeros(config.vocab_size, requires_grad=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden)))


class Transformer(Module):
    """A Transformer over tokens. TransformerConfig names the choices; a config's fields may be given here instead.

    Initial weights: N(0, 0.02²), for what is added to the residual stream divided by √(its number of sublayers)
    (Radford et al. 2019, section 2.3); biases 0, gains 1. With sinusoidal positions, which have size 1, embeddings are
    N(0, 1/width) and multiplied by √width (Vaswani et al. 2017, section 3.4).
    """

    def __init__(self, config: TransformerConfig | None = None, **choices: Any):
        super().__init__()
        if config is not None and choices:
            raise TypeError("Transformer: got a config and fields of one, expected either")
        if not isinstance(config, (TransformerConfig, type(None))):
            raise TypeError(f"Transformer: config is {type(config).__name__}, expected a TransformerConfig, or fields "
                            "of one by name")
        self.config = config = config or TransformerConfig(**choices)
        sinusoidal = config.positions == "sinusoidal"
        self.embedding_scale = math.sqrt(config.width) if sinusoidal else 1.0
        self.embedding = Embedding(config.vocab_size, config.width, std=1 / self.embedding_scale if sinusoidal else STD)
        learned = config.positions == "learned"
        self.position_embedding = Embedding(config.context_length, config.width, std=STD) if learned else None
        self.segment_embedding = Embedding(config.segments, config.width, std=STD) if config.segments else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout)
        self.encoder = Stack(config, causal=False) if config.kind != "decoder" else None
        cross = config.kind == "encoder_decoder"
        self.decoder = Stack(config, causal=True, cross=cross) if config.kind != "encoder" else None
        self.output_layer = OutputLayer(config) if config.output_layer else None
        self.output = None if config.tie_weights else Linear(config.width, config.vocab_size, bias=False, std=STD)

    # ── forward ─────────────────────────────────────────────────────────────────────────────────────

    def forward(self, tokens: Tensor, source: Tensor | None = None, *, lengths: Tensor | None = None,
                source_lengths: Tensor | None = None, segments: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """Logits (batch, time, vocabulary): of a decoder for the token after each position, of an encoder for each.

        tokens:  (batch, time) integers in [0, vocab_size)
        source:  (batch, source time), what an encoder-decoder's encoder reads
        lengths, source_lengths: (batch,), how many tokens of each row are real (right padding)
        segments: (batch, time) integers in [0, config.segments), which kind of text each token is of (default: 0)
        cache:   of a decoder (make_cache): `tokens` go on after those that it holds, and are added
        Raises ValueError for more positions than context_length, and IndexError for a token that does not exist.
        """
        return self.logits(self.hidden(tokens, source, lengths=lengths, source_lengths=source_lengths,
                                       segments=segments, cache=cache))

    def hidden(self, tokens: Tensor, source: Tensor | None = None, *, lengths: Tensor | None = None,
               source_lengths: Tensor | None = None, segments: Tensor | None = None,
               cache: Cache | None = None) -> Tensor:
        """What the last block (and norm) gives, (batch, time, width): the arguments are forward's."""
        if (source is not None) != (self.config.kind == "encoder_decoder"):
            raise ValueError(f"Transformer: {'got' if source is not None else 'no'} source, which an encoder-decoder "
                             f"needs and no other; this model is of kind {self.config.kind!r}")
        if segments is not None and not self.config.segments:
            raise ValueError("Transformer: got segments, and this model's config has none")
        if source_lengths is not None and source is None:
            raise ValueError(f"Transformer: got source_lengths, which belong to a source; this model is of kind "
                             f"{self.config.kind!r}")
        if cache is not None and self.decoder is None:
            raise ValueError("Transformer: got a cache, and a model of kind 'encoder' has nothing to keep in one")
        if self.decoder is None:
            return self.encode(tokens, lengths, segments)
        return self.decode(tokens, None if source is None else self.encode(source, source_lengths), lengths=lengths,
                           context_lengths=source_lengths, cache=cache)

    def encode(self, tokens: Tensor, lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """The encoder's result, (batch, time, width)."""
        if self.encoder is None:
            raise ValueError("Transformer.encode: a model of kind 'decoder' has no encoder")
        return self.encoder(self.embed(tokens, 0, segments), lengths=lengths, rotary=self._rotary(0, tokens.shape[1]))

    def decode(self, tokens: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None,
               context_lengths: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The decoder's result, (batch, time, width), with the encoder's as `context` where there is one."""
        if self.decoder is None:
            raise ValueError("Transformer.decode: a model of kind 'encoder' has no decoder")
        if (context is not None) != (self.config.kind == "encoder_decoder"):
            raise ValueError(f"Transformer.decode: {'got' if context is not None else 'no'} context, which an "
                             f"encoder-decoder needs and no other; this model is of kind {self.config.kind!r}")
        start = cache.length if cache is not None else 0
        x = self.embed(tokens, start)
        return self.decoder(x, cache=cache, lengths=lengths, rotary=self._rotary(start, tokens.shape[1]),
                            context=context, context_lengths=context_lengths)

    def embed(self, tokens: Tensor, start: int = 0, segments: Tensor | None = None) -> Tensor:
        """Embeddings, positions and segments of tokens (batch, time), the first of which stands at position `start`."""
        if not isinstance(tokens, Tensor):
            raise TypeError(f"Transformer: tokens are {type(tokens).__name__}, expected a tensor (batch, time)")
        if tokens.ndim != 2 or tokens.dtype.is_floating:
            raise ValueError(f"Transformer: tokens are {tokens.dtype} {tokens.shape}, expected integers (batch, time)")
        stop = start + tokens.shape[1]
        if stop > self.config.context_length:
            raise ValueError(f"Transformer: the text has {stop} positions, expected at most context_length = "
                             f"{self.config.context_length}")
        x = self.embedding(tokens)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[start:stop]
        elif self.config.positions == "sinusoidal":
            table = sinusoids(self.config.context_length, self.config.width, x.dtype, x.device)
            x = x + table[start:stop]
        if self.segment_embedding is not None:
            kinds = self.segment_embedding
            x = x + (kinds.weight[0] if segments is None else kinds(segments))
        return self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens from hidden (..., width), by the matrix `output` or the embedding."""
        return ops.linear(*self._last_layer(hidden))

    def _last_layer(self, hidden: Tensor) -> tuple[Tensor, Any, Tensor | None]:
        """What is multiplied by which matrix, plus which bias, for the logits."""
        weight = self.embedding.weight if self.output is None else self.output.weight
        if self.output_layer is None:
            return hidden, weight, None
        return self.output_layer(hidden), weight, self.output_layer.bias

    def loss(self, tokens: Tensor, targets: Tensor, source: Tensor | None = None, *, reduction: str = "mean",
             lengths: Tensor | None = None, source_lengths: Tensor | None = None,
             segments: Tensor | None = None) -> Tensor:
        """Cross-entropy of the logits with targets (batch, time); a target of −100 counts for nothing.

        For a language model the targets are the tokens one place on: loss(text[:, :-1], text[:, 1:]).
        """
        hidden = self.hidden(tokens, source, lengths=lengths, source_lengths=source_lengths, segments=segments)
        x, weight, bias = self._last_layer(hidden)
        if not isinstance(weight, Tensor):  # stored, and the fused loss is for training: it takes tensors only
            return ops.cross_entropy(ops.linear(x, weight, bias), targets, reduction=reduction)
        return ops.linear_cross_entropy(x, weight, targets, bias, reduction=reduction)

    def _rotary(self, start: int, time: int) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rotary":
            return None
        cosine, sine = rotations(self.config.context_length, self.config.head_width, self.config.rotary_base,
                                 self._dtype(), self.embedding.weight.device)
        return cosine[start:start + time], sine[start:start + time]

    def _dtype(self) -> DType:
        """What it computes in: the type of a parameter, which a stored embedding is not."""
        return next(self.parameters()).dtype

    # ── generation ──────────────────────────────────────────────────────────────────────────────────

    def make_cache(self, batch: int, capacity: int | None = None, source_length: int = 0) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens (default: context_length), and of a source of
        `source_length` tokens for an encoder-decoder."""
        config, dtype, device = self.config, self._dtype(), self.embedding.weight.device

        def empty(positions: int) -> KeyValueCache:
            return KeyValueCache(batch, config.kv_heads, positions, config.head_width, dtype, device)

        cross = config.kind == "encoder_decoder"
        positions = config.context_length if capacity is None else capacity
        return Cache([LayerCache(empty(positions), empty(source_length) if cross else None)
                      for _ in range(config.layers)])

    def generate(self, prompt: Any, max_new_tokens: int, **options: Any) -> Iterator[Any]:
        """Continue a prompt, token by token: see models.generate, whose options these are."""
        return generate(self, prompt, max_new_tokens, **options)

    def for_inference(self, weights: str = "packed") -> Transformer:
        """A model of the same weights that is only read, in evaluation mode: it decodes at the speed of memory.

        weights: how it keeps the matrices of its linear layers, and the embedding where it is tied to the output:
                 "packed"   float, in panels: the same bits, and the same memory once the original model is let go
                 "bf16", "q8_0", "q4_1", "q4_0"   16, 8.5, 5 and 4.5 bits a weight (ops.quantize)

        The rest it shares with this model: norms, positions, most biases, and maps that are something else than a
        Linear; so do not train this one on while the other is in use. It cannot be trained, moved or saved.
        Raises ValueError for another form, and for layers whose inputs are no multiple of 32 where they are quantised.
        """
        if weights != "packed" and weights not in SCHEMES:
            raise ValueError(f"for_inference: weights is {weights!r}, expected one of packed, {', '.join(SCHEMES)}")
        self._refuse_stored("for_inference")
        made = self.twin().eval()
        tied = made.embedding if made.output is None else None
        for name, module in made.named_modules():  # a block before what it holds
            try:
                if isinstance(module, Block):
                    module.attention.join()
                elif type(module) is Linear or module is tied:
                    weight = module.weight
                    stored = ops.pack(weight) if weights == "packed" else ops.quantize(weight, weights)
                    module.register_stored("weight", stored)
            except ValueError as error:
                raise ValueError(f"for_inference: {name}: {error}") from None
        return made

    # ── sizes ───────────────────────────────────────────────────────────────────────────────────────

    def flops_per_token(self, time: int | None = None) -> float:
        """Floating-point operations of training on one token of a text of `time` tokens (default: context_length).

        Each weight of a matrix is multiplied and added once forward and twice backward: 6 N, with N the weights that
        take part in products (not those that are looked up). Attention adds 12 · width for each key that a query
        sees, in each attention: half the text on average where it is causal. Chowdhery et al. 2022,
        arXiv:2204.02311, appendix B.
        """
        config, time = self.config, time or self.config.context_length
        weights = sum(m.weight.size for _, m in self.named_modules() if isinstance(m, (Linear, Embedding)))
        looked_up = [self.embedding if self.output is not None else None, self.position_embedding,
                     self.segment_embedding]
        weights -= sum(table.weight.size for table in looked_up if table is not None)
        seen = {"decoder": (time + 1) / 2, "encoder": time, "encoder_decoder": (time + 1) / 2 + 2 * time}[config.kind]
        return 6.0 * weights + 12.0 * config.layers * config.width * seen


@lru_cache(maxsize=16)
def sinusoids(length: int, width: int, dtype: DType, device: str) -> Tensor:
    """P[t, 2i] = sin(t / 10000^(2i/width)), P[t, 2i + 1] = cos of the same. Vaswani et al. 2017, section 3.5."""
    angle = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, width, 2) / width))
    table = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, width)
    return tensor(table, dtype=dtype, device=device)


@lru_cache(maxsize=16)
def rotations(length: int, head_width: int, base: float, dtype: DType, device: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, shared by all models of one shape: nobody may write to them."""
    return ops.rope_table(length, head_width, base, dtype=dtype, device=device)
