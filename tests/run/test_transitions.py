"""What training stores in the replay buffer and what an evaluation measures."""

import importlib

import numpy as np
import pytest
import torch
from environments import RecordingEnv
from scripts import load, scalars, train

import dsac_e


def columns(run_dir):
    """The transitions of a run in order: obs, action, next_obs, reward, terminated."""
    return torch.split(load(run_dir)["replay"], (3, 2, 3, 1, 1), dim=1)


@pytest.mark.parametrize("env", ["Recording", "Reusing", "ReusingFloat64", "Mutating", "Infos"])
def test_each_transition_is_stored_as_it_happened(tmp_path, env):
    """The last observation of an episode is stored, not the first of the next; truncation is not termination."""
    assert train(env, tmp_path).code == 0
    obs, action, next_obs, reward, terminated = columns(tmp_path)
    assert len(obs) == 100 and obs.untyped_storage().nbytes() == 100 * 10 * 4  # the file has no unused rows
    expected = {0: (0, 0), 1: (0, 0)}  # (episode, time) of the next observation of each copy
    taken = {copy: iter(RecordingEnv.actions[copy]) for copy in expected}
    for i in range(100):
        copy, episode, time = obs[i].int().tolist()
        assert copy == i % 2 and (episode, time) == expected[copy]
        assert next_obs[i].tolist() == [copy, episode, time + 1]
        assert reward[i] == 100 * episode + time + 1
        assert terminated[i] == (episode % 2 == 0 and time == 2)
        assert action[i].numpy() == pytest.approx(next(taken[copy]))
        expected[copy] = (episode + 1, 0) if time == (2, 4)[episode % 2] else (episode, time + 1)


def test_an_evaluation_counts_the_first_episode_of_each_environment(tmp_path, monkeypatch, capsys):
    """Two of them end after 3 steps, the others are cut off after 20."""
    monkeypatch.setattr(dsac_e, "EVAL_LIMIT", 20)
    train("Endless", tmp_path, eval_interval=1000, eval_episodes=4)
    assert RecordingEnv.copies == 2 + 4
    log = scalars(tmp_path)
    assert log["eval/episodic_length"][0] == (3 + 20) / 2
    assert log["eval/episodic_return"][0] == 108  # the mean of 1 + 2 + 3 and 1 + ... + 20
    assert log["eval/episodic_return_std"][0] == 102
    out = capsys.readouterr().out
    assert "step 0: return 108.0 +- 102.0\n" in out and "cut off after 20 steps" in out


@pytest.mark.parametrize("script, scale", [("dsac_e", None), ("td3", 0.0), ("td3", 0.3)])
def test_evaluations_are_deterministic_and_training_has_noise(tmp_path, script, scale):
    """With the initial policy; scale is --exploration-noise."""
    steps = {"learning_starts": 399, "total_timesteps": 400, "eval_interval": 1000}
    train("Recording", tmp_path, script, exploration_noise=scale, **steps)
    space = RecordingEnv.action_space
    policy = importlib.import_module(script).Policy(3, space.low, space.high, 8)
    policy.load_state_dict(load(tmp_path, "policy.pt")["policy"])
    obs, action, *_ = (column.numpy() for column in columns(tmp_path))
    noise = 2 * (action - policy.act(obs, deterministic=True)) / (space.high - space.low)
    if scale != 0:
        assert noise.std(0).min() > 0.03
        assert abs(np.corrcoef(noise[::2, 0], noise[1::2, 0])[0, 1]) < 0.3  # of the two environments
    assert ((action >= space.low) & (action <= space.high)).all()
    if scale is not None:
        inside = ((action > space.low) & (action < space.high)).all(1)
        assert noise[inside].std() == pytest.approx(scale, rel=0.25, abs=1e-6)
    first = np.array([[2, 0, time] for time in range(3)], np.float32)
    assert np.array(RecordingEnv.actions[2][:3]) == pytest.approx(policy.act(first, deterministic=True))
