"""What holds of the trace of every run, whatever its machines run in."""

from __future__ import annotations

import json
from collections import defaultdict


def read_trace(path):
    return json.loads(path.read_text())["traceEvents"]


def nanoseconds(microseconds):
    return round(1000 * microseconds)


def rows(events):
    """The events of each machine, by its name."""
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found = {name: [] for name in names.values()}
    for event in events:
        if event["tid"] in names and event["ph"] != "M":
            found[names[event["tid"]]].append(event)
    return found


def spans(events):
    """(since, until, name) of what is done on a row."""
    return [(nanoseconds(e["ts"]), nanoseconds(e["ts"]) + nanoseconds(e["dur"]), e["name"])
            for e in events if e["ph"] == "X"]


def check_trace(path, machines):
    """Spans of a row lie inside each other or apart; a message leaves and comes once, in spans. Returns the rows."""
    events = read_trace(path)
    found = rows(events)
    assert found.keys() == machines
    for own in found.values():
        around = []
        for since, until, name in sorted(spans(own), key=lambda span: (span[0], -span[1])):
            assert since <= until, name
            while around and around[-1] <= since:
                around.pop()
            assert not around or until <= around[-1], name
            around.append(until)
    ends = defaultdict(dict)
    for own in found.values():
        for event in own:
            if event["ph"] in "sf":
                at = nanoseconds(event["ts"])
                assert event["ph"] not in ends[event["id"]]
                assert any(since <= at <= until for since, until, _ in spans(own)), event
                ends[event["id"]][event["ph"]] = at, event["name"], event["args"]["bytes"]
    assert ends
    for both in ends.values():
        (left, *what), (came, *same) = both["s"], both["f"]
        assert left <= came and what == same and what[1] > 0
    return found
