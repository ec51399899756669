"""The value distributions of DSAC-E and DSAC-T: the gradient of Eq. 11, and what the critics learn by following it."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dsac_e
import dsac_t

GAMMA, TAU, EPS = 0.9, 0.1, 0.1
both = pytest.mark.parametrize("module", [dsac_e, dsac_t], ids=["dsac_e", "dsac_t"])


class Answers(nn.Module):
    """A critic that gives the same answer to everything: Q and sigma, (2, B), so that their gradients can be read."""

    def __init__(self, q, sigma):
        super().__init__()
        self.q, self.sigma = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (q, sigma))

    def forward(self, obs, action):
        return self.q, self.sigma


class Table(nn.Module):
    """Twin value distributions of a few states, which obs names by their number: (B, 1) -> (2, B), (2, B)."""

    def __init__(self, q, sigma):
        super().__init__()
        self.q = nn.Parameter(torch.tensor(q, dtype=torch.float64))  # (2, states)
        self.raw = nn.Parameter(torch.tensor(sigma, dtype=torch.float64).expm1().log())

    def forward(self, obs, action):
        state = obs[:, 0].long()
        return self.q[:, state], F.softplus(self.raw)[:, state]


def pev(module, critics, target_critics, batch, noise, spread, alpha=0.0, log_prob=None, tau=TAU):
    """The script's own pev; alpha and log_prob enter that of DSAC-T only."""
    spread = torch.as_tensor(spread, dtype=torch.float64)
    if module is dsac_e:
        return dsac_e.pev(critics, target_critics, batch, batch.action, noise, spread, GAMMA, tau)[:2]
    log_prob = torch.zeros_like(noise) if log_prob is None else log_prob
    alpha = torch.tensor(alpha, dtype=torch.float64)
    return dsac_t.pev(critics, target_critics, batch, batch.action, log_prob, noise, alpha, spread, GAMMA, tau)[:2]


def make_batch(module, reward, terminated, obs=None):
    reward, terminated = torch.as_tensor(reward), torch.as_tensor(terminated, dtype=torch.float64)
    obs = torch.zeros(len(reward), 1, dtype=torch.float64) if obs is None else obs
    return module.Batch(obs, torch.zeros_like(obs), reward, obs, terminated)


@both
def test_gradient_is_equation_11(module):
    """With respect to every Q and sigma, autograd's gradient is the formula's: on both sides of the clip to
    Q +- 3 * spread and inside it, for terminal and other transitions, for noise beyond +-3."""
    rng, size = np.random.default_rng(0), 64
    q, next_q = rng.normal(0, 2, (2, 2, size))
    sigma, next_sigma = rng.uniform(0.05, 2, (2, 2, size)) * [[1.0], [0.5]]
    reward, log_prob, alpha = rng.normal(0, 2, size), rng.normal(0, 3, size), 0.7
    noise = np.concatenate([[-5, -4, 4, 5], rng.normal(0, 1, size - 4)])
    terminated = np.arange(size) % 4 == 1
    old_spread = np.array([0.8, 1.7])

    critics, target_critics = Answers(q, sigma), Answers(next_q, next_sigma)
    batch, sample = make_batch(module, reward, terminated), (torch.tensor(noise), old_spread)
    loss, spread = pev(module, critics, target_critics, batch, *sample, alpha, torch.tensor(log_prob))
    loss.backward()

    m = old_spread + TAU * (sigma.mean(1) - old_spread)
    np.testing.assert_allclose(spread, m, rtol=1e-12)
    k, rows = np.argmin(next_q, 0), np.arange(size)
    entropy_bonus = -alpha * log_prob if module is dsac_t else 0.0
    y_q = reward + GAMMA * (1 - terminated) * (next_q[k, rows] + entropy_bonus)
    y_z = y_q + GAMMA * (1 - terminated) * next_sigma[k, rows] * np.clip(noise, -3, 3)
    y_z, free = np.clip(y_z, q - 3 * m[:, None], q + 3 * m[:, None]), y_z
    for side in (y_z < free, y_z > free, y_z == free):
        assert side.sum() > 5
    w = (m**2 + EPS)[:, None]
    np.testing.assert_allclose(critics.q.grad, -w * (y_q - q) / (sigma**2 + EPS) / size, rtol=1e-10)
    np.testing.assert_allclose(
        critics.sigma.grad, -w * ((y_z - q) ** 2 - sigma**2) / (sigma**3 + EPS) / size, rtol=1e-10
    )
    assert target_critics.q.grad is None and target_critics.sigma.grad is None


@both
def test_smaller_mean_chooses_the_twin(module):
    """Per sample, both targets come from the twin with the smaller mean, also where its sigma is the larger one."""
    q, sigma = np.full((2, 2), -50.0), np.ones((2, 2))
    critics = Answers(q, sigma)
    target_critics = Answers([[1.0, 9.0], [2.0, 4.0]], [[5.0, 0.1], [0.3, 7.0]])
    noise, reward, wide = np.array([1.0, -2.0]), np.array([0.5, -0.5]), 100.0  # so wide that nothing is clipped
    batch = make_batch(module, reward, [0, 0])
    loss, _ = pev(module, critics, target_critics, batch, torch.tensor(noise), [wide, wide], tau=0.0)
    loss.backward()

    # The formula, solved for the targets.
    w, size = wide**2 + EPS, 2
    y_q = q - critics.q.grad.numpy() * size / w * (1 + EPS)
    y_z = q + np.sqrt(1 - critics.sigma.grad.numpy() * size / w * (1 + EPS))
    np.testing.assert_allclose(y_q, [reward + GAMMA * np.array([1.0, 4.0])] * 2, rtol=1e-10)
    np.testing.assert_allclose(y_z, [reward + GAMMA * np.array([1.0 + 5.0 * 1, 4.0 + 7.0 * -2])] * 2, rtol=1e-10)


@both
def test_spread_is_a_running_mean(module):
    """Each twin's first batch initialises its spread, which afterwards moves by tau towards the mean sigma."""
    batch, noise = make_batch(module, np.zeros(2), [1, 1]), torch.zeros(2, dtype=torch.float64)
    first = Answers(np.zeros((2, 2)), [[1.0, 3.0], [0.2, 0.4]])
    second = Answers(np.zeros((2, 2)), [[6.0, 8.0], [0.0, 0.1]])
    _, spread = pev(module, first, first, batch, noise, [0.0, 0.0])
    np.testing.assert_allclose(spread, [2.0, 0.3], rtol=1e-12)
    _, spread = pev(module, second, first, batch, noise, spread)
    np.testing.assert_allclose(spread, [2.0 + TAU * (7 - 2), 0.3 + TAU * (0.05 - 0.3)], rtol=1e-12)
    assert not spread.requires_grad


@both
@pytest.mark.parametrize("spreads, kept", [((2.0,), (0.997,)), ((0.5, 3.0), (1.0, 0.905))])
def test_bandit(module, spreads, kept):
    """Rewards N(3 * state - 1, spread^2) that end the episode: Q becomes the mean, without bias, and sigma the spread,
    but for the bias of the clip: at the fixed point sigma^2 = E[clip(R - Q, +-3 m)^2], m the mean of all sigmas. A
    single spread loses 0.3% by that, and one twice as wide as the mean spread 10%.

    The batch holds quantiles of the rewards: an expectation without sampling error.
    """
    states, n = len(spreads), 500
    z = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
    means, state = 3.0 * np.arange(states) - 1, np.repeat(np.arange(states), n)
    reward = means[state] + np.array(spreads)[state] * np.tile(z, states)
    batch = make_batch(module, reward, np.ones(states * n), torch.tensor(state, dtype=torch.float64)[:, None])
    critics = Table(np.array([[-2.0], [4.0]]).repeat(states, 1), np.array([[0.5], [4.0]]).repeat(states, 1))
    beyond_the_end = Table(np.full((2, states), 1e3), np.full((2, states), 1e2))
    noise, spread = torch.ones(states * n, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    optimizer = torch.optim.SGD(critics.parameters(), lr=0.35)
    for _ in range(400):
        loss, spread = pev(module, critics, beyond_the_end, batch, noise, spread)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    fixed = np.array(spreads)
    for _ in range(200):
        bound = 3 * fixed.mean()
        fixed = np.array([np.sqrt(np.mean(np.clip(s * z, -bound, bound) ** 2)) for s in spreads])
    sigma = F.softplus(critics.raw).detach().numpy()
    np.testing.assert_allclose(critics.q.detach(), [means, means], atol=1e-6)
    np.testing.assert_allclose(sigma, [fixed, fixed], rtol=1e-6)
    np.testing.assert_allclose(sigma / spreads, [kept, kept], atol=2e-3)


def speed(loss_of, scale):
    """Rate at which Q, starting one sigma below the mean of N(3 * scale, scale^2), approaches it over 40 steps of plain
    gradient descent: the logarithm of the distance lost, per step of the learning rate."""
    z = np.array([NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)])
    critics = Table([[2.0 * scale]] * 2, [[scale]] * 2)
    spread = torch.full((2,), scale, dtype=torch.float64)
    optimizer = torch.optim.SGD(critics.parameters(), lr=0.003)
    for _ in range(40):
        loss, spread = loss_of(critics, scale * (3 + z), spread)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return -np.log(3 - critics.q[0].item() / scale) / (40 * 0.003)


def by_pev(critics, reward, spread):
    batch = make_batch(dsac_e, reward, np.ones(64))
    return pev(dsac_e, critics, critics, batch, torch.zeros(64, dtype=torch.float64), spread, tau=0.005)


def by_likelihood(critics, reward, spread):
    """The same without variance-based scaling: the plain Gaussian negative log-likelihood."""
    q, sigma = critics.q[:, :1], F.softplus(critics.raw)[:, :1]
    return ((torch.from_numpy(reward) - q).square() / (2 * sigma**2) + sigma.log()).mean(1).sum(), spread


def test_learning_speed_does_not_depend_on_the_scale_of_the_reward():
    """Rewards ten times as large or as small leave the relative speed of learning Q where it was, within 5%. Without
    variance-based scaling it goes with the inverse square of the scale: a hundredfold either way."""
    scales = np.array([0.1, 1.0, 10.0])
    np.testing.assert_allclose([speed(by_pev, scale) for scale in scales], speed(by_pev, 1.0), rtol=0.05)
    np.testing.assert_allclose([speed(by_likelihood, scale) for scale in scales], scales**-2, rtol=0.2)
