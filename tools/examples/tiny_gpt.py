"""A small GPT that learns, from its own source, to go on writing it."""

from pathlib import Path

import numpy as np

import engine as eg
from engine import models, optim

text = Path(__file__).read_bytes()
data = np.frombuffer(text, np.uint8).astype(np.int64)
context, batch = 64, 8

with eg.seed(0):
    model = models.Transformer(models.TransformerConfig(
        vocab_size=256, context_length=context, layers=2, heads=2, width=64,
        positions="rotary", norm="layer_norm", activation="gelu", tie_weights=True))
print(f"{sum(p.size for p in model.parameters()):,} parameters, {len(data):,} bytes of text")

optimizer = optim.AdamW(model.parameters(), lr=3e-3)
random = np.random.default_rng(0)
for step in range(201):
    starts = random.integers(0, len(data) - context, batch)
    windows = np.stack([data[s:s + context + 1] for s in starts])
    logits = model(eg.tensor(windows[:, :-1]))
    loss = eg.cross_entropy(logits, eg.tensor(windows[:, 1:]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(clip_norm=1.0)
    if step % 50 == 0:
        print(f"step {step:3d}  {loss.item() / np.log(2):.3f} bits per byte")

model.eval()
prompt = b"import "
tokens = model.generate(eg.tensor(list(prompt)), 120, temperature=0.5, generator=eg.Generator(1))
print((prompt + bytes(int(token) for token in tokens)).decode(errors="replace"))
assert loss.item() / np.log(2) < 2.0
