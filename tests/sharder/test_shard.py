"""A shard, one event at a time: what it answers, and what it ignores or refuses."""

from __future__ import annotations

import pytest
from sharder_machines import TERM, machines, push_to

from engine.sharder.events import COORDINATOR, Send, Timeout, worker_address
from engine.sharder.memory import Window
from engine.sharder.messages import Applied, Apply, Begin, Moved, ProtocolError, Pull, Push, Pushed, Reduced


def acknowledged(actions):
    return [a.message for a in actions if isinstance(a.message, Pushed)]


def total(shard, clock=0):
    """The first element of the sum of a clock."""
    return shard.gatherings[clock].sum.total().gradients[0].data[0]


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
    assert total(shard) == 4.0


def test_a_microbatch_from_a_new_incarnation_counts_once():
    _, _, (shard, _), _ = machines()
    shard.step(push_to(shard, epoch=0))
    actions = shard.step(push_to(shard, epoch=1, value=100.0))
    assert len(acknowledged(actions)) == 1 and not shard.gatherings[0].complete
    shard.step(push_to(shard, worker=1, microbatch=1))
    assert total(shard) == 2.0


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
