"""Predictions beside what others have published: inputs from the publication, the outcome simulated, both shown.

Nothing is fitted to the figure that is predicted. Where an input is not in the publication, its `note` says what was
taken instead, and why the prediction may be off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.sharder.messages import Push
from tools.planning.cost_model import Plan
from tools.planning.predict import predict, simulate

GIGABIT = 0.125e9
BACKWARD = 2 / 3  # the share of a step's work after which gradients begin to be there: backward is twice forward


@dataclass(frozen=True)
class Comparison:
    what: str
    predicted: float
    published: float
    unit: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


@dataclass(frozen=True)
class Case:
    name: str
    source: str
    note: str
    comparisons: Callable[[], Iterator[Comparison]]  # simulates


def images(parameters: float, instances: int, servers: int, batch: int, alone: float, gigabits: float,
           placement: str = "shared", overlap: float = BACKWARD) -> float:
    """Images a second of synchronous training. A worker is a machine, whose GPUs see `batch` images a step together and
    `alone` images a second without a network."""
    plan = Plan(parameters, instances, batch / alone, shards=servers, placement=placement, overlap=overlap,
                bandwidth=gigabits * GIGABIT, tokens=batch, optimizer="sgd")
    return predict(plan, clocks=5).rate


EC2 = {  # model: parameters, images of 8 GPUs a step, images/s of 8 GPUs, and by GPUs: (servers, images/s)
    "ResNet-50": (25.6e6, 512, 378, {16: (2, 751), 32: (4, 1388), 64: (8, 2744)}),
    "InceptionV3": (23.8e6, 512, 229, {16: (2, 459), 32: (4, 902), 64: (6, 1783)}),
    "ResNet-152": (60.2e6, 256, 146, {16: (2, 291), 32: (4, 565), 64: (4, 981)}),
}


def tensorflow_ec2() -> Iterator[Comparison]:
    for model, (parameters, batch, alone, measured) in EC2.items():
        for gpus, (servers, rate) in measured.items():
            yield Comparison(f"{model}, {gpus} GPUs on {gpus // 8} machines, {servers} servers",
                             images(parameters, gpus // 8, servers, batch, alone, 10), rate, "images/s")


NULL_STEPS = {100e6: (0.147, 0.613), 1e9: (1.01, 7.16)}  # bytes: seconds of 1 and of 100 workers


def tensorflow_null() -> Iterator[Comparison]:
    (small, (t1, _)), (large, (t2, _)) = NULL_STEPS.items()
    bandwidth = 2 * (large - small) / (t2 - t1)  # there and back
    fixed = t1 - 2 * small / bandwidth
    for size, (_, measured) in NULL_STEPS.items():
        plan = Plan(size / 4, 100, fixed, shards=16, bandwidth=bandwidth)
        yield Comparison(f"{size / 1e6:,.0f} MB, 100 workers, 16 servers", predict(plan, clocks=3).step, measured, "s")


def stragglers() -> Iterator[Comparison]:
    """When the 98th of 100 gradients is in, from when all are."""
    usual, limit, all_in, clocks = 1.5, 2.0, 0.30, 120
    late = 1 - all_in ** (1 / 100)  # of one worker
    _, history = simulate(Plan(1e3, 100, usual, straggler=f"stall:{late}:2").simulation(0), clocks, 0)
    arrivals: dict[int, list[float]] = {}
    for time, _, event, _ in history.events:
        if isinstance(event, Push):
            arrivals.setdefault(event.clock, []).append(time)
    began = [0.0, *history.committed_at]
    within = sum(arrivals[clock][97] - began[clock] < limit for clock in range(clocks))
    yield Comparison(f"steps whose 98th of 100 gradients is in within {limit:g} s", 100 * within / clocks, 80, "%")


def byteps_analysis() -> Iterator[Comparison]:
    size, n, bandwidth = 2.0**30, 8, 100 * GIGABIT
    for placement, published in (("shared", 2 * (n - 1) / n * size / bandwidth), ("dedicated", size / bandwidth)):
        plan = Plan(size / 4, n, 0.0, shards=n, placement=placement, bandwidth=bandwidth)
        yield Comparison(f"1 GiB, {n} workers, {n} {placement} servers, 100 Gbit/s", predict(plan, clocks=3).step,
                         published, "s")


def byteps_measured() -> Iterator[Comparison]:
    yield Comparison("ResNet-50, 2 machines of one V100, 2 servers, 21.1 Gbit/s",
                     images(25.6e6, 2, 2, 32, 335.1, 21.1, placement="dedicated"), 389, "images/s")


CASES = (
    Case("TensorFlow on EC2",
         "TensorFlow's performance guide, \"Benchmarks\", May 2017, p2.8xlarge, synthetic data; "
         "github.com/tensorflow/tensorflow, docs_src/performance/benchmarks.md",
         "Taken from it: batch, servers (on the workers' machines), images/s of one machine. Not in it: parameters "
         "(the models' papers), 10 Gbit/s (the machine's data sheet), and that gradients leave during backward, two "
         "thirds of the work. Sums and updates are taken to cost nothing.", tensorflow_ec2),
    Case("TensorFlow, null steps",
         "Abadi et al. 2016, \"TensorFlow: a system for large-scale machine learning\", OSDI, section 6.2 and figure 6",
         "Bandwidth and the fixed time of a step follow from the two published times of one worker; those of 100 are "
         "predicted. The cluster was shared with other jobs, which a plan knows nothing of.", tensorflow_null),
    Case("Stragglers",
         "Chen et al. 2016, \"Revisiting distributed synchronous SGD\", arXiv:1604.00981, section 3.1",
         "That all 100 gradients are in within 2 s in 30 % of the steps gives the chance of a late worker; the 98th is "
         "predicted, for workers that are late independently. They are not quite: some machines are slow for long.",
         stragglers),
    Case("BytePS, its analysis",
         "Jiang et al. 2020, \"A unified architecture for accelerating distributed DNN training in heterogeneous "
         "GPU/CPU clusters\", OSDI, section 4.1: 2 n (n − 1) M / ((n² + k n − 2 k) B)",
         "A formula, not a measurement. With k = 0 it is this protocol's on shared nodes. With k = n dedicated servers "
         "BytePS pulls one part while it pushes the next; here a step is pushed, applied and pulled: twice as long.",
         byteps_analysis),
    Case("BytePS, measured",
         "github.com/bytedance/byteps, issue 29, comment of 2019-07-01 (batch 32, iperf 21.1 Gbit/s)",
         "One GPU alone, 335.1 images/s, is from issue 59 of the same project, another machine. TCP's own cost is not "
         "modelled: one connection reached 13.7 Gbit/s there.", byteps_measured),
)
