"""Environments of other people, most of them with a fault: trained, refused in one line, or their own exception."""

import numpy as np
import pytest
from environments import call_at, load, scalars, train

import dsac_e


@pytest.mark.parametrize("env", ["Float64", "IntegerObservation", "RaisingClose", "OneStep"])
def test_trained(tmp_path, env, recwarn):
    assert train(env, tmp_path / "run") is None
    assert load(tmp_path / "run")["finished"] and not recwarn.list


@pytest.mark.parametrize("env, says", [
    ("Narrow", "raise --rho or RescaleAction"),
    ("Dictionary", "FlattenObservation"),
    ("Image", "FlattenObservation"),
    ("IntegerAction", "actions real and bounded"),
    ("Unbounded", "actions real and bounded"),
    ("ManyBounds", "actions real and bounded"),
])  # fmt: skip
def test_refused_before_the_run(tmp_path, env, says, recwarn):
    message = train(env, tmp_path / "run")
    assert says in message and "\n" not in message
    assert not (tmp_path / "run").exists() and not recwarn.list


@pytest.mark.parametrize("env", ["Wide", "Narrow", "Recording"])
def test_note_about_raw_units(tmp_path, capsys, env):
    train(env, tmp_path / "run", "td3")
    assert ("note: critics see actions in raw units" in capsys.readouterr().out) == (env != "Recording")


INVALID = ["NanReset", "Shape", "NanObservation", "InfiniteObservation", "OverflowObservation", "NanInteger",
           "FractionalInteger", "Unsigned", "NanAutoreset", "NanReward", "InfiniteReward", "OverflowReward", "ArrayReward"]  # fmt: skip


@pytest.mark.parametrize("env", INVALID)
def test_invalid_values_are_blamed_on_the_environment(tmp_path, env, recwarn):
    """Where they come later than in the first reset, the run is saved without the transition."""
    message = train(env, tmp_path / "run")
    assert message.startswith(f"{env}-v0 returned an invalid observation or reward") and "\n" not in message
    assert not recwarn.list
    if env not in ("NanReset", "Shape"):
        saved = load(tmp_path / "run")
        step = 14 if env == "NanAutoreset" else 20
        assert saved["step"] == step == len(saved["replay"]) and saved["replay"].isfinite().all()


@pytest.mark.parametrize(
    "n, step", [(80, 66), (114, 100), (None, 40)], ids=["step", "last evaluation", "logging"]
)
def test_an_exception_saves_and_the_same_command_continues(tmp_path, monkeypatch, n, step):
    """When logging fails, the transitions of the step are already in the buffer, but the step is repeated."""
    with monkeypatch.context() as patch:
        call_at(patch, n, lambda: 1 / 0)
        if n is None:
            patch.setattr(dsac_e, "LOG_INTERVAL", 1)
            patch.setattr(dsac_e.SummaryWriter, "add_scalar", lambda self, tag, *_: "eval" in tag or 1 / 0)
        assert isinstance(train("Recording", tmp_path / "run"), ZeroDivisionError)
    saved = load(tmp_path / "run")
    assert (saved["step"], len(saved["replay"]), saved["finished"]) == (step, step, False)
    assert train("Recording", tmp_path / "run") is None
    assert 100 in scalars(tmp_path / "run")["eval/episodic_return"]


def test_without_time_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dsac_e, "EVAL_LIMIT", 20)
    assert train("Endless", tmp_path / "run") is None
    assert "note: this evaluation was cut off after 20 steps" in capsys.readouterr().out
    assert scalars(tmp_path / "run")["eval/episodic_length"][0] == 20


def test_the_action_that_is_executed_lies_in_the_box(tmp_path, monkeypatch):
    """tanh rounds to 1, and float32 rounds 0.4 up; Float64Env asserts that its space contains the action."""
    act = dsac_e.Policy.act

    def largest(self, obs, deterministic=False):
        action = act(self, obs, deterministic)
        high = (self.center + self.half_range).numpy()
        return np.broadcast_to(np.nextafter(high, np.float32(np.inf)), action.shape).copy()

    monkeypatch.setattr(dsac_e.Policy, "act", largest)
    assert train("Float64", tmp_path / "run") is None
