"""The same GPT in PyTorch and in JAX, written as their users write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.benchmarks.train import Size


def torch_model(torch: Any, size: Size) -> Any:
    nn: Any = torch.nn
    width = size.width

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            batch, time = x.shape[:2]
            q, k, v = (part.view(batch, time, size.heads, width // size.heads).transpose(1, 2)
                       for part in self.qkv(self.norm1(x)).split(width, 2))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(size.vocabulary, width), nn.Embedding(size.time, width)
            self.blocks = nn.ModuleList(Block() for _ in range(size.layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, size.vocabulary, bias=False)
            for p in self.parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=0.02)
            if size.tied:
                self.head.weight = self.tokens.weight

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.tokens(tokens) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            logits = self.head(self.norm(x))
            return nn.functional.cross_entropy(logits.view(-1, size.vocabulary), targets.view(-1))

    return Gpt()


def torch_step(torch: Any, size: Size, lr: float, compiled: bool = False) -> Callable[[], object]:
    model = torch_model(torch, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    tokens, targets = (torch.from_numpy(x) for x in size.tokens())
    run = torch.compile(model) if compiled else model

    def step() -> object:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=size.dtype == "bfloat16"):
            loss = run(tokens, targets)
        loss.backward()
        optimizer.step()
        return loss

    return step


def jax_parameters(jax: Any, size: Size) -> dict[str, Any]:
    np, width = jax.numpy, size.width
    keys = iter(jax.random.split(jax.random.key(0), 4 + 4 * size.layers))

    def normal(*shape: int) -> Any:
        return 0.02 * jax.random.normal(next(keys), shape)

    def norm() -> dict[str, Any]:
        return {"w": np.ones(width), "b": np.zeros(width)}

    def linear(inputs: int, outputs: int) -> dict[str, Any]:
        return {"w": normal(inputs, outputs), "b": np.zeros(outputs)}

    blocks = [{"norm1": norm(), "norm2": norm(), "qkv": linear(width, 3 * width), "out": linear(width, width),
               "up": linear(width, 4 * width), "down": linear(4 * width, width)} for _ in range(size.layers)]
    found = {"tokens": normal(size.vocabulary, width), "positions": normal(size.time, width), "blocks": blocks,
             "norm": norm()}
    return found if size.tied else {**found, "head": normal(width, size.vocabulary)}


def jax_loss(jax: Any, size: Size, p: dict[str, Any], tokens: Any, targets: Any) -> Any:
    np = jax.numpy

    def norm(p: dict[str, Any], x: Any) -> Any:
        d = x - x.mean(-1, keepdims=True)
        return p["w"] * d * jax.lax.rsqrt((d * d).mean(-1, keepdims=True) + 1e-5) + p["b"]

    def linear(p: dict[str, Any], x: Any) -> Any:
        return x @ p["w"] + p["b"]

    batch, time = tokens.shape
    d = size.width // size.heads
    visible = np.tril(np.ones((time, time), bool))
    x = p["tokens"][tokens] + p["positions"]
    for block in p["blocks"]:
        q, k, v = (part.reshape(batch, time, size.heads, d).transpose(0, 2, 1, 3)
                   for part in np.split(linear(block["qkv"], norm(block["norm1"], x)), 3, -1))
        scores = np.where(visible, q @ k.swapaxes(-1, -2) / math.sqrt(d), -np.inf)
        y = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + linear(block["out"], y)
        x = x + linear(block["down"], jax.nn.gelu(linear(block["up"], norm(block["norm2"], x)), approximate=True))
    logits = norm(p["norm"], x) @ (p["tokens"].T if size.tied else p["head"])
    return -np.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).mean()


def jax_step(jax: Any, size: Size, lr: float) -> Callable[[], object]:
    np, tree = jax.numpy, jax.tree_util
    beta1, beta2, eps, decay = 0.9, 0.999, 1e-8, 0.01
    tokens, targets = (np.asarray(x) for x in size.tokens())

    def step(state: Any) -> Any:
        p, m, v, t = state
        loss, g = jax.value_and_grad(lambda p: jax_loss(jax, size, p, tokens, targets))(p)
        m = tree.tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, m, g)
        v = tree.tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, v, g)
        p = tree.tree_map(lambda p, m, v: p * (1 - lr * decay) - lr / (1 - beta1**t) * m
                          / (np.sqrt(v / (1 - beta2**t)) + eps), p, m, v)
        return loss, (p, m, v, t + 1)

    run = jax.jit(step, donate_argnums=0)
    p = jax_parameters(jax, size)
    held = [(p, tree.tree_map(np.zeros_like, p), tree.tree_map(np.zeros_like, p), np.float32(1))]

    def once() -> object:
        loss, held[0] = run(held[0])
        return loss.block_until_ready()

    return once
