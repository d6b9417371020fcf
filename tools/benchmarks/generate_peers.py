"""The same generation in PyTorch: the model of train_peers.py with keys and values kept in tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.benchmarks.train_peers import torch_model

if TYPE_CHECKING:
    from tools.benchmarks.train import Size


def torch_runs(torch: Any, size: Size, prompt: np.ndarray, new: int,
               form: str = "packed") -> dict[str, Callable[[], object]]:
    """form: "packed", all is float32; "bf16", all is bfloat16; else linear layers have weights of 8 bits, and round
    their inputs to 8 bits as they come."""
    model, functional, width = torch_model(torch, size).eval(), torch.nn.functional, size.width
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    if form in ("packed", "bf16"):
        model = model.to(dtype)
    else:
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    kept = [torch.zeros(2, 1, size.heads, size.time, width // size.heads, dtype=dtype) for _ in model.blocks]
    tokens, length = torch.from_numpy(prompt), prompt.shape[1]

    def step(tokens: Any, start: int) -> Any:
        """The most probable token after these, which stand at positions from `start` on."""
        stop = start + tokens.shape[1]
        x = model.tokens(tokens) + model.positions.weight[start:stop]
        for block, (keys, values) in zip(model.blocks, kept):
            q, k, v = (part.view(1, -1, size.heads, width // size.heads).transpose(1, 2)
                       for part in block.qkv(block.norm1(x)).split(width, 2))
            keys[:, :, start:stop], values[:, :, start:stop] = k, v
            y = functional.scaled_dot_product_attention(q, keys[:, :, :stop], values[:, :, :stop], is_causal=start == 0)
            x = x + block.out(y.transpose(1, 2).reshape(1, -1, width))
            x = x + block.down(functional.gelu(block.up(block.norm2(x)), approximate="tanh"))
        return model.head(model.norm(x[:, -1:])).argmax(-1)

    def prefill() -> object:
        with torch.no_grad():
            return step(tokens, 0)

    def decode() -> object:
        with torch.no_grad():
            token = tokens[:, :1]
            for at in range(length, length + new):
                token = step(token, at)
            return token

    prefill()
    return {"prefill": prefill, "decode": decode}
