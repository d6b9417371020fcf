"""What the parameter server is at, for the progress line: staleness, bytes, what was sent again, who came back."""

from __future__ import annotations

from engine.sharder import Committed
from engine.sharder.cluster import Cluster


class Status:
    """Of a run that begins now."""

    def __init__(self, server: Cluster):
        self.server, self.first, self.sent = server, server.clock, server.pushed.sent

    def __call__(self, done: Committed) -> str:
        """After a clock: the bytes are those that all workers pushed, in the mean over the clocks."""
        server, clocks = self.server, done.clock + 1 - self.first
        parts = []
        if server.setup.consistency.staleness:
            parts.append(f"staleness {done.clock - done.version}")
        parts.append(f"{(server.pushed.sent - self.sent) / clocks / 1e6:.1f} MB pushed a step")
        if done.dropped:
            parts.append(f"{len(done.dropped)} left out")
        if server.pushed.again or server.returns:
            parts += [f"{server.pushed.again} retries", f"{server.returns} came back"]
        return ", ".join(parts)
