"""TUP, temperature update: minimize over alpha = exp(log_alpha)

  alpha * (mean[-log pi + Qe] - budget),  budget = rho * H0 / (1 - gamma),  H0 = -A

so alpha falls while the entropy exceeds its budget and rises while it is below. Single-step constraints
(DSAC-T, SAC, --no-tec) use mean[-log pi] and rho * H0. The response of Qe to a uniform change of entropy has
the time constant policy_delay / (tau (1 - gamma)) updates, with --center-entropy 1 / tau, also where episodes terminate.
"""

import math

import numpy as np
import pytest
import torch
from reference import A, S, every_stochastic, make_batch
from torch import nn

import dsac_e
import dsac_t
import sac
import td3


@every_stochastic
@pytest.mark.parametrize("excess", [2.0, -2.0])
def test_tup_falls_above_the_budget_and_rises_below(script, excess):
    """d tup / d log_alpha = alpha * (mean entropy - budget), positive above it: descent lowers alpha."""
    log_alpha, budget = nn.Parameter(torch.tensor(-0.5).double()), torch.tensor(-3.0).double()
    loss = script.tup(log_alpha, budget + excess + torch.linspace(-5, 5, 9).double(), budget)
    (gradient,) = torch.autograd.grad(loss, log_alpha)
    assert loss.item() == pytest.approx(math.exp(-0.5) * excess)
    assert gradient.item() == pytest.approx(math.exp(-0.5) * excess)


@pytest.mark.parametrize("form", ["{}", "{}-v4", "my_tasks:{}-v0", "my_tasks/{}", "a.b:tasks/{}-v12"])
def test_rho(form):
    """20 for Humanoid and Walker2d, in any version and namespace; 1 for others; an explicit rho prevails."""
    for task in ("Humanoid", "Walker2d"):
        assert dsac_e.Args(env_id=form.format(task)).rho == 20
        assert dsac_e.Args(env_id=form.format(task), rho=0.0).rho == 0
    for task in ("HumanoidStandup", "Ant", "HalfCheetah", "MyHumanoid", "Humanoid2", "Walker2dish", "Walker"):
        assert dsac_e.Args(env_id=form.format(task)).rho == 1
    assert dsac_e.Args(env_id="Humanoid:Ant-v5").rho == dsac_e.Args(env_id="Humanoid-v4/Ant-v5").rho == 1


def test_budget():
    """rho * -A / (1 - gamma) of whole trajectories, rho * -A of single steps; DSAC-T and SAC use -A."""

    def budget(script, dims=6, **arguments):
        agent = script.Agent(script.Args(hidden_width=4, **arguments), S, -np.ones(dims), np.ones(dims))
        return agent.budget.item()

    assert budget(dsac_e) == pytest.approx(20 * -6 / 0.01)  # the default task is Humanoid
    assert budget(dsac_e, env_id="Ant-v4") == pytest.approx(-600)
    assert budget(dsac_e, env_id="Ant-v4", gamma=0.9, dims=2) == pytest.approx(-20)
    assert budget(dsac_e, rho=0.5) == pytest.approx(-300)
    for res in (True, False):
        assert budget(dsac_e, rho=3.0, tec=False, res=res) == pytest.approx(-18)
    assert budget(dsac_t) == budget(sac) == -6
    assert not hasattr(td3.Agent(td3.Args(hidden_width=4), S, -np.ones(2), np.ones(2)), "log_alpha")


@every_stochastic
def test_unattainable_budget_is_refused(script):
    """The uniform policy has the highest entropy, sum log(high - low). Two dimensions demand -2 nats: widths
    whose logarithms sum to less are a ValueError, more are not, with unequal widths and a box off center.
    """

    def make(log_width, **arguments):
        arguments = {"env_id": "Ant-v4"} | arguments
        low, width = np.array([5.0, -1.0]), np.exp([log_width - 1, 1.0])
        return script.Agent(script.Args(hidden_width=4, **arguments), S, low, low + width)

    with pytest.raises(ValueError, match="-2 >= .*-2.01.* RescaleAction"):
        make(-2.01)
    make(-1.99)
    if script is dsac_e:
        for arguments in ({}, {"tec": False}, {"tec": False, "res": False}):
            with pytest.raises(ValueError, match="larger --rho"):
                make(-1.99, rho=0.9, **arguments)
            make(-3.9, rho=2.0, **arguments)


@every_stochastic
@pytest.mark.parametrize("bound", [-15.0, 15.0])
def test_log_alpha_stays_within_bounds_and_recovers(script, bound):
    """At +-15 everything is finite in float32. When the budget changes sides, log_alpha moves at full speed, also
    with Adam in the state that a long drift in one direction gives it: first moment, second moment = gradient^2.
    """
    torch.manual_seed(0)
    args = script.Args(env_id="Humanoid-v4", hidden_width=4)
    agent, batch = script.Agent(args, S, -np.ones(A), np.ones(A)), make_batch(script, 1, torch.float32)
    agent.budget.fill_(math.copysign(4000.0, bound))
    with torch.no_grad():
        agent.log_alpha.fill_(bound - math.copysign(10 * args.alpha_lr, bound))
    agent.update(batch, update_policy=True)
    adam = agent.optimizer.state[agent.log_alpha]
    adam["exp_avg"].mul_(10)  # after one step it is a tenth of the gradient
    adam["exp_avg_sq"].mul_(1000)
    adam["step"].fill_(750_000)
    path = []
    for update in range(120):
        log = agent.update(batch, update_policy=True)
        assert all(value.isfinite().all() for value in log.values())
        path.append(agent.log_alpha.item())
        if update == 39:
            agent.budget.neg_()
    assert abs(path[5]) < 15 and path[20:40] == [bound] * 20
    assert path[40:].count(bound) < 12 and all(weight.isfinite().all() for weight in agent.parameters())
    assert abs(path[79] - path[119]) == pytest.approx(40 * args.alpha_lr, rel=0.05)


class TablePolicy(nn.Module):
    """A policy with the entropy h in every state; its action is h."""

    def __init__(self, h):
        super().__init__()
        self.h = nn.Parameter(torch.tensor(h, dtype=torch.float64))

    def forward(self, obs, _):
        h = self.h.expand(len(obs))
        return h.unsqueeze(1), -h


class TableCritic(nn.Module):
    """A number for each state; states are one-hot observations. With mean_discount it is a StepsCritic."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, obs, action, mean_discount=None):
        if mean_discount is None:
            return obs @ self.values
        return mean_discount / (1 - mean_discount) * (1 + obs @ self.values)


class Parabola(nn.Module):
    """Q = -(h + 3)^2 / 4: the reward is best at an entropy of -3. The second twin is larger."""

    def forward(self, obs, action):
        q = -((action[:, 0] + 3) ** 2) / 4
        return torch.stack([q, q + 1]), torch.ones_like(q).expand(2, -1)


def table_agent(center_entropy, gamma, tau, h, qe, terminated=(0,), policy_lr=0.0, alpha_lr=0.0):
    """A real dsac_e.Agent on states that never change; in some the episode terminates at once. Gradient descent
    sets Qe of each state to its target in one step. With centering, `steps` is known and does not learn.
    """
    args = dsac_e.Args(env_id="Ant-v4", gamma=gamma, tau=tau, hidden_width=2, center_entropy=center_entropy)
    n, terminated = len(terminated), torch.tensor(terminated).double()
    agent = dsac_e.Agent(args, n, -np.ones(1), np.ones(1)).double()
    agent.policy, agent.target_policy = TablePolicy(h), TablePolicy(h)
    agent.critics = agent.target_critics = Parabola()
    deviation = [0.0] * n if center_entropy else (qe * (1 - terminated)).tolist()
    agent.entropy_critic, agent.target_entropy_critic = TableCritic(deviation), TableCritic(deviation)
    if center_entropy:
        steps, mean_discount = gamma / (1 - gamma) * (1 - terminated), (gamma * (1 - terminated)).mean()
        relative_steps = (steps * (1 - mean_discount) / mean_discount - 1).tolist()
        agent.steps_critic, agent.target_steps_critic = (
            TableCritic(relative_steps),
            TableCritic(relative_steps),
        )
        agent.mean_entropy.fill_(qe / steps.max())
        agent.mean_discount.fill_(mean_discount)
    agent.pev_pis_weights = [agent.entropy_critic.values]
    agent.pim_tup_weights = [agent.policy.h, agent.log_alpha]
    agent.online_weights = [agent.policy.h, agent.entropy_critic.values]
    agent.target_weights = [agent.target_policy.h.detach(), agent.target_entropy_critic.values.detach()]
    rates = zip((*agent.pev_pis_weights, *agent.pim_tup_weights), (0.5 * n, policy_lr, alpha_lr), strict=True)
    agent.optimizer = torch.optim.SGD([{"params": [weight], "lr": lr} for weight, lr in rates], 0.0)
    states, zeros = torch.eye(n).double(), torch.zeros(n).double()
    return agent, dsac_e.Batch(states, zeros.unsqueeze(1), zeros, states, terminated)


@pytest.mark.parametrize("terminated", [(0,), (0, 1, 1, 1)], ids=["endless", "most episodes terminate"])
@pytest.mark.parametrize("center_entropy", [False, True])
def test_time_constant_of_the_entropy_critic(center_entropy, terminated):
    """A step of the policy's entropy from -1 to -2 with gamma = 0.95, tau = 0.05, policy_delay = 2: in a state
    without end Qe covers 1 - 1/e of its way from -19 to -38 in 2 * 20 / 0.05 = 800 updates, with --center-entropy
    in 1 / 0.05 = 20. Where the episode terminates, Qe is 0 all the time.
    """
    agent, batch = table_agent(center_entropy, 0.95, 0.05, -1.0, -19.0, terminated)
    for update in range(10):
        log = agent.update(batch, update % 2 == 0)
    at_equilibrium = torch.tensor([-19.0 * (1 - end) for end in terminated]).double()
    torch.testing.assert_close(log["entropy/qe"], at_equilibrium, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        agent.policy.h.fill_(-2.0)
        agent.target_policy.h.fill_(-2.0)
    update, threshold = 0, -19 - 19 * (1 - 1 / math.e)
    while log["entropy/qe"][0] > threshold and update < 2000:
        log = agent.update(batch, update % 2 == 0)
        assert log["entropy/qe"][1:].abs().sum() < 1e-5
        update += 1
    assert update == pytest.approx(20 if center_entropy else 800, rel=0.2)


def test_closed_loop_meets_the_budget_and_centering_reduces_the_overshoot():
    """From alpha = e and Qe = 0, PIS, PIM and TUP converge to the solution of the constrained problem:
    the budget of -1 / (1 - gamma) makes h = -1, and dQ/dh + alpha = 0 makes alpha = (h + 3) / 2 = 1. Without
    centering log_alpha first falls to -0.4, with centering to -0.04.
    """
    overshoot = []
    for center_entropy in (False, True):
        start = {"h": 2 * math.e - 3, "qe": 0.0}
        agent, batch = table_agent(center_entropy, 0.9, 0.2, **start, policy_lr=2.0, alpha_lr=0.002)
        path = []
        for update in range(1200):
            log = agent.update(batch, update % 2 == 0)
            path.append(agent.log_alpha.item())
            if update % 2 == 0:
                trajectory_entropy = log["entropy/trajectory"].mean().item()
        assert agent.policy.h.item() == pytest.approx(-1, abs=5e-3)
        assert trajectory_entropy == pytest.approx(-10, abs=5e-2)
        assert path[-1] == pytest.approx(0, abs=5e-3)
        overshoot.append(-min(path))
    assert overshoot[0] > 0.3 and overshoot[1] < 0.1
