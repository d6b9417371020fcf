"""A simulated history as a picture: a Chrome trace, which https://ui.perfetto.dev and chrome://tracing show.

    json.dump(timeline(simulation.run(gradient, 5, seed=7)), file)

One row a machine. On it: what it reacts to, what a worker computes, and what befalls it; between rows, an arrow for
each message from its sending to its arrival (a lost one has no end); above, how many clocks are committed. A unit of
virtual time is a millisecond; of a priced simulation, whose unit is the second: timeline(history, SECOND).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.sharder.drivers.history import History, describe
from engine.sharder.drivers.program import Computed
from engine.sharder.events import Address
from engine.sharder.messages import Parameters

UNIT, SECOND = 1e3, 1e6  # microseconds of the trace in a unit of virtual time
REACTION = 400.0  # microseconds that a reaction is drawn; in the simulation it takes no time
ROWS = ("run", "network", "coordinator", "shard", "backup", "worker")  # from the top

Trace = dict[str, Any]


def timeline(history: History, unit: float = UNIT) -> Trace:
    """The trace, ready for json.dump."""
    rows = rows_of({*(to for _, to, _, _ in history.events), *(source for _, _, source, _, _ in history.carried)})
    return {"displayTimeUnit": "ms",
            "traceEvents": [*names(rows, "simulated training"), *_reactions(history, rows, unit),
                            *_messages(history, rows, unit), *_clocks(history, unit)]}


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


def _reactions(history: History, rows: dict[Address, int], unit: float) -> list[Trace]:
    """What happens on each row."""
    found, since = [], dict.fromkeys(rows, 0.0)  # since when a worker computes
    for time, to, event, notes in history.events:
        now = time * unit
        if isinstance(event, Computed):
            start = since[to]
            found.append(drawn("X", rows[to], start, "compute", dur=max(0.0, now - start), cat="compute"))
        else:
            found.append(drawn("X", rows[to], now, type(event).__name__, dur=REACTION, cat="event",
                               args={"event": describe(event)}))
        if isinstance(event, (Computed, Parameters)):
            since[to] = now + (REACTION if isinstance(event, Parameters) else 0)
        found += [drawn("i", rows[to], now, note, s="t", cat="fault") for note in notes]
    return found


def _messages(history: History, rows: dict[Address, int], unit: float) -> list[Trace]:
    """An arrow for each message."""
    found = []
    for number, (left, arrives, source, to, message) in enumerate(history.carried, 1):
        name = type(message).__name__
        found.append(drawn("s", rows[source], left * unit, name, id=number, cat="message"))
        if arrives is None:
            found.append(drawn("i", rows[source], left * unit, f"{name} to {to[0]} {to[1]} is lost", s="t",
                               cat="fault"))
        elif to in rows:
            found.append(drawn("f", rows[to], arrives * unit, name, id=number, cat="message", bp="e"))
    return found


def _clocks(history: History, unit: float) -> list[Trace]:
    return [drawn("C", 0, time * unit, "committed clocks", args={"clocks": committed.clock + 1})
            for time, committed in zip(history.committed_at, history.committed)]
