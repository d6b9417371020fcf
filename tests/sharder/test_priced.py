"""The simulator with costs: what messages, sums, updates and disks take, held against closed forms."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.optim import SGDRule
from engine.sharder import Consistency
from engine.sharder.drivers.faults import Weather
from engine.sharder.drivers.network import Flow, Network, fair_rates
from engine.sharder.drivers.priced import PATIENT, Costs, PricedSimulation, stand_in
from engine.sharder.messages import Push

SIZE, BANDWIDTH, LATENCY, WORK, SUM, UPDATE = 2.0**30, 2.0**30, 2.0**-10, 0.25, 2.0**-3, 2.0**-4


def priced(workers, shards, costs=None, microbatches=None, failures=(), consistency="bsp", durability="log",
           save_every=0, **changes):
    """A simulation whose every cost is a power of two, so that times are sums without rounding."""
    costs = costs or Costs(**{
        "push": (SIZE / shards,) * shards, "pull": (SIZE / shards,) * shards, "work": lambda *_: WORK,
        "sum": (SUM / shards,) * shards, "update": (UPDATE / shards,) * shards, "bandwidth": BANDWIDTH,
        "latency": LATENCY, **changes})
    return PricedSimulation(costs, SGDRule(lr=0.1), workers=workers, microbatches=microbatches or workers,
                            failures=failures, consistency=consistency, durability=durability, save_every=save_every)


def steps(simulation, clocks=4, **arguments):
    history = simulation.run(stand_in, clocks, 0, **{"weather": PATIENT, "limit": inf, **arguments})
    return [b - a for a, b in zip(history.committed_at, history.committed_at[1:])]


# ── the network ───────────────────────────────────────────────────────────────────────────────────────

@st.composite
def traffic(draw):
    nodes = draw(st.integers(2, 6))
    ways = draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), min_size=1, max_size=20))
    limits = draw(st.lists(st.sampled_from([inf, 0.5, 0.1, 0.01]), min_size=len(ways), max_size=len(ways)))
    return np.array(ways), np.array(limits)


@given(traffic())
def test_rates_are_max_min_fair(drawn):
    """No link carries more than it can; and every flow is at its limit, or crosses a full link on which none is
    faster: that is what makes rates max–min fair. (Bertsekas, Gallager 1992, section 6.5.2.)"""
    ways, limits = drawn
    rates = fair_rates(ways, limits, 1.0)
    rounding = 4 * len(ways) * np.finfo(float).eps  # of the sums that a rate comes from, of at most 20 terms up to 1
    for i, way in enumerate(ways):
        links = [rates[ways[:, end] == way[end]] for end in (0, 1)]
        assert all(rates_on_it.sum() <= 1 + rounding for rates_on_it in links)
        assert rates[i] == limits[i] or any(
            on_it.sum() >= 1 - rounding and rates[i] >= on_it.max() - rounding for on_it in links)


def test_a_flow_that_ends_leaves_its_share_to_the_others():
    network = Network(4.0)
    short, long = Flow(0, 2, 2.0), Flow(1, 2, 6.0)
    network.begin(0.0, short)
    network.begin(0.0, long)
    assert network.share() == 1.0  # 2 bytes at 2 a second
    assert network.ended(1.0) == [short]
    assert network.share() == 2.0  # 4 are left, at 4 a second
    assert network.ended(2.0) == [long] and network.share() == inf


def test_a_limited_flow_leaves_the_rest_to_the_others_until_it_is_released():
    network = Network(4.0)
    limited, free = Flow(0, 2, 8.0, limit=1.0), Flow(1, 2, 12.0)
    network.begin(0.0, limited)
    network.begin(0.0, free)
    assert network.share() == 4.0 and (limited.rate, free.rate) == (1.0, 3.0)
    network.release(2.0, limited)
    assert network.share() == 5.0 and (limited.rate, free.rate) == (2.0, 2.0) and limited.left == free.left == 6.0


# ── a step ────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_a_step_of_bsp_with_one_shard_is_the_closed_form(workers):
    """tools/planning/cost_model.py: 7 messages follow one another, and one link brings everything there and back."""
    expected = 2 * workers * SIZE / BANDWIDTH + WORK + workers * SUM + UPDATE + 7 * LATENCY
    assert steps(priced(workers, 1)) == [expected] * 3


@pytest.mark.parametrize(("workers", "shards", "links"), [(4, 4, 1.0), (8, 2, 4.0), (2, 8, 1.0), (1, 4, 1.0)])
def test_the_fullest_link_says_how_long_a_transfer_takes(workers, shards, links):
    """A worker's link carries the model once, a shard's W/S times."""
    simulation = priced(workers, shards, sum=(), update=(), latency=0.0)
    assert steps(simulation) == [WORK + 2 * links * SIZE / BANDWIDTH] * 3


def test_without_costs_a_step_is_its_work():
    assert steps(priced(4, 2, sum=(), update=(), latency=0.0, bandwidth=inf)) == [WORK] * 3


def test_gradients_that_leave_while_others_are_computed_save_that_time():
    """Half of the work is backward: then 1/8 of a second's worth of bytes is gone when the last gradient is there."""
    plain, early = (steps(priced(1, 1, sum=(), update=(), overlap=overlap)) for overlap in (0.0, 0.5))
    assert [a - b for a, b in zip(plain, early)] == [WORK / 2] * 3
    fast = steps(priced(1, 1, sum=(), update=(), overlap=0.5, bandwidth=64 * BANDWIDTH))
    assert fast == pytest.approx([WORK + SIZE / (64 * BANDWIDTH) + 7 * LATENCY] * 3, rel=1e-12)  # all of it has left


def test_what_stays_on_a_node_goes_past_the_network():
    apart = priced(2, 2, sum=(), update=(), latency=0.0)
    together = priced(2, 2, sum=(), update=(), latency=0.0, node=lambda address: address[1])
    assert steps(apart) == [WORK + 2.0] * 3
    assert steps(together) == [WORK + 1.0] * 3  # one of two shards is here
    near = priced(1, 1, sum=(), update=(), latency=0.0, node=lambda address: 0, local=2 * BANDWIDTH)
    assert steps(near) == [WORK + 2 * SIZE / (2 * BANDWIDTH)] * 3


def test_in_asp_every_push_is_an_update():
    simulation = priced(1, 1, microbatches=2, consistency="asp", bandwidth=inf, latency=0.0)
    assert steps(simulation, stride=4)[-1] == 2 * WORK  # the shard updates while the next microbatch is computed
    slow = priced(1, 1, microbatches=2, consistency="asp", bandwidth=inf, latency=0.0, update=(2 * WORK,), sum=(99.0,))
    assert steps(slow, stride=4)[-1] == 4 * WORK


def test_with_backups_sums_are_made_when_the_microbatches_are_chosen():
    late = Costs(push=(1.0,), pull=(1.0,), work=lambda worker, *_: WORK if worker < 3 else 64 * WORK, sum=(SUM,),
                 update=(UPDATE,))
    assert steps(priced(4, 1, late, consistency=Consistency(backups=1)))[0] == WORK + 3 * SUM + UPDATE


def test_a_log_is_written_before_anybody_hears_of_it():
    """The push is on disk before Pushed and Reduced; the shard's Apply and what the coordinator hears cost an fsync
    each. A record weighs what its message does."""
    none, log = (steps(priced(1, 1, latency=0.0, disk=disk, fsync=0.0)) for disk in (inf, SIZE))
    assert [b - a for a, b in zip(none, log)] == [1.0] * 3


def test_a_replica_gets_every_push_over_the_network():
    simulation = priced(1, 1, latency=0.0, sum=(), update=(), durability="backup", save_every=1)
    assert steps(simulation) == [WORK + 3 * SIZE / BANDWIDTH] * 3
    assert simulation.last.sent["shard", 0] == 2 * simulation.last.received["shard", 0]


# ── deaths ────────────────────────────────────────────────────────────────────────────────────────────

KINDS = ("worker", "shard", "coordinator", "backup")


@pytest.mark.parametrize(("consistency", "durability"), [
    ("bsp", "snapshot"), ("bsp", "log"), ("bsp", "backup"), ("ssp:2", "log"), ("asp", "log")])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_invariants_hold_when_nodes_die(consistency, durability, kind):
    """The same machines, and the same checks after every event as in every other history."""
    def run(failures):
        simulation = priced(2, 2, consistency=consistency, durability=durability, save_every=2, overlap=0.5, disk=SIZE,
                            snapshot=(SIZE, SIZE), fsync=LATENCY, failures=failures,
                            node=lambda address: 2 * KINDS.index(address[0]) + address[1])
        history = simulation.run(stand_in, 6, 0, Weather(latency=(0, 0), timeout=16.0, absence=8.0), limit=inf,
                                 stride=6 if consistency == "asp" else 1)
        return history, simulation

    calm, _ = run(())
    history, simulation = run(((calm.committed_at[2] + 0.5, 2 * KINDS.index(kind)),))
    assert history.faults == {kind: 1} and len(history.committed) >= 6 and simulation.clock == 6
    assert history.time > calm.time


@pytest.mark.parametrize(("dies", "arrives"), [
    (2 + WORK / 4, 2 + WORK / 2 + SIZE / BANDWIDTH), (2 + 3 * WORK / 4, 2 + 3 * WORK / 4 + 31 / 32)])
def test_a_worker_that_dies_takes_no_bandwidth_for_its_gradients(dies, arrives):
    """Both have pulled at 2 s, and their gradients leave from 2.125 s on: 1 s for one, 2 for both. When one dies 1/16 s
    later, 31/32 of the other's are still to come, and have the link to themselves."""
    simulation = priced(2, 1, sum=(), update=(), latency=0.0, overlap=0.5, failures=((dies, 1),),
                        node=lambda address: 2 * KINDS.index(address[0]) + address[1])
    history = simulation.run(stand_in, 1, 0, Weather(latency=(0, 0), timeout=inf, absence=8.0), limit=inf)
    arrived = [time for _, time, source, _, message in history.carried
               if isinstance(message, Push) and source == ("worker", 0)]
    assert arrived[0] == arrives


@pytest.mark.parametrize(("seconds", "moment", "repeated"), [
    (1 / 8, 2 * WORK + 1 / 16, 1), (1 / 8, 2 * WORK + 3 / 16, 0), (2 * WORK, 4 * WORK + 1 / 16, 3)])
def test_a_snapshot_counts_once_it_is_written_and_is_read_at_the_same_rate(seconds, moment, repeated):
    """A shard dies after two or four clocks: what its disk has not finished, one after the other, is computed again."""
    def end(disk):
        simulation = priced(1, 1, sum=(), update=(), latency=0.0, bandwidth=inf, durability="snapshot", save_every=1,
                            snapshot=(SIZE,), disk=disk, failures=((moment, 2),),
                            node=lambda address: 2 * KINDS.index(address[0]) + address[1])
        history = simulation.run(stand_in, 6, 0, Weather(latency=(0, 0), timeout=4.0, absence=2.0), limit=inf)
        assert history.faults == {"shard": 1}
        return history.committed_at[-1]

    assert end(SIZE / seconds) - end(inf) == seconds + repeated * WORK
