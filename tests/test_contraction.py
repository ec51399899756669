"""Policy evaluation and introspection contract (TECRL, appendix A.3), shown on the targets as the scripts compute them.

The tasks are random finite MDPs, the critics tables over one-hot observations and actions, everything in float64.
Every probability is a frequency in a short list of equally likely draws, and a batch holds each combination of draws
once. A mean over the batch, such as the scripts' losses, is then an exact expectation, without sampling error.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dsac_e
import dsac_t
import sac
import td3

ALPHA = torch.tensor(0.7, dtype=torch.float64)
CASES = {"PIS": dsac_e, "PEV of DSAC-E": dsac_e, "PEV of DSAC-T": dsac_t, "PEV of SAC": sac, "PEV of TD3": td3}
SEEDS, GAMMAS = st.integers(0, 2**32 - 1), st.floats(0, 0.999)
SEED = 10  # an MDP of four states, three actions, and a policy that takes all of them

property_based = settings(derandomize=True, deadline=None, max_examples=25, database=None)
every_case = pytest.mark.parametrize("case", CASES)


class MDP:
    """A random task and policy, as one exhaustive batch for the scripts and as matrices for the closed forms."""

    def __init__(self, seed: int, ending: float = 0.3):
        rng = np.random.default_rng(seed)
        S, A = rng.integers(1, 5), rng.integers(1, 4)
        next_states = rng.integers(S, size=(S, A, 3))  # equally likely draws of s' for each (s, a)
        next_actions = rng.integers(A, size=(S, 4))  # equally likely draws of a' for each s'
        terminated = rng.random(next_states.shape) < ending
        rewards = rng.normal(size=next_states.shape)

        s, a, draw, draw_action = np.indices((S, A, 3, 4)).reshape(4, -1)
        next_s, next_a = next_states[s, a, draw], next_actions[next_states[s, a, draw], draw_action]
        policy = np.eye(A)[next_actions].mean(1)  # (S, A)
        columns = np.eye(S)[s], np.eye(A)[a], rewards[s, a, draw], np.eye(S)[next_s], terminated[s, a, draw] + 0.0
        self.batch = dsac_e.Batch(*map(torch.from_numpy, columns))
        self.next_action = torch.from_numpy(np.eye(A)[next_a])
        self.next_log_prob = torch.from_numpy(np.log(policy[next_s, next_a]))

        transition = (np.eye(S)[next_states] * ~terminated[..., None]).mean(2)  # (S, A, S), without the endings
        self.shape, self.policy = (S, A), policy
        self.P = np.einsum("ijk,kl->ijkl", transition, policy).reshape(S * A, S * A)
        entropy = -np.sum(policy * np.log(np.where(policy > 0, policy, 1)), axis=1)
        self.next_entropy = (transition @ entropy).ravel()
        self.reward = rewards.mean(2).ravel()

    def constant(self, case: str, gamma: float) -> np.ndarray:
        """The part of the target that no critic enters, (S * A,)."""
        if case == "PIS":
            return gamma * self.next_entropy
        entangled = ALPHA.item() if case in ("PEV of DSAC-T", "PEV of SAC") else 0.0
        return self.reward + entangled * gamma * self.next_entropy

    def backup(self, case: str, gamma: float, tables: np.ndarray) -> np.ndarray:
        """The Bellman operator by matrices: (n, S, A) -> (S, A), the smaller of the n tables standing for the value."""
        return (self.constant(case, gamma) + gamma * self.P @ tables.min(0).ravel()).reshape(self.shape)

    def fixed_point(self, case: str, gamma: float) -> np.ndarray:
        """(I - gamma P)^-1 applied to the constant part, (S, A)."""
        return np.linalg.solve(np.eye(self.P.shape[0]) - gamma * self.P, self.constant(case, gamma)).reshape(self.shape)

    def random_tables(self, case: str, seed: int) -> np.ndarray:
        """(1, S, A) for the entropy critic, (2, S, A) for twins: the two then differ."""
        return 5 * np.random.default_rng(seed).normal(size=(1 if case == "PIS" else 2, *self.shape))


class Table(nn.Module):
    """Values looked up by a one-hot observation and action, in the shape of each script's networks."""

    def __init__(self, case: str, values: np.ndarray):
        super().__init__()
        self.case, self.values = case, nn.Parameter(torch.tensor(values))
        self.raw = nn.Parameter(torch.linspace(-0.5, 1.5, values.size, dtype=torch.float64).reshape(values.shape))

    def forward(self, obs, action):
        q = torch.einsum("bs,nsa,ba->nb", obs, self.values, action)
        if self.case == "PIS":
            return q.squeeze(0)
        return (q, F.softplus(torch.einsum("bs,nsa,ba->nb", obs, self.raw, action))) if self.distributional else q

    @property
    def distributional(self) -> bool:
        return self.case in ("PEV of DSAC-E", "PEV of DSAC-T")

    def pull(self) -> np.ndarray:
        """c of d loss / d Q(s, a) = c (Q - E[y | s, a]) / (S * A), by the definition of each loss."""
        if not self.distributional:
            return np.array(2.0)  # squared error
        sigma = F.softplus(self.raw).detach().numpy()
        return (sigma.mean((1, 2), keepdims=True) ** 2 + 0.1) / (sigma**2 + 0.1)  # Eq. 11


def loss_of(case: str, mdp: MDP, gamma: float, critic: Table, target: Table) -> torch.Tensor:
    """The script's own loss on the exhaustive batch. The noise of a distributional target is fresh at every call."""
    script, sample = CASES[case], (mdp.batch, mdp.next_action)
    noise, spread = torch.randn_like(mdp.batch.reward), torch.zeros(2, dtype=torch.float64)
    return {
        "PIS": lambda: script.pis(critic, target, *sample, mdp.next_log_prob, gamma),
        "PEV of DSAC-E": lambda: script.pev(critic, target, *sample, noise, spread, gamma, 0.005),
        "PEV of DSAC-T": lambda: script.pev(
            critic, target, *sample, mdp.next_log_prob, noise, ALPHA, spread, gamma, 0.005
        ),
        "PEV of SAC": lambda: script.pev(critic, target, *sample, mdp.next_log_prob, ALPHA, gamma),
        "PEV of TD3": lambda: script.pev(critic, target, *sample, gamma),
    }[case]()[0]


def operator(case: str, mdp: MDP, gamma: float, tables: np.ndarray) -> np.ndarray:
    """B: E[y | s, a] for the target tables (n, S, A), as the gradient of the script's loss gives it away: (n, S, A).

    The online tables are others, so that a target computed from them would show.
    """
    torch.manual_seed(0)
    critic, target = Table(case, mdp.random_tables(case, 1234)), Table(case, tables)
    loss_of(case, mdp, gamma, critic, target).backward()
    assert target.values.grad is None
    q, gradient = critic.values.detach().numpy(), critic.values.grad.numpy()
    return q - gradient * mdp.P.shape[0] / critic.pull()


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return np.abs(x - y).max()


@every_case
@property_based
@given(SEEDS, GAMMAS, st.sampled_from([0.0, 0.3, 1.0]))
def test_target_is_the_bellman_operator(case, seed, gamma, ending):
    """Sign and place of the entropy, the discount, endings, the smaller twin: all as in the operator's definition."""
    mdp = MDP(seed, ending)
    tables = mdp.random_tables(case, seed + 1)
    expected = mdp.backup(case, gamma, tables)
    assert distance(operator(case, mdp, gamma, tables), expected) < 1e-11 * (1 + np.abs(expected).max())


@every_case
@property_based
@given(SEEDS, GAMMAS, st.sampled_from([0.0, 0.3, 1.0]))
def test_operator_contracts_by_gamma(case, seed, gamma, ending):
    """||B Q1 - B Q2|| <= gamma ||Q1 - Q2|| in the sup norm, for any two (pairs of) tables."""
    mdp = MDP(seed, ending)
    first, second = mdp.random_tables(case, seed + 1), mdp.random_tables(case, seed + 2)
    images = operator(case, mdp, gamma, first), operator(case, mdp, gamma, second)
    assert distance(*images) <= gamma * distance(first, second) + 1e-11


@every_case
@property_based
@given(SEEDS, GAMMAS, st.floats(-5, 5))
def test_factor_gamma_is_attained(case, seed, gamma, shift):
    """Without endings a shift of the tables by c moves B Q by exactly gamma c: no smaller factor would be right."""
    mdp = MDP(seed, ending=0)
    tables = mdp.random_tables(case, seed + 1)
    moved = operator(case, mdp, gamma, tables + shift) - operator(case, mdp, gamma, tables)
    assert distance(moved, gamma * shift) < 1e-11


@every_case
@pytest.mark.parametrize(("gamma", "ending"), [(0.5, 0.3), (0.9, 0.0)])
def test_iterates_reach_the_closed_form_at_rate_gamma(case, gamma, ending):
    """The k-th iterate is within gamma^k of the initial distance from (I - gamma P)^-1 times the constant part."""
    mdp = MDP(SEED, ending=ending)
    solution, tables = mdp.fixed_point(case, gamma), mdp.random_tables(case, 8)
    start = distance(tables, solution)
    for k in range(1, 151):
        tables = operator(case, mdp, gamma, tables)
        assert distance(tables, solution) <= gamma**k * start + 1e-11
    assert distance(tables, solution) < 1e-5 < 1 < start


@every_case
@pytest.mark.parametrize("ending", [0.0, 0.3])
def test_gradient_training_reaches_the_closed_form(case, ending):
    """Descent on the script's loss, bootstrapped from a copy that follows the tables, ends at the same fixed point.

    The copy is the trained module itself: were its values not held constant, descent would minimise the Bellman
    residual, whose minimum differs in a random MDP. Sigma is trained along, from a new noise in each step: neither
    may move where the mean ends.
    """
    mdp, gamma = MDP(SEED, ending=ending), 0.8
    torch.manual_seed(0)
    critic = Table(case, mdp.random_tables(case, 8))
    solution, raw = mdp.fixed_point(case, gamma), copy.deepcopy(critic.raw)
    size = mdp.P.shape[0]  # undoes the 1 / (S * A) of the gradient of a mean
    optimizer = torch.optim.SGD([{"params": [critic.values], "lr": 0.3 * size}, {"params": [critic.raw], "lr": 0.1}])
    for _ in range(600):
        optimizer.zero_grad()
        loss_of(case, mdp, gamma, critic, critic).backward()
        optimizer.step()
    assert distance(critic.values.detach().numpy(), solution) < 1e-9
    if critic.distributional:
        assert distance(critic.raw.detach().numpy(), raw.detach().numpy()) > 0.1  # sigma did move
