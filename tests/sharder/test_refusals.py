"""What a server, a run and a client refuse, each by one line: nothing is bound, pushed, torn or written by then."""

from __future__ import annotations

import numpy as np
import pytest
from sharder_problems import Momentum, make, program

import engine as eg
from engine.optim import SGDRule
from engine.sharder import ParameterServer, bind


def server_of(**arguments):
    return make(ParameterServer, **{"workers": 2, "shards": 2, "microbatches": 3, **arguments})


def replica_of(values):
    return {name: eg.tensor(np.array(value), requires_grad=True) for name, value in values.items()}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"workers": 0}, "workers is 0, expected a whole number of at least 1"),
    ({"shards": 1.5}, "shards is 1.5, expected a whole number"), ({"microbatches": -1}, "microbatches is -1"),
    ({"save_every": -1}, "save_every is -1, expected a whole number of at least 0"),
    ({"save_every": 2.5}, "save_every is 2.5"), ({"rule": 3}, "rule is 3, expected an update rule"),
    ({"clip_norm": 0.0}, "clip_norm is 0.0, expected a positive number or None"),
    ({"clip_norm": "1"}, "clip_norm is '1', expected a positive number or None"),
    ({"hyper": 3}, "hyper is 3, expected a dict, a function or None"),
    ({"consistency": None}, "consistency is None, expected bsp, ssp:3, asp or a Consistency"),
    ({"damping": 0.5}, "damping is 0.5, expected a function or None"),
    ({"placement": "random"}, "placement is 'random', expected ranges or hashing"),
    ({"compress": 8}, "compress is 8, expected the name of a codec or None"),
    ({"zero": 4}, "zero is 4, expected 1, 2 or 3")])
def test_wrong_arguments_get_one_line(arguments, message):
    with pytest.raises(ValueError, match="ParameterServer: " + message):
        server_of(**arguments)


def test_wrong_parameters_get_one_line():
    one = np.ones(3, "float32")
    with pytest.raises(ValueError, match="got no parameters"):
        ParameterServer({}, Momentum(), microbatches=1)
    with pytest.raises(ValueError, match="'b' is float64, and 'a' is float32; expected one floating dtype"):
        ParameterServer({"a": one, "b": one.astype("float64")}, Momentum(), microbatches=1)
    with pytest.raises(ValueError, match="'a' is int64"):
        ParameterServer({"a": np.arange(3)}, Momentum(), microbatches=1)


@pytest.mark.parametrize(("gradients", "message"), [
    ({}, "push: 'w' has no gradient; every parameter of the server needs one"),
    ({"w": None}, "push: 'w' has no gradient"),
    ({"w": np.zeros(3, "float32"), "x": None}, "push: the server has no parameter 'x'; it has w"),
    ({"w": np.zeros(4, "float32")}, r"push: the gradient of 'w' is float32 \(4,\), expected float32 \(3,\)"),
    ({"w": np.zeros(3)}, r"push: the gradient of 'w' is float64 \(3,\), expected float32 \(3,\)"),
])
def test_gradients_that_do_not_fit_get_one_line(gradients, message):
    server = ParameterServer({"w": np.zeros(3, "float32")}, Momentum(), microbatches=1, device="reference")

    def train(client):
        while client.clock():
            client.push(0, gradients)

    with pytest.raises(ValueError, match=message):
        list(server.run(train, clocks=1))


def test_a_parameter_is_no_gradient_and_a_refused_push_takes_none():
    server = ParameterServer({"w": np.full(2, 5, "float32")}, SGDRule(lr=1.0), microbatches=1)

    def train(client):
        model = eg.nn.Module()
        model.w = eg.nn.Parameter(eg.zeros(2))
        while client.clock():
            client.pull(model)
            with pytest.raises(ValueError, match=r"the gradient of 'w' is a parameter; expected its \.grad"):
                client.push(0, {"w": model.w})
            model.w.sum().backward()
            with pytest.raises(ValueError, match="push of microbatch 7"):
                client.push(7, model)
            assert model.w.grad.tolist() == [1.0, 1.0]
            client.push(0, model)
            assert model.w.grad is None

    list(server.run(train, clocks=1))
    assert server.parameters()["w"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("late", [False, True])
def test_what_does_not_fit_is_not_bound_in_part(late):
    server = ParameterServer({"a": np.ones(2, "float32"), "b": np.ones(3, "float32")}, SGDRule(), microbatches=1)
    refused = [({"a": np.zeros(2, "float32"), "b": np.zeros(2, "float32")}, "bind: 'b' is float32"),
               ({"a": np.zeros(2, "float32"), "c": np.zeros(2, "float32")}, "bind: the server has no parameter 'c'")]
    twice = eg.zeros(2, requires_grad=True)

    def train(client):
        while client.clock():
            for values, message in refused:
                replica = replica_of(values)
                replica["a"].grad = eg.ones(2)
                with pytest.raises(ValueError, match=message):
                    client.pull(replica, late=late)
                assert replica["a"].tolist() == [0.0, 0.0] and replica["a"].grad is not None
            with pytest.raises(ValueError, match="bind: 'a' and 'b' are one tensor"):
                client.pull({"a": twice, "b": twice}, late=late)
            client.push(0, {name: np.zeros_like(value) for name, value in client.pull().items()})

    list(server.run(train, clocks=1))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"clocks": 2.5}, "clocks is 2.5, expected a whole number of at least 0 or None"),
    ({"clocks": -1}, "clocks is -1"), ({"clocks": "3"}, "clocks is '3'"),
    ({"stride": 0}, "stride is 0, expected a whole number of at least 1"), ({"stride": -1}, "stride is -1"),
    ({"stride": 1.5}, "stride is 1.5")])
def test_runs_that_cannot_be_are_refused(arguments, message):
    server = server_of()
    with pytest.raises(ValueError, match="run: " + message):
        next(server.run(program, **arguments))
    assert len(list(server.run(program, clocks=1))) == 1


def test_a_run_that_is_refused_leaves_the_trace_of_another(tmp_path):
    server, path = server_of(), tmp_path / "run.json"
    path.write_text("an older trace")
    running = server.run(program, clocks=2)
    next(running)
    with pytest.raises(RuntimeError, match="training is running already"):
        next(server.run(program, clocks=1, trace=path))
    assert path.read_text() == "an older trace"
    list(running)


def test_hyper_parameters_that_a_rule_refuses_tear_nothing():
    def server(**arguments):
        return ParameterServer({"w": np.ones(2, "float32")}, SGDRule(lr=1.0), microbatches=1, **arguments)

    def train(client):
        while client.clock():
            client.push(0, {"w": np.ones(2, "float32")})

    for wrong, message in (({"lrr": 1.0}, "got a hyper-parameter 'lrr'"), ({"lr": -1.0}, "lr is -1.0")):
        with pytest.raises(ValueError, match=message):
            server(hyper=wrong)
    torn = server(hyper=lambda step, name: {"lr": -1.0})
    with pytest.raises(ValueError, match=r"lr is -1\.0"):
        list(torn.run(train, clocks=1))
    assert torn.clock == 0 and torn.state()["parameters/w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("clock", [-1, 2.7, "2", None, [1, 2]])
def test_a_state_has_a_clock(clock):
    server = server_of()
    with pytest.raises(ValueError, match=r"load: 'clock' is .*, expected a whole number of at least 0"):
        server.load({**server.state(), "clock": clock})


def test_in_asp_a_microbatch_has_tokens():
    server = ParameterServer({"w": np.ones(2, "float32")}, SGDRule(), microbatches=1, consistency="asp")

    def train(client):
        while client.clock():
            client.push(0, {"w": np.ones(2, "float32")}, tokens=0)

    with pytest.raises(ValueError, match="push of microbatch 0 without tokens; in asp each is an update of its own"):
        list(server.run(train, clocks=1))


def test_a_replica_that_does_not_fit_gets_one_line():
    values = {"w": np.zeros(3, "float32")}
    with pytest.raises(ValueError, match="bind: the server has no parameter 'v'; it has w"):
        bind(replica_of({"v": values["w"]}), values)
    with pytest.raises(ValueError, match=r"bind: 'w' is float32 \(2,\) in the replica, and float32 \(3,\) on"):
        bind(replica_of({"w": np.zeros(2, "float32")}), values)
