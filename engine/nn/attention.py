"""Multi-head attention, and the cache of keys and values that makes generation cheap."""

from __future__ import annotations

import math
from typing import Any

from engine import ops
from engine.autograd import is_grad_enabled
from engine.backend import Array, get_backend, refuse
from engine.dtypes import DType, float32
from engine.nn.layers import Linear, fusible
from engine.nn.module import Module, Parameter
from engine.ops.attention import attend, attend_joined, attend_kept, turned
from engine.ops.matmul import joined_linear
from engine.tensor import Tensor

GROWS = "KeyValueCache.append"


class KeyValueCache:
    """The keys and values of up to `capacity` positions, (batch, kv_heads, capacity, head width) each, `length` filled.

    A decoder that makes one token at a time computes the keys and values of that token only, and finds those of all
    earlier ones here. The memory is taken once; append() writes into it and gives views of what is filled.
    """

    def __init__(self, batch: int, kv_heads: int, capacity: int, head_width: int, dtype: DType = float32,
                 device: str | None = None):
        self.length, self.capacity = 0, capacity
        self.keys = ops.zeros(batch, kv_heads, capacity, head_width, dtype=dtype, device=device)
        self.values = ops.zeros_like(self.keys)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (batch, kv_heads, T, head width) keys and values; returns those of all positions so far.

        Raises ValueError when they do not fit, and RuntimeError while recording: no gradient flows through a cache.
        """
        if is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("KeyValueCache: no gradient flows through a cache; use it under eg.no_grad()")
        for new, kept in ((key, self.keys), (value, self.values)):
            if new.device != kept.device:
                raise ValueError(f"KeyValueCache: got {new.dtype} on {new.device}, expected {kept.dtype} on "
                                 f"{kept.device}")
        self._write(key.array, value.array)
        return self.filled()

    def extend(self, key: Array, value: Array) -> tuple[Array, Array]:
        """append() for arrays of the cache's device, (batch, T, kv_heads, head width); gives them in that order too."""
        self._write(*(new.view(new.data.transpose(0, 2, 1, 3)) for new in (key, value)))
        keys, values = (kept.array.view(kept.array.data[:, :, :self.length].transpose(0, 2, 1, 3))
                        for kept in (self.keys, self.values))
        return keys, values

    def _write(self, key: Array, value: Array) -> None:
        refuse(GROWS)
        (batch, heads, _, width), time = self.keys.shape, key.shape[2]
        stop, expected = self.length + time, (batch, heads, time, width)
        for what, kept, new in (("keys", self.keys, key), ("values", self.values, value)):
            if new.shape != expected or stop > self.capacity:
                raise ValueError(f"KeyValueCache: got {what} {new.shape} after {self.length} positions, expected "
                                 f"{expected} and at most {self.capacity} positions")
            if new.dtype is not kept.dtype:
                raise ValueError(f"KeyValueCache: got {new.dtype} on {kept.device}, expected {kept.dtype} on "
                                 f"{kept.device}")
            k, target = get_backend(kept.device), kept.array.view(kept.array.data[:, :, self.length:stop])
            k.copy(target, new, k.layout(target, new))
            kept.array.storage.version += 1
        self.length = stop

    def filled(self) -> tuple[Tensor, Tensor]:
        """Views of the keys and values of the positions so far."""
        keys, values = (Tensor(kept.array.view(kept.array.data[:, :, :self.length]), kept.device)
                        for kept in (self.keys, self.values))
        return keys, values


class MultiHeadAttention(Module):
    """Attention of several heads. Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2.

        head_i = softmax(Q_i K_iᵀ / √d) V_i,   Q = W_q x, K = W_k c, V = W_v c,   y = W_o [head_1 ... head_h]

    for queries from x (batch, T, width) and keys and values from c: x itself, or `context` (batch, S, width) in cross
    attention. d = width / heads. With fewer kv_heads than heads, several query heads share one head of keys and
    values (Ainslie et al. 2023, arXiv:2305.13245).

    dropout: probability with which an attention weight is dropped in training
    std, output_std: of the initial weights of W_q, W_k, W_v and of W_o, as in Linear
    """

    def __init__(self, width: int, heads: int, kv_heads: int | None = None, bias: bool = True, dropout: float = 0.0, *,
                 std: float | None = None, output_std: float | None = None):
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads or heads, dropout
        if heads < 1 or width % heads:
            raise ValueError(f"MultiHeadAttention: width is {width} and heads {heads}, expected a multiple")
        if heads % self.kv_heads:
            raise ValueError(f"MultiHeadAttention: heads is {heads} and kv_heads {kv_heads}, expected a multiple")
        self.head_width = width // heads
        inner = self.kv_heads * self.head_width
        self.query = Linear(width, width, bias, std=std)
        self.key = Linear(width, inner, bias, std=std)
        self.value = Linear(width, inner, bias, std=std)
        self.output = Linear(width, width, bias, std=output_std)
        self.joined: Linear | None = None

    def join(self) -> None:
        """Put copies of W_q, W_k and W_v one above the other, in place of the three modules: one product for all.

        For self-attention, and for inference: state dicts have the three. Where one of them is a map of its own kind,
        or has a bias and the others none, all stay as they are.
        """
        if not self._one_product():
            return
        parts, self.joined = (self.query, self.key, self.value), self.query.twin()
        self.joined.weight = Parameter(ops.concat([part.weight for part in parts]))
        biases = [part.bias for part in parts if part.bias is not None]
        if biases:
            self.joined.bias = Parameter(ops.concat(biases))
        for name in ("query", "key", "value"):
            delattr(self, name)

    def forward(self, x: Tensor, context: Tensor | None = None, *, causal: bool = False, mask: Tensor | None = None,
                lengths: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None,
                cache: KeyValueCache | None = None) -> Tensor:
        """y (batch, T, width).

        causal:  position t sees positions up to its own (with a cache: those before the cached ones' end too)
        mask:    broadcasts to (batch, heads, T, S): bool, true where a query may look, or floating and added
        lengths: (batch,), how many keys of each sequence are real
        rotary:  cosine and sine (T, d/2) by which queries and keys are turned (rope_table); self-attention only
        cache:   keys and values of earlier positions; these are added. In cross attention it is filled by the first
                 call, and later calls do not look at `context` again
        """
        if (self.joined is not None and cache is not None and context is None and mask is None
                and self._only_read(x, cache, lengths)):
            return self.output(attend_kept(self.joined(x), self.heads, self.kv_heads, cache.extend, rotary,
                                           causal=causal, lengths=lengths))
        options: dict[str, Any] = {"causal": causal, "lengths": lengths,
                                   "dropout": self.dropout if self.training else 0.0}
        if context is None and rotary is None and cache is None and is_grad_enabled() and self._one_product():
            maps = (self.query, self.key, self.value)
            joined = joined_linear(x, *[each.weight for each in maps], *[each.bias for each in maps])
            y = attend_joined(self._heads(joined, self.heads + 2 * self.kv_heads), self.kv_heads, mask, **options)
        else:
            query, key, value = self._operands(x, context, rotary, cache)
            y = attend(query, key, value, mask, scale=1 / math.sqrt(self.head_width), **options)
        return self.output(y.reshape(*x.shape[:2], self.heads * self.head_width))

    def _one_product(self) -> bool:
        """Whether W_q, W_k and W_v may be multiplied as one matrix, put together each time: it pays in training."""
        if self.joined is not None:
            return False
        maps = (self.query, self.key, self.value)
        return fusible(*maps) and len({each.bias is None for each in maps}) == 1

    def _only_read(self, x: Tensor, cache: KeyValueCache, lengths: Tensor | None) -> bool:
        """Whether a token may take the short way: nothing is recorded or dropped, attention has its kernel, and what
        comes with x fits it. The long way says what does not fit."""
        fits = cache.keys.device == x.device and (lengths is None or (
            lengths.shape == x.shape[:1] and lengths.device == x.device))
        return (fits and not is_grad_enabled() and not (self.training and self.dropout)
                and get_backend(x.device).has_fused("attention"))

    def _operands(self, x: Tensor, context: Tensor | None, rotary: tuple[Tensor, Tensor] | None,
                  cache: KeyValueCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, length, its heads, d); those of the cache among them."""
        if context is not None and cache is not None and cache.length:
            key, value = (turned(x) for x in cache.filled())
            return self._heads(self.query(x), self.heads), key, value
        query, key, value = self._projected(x, context)
        if rotary is not None and context is None:
            query, key = (turned(ops.rope(turned(x), *rotary)) for x in (query, key))
        if cache is not None:
            key, value = (turned(x) for x in cache.append(turned(key), turned(value)))
        return query, key, value

    def _projected(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from x, keys and values from x or the context, each (batch, length, its heads, d)."""
        if self.joined is not None:
            all_heads = self._heads(self.joined(x), self.heads + 2 * self.kv_heads)
            keys, values = self.heads, self.heads + self.kv_heads
            return all_heads[:, :, :keys], all_heads[:, :, keys:values], all_heads[:, :, values:]
        source = x if context is None else context
        return (self._heads(self.query(x), self.heads), self._heads(self.key(source), self.kv_heads),
                self._heads(self.value(source), self.kv_heads))

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """(batch, T, heads · d) as (batch, T, heads, d)."""
        return x.reshape(*x.shape[:2], heads, self.head_width)

    def extra_repr(self) -> str:
        return f"{self.heads} heads" + (f", {self.kv_heads} of keys and values" if self.kv_heads != self.heads else "")
