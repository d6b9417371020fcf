"""Linear regression by hand: a loss, its gradient, and the update written out. Compared with the exact solution."""

import numpy as np

import engine as eg

with eg.seed(0):
    x = eg.randn(500, 3)
    y = x @ eg.tensor([2.0, -3.4, 0.5]) + 4.2 + eg.randn(500, std=0.1)

w = eg.zeros(3, requires_grad=True)
b = eg.zeros(1, requires_grad=True)

for step in range(101):
    loss = eg.mean((x @ w + b - y) ** 2)
    if step % 20 == 0:
        print(f"step {step:3d}  mean squared error {loss.item():.5f}")
    dw, db = eg.grad(loss, [w, b])
    with eg.no_grad():
        w -= 0.1 * dw
        b -= 0.1 * db

design = np.column_stack([x.numpy(), np.ones(500)])
exact = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
found = np.append(w.numpy(), b.numpy())
print("found ", found.round(4))
print("exact ", exact.round(4))
assert np.allclose(found, exact, atol=1e-3)
