"""A small network that tells two interleaved half-moons apart."""

import numpy as np

import engine as eg
from engine import nn, optim


def moons(count: int, seed: int) -> tuple[eg.Tensor, eg.Tensor]:
    """Points (count, 2) on two noisy half-circles, and which of the two each lies on."""
    random = np.random.default_rng(seed)
    label = np.arange(count) % 2
    angle = random.uniform(0, np.pi, count)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points[label == 1] = [1.0, 0.5] - points[label == 1]
    return eg.tensor(points + random.normal(0, 0.1, (count, 2)), dtype=eg.float32), eg.tensor(label)


class Classifier(nn.Module):
    """Two hidden layers and a logit for each class."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: eg.Tensor) -> eg.Tensor:
        return self.last(eg.relu(self.second(eg.relu(self.first(x)))))


with eg.seed(0):
    model = Classifier()
optimizer = optim.Adam(model.parameters(), lr=0.01)
x, y = moons(1000, seed=1)

for step in range(201):
    loss = eg.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}")

x, y = moons(1000, seed=2)
with eg.no_grad():
    accuracy = np.mean(model(x).numpy().argmax(axis=1) == y.numpy())
print(f"{100 * accuracy:.1f} % of 1000 new points are right")
assert accuracy > 0.98
