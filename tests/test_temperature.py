"""The temperature alpha: its direction, where it settles, its budget, and that it stays an ordinary float."""

import copy
from statistics import NormalDist

import numpy as np
import pytest
import torch
from test_update import ACTIONS, BATCH, OBS, make_agent, make_batch
from torch import nn

import dsac_e
import dsac_t
import sac

each_module = pytest.mark.parametrize("module", [dsac_e, dsac_t, sac], ids=["dsac_e", "dsac_t", "sac"])


@each_module
@pytest.mark.parametrize("excess", [2.0, -2.0])
def test_alpha_falls_above_the_budget_and_rises_below(module, excess):
    """One step down tup()'s gradient, which is alpha * (mean entropy - budget) with respect to log(alpha)."""
    log_alpha, budget = nn.Parameter(torch.tensor(-0.5, dtype=torch.float64)), torch.tensor(-3.0, dtype=torch.float64)
    optimizer = torch.optim.Adam([log_alpha], lr=0.01)
    entropy = budget + excess + torch.linspace(-5, 5, 9, dtype=torch.float64)
    module.tup(log_alpha, entropy, budget).backward()
    np.testing.assert_allclose(log_alpha.grad, np.exp(-0.5) * excess, rtol=1e-12)
    optimizer.step()
    assert (log_alpha < -0.5) == (excess > 0)


@each_module
@pytest.mark.parametrize("above", [True, False])
def test_agent_moves_alpha_against_the_excess(module, above):
    """The same through the agent's own optimiser, whose first step is one learning rate long."""
    agent = make_agent(module)
    agent.budget.fill_(-1e3 if above else 1e3)
    before = agent.log_alpha.item()
    agent.update(make_batch(module, 1), delayed=True)
    step = agent.log_alpha.item() - before
    np.testing.assert_allclose(step, -agent.args.alpha_lr if above else agent.args.alpha_lr, rtol=1e-6)


@pytest.mark.parametrize("tec", [True, False])
def test_the_constraint_is_on_the_trajectory_with_tec_and_on_the_step_without(tec):
    """A Qe far above or below the budget turns alpha with --tec, and leaves it on its course without."""
    steps = []
    for qe in (-500.0, 500.0):
        agent = make_agent(dsac_e, tec=tec, rho=1.0)
        with torch.no_grad():
            agent.entropy_critic.net[-1].bias.fill_(qe)
        torch.manual_seed(0)
        before = agent.log_alpha.item()
        agent.update(make_batch(dsac_e, 1), delayed=True)
        steps.append(agent.log_alpha.item() - before)
    assert steps[0] > 0 > steps[1] if tec else steps[0] == steps[1]


@pytest.mark.parametrize(
    "env_id, rho",
    [
        ("Humanoid-v4", 20),
        ("Humanoid-v5", 20),
        ("my_tasks/Walker2d-v0", 20),
        ("Walker2d-v4", 20),
        ("Walker2d-v5", 20),
        ("HumanoidStandup-v5", 1),
    ]
    + [(f"{task}-v4", 1) for task in ("Ant", "HalfCheetah", "Hopper", "InvertedDoublePendulum", "Swimmer")]
    + [("Pusher-v5", 1)],
)
def test_budget(env_id, rho):
    """rho * -A / (1 - gamma) for whole trajectories, rho * -A for single steps; 20 is the rho of two tasks, of any
    version, 1 that of the others; a given rho counts everywhere. DSAC-T and SAC constrain single steps to -A."""
    dims = 6
    box = -np.ones(dims), np.ones(dims)

    def budget(module, **arguments):
        return module.Agent(module.Args(env_id=env_id, hidden_width=4, **arguments), OBS, *box).budget.item()

    np.testing.assert_allclose(budget(dsac_e), rho * -dims / 0.01, rtol=1e-6)
    np.testing.assert_allclose(budget(dsac_e, gamma=0.9), rho * -dims / 0.1, rtol=1e-6)
    np.testing.assert_allclose(budget(dsac_e, rho=0.5), 0.5 * -dims / 0.01, rtol=1e-6)
    np.testing.assert_allclose(budget(dsac_e, rho=3.0, tec=False), 3 * -dims, rtol=1e-6)
    for ablation in ({"tec": False}, {"tec": False, "res": False}):
        np.testing.assert_allclose(budget(dsac_e, **ablation), rho * -dims, rtol=1e-6)
    assert budget(dsac_t) == budget(sac) == -dims


# A task of two states that follow each other for ever, whatever the action. Its reward critic is given: in each state a
# parabola over the action, centred in the box. So the policy is known but for one number per state, its log_std.
LOW, HIGH = np.array([-1.0]), np.array([3.0])
CENTER, HALF_RANGE = 1.0, 2.0
CURVATURE = np.array([1.0, 8.0])
DISCOUNT = 0.5


def root(falling, low, high):
    """Where a falling function crosses zero, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low


def dual(budget):
    """The multiplier at which the best policy has `budget` of discounted entropy, and that policy's entropies (2,).

    For a = center + half_range * tanh(std * x), x standard normal, by quadrature over x: value and entropy of the
    policy, their slopes in log_std; bisection for the log_std where value + alpha * entropy peaks, and for alpha.
    """
    x, w = np.polynomial.hermite_e.hermegauss(64)
    w = w / w.sum()

    def slope(log_std, curvature, alpha):
        u = np.exp(log_std) * x
        t = np.tanh(u)
        return w @ (-curvature * HALF_RANGE**2 * t * (1 - t**2) * u) + alpha * (1 - w @ (2 * t * u))

    def entropy(log_std):
        t = np.tanh(np.exp(log_std) * x)
        return log_std + np.log(2 * np.pi * np.e) / 2 + w @ np.log(1 - t**2) + np.log(HALF_RANGE)

    def entropies(alpha):
        return np.array([entropy(root(lambda s, c=c: slope(s, c, alpha), -5.0, 0.5)) for c in CURVATURE])

    alpha = root(lambda alpha: budget * (1 - DISCOUNT) - entropies(alpha).mean(), 1e-4, 1.0)
    return alpha, entropies(alpha)


class Parabolas(nn.Module):
    """The given critic: the second twin lies above the first and may not matter. obs names the state, one-hot."""

    def forward(self, obs, action):
        q = -(obs @ torch.tensor(CURVATURE)) * (action[:, 0] - CENTER) ** 2 / 2
        return torch.stack([q, q / 2 + 1]), torch.ones_like(q).expand(2, -1)


@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_closed_loop_finds_the_multiplier(rho):
    """Trained together, PIS, PIM and TUP bring the trajectory entropy to the agent's budget, alpha to the multiplier of
    the constrained problem, each state's entropy to its share, and Qe to the discounted entropies that follow.

    The noise is a shuffled set of quantiles of the standard normal: its means are free of sampling error.
    """
    torch.manual_seed(0)
    agent = dsac_e.Agent(dsac_e.Args(env_id="Ant-v4", gamma=DISCOUNT, rho=rho, hidden_width=8), 2, LOW, HIGH).double()
    policy, qe, log_alpha = agent.policy, agent.entropy_critic, agent.log_alpha
    critics, target_policy, target_qe = Parabolas(), copy.deepcopy(policy), copy.deepcopy(qe)
    n, rate = 16, 0.02
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)], dtype=torch.float64)
    quantiles /= quantiles.square().mean().sqrt()
    obs = torch.eye(2, dtype=torch.float64).repeat_interleave(n, 0)
    zeros = torch.zeros(2 * n, dtype=torch.float64)

    def noise():
        return torch.cat([quantiles[torch.randperm(n)] for _ in range(2)]).unsqueeze(1)

    with torch.no_grad():
        log_alpha.fill_(-2.0)
    groups = [{"params": policy.parameters()}, {"params": [log_alpha], "lr": 4 * rate}, {"params": qe.parameters()}]
    optimizer = torch.optim.Adam(groups, rate, fused=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [420, 480])
    for _ in range(520):
        with torch.no_grad():
            action, _ = policy(obs, noise())
            next_action, next_log_prob = target_policy(1 - obs, noise())
        batch = dsac_e.Batch(obs, action, zeros, 1 - obs, zeros)
        pis_loss, _ = dsac_e.pis(qe, target_qe, batch, next_action, next_log_prob, DISCOUNT)
        pim_loss, entropy, trajectory_entropy = dsac_e.pim(policy, critics, qe, obs, noise(), log_alpha.exp())
        tup_loss = dsac_e.tup(log_alpha, trajectory_entropy, agent.budget)
        optimizer.zero_grad()
        (pis_loss + pim_loss + tup_loss).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            targets = [*target_policy.parameters(), *target_qe.parameters()]
            torch._foreach_lerp_(targets, [*policy.parameters(), *qe.parameters()], 0.3)

    budget = -rho / (1 - DISCOUNT)
    alpha, entropies = dual(budget)
    following = DISCOUNT * (entropies[::-1] + DISCOUNT * entropies) / (1 - DISCOUNT**2)
    np.testing.assert_allclose(trajectory_entropy.mean(), budget, atol=5e-3)
    np.testing.assert_allclose(log_alpha.exp().item(), alpha, rtol=1e-2)
    np.testing.assert_allclose(entropy.view(2, n).mean(1), entropies, atol=5e-3)
    np.testing.assert_allclose(qe(obs, action).view(2, n).mean(1).detach(), following, atol=5e-3)


@each_module
@pytest.mark.parametrize("bound", [-15.0, 15.0])
def test_alpha_stays_a_float_and_comes_back(module, bound):
    """However long the entropy stays on one side of its budget, log(alpha) ends at the bound that the agent sets, where
    alpha, its gradient and the losses are finite in float32, and turns within some ten updates when the side changes.

    What this stands for: Adam moves log(alpha) by about its learning rate in each delayed update, so in 1.5 million
    updates by up to 750,000 * 3e-4 = 225, and exp(+-225) is 0 or infinite in float32. A drift in one direction reaches
    the bound of 15 after some 50,000 delayed updates and stays there. This test enters that run 10 updates before the
    bound, with the state that Adam has after 750,000 steps of a steady gradient, and goes on by Agent.update alone. The
    way back is as steady, a learning rate per update: the test follows it for 100 updates.
    """
    torch.manual_seed(0)
    args = module.Args(env_id="Humanoid-v4", hidden_width=4)
    agent = module.Agent(args, OBS, -np.ones(ACTIONS), np.ones(ACTIONS))
    batch = module.Batch(*(column.float() for column in make_batch(module, 1)))
    agent.budget.fill_(np.copysign(4000.0, bound))  # entropy above it drives alpha down, entropy below it up
    with torch.no_grad():
        agent.log_alpha.fill_(bound - np.copysign(10 * args.alpha_lr, bound))
    agent.update(batch, delayed=True)
    gradient, adam = agent.log_alpha.grad, agent.policy_optimizer.state[agent.log_alpha]
    adam["exp_avg"].copy_(gradient)
    adam["exp_avg_sq"].copy_(gradient**2)
    adam["step"].fill_(750_000)

    path = []
    for _ in range(40):
        log = agent.update(batch, delayed=True)
        path.append(agent.log_alpha.item())
        assert all(value.isfinite().all() for value in log.values())
    assert abs(path[5]) < 15 and path[20:] == [bound] * 20
    assert all(weight.isfinite().all() and weight.grad.isfinite().all() for weight in agent.policy.parameters())
    assert torch.finfo(torch.float32).tiny < agent.log_alpha.exp().item() < torch.finfo(torch.float32).max

    agent.budget.neg_()
    path = []
    for _ in range(100):
        agent.update(batch, delayed=True)
        path.append(agent.log_alpha.item())
    at_bound = path.count(bound)
    assert at_bound < 12
    assert abs(path[-1]) < 15 - 0.9 * (100 - at_bound - 10) * args.alpha_lr  # ten more to be at full speed


@each_module
def test_alpha_leaves_its_lower_bound_at_full_speed(module):
    """A shortage of one nat is enough: at the bound its gradient, exp(-15), is still large beside Adam's epsilon."""
    agent = module.Agent(module.Args(hidden_width=4), OBS, -np.ones(ACTIONS), np.ones(ACTIONS))
    with torch.no_grad():
        agent.log_alpha.fill_(-100.0)
    agent.update(module.Batch(*(column.float() for column in make_batch(module, 1))), delayed=True)
    bound = agent.log_alpha.item()
    agent.policy_optimizer.zero_grad()
    for _ in range(50):
        agent.log_alpha.grad = None
        module.tup(agent.log_alpha, agent.budget - torch.ones(BATCH), agent.budget).backward()
        agent.policy_optimizer.step()
    assert agent.log_alpha.item() - bound > 0.9 * 50 * agent.args.alpha_lr
