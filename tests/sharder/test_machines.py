"""The state machines one event at a time: what each answers, and what it ignores or refuses."""

from __future__ import annotations

import numpy as np
import pytest
from sharder_problems import make, start

import engine as eg
from engine.backend import get_backend
from engine.sharder.consistency import Consistency
from engine.sharder.drivers.simulator import Simulation
from engine.sharder.events import (
    COORDINATOR,
    Began,
    ClockRequested,
    Committed,
    Ended,
    Finish,
    Proceed,
    Pulled,
    PullRequested,
    PushRequested,
    Reshard,
    Send,
    Timeout,
    shard_address,
    worker_address,
)
from engine.sharder.memory import Window
from engine.sharder.messages import (
    Applied,
    Apply,
    Begin,
    Blank,
    Choose,
    End,
    Gone,
    Held,
    Identity,
    Moved,
    Parameters,
    ProtocolError,
    Pull,
    Push,
    Pushed,
    Ready,
    Reduced,
    Refused,
    Restore,
    Restored,
    Saved,
    Term,
)
from engine.sharder.setup import Setup

K = get_backend("reference")


TERM = Term(1, 2, 0)


def machines(**arguments):
    cluster = make(Simulation, **{"shards": 2, "workers": 2, "microbatches": 2, "save_every": 0, **arguments})
    coordinator, shards, workers = cluster.start()
    return cluster, coordinator, shards, workers


def push_to(shard, worker=0, epoch=0, sequence=0, clock=0, microbatch=0, value=1.0, term=1, version=None):
    gradients = tuple(K.full((piece.size,), value, eg.float32) for piece in shard.pieces)
    version = clock if version is None else version
    return Push(Identity(worker, epoch, sequence), term, clock, version, microbatch, 0.5, 1, gradients)


def acknowledged(actions):
    return [a.message for a in actions if isinstance(a.message, Pushed)]


def mean(shard, clock=0):
    return shard.gatherings[clock].mean


# ── shard ─────────────────────────────────────────────────────────────────────────────────────────────

def test_a_shard_reports_when_it_has_all_of_a_clock_and_updates_when_told():
    _, _, (shard, _), _ = machines()
    before = shard.memory.versions.current
    bits = before.flat.data.tobytes()
    assert len(shard.step(push_to(shard))) == 1
    *_, reduced = shard.step(push_to(shard, worker=1, microbatch=1))
    assert reduced.to == COORDINATOR and isinstance(reduced.message, Reduced)
    assert (reduced.message.clock, reduced.message.loss, reduced.message.tokens) == (0, 1.0, 2)
    assert shard.clock == 0
    assert shard.step(Apply(1, 0, 1.0)) == [Send(COORDINATOR, Applied(0, 1, 0))]
    assert shard.clock == 1 and shard.memory.versions.current.number == 1
    assert before.flat.data.tobytes() == bits  # out of place: who holds the old version still has it
    assert shard.memory.versions.current.flat.data.tobytes() != bits


def test_a_repeated_push_is_acknowledged_again_and_applied_once():
    _, _, (shard, _), _ = machines()
    push = push_to(shard)
    assert acknowledged(shard.step(push)) == acknowledged(shard.step(push)) == [Pushed(push.identity, 0)]
    shard.step(push_to(shard, worker=1, microbatch=1, value=3.0))
    assert mean(shard).gradients[0].data[0] == 2.0


def test_a_microbatch_from_a_new_incarnation_counts_once():
    _, _, (shard, _), _ = machines()
    shard.step(push_to(shard, epoch=0))
    actions = shard.step(push_to(shard, epoch=1, value=100.0))
    assert len(acknowledged(actions)) == 1 and mean(shard) is None
    shard.step(push_to(shard, worker=1, microbatch=1))
    assert mean(shard).gradients[0].data[0] == 1.0


def test_words_of_a_dead_incarnation_are_ignored():
    _, _, (shard, _), _ = machines()
    shard.step(Pull(0, 5, 1, 0))
    assert shard.step(push_to(shard, epoch=4)) == []
    assert shard.step(Pull(0, 4, 1, 0)) == []
    assert not shard.gatherings


def test_a_late_push_is_acknowledged_and_changes_nothing():
    _, _, (shard, _), _ = machines(microbatches=1)
    shard.step(push_to(shard))
    shard.step(Apply(1, 0, 1.0))
    assert len(acknowledged(shard.step(push_to(shard, sequence=9, clock=0)))) == 1
    assert not shard.gatherings


def test_a_shard_refuses_what_no_correct_peer_sends():
    _, _, (shard, _), _ = machines()
    with pytest.raises(ProtocolError, match="got a push for clock 1 at clock 0"):
        shard.step(push_to(shard, clock=1))
    with pytest.raises(ProtocolError, match="told to apply clock 0 before all of it is here"):
        shard.step(Apply(1, 0, 1.0))
    with pytest.raises(ProtocolError, match="at clock 0"):
        shard.step(Apply(1, 3, 1.0))
    with pytest.raises(ProtocolError, match="is not for a shard"):
        shard.step(Begin(0, 0, 1, TERM, 0, 0, ()))


def test_apply_is_answered_again_but_done_once():
    _, _, (shard, _), _ = machines(microbatches=1)
    shard.step(push_to(shard))
    first = shard.step(Apply(1, 0, 1.0))
    bits = shard.memory.versions.current.flat.data.tobytes()
    assert shard.step(Apply(1, 0, 1.0)) == first
    assert shard.memory.versions.current.flat.data.tobytes() == bits


def test_a_pull_of_a_version_to_come_is_answered_when_it_is_asked_again():
    _, _, (shard, _), _ = machines(microbatches=1)
    assert shard.step(Pull(1, 0, 1, 1)) == []
    shard.step(push_to(shard))
    shard.step(Apply(1, 0, 1.0))
    (answer,) = shard.step(Pull(1, 0, 1, 1))
    assert answer.to == worker_address(1) and answer.message.values.number == answer.message.version == 1


def test_words_of_another_term_change_nothing():
    _, _, (shard, _), _ = machines(microbatches=1)
    moved = [Send(worker_address(0), Moved(0, 0, TERM))]
    assert shard.step(push_to(shard, term=0)) == shard.step(Pull(0, 0, 0, 0)) == moved
    assert shard.step(push_to(shard, term=2)) == shard.step(Pull(0, 0, 2, 0)) == []
    assert shard.step(Apply(0, 0, 1.0)) == shard.step(Apply(2, 0, 1.0)) == []
    assert shard.clock == 0 and not shard.gatherings and not shard.windows


def test_a_shard_asks_again_until_it_is_told():
    _, _, (shard, _), _ = machines(microbatches=1)
    assert shard.step(Timeout()) == []
    *_, reduced = shard.step(push_to(shard))
    assert shard.step(Timeout()) == [reduced]
    shard.step(Apply(1, 0, 1.0))
    assert shard.step(Timeout()) == []


def test_a_clock_without_tokens_is_an_error():
    _, _, (shard, _), _ = machines(microbatches=1)
    push = push_to(shard)
    with pytest.raises(ValueError, match="sum to 0, expected > 0"):
        shard.step(Push(push.identity, 1, 0, 0, 0, 0.0, 0, push.gradients))


def test_the_window_knows_what_it_has_seen_and_stays_small():
    window = Window(0)
    assert [window.first_time(n) for n in (0, 2, 2, 0, 1, 1, 3)] == [True, True, False, False, True, False, True]
    assert window.floor == 4 and not window.above


# ── worker ────────────────────────────────────────────────────────────────────────────────────────────

def begin(number, clock=0, microbatches=(0,), epoch=0, term=TERM):
    return Begin(0, epoch, number, term, clock, clock, microbatches)


def begun(worker, clock=0, microbatches=(0,)):
    worker.step(ClockRequested())
    assert worker.step(begin(worker.taken + 1, clock, microbatches)) == [Began(clock, microbatches)]


def flat(value=1.0):
    return {name: K.full((p.size,), value, eg.float32) for name, p in start_arrays().items()}


def start_arrays():
    return start({"w": (3, 5), "b": (7,), "scale": (), "nothing": (0, 4), "v": (11,), "u": (2, 2, 2), "t": (9,)})


def test_a_worker_asks_to_begin_and_begins():
    _, _, _, (worker, _) = machines()
    assert worker.step(ClockRequested()) == [Send(COORDINATOR, Ready(0, 0, 0))]
    assert worker.step(Timeout()) == [Send(COORDINATOR, Ready(0, 0, 0))]
    assert worker.step(begin(1)) == [Began(0, (0,))]
    assert worker.step(begin(1)) == []
    assert worker.step(Timeout()) == []


def test_a_worker_ignores_answers_to_an_earlier_incarnation_or_clock():
    _, _, _, (worker, _) = machines()
    begun(worker)
    worker.step(PushRequested(0, flat(), 0.0, 1))
    worker.step(ClockRequested())
    assert worker.step(begin(1)) == []
    assert worker.step(begin(2, 1, epoch=7)) == []
    assert worker.step(End(0, 7)) == []
    assert worker.step(begin(2, 1)) == [Began(1, (0,))]


def test_work_of_an_older_term_is_void():
    _, _, _, (worker, _) = machines()
    begun(worker)
    later = Term(2, 1, 0)
    assert worker.step(Moved(0, 0, later)) == worker.step(Moved(0, 0, TERM)) == []
    assert worker.step(PullRequested()) == [Send(shard_address(0), Pull(0, 0, 2, 0))]  # of the shards that are left
    assert worker.step(PushRequested(0, flat(), 0.0, 1)) == []
    worker.step(ClockRequested())
    assert worker.step(begin(2)) == [Send(COORDINATOR, Ready(0, 0, 2))]  # taken, and void before it began
    assert worker.step(begin(3, term=later)) == [Began(0, (0,))]


def test_a_push_is_kept_until_every_shard_has_it():
    _, _, (a, b), (worker, _) = machines()
    begun(worker)
    sends = worker.step(PushRequested(0, flat(), 2.5, 3))
    assert [send.to for send in sends] == [shard_address(0), shard_address(1)]
    assert sends[0].message.identity == sends[1].message.identity == Identity(0, 0, 0)
    assert [g.size for g in sends[1].message.gradients] == [piece.size for piece in b.pieces]
    for action in a.step(sends[0].message):
        worker.step(action.message)
    assert worker.step(Timeout()) == sends[1:]
    worker.step(Pushed(Identity(0, 0, 0), 1))
    assert worker.step(Timeout()) == []


def test_a_push_shares_the_memory_of_the_gradients():
    _, _, _, (worker, _) = machines()
    begun(worker)
    gradients = flat()
    for send in worker.step(PushRequested(0, gradients, 0.0, 1)):
        for piece, share in zip(worker.partition.pieces[send.to[1]], send.message.gradients):
            assert np.shares_memory(share.data, gradients[piece.parameter.name].data)


def test_a_pull_never_mixes_versions():
    _, _, shards, (worker, _) = machines(microbatches=1)
    begun(worker)
    shards[1].step(push_to(shards[1]))
    shards[1].step(Apply(1, 0, 1.0))
    pulls = worker.step(PullRequested())
    older, newer = (shard.step(pull.message)[0].message for shard, pull in zip(shards, pulls))
    assert (older.values.number, newer.values.number) == (0, 1)
    assert worker.step(older) == []
    again = worker.step(newer)
    assert again == [Send(shard_address(s), Pull(0, 0, 1, 1)) for s in (0, 1)]
    assert worker.step(older) == []  # repeated by the network
    shards[0].step(push_to(shards[0]))
    shards[0].step(Apply(1, 0, 1.0))
    answers = [shard.step(pull.message)[0].message for shard, pull in zip(shards, again)]
    assert worker.step(answers[0]) == []
    (pulled,) = worker.step(answers[1])
    assert isinstance(pulled, Pulled) and [version.number for version in pulled.values] == [1, 1]


def test_an_answer_to_an_earlier_pull_is_not_taken_for_one_to_this():
    """It would be of another version: whoever takes over a lost worker's share may read an older one than before."""
    _, _, shards, (worker, _) = machines(microbatches=1, consistency="ssp:1")
    begun(worker, clock=1)
    first = worker.step(PullRequested())
    for shard in shards:
        shard.step(push_to(shard))
        shard.step(Apply(1, 0, 1.0))
    late = [shard.step(pull.message)[0].message for shard, pull in zip(shards, first)]
    worker.step(late[0])
    assert worker.step(late[1]) == [Pulled(tuple(answer.values for answer in late))]
    worker.step(PushRequested(0, flat(), 0.0, 1))
    begun(worker, clock=0)
    again = worker.step(PullRequested())
    assert worker.step(late[0]) == worker.step(late[1]) == []  # repeated by the network
    answers = [shard.step(pull.message)[0].message for shard, pull in zip(shards, again)]
    worker.step(answers[0])
    (pulled,) = worker.step(answers[1])
    assert [version.number for version in pulled.values] == [0, 0]


def test_a_program_that_breaks_the_rules_gets_one_clear_line():
    _, _, _, (worker, _) = machines()
    for request in (PullRequested(), PushRequested(0, flat(), 0.0, 1)):
        with pytest.raises(RuntimeError, match=r"worker 0: pull and push belong to a clock.*call clock\(\) first"):
            worker.step(request)
    begun(worker, microbatches=(0, 2))
    with pytest.raises(RuntimeError, match=r"clock\(\) before microbatches \[0, 2\] of clock 0 were pushed"):
        worker.step(ClockRequested())
    with pytest.raises(ValueError, match=r"push of microbatch 1 in clock 0, expected one of \[0, 2\], each once"):
        worker.step(PushRequested(1, flat(), 0.0, 1))
    worker.step(PushRequested(0, flat(), 0.0, 1))
    with pytest.raises(ValueError, match=r"push of microbatch 0 in clock 0, expected one of \[2\], each once"):
        worker.step(PushRequested(0, flat(), 0.0, 1))
    with pytest.raises(ProtocolError, match="is not for a worker"):
        worker.step(Apply(1, 0, 1.0))


def test_the_end_and_a_refusal_reach_the_program():
    _, _, _, (one, other) = machines()
    one.step(ClockRequested())
    assert one.step(End(0, 0)) == [Ended()]
    other.step(ClockRequested())
    assert other.step(Refused(1, 0, "not today")) == [Ended("not today")]


# ── coordinator ───────────────────────────────────────────────────────────────────────────────────────

def reduced(shard, clock=0, loss=1.0, squares=()):
    return Reduced(shard, 1, clock, loss, 2, np.array(squares, "float64"))


def shares(sends):
    return {send.message.worker: (send.message.clock, send.message.version, send.message.microbatches)
            for send in sends}


def running(workers=2, clocks=1, **arguments):
    """A coordinator that has begun its first clock with every worker."""
    _, coordinator, _, _ = machines(workers=workers, **arguments)
    for worker in range(workers):
        coordinator.step(Ready(worker, 0, 0))
    coordinator.step(Proceed(clocks - 1))
    return coordinator


def commit(coordinator, clock):
    actions = []
    for message in (*(reduced(s, clock) for s in range(2)), *(Applied(s, 1, clock) for s in range(2))):
        actions += coordinator.step(message)
    return [action for action in actions if isinstance(action, Committed)]


def test_microbatch_i_goes_to_worker_i_modulo_the_workers():
    _, coordinator, _, _ = machines(workers=3, microbatches=7)
    for worker in range(3):
        assert coordinator.step(Ready(worker, 0, 0)) == []
    given = shares(coordinator.step(Proceed(0)))
    assert given == {0: (0, 0, (0, 3, 6)), 1: (0, 0, (1, 4)), 2: (0, 0, (2, 5))}


def test_a_clock_begins_when_the_driver_says_so():
    _, coordinator, _, _ = machines()
    assert coordinator.step(Ready(1, 0, 0)) == []
    first = Send(worker_address(1), Begin(1, 0, 1, TERM, 0, 0, (1,)))
    assert coordinator.step(Proceed(0)) == [first]
    assert coordinator.step(Ready(0, 0, 0)) == [Send(worker_address(0), Begin(0, 0, 1, TERM, 0, 0, (0,)))]
    assert coordinator.step(Ready(1, 0, 0)) == [first]  # it was lost
    assert coordinator.step(Ready(1, 0, 1)) == []  # done with its share: waits for the next clock
    assert coordinator.step(Ready(1, 0, 0)) == [first]  # repeated by the network; the worker knows that it had it


def test_the_work_of_a_lost_worker_goes_to_whoever_asks():
    coordinator = running(microbatches=4)
    assert coordinator.step(Ready(0, 0, 1)) == []
    assert shares(coordinator.step(Gone(1, 0))) == {0: (0, 0, (1, 3))}
    assert coordinator.step(Gone(1, 0)) == []
    commit(coordinator, 0)
    coordinator.step(Proceed(1))
    assert shares(coordinator.step(Ready(0, 0, 2))) == {0: (1, 1, (0, 1, 2, 3))}  # it is alone now


def test_a_new_incarnation_gets_the_work_of_the_one_before():
    coordinator = running(microbatches=4)
    assert shares(coordinator.step(Ready(1, 1, 0))) == {1: (0, 0, (1, 3))}
    assert coordinator.step(Gone(1, 0)) == []  # old news


def test_a_worker_that_comes_later_gets_a_share_of_the_next_clock():
    coordinator = running(microbatches=6)
    assert coordinator.step(Ready(2, 0, 0)) == []
    commit(coordinator, 0)
    given = shares(coordinator.step(Proceed(1)))
    assert given == {2: (1, 1, (2, 5))}
    assert shares(coordinator.step(Ready(0, 0, 1))) == {0: (1, 1, (0, 3))}


def test_ssp_begins_clocks_ahead_each_on_one_version():
    coordinator = running(consistency="ssp:2")
    assert shares(coordinator.step(Ready(0, 0, 1))) == {0: (1, 0, (0,))}
    assert shares(coordinator.step(Ready(0, 0, 2))) == {0: (2, 0, (0,))}
    assert coordinator.step(Ready(0, 0, 3)) == []  # clock 3 needs the commit of clock 0
    (committed,) = commit(coordinator, 0)
    assert (committed.clock, committed.version) == (0, 0)
    assert shares(coordinator.step(Proceed(1))) == {0: (3, 1, (0,))}
    assert shares(coordinator.step(Ready(1, 0, 1))) == {1: (1, 0, (1,))}  # the version it was begun on


def test_nothing_is_applied_that_was_not_granted():
    coordinator = running(consistency="ssp:2")
    commit(coordinator, 0)
    coordinator.step(Ready(0, 0, 1))
    assert coordinator.step(reduced(0, 1)) == coordinator.step(reduced(1, 1)) == []
    applies = [send for send in coordinator.step(Proceed(1)) if isinstance(send.message, Apply)]
    assert [send.message.clock for send in applies] == [1, 1]


def test_backup_workers_are_not_waited_for_and_all_shards_leave_out_the_same():
    coordinator = running(workers=3, microbatches=3, consistency=Consistency(backups=1))
    assert coordinator.step(Held(0, 1, 0, (0, 1))) == coordinator.step(Held(1, 1, 0, (1, 2))) == []
    choices = coordinator.step(Held(1, 1, 0, (0, 1, 2)))
    assert choices == [Send(shard_address(s), Choose(1, 0, (0, 1))) for s in (0, 1)]
    assert coordinator.step(Held(0, 1, 0, (0, 1, 2))) == choices[:1]  # it did not hear: tell it again
    (committed,) = commit(coordinator, 0)
    assert committed.dropped == (2,)


def test_a_lost_shard_takes_all_back_to_the_last_snapshot_they_share():
    _, coordinator, _, _ = machines(durability="snapshot", save_every=1)
    for worker in range(2):
        coordinator.step(Ready(worker, 0, 0))
    coordinator.step(Proceed(1))
    commit(coordinator, 0)
    for shard in range(2):
        coordinator.step(Saved(shard, 1, 1))
    coordinator.step(Ready(0, 0, 1))
    commit(coordinator, 1)
    coordinator.step(Saved(0, 1, 2))
    later = Term(2, 2, 1)
    restores = [Send(shard_address(s), Restore(later)) for s in (0, 1)]
    assert coordinator.step(Blank(1, 1)) == coordinator.step(Timeout()) == restores
    assert coordinator.step(Blank(1, 1)) == []
    assert coordinator.step(Ready(1, 0, 1)) == coordinator.step(Restored(0, 2)) == []
    assert shares(coordinator.step(Restored(1, 2))) == {1: (1, 1, (1,))}  # clock 1 once more
    assert coordinator.step(Applied(0, 1, 1)) == []  # of the older term


def test_a_snapshot_of_a_version_says_that_its_clock_is_applied():
    """Else all could go back to a snapshot beyond the committed clocks, and one of them would never be committed."""
    _, coordinator, _, _ = machines(durability="snapshot", save_every=1)
    coordinator.step(Ready(0, 0, 0))
    coordinator.step(Proceed(0))
    for message in (reduced(0), reduced(1), Applied(0, 1, 0), Saved(0, 1, 1)):
        assert not any(isinstance(action, Committed) for action in coordinator.step(message))
    committed, *_ = coordinator.step(Saved(1, 1, 1))  # its Applied was lost
    assert isinstance(committed, Committed) and coordinator.clock == 1
    assert coordinator.step(Applied(1, 1, 0)) == []


def test_only_bsp_can_go_back():
    coordinator = running(consistency="ssp:1")
    with pytest.raises(ProtocolError, match="shard 1 lost its memory; only BSP can compute it again"):
        coordinator.step(Blank(1, 1))


def test_resharding_waits_for_the_clock_and_for_its_snapshots():
    coordinator = running(clocks=2)
    assert coordinator.step(Reshard(3)) == []
    assert coordinator.step(Ready(0, 0, 1)) == coordinator.step(reduced(0)) == []
    assert [send.message.save for send in coordinator.step(reduced(1))] == [True, True]
    coordinator.step(Applied(0, 1, 0))
    assert [type(action) for action in coordinator.step(Applied(1, 1, 0))] == [Committed]
    assert coordinator.step(Saved(1, 1, 1)) == []
    assert coordinator.step(Timeout()) == [Send(shard_address(0), Apply(1, 0, 1.0, True))]
    assert coordinator.step(Saved(0, 1, 1)) == [Send(shard_address(s), Restore(Term(2, 3, 1))) for s in range(3)]
    assert coordinator.term.shards == 3


def test_nobody_updates_before_every_shard_has_everything():
    coordinator = running()
    assert coordinator.step(reduced(1)) == []
    assert coordinator.step(reduced(1)) == []
    applies = [Send(shard_address(s), Apply(1, 0, 1.0)) for s in (0, 1)]
    assert coordinator.step(reduced(0)) == applies
    assert coordinator.step(Timeout()) == applies
    assert coordinator.step(Applied(1, 1, 0)) == []
    assert coordinator.step(Timeout()) == applies[:1]
    assert coordinator.step(reduced(0)) == applies[:1]  # it did not hear: tell it again
    assert coordinator.step(reduced(1)) == []
    assert coordinator.step(Applied(1, 1, 0)) == []
    assert coordinator.step(Applied(0, 1, 0)) == [Committed(0, 1.0, 2, None)]
    assert coordinator.step(Applied(0, 1, 0)) == coordinator.step(reduced(0)) == coordinator.step(Timeout()) == []
    assert coordinator.clock == 1


def test_the_norm_is_of_all_blocks_in_their_order(monkeypatch):
    seen = []
    monkeypatch.setattr(Setup, "clip", lambda self, squares: seen.append(squares.tolist()) or (7.0, 0.25))
    coordinator = running(shards=3, clip_norm=1.0)
    counts = [sum(len(p.blocks) for p in pieces) for pieces in coordinator.setup.partition(3).pieces]
    assert counts == [1, 3, 2]
    coordinator.step(reduced(2, squares=[5.0, 6.0]))
    coordinator.step(reduced(0, squares=[1.0]))
    decision = {send.message for send in coordinator.step(reduced(1, squares=[2.0, 3.0, 4.0]))}
    assert decision == {Apply(1, 0, 0.25)}
    assert seen == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    for shard in range(2):
        coordinator.step(Applied(shard, 1, 0))
    assert coordinator.step(Applied(2, 1, 0)) == [Committed(0, 1.0, 2, 7.0)]


def test_the_end_reaches_who_waits_and_who_comes_later():
    _, coordinator, _, _ = machines()
    coordinator.step(Ready(0, 0, 0))
    assert coordinator.step(Finish()) == [Send(worker_address(0), End(0, 0))]
    assert coordinator.step(Ready(1, 0, 0)) == [Send(worker_address(1), End(1, 0))]


@pytest.mark.parametrize(("ready", "reason"), [
    (Ready(0, 0, 0, protocol=99), "worker 0 speaks protocol 99, the coordinator 2"),
    (Ready(1, 2, 0), "worker 1 of epoch 2 was replaced by epoch 3"),
])
def test_strangers_are_refused_with_a_reason(ready, reason):
    _, coordinator, _, _ = machines()
    coordinator.step(Ready(1, 3, 0))
    refusal = Refused(ready.worker, ready.epoch, reason)
    assert coordinator.step(ready) == [Send(worker_address(ready.worker), refusal)]


def test_a_coordinator_refuses_what_no_correct_peer_sends():
    coordinator = running()
    with pytest.raises(ProtocolError, match="before clock 0 was decided"):
        coordinator.step(Applied(0, 1, 0))
    with pytest.raises(ProtocolError, match="clock 1 has not begun"):
        coordinator.step(reduced(0, clock=1))
    coordinator.step(reduced(0))
    with pytest.raises(ProtocolError, match="the shards disagree on the loss of clock 0"):
        coordinator.step(reduced(1, loss=2.0))
    with pytest.raises(ProtocolError, match="is not for the coordinator"):
        coordinator.step(Parameters(0, 0, 0, 0, 0, None))
