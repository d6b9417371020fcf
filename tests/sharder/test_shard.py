"""A shard, one event at a time: what it answers, and what it ignores or refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fuzz_wire import bits
from sharder_machines import TERM, K, machines, push_to

import engine as eg
from engine.sharder.codecs import Payload
from engine.sharder.drivers.frozen import freeze
from engine.sharder.events import COORDINATOR, Send, Timeout, worker_address
from engine.sharder.journal import Journal
from engine.sharder.memory import Window
from engine.sharder.messages import Applied, Apply, Begin, Identity, Moved, ProtocolError, Pull, Push, Pushed, Reduced


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
    with pytest.raises(ProtocolError, match="told to apply clock 0 before all of it is here"):
        shard.step(Apply(1, 0, 1.0))
    with pytest.raises(ProtocolError, match="at clock 0"):
        shard.step(Apply(1, 3, 1.0))
    with pytest.raises(ProtocolError, match="is not for a shard"):
        shard.step(Begin(0, 0, 1, TERM, 0, 0, ()))


def another_length(push):
    first, *others = push.gradients
    return replace(push, gradients=(first.reshaped((first.size, 1)), *others))


WRONG = {  # what no worker sends, though it may be signed: the push made wrong, and the line
    "clock": (lambda push: replace(push, clock=1),
              r"shard 0: got Push\(.*\) at clock 0: its clock is 1, expected 0 to 0"),
    "version": (lambda push: replace(push, version=1), "its version is 1, expected 0 to 0"),
    "microbatch": (lambda push: replace(push, microbatch=2), "its microbatch is 2, expected 0 to 1"),
    "tokens": (lambda push: replace(push, tokens=float("nan")), "its tokens is nan, expected 0 to"),
    "sequence": (lambda push: replace(push, identity=Identity(0, 3, -1)), "its sequence is -1, expected 0 to"),
    "a gradient more": (lambda push: replace(push, gradients=push.gradients * 2), ": 6 gradients, expected 3"),
    "shape": (another_length, r"a gradient for 'w' is float32 \(15, 1\), expected float32 \(15,\)"),
    "dtype": (lambda push: replace(push, gradients=(K.zeros((15,), eg.float64), *push.gradients[1:])),
              r"a gradient for 'w' is float64 \(15,\), expected float32 \(15,\)"),
    "payload": (lambda push: replace(push, gradients=(Payload(b"?"), *push.gradients[1:])),
                "payload: 1 bytes, expected at least 16"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_push_that_no_worker_sends_is_refused_by_one_line_and_changes_nothing(wrong):
    """Also when it names an incarnation that is new, and behind a log, which has no record of it."""
    _, _, (shard, _), _ = machines()
    shard.step(push_to(shard))
    node, before = Journal(shard), bits(freeze(shard.snapshot()))
    make, line = WRONG[wrong]
    with pytest.raises(ProtocolError, match=f"{line}.*$") as caught:
        node.step(make(push_to(shard, epoch=1, microbatch=1)))
    assert "\n" not in str(caught.value)
    assert bits(freeze(shard.snapshot())) == before and node.appended == 0
    assert len(acknowledged(shard.step(push_to(shard, epoch=1, microbatch=1)))) == 1


def test_all_of_a_clock_is_computed_on_one_version():
    _, _, (shard, _), _ = machines(consistency="ssp:1", microbatches=2)
    for clock, microbatch in ((0, 0), (0, 1), (1, 0)):
        shard.step(push_to(shard, sequence=2 * clock + microbatch, clock=clock, microbatch=microbatch, version=0))
    shard.step(Apply(1, 0, 1.0))
    with pytest.raises(ProtocolError, match="its version is 1, expected 0 to 0"):
        shard.step(push_to(shard, worker=1, clock=1, microbatch=1, version=1))


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
