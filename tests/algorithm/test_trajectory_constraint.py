"""How the trajectory constraint differs from the single-step constraint if episodes end early.

  trajectory   E_s[-log pi + Qe] >= H0 / (1 - gamma)        single step   E_s[-log pi] >= H0

For a policy of entropies h, (I - gamma P)^-1 h = h + Qe is the discounted entropy from each state. Qe comes from PIS,
the direction of alpha from TUP.
"""

import pytest
import torch

import dsac_e

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
        arguments = prediction, next_qe, next_h, GAMMA * (1 - terminated)
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
    assert pressure(torch.tensor([h0]), h0) == 0
    assert pressure(trajectory, h0 / (1 - GAMMA)) > 6.9
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
