"""The policy's entropy across states, and how much Qe weighs in the policy's gradient, from checkpoints.

    python results/states.py runs/HalfCheetah-v4__dsac_e__0 runs/HalfCheetah-v4__dsac_t__0

States are drawn from the replay buffer, as in training. The last columns are of DSAC-E: the correlation over
states of the entropy with the entropy that follows (Qe), and the length of alpha dQe/da relative to dQ/da.
"""

import importlib
import sys
from pathlib import Path

import gymnasium as gym
import torch
import tyro

sys.path.append(str(Path(__file__).resolve().parent.parent))
STATES, SAMPLES = 2000, 64


def describe(run_dir: Path) -> list[str]:
    saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    script = importlib.import_module(saved["algorithm"])
    args = script.Args(**saved["args"])
    env = gym.make(args.env_id)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = script.Agent(args, obs_dim, env.action_space.low, env.action_space.high)
    agent.load_state_dict(saved["agent"])

    torch.manual_seed(0)
    obs = saved["replay"][torch.randint(len(saved["replay"]), (STATES,)), :obs_dim]
    many = obs.repeat_interleave(SAMPLES, 0)
    with torch.no_grad():
        action, log_prob = agent.policy(many, torch.randn(len(many), action_dim))
    entropy = -log_prob.view(STATES, SAMPLES).mean(1)
    low, high = entropy.quantile(torch.tensor([0.05, 0.95])).tolist()
    alpha = agent.log_alpha.exp().item()
    row = [f"{saved['step']}", f"{alpha:.3f}", f"{entropy.mean():.1f}", f"{entropy.std():.1f}"]
    row.append(f"{low:.1f} to {high:.1f}")
    if saved["algorithm"] != "dsac_e":
        return [*row, "", ""]
    some, action = many[::SAMPLES], action[::SAMPLES].requires_grad_()
    qe = agent.entropy_critic(some, action)
    if args.center_entropy:
        qe = qe + agent.mean_entropy * agent.steps_critic(some, action, agent.mean_discount)
    q = agent.critics(some, action)[0].amin(0)
    by_qe, by_q = (torch.autograd.grad(value.sum(), action)[0].norm(dim=1).mean().item() for value in (qe, q))
    correlation = torch.corrcoef(torch.stack((entropy, qe.detach())))[0, 1].item()
    return [*row, f"{correlation:.2f}", f"{alpha * by_qe / by_q:.3f}"]


def main(run_dirs: tyro.conf.Positional[tuple[Path, ...]]):
    print(
        "| run | step | alpha | mean entropy | std over states | 5% to 95% | correlation with Qe | dQe : dQ |"
    )
    print("|---" * 8 + "|")
    for run_dir in run_dirs:
        print(f"| {run_dir.name} | {' | '.join(describe(run_dir))} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
