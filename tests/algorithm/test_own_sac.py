"""tools/check_own_sac.py accepts the functions of dsac_e.py and notices each mistake."""

import runpy
from pathlib import Path

import pytest
import torch

import dsac_e

CHECK = Path(dsac_e.__file__).parent / "tools/check_own_sac.py"
GAMMA, ALPHA = 0.9, 0.3


def q_target(reward, next_q, next_log_prob, terminated, alpha=0.0):
    return reward + GAMMA * (1 - terminated) * (next_q - alpha * next_log_prob)


def qe_target(next_qe, next_log_prob, terminated, current_step=0.0, mask=1.0):
    """The minimum of the script's own loss."""
    qe = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = dsac_e.pis(qe, next_qe, -next_log_prob, GAMMA * (1 - mask * terminated))
    return -torch.autograd.grad(loss, qe)[0] / 2 - current_step * next_log_prob


def alpha_loss(log_alpha, log_prob, qe, sign=-1.0, budget=-1 / (1 - GAMMA), factor=1.0):
    return factor * dsac_e.tup(log_alpha, sign * log_prob + qe, torch.tensor(budget).double())


def mistaken(function, **change):
    return lambda **arguments: function(**arguments, **change)


@pytest.mark.parametrize("mistake", [
    {}, {"q_target": mistaken(q_target, alpha=ALPHA)}, {"qe_target": mistaken(qe_target, current_step=1.0)},
    {"qe_target": mistaken(qe_target, mask=0.0)}, {"alpha_loss": mistaken(alpha_loss, sign=1.0)},
    {"alpha_loss": mistaken(alpha_loss, budget=-1.0)}, {"alpha_loss": mistaken(alpha_loss, factor=-1.0)},
], ids=["none", "alpha in Q", "current step", "no termination", "sign", "budget of a step", "leading minus"])  # fmt: skip
def test_check(mistake):
    check = runpy.run_path(CHECK)["check"]
    functions = {"q_target": q_target, "qe_target": qe_target, "alpha_loss": alpha_loss} | mistake
    if mistake:
        with pytest.raises(AssertionError):
            check(**functions, gamma=GAMMA)
    else:
        check(**functions, gamma=GAMMA)


def test_its_example(capsys):
    runpy.run_path(CHECK, run_name="__main__")
    assert capsys.readouterr().out == "ok\n"
