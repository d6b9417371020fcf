"""A parameter server: 2 workers and 3 shards fit a small network, to the same bits as 1 worker and 1 shard would."""

import numpy as np

import engine as eg
from engine import nn, optim
from engine.sharder import Client, ParameterServer


class Network(nn.Module):
    """One hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        with eg.seed(0):
            self.first, self.last = nn.Linear(2, 32), nn.Linear(32, 1)

    def forward(self, x: eg.Tensor) -> eg.Tensor:
        return self.last(eg.tanh(self.first(x)))


def batch(step: int, index: int) -> tuple[eg.Tensor, eg.Tensor]:
    """Points and their heights on a saddle; the same for whoever computes microbatch `index` of `step`."""
    x = np.random.default_rng((step, index)).uniform(-1, 1, (64, 2)).astype("float32")
    return eg.tensor(x), eg.tensor(x[:, :1] ** 2 - x[:, 1:] ** 2)


def worker(client: Client) -> None:
    model = Network()
    while client.clock():  # wait for the next step
        client.pull(model)  # its parameters are now views of the server's memory
        for index in client.microbatches:  # this worker's share of the step
            x, y = batch(client.step, index)
            loss = ((model(x) - y) ** 2).sum()
            client.backward(index, model, loss, y.size)  # gradients leave while others are computed


def train(workers: int, shards: int) -> dict[str, np.ndarray]:
    server = ParameterServer(Network(), optim.AdamWRule(lr=1e-2), workers=workers, shards=shards, microbatches=4)
    for done in server.run(worker, clocks=100):
        if done.clock % 25 == 24:
            print(f"{workers} workers, {shards} shards, step {done.clock + 1:3d}: mean loss {done.mean_loss:.5f}")
    assert done.mean_loss < 0.01
    return server.parameters()


together, alone = train(workers=2, shards=3), train(workers=1, shards=1)
assert all(np.array_equal(together[name], alone[name]) for name in alone)
print("every bit of the parameters is the same")
