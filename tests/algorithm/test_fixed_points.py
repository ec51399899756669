"""PEV and PIS are contractions whose fixed points solve linear systems. On a finite process under a fixed
policy, with P(s, a; s', a') the transition matrix without terminal transitions, P_s(s, a; s') its sum over a', and E_a' the
expectation over a' ~ pi(.|s'):

  PIS             Qe = gamma P_s (H + E_a' Qe)          -> Qe = (I - gamma P)^-1 gamma P_s H
  PIS, centered   Qe = deviation + m steps, deviation and steps as Qe with H - m and 1 instead of H, for any m
  PEV, separated  Q  = r + gamma P Q                    -> Q  = (I - gamma P)^-1 r
  PEV, entangled  Q  = r + gamma P_s (alpha H + E_a' Q) -> Q  = (I - gamma P)^-1 (r + alpha gamma P_s H)

In test_target_is_the_bellman_operator, critics are tables in float64. A batch contains all equally likely outcomes
(s', a') of each (s, a) once, so that its mean is an exact expectation. Targets are computed back from the gradients of
the scripts' own losses.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dsac_e
import dsac_t
import sac
import td3

ALPHA = torch.tensor(0.7, dtype=torch.float64)


class Process:
    """A random process and policy, as an exhaustive batch and as matrices. Row s * A + a belongs to (s, a)."""

    def __init__(self, seed, p_terminal=0.3):
        rng = np.random.default_rng(seed)
        S, A = rng.integers(1, 5), rng.integers(1, 4)
        next_states = rng.integers(S, size=(S, A, 3))  # equally likely s' of each (s, a)
        next_actions = rng.integers(A, size=(S, 4))  # equally likely a' of each s'
        terminated = rng.random(next_states.shape) < p_terminal
        rewards = rng.normal(size=next_states.shape)
        s, a, draw, draw_action = np.indices((S, A, 3, 4)).reshape(4, -1)
        next_s, policy = next_states[s, a, draw], np.eye(A)[next_actions].mean(1)
        next_a = next_actions[next_s, draw_action]
        self.entry, self.next_entry, self.size = s * A + a, next_s * A + next_a, S * A
        self.reward = torch.from_numpy(rewards[s, a, draw])
        self.terminated = torch.from_numpy(terminated[s, a, draw] + 0.0)
        self.next_log_prob = torch.from_numpy(np.log(policy[next_s, next_a]))

        # Probabilities (S, A, S), without terminal transitions
        transition = (np.eye(S)[next_states] * ~terminated[..., None]).mean(2)
        self.P = np.einsum("ijk,kl->ijkl", transition, policy).reshape(self.size, self.size)
        self.entropy = -np.sum(policy * np.log(np.where(policy > 0, policy, 1)), axis=1)
        self.next_entropy = (transition @ self.entropy).ravel()
        self.mean_reward = rewards.mean(2).ravel()

    def target_without_critic(self, case, gamma):
        """The part of the target without a critic, (S * A,)."""
        if case == "pis":
            return gamma * self.next_entropy
        alpha = ALPHA.item() if case in ("dsac_t", "sac") else 0.0
        return self.mean_reward + alpha * gamma * self.next_entropy

    def fixed_point(self, case, gamma):
        return np.linalg.solve(np.eye(self.size) - gamma * self.P, self.target_without_critic(case, gamma))

    def random_tables(self, case, seed):
        """(1, S * A) for the entropy critic, (2, S * A) for twins."""
        return 5 * np.random.default_rng(seed).normal(size=(1 if case == "pis" else 2, self.size))


def loss_of(case, process, gamma, values, raw_sigma, targets):
    """The script's own loss on the exhaustive batch; values, raw_sigma and targets are (n, S * A)."""
    q, next_q = values[:, process.entry], targets[:, process.next_entry].detach()
    discount, log_prob = gamma * (1 - process.terminated), process.next_log_prob
    if case == "pis":
        return dsac_e.pis(q[0], next_q[0], -log_prob, discount)
    if case == "sac":
        return sac.pev(q, next_q, log_prob, ALPHA, process.reward, discount)[0]
    if case == "td3":
        return td3.pev(q, next_q, process.reward, discount)[0]
    sigma = F.softplus(raw_sigma)[:, process.entry]
    noise, mean_sigma = torch.randn_like(process.reward), torch.zeros(2, dtype=torch.float64)
    rest = process.reward, discount, noise, mean_sigma, 0.005
    if case == "dsac_e":
        return dsac_e.pev(q, sigma, next_q, sigma.detach(), *rest)[0]
    return dsac_t.pev(q, sigma, next_q, sigma.detach(), log_prob, ALPHA, *rest)[0]


def measured_target(case, process, gamma, tables):
    """E[y | s, a] for target tables (n, S * A), from d loss / d Q = c (Q - E[y]) / (S * A): (n, S * A)."""
    values = torch.tensor(process.random_tables(case, 1234), requires_grad=True)
    raw_sigma = torch.linspace(-0.5, 1.5, values.numel(), dtype=torch.float64).reshape(values.shape)
    loss_of(case, process, gamma, values, raw_sigma, torch.tensor(tables)).backward()
    curvature = np.array(2.0)  # squared error
    if case in ("dsac_e", "dsac_t"):
        sigma = F.softplus(raw_sigma).numpy()
        curvature = (sigma.mean(1, keepdims=True) ** 2 + 0.1) / (sigma**2 + 0.1)
    return values.detach().numpy() - values.grad.numpy() * process.size / curvature


def distance(x, y):
    return np.abs(x - y).max()


@pytest.mark.parametrize("case", ["pis", "dsac_e", "dsac_t", "sac", "td3"])
@pytest.mark.parametrize("p_terminal", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_target_is_the_bellman_operator(case, seed, gamma, p_terminal):
    """T Q = constant + gamma P min_i Q_i. It contracts, ||T Q - T Q'|| <= gamma ||Q - Q'|| in the maximum norm,
    to the solution of the linear system.
    """
    process = Process(seed, p_terminal)
    first, second = (process.random_tables(case, seed + i) for i in (1, 2))
    images = [measured_target(case, process, gamma, tables) for tables in (first, second)]
    for tables, image in zip((first, second), images, strict=True):
        expected = process.target_without_critic(case, gamma) + gamma * process.P @ tables.min(0)
        assert distance(image, expected) < 1e-11 * (1 + np.abs(expected).max())
    assert distance(*images) <= gamma * distance(first, second) + 1e-11
    solution = np.broadcast_to(process.fixed_point(case, gamma), first.shape)
    assert distance(measured_target(case, process, gamma, solution), solution) < 1e-9


class CenteredPIS:
    """The mean targets of PIS with --center-entropy on a process, computed back from the gradient."""

    def __init__(self, process, gamma, mean_entropy):
        self.process, self.gamma = process, gamma
        self.mean_entropy = torch.tensor(mean_entropy, dtype=torch.float64)

    def targets(self, deviation, steps):
        """Tables (S * A,) -> E[y | s, a] of both, each (S * A,)."""
        process = self.process
        values = torch.zeros(2, process.size, dtype=torch.float64, requires_grad=True)
        now = values[:, process.entry]
        following = torch.from_numpy(np.stack((deviation, steps)))[:, process.next_entry]
        discount = self.gamma * (1 - process.terminated)
        loss = dsac_e.pis(now[0], following[0], -process.next_log_prob - self.mean_entropy, discount)
        loss = loss + dsac_e.pis(now[1], following[1], torch.ones_like(discount), discount)
        (gradient,) = torch.autograd.grad(loss, values)
        return -gradient.numpy() * process.size / 2

    def fixed_point(self):
        """By iteration, to 1e-12 for gamma <= 0.9."""
        tables = np.zeros((2, self.process.size))
        for _ in range(300):
            tables = self.targets(*tables)
        return tables


@pytest.mark.parametrize("mean_entropy", [-50.0, 0.0, 3.0])
@pytest.mark.parametrize("p_terminal", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_centering_has_the_same_fixed_point_for_every_mean_entropy(seed, p_terminal, mean_entropy):
    """deviation + m * steps = Qe for every m; steps = (I - gamma P)^-1 gamma P_s 1, the discounted number of steps
    that follow; and H + Qe lies between the lowest and the highest entropy, times 1 + steps.
    """
    process, gamma = Process(seed, p_terminal), 0.9
    deviation, steps = CenteredPIS(process, gamma, mean_entropy).fixed_point()
    qe = deviation + mean_entropy * steps
    assert distance(qe, process.fixed_point("pis", gamma)) < 1e-9
    survival = gamma * process.P.sum(1)
    assert distance(steps, np.linalg.solve(np.eye(process.size) - gamma * process.P, survival)) < 1e-9
    low, high = process.entropy.min(), process.entropy.max()
    trajectory_entropy = np.repeat(process.entropy, process.size // len(process.entropy)) + qe
    assert (trajectory_entropy > low * (1 + steps) - 1e-9).all()
    assert (trajectory_entropy < high * (1 + steps) + 1e-9).all()


def test_steps_of_episodes_of_known_length():
    """After the k-th last step of an episode k - 1 steps follow: gamma + ... + gamma^(k - 1); if an episode does
    not terminate, gamma / (1 - gamma).
    """
    gamma = 0.9
    process = SimpleNamespace(  # states 3 -> 2 -> 1 -> 0 -> terminal, and 4 -> 4
        size=5,
        entry=torch.arange(5),
        next_entry=torch.tensor([0, 0, 1, 2, 4]),
        terminated=torch.tensor([1.0, 0, 0, 0, 0]).double(),
        next_log_prob=torch.zeros(5).double(),
    )
    _, steps = CenteredPIS(process, gamma, -7.0).fixed_point()
    expected = [0, gamma, gamma + gamma**2, gamma + gamma**2 + gamma**3, gamma / (1 - gamma)]
    assert steps == pytest.approx(np.array(expected))
