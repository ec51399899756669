"""Entropy: the squashed Gaussian's density, its one-sample entropy, and the trajectory entropy that PIS makes of it."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dsac_e
import dsac_t
import sac

SCRIPTS = [dsac_e, dsac_t, sac]
# Neither +-1 nor symmetric; centres and half ranges, (1.5, -0.75, 0.625) and (1.75, 1.25, 0.125), are exact in float32.
LOW, HIGH = np.array([-0.25, -2.0, 0.5]), np.array([3.25, 0.5, 0.75])
HALF_RANGE = (HIGH - LOW) / 2
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(160)
WEIGHTS = WEIGHTS / math.sqrt(2 * math.pi)  # of expectations over a standard normal
# mu, log_std: centred and narrow, off-centre, wide (at the clamp), saturated and narrow, saturated and wide
SHAPES = [(0.0, -2.5), (0.6, -0.7), (0.0, 0.5), (-3.0, -1.5), (4.0, 0.5)]

every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.ALGORITHM)


def policy_with(script, mu, log_std, low=LOW, high=HIGH, dtype=torch.float64) -> nn.Module:
    """The script's Policy with these outputs, (A,) each, whatever it observes."""
    policy = script.Policy(1, low, high, hidden_width=2)
    with torch.no_grad():
        policy.net[-1].weight.zero_()
        policy.net[-1].bias.copy_(torch.tensor([*mu, *log_std]))
    return policy.to(dtype)


def play(policy: nn.Module, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions (B, A) and log-densities (B,) for the noise (B, A)."""
    dtype = policy.center.dtype
    action, log_prob = policy(torch.zeros(len(noise), 1, dtype=dtype), torch.tensor(noise, dtype=dtype))
    return action.detach().numpy(), log_prob.detach().numpy()


def log_slope(u: np.ndarray) -> np.ndarray:
    """log of d tanh(u) / du = 1 / cosh(u)^2, exact in float64 wherever cosh is finite."""
    return -2 * np.log(np.cosh(u))


def exact_entropy(mu, log_std, half_range) -> np.ndarray:
    """Entropy in nats per dimension: Gaussian entropy + E[log |da/du|], the expectation by Gauss-Hermite quadrature."""
    mu, log_std = np.asarray(mu, float), np.asarray(log_std, float)
    u = mu[..., None] + np.exp(log_std)[..., None] * NODES
    return 0.5 * math.log(2 * math.pi * math.e) + log_std + log_slope(u) @ WEIGHTS + np.log(half_range)


@every_script
@pytest.mark.parametrize(("mu", "log_std"), SHAPES)
def test_density_integrates_to_one_over_the_box(script, mu, log_std):
    """Summed over the actions themselves, so density and action have to agree on the units; mu is among them."""
    low, high = LOW[:1], HIGH[:1]
    policy = policy_with(script, [mu], [log_std], low, high)
    # The grid spans 9 standard deviations, beyond which 1e-18 is left, but no more than |u| = 15: further out the
    # actions run out of float64, while the mass out there, of mu = 4 and std = 1.65, is 1e-11.
    std = math.exp(log_std)
    u = np.linspace(max(mu - 9 * std, -15), min(mu + 9 * std, 15), 40_001)
    action, log_prob = play(policy, ((u - mu) / std)[:, None])
    assert low < action.min() < action.max() < high
    assert np.trapezoid(np.exp(log_prob), action[:, 0]) == pytest.approx(1, abs=1e-6)


@every_script
def test_density_in_two_dimensions_integrates_to_one(script):
    """The density is joint: per unit of volume, over boxes of different sizes."""
    policy = policy_with(script, [0.6, -1.0], [-0.7, 0.2], LOW[:2], HIGH[:2])
    grid = np.linspace(-5, 5, 401)  # leaves 1e-6 outside
    action, log_prob = play(policy, np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2))
    action, density = action.reshape(401, 401, 2), np.exp(log_prob).reshape(401, 401)
    inner = np.trapezoid(density, action[0, :, 1], axis=1)
    assert np.trapezoid(inner, action[:, 0, 0]) == pytest.approx(1, abs=3e-4)


@every_script
@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-5, 0.5), st.floats(-3, 3)), min_size=3, max_size=3),
    st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 20)), min_size=3, max_size=3),
)
def test_log_prob_is_the_change_of_variables(script, dims, box):
    """Against the density of a = center + half_range tanh(u), written in a alone, for any box and any Gaussian."""
    (mu, log_std, noise), (low, width) = np.array(dims).T, np.array(box).T
    policy = policy_with(script, mu, log_std, low, low + width)
    center, half_range = policy.center.double().numpy(), policy.half_range.double().numpy()  # rounded to float32
    mu, log_std = policy.net[-1].bias.detach().numpy().reshape(2, 3)
    (action,), (log_prob,) = play(policy, noise[None])
    x = (action - center) / half_range
    z = (np.arctanh(x) - mu) / np.exp(log_std)
    log_density = -(z**2) / 2 - log_std - math.log(2 * math.pi) / 2 - np.log(half_range * (1 - x**2))
    # arctanh loses digits where x is near 1: |u| <= 7 leaves 2e-16 e^(2|u|) of u, and a narrow policy magnifies it.
    assert log_prob == pytest.approx(log_density.sum(), abs=1e-6)


@every_script
@pytest.mark.parametrize("mu", [20.0, 9.0, 1.0])
@pytest.mark.parametrize("log_std", [-50.0, -3.0, 0.0, 9.0])
def test_log_prob_is_exact_in_float32_where_tanh_is_1(script, mu, log_std):
    """The density and its gradient are those of closed forms in float64; tanh(20) itself is 1 even in float64."""
    mu, noise = np.array([mu, -mu, 0.0]), np.array([0.5, 0.25, -1.0])
    policy = policy_with(script, mu, [log_std] * 3, dtype=torch.float32)
    _, log_prob = policy(torch.zeros(1, 1), torch.tensor(noise[None], dtype=torch.float32))
    log_prob.sum().backward()
    used = min(max(log_std, -20), 0.5)
    std = math.exp(used)
    u = mu + std * noise
    expected = -(noise**2) / 2 - used - math.log(2 * math.pi) / 2 - log_slope(u) - np.log(HALF_RANGE)
    assert log_prob.item() == pytest.approx(expected.sum(), abs=2e-5)  # some 1e-7 of terms up to 43
    clamped = used != log_std
    gradient = [*2 * np.tanh(u), *(0 * u if clamped else 2 * np.tanh(u) * std * noise - 1)]
    assert policy.net[-1].bias.grad.flatten().tolist() == pytest.approx(gradient, abs=1e-5)


class Constant(nn.Module):
    """An entropy critic of one number."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, obs, action):
        return self.value.expand(len(obs))


@pytest.mark.parametrize(("mu", "log_std"), SHAPES)
def test_entropy_estimate_of_pis_is_unbiased(mu, log_std):
    """The mean entropy in PIS's target is the policy's, within 4 standard errors, which are below 0.04 nats."""
    torch.manual_seed(0)
    samples, gamma = 400_000, 0.9
    policy = policy_with(dsac_e, [mu] * 3, [log_std] * 3, dtype=torch.float32)
    obs, zeros = torch.zeros(samples, 1), torch.zeros(samples)
    with torch.no_grad():
        action, log_prob = policy(obs, torch.randn(samples, 3))
    critic, target = Constant(1.5), Constant(2.5)
    batch = dsac_e.Batch(obs, action, zeros, obs, zeros)
    dsac_e.pis(critic, target, batch, action, log_prob, gamma)[0].backward()
    mean_target = critic.value.item() - critic.value.grad.item() / 2  # the gradient is 2 (Qe - mean target)
    entropy = mean_target / gamma - target.value.item()
    bound = 4 * log_prob.double().std().item() / math.sqrt(samples)
    exact = exact_entropy([mu] * 3, [log_std] * 3, HALF_RANGE).sum()
    assert abs(entropy - exact) < bound < 0.04


class LinearPolicy(dsac_e.Policy):
    """The policy's own density on mu and log_std linear in the observation, so that entropies vary with the state."""

    def __init__(self, obs_dim, low, high, hidden_width, weight, bias):
        super().__init__(obs_dim, low, high, hidden_width)
        self.net = nn.Linear(obs_dim, 2)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor(weight))
            self.net.bias.copy_(torch.tensor(bias))

    def moments(self, obs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """mu and log_std, (B,) each."""
        mu, log_std = self.net(obs).detach().double().numpy().T
        return mu, log_std.clip(-20, 0.5)


def mean_and_error(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the copies, (n, copies) -> (n,), and their standard errors."""
    return totals.mean(1), totals.std(1, ddof=1) / math.sqrt(totals.shape[1])


def test_trajectory_entropy_in_a_small_mdp():
    """Three ways to one number: PIS, Monte Carlo with the policy's log-probabilities, and linear algebra.

    States sit on a ring; an action at x = (a - center) / half_range moves on with probability (1 + x) / 2, else back.
    Monte Carlo is within 4 standard errors of linear algebra, and PIS within 0.05 nats more of Monte Carlo.
    """
    torch.manual_seed(0)
    gamma, states, copies, horizon = 0.8, torch.eye(3), 2000, 50  # beyond the horizon lies 0.8^50 / 0.2 = 7e-5
    policy = LinearPolicy(3, LOW[:1], HIGH[:1], 1, [[0.0, 1.0, -2.0], [-4.0, 0.5, -1.0]], [0.0, 0.0])
    policy.requires_grad_(False)

    def act_at(x):
        return policy.center + policy.half_range * torch.as_tensor(x, dtype=torch.float32)[:, None]

    def step(state, action):
        x = ((action - policy.center) / policy.half_range).squeeze(1)
        return (state + 2 * (torch.rand(len(x)) < (1 + x) / 2).long() - 1) % 3

    # Linear algebra: V = H + gamma P V, from the exact entropy and the mean step in each state.
    mu, log_std = policy.moments(states)
    entropy = exact_entropy(mu, log_std, HALF_RANGE[0])
    forth = (1 + np.tanh(mu[:, None] + np.exp(log_std)[:, None] * NODES) @ WEIGHTS) / 2
    P = forth[:, None] * np.roll(np.eye(3), 1, axis=1) + (1 - forth)[:, None] * np.roll(np.eye(3), -1, axis=1)
    value = np.linalg.solve(np.eye(3) - gamma * P, entropy)
    start, x = np.repeat([0, 1, 2], 3), np.tile([-0.8, 0.0, 0.8], 3)
    exact = gamma * ((1 + x) / 2 * value[(start + 1) % 3] + (1 - x) / 2 * value[(start - 1) % 3])
    assert np.ptp(exact) > 1  # else a constant could pass

    # Monte Carlo: from each (state, x) the discounted entropies of the steps that follow.
    state = step(torch.from_numpy(start.repeat(copies)), act_at(x.repeat(copies)))
    totals = torch.zeros(len(state))
    for t in range(1, horizon):
        action, log_prob = policy(states[state], torch.randn(len(state), 1))
        totals -= gamma**t * log_prob
        state = step(state, action)
    mean, error = mean_and_error(totals.reshape(9, copies).numpy())
    assert np.all(np.abs(mean - exact) < 4 * error)

    # PIS, on transitions of another policy: uniform actions in uniform states.
    critic = dsac_e.EntropyCritic(3, 1, hidden_width=32)
    target, steps, zeros = copy.deepcopy(critic).requires_grad_(False), 1000, torch.zeros(256)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, steps)
    for _ in range(steps):
        state, action = torch.randint(3, (256,)), act_at(2 * torch.rand(256) - 1)
        batch = dsac_e.Batch(states[state], action, zeros, states[step(state, action)], zeros)
        optimizer.zero_grad()
        dsac_e.pis(critic, target, batch, *policy(batch.next_obs, torch.randn(256, 1)), gamma)[0].backward()
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_([*target.parameters()], [weight.detach() for weight in critic.parameters()], 0.1)
    learned = critic(states[start], act_at(x)).detach().numpy()
    assert np.all(np.abs(learned - mean) < 4 * error + 0.05)


def test_trajectory_entropy_in_pendulum(monkeypatch, run):
    """train() with a frozen policy: the Qe it ends with foretells the entropies of rollouts in gymnasium's Pendulum.

    The rollouts start as the task resets, with one fixed first action each; the entropy of each state on the way is the
    exact one. Over 16 starts Qe is within 0.25 nats in root mean square, and 0.1 nats on average, of values that span
    more than 4, plus 4 standard errors of the rollouts. A time limit cuts every 25th step of the training.
    """
    starts, copies, gamma, horizon = 16, 24, 0.8, 50  # beyond the horizon lies 0.8^50 / 0.2 = 7e-5 of an entropy
    agents = []

    class Frozen(LinearPolicy):
        """Damps the swing; wider at the top than at the bottom."""

        def __init__(self, obs_dim, low, high, hidden_width):
            super().__init__(obs_dim, low, high, hidden_width, [[0.0, 0.2, -0.3], [0.7, 0.2, 0.0]], [0.0, -3.0])

    class Agent(dsac_e.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            agents.append(self)

        def update(self, batch, delayed):
            self.critic_optimizer.param_groups[0]["lr"] *= 0.995  # so that the noise of the samples averages out
            return super().update(batch, delayed)

    monkeypatch.setattr(dsac_e, "Policy", Frozen)
    monkeypatch.setattr(dsac_e, "Agent", Agent)
    if "CutPendulum-v0" not in gym.registry:
        gym.register("CutPendulum-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=25)
    # The targets move every 10th update, by the more: that saves most updates of the policy, which would do nothing.
    run(
        dsac_e, env_id="CutPendulum-v0", total_timesteps=11_000, num_envs=10, learning_starts=1000, buffer_size=11_000,
        batch_size=256, gamma=gamma, tau=0.3, policy_delay=10, hidden_width=32, policy_lr=0.0, critic_lr=1e-2,
        eval_episodes=1, eval_interval=10**6,
    )  # fmt: skip
    policy, critic = agents[0].policy, agents[0].entropy_critic
    assert policy.net.bias.tolist() == [0, -3]

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    angle, speed = rng.uniform(-np.pi, np.pi, starts), rng.uniform(-1, 1, starts)
    first_obs = np.stack([np.cos(angle), np.sin(angle), speed], 1, dtype=np.float32)
    envs = dsac_e.make_envs("Pendulum-v1", starts * copies)
    first_action = dsac_e.act(policy, first_obs, envs.single_action_space)
    envs.reset(seed=0)
    for i, env in enumerate(envs.envs):
        env.unwrapped.state = np.array([angle[i // copies], speed[i // copies]])
    obs, *_ = envs.step(first_action.repeat(copies, 0))
    totals = np.zeros(len(obs))
    for t in range(1, horizon):
        totals += gamma**t * exact_entropy(*policy.moments(torch.from_numpy(obs)), policy.half_range.item())
        obs, *_ = envs.step(dsac_e.act(policy, obs, envs.single_action_space))
    envs.close()
    mean, error = mean_and_error(totals.reshape(starts, copies))
    learned = critic(torch.from_numpy(first_obs), torch.from_numpy(first_action)).detach().numpy()
    difference = learned - mean
    assert np.ptp(mean) > 4  # else a constant could pass
    assert np.sqrt(np.mean(difference**2)) < 4 * np.sqrt(np.mean(error**2)) + 0.25
    assert abs(difference.mean()) < 4 * np.sqrt(np.mean(error**2) / starts) + 0.1
