"""The simulator finds bugs: each protocol bug planted here breaks an invariant within a few seeds."""

from __future__ import annotations

import pytest
from sharder_problems import assert_same_bits, gradient, make, oracle, plain

from engine.optim.accumulator import Accumulated, Accumulator
from engine.sharder import coordinator, shard, versions, worker
from engine.sharder.drivers.invariants import Violated
from engine.sharder.drivers.simulator import Simulation, Weather
from engine.sharder.events import COORDINATOR, Pulled, Send, Timeout
from engine.sharder.messages import Applied, Begin, Push

CLOCKS, MICROBATCHES, CLIP_NORM, SEEDS = 4, 5, 1.0, 40
STORM = Weather(latency=(1, 60), loss=0.15, duplication=0.3, stalling=0.2, crashing=0.005)


def storm(seed):
    """A history with idle workers, slow ones, dead ones, and a network that does all it can."""
    cluster = make(Simulation, workers=3 + seed % 4, shards=4, microbatches=MICROBATCHES, clip_norm=CLIP_NORM)
    bits = oracle(False, MICROBATCHES, CLIP_NORM, CLOCKS)
    history = cluster.run(gradient, CLOCKS, seed, STORM, (), bits, limit=20_000)
    states, _, norms = plain(False, MICROBATCHES, CLIP_NORM, CLOCKS)
    assert_same_bits(cluster.state(), states[CLOCKS])
    assert [committed.norm for committed in history.committed] == norms[:CLOCKS]


def test_without_a_bug_every_seed_is_fine():
    for seed in range(SEEDS):
        storm(seed)


# ── the bugs: each takes monkeypatch's setattr and plants itself ──────────────────────────────────────

def sums_by_arrival(plant):
    def add(self, index, gradients, loss=0.0, tokens=1):
        self._added.add(index)
        whole = (0, self.microbatches)
        new = Accumulated(tuple(gradients), float(loss), tokens)
        self._finished[whole] = self._sum(self._finished[whole], new) if whole in self._finished else new
    plant(Accumulator, "add", add)


def sums_in_a_chain_instead_of_the_tree(plant):
    def splits(leaf, leaves):
        return [((0, i), (i, i + 1)) for i in range(leaves - 1, max(leaf, 1) - 1, -1)]
    plant("engine.optim.accumulator.splits_above", splits)


def applies_a_repeated_push_again(plant):
    def add(self, index, gradients, loss=0.0, tokens=1, original=Accumulator.add):
        if index not in self:
            return original(self, index, gradients, loss, tokens)
        for key, subtree in list(self._finished.items()):
            if key[0] <= index < key[1] and len(subtree.gradients) == len(gradients):
                self._finished[key] = self._sum(subtree, Accumulated(tuple(gradients), float(loss), tokens))
    plant(Accumulator, "add", add)
    plant(shard.Window, "first_time", lambda self, sequence: True)
    plant(shard.Shard, "_wanted", lambda self, push: push.clock == self.version)


def counts_a_microbatch_of_a_new_incarnation_again(plant):
    plant(shard.Shard, "_wanted", lambda self, push: push.clock == self.version)


def takes_a_late_push_into_the_next_clock(plant):
    plant(shard.Shard, "_wanted", lambda self, push: push.microbatch not in self.accumulator)


def keeps_the_sequence_numbers_of_a_dead_incarnation(plant):
    def alive(self, worker_number, epoch):
        self.windows.setdefault(worker_number, shard.Window(epoch)).epoch = epoch
        return True
    plant(shard.Shard, "_alive", alive)


def forgets_a_push_at_the_first_acknowledgement(plant):
    def step(self, event, original=worker.Worker.step):
        if type(event).__name__ == "Pushed":
            self.pushes = {key: push for key, push in self.pushes.items() if key[1] != event.identity.sequence}
            return []
        return original(self, event)
    plant(worker.Worker, "step", step)


def reuses_a_sequence_number(plant):
    def push(self, request, original=worker.Worker._push):
        sends = original(self, request)
        self.sequence -= 1  # the next push reuses the number: a shard takes it for a repetition
        return sends
    plant(worker.Worker, "_push", push)


def never_resends_a_push(plant):
    def resend(self, original=worker.Worker._resend):
        return [send for send in original(self) if not isinstance(send.message, Push)]
    plant(worker.Worker, "_resend", resend)


def shard_never_asks_again(plant):
    def step(self, event, original=shard.Shard.step):
        return [] if isinstance(event, Timeout) else original(self, event)
    plant(shard.Shard, "step", step)


def coordinator_neither_repeats_nor_answers_again(plant):
    def reduced(self, message, original=coordinator.Coordinator._reduced):
        return [] if self.decision else original(self, message)

    def step(self, event, original=coordinator.Coordinator.step):
        return [] if isinstance(event, Timeout) else original(self, event)
    plant(coordinator.Coordinator, "_reduced", reduced)
    plant(coordinator.Coordinator, "step", step)


def mixes_versions_in_a_pull(plant):
    def parameters(self, answer):
        if self.pulls.pop(answer.shard, None) is None:
            return []
        self.values[answer.shard] = answer.values
        return [] if self.pulls else [Pulled(tuple(self.values[s] for s in range(self.partition.shards)))]
    plant(worker.Worker, "_parameters", parameters)


def begins_a_clock_again_on_a_late_begin(plant):
    def answered(self, answer, original=worker.Worker._answered):
        if self.ready and isinstance(answer, Begin):
            self.ready = worker.Ready(self.number, self.epoch, answer.clock)
        return original(self, answer)
    plant(worker.Worker, "_answered", answered)


def decides_when_all_shards_but_one_are_ready(plant):
    def reduced(self, message):
        self.reduced[message.shard] = message
        if self.decision is None and message.clock == self.clock and len(self.reduced) >= self.shards - 1:
            return self._decide(list(self.reduced.values()))
        return self._apply({message.shard} - self.applied)
    plant(coordinator.Coordinator, "_reduced", reduced)


def commits_when_the_first_shard_has_applied(plant):
    def applied(self, message, original=coordinator.Coordinator._applied):
        if message.clock == self.clock and self.decision:
            self.applied = set(range(self.shards))
        return original(self, message)
    plant(coordinator.Coordinator, "_applied", applied)


def counts_applied_messages_instead_of_shards(plant):
    def applied(self, message, original=coordinator.Coordinator._applied):
        if message.clock == self.clock and self.decision and message.shard in self.applied:
            self.applied.add(next(s for s in range(self.shards) if s not in self.applied))
        return original(self, message)
    plant(coordinator.Coordinator, "_applied", applied)


def applies_without_looking_at_the_clock(plant):
    def apply(self, message, original=shard.Shard._apply):
        return original(self, type(message)(self.version, message.scale))
    plant(shard.Shard, "_apply", apply)


def acknowledges_an_update_it_has_not_done(plant):
    def apply(self, message, original=shard.Shard._apply):
        if message.clock == self.version and not self.reduced_once:
            self.reduced_once = True
            return [Send(COORDINATOR, Applied(self.number, message.clock))]
        return original(self, message)
    plant(shard.Shard, "reduced_once", False, raising=False)
    plant(shard.Shard, "_apply", apply)


def norm_in_the_order_of_arrival(plant):
    def decide(self, reduced, original=coordinator.Coordinator._decide):
        by_arrival = [type(r)(i, r.clock, r.loss, r.tokens, r.squares) for i, r in enumerate(self.reduced.values())]
        return original(self, by_arrival)
    plant(coordinator.Coordinator, "_decide", decide)


def norm_of_one_shard_only(plant):
    plant("engine.sharder.coordinator.np.concatenate", lambda arrays: arrays[0])


def updates_in_place(plant):
    def reserve(self):
        self._next = self.current
        self.current = versions.Version(self.current.number + 1, self.current.begin, self.current.flat)
        return self._next

    def commit(self):
        pass
    plant(versions.Versions, "reserve", reserve)
    plant(versions.Versions, "commit", commit)


def shows_the_next_version_before_it_is_written(plant):
    def reserve(self, original=versions.Versions.reserve):
        new = original(self)
        new.flat.data[...] = self.current.flat.data
        self.current = new
        return new

    def parameters(self, pull, original=shard.Shard._parameters):
        if self.mean is not None and self.memory.versions.current.number == self.version:
            self.memory.versions.reserve()
        return original(self, pull)
    plant(versions.Versions, "reserve", reserve)
    plant(shard.Shard, "_parameters", parameters)


def forgets_to_scale_a_clipped_gradient(plant):
    def update(self, gradients, scale, original=shard.Shard._update):
        original(self, gradients, 1.0)
    plant(shard.Shard, "_update", update)


def gives_two_workers_the_same_microbatch_and_one_to_nobody(plant):
    def assignment(self, number):
        return tuple(min(i, self.microbatches - 2) for i in range(number, self.microbatches, self.workers))
    plant(coordinator.Coordinator, "assignment", assignment)


BUGS = [bug for name, bug in sorted(globals().items())
        if callable(bug) and getattr(bug, "__code__", None) and bug.__code__.co_varnames[:1] == ("plant",)]


def test_there_are_bugs():
    assert len(BUGS) >= 20


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(bug, monkeypatch):
    plain(False, MICROBATCHES, CLIP_NORM, CLOCKS)  # what is right is computed without the bug
    bug(monkeypatch.setattr)
    for seed in range(SEEDS):
        try:
            storm(seed)
        except (Violated, RuntimeError, ValueError, KeyError, AssertionError):
            return
    pytest.fail(f"{SEEDS} histories did not find it")
