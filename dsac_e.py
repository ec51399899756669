# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#     "filelock==4.3.1", "tensorboard==2.21.0", "tqdm==4.70.1", "imageio==2.38.1", "moviepy==2.2.1"]
# ///
"""DSAC-E: distributional soft actor-critic with a trajectory entropy constraint, in one file.

Paper: "Mind Your Entropy" (TECRL, arXiv 2511.11592). It extends DSAC-T (arXiv 2310.05858), which is SAC
(arXiv 1812.05905) with value distributions. SAC adds alpha * entropy to the reward, so every change of alpha
moves the critics' target. DSAC-E separates them: twin critics Z_i = N(Q_i, sigma_i^2) learn the return of the
reward, Qe that of the entropy. Right of <- are target networks, a' ~ pi_target(.|s'), d = 1 if terminal:

  PEV  policy evaluation     Eq. 11     Z_i(s, a) <- r + gamma (1 - d) Z_k(s', a'),  k = argmin_j Q_j(s', a')
  PIS  policy introspection  Eq. 12-13  Qe(s, a)  <- gamma (1 - d) (H(pi_target|s') + Qe(s', a'))
  PIM  policy improvement    Eq. 14     max over pi:    E[min Q_i(s, a) + alpha (-log pi(a|s) + Qe(s, a))]
  TUP  temperature update    Eq. 15     min over alpha: alpha (E[-log pi(a|s) + Qe(s, a)] - budget)

alpha is the Lagrange multiplier of E[-log pi + Qe] >= budget = rho * H0 / (1 - gamma), where H0 = -A nats is
SAC's target entropy. Shapes: B batch, S observation, A action dimensions. What is not in the papers is marked
[ours]. The algorithm ends at the line of = signs. Below it is the harness: environments, replay, checkpoints.
Returns of HalfCheetah-v4 (results/): 12112 and 11337 after 30 million steps, 1.5 million updates, with 64
hidden units; 7104, 6369 and 7747 after 3 million steps with 256 (with --center-entropy 8859, 7515 and 8400).
"""

import copy
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_STD_MIN, LOG_STD_MAX = -20, 0.5  # of the Gaussian before the squash, as in the DSAC authors' code


@dataclass
class Args:
    """Train on a Gymnasium environment. Running the same command again resumes the run."""

    env_id: str = "Humanoid-v4"  # Gymnasium id; flat Box observations, bounded Box actions
    rho: float | None = None  # larger requires less entropy; default: 1, or 20 for Humanoid and Walker2d
    tec: bool = True  # trajectory entropy constraint; --no-tec constrains single steps to rho * H0 (ablation)
    res: bool = True  # reward/entropy separation; --no-res adds the entropy to the reward (ablation)
    center_entropy: bool = False  # [ours] Qe follows the mean entropy with little delay, see StepsCritic
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of target networks (at policy updates) and of running means (at every update)
    policy_delay: int = 2  # critic updates per update of policy, alpha and target networks
    policy_lr: float = 1e-4  # learning rate of the policy
    critic_lr: float = 1e-4  # learning rate of the critics
    alpha_lr: float = 3e-4  # learning rate of log(alpha)
    initial_alpha: float = math.e  # alpha at the start of training; log(alpha) = 1 as in DSAC
    hidden_width: int = 256  # units in each of the three hidden layers
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    learning_starts: int = 10_000  # steps with the initial policy, not uniform actions, before updates
    num_envs: int = 20  # number of environments; a vector step is one step of each
    updates_per_step: int = 1  # updates per vector step
    total_timesteps: int = 30_000_000  # environment steps of the run
    seed: int = 0  # seed of weights, noise, replay and environments
    env_threads: int | None = None  # threads that step environments; default: idle cores for MuJoCo, else 0
    device: str = "auto"  # torch device of networks and replay buffer; auto: CUDA if available
    compile: bool = True  # compile the update with torch.compile (skipped in short runs)
    eval_interval: int = 50_000  # environment steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation, with the deterministic policy
    checkpoint_interval: int = 500_000  # environment steps between checkpoints; one more at the end of a run
    run_dir: str = ""  # directory of the run; default: runs/<env_id>__<algorithm>__<seed>
    evaluate: bool = False  # instead of training, evaluate the policy in the run directory
    capture_video: bool = False  # instead of training, record an episode of the policy in the run directory

    def __post_init__(self):
        if self.rho is None:  # the paper's values; with 20 the constraint does not act: alpha only falls
            self.rho = 20.0 if re.search(r"\b(Humanoid|Walker2d)(-v\d+)?$", self.env_id) else 1.0
        if self.tec and not self.res:
            raise ValueError("--no-res requires --no-tec: the paper defines it only with --no-tec")


class Batch(NamedTuple):
    """Transitions. `terminated` is 1 only where the episode terminated; a mere time limit leaves it 0."""

    obs: Tensor  # (B, S)
    action: Tensor  # (B, A), in the environment's own units
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, S)
    terminated: Tensor  # (B,)


class StackedLinear(nn.Module):
    """n independent nn.Linear layers in one batched product: (n, B, fan_in) -> (n, B, fan_out)."""

    def __init__(self, n: int, fan_in: int, fan_out: int):
        super().__init__()
        limit = fan_in**-0.5  # that of nn.Linear
        self.weight = nn.Parameter(torch.empty(n, fan_out, fan_in).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-limit, limit))

    def forward(self, x: Tensor) -> Tensor:
        # Unlike x @ weight.mT, this gives the weight's gradient the layout of the weight: no copy later.
        return (self.weight @ x.mT).mT + self.bias


def mlp(n: int, inputs: int, outputs: int, width: int) -> nn.Sequential:
    """n independent networks with three hidden GELU layers: (n, B, inputs) -> (n, B, outputs)."""
    layers = []
    for fan_in in (inputs, width, width):
        layers += [StackedLinear(n, fan_in, width), nn.GELU()]
    return nn.Sequential(*layers, StackedLinear(n, width, outputs))


class Policy(nn.Module):
    """Squashed Gaussian on a box: action = center + half_range * tanh(u), u ~ N(mu(obs), std(obs)^2)."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(1, obs_dim, 2 * len(low), hidden_width)
        # Not saved, because the environment gives them.
        self.register_buffer("center", torch.as_tensor((high + low) / 2).float(), persistent=False)
        self.register_buffer("half_range", torch.as_tensor((high - low) / 2).float(), persistent=False)

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, S), standard normal noise (B, A) -> action (B, A), log pi(action|obs) (B,) in nats."""
        mu, log_std = self.net(obs.unsqueeze(0)).squeeze(0).chunk(2, dim=-1)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        u = mu + log_std.exp() * noise
        log_normal = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2  # of u: noise = (u - mu) / std
        # log |d action / d u|: the entropy depends on the unit of the environment's action, H0 = -A does not.
        # The first term is log(1 - tanh(u)^2), accurate where tanh(u) rounds to +-1.
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.half_range.log()
        return self.center + self.half_range * u.tanh(), (log_normal - log_slope).sum(-1)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs (n, S) -> action (n, A): a sample, or the squashed mean if deterministic."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.center.device)
        if obs.dim() != 2:
            raise ValueError(f"act() takes observations of shape (n, S), not {tuple(obs.shape)}")
        noise = torch.zeros(len(obs), len(self.center), device=obs.device)
        if not deterministic:
            noise.normal_()
        action, _ = self(obs, noise)
        return action.cpu().numpy()


class Critics(nn.Module):
    """Gaussian value distributions N(Q, sigma^2): obs (B, S), action (B, A) -> Q (n, B), sigma (n, B)."""

    n = 2  # twins; with more, pev and pim also take the smallest Q

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(self.n, obs_dim + action_dim, 2, hidden_width)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        q, raw_sigma = self.net(torch.cat((obs, action), -1).expand(self.n, -1, -1)).unbind(-1)
        return q, F.softplus(raw_sigma)


class EntropyCritic(nn.Module):
    """Qe(s, a) = E[sum_{t>=1} gamma^t H(pi|s_t)] until termination, the discounted later entropy, in nats.

    With --center-entropy it learns only the deviation, see StepsCritic.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(1, obs_dim + action_dim, 1, hidden_width)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs (B, S), action (B, A) -> (B,)."""
        return self.net(torch.cat((obs, action), -1).unsqueeze(0)).squeeze((0, -1))


class StepsCritic(EntropyCritic):
    """[ours] steps(s, a) = E[sum_{t>=1} gamma^t] until termination, the discounted number of later steps.

    With --center-entropy, Qe = deviation + mean_entropy * steps: mean_entropy is a running mean; the entropy
    critic learns the deviation, with entropy - mean_entropy in place of the entropy. This Qe converges to the
    same values for every mean_entropy. But when the entropy changes in all states, Qe follows as fast as the
    target policy and the running mean, in about policy_delay / tau updates. Bootstrapped targets alone need
    policy_delay / (tau (1 - gamma)).
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256):
        super().__init__(obs_dim, action_dim, hidden_width)
        nn.init.zeros_(self.net[-1].weight)  # output 0: steps starts at mean_steps in every state
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, obs: Tensor, action: Tensor, mean_discount: Tensor) -> Tensor:
        """obs (B, S), action (B, A), mean_discount, the running mean of gamma (1 - d) -> (B,)."""
        mean_steps = mean_discount / (1 - mean_discount)  # the sum, if every step had this discount
        return mean_steps * (1 + super().forward(obs, action))


def running_mean(mean: Tensor, new: Tensor, tau: float) -> Tensor:
    """Exponential running mean with rate tau. A mean of 0 has no value yet and becomes the new one."""
    return torch.where(mean == 0, new, mean.lerp(new, tau))


def pev(q: Tensor, sigma: Tensor, next_q: Tensor, next_sigma: Tensor, reward: Tensor, discount: Tensor,
        noise: Tensor, mean_sigma: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """PEV, policy evaluation: loss of the twin critics (TECRL Eq. 11 with the three refinements of DSAC-T).

    q, sigma at (s, a) and next_q, next_sigma of the target critics at (s', a'), each (n, B); reward, standard
    normal noise, discount = gamma (1 - d), each (B,); mean_sigma (n,): running mean of sigma, initially 0.
    Returns three: a surrogate loss, which matters for its gradient; mean_sigma (n,); target of Q (1, B).
    """
    with torch.no_grad():
        # Twin value distributions: the target is the twin with the smaller mean.
        k = next_q.argmin(0, keepdim=True)
        next_q = next_q.gather(0, k)  # (1, B)
        next_sigma = next_sigma.gather(0, k)
        y_q = reward + discount * next_q  # expected target
        y_z = reward + discount * (next_q + next_sigma * noise.clamp(-3, 3))  # sampled target
        # The negative log-likelihood of a target y under N(q, sigma^2) has the gradients
        #   d/dq = -(y - q) / sigma^2,    d/dsigma = -((y - q)^2 - sigma^2) / sigma^3.
        # Expected value substitution: d/dq takes the expected target, which has less variance. Variance-based
        # adjustment: the sample is clipped around each q, and mean_sigma^2 + eps scales both gradients to the
        # size of y - q. Both clips at 3, and eps against a small sigma, are those of the DSAC authors' code.
        mean_sigma = running_mean(mean_sigma, sigma.mean(1), tau)
        clip_range = 3 * mean_sigma.unsqueeze(1)
        y_z_clipped = y_z.clamp(q - clip_range, q + clip_range)  # (n, B)
        eps = 0.1
        scale = mean_sigma.square().unsqueeze(1) + eps
        q_gradient = -scale * (y_q - q) / (sigma**2 + eps)
        sigma_gradient = -scale * ((y_z_clipped - q) ** 2 - sigma**2) / (sigma**3 + eps)
    # Before the mean, its gradients are q_gradient in q and sigma_gradient in sigma.
    return (q_gradient * q + sigma_gradient * sigma).mean(1).sum(), mean_sigma, y_q


def pis(qe: Tensor, next_qe: Tensor, next_entropy: Tensor, discount: Tensor) -> Tensor:
    """PIS, policy introspection: loss of Qe (TECRL Eq. 12-13); next_entropy is that of s' alone; all (B,)."""
    return F.mse_loss(qe, (discount * (next_entropy + next_qe)).detach())


def pim(q: Tensor, trajectory_entropy: Tensor, alpha: Tensor) -> Tensor:
    """PIM, policy improvement: loss of the policy (TECRL Eq. 14); q (n, B), -log pi + Qe (B,), alpha ()."""
    return -(q.amin(0) + alpha.detach() * trajectory_entropy).mean()


def tup(log_alpha: Tensor, trajectory_entropy: Tensor, budget: Tensor) -> Tensor:
    """TUP, temperature update: loss of log_alpha (TECRL Eq. 15); alpha falls while -log pi + Qe > budget."""
    return log_alpha.exp() * (trajectory_entropy.detach().mean() - budget)


class Agent(nn.Module):
    """Networks, temperature and optimizer; `update` is one update of DSAC-E.

    To modify it, copy this file under a new name, which gives it runs of its own. Then
      another critic     is an entry of `online`, with a loss in pev_pis_gradients; more twins: Critics.n
      more state         is a buffer, whose new value pev_pis_gradients returns in `means`, without gradient;
                         only buffers, parameters and `optimizer` are saved
      another policy     keeps the class's name, arguments and act(): evaluate_run makes one, too
      another layer      has parameters with a leading n, as StackedLinear; otherwise the twins share them
      a schedule         is a buffer that Trainer.train sets in place, from `step`, before agent.update
      another curve      is an entry of `log`; CUDA graphs overwrite tensors that you keep longer: clone them
    With --no-compile, print() and pdb work everywhere.
    """

    # torch.compile makes one graph of each. They take a batch only; `update` alone changes the agent.
    to_compile = ("pev_pis_gradients", "pim_tup_gradients")

    def __init__(self, args: Args, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.args = args
        action_dim = len(low)
        online = {  # self.NAME, with a target network self.target_NAME
            "policy": Policy(obs_dim, low, high, args.hidden_width),
            "critics": Critics(obs_dim, action_dim, args.hidden_width),
            "entropy_critic": EntropyCritic(obs_dim, action_dim, args.hidden_width),
        }
        if args.center_entropy:
            online["steps_critic"] = StepsCritic(obs_dim, action_dim, args.hidden_width)
            self.register_buffer("mean_entropy", torch.tensor(0.0))
            self.register_buffer("mean_discount", torch.tensor(0.0))
        self.online_weights = []
        self.target_weights = []
        self.pev_pis_weights = []
        for name, network in online.items():
            target = copy.deepcopy(network).requires_grad_(False)
            setattr(self, name, network)
            setattr(self, f"target_{name}", target)
            self.online_weights += network.parameters()
            self.target_weights += target.parameters()
            if name != "policy":
                self.pev_pis_weights += network.parameters()
        self.register_buffer("mean_sigma", torch.zeros(self.critics.n))
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.initial_alpha)))
        self.pim_tup_weights = [*self.policy.parameters(), self.log_alpha]
        groups = [
            {"params": self.pev_pis_weights, "lr": args.critic_lr},
            {"params": self.policy.parameters(), "lr": args.policy_lr},
            {"params": self.log_alpha, "lr": args.alpha_lr},
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)  # agent.to(device) keeps the parameters
        budget = args.rho * -action_dim  # rho * H0
        highest = np.log(high - low).sum()  # entropy of the uniform policy
        if budget >= highest:
            raise ValueError(f"entropy budget {budget:g} >= maximum {highest:g}: "
                             "use RescaleAction or a larger --rho")  # fmt: skip
        if args.tec:  # of an endless trajectory: 1 / (1 - gamma) is the sum of gamma^t
            budget /= 1 - args.gamma
        self.register_buffer("budget", torch.tensor(budget), persistent=False)

    def update(self, batch: Batch, update_policy: bool) -> dict[str, Tensor]:
        """PEV and PIS; if `update_policy`, also PIM, TUP and the target networks. Returns tensors to log."""
        gradients, means, log = self.pev_pis_gradients(batch)
        self.descend(self.pev_pis_weights, gradients)
        for name, mean in means.items():
            getattr(self, name).copy_(mean)
        if update_policy:
            gradients, policy_log = self.pim_tup_gradients(batch)
            self.descend(self.pim_tup_weights, gradients)
            with torch.no_grad():
                self.log_alpha.clamp_(-15, 15)  # [ours] so that alpha can return after a long drift
                torch._foreach_lerp_(self.target_weights, self.online_weights, self.args.tau)
            log.update(policy_log)
        return log

    def pev_pis_gradients(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict, dict]:
        """Returns the gradients of `pev_pis_weights`, new running means by name, tensors to log."""
        args = self.args
        discount = args.gamma * (1 - batch.terminated)
        reward = batch.reward
        with torch.no_grad():
            next_action, next_log_prob = self.target_policy(batch.next_obs, torch.randn_like(batch.action))
            next_q, next_sigma = self.target_critics(batch.next_obs, next_action)
            next_entropy = -next_log_prob  # one sample of H(pi_target|s'), as in SAC: it has no closed form
            if not args.res:  # ablation: the entropy of the next step is part of the reward
                reward = reward + discount * self.log_alpha.exp() * next_entropy

        q, sigma = self.critics(batch.obs, batch.action)
        pev_loss, mean_sigma, target = pev(
            q, sigma, next_q, next_sigma, reward, discount,
            noise=torch.randn_like(reward), mean_sigma=self.mean_sigma, tau=args.tau,
        )  # fmt: skip
        means = {"mean_sigma": mean_sigma}
        log = {"critic/q": q, "critic/sigma": sigma, "critic/target": target, "critic/td_error": target - q}

        if args.center_entropy:  # Qe = deviation + mean_entropy * steps, see StepsCritic
            mean_entropy = running_mean(self.mean_entropy, next_entropy.mean(), args.tau)
            mean_discount = running_mean(self.mean_discount, discount.mean(), args.tau)
            steps = self.steps_critic(batch.obs, batch.action, mean_discount)
            next_steps = self.target_steps_critic(batch.next_obs, next_action, mean_discount)
            deviation = self.entropy_critic(batch.obs, batch.action)
            next_deviation = self.target_entropy_critic(batch.next_obs, next_action)
            pis_loss = pis(deviation, next_deviation, next_entropy - mean_entropy, discount)
            pis_loss = pis_loss + pis(steps, next_steps, torch.ones_like(steps), discount)  # 1 per step
            qe = deviation + mean_entropy * steps  # here only for the log
            means["mean_entropy"] = mean_entropy
            means["mean_discount"] = mean_discount
            log["entropy/steps"] = steps
        else:
            qe = self.entropy_critic(batch.obs, batch.action)
            next_qe = self.target_entropy_critic(batch.next_obs, next_action)
            pis_loss = pis(qe, next_qe, next_entropy, discount)
        log["entropy/qe"] = qe
        log["losses/pis"] = pis_loss
        # No weight is in both losses, so the sum only saves a call.
        gradients = torch.autograd.grad(pev_loss + pis_loss, self.pev_pis_weights)
        return gradients, means, {tag: value.detach() for tag, value in log.items()}

    def pim_tup_gradients(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict]:
        """Returns the gradients of `pim_tup_weights` and tensors to log."""
        alpha = self.log_alpha.exp()
        action, log_prob = self.policy(batch.obs, torch.randn_like(batch.action))  # reparameterized
        q, _ = self.critics(batch.obs, action)
        qe = self.entropy_critic(batch.obs, action)
        if self.args.center_entropy:
            qe = qe + self.mean_entropy * self.steps_critic(batch.obs, action, self.mean_discount)
        entropy = -log_prob
        trajectory_entropy = entropy + qe

        # The ablations take the entropy of single steps instead.
        maximized = trajectory_entropy if self.args.res else entropy
        constrained = trajectory_entropy if self.args.tec else entropy
        pim_loss = pim(q, maximized, alpha)
        tup_loss = tup(self.log_alpha, constrained, self.budget)
        gradients = torch.autograd.grad(pim_loss + tup_loss, self.pim_tup_weights)  # none for the critics
        log = {"losses/pim": pim_loss, "losses/tup": tup_loss, "losses/alpha": alpha}
        log["entropy/policy"] = entropy
        log["entropy/trajectory"] = trajectory_entropy
        log["entropy/budget"] = self.budget
        return gradients, {tag: value.detach() for tag, value in log.items()}

    def descend(self, weights: list[Tensor], gradients: tuple[Tensor, ...]):
        """One optimizer step for these weights; Adam skips the others, which have no gradient."""
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.contiguous()  # fused Adam requires this; torch.compile may pad rows
        self.optimizer.step()
        self.optimizer.zero_grad()


# ============================================================================================================
# The harness: environments, replay, checkpoints, training. Identical in dsac_e.py, dsac_t.py, sac.py, td3.py.
# It needs from above: Args; Batch; Policy(obs_dim, low, high, hidden_width) with act(obs, deterministic);
# Agent(args, obs_dim, low, high), an nn.Module with policy, optimizer, update(batch, update_policy) and
# `to_compile`, the names of methods that take a batch. A ValueError with "entropy budget" gets no traceback.

import contextlib
import functools
import os
import random
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import gymnasium as gym
import mujoco
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = Path(__file__).stem  # a copy under another name has runs of its own
CODE = f"{ALGORITHM}.py {zlib.crc32(Path(__file__).read_bytes()):08x}, torch {torch.__version__}"
LOG_INTERVAL = 50  # one log entry per LOG_INTERVAL * policy_delay vector steps, with a policy update
EVAL_LIMIT = 10_000  # steps after which an evaluation episode is cut off
COMPILE_FROM = 10_000  # number of remaining updates above which torch.compile pays off
SEED_WEIGHTS, SEED_TRAINING, SEED_EVALUATION = 1, 2, 3  # to derive seeds from --seed
POSITIVE = {"tau", "policy_delay", "policy_lr", "critic_lr", "alpha_lr", "initial_alpha", "hidden_width",
            "batch_size", "buffer_size", "num_envs", "updates_per_step", "total_timesteps", "eval_interval",
            "eval_episodes", "checkpoint_interval"}  # fmt: skip
NOT_NEGATIVE = {"rho", "gamma", "learning_starts", "seed", "env_threads",
                "exploration_noise", "target_noise", "noise_clip"}  # these three: td3.py  # fmt: skip
MAY_CHANGE = {"total_timesteps", "eval_interval", "eval_episodes", "checkpoint_interval", "env_threads",
              "device", "compile", "run_dir", "evaluate", "capture_video"}  # fmt: skip


class CheckedEnv(gym.Wrapper):
    """Copies arrays, which an environment may reuse, drops infos, and exits on invalid values."""

    pool: ThreadPoolExecutor | None = None
    result: Callable | None = None  # returns what a begun step returns

    def reset(self, **kwargs):
        obs, _ = self.env.reset(**kwargs)
        return self.checked(obs, 0.0)[0], {}

    def begin(self, action: np.ndarray):
        """Starts a step in a thread, or without a pool leaves it to step(), which completes it."""
        if not np.isfinite(action).all():
            sys.exit("training has diverged: the policy returned a non-finite action")
        action = action.clip(self.action_space.low, self.action_space.high)  # rounding may exceed the bounds
        if self.pool is None:
            self.result = functools.partial(self.env.step, action)
        else:
            self.result = self.pool.submit(self.env.step, action).result

    def step(self, action: np.ndarray):
        """Completes the step that begin() has started with this action; otherwise makes a whole step."""
        if self.result is None:
            self.begin(action)
        result = self.result
        self.result = None
        obs, reward, terminated, truncated, _ = result()
        return *self.checked(obs, reward), terminated, truncated, {}

    def checked(self, obs, reward) -> tuple[np.ndarray, float]:
        """A copy of the observation in the dtype of its space, and the reward as a float."""
        shape, dtype = self.observation_space.shape, self.observation_space.dtype
        try:
            array, number = np.array(obs, np.float64), np.array(reward, np.float64)
        except (TypeError, ValueError):  # e.g. a dictionary, rows of different lengths
            self.refuse(obs, reward, "not numbers")
        if array.shape != shape or number.shape != ():
            self.refuse(obs, reward, f"shapes {array.shape} and {number.shape}, expected {shape} and ()")
        if not (abs(array) < 3e38).all() or not abs(number) < 3e38:  # also NaN
            self.refuse(obs, reward, "not finite in float32")
        if dtype.kind != "f" and (array != array.astype(dtype)).any():
            self.refuse(obs, reward, f"not representable as {dtype}")
        return array.astype(dtype), float(number)

    def refuse(self, obs, reward, reason: str):
        sys.exit(f"{self.spec.id} returned an invalid observation or reward ({reason}): {obs}, {reward}")

    def close(self):
        try:
            self.env.close()
        except Exception as error:  # the run is already saved
            print(f"note: {self.spec.id} could not be closed: {error!r}", file=sys.stderr)


def print_mujoco_warning(text: str):
    """Prints MuJoCo's warnings except the one about settotalmass, which every HalfCheetah repeats."""
    if "settotalmass" not in text:
        print(text, file=sys.stderr)


def make_envs(env_id: str, num_envs: int, cleanup: contextlib.ExitStack, saved: dict | None = None,
              video_dir: Path | None = None) -> tuple[gym.vector.VectorEnv, dict]:  # fmt: skip
    """num_envs copies, which `cleanup` closes, and their spaces; exits if a saved run had others."""
    gym.logger.min_level = gym.logger.ERROR  # no deprecation warning for each v4 environment
    mujoco.set_mju_user_warning(print_mujoco_warning)
    wrappers, options = [CheckedEnv], {}
    if video_dir is not None:
        wrappers.insert(0, lambda env: gym.wrappers.RecordVideo(env, video_dir, lambda episode: episode == 0))
        options["render_mode"] = "rgb_array"
    autoreset = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    try:
        envs = gym.make_vec(env_id, num_envs, "sync", vector_kwargs=autoreset, wrappers=wrappers,
                            disable_env_checker=True, **options)  # fmt: skip
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError, gym.error.Error) as error:
        sys.exit(f"cannot make {env_id}: {error}")
    cleanup.callback(envs.close)
    obs, action = envs.single_observation_space, envs.single_action_space
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs, action))
    if not flat or action.dtype.kind != "f" or not action.is_bounded() or (action.low >= action.high).any():
        shown = " ".join(f"{obs} observations and {action} actions".split())  # in one line
        sys.exit(f"{env_id} has {shown}; both must be flat boxes, actions real and bounded "
                 "(see gymnasium.wrappers.FlattenObservation, RescaleAction)")  # fmt: skip
    spaces = {"obs_dim": obs.shape[0], "low": action.low.tolist(), "high": action.high.tolist()}
    if saved and saved["spaces"] != spaces:
        sys.exit(f"{env_id} has other spaces than the run: {spaces}, the run {saved['spaces']}")
    return gym.wrappers.vector.RecordEpisodeStatistics(envs), spaces


def begin_step(envs: gym.vector.VectorEnv, actions: np.ndarray):
    """Starts a step of each environment in the threads, if there are any; envs.step(actions) completes it."""
    for env, action in zip(envs.unwrapped.envs, actions, strict=True):
        env.begin(action)


def seed_all(*key: int) -> int:
    """Derives a seed from integers and seeds the global generators, also those that environments may use."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return seed


def handle_signals(cleanup: contextlib.ExitStack) -> list[int]:
    """The list to which SIGINT, SIGTERM and SIGHUP are added; a run then saves and stops after the step.

    A second signal interrupts an environment that hangs, but never an update or a save.
    """
    stop = []
    pid = os.getpid()
    interruptible = {CheckedEnv.reset.__code__, CheckedEnv.step.__code__}

    def handle(number, frame):
        if os.getpid() != pid:  # a process that an environment has forked
            os._exit(128 + number)
        stop.append(number)
        executing = {caller.f_code for caller, _ in traceback.walk_stack(frame)}
        if len(stop) > 1 and executing & interruptible:
            raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
            cleanup.callback(signal.signal, number, signal.signal(number, handle))
    return stop


def evaluate(policy: Policy, envs: gym.vector.VectorEnv, seed: int, stop: list[int]):
    """Returns and lengths (n,) of one deterministic episode per environment; incomplete if interrupted."""
    obs, _ = envs.reset(seed=seed)
    returns, lengths = np.zeros((2, envs.num_envs))
    running = np.ones(envs.num_envs, bool)
    while running.any() and lengths.max() < EVAL_LIMIT and not stop:
        action = policy.act(obs, deterministic=True)
        begin_step(envs, action)
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += np.where(running, reward, 0)
        lengths += running
        running &= ~(terminated | truncated)
    if running.any() and not stop:
        print(f"note: this evaluation was cut off after {EVAL_LIMIT} steps")
    return returns, lengths


class ReplayBuffer:
    """Ring buffer of transitions, one row each, so that a batch is a single gather.

    Transition i of the run, of environment i % num_envs, is in row i % capacity. For n-step returns: its
    successor is i + num_envs if obs there is next_obs here; otherwise the episode ended or the run stopped.
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: str | torch.device):
        self.widths = (obs_dim, action_dim, obs_dim, 1, 1)
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.added = 0

    def add(self, obs, action, next_obs, reward, terminated):
        """Arrays of n transitions; a full buffer overwrites its n oldest."""
        rows = np.column_stack((obs, action, next_obs, reward, terminated)).astype(np.float32)
        slots = torch.arange(self.added, self.added + len(rows)) % len(self.rows)
        self.rows[slots] = torch.from_numpy(rows).to(self.rows.device)
        self.added += len(rows)

    def sample(self, batch_size: int) -> Batch:
        """batch_size transitions, uniformly and with replacement."""
        slots = torch.randint(min(self.added, len(self.rows)), (batch_size,), device=self.rows.device)
        obs, action, next_obs, reward, terminated = self.rows.index_select(0, slots).split(self.widths, dim=1)
        return Batch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))


def compile_update(agent: Agent, batch: Batch):
    """Compiles the gradient methods, which dominate the cost of an update. Falls back to eager mode."""
    options = {"compile_threads": 1}
    if batch.obs.is_cuda:
        torch.cuda.set_device(batch.obs.device)  # a CUDA graph is captured on the current device
        options["triton.cudagraphs"] = True
        options["triton.cudagraph_trees"] = False  # outputs stay valid until the same graph runs again
    print("compiling the update, up to a minute; Ctrl-C waits for it (--no-compile skips this)")
    try:
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad becomes part of the graph
        for name in agent.to_compile:
            compiled = torch.compile(getattr(agent, name), fullgraph=True, options=options)
            compiled(batch)
            setattr(agent, name, compiled)
    except Exception as error:  # many types, e.g. without a C++ compiler
        print(f"torch.compile failed, continuing in eager mode: {error}")


def read(path: Path) -> dict:
    """What write() saved. Loading cannot execute code."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["algorithm"] != ALGORITHM:
            raise ValueError(f"it was saved by {saved['algorithm']}.py, not {ALGORITHM}.py")
    except Exception as error:  # torch.load raises many types for missing, truncated and foreign files
        sys.exit(f"cannot read {path}: {error}".partition("\n")[0])
    return saved


def write(path: Path, content: dict):
    """Saves a file with torch.save. If this fails or is interrupted, the previous file remains."""
    temporary = path.with_name("save.tmp")
    try:
        with open(temporary, "wb") as file:  # buffered: a raw file writes at most 2 GiB at once
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch's own, raised while it handles that of the disk
            error = error.__context__ or error
        sys.exit(f"cannot write {path}: {error}")


class Trainer:
    """A run in its directory: environments, agent, replay buffer, log. All schedules follow from `step`."""

    def __init__(self, args: Args, run_dir: Path, saved_run: dict | None, cleanup: contextlib.ExitStack):
        self.args, self.run_dir = args, run_dir
        self.step = 0  # environment steps
        self.finished = False
        self.interrupted = False  # by a second signal
        seed_all(args.seed, SEED_WEIGHTS)
        cores = torch.get_num_threads()  # or OMP_NUM_THREADS, which limits env_threads, too
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(4, cores))  # more would be slower for products of this size
        self.envs, self.spaces = make_envs(args.env_id, args.num_envs, cleanup, saved_run)
        self.eval_envs, _ = make_envs(args.env_id, args.eval_episodes, cleanup)
        self.stop = handle_signals(cleanup)
        device = args.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        (obs_dim,), box = self.envs.single_observation_space.shape, self.envs.single_action_space
        self.code = CODE  # the scripts that have trained the run
        self.seconds = []  # durations of the iterations with an update since the last log entry
        try:
            agent = Agent(args, obs_dim, box.low, box.high)
        except ValueError as error:
            if "entropy budget" not in str(error):  # a mistake in a changed script
                raise
            sys.exit(f"cannot train on {args.env_id}: {error}")
        try:
            self.buffer = ReplayBuffer(args.buffer_size, obs_dim, len(box.low), device)
            cleanup.enter_context(filelock.FileLock(run_dir / "run.lock", blocking=False))  # makes run_dir
        except filelock.Timeout:
            sys.exit(f"another process is training in {run_dir}; if none is, delete run.lock")
        except (AssertionError, OSError, RuntimeError) as error:  # device, memory, directory
            sys.exit(f"cannot train in {run_dir} on {device}: {error}")
        if saved_run is None and (run_dir / "policy.pt").exists():
            sys.exit(f"another process has trained in {run_dir} at the same time: repeat the command")
        self.agent = agent.to(device)  # in place: its lists of parameters and the optimizer remain valid
        self.use_threads(cleanup, cores)
        if saved_run:
            self.resume()
        else:
            self.save(checkpoint=True)  # from here on, a run always has both files
            read(run_dir / "policy.pt")  # exits now, not after days, if an argument's type cannot be loaded
        print(f'{self.envs.spec.id} on {device}, step {self.step}; tensorboard --logdir "{run_dir}"')
        first = self.envs.unwrapped.envs[0]
        if first.has_wrapper_attr("obs_rms") or first.has_wrapper_attr("return_rms"):
            print("note: a wrapper normalizes with statistics of each copy, which are not saved")
        # With purge_step, TensorBoard hides what an interrupted run had logged after its last checkpoint.
        self.writer = cleanup.enter_context(SummaryWriter(str(run_dir), purge_step=self.step, flush_secs=10))
        self.bar = cleanup.enter_context(tqdm(initial=self.step, total=args.total_timesteps, unit="step",
                                              unit_scale=True, disable=None))  # fmt: skip

    def resume(self):
        checkpoint = read(self.run_dir / "checkpoint.pt")
        self.step, self.code = checkpoint["step"], checkpoint["code"]
        try:
            self.agent.load_state_dict(checkpoint["agent"])
            groups = self.agent.optimizer.param_groups
            self.agent.optimizer.load_state_dict(checkpoint["optimizer"])
            self.agent.optimizer.param_groups = groups  # with the settings of this script
            self.buffer.rows[: self.step] = checkpoint["replay"]
        except (RuntimeError, ValueError) as error:  # the script has been changed
            sys.exit(f"cannot resume {self.run_dir} with other networks or transitions: {error}")
        self.buffer.added = self.step
        if not self.code.endswith(CODE):
            self.code += f"; from step {self.step} {CODE}"

    def use_threads(self, cleanup: contextlib.ExitStack, cores: int):
        """Lets threads step the environments; MuJoCo releases Python's lock while it simulates.

        By default only Gymnasium's MuJoCo tasks use threads: the copies of others may share state.
        """
        threads = self.args.env_threads
        if threads is None:
            busy = 1 if self.buffer.rows.is_cuda else torch.get_num_threads()
            mujoco_task = str(self.envs.spec.entry_point).startswith("gymnasium.envs.mujoco.")
            threads = cores - busy if mujoco_task else 0
        if threads > 0:
            pool = ThreadPoolExecutor(threads)
            cleanup.callback(lambda: pool.shutdown(wait=not self.interrupted))
            for env in (*self.envs.unwrapped.envs, *self.eval_envs.unwrapped.envs):
                env.pool = pool

    def due(self, interval: int) -> bool:
        """Whether the last vector step has reached a multiple of the interval."""
        return self.step % interval < self.args.num_envs

    def save(self, checkpoint: bool = False):
        """Saves policy.pt, before that checkpoint.pt if asked to. If the run has diverged, exits instead."""
        agent, optimizer = self.agent.state_dict(), self.agent.optimizer.state_dict()
        moments = [moment for state in optimizer["state"].values() for moment in state.values()]
        if not all(torch.as_tensor(value).isfinite().all() for value in [*agent.values(), *moments]):
            sys.exit(f"training diverged at step {self.step}: a weight is not finite; the last save is kept")
        run = {"algorithm": ALGORITHM, "code": self.code, "args": vars(self.args), "spaces": self.spaces,
               "step": self.step, "finished": self.finished}  # fmt: skip
        if checkpoint:
            # By way of NumPy, because torch.save would save the whole buffer of a slice.
            rows = torch.from_numpy(self.buffer.rows[: self.step].cpu().numpy())
            write(self.run_dir / "checkpoint.pt", dict(run, agent=agent, optimizer=optimizer, replay=rows))
        # Last, because policy.pt says whether the run is finished.
        write(self.run_dir / "policy.pt", dict(run, policy=self.agent.policy.state_dict()))

    def evaluate_policy(self):
        self.save()  # for --evaluate and --capture-video of a run that is training
        # Training continues with these generators, so a different eval_interval changes what follows.
        seed = seed_all(self.args.seed, SEED_EVALUATION, self.step)
        returns, lengths = evaluate(self.agent.policy, self.eval_envs, seed, self.stop)
        if not self.stop:
            self.writer.add_scalar("eval/episodic_return", returns.mean(), self.step)
            self.writer.add_scalar("eval/episodic_return_std", returns.std(), self.step)
            self.writer.add_scalar("eval/episodic_length", lengths.mean(), self.step)
            tqdm.write(f"step {self.step}: return {returns.mean():.1f} +- {returns.std():.1f}")

    def log(self, tensors: dict[str, Tensor]):
        """Logs means and standard deviations of an update, and the episodes of training."""
        numbers = {"charts/SPS": self.args.num_envs * len(self.seconds) / sum(self.seconds)}
        self.seconds.clear()
        for tag, value in tensors.items():
            if value.dim() == 0:
                numbers[tag] = float(value)
            else:
                numbers[f"{tag}_mean"] = float(value.mean())
                numbers[f"{tag}_std"] = float(value.std(correction=0))
        if self.envs.return_queue:  # of the last 100 episodes
            numbers["charts/episodic_return"] = np.mean(self.envs.return_queue)
            numbers["charts/episodic_length"] = np.mean(self.envs.length_queue)
        # self.step is the one at which this iteration began.
        for tag, number in numbers.items():
            self.writer.add_scalar(tag, number, self.step)

    def train(self):
        """The training loop: act, update, step, store, log, evaluate, save."""
        args, agent, buffer, envs = self.args, self.agent, self.buffer, self.envs
        remaining_updates = (args.total_timesteps - self.step) // args.num_envs * args.updates_per_step
        compiling = args.compile and remaining_updates > COMPILE_FROM
        obs, _ = envs.reset(seed=seed_all(args.seed, SEED_TRAINING, self.step))
        self.evaluate_policy()  # seeds what follows, except the environments
        while self.step < args.total_timesteps and not self.stop:
            learning = self.step >= max(args.learning_starts, args.num_envs)  # not with an empty buffer
            if learning and compiling:
                compile_update(agent, buffer.sample(args.batch_size))
                compiling = False
            start = time.perf_counter()
            action = agent.policy.act(obs)
            begin_step(envs, action)
            iteration = self.step // args.num_envs
            log = {}
            if learning:  # before envs.step: a GPU, or threads with environments, work at the same time
                for i in range(args.updates_per_step):
                    update = iteration * args.updates_per_step + i
                    log.update(agent.update(buffer.sample(args.batch_size), update % args.policy_delay == 0))
            next_obs, reward, terminated, truncated, infos = envs.step(action)  # completes the step
            final_obs = next_obs.copy()
            for i in np.flatnonzero(terminated | truncated):  # next_obs is the first of the next episode
                final_obs[i] = infos["final_obs"][i]
            buffer.add(obs, action, final_obs, reward, terminated)
            obs = next_obs
            if learning:
                self.seconds.append(time.perf_counter() - start)
            if learning and iteration % (args.policy_delay * LOG_INTERVAL) == 0:
                self.log(log)
            self.step += args.num_envs
            self.bar.update(args.num_envs)
            ends = self.step >= args.total_timesteps
            if not self.stop and (ends or self.due(args.eval_interval)):
                self.evaluate_policy()
            if not self.stop and not ends and self.due(args.checkpoint_interval):
                self.save(checkpoint=True)
        self.finished = not self.stop


def train(args: Args, run_dir: Path, saved_run: dict | None):
    """Trains from the start or, with new episodes, from checkpoint.pt."""
    if saved_run and saved_run["finished"] and saved_run["step"] >= args.total_timesteps:
        print(f"{run_dir} is already finished at step {saved_run['step']}")
        return
    with contextlib.ExitStack() as cleanup:
        trainer = Trainer(args, run_dir, saved_run, cleanup)
        try:
            trainer.train()
        except KeyboardInterrupt:  # a second signal
            trainer.interrupted = True
        finally:  # also after an exception
            trainer.save(checkpoint=True)
    again = f'python "{sys.argv[0]}" --run-dir "{run_dir}"'
    if trainer.stop:  # on stderr, because Ctrl-C also ends tee in "... | tee log"
        print(f"stopped at step {trainer.step}; to resume, extend or --evaluate: {again}", file=sys.stderr)
        if trainer.interrupted:
            os._exit(128 + trainer.stop[0])  # sys.exit would wait for a thread that hangs
        sys.exit(128 + trainer.stop[0])
    print(f"finished at step {trainer.step}; to resume, extend or --evaluate: {again}")


def evaluate_run(args: Args, run_dir: Path, saved_run: dict):
    """Evaluates the policy of a run, or records one episode of it, and prints the return."""
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")  # egl needs no display
    num_envs = 1 if args.capture_video else args.eval_episodes
    video_dir = run_dir if args.capture_video else None
    if video_dir and not os.access(video_dir, os.W_OK):
        sys.exit(f"cannot write to {video_dir}")
    with contextlib.ExitStack() as cleanup:
        envs, _ = make_envs(args.env_id, num_envs, cleanup, saved_run, video_dir)
        stop = handle_signals(cleanup)
        (obs_dim,), box = envs.single_observation_space.shape, envs.single_action_space
        policy = Policy(obs_dim, box.low, box.high, saved_run["args"]["hidden_width"])
        try:
            policy.load_state_dict(saved_run["policy"])
        except RuntimeError as error:  # the script has been changed
            sys.exit(f"cannot evaluate {run_dir} with another policy: {error}")
        seed = seed_all(args.seed, SEED_EVALUATION, saved_run["step"])  # as in training
        try:
            with contextlib.suppress(KeyboardInterrupt):  # a second signal
                returns, _ = evaluate(policy, envs, seed, stop)
        except Exception as error:
            if not args.capture_video:
                raise
            sys.exit(f"cannot record {args.env_id}: {error}")  # many types, e.g. without OpenGL
    if stop:
        sys.exit(128 + stop[0])
    print(f"step {saved_run['step']}: return {returns.mean():.1f} +- {returns.std():.1f}")
    if args.capture_video:
        print(f"video: {run_dir / 'rl-video-episode-0.mp4'}")


def check_arguments(args: Args):
    """Exits with one line if a value is impossible."""

    def require(valid: bool, rule: str):
        if not valid:
            sys.exit(rule)

    for name, value in vars(args).items():
        if type(value) in (int, float):
            option = f"--{name.replace('_', '-')} {value}"
            require(abs(value) < 2**62, f"{option} is not a number or too large")  # NaN fails, too
            require(value > 0 or name not in POSITIVE, f"{option} must be positive")
            require(value >= 0 or name not in NOT_NEGATIVE, f"{option} must not be negative")
    require(args.gamma < 1, f"--gamma {args.gamma} must be less than 1")
    require(args.tau <= 1, f"--tau {args.tau} must not exceed 1")
    require(args.num_envs <= args.buffer_size, f"--num-envs {args.num_envs} exceeds --buffer-size")
    require(args.batch_size <= args.buffer_size, f"--batch-size {args.batch_size} exceeds --buffer-size")
    starts, total = args.learning_starts, args.total_timesteps
    require(starts < total, f"--learning-starts {starts} must be less than --total-timesteps {total}")


def with_saved_arguments(args: Args, run_dir: Path, saved_run: dict) -> Args:
    """With --run-dir or to evaluate, arguments that are not given are those of the run, not the defaults.

    Exits if training would resume with other arguments, except those of MAY_CHANGE.
    """
    saved = {name: value for name, value in saved_run["args"].items() if name in vars(args)}
    evaluating = args.evaluate or args.capture_video
    code = saved_run["code"]
    if not code.endswith(CODE):
        # A changed script is another experiment. With --run-dir, a run of days survives a correction of it.
        if not args.run_dir and not evaluating:
            sys.exit(f'{run_dir} was trained by {code}, this is {CODE}: rename the script, choose another '
                     f'--run-dir, or resume with --run-dir "{run_dir}"')  # fmt: skip
        print(f"note: the run was trained by {code}, this is {CODE}", file=sys.stderr)
    if args.run_dir or evaluating:
        args = tyro.cli(Args, default=Args(**saved))
    for name in saved.keys() - MAY_CHANGE:
        value = getattr(args, name)
        if value != saved[name] and not evaluating:
            sys.exit(f"{run_dir} has {name} {saved[name]}, not {value}: choose another --run-dir")
    return args


def main():
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter
        sys.stdout.reconfigure(line_buffering=True)
    sys.path.append(os.getcwd())  # so that --env-id your_module:YourEnv-v0 can import your_module
    args = tyro.cli(Args)
    name = args.env_id.replace("/", "-").replace(":", "-")
    run_dir = Path(args.run_dir or f"runs/{name}__{ALGORITHM}__{args.seed}").absolute()  # a task may chdir
    saved_run = None
    if (run_dir / "policy.pt").exists():
        saved_run = read(run_dir / "policy.pt")
        args = with_saved_arguments(args, run_dir, saved_run)
    elif args.evaluate or args.capture_video:
        sys.exit(f"there is no policy.pt in {run_dir}")
    elif any(path.suffix not in (".lock", ".log", ".tmp", ".txt") for path in run_dir.glob("*")):
        sys.exit(f"{run_dir} contains other files: choose another --run-dir")
    check_arguments(args)
    if args.evaluate or args.capture_video:
        evaluate_run(args, run_dir, saved_run)
    else:
        train(args, run_dir, saved_run)


if __name__ == "__main__":
    main()
