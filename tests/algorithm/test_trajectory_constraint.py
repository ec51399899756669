"""How the trajectory constraint differs from the single-step constraint, on processes of one to three states.

  trajectory   E_s[-log pi + Qe] >= H0 / (1 - gamma)        single step   E_s[-log pi] >= H0

For a policy of entropies h, (I - gamma P)^-1 h = h + Qe is the discounted entropy from each state. The two agree
if s has the stationary distribution of P and no episode terminates. Qe comes from PIS, alpha's direction from TUP.
"""

import numpy as np
import pytest
import torch

import dsac_e
import sac

GAMMA = 0.9


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def entropy_values(h, next_states, terminated):
    """h + Qe (S,) by iterating PIS. next_states (S, n): equally likely successors; terminated (S, n)."""
    h, terminated = double(h), double(terminated)
    next_states = torch.tensor(next_states)
    qe = torch.zeros_like(h)
    for _ in range(400):
        prediction = qe.unsqueeze(1).expand(terminated.shape).clone().requires_grad_()
        next_qe, next_h = qe[next_states], h[next_states]
        arguments = prediction, next_qe, -next_h, GAMMA * (1 - terminated)
        loss = dsac_e.pis(*(argument.flatten() for argument in arguments))
        (gradient,) = torch.autograd.grad(loss, prediction)
        qe = qe - (gradient * terminated.numel() / 2).mean(1)  # to the mean target
    return h + qe


def pressure(entropy, budget):
    """d TUP / d log_alpha at alpha = 1: positive if alpha falls."""
    log_alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = dsac_e.tup(log_alpha, entropy, double(budget))
    return torch.autograd.grad(loss, log_alpha)[0].item()


def test_early_termination_leaves_less_room_for_negative_entropy():
    """Episodes end with probability p = 1/4. A policy of entropy H0 in each step has H0 / (1 - gamma (1 - p)) per
    trajectory, above its budget: alpha falls until each step has H0 (1 - gamma (1 - p)) / (1 - gamma).
    """
    h0, survival, ends = -1.0, 1 - GAMMA * 0.75, [[1, 0, 0, 0]]
    trajectory = entropy_values([h0], [[0, 0, 0, 0]], ends)
    assert trajectory.item() == pytest.approx(h0 / survival)
    assert pressure(torch.tensor([h0]), h0) == 0 < 6.9 < pressure(trajectory, h0 / (1 - GAMMA))
    trajectory = entropy_values([h0 * survival / (1 - GAMMA)], [[0, 0, 0, 0]], ends)
    assert pressure(trajectory, h0 / (1 - GAMMA)) == pytest.approx(0, abs=1e-9)


def test_negative_entropy_pays_for_termination():
    """PIM with equal Q prefers the action that ends the episode by alpha gamma |h| / (1 - gamma), with h < 0."""
    h, alpha = -1.5, double(0.2)
    stay, end = entropy_values([h, h], [[0], [1]], [[0], [1]])
    assert end == h  # Qe = 0
    q = torch.zeros(2, 1).double()
    gain = dsac_e.pim(q, stay[None], alpha) - dsac_e.pim(q, end[None], alpha)  # losses
    assert gain.item() == pytest.approx(0.2 * GAMMA * 1.5 / (1 - GAMMA))


def test_without_termination_both_agree_on_the_stationary_distribution_only():
    """A chain that stays with probability 3/4. On its stationary distribution d both constraints are met with equality.
    On a replay distribution w, the single-step mean differs from H0 by 50%, (w - d) h, the trajectory mean from
    H0 / (1 - gamma) by 9%, (w - d) (I - gamma P)^-1 h.
    """
    h, w, d = np.array([0.0, -4.0]), np.array([0.75, 0.25]), np.array([0.5, 0.5])
    P = np.array([[0.75, 0.25], [0.25, 0.75]])
    trajectory = entropy_values(h, [[0, 0, 0, 1], [1, 1, 1, 0]], np.zeros((2, 4)))
    assert pressure(torch.tensor(h), -2.0) == pytest.approx(0, abs=1e-12)
    assert pressure(trajectory, -2.0 / (1 - GAMMA)) == pytest.approx(0, abs=1e-9)
    trajectory = trajectory.numpy()
    np.testing.assert_allclose(trajectory, np.linalg.solve(np.eye(2) - GAMMA * P, h))
    assert (w - d) @ h / (d @ h) == -0.5
    assert (w - d) @ trajectory / (d @ trajectory) == pytest.approx(-0.5 * (1 - GAMMA) / (1 - GAMMA / 2))


def test_qe_moves_the_policy_to_states_of_high_entropy():
    """From state 0 an action a in [-1, 1] leads to state 1 (entropy 1) with probability (1 + a) / 2, else to state 2
    (entropy -5), for a reward of -a^2. PIM's best action is 3 alpha gamma / 2 with Qe, 0 without, and in SAC,
    whose Q contains the entropy, the same as with Qe: at equal alpha the policies are equal.
    """
    alpha, h0 = double(0.3), double([-1.0])
    best = 3 * 0.3 * GAMMA / 2
    outcome = entropy_values([-1.0, 1.0, -5.0], [[1, 2], [1, 1], [2, 2]], [[0, 0], [1, 1], [1, 1]])
    assert outcome[0].item() == pytest.approx(-1 + GAMMA * (1 - 5) / 2)

    def slope(script, a, qe_in_q, qe_in_entropy):
        action = double([a]).requires_grad_()
        qe = GAMMA * ((1 + action) / 2 * outcome[1] + (1 - action) / 2 * outcome[2])
        q = -action.square() + qe_in_q * alpha * qe
        loss = script.pim(q.expand(2, -1), h0 + qe_in_entropy * qe, alpha)
        return torch.autograd.grad(loss, action)[0].item()

    assert slope(dsac_e, best, 0, 1) == pytest.approx(0, abs=1e-12)
    assert slope(dsac_e, 0.0, 0, 0) == 0 != slope(dsac_e, best, 0, 0)
    for a in (-0.5, best, 0.9):
        assert slope(sac, a, 1, 0) == pytest.approx(slope(dsac_e, a, 0, 1), abs=1e-12)
