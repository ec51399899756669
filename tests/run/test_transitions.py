"""What training stores in the replay buffer and what an evaluation measures."""

import numpy as np
import pytest
import torch
from environments import RecordingEnv, load, scalars, train

import dsac_e
import td3


def columns(run_dir):
    """The transitions of a run in order: obs, action, next_obs, reward, terminated."""
    return torch.split(load(run_dir)["replay"], (3, 2, 3, 1, 1), dim=1)


def policy_of(module, run_dir):
    policy = module.Policy(3, RecordingEnv.action_space.low, RecordingEnv.action_space.high, 8)
    policy.load_state_dict(load(run_dir, "policy.pt")["policy"])
    return policy


@pytest.mark.parametrize("env", ["Recording", "Reusing", "Mutating", "Infos"])
def test_each_transition_is_stored_as_it_happened(tmp_path, env):
    """The last observation of an episode is stored, not the first of the next; truncation is not termination."""
    assert train(env, tmp_path) is None
    obs, action, next_obs, reward, terminated = columns(tmp_path)
    assert len(obs) == 100
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


def test_an_evaluation_counts_the_first_episode_of_each_environment(tmp_path, capsys):
    train("Staggered", tmp_path, eval_interval=1000)
    log = scalars(tmp_path)
    assert log["eval/episodic_length"][0] == 3.5  # 2 and 5 steps
    assert log["eval/episodic_return"][0] == 9  # the mean of 1 + 2 and 1 + ... + 5
    assert log["eval/episodic_return_std"][0] == 6
    assert "step 0: return 9.0 +- 6.0\n" in capsys.readouterr().out


@pytest.mark.parametrize("module", [dsac_e, td3], ids=["dsac_e", "td3"])
def test_evaluations_are_deterministic_and_training_is_not(tmp_path, module):
    train("Recording", tmp_path, module.ALGORITHM, learning_starts=99, eval_interval=1000)  # keeps the policy
    policy = policy_of(module, tmp_path)
    obs, action, *_ = columns(tmp_path)
    half_range = (RecordingEnv.action_space.high - RecordingEnv.action_space.low) / 2
    noise = (action.numpy() - policy.act(obs.numpy(), deterministic=True)) / half_range
    assert noise.std(0).min() > 0.03
    assert abs(np.corrcoef(noise[::2, 0], noise[1::2, 0])[0, 1]) < 0.6  # of the two environments
    first = np.array([[2, 0, time] for time in range(3)], np.float32)
    assert np.array(RecordingEnv.actions[2][:3]) == pytest.approx(policy.act(first, deterministic=True))


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_exploration_noise(tmp_path, scale):
    """The argument reaches the policy of the training environments."""
    steps = {"learning_starts": 399, "total_timesteps": 400, "eval_interval": 1000}
    train("Recording", tmp_path, "td3", exploration_noise=scale, **steps)
    obs, action, *_ = (column.numpy() for column in columns(tmp_path))
    low, high = RecordingEnv.action_space.low, RecordingEnv.action_space.high
    noise = 2 * (action - policy_of(td3, tmp_path).act(obs, deterministic=True)) / (high - low)
    inside = ((action > low) & (action < high)).all(1)
    assert noise[inside].std() == pytest.approx(scale, rel=0.25, abs=1e-6)
    assert ((action >= low) & (action <= high)).all()
