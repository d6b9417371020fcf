"""A network as fluids: what several messages make of the links that they share.

A message is a flow of bytes from one node to another. Every node has one link, which carries `bandwidth` bytes a second
each way. At any moment the flows have the rates that are max–min fair, which is what many TCP connections come to:
no flow can be faster but at the expense of one that is not faster than it. Bertsekas, Gallager 1992, "Data
Networks", section 6.5.2 (progressive filling).

    4 flows into one node: bandwidth / 4 each       one of them limited to bandwidth / 10: the others get 3/10 each

Rates change only when a flow begins or ends, so the time of the next end is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np


@dataclass(eq=False)
class Flow:
    """Bytes on their way. limit: no more come out of the source in a second; cargo: what arrives at the end."""

    source: int
    target: int
    left: float
    cargo: Any = None
    limit: float = inf
    rate: float = 0.0
    end: float = inf  # at this rate


class Network:
    """The flows under way, and how far they are at `time`."""

    def __init__(self, bandwidth: float):
        self.bandwidth, self.time = bandwidth, 0.0
        self.flows: list[Flow] = []

    def begin(self, time: float, flow: Flow) -> None:
        self._advance(time)
        self.flows.append(flow)

    def release(self, time: float, flow: Flow) -> None:
        """All of the flow is there to be sent."""
        self._advance(time)
        flow.limit = inf

    def drop(self, time: float, flow: Flow) -> None:
        """The flow is no more, if it was still under way."""
        self._advance(time)
        self.flows = [other for other in self.flows if other is not flow]

    def ended(self, time: float) -> list[Flow]:
        """The flows whose end has come, in the order in which they began; they are gone."""
        found = [flow for flow in self.flows if flow.end <= time]
        self._advance(time)
        self.flows = [flow for flow in self.flows if flow.end > time]
        return found

    def share(self) -> float:
        """Give every flow its rate; the time when the first of them ends."""
        if not self.flows:
            return inf
        rates = fair_rates(np.array([(f.source, f.target) for f in self.flows]),
                           np.array([f.limit for f in self.flows]), self.bandwidth)
        for flow, rate in zip(self.flows, rates.tolist()):
            flow.rate, flow.end = rate, self.time + flow.left / rate
        return min(flow.end for flow in self.flows)

    def _advance(self, time: float) -> None:
        if time > self.time:
            for flow in self.flows:
                flow.left = max(0.0, flow.left - flow.rate * (time - self.time))
            self.time = time


def fair_rates(ways: np.ndarray, limits: np.ndarray, bandwidth: float) -> np.ndarray:
    """The max–min fair rates of flows along `ways`, rows of (source, target). All rates rise together; when a link is
    full, or a limit reached, the rates of the flows concerned stay, and the others rise on."""
    nodes = int(ways.max()) + 1
    links = ways + (0, nodes)  # a node's way out and its way in
    left, rates = np.full(2 * nodes, float(bandwidth)), np.zeros(len(ways))
    rising = np.arange(len(ways))
    while len(rising):
        count = np.bincount(links[rising].reshape(-1), minlength=2 * nodes)
        shares = left / np.maximum(count, 1)
        possible = np.minimum(shares[links[rising]].min(axis=1), limits[rising])
        level = possible.min()
        fixed = rising[possible == level]
        rates[fixed] = level
        left -= level * np.bincount(links[fixed].reshape(-1), minlength=2 * nodes)
        rising = rising[possible > level]
    return rates
