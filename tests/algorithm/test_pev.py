"""PEV, policy evaluation. For the value distributions N(Q_i, sigma_i^2) of DSAC-E and DSAC-T, with eps = 0.1:

  k = argmin Qbar_i,  V = Qbar_k (DSAC-E) or Qbar_k - alpha log pi (DSAC-T),  discount = gamma (1 - d)
  y_q = r + discount V,  y_z = r + discount (V + sigmabar_k clamp(noise, -3, 3)) clipped to Q_i +- 3 m_i
  gradient of Q_i:     -(m_i^2 + eps) (y_q - Q_i) / (sigma_i^2 + eps) / B
  gradient of sigma_i: -(m_i^2 + eps) ((y_z - Q_i)^2 - sigma_i^2) / (sigma_i^3 + eps) / B
  m_i <- running mean of mean(sigma_i), rate tau, initialized by the first batch

SAC and TD3: mean squared error to r + discount (min Qbar_i [- alpha log pi]), summed over the twins.
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


def pev(script, q, sigma, next_q, next_sigma, reward, discount, noise, mean_sigma, tau, log_prob=0, alpha=0):
    """pev of DSAC-E or DSAC-T on anything that torch.as_tensor accepts: loss, new mean_sigma, y_q."""
    arrays = (q, sigma, next_q, next_sigma, reward, discount, noise, mean_sigma)
    q, sigma, next_q, next_sigma, *rest = (torch.as_tensor(x, dtype=torch.float64) for x in arrays)
    extra = () if script is dsac_e else (torch.as_tensor(log_prob), torch.tensor(alpha, dtype=torch.float64))
    return script.pev(q, sigma, next_q, next_sigma, *extra, *rest, tau)


@distributional
def test_gradient_equals_the_formula(script):
    """Element by element, with terminal transitions, noise beyond +-3 (rare in test_update.py), targets on both sides."""
    rng, size, tau, alpha = np.random.default_rng(0), 64, 0.1, 0.7
    q, next_q = leaf(rng.normal(0, 2, (2, size))), rng.normal(0, 2, (2, size))
    sigma, next_sigma = leaf(rng.uniform(0.05, [[2.0], [1.0]], (2, size))), rng.uniform(0.05, 2, (2, size))
    reward, log_prob = rng.normal(0, 2, size), rng.normal(0, 3, size)
    noise = np.array([-5, -4, 4, 5, *rng.normal(0, 1, size - 4)])
    discount = 0.9 * (np.arange(size) % 4 != 1)
    old_m = [0.8, 1.7]
    next_z = next_q, next_sigma
    loss, new_m, target = pev(script, q, sigma, *next_z, reward, discount, noise, old_m, tau, log_prob, alpha)
    loss.backward()

    sides = []
    for i in range(2):
        m = 0.9 * old_m[i] + 0.1 * sigma[i].mean().item()
        assert new_m[i].item() == pytest.approx(m, rel=1e-12)
        for b in range(size):
            k = 1 if next_q[1, b] < next_q[0, b] else 0
            v = next_q[k, b] - (alpha * log_prob[b] if script is dsac_t else 0)
            y_q, y_z = reward[b] + discount[b] * v, reward[b] + discount[b] * v
            y_z += discount[b] * next_sigma[k, b] * max(-3, min(3, noise[b]))
            x, s = q[i, b].item(), sigma[i, b].item()
            clipped = max(x - 3 * m, min(x + 3 * m, y_z))
            sides.append(np.sign(y_z - clipped))
            scale = (m**2 + 0.1) / size
            assert target[0, b].item() == pytest.approx(y_q, rel=1e-12)
            assert q.grad[i, b].item() == pytest.approx(-scale * (y_q - x) / (s**2 + 0.1), rel=1e-10)
            expected = -scale * ((clipped - x) ** 2 - s**2) / (s**3 + 0.1)
            assert sigma.grad[i, b].item() == pytest.approx(expected, rel=1e-10)
    assert all(sides.count(side) > 5 for side in (-1, 0, 1))


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
