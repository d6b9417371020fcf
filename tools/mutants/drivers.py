"""Bugs in what runs the parameter server's machines: timelines, durable residuals, shards that come and go."""

from __future__ import annotations

from tools.mutants.record import Mutant

DRIVERS_AT = "engine/sharder/drivers"
PLAYBACK = "tests/sharder/test_playback.py"

DRIVERS = [
    Mutant("time of another computer", f"{DRIVERS_AT}/playback.py",
           "shift = ahead.setdefault(computer, wall - since) - ahead[own]",
           "shift = ahead[own] - ahead.setdefault(computer, wall - since)",
           "another computer's times are moved the other way",
           f"{PLAYBACK}::test_other_computers_are_moved_to_our_time"),
    Mutant("arrow of a lost question", f"{DRIVERS_AT}/playback.py",
           "fewer = len(arrivals) <= len(departures) - n",
           "fewer = len(arrivals) < len(departures) - n",
           "of a question that was lost and asked again, the lost one is drawn",
           f"{PLAYBACK}::test_a_question_that_is_asked_again_and_lost"),
    Mutant("work after death", f"{DRIVERS_AT}/playback.py",
           "life.entries = [entry for entry in life.entries if entry[1] <= life.end]",
           "pass",
           "what a replaced machine still does is drawn over its successor",
           f"{PLAYBACK}::test_what_never_ended_ends_with_the_death_and_what_came_after_is_not_drawn"),
    Mutant("a tape that dies along", f"{DRIVERS_AT}/tape.py",
           'path.open("ab", buffering=0)',
           'path.open("ab")',
           "what a process recorded is lost with it when it is killed",
           f"{PLAYBACK}::test_a_killed_worker_shows"),
    Mutant("a mark of the values", f"{DRIVERS_AT}/tape.py",
           "if not isinstance(part, memoryview):",
           "if isinstance(part, memoryview):",
           "messages without large arrays all have the same mark",
           f"{PLAYBACK}::test_a_mark_is_the_messages_own_on_both_ends"),
    Mutant("pulling that goes on", f"{DRIVERS_AT}/tape.py",
           "values = super().pull(*arguments, **named)\n        self._compute()",
           "values = super().pull(*arguments, **named)",
           "what is computed after a pull counts as pulling",
           f"{PLAYBACK}::test_computing_is_where_the_time_goes"),
]
