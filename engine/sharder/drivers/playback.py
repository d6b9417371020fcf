"""Tapes of a run as a picture: a Chrome trace, which https://ui.perfetto.dev and chrome://tracing show.

One row a machine, also of those that were removed. On it: what it does, and what in that; births and deaths; between
rows, an arrow for each message, with its bytes, from its sending to where it is taken up. Incarnations follow each
other on one row: what one did in the moment of its death ends where that was noticed, and what it may do later, on a
computer that is cut off, is not drawn. Above, how many clocks are committed.

Of one computer all times are those of one clock. Another computer's are moved by what its wall clock and its monotonic
clock, and ours, differ in, so its row is as exact as the wall clocks are alike (by NTP: some milliseconds).

Two messages with the same content to the same machine are the same question, asked again: which of them an arrow
begins with is told by their order, and where fewer came than were sent, the later ones are taken to have come.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.sharder.drivers.tape import Entry, Tape, read
from engine.sharder.drivers.timeline import Trace, drawn, names, rows_of
from engine.sharder.events import RUN, Address

MICROSECOND = 1000.0  # nanoseconds: the unit of a trace


class Recording:
    """The tapes of one run, which become a trace in the file `path`. Raises ValueError with one line for a file that
    cannot be."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.open("w").close()
        except OSError as error:
            raise ValueError(f"run: trace is {str(path)!r}, which cannot be written: {error.strerror}") from error
        self.tapes: list[Tape] = []

    def tape(self, address: Address) -> Tape:
        """A new one, kept in memory."""
        self.tapes.append(Tape(address))
        return self.tapes[-1]

    def caller(self) -> Tape:
        """That of who called for the run; the first."""
        tape = self.tape(RUN)
        tape.turn("caller")
        return tape

    def write(self, folder: Path | None = None) -> None:
        """The trace of these tapes, and of those whose files are in a folder. The first is the caller's."""
        files = sorted(folder.glob("tape-*")) if folder else ()
        tapes = [*(tape.entries for tape in self.tapes), *filter(None, map(read, files))]
        with self.path.open("w") as file:
            json.dump(playback(tapes), file)


@dataclass
class Life:
    """One incarnation of a machine, from its birth until it was seen to be dead, or the end of the run."""

    address: Address
    incarnation: int
    entries: list[Entry]  # at times of the first tape's computer
    end: int


@dataclass(frozen=True)
class Letter:
    """A message that left `source`; where it came to nobody took it up if `came` is None."""

    name: str
    size: int
    source: Address
    to: Address
    left: int
    came: int | None


def playback(tapes: list[list[Entry]]) -> Trace:
    """The trace, ready for json.dump; the first tape is that of who called for the run."""
    lives = _lives(tapes)
    start = min(life.entries[0][1] for life in lives)
    named = {(entry[2], entry[3]) for life in lives for entry in life.entries if entry[0] in ("birth", "death")}
    rows = rows_of({life.address for life in lives} | named)  # some die before they have a tape

    def draw(phase: str, address: Address | None, time: int, name: str, **more: Any) -> Trace:
        return drawn(phase, rows[address] if address else 0, (time - start) / MICROSECOND, name, **more)

    events = names(rows, "training")
    for life in lives:
        events += [draw("X", life.address, since, name, dur=(until - since) / MICROSECOND, cat="work",
                        args={**more, "incarnation": life.incarnation}) for name, since, until, more in _spans(life)]
        for kind, time, *what in life.entries:
            if kind in ("birth", "death"):
                events.append(draw("i", (what[0], what[1]), time, what[2], s="t", cat=kind))
            elif kind == "count":
                events.append(draw("C", None, time, "committed clocks", args={"clocks": what[0]}))
    for number, letter in enumerate(_letters(lives), 1):
        if letter.came is None:
            text = f"{letter.name} to {letter.to[0]} {letter.to[1]} is not taken up"
            events.append(draw("i", letter.source, letter.left, text, s="t", cat="message"))
            continue
        common: dict[str, Any] = {"id": number, "cat": "message", "args": {"bytes": letter.size}}
        events += [draw("s", letter.source, letter.left, letter.name, **common),
                   draw("f", letter.to, letter.came, letter.name, bp="e", **common)]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _lives(tapes: list[list[Entry]]) -> list[Life]:
    _, _, _, _, own, since, wall = tapes[0][0]
    ahead = {own: wall - since}  # by computer: its wall clock minus its monotonic clock
    lives = []
    for (_, kind, number, incarnation, computer, since, wall), *entries in tapes:
        shift = ahead.setdefault(computer, wall - since) - ahead[own]
        moved = [[what, time + shift, *more] for what, time, *more in entries]
        lives.append(Life((kind, number), incarnation, [["tape", since + shift], *moved], 0))
    over = max(life.entries[-1][1] for life in lives)
    deaths = [(entry[1], (entry[2], entry[3])) for life in lives for entry in life.entries if entry[0] == "death"]
    for life in lives:
        born = life.entries[0][1]
        life.end = min((time for time, whose in deaths if whose == life.address and time >= born), default=over)
        life.entries = [entry for entry in life.entries if entry[1] <= life.end]
    return lives


def _spans(life: Life) -> Iterator[tuple[str, int, int, dict[str, int]]]:
    """(name, since, until, more) of everything that a machine does; what it never ended, until its end."""
    begun: list[tuple[str, int, dict[str, int]]] = []

    def ended(until: int) -> tuple[str, int, int, dict[str, int]]:
        name, since, more = begun.pop()
        return name, since, until, more

    for kind, time, *what in life.entries:
        if kind == "turn":
            while begun:
                yield ended(time)
        if kind in ("turn", "begin"):
            begun.append((what[0], time, what[1]))
        elif kind == "end":
            yield ended(time)
    while begun:
        yield ended(life.end)


def _letters(lives: list[Life]) -> Iterator[Letter]:
    """Every message that was sent."""
    sent: dict[Any, list[tuple[int, Address, int]]] = defaultdict(list)  # by to, name and mark
    heard: dict[Any, list[int]] = defaultdict(list)
    for life in lives:
        for kind, time, *what in life.entries:
            if kind == "send":
                to_kind, to_number, name, mark, size = what
                sent[(to_kind, to_number), name, mark].append((time, life.address, size))
            elif kind == "hear":
                heard[life.address, what[0], what[1]].append(time)
    for key, departures in sent.items():  # a message that was repeated has the same mark: the last to come left last
        departures.sort()
        came: list[int | None] = [None] * len(departures)
        arrivals = sorted(heard[key])
        for n in reversed(range(len(departures))):
            if arrivals and departures[n][0] <= arrivals[-1]:
                came[n] = arrivals.pop()
        for (time, source, size), arrival in zip(departures, came):
            yield Letter(key[1], size, source, key[0], time, arrival)
