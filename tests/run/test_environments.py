"""Environments of other people, most of them with a fault: trained, refused in one line, or their own exception."""

import numpy as np
import pytest
from environments import RecordingEnv, call_at, load, main, options, scalars, start, train

import dsac_e


@pytest.fixture(autouse=True)
def clear():
    RecordingEnv.clear()


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


def test_narrow_boxes(tmp_path):
    """The entropy budget exists only in the scripts that have a temperature; a larger rho makes it attainable."""
    assert train("Narrow", tmp_path / "td3", "td3") is None
    assert train("Narrow", tmp_path / "dsac_e", rho=6) is None
    assert "RescaleAction" in train("Narrow", tmp_path / "sac", "sac")


@pytest.mark.parametrize("env", ["Wide", "Narrow", "Recording"])
def test_note_about_raw_units(tmp_path, capsys, env):
    train(env, tmp_path / "run", "td3")
    assert ("note: critics see actions in raw units" in capsys.readouterr().out) == (env != "Recording")


@pytest.mark.parametrize("env, step", [
    ("NanReset", None), ("Shape", None),
    ("NanObservation", 20), ("InfiniteObservation", 20), ("OverflowObservation", 14), ("NanInteger", 14),
    ("NanReward", 20), ("InfiniteReward", 20), ("OverflowReward", 20), ("ArrayReward", 20),
])  # fmt: skip
def test_invalid_values_are_blamed_on_the_environment(tmp_path, env, step, recwarn):
    """In the last case the observation that ends an episode is invalid; the run is saved before."""
    message = train(env, tmp_path / "run")
    assert message.startswith(f"{env}-v0 returned an invalid observation or reward") and "\n" not in message
    assert not recwarn.list
    if step is not None:
        saved = load(tmp_path / "run")
        assert saved["step"] == step == len(saved["replay"]) and saved["replay"].isfinite().all()


def test_its_own_exception_after_saving(tmp_path):
    error = train("RaisingStep", tmp_path / "run")
    assert isinstance(error, ZeroDivisionError) and str(error) == "the robot fell"
    assert load(tmp_path / "run")["step"] == 32 and not load(tmp_path / "run")["finished"]


def test_an_exception_in_the_last_evaluation(tmp_path, monkeypatch):
    """The run is not finished: the same command repeats the evaluation."""
    with monkeypatch.context() as patch:
        call_at(patch, 114, lambda: 1 / 0)
        assert isinstance(train("Recording", tmp_path / "run"), ZeroDivisionError)
    assert load(tmp_path / "run")["step"] == 100 and not load(tmp_path / "run")["finished"]
    assert train("Recording", tmp_path / "run") is None
    assert 100 in scalars(tmp_path / "run")["eval/episodic_return"]


def test_without_time_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dsac_e, "EVAL_LIMIT", 20)
    assert train("Endless", tmp_path / "run") is None
    assert "note: this evaluation was cut off after 20 steps" in capsys.readouterr().out
    assert scalars(tmp_path / "run")["eval/episodic_length"][0] == 20


def test_close_that_raises(tmp_path):
    process = start(options("RaisingClose", tmp_path / "run"), "sac")
    assert "finished at step 100" in process.communicate(timeout=60)[0] and process.returncode == 0
    assert not isinstance(main("sac", ["--run-dir", tmp_path / "run", "--evaluate"]), str)


def test_the_action_that_is_executed_lies_in_the_box(tmp_path, monkeypatch):
    """tanh rounds to 1, and float32 rounds 0.4 up; Float64Env asserts that its space contains the action."""
    act = dsac_e.Policy.act

    def largest(self, obs, deterministic=False):
        action = act(self, obs, deterministic)
        high = (self.center + self.half_range).numpy()
        return np.broadcast_to(np.nextafter(high, np.float32(np.inf)), action.shape).copy()

    monkeypatch.setattr(dsac_e.Policy, "act", largest)
    assert train("Float64", tmp_path / "run") is None
