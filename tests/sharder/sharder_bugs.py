"""Bugs of the protocol, one a function: what can be got wrong in sums, workers, shards, coordinator and records.

Each takes monkeypatch's setattr and plants itself. modes: those that have what it breaks (default: all).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from sharder_problems import MODES

from engine.optim.accumulator import Accumulated, Accumulator
from engine.sharder import coordinator, journal, memory, setup, shard, versions, worker
from engine.sharder.consistency import Consistency
from engine.sharder.events import COORDINATOR, Pulled, Send
from engine.sharder.messages import Applied, Begin, Held, Push, Reduced

BSP = tuple(mode for mode in MODES if mode.startswith("bsp"))
SSP = tuple(mode for mode in MODES if mode.startswith("ssp"))
ASP = tuple(mode for mode in MODES if mode.startswith("asp"))
BACKUP_WORKERS = tuple(mode for mode in MODES if "backup workers" in mode)


# ── sums ──────────────────────────────────────────────────────────────────────────────────────────────

def sums_by_arrival(plant):
    def add(self, index, gradients, loss=0.0, tokens=1):
        self._added.add(index)
        whole = (0, self.microbatches)
        new = Accumulated(tuple(gradients), float(loss), tokens)
        self._finished[whole] = self._sum(self._finished[whole], new) if whole in self._finished else new
    plant(Accumulator, "add", add)


def applies_a_repeated_push_again(plant):
    def add(self, push, original=memory.Gathering.add):
        if original(self, push):
            return True
        again = Accumulated(push.gradients, push.loss, push.tokens)
        for key, subtree in list(self.sum._finished.items()):
            if key[0] <= push.microbatch < key[1]:
                self.sum._finished[key] = self.sum._sum(subtree, again)
        return True
    plant(memory.Gathering, "add", add)
    plant(memory.Window, "first_time", lambda self, sequence: True)


def counts_what_was_computed_again(plant, modes=ASP):
    def take(self, push, original=shard.Shard._take):
        gathering = self._gathering(push.clock)
        if self.asynchronous and gathering.chosen is not None and push.microbatch in gathering.sum:
            alone = Accumulator(1, self.k)
            alone.add(0, push.gradients, push.loss, push.tokens)
            self._update(alone.total(), 1.0, self.memory.version - push.version)
        return original(self, push)
    plant(shard.Shard, "_take", take)


def takes_a_late_push_into_the_running_clock(plant):
    def push(self, message, original=shard.Shard._push):
        if self.active and message.clock < self.clock:
            message = replace(message, clock=self.clock)
        return original(self, message)
    plant(shard.Shard, "_push", push)


def keeps_the_sequence_numbers_of_a_dead_incarnation(plant):
    def alive(self, number, epoch):
        self.windows.setdefault(number, memory.Window(epoch)).epoch = epoch
        return True
    plant(shard.Shard, "_alive", alive)


def norm_of_what_shards_have_rounded(plant):
    def in_block_order(self, of_shards):
        return np.array([np.float32(squares.sum()) for squares in of_shards], float)
    plant(setup.Partition, "in_block_order", in_block_order)


def norm_of_one_shard_only(plant):
    plant(setup.Partition, "in_block_order", lambda self, of_shards: of_shards[0])


def forgets_to_scale_a_clipped_gradient(plant):
    def update(self, gradients, scale, staleness, original=shard.Shard._update):
        original(self, gradients, 1.0, staleness)
    plant(shard.Shard, "_update", update)


def forgets_how_late_an_update_is(plant, modes=SSP + ASP):
    def update(self, gradients, scale, staleness, original=shard.Shard._update):
        original(self, gradients, scale, 0)
    plant(shard.Shard, "_update", update)


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────

def forgets_a_push_at_the_first_acknowledgement(plant):
    def pushed(self, message):
        self.pushes = {key: push for key, push in self.pushes.items() if key[1] != message.identity.sequence}
        return []
    plant(worker.Worker, "_pushed", pushed)


def reuses_a_sequence_number(plant):
    def push(self, request, original=worker.Worker._push):
        sends = original(self, request)
        self.sequence = max(0, self.sequence - 1)  # a shard takes the next push for a repetition
        return sends
    plant(worker.Worker, "_push", push)


def never_resends_a_push(plant):
    def resend(self, event, original=worker.Worker._resend):
        return [send for send in original(self, event) if not isinstance(send.message, Push)]
    plant(worker.Worker, "_resend", resend)


def drops_unacknowledged_pushes_when_it_begins_anew(plant):
    def begin(self, message, original=worker.Worker._begin):
        actions = original(self, message)
        if actions:
            self.pushes.clear()
        return actions
    plant(worker.Worker, "_begin", begin)


def takes_a_push_for_sent_when_one_shard_was_sent_it(plant):
    def push(self, request, original=worker.Worker._push):
        sends = original(self, request)
        for _, have in self.leaving.values():
            have.update(range(self.term.shards))
        return sends
    plant(worker.Worker, "_push", push)


def takes_what_left_of_a_void_push_for_sent(plant, modes=BSP):
    def push(self, request, original=worker.Worker._push):
        leaving = dict(self.leaving)
        sends = original(self, request)
        if self._void(self.begun):
            self.leaving = leaving
        return sends
    plant(worker.Worker, "_push", push)


def mixes_versions_in_a_pull(plant):
    def parameters(self, answer, original=worker.Worker._parameters):
        actions = original(self, answer)
        if not any(isinstance(action, Send) for action in actions):
            return actions
        self.pulls = {}  # it was to ask again
        return [Pulled(tuple(self.values[s] for s in range(self.term.shards)))]
    plant(worker.Worker, "_parameters", parameters)


def takes_an_answer_to_an_earlier_pull_for_one_to_this(plant):
    def parameters(self, answer, original=worker.Worker._parameters):
        pull = self.pulls.get(answer.shard)
        if pull is not None:
            answer = replace(answer, term=pull.term, version=pull.version)
        return original(self, answer)
    plant(worker.Worker, "_parameters", parameters)


def leaves_a_late_pull_unanswered_by_the_new_term(plant, modes=BSP):
    def moved(self, message, original=worker.Worker._moved):
        actions = original(self, message)
        if self.wanted is None:
            return actions
        self.pulls = {}
        return []
    plant(worker.Worker, "_moved", moved)


def hears_nothing_of_a_new_term(plant):
    plant(worker.Worker, "_moved", lambda self, moved: [])


# ── the clock ─────────────────────────────────────────────────────────────────────────────────────────

def shard_never_asks_again(plant):
    plant(shard.Shard, "_remind", lambda self, event: [])


def coordinator_never_repeats_itself(plant):
    plant(coordinator.Coordinator, "_remind", lambda self, event: [])
    plant(coordinator.Coordinator, "_repeated", lambda self, *answers: [])


def decides_when_all_shards_but_one_are_ready(plant):
    def reduced(self, message, original=coordinator.Coordinator._reduced):
        actions = original(self, message)
        clock = self.clocks.get(message.clock)
        if clock and not clock.decision and len(clock.reduced) == self.term.shards - 1 > 0:
            for s in range(self.term.shards):
                clock.reduced.setdefault(s, message)
            return actions + self._go_on()
        return actions
    plant(coordinator.Coordinator, "_reduced", reduced)


def commits_when_the_first_shard_has_applied(plant):
    def applied(self, message, original=coordinator.Coordinator._applied):
        clock = self.clocks.get(message.clock)
        if clock and clock.decision:
            clock.applied = set(range(self.term.shards)) - {message.shard}
        return original(self, message)
    plant(coordinator.Coordinator, "_applied", applied)


def counts_applied_messages_instead_of_shards(plant):
    def applied(self, message, original=coordinator.Coordinator._applied):
        clock = self.clocks.get(message.clock)
        if clock and message.shard in clock.applied:
            other = next(s for s in range(self.term.shards) if s not in clock.applied)
            message = replace(message, shard=other)
        return original(self, message)
    plant(coordinator.Coordinator, "_applied", applied)


def applies_without_looking_at_the_clock(plant):
    def apply(self, message, original=shard.Shard._apply):
        return original(self, replace(message, clock=self.clock))
    plant(shard.Shard, "_apply", apply)


def acknowledges_an_update_it_has_not_done(plant):
    def apply(self, message, original=shard.Shard._apply):
        if message.clock == self.clock and not self.promised_once:
            self.promised_once = True
            return [Send(COORDINATOR, Applied(self.number, message.term, message.clock))]
        return original(self, message)
    plant(shard.Shard, "promised_once", False, raising=False)
    plant(shard.Shard, "_apply", apply)


def updates_in_place(plant):
    def reserve(self):
        self._next = self.current
        self.current = versions.Version(self.current.number + 1, self.shared, self.current.flat)
        self._kept.append(self.current)
        return self._next
    plant(versions.Versions, "reserve", reserve)
    plant(versions.Versions, "commit", lambda self: None)


def writes_where_somebody_still_reads(plant, modes=BSP):
    def commit(self, original=versions.Versions.commit):
        before = self.current
        original(self)
        before.flat.data[...] = 0  # of the clock that is over: no bit of the training depends on it any more
    plant(versions.Versions, "commit", commit)


def shows_the_next_version_before_it_is_written(plant):
    def reserve(self, original=versions.Versions.reserve):
        new = original(self)
        new.flat.data[...] = self.current.flat.data
        self.current = new
        return new

    def report(self, clock, original=shard.Shard._report):
        actions = original(self, clock)
        if self.gatherings[clock].reduced is not None and not self.asynchronous:
            self.memory.versions.reserve()
        return actions
    plant(versions.Versions, "reserve", reserve)
    plant(shard.Shard, "_report", report)


# ── who computes what ─────────────────────────────────────────────────────────────────────────────────

def gives_a_microbatch_to_nobody(plant):
    def begin(self, original=coordinator.Coordinator._begin):
        clock = original(self)
        clock.due.discard(self.setup.microbatches - 1)
        clock.owners[self.setup.microbatches - 1] = 99
        return clock
    plant(coordinator.Coordinator, "_begin", begin)


def leaves_the_work_of_a_lost_worker_undone(plant):
    def lose(self, number):
        self.waiting.pop(number, None)
    plant(coordinator.Coordinator, "_lose", lose)


def believes_that_a_lost_worker_delivered(plant):
    def lose(self, number, original=coordinator.Coordinator._lose):
        before = {clock.number: set(clock.due) for clock in self.clocks.values()}
        original(self, number)
        for clock in self.clocks.values():  # only what was never handed out is handed out again
            clock.due &= before[clock.number]
    plant(coordinator.Coordinator, "_lose", lose)


def forgets_what_it_answered(plant):
    def ready(self, message, original=coordinator.Coordinator._ready):
        self.answers.pop(message.worker, None)
        return original(self, message)
    plant(coordinator.Coordinator, "_ready", ready)


# ── staleness ─────────────────────────────────────────────────────────────────────────────────────────

def runs_one_clock_too_far_ahead(plant):
    def may_begin(self, clock, committed, granted):
        return clock <= committed + self.staleness + 1 and clock < granted + self.staleness + 1
    plant(Consistency, "may_begin", may_begin)


def gives_each_worker_the_freshest_version(plant):
    def hand_out(self, original=coordinator.Coordinator._hand_out):
        fresh = [replace(send.message, version=self.clock) if isinstance(send.message, Begin) else send.message
                 for send in original(self)]
        for message in fresh:
            if isinstance(message, Begin):
                self.answers[message.worker] = message
        return [Send(("worker", message.worker), message) for message in fresh]
    plant(coordinator.Coordinator, "_hand_out", hand_out)


def keeps_one_version_too_few(plant, modes=SSP):
    def create(self, term, number, original=shard.Shard._versions):
        made = original(self, term, number)
        made._kept = type(made._kept)(made._kept, maxlen=max(1, made._kept.maxlen - 1))
        return made
    plant(shard.Shard, "_versions", create)


def reads_go_back_in_asp(plant):
    def pull(self, message, original=shard.Shard._pull):
        answers = original(self, message)
        if self.asynchronous and answers and hasattr(answers[0].message, "values"):
            older = self.__dict__.setdefault("oldest", {}).setdefault(self.term, self.memory.versions.current)
            if self.memory.version % 2:
                return [Send(answers[0].to, replace(answers[0].message, values=older))]
        return answers
    plant(shard.Shard, "_pull", pull)


# ── backup workers ────────────────────────────────────────────────────────────────────────────────────

def each_shard_chooses_for_itself(plant):
    def report(self, clock, original=shard.Shard._report):
        gathering = self.gatherings[clock]
        if gathering.chosen is None and len(gathering.held) >= gathering.needed:
            gathering.choose(tuple(sorted(gathering.held)))
        return original(self, clock)
    plant(shard.Shard, "_report", report)


def chooses_what_any_shard_holds(plant, modes=BACKUP_WORKERS):
    def held(self, message, original=coordinator.Coordinator._held):
        clock = self.clocks.get(message.clock)
        if clock and clock.chosen is None and len(clock.held) >= self.term.shards - 1:
            everything = frozenset(message.microbatches).union(*clock.held.values())
            clock.held = dict.fromkeys(range(self.term.shards), everything)
            message = Held(message.shard, message.term, message.clock, tuple(everything))
        return original(self, message)
    plant(coordinator.Coordinator, "_held", held)


# ── logs, replicas, snapshots, terms ──────────────────────────────────────────────────────────────────

def speaks_before_it_is_on_record(plant):
    def released(self):
        actions = [action for _, action in self.withheld]
        self.withheld.clear()
        return actions
    plant(journal.Journal, "_released", released)


def coordinator_keeps_no_record_of_what_shards_said(plant):
    without = tuple(kind for kind in coordinator.Coordinator.RECORDED if kind is not Reduced)
    plant(coordinator.Coordinator, "RECORDED", without)


def takes_a_change_for_a_repetition(plant):
    def choose(self, message, original=shard.Shard._push):
        actions = original(self, message)
        self.repeated = self.repeated or len(actions) == 1
        return actions
    plant(shard.Shard, "_push", choose)


def backup_takes_records_as_they_come(plant):
    def step(self, event):
        if hasattr(event, "event") and event.number > self.number and not self.promoted:
            self.machine.step(event.event)
            self.number = event.number
        return [] if self.promoted else [Send(self.primary, journal.Recorded(self.number))]
    plant(journal.Backup, "step", step)


def replaced_primary_goes_on_speaking(plant):
    def released(self, original=journal.Journal._released):
        if self.backup and len(self.unwritten) > 2:
            self.written = self.appended
        return original(self)
    plant(journal.Journal, "_released", released)


def snapshot_shares_the_optimizer_state(plant):
    def snapshot(self, original=shard.Shard.snapshot):
        return replace(original(self), slots=self.memory.slots)
    plant(shard.Shard, "snapshot", snapshot)


def snapshot_forgets_what_is_under_way(plant, modes=SSP):
    def snapshot(self, original=shard.Shard.snapshot):
        return replace(original(self), gatherings={})
    plant(shard.Shard, "snapshot", snapshot)


def snapshot_forgets_older_versions(plant, modes=SSP):
    def snapshot(self, original=shard.Shard.snapshot):
        whole = original(self)
        return replace(whole, kept=whole.kept[-1:])
    plant(shard.Shard, "snapshot", snapshot)


def snapshot_is_torn_across_shards(plant, modes=("bsp, snapshots",)):
    plant("engine.sharder.coordinator.min", max, raising=False)


def new_term_forgets_the_optimizer_state(plant):
    def placed(k, rule, pieces, of_shard, checkpoint, original=memory.place):
        return original(k, rule, pieces, of_shard, replace(checkpoint, slots={}))
    plant("engine.sharder.shard.place", placed)


def shard_takes_pushes_of_an_older_term(plant):
    def push(self, message, original=shard.Shard._push):
        return original(self, replace(message, term=self._term()) if self.active else message)
    plant(shard.Shard, "_push", push)


def reshards_before_everything_is_on_record(plant):
    def sealed(self, original=coordinator.Coordinator._reshard_if_sealed):
        if self.wish is not None and not self.clocks and not self.restoring:
            return self._enter(self.wish)
        return []
    plant(coordinator.Coordinator, "_reshard_if_sealed", sealed)


def ends_before_everything_is_on_record(plant, modes=("bsp, snapshots",)):
    plant(coordinator.Coordinator, "finished", property(lambda self: self.finishing and self.clock >= self.granted))


BUGS = [bug for name, bug in sorted(globals().items())
        if callable(bug) and getattr(bug, "__code__", None) and bug.__code__.co_varnames[:1] == ("plant",)]
