"""PEV, policy evaluation, of the value distributions N(Q_i, sigma_i^2) of DSAC-E and DSAC-T: what it converges to,
and what is rare in test_update.py, which compares the gradients with the formulas. Sampled targets are

  y_z = r + discount (V + sigmabar_k clamp(noise, -3, 3)),  clipped to Q_i +- 3 m_i,  m_i: running mean of sigma_i
"""

from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dsac_e
import dsac_t

distributional = pytest.mark.parametrize("script", [dsac_e, dsac_t], ids=["dsac_e", "dsac_t"])
QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 400) for i in range(400)])  # a sample without error


def leaf(x):
    return torch.tensor(np.asarray(x, float), requires_grad=True)


def pev(script, q, sigma, next_q, next_sigma, reward, discount, noise, mean_sigma, tau):
    """pev of DSAC-E, or DSAC-T with alpha = 0, on anything that torch.as_tensor accepts: loss, new mean_sigma, y_q."""
    arrays = (q, sigma, next_q, next_sigma, reward, discount, noise, mean_sigma)
    q, sigma, next_q, next_sigma, *rest = (torch.as_tensor(x, dtype=torch.float64) for x in arrays)
    extra = () if script is dsac_e else (torch.zeros(()), torch.zeros(()))  # log_prob, alpha
    return script.pev(q, sigma, next_q, next_sigma, *extra, *rest, tau)


@distributional
def test_noise_is_clamped_to_three_standard_deviations(script):
    """Only the gradient of sigma depends on the noise. Clipping to Q +- 3 m has no effect on these targets."""
    gradients = []
    for noise in ([-3.0, -2.99, 2.99, 3.0], [-3.01, -2.99, 2.99, 9.0]):
        sigma, zeros = leaf(np.ones((2, 4))), np.zeros((2, 4))
        rest = zeros[0] + 0.2, zeros[0] + 0.9, noise, [0, 0], 0.1
        loss, *_ = pev(script, zeros, sigma, zeros, zeros + 0.5, *rest)
        gradients.append(torch.autograd.grad(loss, sigma)[0].tolist())
    assert gradients[0] == gradients[1]
    assert len(set(gradients[0][0])) == 4  # numbers within the bounds matter


@distributional
@pytest.mark.parametrize("spreads, kept", [((2.0,), (0.997,)), ((0.5, 3.0), (1.0, 0.905))])
def test_descent_learns_mean_and_spread_of_terminal_rewards(script, spreads, kept):
    """Rewards N(3 i - 1, spread_i^2), terminal states i: Q converges to the mean, sigma to the fixed point of
    sigma_i^2 = E[clip(R - Q, +-3 m)^2], where m is the mean of all sigma. Clipping reduces a single spread by
    0.3%, one that is nearly twice the mean by 10%. Critics are tables; values beyond the end have no effect.
    """
    n, count = len(QUANTILES), len(spreads)
    means, state = 3.0 * np.arange(count) - 1, np.repeat(np.arange(count), n)
    reward = means[state] + np.array(spreads)[state] * np.tile(QUANTILES, count)
    q, raw = leaf([[-2.0] * count, [4.0] * count]), leaf([[-0.4] * count, [4.0] * count])
    m, next_q, zeros = torch.zeros(2), np.full((2, n * count), 1e3), np.zeros(n * count)
    optimizer = torch.optim.SGD([q, raw], lr=0.35)
    for _ in range(400):
        z, next_z = (q[:, state], F.softplus(raw)[:, state]), (next_q, next_q)
        loss, m, _ = pev(script, *z, *next_z, reward, zeros, zeros + 1, m, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    fixed = np.array(spreads)
    for _ in range(200):
        bound = 3 * fixed.mean()
        fixed = np.array([np.sqrt(np.mean(np.clip(s * QUANTILES, -bound, bound) ** 2)) for s in spreads])
    np.testing.assert_allclose(q.detach(), [means, means], atol=1e-6)
    np.testing.assert_allclose(F.softplus(raw).detach(), [fixed, fixed], rtol=1e-6)
    np.testing.assert_allclose(fixed / spreads, kept, atol=2e-3)
