"""The squashed Gaussian and the networks.

  a = center + half_range * tanh(u),  u = mu + std * noise
  log pi(a|s) = sum_i log N(u_i; mu_i, std_i) - log(1 - tanh(u_i)^2) - log(half_range_i)

The density is with respect to the action in the environment's units.
"""

import inspect
import math

import numpy as np
import pytest
import torch
from reference import STOCHASTIC, every_script
from torch import nn

import dsac_e
import td3

BOXES = [(-1.0, 1.0), (-0.4, 0.4), (-0.25, 3.25), (0.5, 0.75)]
# mu, log_std: narrow, off center, wide (at the bound), saturated and narrow, saturated and wide
SHAPES = [(0.0, -2.5), (0.6, -0.7), (0.0, 0.5), (-3.0, -1.5), (4.0, 0.5)]


def constant_policy(script, outputs, low, high, dtype=torch.float64):
    """The script's Policy with the same network outputs for every observation (one dimension)."""
    policy = script.Policy(1, np.array(low), np.array(high), hidden_width=2)
    with torch.no_grad():
        policy.net[-1].weight.zero_()
        policy.net[-1].bias.copy_(torch.tensor(outputs))
    return policy.to(dtype)


def test_the_policy_is_identical():
    """So that the next two tests hold for the three stochastic algorithms."""
    assert len({inspect.getsource(script.Policy) for script in STOCHASTIC.values()}) == 1


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(("mu", "log_std"), SHAPES)
def test_density_integrates_to_one(box, mu, log_std):
    """Trapezoidal rule over the actions. The box is stored in float32: its bounds are exact to 1e-7."""
    (low, high), std = box, math.exp(log_std)
    policy = constant_policy(dsac_e, [mu, log_std], [low], [high])
    # Nine standard deviations, at most |u| = 15, beyond which tanh(u) is constant in float64.
    u = np.linspace(max(mu - 9 * std, -15), min(mu + 9 * std, 15), 20_001)
    with torch.no_grad():
        noise = torch.from_numpy((u - mu) / std).unsqueeze(1)
        action, log_prob = (x.numpy() for x in policy(torch.zeros(len(u), 1).double(), noise))
    assert low - 1e-7 < action.min() < action.max() < high + 1e-7
    assert np.trapezoid(np.exp(log_prob), action[:, 0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mu", [20.0, 9.0, 1.0])
@pytest.mark.parametrize("log_std", [-50.0, -3.0, 0.0, 9.0])
def test_log_prob_is_accurate_in_float32_where_tanh_rounds_to_one(mu, log_std):
    """Value and gradient against float64 closed forms; log_std is clamped to [-20, 0.5]."""
    mu, noise, half_range = np.array([mu, -mu, 0.0]), np.array([0.5, 0.25, -1.0]), np.array([0.4, 1.75, 1.0])
    policy = constant_policy(dsac_e, [*mu, *[log_std] * 3], -half_range, half_range, torch.float32)
    _, log_prob = policy(torch.zeros(1, 1), torch.tensor(noise[None], dtype=torch.float32))
    log_prob.sum().backward()
    used = min(max(log_std, -20), 0.5)
    u = mu + math.exp(used) * noise
    log_normal = -(noise**2) / 2 - used - math.log(2 * math.pi) / 2
    expected = log_normal + 2 * np.log(np.cosh(u)) - np.log(half_range)
    assert log_prob.item() == pytest.approx(expected.sum(), abs=2e-5)
    by_log_std = 2 * np.tanh(u) * math.exp(used) * noise - 1 if used == log_std else 0 * u
    gradient = [*2 * np.tanh(u), *by_log_std]
    assert policy.net[-1].bias.grad.flatten().tolist() == pytest.approx(gradient, abs=1e-5)


@every_script
def test_act(script):
    """Takes NumPy arrays of either precision and returns float32. Deterministic: the squashed mean. Otherwise a
    sample with standard normal noise; in TD3 clip(mean + half_range * exploration_noise * noise, box).
    """
    low, high, x = np.array([-0.4, -0.25]), np.array([0.4, 3.25]), torch.ones(4096, 1)
    outputs = [1.5, -1.0] if script is td3 else [1.5, -1.0, 0.0, 0.0]
    policy = constant_policy(script, outputs, low, high, torch.float32)
    mean = [[0.4 * math.tanh(1.5), 1.5 + 1.75 * math.tanh(-1)]] * 4096
    for dtype in (np.float32, np.float64):
        torch.manual_seed(0)
        action = policy.act(np.ones((4096, 1), dtype))
        torch.manual_seed(0)
        if script is td3:
            noise = torch.randn_like(policy(x)).numpy()  # in memory order, which is that of the action
            unclipped = mean + (high - low) / 2 * 0.1 * noise
            expected = np.clip(unclipped, low, high)
            assert (unclipped > high).any()
        else:
            expected = policy(x, torch.randn(4096, 2))[0].detach().numpy()
        with pytest.raises(ValueError, match="shape"):
            policy.act(x[0].numpy())
        for array, known in ((action, expected), (policy.act(x.numpy(), deterministic=True), mean)):
            assert type(array) is np.ndarray and array.dtype == np.float32
            np.testing.assert_allclose(array, known, atol=1e-6)


@every_script
def test_initial_weights_have_the_distribution_of_nn_linear(script):
    """Weights and biases uniform on +-1/sqrt(fan_in): the same bounds, the same standard deviation to 3%."""
    torch.manual_seed(0)
    layer, linear = script.StackedLinear(2, 50, 2000), nn.Linear(50, 2000)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        for x in ours.detach():
            assert x.abs().max() <= 50**-0.5
            assert x.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
            assert x.mean().abs() < 0.05 * x.std()


@every_script
def test_fresh_agent(script):
    """Twins differ in every layer; target networks equal the online ones and share no memory with them."""
    torch.manual_seed(0)
    agent = script.Agent(script.Args(hidden_width=8), 3, -np.ones(2), np.ones(2))
    for weight in agent.critics.parameters():
        assert (weight[0] != weight[1]).all()
    other = script.Policy(3, -2 * np.ones(2), np.ones(2), hidden_width=8)
    other.load_state_dict(agent.policy.state_dict())
    assert (other.center == -0.5).all()  # the bounds are not part of a saved policy
    targets = {name.removeprefix("target_") for name, _ in agent.named_children() if "target_" in name}
    expected = {"sac": {"critics"}, "dsac_e": {"critics", "policy", "entropy_critic"}}
    assert targets == expected.get(script.ALGORITHM, {"critics", "policy"})
    online = dict(agent.named_parameters())
    for name, weight in online.items():
        if name.startswith("target_"):
            source = online[name.removeprefix("target_")]
            assert torch.equal(weight, source) and weight.data_ptr() != source.data_ptr()
            assert source.requires_grad and not weight.requires_grad


def test_fresh_steps_critic_counts_the_steps_of_the_mean_discount():
    """gamma / (1 - gamma) if no episode terminates, in every state."""
    critic = dsac_e.StepsCritic(3, 2, 8)
    steps = critic(torch.randn(5, 3), torch.randn(5, 2), torch.tensor(0.75))
    assert steps.tolist() == [3] * 5
    steps.sum().backward()
    assert critic.net[-1].weight.grad.any()
