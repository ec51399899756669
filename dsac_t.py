# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0",
#     "tqdm==4.70.1", "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "moviepy==2.2.1",
# ]
# ///
"""DSAC-T: distributional soft actor-critic with three refinements, in one file.

Paper: "Distributional Soft Actor-Critic with Three Refinements" (DSAC-T, arXiv 2310.05858).

SAC whose twin critics learn the distribution of the return, N(Q, sigma^2). Three refinements: the expected target, not
a sampled one, moves Q; the twin with the smaller mean provides the target; clipping and gradient scaling follow the
mean spread, so that nothing is tuned to the size of the rewards.

    step, as in TECRL (arXiv 2511.11592)    here
    PEV  policy evaluation, Eq. 11          pev()
    PIM  policy improvement, Eq. 14         pim()
    TUP  temperature update, Eq. 15         tup()
    order, delay, target networks           Agent.update()

Shapes: B batch, S observation, A action dimensions. What the papers leave open is marked [ours].
Above the line of = signs is the algorithm. Below it, data and training: the same text in all four scripts.
"""

import contextlib
import copy
import difflib
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import mujoco
except Exception as error:  # it loads the library that MUJOCO_GL asks for, whether anything is drawn or not
    sys.exit(f"mujoco cannot be loaded ({error}): unset MUJOCO_GL, or apt-get install libegl1 libosmesa6")

ALGORITHM = "dsac_t"


@dataclass
class Args:
    """Train on one gymnasium task, or evaluate what a run has learned. Steps are environment steps."""

    env_id: str = "Humanoid-v4"
    """the task: any gymnasium id with flat Box observations and bounded Box actions"""
    seed: int = 0
    """seed of everything random: weights, noise, replay, environments"""
    total_timesteps: int = 30_000_000
    """length of the run"""
    num_envs: int = 20
    """parallel environments; one update follows each step of all of them"""
    learning_starts: int = 10_000
    """steps taken with the untrained policy before the first update"""
    batch_size: int = 256
    """transitions in one update"""
    buffer_size: int = 1_000_000
    """transitions kept for replay"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """rate at which the target networks and the running mean of sigma follow"""
    policy_delay: int = 2
    """critic updates per update of everything else"""
    hidden_width: int = 256
    """units in each of the three hidden layers"""
    policy_lr: float = 1e-4
    """learning rate of the policy"""
    critic_lr: float = 1e-4
    """learning rate of the critics"""
    alpha_lr: float = 3e-4
    """learning rate of log(alpha)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and replay live; auto takes CUDA when there is one"""
    compile: bool = True
    """go over to updates compiled by torch.compile once a helper has made them, during the first ones"""
    eval_interval: int = 50_000
    """steps between two evaluations"""
    eval_episodes: int = 10
    """episodes of one evaluation, played with the deterministic policy"""
    checkpoint_interval: int = 100_000
    """steps between two checkpoints; another is made when the run ends, also by Ctrl-C or SIGTERM"""
    run_dir: Path | None = None
    """where the run is written; None: runs/<task>__<algorithm>__<seed>__<time>"""
    resume: Path | None = None
    """go on with the run in this directory, with its arguments; --total-timesteps may be raised"""
    evaluate: Path | None = None
    """evaluate the policy saved in this run directory; of the other arguments --seed and --eval-episodes apply"""
    capture_video: bool = False
    """with --evaluate: film the first episode, as an mp4 file in the run directory"""


class Batch(NamedTuple):
    """Transitions. `terminated` is 1 where the task ended, and 0 where a time limit merely cut the episode."""

    obs: Tensor  # (B, S)
    action: Tensor  # (B, A), in the environment's own units
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, S)
    terminated: Tensor  # (B,)


class StackedLinear(nn.Module):
    """n layers like nn.Linear side by side, in one batched product: (n, B, fan_in) -> (n, B, fan_out)."""

    def __init__(self, n: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(n, fan_out, fan_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        # Transposed, so that the gradient of the weight comes out in the layout of the weight, and is not copied.
        return (self.weight @ x.mT).mT + self.bias


def mlp(n: int, inputs: int, outputs: int, width: int) -> nn.Sequential:
    """n independent networks of three hidden GELU layers: (n, B, inputs) -> (n, B, outputs)."""
    hidden = [layer for fan_in in (inputs, width, width) for layer in (StackedLinear(n, fan_in, width), nn.GELU())]
    return nn.Sequential(*hidden, StackedLinear(n, width, outputs))


class Policy(nn.Module):
    """Squashed Gaussian: action = center + half_range * tanh(u), u ~ N(mu(obs), std(obs)^2).

    low, high: (A,) bounds of the action space.
    """

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, hidden_width: int = 256):
        super().__init__()
        low, high = low.astype(np.float64), high.astype(np.float64)  # an int8 box would overflow below
        self.net = mlp(1, obs_dim, 2 * len(low), hidden_width)
        self.register_buffer("center", torch.tensor((high + low) / 2, dtype=torch.float32))
        self.register_buffer("half_range", torch.tensor((high - low) / 2, dtype=torch.float32))

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, S), standard normal noise (B, A) -> action (B, A), log pi(action|obs) (B,) in nats.

        The density is per unit of the environment's own action, which is what gives H0 = -A its meaning.
        """
        mu, log_std = self.net(obs.unsqueeze(0)).squeeze(0).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 0.5)
        u = mu + log_std.exp() * noise
        log_normal = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
        # log |d action / d u|; its first term is log(1 - tanh(u)^2), in a form that is exact where tanh(u) rounds to 1.
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.half_range.log()
        return self.center + self.half_range * u.tanh(), (log_normal - log_slope).sum(-1)

    @torch.inference_mode()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """obs (B, S) -> action (B, A): a sample, or the squashed mean when deterministic."""
        draw = torch.zeros if deterministic else torch.randn
        return self(obs, draw(len(obs), len(self.center), device=obs.device))[0]


class TwinCritics(nn.Module):
    """Two Gaussian value distributions N(Q, sigma^2): obs (B, S), action (B, A) -> Q (2, B), sigma (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(2, obs_dim + action_dim, 2, hidden_width)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        q, raw = self.net(torch.cat((obs, action), -1).expand(2, -1, -1)).unbind(-1)
        return q, F.softplus(raw)


def frozen(net: nn.Module):
    """The network as a function of its inputs alone: no gradient is computed for its weights."""
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    return lambda *inputs: torch.func.functional_call(net, weights, inputs)


def pev(critics, target_critics, batch, next_action, next_log_prob, noise, alpha, spread, gamma, tau):
    """PEV, policy evaluation (Eq. 11 and the entropy): both value distributions towards the soft return.

    next_action (B, A) of the target policy at next_obs; noise (B,) standard normal;
    next_log_prob (B,) of that action; alpha ();
    spread (2,) running mean of each twin's sigma, 0 before the first batch.
    Returns the loss (only its gradient means something), the new spread, tensors to log.
    """
    q, sigma = critics(batch.obs, batch.action)  # (2, B)
    with torch.no_grad():
        next_q, next_sigma = target_critics(batch.next_obs, next_action)  # (2, B)
        smaller = next_q.argmin(0, keepdim=True)  # DSAC-T, refinement 2: the twin with the smaller mean
        next_q, next_sigma = next_q.gather(0, smaller), next_sigma.gather(0, smaller)  # (1, B)
        next_q = next_q - alpha * next_log_prob
        discount = gamma * (1 - batch.terminated)
        # DSAC-T, refinement 1: the expected target moves Q, the sampled one only sigma.
        y_q = batch.reward + discount * next_q
        y_z = batch.reward + discount * (next_q + next_sigma * noise.clamp(-3, 3))
        # DSAC-T, refinement 3: clipping and scaling follow each twin's mean sigma, this batch included.
        spread = torch.where(spread > 0, spread.lerp(sigma.mean(1), tau), sigma.mean(1))
        bound = 3 * spread.unsqueeze(1)
        y_z = y_z.clamp(q - bound, q + bound)  # (2, B)
        eps = 0.1
        weight = spread.square().unsqueeze(1) + eps
        q_gradient = -weight * (y_q - q) / (sigma**2 + eps)
        sigma_gradient = -weight * ((y_z - q) ** 2 - sigma**2) / (sigma**3 + eps)
    loss = (q_gradient * q + sigma_gradient * sigma).mean(1).sum()
    log = {"losses/pev": loss.detach(), "critic/q": q.detach(), "critic/sigma": sigma.detach(), "critic/target": y_q}
    return loss, spread, log


def pim(policy, critics, obs, noise, alpha):
    """PIM, policy improvement (Eq. 14): maximise min Q - alpha * log pi; critics and alpha are constants.

    obs (B, S), noise (B, A) standard normal, alpha ().
    Returns the loss and, without gradient, -log pi (B,).
    """
    action, log_prob = policy(obs, noise)
    q, _ = frozen(critics)(obs, action)
    entropy = -log_prob
    loss = -(torch.minimum(q[0], q[1]) + alpha.detach() * entropy).mean()
    return loss, entropy.detach()


def tup(log_alpha, entropy, budget):
    """TUP, temperature update (Eq. 15), to be minimised: alpha falls while there is more entropy than the budget.

    log_alpha (), entropy (B,) as found by PIM, budget () in nats. Returns the loss.
    """
    return log_alpha.exp() * (entropy.detach().mean() - budget)


def descend(optimizer: torch.optim.Optimizer, weights: list[Tensor], gradients: tuple[Tensor, ...]):
    """One step of the optimizer of these weights along these gradients."""
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    optimizer.step()


class Agent(nn.Module):
    """Everything that learns, and the order in which it learns."""

    def __init__(self, args: Args, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.args, action_dim = args, len(low)
        self.policy = Policy(obs_dim, low, high, args.hidden_width)
        self.critics = TwinCritics(obs_dim, action_dim, args.hidden_width)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        weights = dict(self.named_parameters())
        self.targets = [weight for name, weight in weights.items() if name.startswith("target_")]
        self.online = [weights[name.removeprefix("target_")] for name in weights if name.startswith("target_")]
        self.critic_weights = [weight for name, weight in weights.items() if "critic" in name and weight.requires_grad]
        # Capturable: on a GPU the steps of both optimisers become part of a CUDA graph.
        self.critic_optimizer = torch.optim.Adam(self.critic_weights, args.critic_lr, fused=True, capturable=True)
        self.register_buffer("spread", torch.zeros(2))
        self.log_alpha = nn.Parameter(torch.tensor(1.0))
        budget = -float(action_dim)  # H0, for every single step
        self.register_buffer("budget", torch.tensor(budget), persistent=False)
        self.policy_weights = [*self.policy.parameters(), self.log_alpha]
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, fused=True, capturable=True)
        self.policy_optimizer.add_param_group({"params": [self.log_alpha], "lr": args.alpha_lr})

    def critic_gradients(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Policy evaluation: gradients of `critic_weights`, tensors to log."""
        gamma, tau, alpha = self.args.gamma, self.args.tau, self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.target_policy(batch.next_obs, torch.randn_like(batch.action))
        noise = torch.randn_like(batch.reward)
        pev_loss, spread, log = pev(
            self.critics, self.target_critics, batch, next_action, next_log_prob, noise, alpha, self.spread, gamma, tau
        )
        self.spread.copy_(spread)
        return torch.autograd.grad(pev_loss, self.critic_weights), log

    def policy_gradients(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Policy improvement: gradients of `policy_weights`, tensors to log."""
        alpha = self.log_alpha.detach().exp()
        noise = torch.randn_like(batch.action)
        pim_loss, entropy = pim(self.policy, self.critics, batch.obs, noise, alpha)
        tup_loss = tup(self.log_alpha, entropy, self.budget)
        log = {"losses/pim": pim_loss.detach(), "losses/tup": tup_loss.detach(), "losses/alpha": alpha}
        log |= {"entropy/policy": entropy, "entropy/budget": self.budget}
        return torch.autograd.grad(pim_loss + tup_loss, self.policy_weights), log

    def update(self, batch: Batch, delayed: bool) -> dict[str, Tensor]:
        """One update; a delayed one moves not only the critics but everything else too. Returns tensors to log."""
        gradients, log = self.critic_gradients(batch)
        descend(self.critic_optimizer, self.critic_weights, gradients)
        if not delayed:
            return log

        gradients, policy_log = self.policy_gradients(batch)
        descend(self.policy_optimizer, self.policy_weights, gradients)
        with torch.no_grad():
            # [ours] Far from its budget log(alpha) drifts for a whole run: exp would leave float32, and below -15 small
            # gradients sink under Adam's epsilon, which makes the way back longer than the way out.
            self.log_alpha.clamp_(-15, 15)
            torch._foreach_lerp_(self.targets, self.online, self.args.tau)
        return log | policy_log


# ======================================================================================================================
# The harness: data and training, the same text in dsac_e.py, dsac_t.py, sac.py and td3.py.
# Of the algorithm it knows Args (in which any *_noise may be zero), Batch, Policy.act and Agent.update.

COMPILE_AFTER = 5_000  # updates that run as they are, while a helper compiles what the later ones use
LOG_INTERVAL = 500  # updates between two readings of all tensors to log
FILE_LENGTH = 100_000  # transitions in one file of a checkpoint
EVAL_LIMIT = 10_000  # length of an evaluation episode where the task itself sets no limit


def fail(message: str) -> NoReturn:
    """Ends the program with exit code 2 and one line: what is wrong, and what to type instead."""
    print(f"{ALGORITHM}: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(args: Args):
    """Refuses arguments that cannot work."""
    for name, value in vars(args).items():
        lowest = 0 if name in ("seed", "gamma", "learning_starts") or "noise" in name else sys.float_info.min
        if type(value) in (int, float) and not lowest <= value < math.inf:
            fail(f"--{name.replace('_', '-')} must be {'positive' if lowest else 'zero or more'}, not {value}")
    for wrong, message in (
        (args.gamma >= 1, f"--gamma must be below 1, not {args.gamma}"),
        (args.seed >= 2**63, "--seed must be below 2**63"),
        (args.tau > 1, f"--tau must be at most 1, not {args.tau}"),
        (args.batch_size > args.buffer_size, f"--batch-size must be at most --buffer-size ({args.buffer_size})"),
        (args.num_envs > args.buffer_size, f"--num-envs must be at most --buffer-size ({args.buffer_size})"),
        (args.learning_starts >= args.total_timesteps, "--learning-starts must be below --total-timesteps"),
        (args.capture_video and not args.evaluate, "--capture-video needs --evaluate RUN_DIR"),
        (args.device == "cuda" and not torch.cuda.is_available(), "no CUDA device is visible: use --device cpu"),
    ):
        if wrong:
            fail(message)


def explain(env_id: str, error: Exception) -> str:
    """Why gymnasium could not make env_id, and what to type instead."""
    if isinstance(error, gym.error.UnregisteredEnv | gym.error.DeprecatedEnv):
        why = "is not registered"
    elif isinstance(error, ImportError) and "mujoco" in str(error):
        why = "needs mujoco < 3" if env_id == "Pusher-v4" else "needs mujoco-py, as the papers' v3 tasks did"
    else:
        return f"{env_id} cannot be made: {type(error).__name__}: {' '.join(str(error).split())}"
    # The mujoco-py tasks are registered still, each as a function that raises.
    ids = [known for known, spec in gym.registry.items() if isinstance(spec.entry_point, str) and known != "Pusher-v4"]
    same_name = [known for known in ids if known.rpartition("-v")[0] == env_id.rpartition("-v")[0]]
    return f"{env_id} {why}; try --env-id {' or '.join(same_name or difflib.get_close_matches(env_id, ids, cutoff=0))}"


def film(env_id: str, prefix: Path) -> gym.Env:
    """The task, its first episode going to the file <prefix>-episode-0.mp4."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco's own choice needs a screen
    try:
        import imageio_ffmpeg  # both here, because nothing else needs them
        import moviepy  # noqa: F401

        imageio_ffmpeg.get_ffmpeg_version()
    except Exception as error:
        fail(f"--capture-video has no encoder ({error}): pip install moviepy imageio-ffmpeg, unset IMAGEIO_FFMPEG_EXE")
    env = gym.make(env_id, disable_env_checker=True, render_mode="rgb_array")
    try:
        env.reset()
        env.render()
    except Exception as error:  # whatever a GL library raises that is missing or has no device
        sys.unraisablehook = lambda _: None  # else gymnasium's half-made viewer complains when it is collected
        text = " ".join(str(error).split())
        fail(f"--capture-video cannot draw {env_id} ({text}): apt-get install libegl1 libgl1-mesa-dri, unset MUJOCO_GL")
    print("filming the first episode; without a GPU to draw it, that takes a minute or two", flush=True)
    return gym.wrappers.RecordVideo(env, str(prefix.parent), lambda episode: episode == 0, name_prefix=prefix.name)


def make_envs(env_id: str, num_envs: int, video: Path | None = None) -> gym.vector.VectorEnv:
    """num_envs copies of the task, stepped in turn; the last observation of an episode is in infos["final_obs"].

    With `video`, the first copy films its first episode. In turn because worker processes were slower on two cores, in
    ms per step of 20 copies: HalfCheetah 5.0 against 1.5, Hopper 6.5 against 3.7, Humanoid 9.0 against 7.5.
    """
    gym.logger.min_level = gym.logger.ERROR  # else one deprecation notice for each copy of a v4 task
    mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else print(text, file=sys.stderr))
    try:
        makers = [lambda: gym.make(env_id, disable_env_checker=True)] * num_envs
        if video:
            makers[0] = lambda: film(env_id, video)
        envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except Exception as error:  # a task may raise anything
        fail(explain(env_id, error))
    obs, action = envs.single_observation_space, envs.single_action_space
    if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs, action)):
        fail(f"{env_id} observes {obs} and acts in {action}: choose a task where both are continuous, a flat Box")
    span = action.high.astype(np.float64) - action.low
    if not np.all((span > 0) & (span < np.finfo(np.float32).max)):
        fail(f"{env_id} acts in {action}: choose a task whose actions are bounded, or wrap it in RescaleAction")
    return envs


class Fault(Exception):
    """Why a run cannot go on, in words for its user."""


def act(policy: Policy, obs: np.ndarray, space: gym.spaces.Box, deterministic: bool = False) -> np.ndarray:
    """obs (n, S) -> action (n, A), of the dtype and inside the box of `space`."""
    action = policy.act(torch.as_tensor(obs, dtype=torch.float32, device=policy.center.device), deterministic)
    action = action.cpu().numpy()
    if not np.isfinite(action).all():
        raise Fault("the action of the policy is not finite")
    if np.issubdtype(space.dtype, np.integer):
        action = action.round()
    return action.astype(space.dtype).clip(space.low, space.high)  # float32 may exceed the box by a rounding error


def step_envs(envs: gym.vector.VectorEnv, action: np.ndarray):
    """envs.step(action); Fault if the task raises, or returns what must never reach a replay buffer."""
    try:
        obs, reward, terminated, truncated, infos = envs.step(action)
    except Exception as error:  # a task may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise Fault(f"the task raised {error!r} ({where.filename}, line {where.lineno})") from error
    final_obs = obs
    if "final_obs" in infos:  # there, obs is already the first of the next episode
        done = terminated | truncated
        final_obs = obs.copy()
        final_obs[done] = np.stack(infos["final_obs"][done])
    for name, values in (("a reward", reward), ("an observation", obs), ("an observation", final_obs)):
        if not (np.abs(values) <= np.finfo(np.float32).max).all():  # replay is float32; NaN fails this as well
            raise Fault(f"the task returned {name} that is not finite")
    return obs, final_obs, reward, terminated, truncated


def evaluate(policy: Policy, envs: gym.vector.VectorEnv, seed: np.random.SeedSequence) -> tuple[np.ndarray, np.ndarray]:
    """One episode of the deterministic policy in each environment: returns and lengths, (num_envs,) each."""
    obs, _ = envs.reset(seed=seed.generate_state(envs.num_envs).tolist())
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, int)
    running, limit = np.ones(envs.num_envs, bool), envs.envs[0].spec.max_episode_steps or EVAL_LIMIT
    while running.any() and lengths.max() < limit:
        action = act(policy, obs, envs.single_action_space, deterministic=True)
        obs, _, reward, terminated, truncated = step_envs(envs, action)
        returns[running] += reward[running]
        lengths[running] += 1
        running &= ~(terminated | truncated)
    return returns, lengths


class ReplayBuffer:
    """Ring of the last `capacity` transitions, one packed row each, so that a batch is a single gather."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = (obs_dim, action_dim, obs_dim, 1, 1)
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.added, self.filled = 0, torch.tensor(0, device=device)
        self.files = []  # (first, last + 1) of the transitions in each file that save() wrote and the ring still needs

    def add(self, obs, action, next_obs, reward, terminated):
        """n transitions, as arrays of n rows; once the ring is full they replace the n oldest."""
        columns = (obs, action, next_obs, reward[:, None], terminated[:, None])
        self.store(self.added, torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe")))

    def store(self, start: int, rows: Tensor):
        self.added = start + len(rows)
        self.rows[self.slots(start, self.added)] = rows.to(self.rows.device)
        self.filled.fill_(min(self.added, len(self.rows)))

    def slots(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.rows.device) % len(self.rows)

    def sample(self, batch_size: int) -> Batch:
        """batch_size transitions, uniformly and with replacement."""
        # Not randint(filled): a CUDA graph would go on with the number that it was captured with.
        slots = torch.randint(2**62, (batch_size,), device=self.rows.device) % self.filled
        obs, action, next_obs, reward, terminated = self.rows.index_select(0, slots).split(self.widths, dim=1)
        return Batch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))

    def save(self, run_dir: Path):
        """Writes the transitions that came since the last save, so that its duration does not grow with the buffer."""
        oldest = max(0, self.added - len(self.rows))
        first = max(oldest, self.files[-1][1] if self.files else 0)
        self.files = [file for file in self.files if file[1] > oldest]
        for start in range(first, self.added, FILE_LENGTH):
            end = min(start + FILE_LENGTH, self.added)
            write(run_dir / f"replay-{start}-{end}.pt", self.rows[self.slots(start, end)])
            self.files.append((start, end))

    def load(self, run_dir: Path, files: list[tuple[int, int]]):
        """Reads back what save() wrote."""
        for start, end in files:
            path = run_dir / f"replay-{start}-{end}.pt"
            self.store(start, torch.load(path, map_location="cpu", weights_only=True))
        self.files = files


def compile_update(agent: Agent):
    """Compiles the two methods of agent that an update spends its time in."""
    torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad would end the graph
    options = {"compile_threads": 1}  # no pool of worker processes
    agent.critic_gradients = torch.compile(agent.critic_gradients, fullgraph=True, options=options)
    agent.policy_gradients = torch.compile(agent.policy_gradients, fullgraph=True, options=options)


def compile_ahead(args: Args, obs_dim: int, low: np.ndarray, high: np.ndarray, device: torch.device):
    """Compiles an update like the run's, which leaves it in torch's cache on disk, where the run will find it.

    For a process of its own: tracing in a thread would take turns with the run, and rewind its random generator.
    """

    def watch():  # however the run ends, the helper ends with it
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.nice(5)
    tqdm.set_lock(threading.RLock())  # torch uses tqdm, whose own lock would be reported as leaked by a run that ends
    try:
        agent, buffer = Agent(args, obs_dim, low, high).to(device), ReplayBuffer(1, obs_dim, len(low), device)
        buffer.store(0, torch.zeros_like(buffer.rows))
        compile_update(agent)
        agent.update(buffer.sample(args.batch_size), delayed=True)
    except Exception as error:  # the compiler may raise anything
        sys.exit(f"{ALGORITHM}: updates stay uncompiled: {str(error).splitlines()[0]} (--no-compile: do not try)")


def record(agent: Agent, buffer: ReplayBuffer):
    """The two kinds of update as CUDA graphs, drawing the batch included: each is a single launch from then on.

    Numbers such as learning rates are part of a graph; tensors are not, but must stay where they are.
    """
    graphs, logs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
    for delayed in (False, True):
        with torch.cuda.graph(graphs[delayed]):
            logs.append(agent.update(buffer.sample(agent.args.batch_size), delayed))

    def update(delayed: bool) -> dict[str, Tensor]:
        graphs[delayed].replay()
        return logs[delayed]

    return update


def to_numbers(log: dict[str, Tensor]) -> dict[str, float]:
    """The logged tensors as numbers, in one transfer: a scalar as it is, a batch as its mean and standard deviation."""
    scalars = {}
    for tag, value in log.items():
        if value.dim():
            scalars |= {f"{tag}_mean": value.mean(), f"{tag}_std": value.std(correction=0)}
        else:
            scalars[tag] = value
    return dict(zip(scalars, torch.stack([*scalars.values()]).tolist(), strict=True))


def write(path: Path, content):
    """Writes aside, then renames: a kill at any moment leaves the previous file whole. Fault if that fails."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch wraps some of the former in the latter
        aside.unlink(missing_ok=True)
        raise Fault(f"cannot write {path} ({error})") from error


def plain(args: Args) -> dict:
    """The arguments as a dictionary that a file may hold and torch.load will read without running code."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def save_policy(run_dir: Path, agent: Agent):
    """Writes what --evaluate needs."""
    if not all(value.isfinite().all() for value in agent.state_dict().values()):
        raise Fault("a weight is not finite")
    content = {"algorithm": ALGORITHM, "args": plain(agent.args), "policy": agent.policy.state_dict()}
    write(run_dir / "policy.pt", content)


def save_checkpoint(run_dir: Path, agent: Agent, buffer: ReplayBuffer, **counters):
    """Writes what --resume needs: replay first, in files that nothing refers to until the rest is written."""
    buffer.save(run_dir)
    cuda = torch.cuda.get_rng_state() if buffer.rows.is_cuda else None
    optimizers = [agent.critic_optimizer.state_dict(), agent.policy_optimizer.state_dict()]
    content = {"algorithm": ALGORITHM, "args": plain(agent.args), "agent": agent.state_dict(), "optimizers": optimizers}
    content |= {"files": buffer.files, "rng": torch.get_rng_state(), "cuda_rng": cuda, "counters": counters}
    write(run_dir / "checkpoint.pt", content)
    needed = {f"replay-{start}-{end}.pt" for start, end in buffer.files}
    for path in run_dir.glob("replay-*"):
        if path.name not in needed:
            path.unlink()


def load_checkpoint(run_dir: Path, saved: dict, agent: Agent, buffer: ReplayBuffer) -> dict[str, int]:
    """Puts everything back as save_checkpoint() found it, and returns the counters."""
    agent.load_state_dict(saved["agent"])
    for optimizer, state in zip((agent.critic_optimizer, agent.policy_optimizer), saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    buffer.load(run_dir, saved["files"])
    torch.set_rng_state(saved["rng"])
    if buffer.rows.is_cuda and saved["cuda_rng"] is not None:
        torch.cuda.set_rng_state(saved["cuda_rng"])
    return saved["counters"]


def read(path: Path, option: str) -> dict:
    """What save_policy() or save_checkpoint() wrote, for the option that needs it; nothing in it can run code."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["algorithm"] != ALGORITHM:
            fail(f"{path.parent} is a run of {saved['algorithm']}: use {saved['algorithm']}.py {option} {path.parent}")
        return saved | {"args": Args(**saved["args"])}
    except Exception as error:  # whatever torch.load makes of a file that is missing, damaged or something else
        fail(f"{option} cannot use {path} ({type(error).__name__}): name the directory of a run")


def new_run_dir(args: Args) -> Path:
    """Makes the directory of a new run; two runs that start in the same second get two."""
    task = re.sub(r"[^\w.-]+", "-", args.env_id)
    run_dir = args.run_dir or Path(f"runs/{task}__{ALGORITHM}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
        except FileExistsError:
            if args.run_dir:
                raise
            run_dir = run_dir.with_name(f"{run_dir.name}-{os.getpid()}")
            run_dir.mkdir()
        if any(run_dir.iterdir()):
            fail(f"the run directory {run_dir} is not empty: name another with --run-dir, or go on with --resume")
    except OSError as error:
        fail(f"cannot write to the run directory {run_dir} ({error.strerror}): name another with --run-dir")
    return run_dir


def train(args: Args, saved: dict | None = None):
    """The whole run, from its start or from a checkpoint: act, update, step, store; evaluate, save, log."""
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    envs, eval_envs = make_envs(args.env_id, args.num_envs), make_envs(args.env_id, args.eval_episodes)
    space, obs_dim = envs.single_action_space, envs.single_observation_space.shape[0]
    torch.manual_seed(args.seed)
    agent = Agent(args, obs_dim, space.low, space.high).to(device)
    try:
        buffer = ReplayBuffer(args.buffer_size, obs_dim, len(space.low), device)
    except RuntimeError:  # what torch raises when memory does not suffice
        fail(f"--buffer-size {args.buffer_size} does not fit into the memory of {device}: choose a smaller one")
    counters = {"step": 0, "updates": 0, "next_evaluation": 0}
    env_seed = np.random.SeedSequence(args.seed)
    if saved:
        run_dir = args.resume
        try:
            counters = load_checkpoint(run_dir, saved, agent, buffer)
            if counters["step"] >= args.total_timesteps:
                fail(f"{run_dir} has made its {counters['step']} steps: give a larger --total-timesteps to go on")
        except Exception as error:  # whatever torch makes of a file that is missing or damaged
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            fail(f"the checkpoint in {run_dir} is damaged, or does not fit here ({reason}): start a new run")
        env_seed = np.random.SeedSequence(args.seed, spawn_key=(counters["step"], 1))
    else:
        run_dir = new_run_dir(args)
    step, updates, next_evaluation = counters.values()
    checkpoint, first_update = step, updates
    writer = SummaryWriter(str(run_dir), purge_step=step + 1 if saved else None, flush_secs=10)
    if not saved:
        rows = [f"|{name}|{value}|" for name, value in vars(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|argument|value|", "|-|-|", *rows]))

    def update(delayed: bool) -> dict[str, Tensor]:
        return agent.update(buffer.sample(args.batch_size), delayed)

    caught, helper = {}, None
    if args.compile and args.total_timesteps - max(step, args.learning_starts) > 2 * COMPILE_AFTER * args.num_envs:
        arguments = args, obs_dim, space.low, space.high, device
        helper = multiprocessing.get_context("spawn").Process(target=compile_ahead, args=arguments, daemon=True)

    def catch(signum, frame):  # Ctrl-C or SIGTERM ends the run in order; the same two seconds later, at once
        if time.monotonic() - caught.setdefault(signum, time.monotonic()) > 2:  # sooner, some wrapper has sent it twice
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    gib, begin = buffer.rows.nbytes / 2**30, f"going on from step {step} in" if saved else "writing to"
    print(f"{args.env_id} on {device}, up to {gib:.2g} GiB of replay, {begin} {run_dir}", flush=True)
    bar = tqdm(
        initial=step, total=args.total_timesteps, unit=" steps", unit_scale=True, dynamic_ncols=True, disable=None
    )
    log, shown = {}, {}
    logged_step, logged_time = step, time.perf_counter()
    obs, _ = envs.reset(seed=env_seed.generate_state(args.num_envs).tolist())
    episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
    try:
        while True:
            finished = step >= args.total_timesteps
            evaluating = (finished or step >= next_evaluation) and not caught
            saving = finished or caught or step - checkpoint >= args.checkpoint_interval
            if evaluating or saving:
                save_policy(run_dir, agent)  # first of all, for it refuses what is not finite
            if evaluating:
                next_evaluation = step - step % args.eval_interval + args.eval_interval
                seed = np.random.SeedSequence(args.seed, spawn_key=(step,))  # spawned: no training environment has it
                returns, lengths = evaluate(agent.policy, eval_envs, seed)
                writer.add_scalar("eval/episodic_return", returns.mean(), step)
                writer.add_scalar("eval/episodic_return_std", returns.std(), step)
                writer.add_scalar("eval/episodic_length", lengths.mean(), step)
                shown["return"] = f"{returns.mean():.1f} +- {returns.std():.1f}"
                bar.set_postfix(shown, refresh=False)
                if bar.disable:  # no terminal to draw in
                    print(f"step {step}:", ", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
            if saving:
                save_checkpoint(run_dir, agent, buffer, step=step, updates=updates, next_evaluation=next_evaluation)
                checkpoint = step
            if finished or caught:
                break

            action = act(agent.policy, obs, space)
            updating = step >= max(args.learning_starts, 1)  # not from an empty buffer
            if updating:  # before the environments step: on a GPU the update then runs while they do
                updates += 1
                log |= update(updates % args.policy_delay == 0)
            next_obs, final_obs, reward, terminated, truncated = step_envs(envs, action)
            buffer.add(obs, action, final_obs, reward, terminated)
            obs = next_obs
            step += args.num_envs
            bar.update(args.num_envs)
            episode_return += reward
            episode_length += 1
            for i in (terminated | truncated).nonzero()[0]:
                writer.add_scalar("charts/episodic_return", episode_return[i], step)
                writer.add_scalar("charts/episodic_length", episode_length[i], step)
                episode_return[i] = episode_length[i] = 0
            if not updating:
                continue

            # Reading a number waits for the device, which by now has had the time of a step of the environments.
            if updates % LOG_INTERVAL == 0 or not math.isfinite(sum(log[tag] for tag in log if "losses/" in tag)):
                scalars = to_numbers(log)
                broken = [tag for tag, value in scalars.items() if not math.isfinite(value)]
                if broken:
                    raise Fault(f"not finite: {', '.join(broken)}")
                scalars["charts/SPS"] = (step - logged_step) / (time.perf_counter() - logged_time)
                logged_step, logged_time = step, time.perf_counter()
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, step)
                if "losses/alpha" in scalars:
                    shown["alpha"] = f"{scalars['losses/alpha']:.3g}"
                bar.set_postfix(shown, refresh=False)
            if helper:
                age = updates - first_update
                if age == 1:
                    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the run alone
                    helper.start()
                    signal.signal(signal.SIGINT, handler)
                if age == COMPILE_AFTER:  # a fixed number, so that equal runs stay equal
                    while helper.is_alive() and not caught:
                        helper.join(1)
                    if helper.exitcode == 0:
                        compile_update(agent)
                if age == COMPILE_AFTER + 2 * args.policy_delay and device.type == "cuda":  # by now everything ran once
                    try:
                        update = record(agent, buffer)
                    except RuntimeError as error:
                        print(f"{ALGORITHM}: updates stay outside a CUDA graph: {error}", file=sys.stderr)
    except (Fault, OSError) as error:
        good = (
            f"python {sys.argv[0]} --resume {run_dir} goes on from step {checkpoint}" if checkpoint else "no checkpoint"
        )
        sys.exit(f"{ALGORITHM}: step {step}: {error}; {good}")
    finally:
        bar.close()
        envs.close()
        eval_envs.close()
        with contextlib.suppress(OSError):
            writer.close()

    print(", ".join([f"{'interrupted' if caught else 'finished'} at step {step}", *map(" ".join, shown.items())]))
    if caught:
        print(f"go on:    python {sys.argv[0]} --resume {run_dir}")
    print(f"evaluate: python {sys.argv[0]} --evaluate {run_dir}\ncurves:   tensorboard --logdir {run_dir.parent}")
    if caught:
        raise SystemExit(128 + next(iter(caught)))


def evaluate_run(args: Args):
    """Plays the policy saved in the run directory `args.evaluate` and prints how it did."""
    saved = read(args.evaluate / "policy.pt", "--evaluate")
    video = args.evaluate / f"evaluation-seed-{args.seed}" if args.capture_video else None
    envs = make_envs(saved["args"].env_id, args.eval_episodes, video)
    space = envs.single_action_space
    policy = Policy(envs.single_observation_space.shape[0], space.low, space.high, saved["args"].hidden_width)
    policy.load_state_dict(saved["policy"])
    try:
        returns, lengths = evaluate(policy, envs, np.random.SeedSequence(args.seed, spawn_key=(0,)))
        envs.close()  # writes the video of an episode that has not ended
    except (Fault, OSError) as error:
        fail(str(error))
    result = f"return {returns.mean():.1f} +- {returns.std():.1f}, length {lengths.mean():.0f}"
    print(f"{saved['args'].env_id}, {args.eval_episodes} deterministic episodes: {result}")
    if video:
        import imageio_ffmpeg

        try:
            imageio_ffmpeg.count_frames_and_secs(f"{video}-episode-0.mp4")  # on a full disk the encoder says nothing
            print(f"the first of them: {video}-episode-0.mp4")
        except RuntimeError:
            fail(f"the video {video}-episode-0.mp4 is not whole: make room on the disk")


def resumed(args: Args) -> tuple[Args, dict]:
    """Arguments and checkpoint of the run in `args.resume`; the command line may change what does no harm."""
    saved = read(args.resume / "checkpoint.pt", "--resume")
    before = replace(saved["args"], resume=args.resume, run_dir=None)
    args = tyro.cli(Args, default=before)
    for name in ("total_timesteps", "checkpoint_interval", "eval_interval", "eval_episodes", "device", "compile"):
        before = replace(before, **{name: getattr(args, name)})
    for name, value in vars(before).items():
        if getattr(args, name) != value:
            fail(f"--{name.replace('_', '-')} cannot change in a run that goes on: leave it out, or start a new run")
    return args, saved


def main():
    args, saved = tyro.cli(Args), None
    if args.resume:
        args, saved = resumed(args)
    check(args)
    if args.evaluate:
        evaluate_run(args)
    else:
        train(args, saved)


if __name__ == "__main__":
    main()
