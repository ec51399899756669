"""Checks a SAC agent of your own with the changes of DSAC-E: copy check() and pass your own expressions.

The process has one state and reward 1, the policy one action dimension and entropy H0 = -1, rho is 1. All
values are known. The check notices a wrong sign of log_prob in `tup`, a `Qe` that includes the current step
(-log_prob then counts twice), a missing `1 - terminated` in its target, a budget that is not divided by
1 - gamma, and alpha left in the targets of Q.
"""

import torch
from torch import Tensor


def check(q_target, qe_target, alpha_loss, gamma: float):
    """Takes functions of scalar tensors with the keyword arguments of `my_...` below; fails an assertion."""
    zero, one, entropy = torch.tensor([0.0, 1.0, -1.0]).double()
    qe = gamma * entropy / (1 - gamma)  # the sum over all steps after the current one
    assert q_target(reward=one, next_q=zero, next_log_prob=-entropy, terminated=zero) == one
    assert torch.isclose(qe_target(next_qe=qe, next_log_prob=-entropy, terminated=zero), qe)
    assert qe_target(next_qe=qe, next_log_prob=-entropy, terminated=one) == zero
    for excess in (-0.5, 0.0, 0.5):  # of the trajectory's entropy over its budget: alpha rises, stays, falls
        log_alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = alpha_loss(log_alpha=log_alpha, log_prob=-(entropy + excess), qe=qe)
        (gradient,) = torch.autograd.grad(loss, log_alpha)
        assert abs(gradient - excess) < 1e-6


def my_q_target(reward: Tensor, next_q: Tensor, next_log_prob: Tensor, terminated: Tensor) -> Tensor:
    return reward + 0.9 * (1 - terminated) * next_q


def my_qe_target(next_qe: Tensor, next_log_prob: Tensor, terminated: Tensor) -> Tensor:
    return 0.9 * (1 - terminated) * (next_qe - next_log_prob)


def my_alpha_loss(log_alpha: Tensor, log_prob: Tensor, qe: Tensor) -> Tensor:
    rho, target_entropy = 1.0, -1.0
    return log_alpha.exp() * (-log_prob + qe - rho * target_entropy / (1 - 0.9)).detach()


if __name__ == "__main__":
    check(my_q_target, my_qe_target, my_alpha_loss, gamma=0.9)
    print("ok")
