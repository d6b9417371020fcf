"""The coordinator, one event at a time: what it answers, and what it ignores or refuses."""

from __future__ import annotations

import numpy as np
import pytest
from sharder_machines import TERM, machines

from engine.sharder.consistency import Consistency
from engine.sharder.events import (
    Committed,
    Entered,
    Finish,
    Proceed,
    Reshard,
    Send,
    Timeout,
    shard_address,
    worker_address,
)
from engine.sharder.messages import (
    Applied,
    Apply,
    Begin,
    Blank,
    Choose,
    End,
    Gone,
    Held,
    Parameters,
    ProtocolError,
    Ready,
    Reduced,
    Refused,
    Restore,
    Restored,
    Saved,
    Term,
)
from engine.sharder.setup import Setup


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
    entered, *sends = coordinator.step(Restored(1, 2))
    assert entered == Entered(later) and shares(sends) == {1: (1, 1, (1,))}  # clock 1 once more
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


def test_workers_hear_which_version_all_may_yet_go_back_to():
    _, coordinator, _, _ = machines(durability="snapshot", save_every=1)
    coordinator.step(Ready(0, 0, 0))
    for message in (Proceed(1), reduced(0), reduced(1), Applied(0, 1, 0), Applied(1, 1, 0), Saved(0, 1, 1)):
        coordinator.step(message)
    (first,), saved, (second,) = (coordinator.step(m) for m in (Ready(0, 0, 1), Saved(1, 1, 1), Ready(1, 0, 0)))
    assert saved == [] and (first.message.clock, first.message.floor) == (1, 0)
    assert (second.message.clock, second.message.floor) == (1, 1)


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
    assert coordinator.step(Reshard(3)) == []  # it was asked for already
    assert coordinator.step(Saved(0, 1, 1)) == [Send(shard_address(s), Restore(Term(2, 3, 1))) for s in range(3)]
    assert coordinator.term.shards == 3
    assert coordinator.step(Reshard(3)) == coordinator.step(Restored(0, 2)) == coordinator.step(Restored(2, 2)) == []
    assert coordinator.step(Restored(1, 2))[0] == Entered(Term(2, 3, 1))
    assert coordinator.step(Reshard(3)) == [Entered(Term(2, 3, 1))]  # and again, if that was lost


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
    (Ready(0, 0, 0, protocol=99), "worker 0 speaks protocol 99, the coordinator 3"),
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


def test_in_asp_shards_may_have_taken_a_microbatch_from_different_incarnations():
    """One push of a worker reached shard 0, and then it died; the next one computed on later parameters."""
    coordinator = running(consistency="asp")
    coordinator.step(reduced(0, loss=1.0))
    assert [send.message for send in coordinator.step(reduced(1, loss=2.0))] == [Apply(1, 0, 1.0)] * 2
    assert commit(coordinator, 0)[0].loss == 1.0


def test_the_share_of_a_worker_that_comes_late_stays_its_own():
    """Else two workers could compute one microbatch of two clocks at once, and its residuals would cross."""
    _, coordinator, _, _ = machines(consistency=Consistency(staleness=1))
    coordinator.step(Proceed(3))
    assert shares(coordinator.step(Ready(0, 0, 0))) == {0: (0, 0, (0,))}
    assert shares(coordinator.step(Ready(0, 0, 1))) == {0: (1, 0, (0,))}
    assert coordinator.step(Ready(0, 0, 2)) == []  # as far ahead as it may be
    assert shares(coordinator.step(Ready(1, 0, 0))) == {1: (0, 0, (1,))}
    assert shares(coordinator.step(Gone(1, 0))) == {0: (0, 0, (1,))}  # but not once it is gone


def test_the_share_of_a_worker_that_never_comes_is_given_away():
    _, coordinator, _, _ = machines()
    coordinator.step(Proceed(0))
    assert shares(coordinator.step(Ready(0, 0, 0))) == {0: (0, 0, (0,))}
    assert coordinator.step(Ready(0, 0, 1)) == []
    assert shares(coordinator.step(Gone(1, 0))) == {0: (0, 0, (1,))}
