"""tools/plan.py: what a prediction must be like, whatever the cluster, and what has been published."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf
from pathlib import Path
from random import Random

import plan as program
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.models import Transformer, TransformerConfig
from engine.optim.clip import BLOCK
from engine.sharder.partition import Partition
from tools.planning import published, stragglers
from tools.planning.cost_model import Plan
from tools.planning.measured import explained
from tools.planning.models import PRESETS, from_file, parameters_of
from tools.planning.plot import plot
from tools.planning.predict import DAY, best, predict, scan
from tools.training.errors import ProgramError

GIGABIT = 0.125e9
CLUSTER = Plan(2**22, 4, 0.5, shards=2, bandwidth=2.0**20 * 16, latency=2.0**-10, memory=2.0**30, tokens=128)


# ── properties ────────────────────────────────────────────────────────────────────────────────────────

def test_without_latency_at_infinite_bandwidth_a_step_is_pure_compute():
    found = predict(Plan(1e9, 8, 0.25, shards=4))
    assert found.step == found.p90 == found.mean == 0.25
    assert found.parts == {"compute": 0.25, "push": 0, "update": 0, "pull": 0, "waiting": 0}
    assert found.lost == {} and found.rate == 8 / 0.25


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_one_shard_is_the_closed_form_of_the_docstring(workers):
    """With powers of two there is no rounding: the same number."""
    found, n = predict(CLUSTER.with_(workers=workers, shards=1, microbatches=workers)), 2**22
    link, memory = workers * 4 * n / CLUSTER.bandwidth, 4 * n / CLUSTER.memory
    assert found.step == 2 * link + 0.5 + (3 * workers + 7) * memory + 7 * CLUSTER.latency
    assert found.parts["pull"] == link + 2 * CLUSTER.latency and found.parts["update"] == 7 * memory
    assert found.received == found.served == workers * found.pushed == workers * 4 * n


@settings(max_examples=15)
@given(st.integers(2**14, 2**24), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["bsp", "ssp:1"]),
       st.sampled_from(["dedicated", "shared"]))
def test_more_bytes_never_take_less_time(parameters, workers, shards, consistency, placement):
    one = CLUSTER.with_(parameters=parameters, workers=workers, shards=shards, microbatches=workers,
                        consistency=consistency, placement=placement)
    more, slower = (predict(plan, 6).mean for plan in (
        one.with_(parameters=2 * parameters), one.with_(bandwidth=one.bandwidth / 2)))
    mean = predict(one, 6).mean
    assert mean <= more and mean <= slower


@pytest.mark.parametrize("placement", ["dedicated", "shared"])
def test_every_byte_that_leaves_arrives(placement):
    found = predict(CLUSTER.with_(placement=placement, shards=4))
    per_worker = 4 * 2**22 * (3 / 4 if placement == "shared" else 1)
    assert found.pushed == found.pulled == found.received == found.served == per_worker


def test_the_parts_add_up_to_the_step():
    for plan in (CLUSTER, CLUSTER.with_(placement="shared"), CLUSTER.with_(overlap=0.5), CLUSTER.with_(microbatches=8)):
        found = predict(plan)
        rounding = 100 * 2.0**-52 * 20 * found.mean  # some hundred sums of times, of up to 20 steps
        assert abs(sum(found.parts.values()) - found.mean) <= rounding
        assert min(found.parts.values()) >= -rounding


def test_ssp_hides_stalls_and_a_backup_worker_a_slow_one():
    """Of 8 workers' microbatches one in ten takes four times as long: 1 + 3 (1 − 0.9⁸) = 2.71 a step in BSP, and 1.3
    without any waiting. A worker that is six times as slow costs BSP 6, and one backup 1 and now and then."""
    stalls = Plan(1e3, 8, 1.0, straggler="stall:0.1:4")
    assert predict(stalls, 150).mean > 1.6 * predict(stalls.with_(consistency="ssp:3"), 150).mean
    slow = Plan(1e3, 8, 1.0, straggler="slow:1:6")
    backup = predict(slow.with_(backups=1))
    assert predict(slow).mean == 6.0 and backup.mean < 2.0 and backup.rate == 7 / backup.mean  # one in 8 is not applied


def test_one_slow_step_in_fifty_is_in_the_mean_alone():
    found = predict(Plan(1e3, 1, 1.0, straggler="stall:0.02:9"), 100)
    assert found.step == found.p90 == 1.0 < found.mean < 2.0
    found = predict(Plan(1e3, 1, 1.0, straggler="stall:0.2:9"), 100)
    assert found.step == 1.0 < found.mean < found.p90 == 9.0


def test_compression_and_overlap_save_what_they_should():
    network = CLUSTER.with_(memory=inf, latency=0.0)
    assert predict(network).pushed / predict(network.with_(compress="int8")).pushed == pytest.approx(3.94, rel=0.01)
    saved = predict(network).step - predict(network.with_(overlap=0.5)).step
    assert saved == pytest.approx(0.25, rel=1e-9)  # half of the work, whose bytes the full link has carried already


def test_one_seed_is_one_output_and_another_seed_another():
    plan = CLUSTER.with_(straggler="lognormal:0.3", mtbf=30 * DAY, snapshot_every=2)
    first, again, other = (json.dumps(predict(plan, 6, seed).asdict()) for seed in (1, 1, 2))
    assert first == again != other


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("durability", "consistency"), [("snapshot", "bsp"), ("log", "ssp:1"), ("backup", "bsp")])
@pytest.mark.parametrize("placement", ["dedicated", "shared"])
def test_a_death_costs_its_absence_and_what_is_repeated(durability, consistency, placement):
    plan = CLUSTER.with_(durability=durability, consistency=consistency, placement=placement, mtbf=30 * DAY,
                         restart=500, snapshot_every=2, timeout=60.0)
    found = predict(plan, 6)
    nodes = plan.nodes()
    assert found.lost.keys() == nodes.keys()
    for kind, lost in found.lost.items():
        cost = lost * 30 / len(nodes[kind])
        # it is noticed, and asked for again, at a timeout; and a roll-back repeats up to two clocks and the running one
        assert 500 - 2 * found.mean <= cost <= 500 + 3 * 60 + 4 * found.mean, kind
    assert 0 < found.lost_a_day == sum(found.lost.values())
    assert predict(plan.with_(mtbf=60 * DAY), 6).lost_a_day == found.lost_a_day / 2
    assert predict(plan.with_(mtbf=inf), 6).lost_a_day == 0


def test_snapshots_further_apart_lose_half_the_interval_more():
    plan = CLUSTER.with_(mtbf=30 * DAY, snapshot_every=4)
    near, far = predict(plan, 6), predict(plan.with_(snapshot_every=104), 6)
    assert far.lost["shard"] - near.lost["shard"] == pytest.approx(2 / 30 * 50 * near.mean, rel=1e-9)
    assert far.lost["worker"] == near.lost["worker"]


def test_a_longer_log_is_read_and_summed_again():
    plan, n = CLUSTER.with_(mtbf=30 * DAY, snapshot_every=4, consistency="ssp:1", disk=2.0**28), 2**21
    near, far = predict(plan, 6), predict(plan.with_(snapshot_every=104), 6)
    clock = 4 * (4 * n / plan.disk + 12 * n / plan.memory) + 4 * n * (3 + 2 * 2) / plan.memory
    assert far.lost["shard"] - near.lost["shard"] == pytest.approx(2 / 30 * 50 * clock, rel=1e-9)
    assert far.lost["worker"] == near.lost["worker"]


@pytest.mark.parametrize(("optimizer", "numbers"), [("sgd", 1), ("momentum", 2), ("adam", 3)])
def test_a_snapshot_has_the_parameters_and_what_the_optimizer_keeps(optimizer, numbers):
    assert CLUSTER.with_(optimizer=optimizer).costs(0).snapshot == (numbers * 4 * 2**21,) * 2


def test_which_nodes_can_die():
    assert CLUSTER.nodes() == {"worker": [0, 1, 2, 3], "shard": [4, 5], "coordinator": [6]}
    assert CLUSTER.with_(placement="shared").nodes() == {"worker": [2, 3], "shard": [0, 1]}


# ── inputs ────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("config", [
    TransformerConfig.gpt2(layers=2, width=32, heads=4, vocab_size=50), PRESETS["default"],
    TransformerConfig.gpt2(layers=1, width=32, heads=4, vocab_size=50, tie_weights=False, bias=False),
    TransformerConfig.llama(layers=2, width=32, heads=4, kv_heads=2, vocab_size=50),
    TransformerConfig.bert(layers=2, width=32, heads=4, vocab_size=50)])
def test_parameters_are_counted_as_the_model_has_them(config):
    assert parameters_of(config) == Transformer(config).num_parameters()


def test_a_config_file_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2"}))
    assert from_file(path) == 124_439_808
    path.write_text("[]")
    with pytest.raises(ProgramError, match="JSON of a list, expected an object"):
        from_file(path)


@given(st.integers(1, 40 * BLOCK), st.integers(1, 7))
def test_shards_are_as_large_as_the_partition_makes_them(parameters, shards):
    """Within a block: boundaries lie at whole blocks of one parameter, nearest to an even share."""
    shards = min(shards, parameters)
    partition = Partition({"p": (parameters,)}, shards)
    real = [sum(piece.size for piece in pieces) for pieces in partition.pieces]
    sizes = Plan(parameters, 1, 1.0, shards=shards).sizes
    assert sum(sizes) == parameters and all(abs(a - b) <= BLOCK for a, b in zip(sizes, real))


def test_memory_is_what_the_docstring_counts():
    found = Plan(2**22, 8, 1.0, shards=4).memory_bytes()
    n = 2**20
    assert found == {"worker": {"parameters": 4 * 2**22, "gradients": 4 * 2**22},
                     "shard": {"versions": 8 * n, "optimizer": 8 * n, "gradients": 4 * n * (3 + 1)}}
    assert Plan(2**22, 8, 1.0, shards=4, consistency="ssp:3", optimizer="sgd").memory_bytes()["shard"] == {
        "versions": 4 * n * (2 + 3), "optimizer": 0, "gradients": 4 * n * 4 * (3 + 1)}
    compressed = Plan(2**22, 4, 1.0, microbatches=8, compress="int8", optimizer="momentum").memory_bytes()["worker"]
    assert compressed["gradients"] == 4 * 2**22 * (1 + 2 * 2)
    held = Plan(2**22, 8, 1.0, shards=4, backups=1).memory_bytes()["shard"]["gradients"]
    assert held == 4 * n * (3 + 1 + 7)


@pytest.mark.parametrize(("text", "mean"), [
    ("none", 1.0), ("stall:0.25:5", 2.0), ("exponential:0.5", 1.5), ("slow:2:3", 1.5),
    ("lognormal:0.5", 2.718281828 ** 0.125), ("stall:0.25:5+slow:8:2", 4.0)])
def test_stragglers_have_their_mean(text, mean):
    work = stragglers.drawn(stragglers.parse(text), 2.0, 0, 8)
    draws = [work(worker, clock, worker) / 2.0 for worker in range(8) for clock in range(2000)]
    deviation = (sum((x - mean) ** 2 for x in draws) / len(draws)) ** 0.5
    assert abs(sum(draws) / len(draws) - mean) <= 4 * deviation / len(draws) ** 0.5 + 1e-9
    assert work(3, 5, 3) == work(3, 5, 3)
    assert all(draw(Random(0), 0, 8) > 0 for draw in stragglers.parse(text))


def test_latency_and_memory_follow_from_two_models():
    latency, memory = 0.001, 5e9
    rest = [(size, 7 * latency + size / memory) for size in (1e6, 8e7)]
    assert explained(*rest) == pytest.approx((latency, memory), rel=1e-9)
    assert explained((1e6, 0.01), (8e7, 0.005)) == (0.01 / 7, inf)


# ── the program ───────────────────────────────────────────────────────────────────────────────────────

BASE = ["--parameters", "1M", "--workers", "4", "--work", "100ms", "--bandwidth", "1Gbit/s", "--clocks", "4"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    return program.run_program("plan", program.main)


def test_a_scan_as_table_json_and_picture(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "plan.png"
    assert run(monkeypatch, *BASE, "--png", str(picture)) == 0
    shown = capsys.readouterr().out
    assert "shards" in shown and "best: 4 shards" in shown and "waiting" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run(monkeypatch, *BASE, "--json", "--scan", "1,2,4") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"] == 4 and [p["plan"]["shards"] for p in found["predictions"]] == [1, 2, 4]
    assert found["predictions"][0]["step"] > found["predictions"][2]["step"] > 0.1
    assert found["predictions"][0]["plan"]["memory"] is None  # infinite


def test_work_follows_from_flops_by_six_a_parameter_and_token(monkeypatch, capsys):
    arguments = ["--parameters", "1M", "--workers", "1", "--tokens", "2k", "--flops", "6G", "--clocks", "3"]
    assert run(monkeypatch, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["step"] == 2.0


def test_the_best_is_the_fewest_shards_that_are_fast_enough():
    """With work of an hour and a network of 8 workers' worth, further shards save less than one percent."""
    found = scan(Plan(1e6, 8, 3600.0, bandwidth=1e9, latency=1e-4), [1, 2, 4, 8], 4)
    assert best(found).plan.shards == 1
    assert best(scan(Plan(1e9, 8, 0.1, bandwidth=1e9), [1, 2, 8], 4)).plan.shards == 8


@pytest.mark.parametrize(("arguments", "message"), [
    (["--workers", "4"], "expected --workers, and one of --model, --config and --parameters"),
    ([*BASE, "--model", "gpt2"], "expected --workers, and one of --model, --config and --parameters"),
    (["--model", "gpt2", "--workers", "4"], "expected one of --work, the time of a microbatch, and --flops"),
    (["--model", "gpt2", "--workers", "4", "--flops", "1T"], "--tokens 0, expected both more than 0"),
    ([*BASE, "--work", "3"], "argument --work: got '3', expected a number and one of us, ms, s"),
    ([*BASE, "--bandwidth", "fast"], "argument --bandwidth: got 'fast', expected a number and one of kbit/s"),
    ([*BASE, "--bandwidth", "0GB/s"], "--bandwidth is 0, expected more than 0"),
    ([*BASE, "--parameters", "1x"], "argument --parameters: got '1x', expected a number"),
    ([*BASE, "--parameters", "1e999"], "argument --parameters: got '1e999', expected a number"),
    ([*BASE, "--parameters", "1.2.3"], "argument --parameters: got '1.2.3', expected a number"),
    ([*BASE, "--shards", "0"], "--shards is 0, expected at least 1"),
    ([*BASE, "--shards", "2", "--scan", "1,2"], "expected --shards or --scan, not both"),
    ([*BASE, "--scan", "1,x"], "argument --scan: got '1,x', expected numbers of shards"),
    ([*BASE, "--microbatches", "3"], "--microbatches is 3, expected at least --workers (4)"),
    ([*BASE, "--overlap", "1.5"], "--overlap is 1.5, expected a share from 0 to below 1"),
    ([*BASE, "--consistency", "bsq"], "--consistency is 'bsq', expected bsp, asp, or ssp:"),
    ([*BASE, "--consistency", "asp", "--backups", "1"], "--backups is 1, expected at least 0, and 0 with asp"),
    ([*BASE, "--consistency", "ssp:1", "--durability", "snapshot"], "--durability is snapshot, expected log or backup"),
    ([*BASE, "--backups", "4"], "--backups is 4, expected fewer than --microbatches (4)"),
    ([*BASE, "--backups", "-1"], "--backups is -1, expected at least 0"),
    ([*BASE, "--compress", "gzip"], "--compress is 'gzip', expected fp16"),
    ([*BASE, "--straggler", "stall:2:4"], "--straggler is 'stall:2:4', expected none, stall:P:F"),
    ([*BASE, "--straggler", "lognormal"], "--straggler is 'lognormal', expected none, stall:P:F"),
    ([*BASE, "--mtbf", "0s"], "--mtbf is 0, expected more than 0"),
    ([*BASE, "--clocks", "2"], "--clocks is 2, expected at least 3"),
    (["--config", "nowhere.json", "--workers", "1", "--work", "1s"], "--config nowhere.json: [Errno 2]"),
])
def test_a_wrong_flag_gets_one_line(monkeypatch, capsys, arguments, message):
    try:
        status = run(monkeypatch, *arguments)
    except SystemExit as stopped:  # argparse
        status = stopped.code
    error = capsys.readouterr().err.splitlines()
    assert status in (1, 2) and message in error[-1] and error[-1].startswith("plan: ")
    assert "Traceback" not in "".join(error)


def test_matplotlib_is_imported_for_a_picture_only():
    code = "import sys; sys.path.insert(0, 'tools'); import plan; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
    assert callable(plot)


# ── what has been published ───────────────────────────────────────────────────────────────────────────

def case(name):
    return list(next(c for c in published.CASES if c.name == name).comparisons())


def test_measured_training_on_ec2_is_predicted_within_five_percent():
    errors = [comparison.error for comparison in case("TensorFlow on EC2")]
    assert len(errors) == 9 and max(map(abs, errors)) < 0.05


def test_on_shared_nodes_a_step_is_the_published_formula():
    shared, dedicated = case("BytePS, its analysis")
    assert shared.predicted == pytest.approx(shared.published, rel=1e-12)
    assert dedicated.predicted == pytest.approx(2 * dedicated.published, rel=1e-12)  # nothing is pulled early here


def test_every_case_says_where_it_is_from(monkeypatch, capsys):
    cheap = tuple(c for c in published.CASES if c.name.startswith("BytePS"))
    monkeypatch.setattr(published, "CASES", cheap)
    assert run(monkeypatch, "--check") == 0
    shown = capsys.readouterr().out
    assert all(c.name in shown and c.source in shown and c.note in shown for c in cheap) and "+100.0 %" in shown
