# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#     "filelock==4.3.1", "tensorboard==2.21.0", "tqdm==4.70.1", "imageio==2.38.1", "moviepy==2.2.1"]
# ///
"""DSAC-E: distributional soft actor-critic with a trajectory entropy constraint, in one file.

Paper: "Mind Your Entropy" (TECRL, arXiv 2511.11592). It extends DSAC-T (arXiv 2310.05858), which is SAC
(arXiv 1812.05905) with value distributions. SAC adds alpha * entropy to the reward, so every change of alpha
moves the critics' target. DSAC-E separates them: twin critics Z_i = N(Q_i, sigma_i^2) learn the return of the
reward, Qe that of the entropy. With target networks at s', a' ~ pi_target(.|s'), d = 1 if terminal, else 0:

  PEV  policy evaluation     Eq. 11     Z_i(s, a) <- r + gamma (1 - d) Z_k(s', a'),  k = argmin Q_i(s', a')
  PIS  policy introspection  Eq. 12-13  Qe(s, a)  <- gamma (1 - d) (-log pi_target(a'|s') + Qe(s', a'))
  PIM  policy improvement    Eq. 14     max over pi:    E[min Q_i(s, a) + alpha (-log pi(a|s) + Qe(s, a))]
  TUP  temperature update    Eq. 15     min over alpha: alpha (E[-log pi(a|s) + Qe(s, a)] - budget)

alpha is the Lagrange multiplier of E[-log pi + Qe] >= budget = rho * H0 / (1 - gamma), where H0 = -A nats is
SAC's target entropy. Shapes: B batch, S observation, A action dimensions. [ours]: not in the papers.
The algorithm ends at the line of = signs. Below it is the harness, identical in all four scripts.
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

ALGORITHM = "dsac_e"


@dataclass
class Args:
    """Train on a Gymnasium environment. Running the same command again resumes the run."""

    env_id: str = "Humanoid-v4"  # Gymnasium id; flat Box observations, bounded Box actions
    rho: float | None = None  # scale of the entropy budget; default: 1, or 20 for Humanoid and Walker2d
    tec: bool = True  # trajectory entropy constraint; --no-tec constrains single steps to rho * H0 (ablation)
    res: bool = True  # reward/entropy separation; --no-res adds the entropy to the reward (ablation)
    center_entropy: bool = False  # [ours] Qe follows changes of the mean entropy without delay: EntropyCritic
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak rate of the target networks and of the running means
    policy_delay: int = 2  # critic updates per update of policy, alpha and target networks
    policy_lr: float = 1e-4  # learning rate of the policy
    critic_lr: float = 1e-4  # learning rate of the critics
    alpha_lr: float = 3e-4  # learning rate of log(alpha)
    initial_alpha: float = math.e  # alpha at the start of training
    hidden_width: int = 256  # units in each of the three hidden layers
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    learning_starts: int = 10_000  # environment steps with the initial policy before the first update
    num_envs: int = 20  # number of environments; one update per vector step
    total_timesteps: int = 30_000_000  # environment steps of the run
    seed: int = 0  # seed of weights, noise, replay and environments
    device: str = "auto"  # torch device of networks and replay buffer; auto: CUDA if available
    compile: bool = True  # compile the update with torch.compile (skipped in short runs)
    eval_interval: int = 50_000  # environment steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation, with the deterministic policy
    checkpoint_interval: int = 500_000  # environment steps between checkpoints; one more at the end of a run
    run_dir: str = ""  # directory of the run; default: runs/<env_id>__<algorithm>__<seed>
    evaluate: bool = False  # instead of training, evaluate the policy in the run directory
    capture_video: bool = False  # instead of training, record an episode of the policy in the run directory

    def __post_init__(self):
        if self.rho is None:
            self.rho = 20.0 if re.search(r"\b(Humanoid|Walker2d)(-v\d+)?$", self.env_id) else 1.0
        if self.tec and not self.res:
            raise ValueError("--no-res requires --no-tec: the trajectory constraint needs Qe")


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
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(n, fan_out, fan_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        # Both transposes give the weight's gradient the memory layout of the weight, which avoids a copy.
        return (self.weight @ x.mT).mT + self.bias


def mlp(n: int, inputs: int, outputs: int, width: int) -> nn.Sequential:
    """n independent networks with three hidden GELU layers: (n, B, inputs) -> (n, B, outputs)."""
    hidden = [layer for dim in (inputs, width, width) for layer in (StackedLinear(n, dim, width), nn.GELU())]
    return nn.Sequential(*hidden, StackedLinear(n, width, outputs))


class Policy(nn.Module):
    """Squashed Gaussian on a box: action = center + half_range * tanh(u), u ~ N(mu(obs), std(obs)^2)."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(1, obs_dim, 2 * len(low), hidden_width)
        # Not saved: a loaded policy acts within the bounds of the environment that it is made for.
        self.register_buffer("center", torch.as_tensor((high + low) / 2).float(), persistent=False)
        self.register_buffer("half_range", torch.as_tensor((high - low) / 2).float(), persistent=False)

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, S), standard normal noise (B, A) -> action (B, A), log pi(action|obs) (B,) in nats."""
        mu, log_std = self.net(obs.unsqueeze(0)).squeeze(0).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 0.5)
        u = mu + log_std.exp() * noise
        log_normal = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
        # log |d action / d u|: the density is per unit of the environment's own action, and so is H0.
        # The first term is log(1 - tanh(u)^2), accurate where tanh(u) rounds to +-1.
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.half_range.log()
        return self.center + self.half_range * u.tanh(), (log_normal - log_slope).sum(-1)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs (n, S) -> action (n, A): a sample, or the squashed mean if deterministic."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.center.device)
        draw = torch.zeros if deterministic else torch.randn
        return self(obs, draw(len(obs), len(self.center), device=obs.device))[0].cpu().numpy()


class TwinCritics(nn.Module):
    """Gaussian value distributions N(Q, sigma^2): obs (B, S), action (B, A) -> Q (n, B), sigma (n, B)."""

    n = 2  # number of critics

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(self.n, obs_dim + action_dim, 2, hidden_width)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        q, raw_sigma = self.net(torch.cat((obs, action), -1).expand(self.n, -1, -1)).unbind(-1)
        return q, F.softplus(raw_sigma)


class EntropyCritic(nn.Module):
    """Qe(s, a) = E[sum_{t>=1} gamma^t H(pi|s_t)] in nats: obs (B, S), action (B, A) -> (B,).

    [ours] With `center`, Qe = deviation + mean_entropy * steps, where steps(s, a) = E[sum_{t>=1} gamma^t] is
    the discounted number of steps that follow, and deviation is the Qe of -log pi - mean_entropy. The sum is
    the same for every mean_entropy. So a change of the entropy in all states reaches Qe through mean_entropy,
    a running mean, and need not travel along the trajectories by 1 / (1 - gamma) updates of slow targets.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256, center: bool = False):
        super().__init__()
        self.n = 1 + center  # number of networks
        self.net = mlp(self.n, obs_dim + action_dim, 1, hidden_width)
        nn.init.zeros_(self.net[-1].weight[1:])  # steps starts as the number of steps at the mean discount
        nn.init.zeros_(self.net[-1].bias[1:])

    def forward(self, obs: Tensor, action: Tensor, mean_discount: Tensor) -> tuple[Tensor, Tensor]:
        """Returns deviation and steps, each (B,); without `center` Qe and 0."""
        output = self.net(torch.cat((obs, action), -1).expand(self.n, -1, -1)).squeeze(-1)
        if self.n == 1:
            return output[0], torch.zeros_like(output[0])
        deviation, relative_steps = output
        return deviation, mean_discount / (1 - mean_discount) * (1 + relative_steps)


def running_mean(mean: Tensor, new: Tensor, tau: float) -> Tensor:
    """Exponential running mean with rate tau. It starts at 0 and takes over the first value."""
    return torch.where(mean == 0, new, mean.lerp(new, tau))


def pev(q: Tensor, sigma: Tensor, next_q: Tensor, next_sigma: Tensor, reward: Tensor, discount: Tensor,
        noise: Tensor, mean_sigma: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """PEV, policy evaluation: loss of the twin critics (TECRL Eq. 11 with the three refinements of DSAC-T).

    q, sigma at (s, a) and next_q, next_sigma of the target critics at (s', a'), each (n, B); reward, standard
    normal noise, discount = gamma (1 - d), each (B,); mean_sigma (n,): running mean of sigma, initially 0.
    Returns a surrogate loss (only its gradient is meaningful), the new mean_sigma, the target of Q (1, B).
    """
    with torch.no_grad():
        # Twin value distributions: the target is the twin with the smaller mean.
        k = next_q.argmin(0, keepdim=True)
        next_q = next_q.gather(0, k)  # (1, B)
        next_sigma = next_sigma.gather(0, k)
        # Expected value substitution: Q follows the expected target, only sigma follows a sampled one.
        y_q = reward + discount * next_q
        y_z = reward + discount * (next_q + next_sigma * noise.clamp(-3, 3))
        # Variance-based adjustment: clipping and gradient scale follow each twin's mean sigma.
        mean_sigma = running_mean(mean_sigma, sigma.mean(1), tau)
        bound = 3 * mean_sigma.unsqueeze(1)
        y_z = y_z.clamp(q - bound, q + bound)  # (n, B)
        eps = 0.1
        scale = mean_sigma.square().unsqueeze(1) + eps
        q_gradient = -scale * (y_q - q) / (sigma**2 + eps)
        sigma_gradient = -scale * ((y_z - q) ** 2 - sigma**2) / (sigma**3 + eps)
    return (q_gradient * q + sigma_gradient * sigma).mean(1).sum(), mean_sigma, y_q


def pis(qe: Tensor, next_qe: Tensor, next_log_prob: Tensor, discount: Tensor) -> Tensor:
    """PIS, policy introspection: loss of the entropy critic (TECRL Eq. 12-13); all arguments (B,)."""
    y_e = discount * (-next_log_prob + next_qe)  # [ours] one sample of the entropy, as in PIM and TUP
    return F.mse_loss(qe, y_e.detach())


def pis_centered(deviation: Tensor, steps: Tensor, next_deviation: Tensor, next_steps: Tensor,
                 next_log_prob: Tensor, discount: Tensor, mean_entropy: Tensor) -> Tensor:  # fmt: skip
    """[ours] PIS of both parts of Qe = deviation + mean_entropy * steps; mean_entropy (), all others (B,)."""
    deviation_loss = pis(deviation, next_deviation, next_log_prob + mean_entropy, discount)
    steps_loss = pis(steps, next_steps, -torch.ones_like(discount), discount)  # an entropy of 1 per step
    return deviation_loss + steps_loss


def pim(q: Tensor, entropy: Tensor, alpha: Tensor) -> Tensor:
    """PIM, policy improvement: loss of the policy (TECRL Eq. 14); q (n, B), entropy (B,), alpha ()."""
    return -(q.amin(0) + alpha.detach() * entropy).mean()


def tup(log_alpha: Tensor, entropy: Tensor, budget: Tensor) -> Tensor:
    """TUP, temperature update: loss of log_alpha (TECRL Eq. 15); alpha falls while entropy (B,) > budget."""
    return log_alpha.exp() * (entropy.detach().mean() - budget)


class Agent(nn.Module):
    """Networks, temperature and optimizer, and the order in which they are updated."""

    def __init__(self, args: Args, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.args = args
        action_dim = len(low)
        self.policy = Policy(obs_dim, low, high, args.hidden_width)
        self.critics = TwinCritics(obs_dim, action_dim, args.hidden_width)
        self.entropy_critic = EntropyCritic(obs_dim, action_dim, args.hidden_width, args.center_entropy)
        online = nn.ModuleList((self.policy, self.critics, self.entropy_critic))
        targets = copy.deepcopy(online).requires_grad_(False)
        self.target_policy, self.target_critics, self.target_entropy_critic = targets
        self.online_weights = [*online.parameters()]
        self.target_weights = [*targets.parameters()]
        self.critic_weights = [*self.critics.parameters(), *self.entropy_critic.parameters()]
        self.register_buffer("mean_sigma", torch.zeros(self.critics.n))
        self.register_buffer("mean_entropy", torch.tensor(0.0))  # both stay 0 without --center-entropy
        self.register_buffer("mean_discount", torch.tensor(0.0))  # gamma (1 - d)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.initial_alpha)))
        self.policy_weights = [*self.policy.parameters(), self.log_alpha]
        critics = {"params": self.critic_weights, "lr": args.critic_lr}
        policy = {"params": self.policy.parameters(), "lr": args.policy_lr}
        alpha = {"params": self.log_alpha, "lr": args.alpha_lr}
        self.optimizer = torch.optim.Adam([critics, policy, alpha], fused=True)
        bound = args.rho * -action_dim  # per step
        highest = np.log(high - low).sum()  # entropy of the uniform policy
        if bound >= highest:
            raise ValueError(f"entropy budget {bound:g} > maximum {highest:g}: raise --rho or RescaleAction")
        if bound < highest - 19.3 * action_dim:  # per dimension, log_std = -20 is 19.3 nats below uniform
            print(f"note: rho {args.rho:g} is out of reach unless actions saturate: alpha only falls")
        budget = bound / (1 - args.gamma) if args.tec else bound
        self.register_buffer("budget", torch.tensor(budget), persistent=False)

    def update(self, batch: Batch, update_policy: bool) -> dict[str, Tensor]:
        """Updates the critics and, if `update_policy`, policy, alpha and targets. Returns tensors to log."""
        gradients, means, log = self.critic_gradients(batch)  # PEV, PIS
        self.descend(self.critic_weights, gradients)
        torch._foreach_copy_((self.mean_sigma, self.mean_entropy, self.mean_discount), means)
        if not update_policy:
            return log

        gradients, policy_log = self.policy_gradients(batch)  # PIM, TUP
        self.descend(self.policy_weights, gradients)
        with torch.no_grad():
            # [ours] Without bounds log(alpha) may drift until exp overflows or Adam's epsilon slows it down.
            self.log_alpha.clamp_(-15, 15)
            torch._foreach_lerp_(self.target_weights, self.online_weights, self.args.tau)
        return log | policy_log

    def critic_gradients(self, batch: Batch) -> tuple[tuple[Tensor, ...], tuple, dict[str, Tensor]]:
        """PEV and PIS, without side effects: gradients of `critic_weights`, running means, tensors to log."""
        discount = self.args.gamma * (1 - batch.terminated)
        with torch.no_grad():
            next_action, next_log_prob = self.target_policy(batch.next_obs, torch.randn_like(batch.action))
            next_q, next_sigma = self.target_critics(batch.next_obs, next_action)
            mean_entropy, mean_discount = self.mean_entropy, self.mean_discount
            if self.args.center_entropy:
                mean_entropy = running_mean(mean_entropy, -next_log_prob.mean(), self.args.tau)
                mean_discount = running_mean(mean_discount, discount.mean(), self.args.tau)
            next_deviation, next_steps = self.target_entropy_critic(
                batch.next_obs, next_action, mean_discount
            )
            if not self.args.res:  # ablation: the entropy of the next step is part of the reward
                batch = batch._replace(reward=batch.reward - discount * self.log_alpha.exp() * next_log_prob)

        q, sigma = self.critics(batch.obs, batch.action)
        deviation, steps = self.entropy_critic(batch.obs, batch.action, mean_discount)
        noise = torch.randn_like(batch.reward)
        pev_loss, mean_sigma, target = pev(
            q, sigma, next_q, next_sigma, batch.reward, discount, noise, self.mean_sigma, tau=self.args.tau
        )
        if self.args.center_entropy:
            pis_loss = pis_centered(
                deviation, steps, next_deviation, next_steps, next_log_prob, discount, mean_entropy
            )
        else:
            pis_loss = pis(deviation, next_deviation, next_log_prob, discount)
        log = {"losses/pev": pev_loss, "losses/pis": pis_loss, "entropy/qe": deviation + mean_entropy * steps}
        log |= {"critic/q": q, "critic/sigma": sigma, "critic/target": target}
        if self.args.center_entropy:
            log["entropy/steps"] = steps
        log = {tag: value.detach() for tag, value in log.items()}
        means = (mean_sigma, mean_entropy, mean_discount)
        return torch.autograd.grad(pev_loss + pis_loss, self.critic_weights), means, log

    def policy_gradients(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """PIM and TUP, without side effects: gradients of `policy_weights`, tensors to log."""
        alpha = self.log_alpha.detach().exp()
        action, log_prob = self.policy(batch.obs, torch.randn_like(batch.action))  # reparameterized
        q, _ = self.critics(batch.obs, action)
        entropy = -log_prob
        deviation, steps = self.entropy_critic(batch.obs, action, self.mean_discount)
        trajectory_entropy = entropy + deviation + self.mean_entropy * steps

        pim_loss = pim(q, trajectory_entropy if self.args.res else entropy, alpha)
        tup_loss = tup(self.log_alpha, trajectory_entropy if self.args.tec else entropy, self.budget)
        log = {"losses/pim": pim_loss, "losses/tup": tup_loss, "losses/alpha": alpha}
        log |= {"entropy/policy": entropy, "entropy/trajectory": trajectory_entropy}
        log = {tag: value.detach() for tag, value in log.items()} | {"entropy/budget": self.budget}
        return torch.autograd.grad(pim_loss + tup_loss, self.policy_weights), log

    def descend(self, weights: list[Tensor], gradients: tuple[Tensor, ...]):
        """One optimizer step for these weights; Adam skips the others, which have no gradient."""
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.contiguous()  # fused Adam requires this; torch.compile may pad
        self.optimizer.step()
        self.optimizer.zero_grad()


# ============================================================================================================
# The harness: environments, replay, checkpoints, training. Identical in dsac_e.py, dsac_t.py, sac.py, td3.py.

import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path

import filelock
import gymnasium as gym
import mujoco
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_INTERVAL = 50  # policy updates between log entries
EVAL_LIMIT = 10_000  # steps after which an evaluation episode is cut off
COMPILE_FROM = 10_000  # number of remaining updates above which torch.compile pays off
MAY_CHANGE = {"total_timesteps", "eval_interval", "eval_episodes", "checkpoint_interval", "device", "compile"}


class CheckedEnv(gym.Wrapper):
    """Copies arrays, which an environment may reuse, drops infos, and exits on invalid values."""

    def reset(self, **kwargs):
        return self.checked(self.env.reset(**kwargs)[0], 0.0), {}

    def step(self, action):
        if not np.isfinite(action).all():
            sys.exit("training has diverged: the policy returned a non-finite action")
        action = action.clip(self.action_space.low, self.action_space.high)  # rounding may exceed the bounds
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return self.checked(obs, reward), float(reward), terminated, truncated, {}

    def checked(self, obs, reward) -> np.ndarray:
        obs, dtype = np.array(obs, dtype=np.float64), self.observation_space.dtype
        valid = obs.shape == self.observation_space.shape and np.shape(reward) == ()
        valid = valid and (abs(obs) < 3e38).all() and abs(np.float64(reward)) < 3e38  # float32; NaN fails
        if not (valid and (dtype.kind == "f" or (obs == obs.astype(dtype)).all())):  # integers that fit
            sys.exit(f"{self.spec.id} returned an invalid observation or reward: {obs}, {reward}")
        return obs.astype(dtype)


def make_envs(env_id: str, num_envs: int, saved: dict | None = None, video_dir: Path | None = None):
    """num_envs copies of an environment, stepped in turn, and their spaces; exits if `saved` has others."""
    gym.logger.min_level = gym.logger.ERROR  # no deprecation warning for each v4 environment
    mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(text, file=sys.stderr))
    kwargs = {"disable_env_checker": True} | ({"render_mode": "rgb_array"} if video_dir else {})
    record = [lambda env: gym.wrappers.RecordVideo(env, video_dir, lambda n: n == 0)] if video_dir else []
    autoreset = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    try:
        envs = gym.make_vec(env_id, num_envs, "sync", autoreset, [*record, CheckedEnv], **kwargs)
    except (ImportError, TypeError, ValueError, gym.error.Error) as error:
        sys.exit(f"cannot make {env_id}: {error}")
    obs, action = envs.single_observation_space, envs.single_action_space
    spaces = " ".join(f"{obs} observations and {action} actions".split())  # in one line
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs, action))
    if not (flat and action.dtype.kind == "f" and action.is_bounded() and (action.low < action.high).all()):
        sys.exit(f"{env_id} has {spaces}; both must be flat boxes, actions real and bounded "
                 "(see gymnasium.wrappers.FlattenObservation, RescaleAction)")  # fmt: skip
    if saved and saved["spaces"] != spaces:
        sys.exit(f"{env_id} has changed: it has {spaces}, the run had {saved['spaces']}")
    return gym.wrappers.vector.RecordEpisodeStatistics(envs), spaces


def seed_all(*key: int) -> int:
    """Derives a seed from integers and seeds the global generators, also those that environments may use."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return seed


def evaluate(policy: Policy, envs: gym.vector.VectorEnv, seed: int, stop: list[int]):
    """Returns and lengths (n,) of one deterministic episode per environment; incomplete if interrupted."""
    obs, _ = envs.reset(seed=seed)
    returns, lengths = np.zeros((2, envs.num_envs))
    running = np.ones(envs.num_envs, bool)
    while running.any() and lengths.max() < EVAL_LIMIT and not stop:
        obs, reward, terminated, truncated, _ = envs.step(policy.act(obs, deterministic=True))
        returns += np.where(running, reward, 0)
        lengths += running
        running &= ~(terminated | truncated)
    if running.any() and not stop:
        print(f"note: this evaluation was cut off after {EVAL_LIMIT} steps")
    return returns, lengths


class ReplayBuffer:
    """Ring buffer of transitions, one row each, so that a batch is a single gather."""

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
    if batch.obs.is_cuda:  # CUDA graphs; without trees, the outputs are valid until the same graph runs again
        torch.cuda.set_device(batch.obs.device)  # a graph is captured on the current device
    options = {"compile_threads": 1, "triton.cudagraphs": batch.obs.is_cuda, "triton.cudagraph_trees": False}
    print("compiling the update, up to a minute; Ctrl-C waits for it (--no-compile skips this)")
    try:
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad becomes part of the graph
        for name in ("critic_gradients", "policy_gradients"):
            compiled = torch.compile(getattr(agent, name), fullgraph=True, options=options)
            compiled(batch)
            setattr(agent, name, compiled)
    except Exception as error:  # many types, e.g. without a C++ compiler
        print("torch.compile failed, continuing in eager mode:", str(error).partition("\n")[0])


def read(path: Path) -> dict | None:
    """What save() wrote, args as an Args object; None if there is no file. Loading cannot execute code."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["algorithm"] != ALGORITHM:
            raise ValueError(f"it was saved by {saved['algorithm']}.py")
        return saved | {"args": Args(**saved["args"])}
    except Exception as error:  # torch.load raises many types for damaged and foreign files
        sys.exit(f"{path} is damaged or was saved by another script: {error}".partition("\n")[0])


def save(run_dir: Path, run: dict, agent: Agent, buffer: ReplayBuffer | None = None):
    """Saves policy.pt and, given the buffer, checkpoint.pt. An interrupted save keeps the previous files."""
    state = {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict()}
    moments = [tensor for moment in state["optimizer"]["state"].values() for tensor in moment.values()]
    if not all(tensor.isfinite().all() for tensor in [*state["agent"].values(), *moments]):
        sys.exit(f"training diverged at step {run['step']}: a weight is not finite; the last save is kept")
    files = {"policy.pt": run | {"policy": agent.policy.state_dict()}}
    if buffer is not None:
        replay = torch.from_numpy(buffer.rows[: run["step"]].cpu().numpy())  # torch alone would save all rows
        files["checkpoint.pt"] = run | state | {"replay": replay}
    for name, content in reversed(files.items()):  # policy.pt last: it tells whether a run is finished
        temporary = run_dir / "save.tmp"
        try:
            with open(temporary, "wb") as file:  # buffered: a raw file writes at most 2 GiB at once
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, run_dir / name)
        except (OSError, RuntimeError) as error:  # torch raises its own while handling that of the disk
            temporary.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__ or error
            sys.exit(f"cannot write {run_dir / name}: {cause}")


def train(args: Args, run_dir: Path, saved: dict | None):
    """Trains from the start or, with new episodes, from checkpoint.pt. saved: policy.pt, None if missing."""
    if saved and saved["finished"] and saved["step"] >= args.total_timesteps:
        return print(f"{run_dir} is already finished at step {saved['step']}")
    if saved and saved["finished"] and not (run_dir / "checkpoint.pt").exists():
        sys.exit(f"cannot extend {run_dir}: its checkpoint.pt is missing")
    seed_all(args.seed, 1)
    envs, spaces = make_envs(args.env_id, args.num_envs, saved)
    eval_envs, _ = make_envs(args.env_id, args.eval_episodes)
    stop = []  # SIGINT, SIGTERM and SIGHUP end the run after the current step, unless ignored, as by nohup
    pid = os.getpid()  # processes that an environment forks inherit the handler, but should exit
    for signum in signal.Signals:
        if signum.name in ("SIGINT", "SIGTERM", "SIGHUP") and signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda n, _: stop.append(n) if os.getpid() == pid else os._exit(128 + n))
    space = envs.single_action_space
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    lock = filelock.FileLock(run_dir / "run.lock", blocking=False)  # acquire() creates the directory
    try:
        buffer = ReplayBuffer(args.buffer_size, *envs.single_observation_space.shape, len(space.low), device)
        agent = Agent(args, *envs.single_observation_space.shape, space.low, space.high).to(device)
        lock.acquire()
    except filelock.Timeout:
        sys.exit(f"another process is training in {run_dir}; if none is, delete run.lock")
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # device, memory, budget, directory
        sys.exit(f"cannot train in {run_dir} on {device}: {error}")
    saved = read(run_dir / "checkpoint.pt")
    first = step = saved["step"] if saved else 0
    if saved:
        agent.load_state_dict(saved["agent"])
        agent.optimizer.load_state_dict(saved["optimizer"])
        buffer.rows[:step] = saved.pop("replay")
        buffer.added = step
    run = dict(algorithm=ALGORITHM, args=vars(args), spaces=spaces, step=step, finished=False)
    save(run_dir, run, agent)  # a directory with an event file, but without policy.pt would be refused
    print(f"{envs.spec.id} on {device}, step {step}; tensorboard --logdir {shlex.quote(run_dir.as_posix())}")
    if agent.policy.half_range.min() < 0.1 or agent.policy.half_range.max() > 10:
        print("note: critics see actions in raw units; consider gymnasium.wrappers.RescaleAction to [-1, 1]")
    # An iteration logs under the step at which it began, so that a resumed run overwrites what it repeats.
    writer = SummaryWriter(str(run_dir), purge_step=step, flush_secs=10)
    bar = tqdm(initial=step, total=args.total_timesteps, unit=" steps", unit_scale=True, disable=None)
    compiling = args.compile and args.total_timesteps - step > COMPILE_FROM * args.num_envs
    seconds = []  # of the iterations with an update since the last log entry, without evaluations and saves
    obs, _ = envs.reset(seed=seed_all(args.seed, 2, step))
    try:
        while not stop:
            finished = step >= args.total_timesteps
            if finished or step == first or step % args.eval_interval < args.num_envs:
                save(run_dir, run, agent)
                returns, lengths = evaluate(agent.policy, eval_envs, seed_all(args.seed, 3, step), stop)
                if stop:
                    break
                writer.add_scalar("eval/episodic_return", returns.mean(), step)
                writer.add_scalar("eval/episodic_return_std", returns.std(), step)
                writer.add_scalar("eval/episodic_length", lengths.mean(), step)
                bar.write(f"step {step}: return {returns.mean():.1f} +- {returns.std():.1f}")
            if finished:
                run["finished"] = True
                break
            if step > first and step % args.checkpoint_interval < args.num_envs:
                save(run_dir, run, agent, buffer)
            learning = step >= max(args.learning_starts, args.num_envs)
            if learning and compiling:
                compile_update(agent, buffer.sample(args.batch_size))
                compiling = False
            start = time.perf_counter()
            action = agent.policy.act(obs)
            iteration = step // args.num_envs
            if learning:  # before the environments: a GPU computes while they step
                log = agent.update(buffer.sample(args.batch_size), iteration % args.policy_delay == 0)
            next_obs, reward, terminated, truncated, infos = envs.step(action)
            final_obs = next_obs.copy()
            for i in np.flatnonzero(terminated | truncated):  # next_obs is the first of the next episode
                final_obs[i] = infos["final_obs"][i]
            buffer.add(obs, action, final_obs, reward, terminated)
            obs = next_obs
            if learning:
                seconds.append(time.perf_counter() - start)
            if learning and iteration % (args.policy_delay * LOG_INTERVAL) == 0:
                numbers = {"charts/SPS": args.num_envs * len(seconds) / sum(seconds)}
                seconds.clear()
                for tag, value in log.items():
                    mean_std = {f"{tag}_mean": value.mean(), f"{tag}_std": value.std(correction=0)}
                    numbers |= mean_std if value.dim() else {tag: value}
                if envs.return_queue:  # of the last 100 episodes
                    numbers["charts/episodic_return"] = np.mean(envs.return_queue)
                    numbers["charts/episodic_length"] = np.mean(envs.length_queue)
                for tag, value in numbers.items():
                    writer.add_scalar(tag, float(value), step)
                shown = ("charts/episodic_return", "losses/alpha")
                bar.set_postfix({tag: float(numbers[tag]) for tag in shown if tag in numbers}, refresh=False)
            step += args.num_envs
            run["step"] = step
            bar.update(args.num_envs)
    finally:  # also after an exception, which may leave more rows than steps
        save(run_dir, run, agent, buffer)
        bar.close()
        writer.close()
    command = shlex.join(["python", sys.argv[0], "--run-dir", run_dir.as_posix()])
    text = f"{'stopped' if stop else 'finished'} at step {step}; to resume, extend or --evaluate: {command}"
    print(text, file=sys.stderr if stop else sys.stdout)  # Ctrl-C also ends tee in "... | tee log"
    if stop:
        sys.exit(128 + stop[0])


def evaluate_run(args: Args, run_dir: Path, saved: dict):
    """Evaluates the policy of a run, or records one episode of it, and prints the return."""
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")  # egl needs no display
    n = 1 if args.capture_video else args.eval_episodes
    envs, _ = make_envs(args.env_id, n, saved, run_dir if args.capture_video else None)
    space = envs.single_action_space
    policy = Policy(envs.single_observation_space.shape[0], space.low, space.high, saved["args"].hidden_width)
    policy.load_state_dict(saved["policy"])
    errors = Exception if args.capture_video else gym.error.Error  # many types, e.g. without OpenGL
    try:
        returns, _ = evaluate(policy, envs, seed_all(args.seed, 3, saved["step"]), [])  # as in training
    except errors as error:
        sys.exit(f"cannot evaluate {args.env_id}: {error}")
    print(f"step {saved['step']}: return {returns.mean():.1f} +- {returns.std():.1f}")
    if args.capture_video:
        envs.close()  # completes the video of an episode that was cut off
        print(f"video: {run_dir / 'rl-video-episode-0.mp4'}")


def main():
    sys.stdout.reconfigure(line_buffering=True)
    sys.path.append(os.getcwd())  # so that --env-id your_module:YourEnv-v0 can import your_module
    args = tyro.cli(Args)
    name = args.env_id.replace("/", "-").replace(":", "-")
    run_dir = Path(args.run_dir or f"runs/{name}__{ALGORITHM}__{args.seed}").absolute()  # a task may chdir
    saved = read(run_dir / "policy.pt")
    evaluating = args.evaluate or args.capture_video
    if saved:
        if args.run_dir or evaluating:
            args = tyro.cli(Args, default=saved["args"])  # arguments that are not given come from the run
        started = vars(saved["args"]) | {"run_dir": args.run_dir}  # a directory may be moved
        changed = [name for name in started.keys() - MAY_CHANGE if vars(args)[name] != started[name]]
        if changed and not evaluating:
            sys.exit(f"{run_dir} has another {', '.join(changed)}: choose another --run-dir")
    elif evaluating:
        sys.exit(f"there is no policy.pt in {run_dir}")
    elif any(path.suffix not in (".lock", ".log", ".tmp", ".txt") for path in run_dir.glob("*")):
        sys.exit(f"{run_dir} contains other files: choose another --run-dir")
    high = dict.fromkeys(vars(args), 2**62) | {"gamma": 1 - 1e-9, "learning_starts": args.total_timesteps - 1}
    high |= {"tau": 1, "num_envs": args.buffer_size, "batch_size": args.buffer_size}
    for name, value in vars(args).items():
        low = 0 if name in ("seed", "gamma", "rho", "learning_starts") or "noise" in name else 1e-300
        if type(value) in (int, float) and not low <= value <= high[name]:  # NaN fails, too
            sys.exit(f"--{name.replace('_', '-')} {value} is not in {'(' if low else '['}0, {high[name]}]")
    (evaluate_run if evaluating else train)(args, run_dir, saved)


if __name__ == "__main__":
    main()
