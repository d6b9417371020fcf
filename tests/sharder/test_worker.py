"""A worker, one event at a time: what it answers, and what it ignores or refuses."""

from __future__ import annotations

import numpy as np
import pytest
from sharder_machines import TERM, K, machines, push_to
from sharder_problems import SMALL, start

import engine as eg
from engine.sharder.events import (
    COORDINATOR,
    Began,
    ClockRequested,
    Ended,
    Pulled,
    PullRequested,
    PushRequested,
    Send,
    Timeout,
    shard_address,
)
from engine.sharder.messages import (
    Apply,
    Begin,
    End,
    Identity,
    Moved,
    ProtocolError,
    Pull,
    Pushed,
    Ready,
    Refused,
    Term,
)


def begin(number, clock=0, microbatches=(0,), epoch=0, term=TERM):
    return Begin(0, epoch, number, term, clock, clock, microbatches)


def begun(worker, clock=0, microbatches=(0,)):
    worker.step(ClockRequested())
    assert worker.step(begin(worker.taken + 1, clock, microbatches)) == [Began(clock, microbatches)]


def flat(value=1.0):
    return {name: K.full((p.size,), value, eg.float32) for name, p in start(SMALL).items()}


def test_a_worker_asks_to_begin_and_begins():
    _, _, _, (worker, _) = machines()
    assert worker.step(ClockRequested()) == [Send(COORDINATOR, Ready(0, 0, 0))]
    assert worker.step(Timeout()) == [Send(COORDINATOR, Ready(0, 0, 0))]
    assert worker.step(begin(1)) == [Began(0, (0,))]
    assert worker.step(begin(1)) == []
    assert worker.step(Timeout()) == []


def test_a_push_that_fails_in_its_middle_may_be_made_again():
    """As when the disk takes no residual: what the first shards were to get is not sent, and not taken for sent."""
    _, _, _, (worker, _) = machines()
    begun(worker)
    left = [1]

    def encode(clock, microbatch, piece, part, term, floor):
        if piece.start or piece.parameter.name != next(iter(SMALL)):
            if left:
                left.pop()
                raise OSError("no space")
        return part

    worker.encode = encode
    with pytest.raises(OSError, match="no space"):
        worker.step(PushRequested(0, flat(), 1.0, 1))
    assert worker.due == {0} and not worker.pushes
    sends = worker.step(PushRequested(0, flat(), 1.0, 1))
    assert sorted(send.to for send in sends) == [shard_address(0), shard_address(1)]
    assert not worker.due and len(worker.pushes) == 2


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
    assert worker.step(Timeout()) == sends[1:] and worker.again == 1
    worker.step(Pushed(Identity(0, 0, 0), 1))
    assert worker.step(Timeout()) == [] and worker.again == 1


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


def test_an_overtaken_worker_pushes_nothing():
    """Its clock was committed without it, and it was given parameters of a later version: of those the gradients would
    be other ones."""
    _, _, shards, (worker, _) = machines(microbatches=1)
    begun(worker)
    for shard in shards:
        shard.step(push_to(shard))
        shard.step(Apply(1, 0, 1.0))
    answers = [shard.step(pull.message)[0].message for shard, pull in zip(shards, worker.step(PullRequested()))]
    assert worker.step(answers[0]) == []
    (pulled,) = worker.step(answers[1])
    assert [version.number for version in pulled.values] == [1, 1]
    assert worker.step(PushRequested(0, flat(), 0.0, 1)) == []
    assert not worker.pushes and not worker.leaving


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
    for tokens in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"push of microbatch 0 with {tokens} tokens, expected a finite number"):
            worker.step(PushRequested(0, flat(), 0.0, tokens))
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
