"""The replay buffer: order, uniform sampling, position after a resumption."""

import numpy as np
import pytest
import torch
from scripts import load, train

from sac import ReplayBuffer


def filled(capacity: int, n: int, total: int) -> ReplayBuffer:
    """Transition number i has i in each column, times 1, 10, 100, 1000; it terminates if i is odd."""
    buffer = ReplayBuffer(capacity, 2, 1, "cpu")
    buffer.rows.fill_(torch.nan)
    for first in range(0, total, n):
        i = np.arange(first, first + n)[:, None]
        obs = np.hstack((i, -i))
        buffer.add(obs, 10.0 * i, 100 * obs, 1000 * i[:, 0], i[:, 0] % 2 == 1)
    return buffer


@pytest.mark.parametrize("n", [3, 7])
def test_the_newest_transitions_overwrite_the_oldest(n):
    buffer = filled(capacity=10, n=n, total=5 * n)
    assert buffer.added == 5 * n
    order = buffer.rows[:, 0].argsort()
    assert buffer.rows[order, 0].tolist() == list(range(5 * n - 10, 5 * n))
    assert (buffer.rows[:, 0] % 10).tolist() == list(range(10))  # transition i lies in row i % 10


@pytest.mark.parametrize("total, oldest", [(12, 0), (33, 13)], ids=["filling", "full"])
def test_samples_are_uniform_and_whole(total, oldest):
    torch.manual_seed(0)
    batch = filled(capacity=20, n=3, total=total).sample(20_000)
    i = batch.obs[:, 0]
    assert torch.equal(batch.obs[:, 1], -i) and torch.equal(batch.action, 10 * i[:, None])
    assert torch.equal(batch.next_obs, torch.stack((100 * i, -100 * i), 1))
    assert torch.equal(batch.reward, 1000 * i) and torch.equal(batch.terminated, i % 2)
    assert all(column.dtype == torch.float32 for column in batch)
    counts = torch.bincount(i.long(), minlength=total)
    assert counts[:oldest].sum() == 0
    expected = 20_000 / (total - oldest)
    # Chi-square with 11 and 19 degrees of freedom.
    assert ((counts[oldest:] - expected) ** 2 / expected).sum() < 45


def test_a_resumed_run_fills_the_ring_where_it_stopped(tmp_path):
    arguments = {"num_envs": 3, "buffer_size": 50, "eval_interval": 1000}
    train("Recording", tmp_path, "sac", total_timesteps=60, **arguments)
    before = load(tmp_path)["replay"]
    train("Recording", tmp_path, "sac", total_timesteps=66, **arguments)
    after = load(tmp_path)["replay"]
    assert len(before) == len(after) == 50
    changed = (before != after).any(1).nonzero().flatten()
    assert changed.tolist() == [10, 11, 12, 13, 14, 15]
