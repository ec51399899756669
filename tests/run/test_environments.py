"""Environments of other people, most of them with a fault: trained, refused in one line, or their own exception."""

import mujoco
import numpy as np
import pytest
from environments import RecordingEnv
from scripts import Moment, call_at, load, scalars, train

import dsac_e


@pytest.mark.parametrize("env, says", [
    ("Narrow", "RescaleAction or a larger --rho"),
    ("Dictionary", "FlattenObservation"),
    ("Image", "FlattenObservation"),
    ("IntegerAction", "actions real and bounded"),
    ("HalfBounded", "actions real and bounded"),
    ("Empty", "actions real and bounded"),
])  # fmt: skip
def test_refused_before_the_run(tmp_path, env, says, recwarn):
    assert train(env, tmp_path / "run").fails_with(says)
    assert not (tmp_path / "run").exists() and not recwarn.list


@pytest.mark.parametrize("env", ["Shape", "NanAutoreset", "NanObservation", "OverflowObservation", "FractionalInteger",
                                 "Unsigned", "NanReward", "OverflowReward", "ArrayReward"])  # fmt: skip
def test_invalid_values_are_blamed_on_the_environment(tmp_path, env, recwarn):
    """Where they come later than in the first reset, the run is saved without the transition."""
    assert train(env, tmp_path / "run").fails_with(f"^{env}-v0 returned an invalid")
    assert not recwarn.list
    if env != "Shape":
        saved = load(tmp_path / "run")
        step = 14 if env == "NanAutoreset" else 20  # in the last step of episode 1 or 2
        assert saved["step"] == step == len(saved["replay"]) and saved["replay"].isfinite().all()


def test_an_environment_that_cannot_be_closed(tmp_path):
    assert train("RaisingClose", tmp_path).code == 0


def saved_at_and_resumes(run_dir, step):
    saved = load(run_dir)
    assert (saved["step"], len(saved["replay"]), saved["finished"]) == (step, step, False)
    assert train("Recording", run_dir).code == 0
    assert 100 in scalars(run_dir)["eval/episodic_return"]


@pytest.mark.parametrize("moment", [Moment.LEARNING, Moment.LAST_EVALUATION])
def test_an_exception_saves_and_the_same_command_resumes(tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        call_at(patch, moment, lambda: 1 / 0)
        train("Recording", tmp_path / "run")
    _, step = moment.value
    saved_at_and_resumes(tmp_path / "run", step)


def test_an_exception_while_logging(tmp_path, monkeypatch):
    """The transitions of the step are already in the buffer, but the step is repeated."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(dsac_e, "LOG_INTERVAL", 1)
        patch.setattr(dsac_e.SummaryWriter, "add_scalar", lambda self, tag, *_: "eval" in tag or 1 / 0)
        train("Recording", tmp_path / "run")
    saved_at_and_resumes(tmp_path / "run", 40)  # the first update


def test_after_a_first_reset_that_fails_the_same_command_starts(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(RecordingEnv, "reset", lambda self, **_: 1 / 0)
        train("Recording", tmp_path / "run")
    assert train("Recording", tmp_path / "run").code == 0


def test_the_action_that_is_executed_lies_in_the_box(tmp_path, monkeypatch):
    """tanh rounds to 1, and float32 rounds 0.4 up; Float64Env asserts that its space contains the action."""
    act = dsac_e.Policy.act

    def largest(self, obs, deterministic=False):
        action = act(self, obs, deterministic)
        high = (self.center + self.half_range).numpy()
        return np.broadcast_to(np.nextafter(high, np.float32(np.inf)), action.shape).copy()

    monkeypatch.setattr(dsac_e.Policy, "act", largest)
    assert train("Float64", tmp_path / "run").code == 0


def test_warnings_of_mujoco(tmp_path, capfd):
    """They go to stderr."""
    train("Recording", tmp_path)
    xml = "<mujoco><worldbody><body><freejoint/><geom size='1'/></body></worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    data.qpos[0] = np.nan
    mujoco.mj_step(model, data)
    out, err = capfd.readouterr()
    assert "QPOS" in err and "QPOS" not in out
