"""Random sequences of optimizer steps against the papers' formulas; a planted bug shrinks to a step or two."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from engine import optim
from engine.testing import CheckFailure
from engine.testing import strategies as st_eg
from engine.testing.traces import Change, Save, Trace, Update, check_trace

QUICK = settings(max_examples=1000, database=None, deadline=None, derandomize=True,
                 phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))


@settings(max_examples=4 * settings.default.max_examples)
@given(trace=st_eg.optim_traces(), dtype=st.sampled_from(["float32", "float64"]),
       device=st.sampled_from(["cpu", "reference"]))
def test_random_traces(trace: Trace, dtype: str, device: str) -> None:
    check_trace(trace, dtype, device)


def test_the_source_runs(capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace("Adam", {"lr": 0.1, "beta1": 0.5}, ((3,), ()), second=0.5, events=(
        Update((7, None)), Change(1, "lr", 0.25), Save(), Update((8, 9), clip=0.5)))
    exec(compile(trace.source(), "trace", "exec"), {})
    assert "tensor(" in capsys.readouterr().out
    check_trace(trace)


def one_ahead(rule: Any) -> Any:
    old = rule.launch

    def launch(self: Any, *arguments: Any) -> None:
        old(self, *arguments[:-1], arguments[-1] + 1)
    return launch


def forgetful(self: optim.Optimizer, saved: Any) -> None:
    old_load(self, saved)
    for entry in self.state.values():
        entry["step"] = 0


old_load = optim.Optimizer.load_state_dict
BUGS: dict[str, tuple[Any, str, Any, list[str]]] = {
    "bias correction one step ahead": (optim.AdamRule, "launch", one_ahead(optim.AdamRule), ["Adam", "AdamW"]),
    "loading forgets the step": (optim.Optimizer, "load_state_dict", forgetful, ["Adagrad", "Adam"]),
}


@pytest.mark.parametrize("name", list(BUGS))
def test_a_planted_bug_shrinks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, attribute, wrong, optimizers = BUGS[name]
    monkeypatch.setattr(target, attribute, wrong)

    def fails(trace: Trace) -> bool:
        try:
            check_trace(trace)
        except CheckFailure:
            return True
        return False

    trace = find(st_eg.optim_traces(optimizers), fails, settings=QUICK)
    assert len(trace.events) <= 3 and len(trace.shapes) == 1, trace
    with pytest.raises(CheckFailure) as caught:
        check_trace(trace, "float64", "reference")
    assert 'with eg.device("reference")' in caught.value.reproduction
    with pytest.raises(CheckFailure, match="float64 on reference"):
        exec(compile(caught.value.reproduction, "trace", "exec"), {})
