"""A simulated history as a picture: a Chrome trace, which https://ui.perfetto.dev and chrome://tracing show.

    json.dump(timeline(simulation.run(gradient, 5, seed=7)), file)

One row a machine. On it: what it reacts to, what a worker computes, and what befalls it; between rows, an arrow for
each message from its sending to its arrival (a lost one has no end); above, how many clocks are committed. A unit of
virtual time is a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.sharder.drivers.history import History, describe
from engine.sharder.drivers.program import Computed
from engine.sharder.events import Address
from engine.sharder.messages import Parameters

UNIT = 1000.0  # microseconds of the trace in a unit of virtual time
REACTION = 0.4  # how long a reaction is drawn; in the simulation it takes no time
ROWS = ("run", "coordinator", "shard", "backup", "worker")  # from the top

Trace = dict[str, Any]


def timeline(history: History) -> Trace:
    """The trace, ready for json.dump."""
    rows = rows_of({*(to for _, to, _, _ in history.events), *(source for _, _, source, _, _ in history.carried)})
    return {"displayTimeUnit": "ms",
            "traceEvents": [*names(rows, "simulated training"), *_reactions(history, rows), *_messages(history, rows),
                            *_clocks(history)]}


def rows_of(addresses: Iterable[Address]) -> dict[Address, int]:
    """The row of each machine."""
    ordered = sorted(addresses, key=lambda address: (ROWS.index(address[0]), address[1]))
    return {address: row for row, address in enumerate(ordered, 1)}


def names(rows: Mapping[Address, int], title: str) -> list[Trace]:
    """What stands beside the rows."""
    events = [drawn("M", 0, 0, "process_name", args={"name": title})]
    for (kind, number), row in rows.items():
        events.append(drawn("M", row, 0, "thread_name", args={"name": f"{kind} {number}"}))
        events.append(drawn("M", row, 0, "thread_sort_index", args={"sort_index": row}))
    return events


def drawn(phase: str, row: int, microseconds: float, name: str, **more: Any) -> Trace:
    """One event of a trace."""
    return {"ph": phase, "pid": 1, "tid": row, "ts": microseconds, "name": name, **more}


def _event(phase: str, row: int, time: float, name: str, **more: Any) -> Trace:
    """At a virtual time."""
    return drawn(phase, row, time * UNIT, name, **more)


def _reactions(history: History, rows: dict[Address, int]) -> list[Trace]:
    """What happens on each row."""
    found, since = [], dict.fromkeys(rows, 0.0)  # since when a worker computes
    for time, to, event, notes in history.events:
        if isinstance(event, Computed):
            start = since[to]
            found.append(_event("X", rows[to], start, "compute", dur=max(0.0, time - start) * UNIT, cat="compute"))
        else:
            found.append(_event("X", rows[to], time, type(event).__name__, dur=REACTION * UNIT, cat="event",
                                args={"event": describe(event)}))
        if isinstance(event, (Computed, Parameters)):
            since[to] = time + (REACTION if isinstance(event, Parameters) else 0)
        found += [_event("i", rows[to], time, note, s="t", cat="fault") for note in notes]
    return found


def _messages(history: History, rows: dict[Address, int]) -> list[Trace]:
    """An arrow for each message."""
    found = []
    for number, (left, arrives, source, to, message) in enumerate(history.carried, 1):
        name = type(message).__name__
        found.append(_event("s", rows[source], left, name, id=number, cat="message"))
        if arrives is None:
            found.append(_event("i", rows[source], left, f"{name} to {to[0]} {to[1]} is lost", s="t", cat="fault"))
        elif to in rows:
            found.append(_event("f", rows[to], arrives, name, id=number, cat="message", bp="e"))
    return found


def _clocks(history: History) -> list[Trace]:
    return [_event("C", 0, time, "committed clocks", args={"clocks": committed.clock + 1})
            for time, committed in zip(history.committed_at, history.committed)]
