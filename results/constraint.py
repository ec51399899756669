"""Entropy per state under the single-step and the trajectory entropy constraint, solved exactly.

    python results/constraint.py --out results

A walker is on a wide field or on a narrow bridge, from which large actions make it fall. PEV, PIS and PIM
are iterated on tables, and TUP is solved for alpha by bisection. At the same alpha the two constraints have
the same policy: they differ in the alpha at which they are met.
"""

from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")  # needs no display
from matplotlib import pyplot as plt

GAMMA, H0 = 0.95, -1.0  # one action dimension in [-1, 1]
ACTIONS = (np.arange(1000) + 0.5) / 500 - 1
CELL = 2 / len(ACTIONS)  # width of a cell around an action


def process(falling_terminates: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (2, n) and probabilities of the next state (2, n, 2), the rest to 1 terminates."""
    fall = 1 - np.exp(-((ACTIONS / 0.3) ** 2))
    to_bridge = (1 + ACTIONS) / 4
    field = np.stack((1 - to_bridge, to_bridge), -1)
    back = 0.1 * (1 - fall) + (0 if falling_terminates else fall)
    bridge = np.stack((back, 0.9 * (1 - fall)), -1)
    return np.stack((np.full_like(fall, 0.2), np.ones_like(fall))), np.stack((field, bridge))


def solve(alpha: float, rewards: np.ndarray, transitions: np.ndarray, qe_in_pim: bool = True):
    """Entropy, E[-log pi + Qe] and long-run frequency of each state, (2,) each, of the optimal policy."""
    value, entropy_value = np.zeros((2, 2))
    for _ in range(500):
        q = rewards + GAMMA * transitions @ value  # PEV
        qe = GAMMA * transitions @ entropy_value  # PIS
        score = q / alpha + (qe if qe_in_pim else 0)  # PIM: the best density is proportional to exp(score)
        score -= score.max(1, keepdims=True)
        log_prob = score - np.log(np.exp(score).sum(1, keepdims=True) * CELL)
        policy = np.exp(log_prob) * CELL
        entropy = -(policy * log_prob).sum(1)
        value = (policy * q).sum(1)
        entropy_value = entropy + (policy * qe).sum(1)
    next_state = np.einsum("sa,sat->st", policy, transitions)
    next_state[:, 0] += 1 - next_state.sum(1)  # an episode starts on the field
    return entropy, entropy_value, np.linalg.matrix_power(next_state, 10_000)[0]


def meet(trajectory: bool, old_data: float, *args) -> tuple[float, np.ndarray]:
    """alpha and entropies (2,) that meet the constraint; `old_data`: fraction of replay from the field."""
    low, high = np.log([1e-3, 1e2])
    for _ in range(50):
        middle = (low + high) / 2
        entropy, entropy_value, visits = solve(np.exp(middle), *args)
        replay = (1 - old_data) * visits + old_data * np.array([1, 0])
        excess = replay @ entropy_value - H0 / (1 - GAMMA) if trajectory else replay @ entropy - H0
        low, high = (low, middle) if excess > 0 else (middle, high)
    return np.exp(middle), entropy


def main(out: Path = Path("plots")):
    panels = {
        "falling leads to the field": (False, 0.0),
        "falling terminates": (True, 0.0),
        "half of the replay buffer\nis old data from the field": (False, 0.5),
    }
    bars = {
        "single-step constraint (DSAC-T, SAC)": (False, True),
        "trajectory constraint (DSAC-E)": (True, True),
        "trajectory constraint, PIM without Qe": (True, False),
    }
    fig, axes = plt.subplots(1, len(panels), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (title, (falling_terminates, old_data)) in zip(axes, panels.items(), strict=True):
        for i, (label, (trajectory, qe_in_pim)) in enumerate(bars.items()):
            alpha, entropy = meet(trajectory, old_data, *process(falling_terminates), qe_in_pim)
            print(f"{title!r}, {label}: alpha {alpha:.3f}, field {entropy[0]:.2f}, bridge {entropy[1]:.2f}")
            axis.bar(np.arange(2) + 0.27 * (i - 1), entropy, 0.25, label=label, color=f"C{i}")
        axis.axhline(H0, color="gray", linestyle=":", label="H0")
        axis.set(title=title, xticks=(0, 1), xticklabels=("field", "bridge"))
    axes[0].set_ylabel("policy entropy (nats)")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2)
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "constraint.png", dpi=130)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
