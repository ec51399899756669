# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "mujoco==4.0.0",
#     "imageio==2.38.1",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
# ]
# ///
"""DSAC-E: distributional soft actor-critic under a trajectory entropy constraint, in one file.

Paper: "Mind Your Entropy: From Maximum Entropy to Trajectory Entropy-Constrained RL" (TECRL, arXiv 2511.11592).
It extends DSAC-T (arXiv 2310.05858).

Maximum-entropy methods add alpha * entropy to the reward. Every change of the temperature alpha then moves the
target of the critic, and alpha itself is tuned on the entropy of single steps. DSAC-E separates the two:
  - twin critics Q learn the return of the reward alone, as Gaussian distributions N(Q, sigma^2);
  - one more critic Qe learns the entropy that the policy will have, discounted, along the rest of its trajectory;
  - the policy maximises Q + alpha * (its entropy now + Qe), and alpha is the multiplier of the constraint
    E[-log pi + Qe] >= rho * H0 / (1 - gamma), with H0 = -(number of action dimensions).

    TECRL paper                          here
    PEV  policy evaluation     Eq. 11    pev()    Q and sigma towards the reward's return; no alpha
    PIS  policy introspection  Eq. 12-13 pis()    Qe towards the discounted entropy to come; no alpha, no reward
    PIM  policy improvement    Eq. 14    pim()    the policy
    TUP  temperature update    Eq. 15    tup()    alpha
    order, delay, target networks        Agent.update()

Shapes: B batch, S observation, A action dimensions. Entropies are in nats. What a paper leaves open is marked [ours].
Above the line of '=' is the algorithm. Below it, data and training: the same text in all four scripts.
"""

import copy
import difflib
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "dsac_e"


@dataclass
class Args:
    """DSAC-E: train on one gymnasium task, or evaluate what a run has learned. Steps are environment steps."""

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
    """rate at which the target networks (and the mean of sigma) follow"""
    policy_delay: int = 2
    """policy, alpha and target networks move at every so many critic updates"""
    hidden_width: int = 256
    """units in each of the three hidden layers"""
    policy_lr: float = 1e-4
    """learning rate of the policy"""
    critic_lr: float = 1e-4
    """learning rate of the critics"""
    alpha_lr: float = 3e-4
    """learning rate of log(alpha)"""
    rho: float | None = None
    """scale of the entropy budget; a larger rho asks for less entropy (default: 20 for Humanoid and Walker2d, else 1)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and replay live; auto takes CUDA when there is one"""
    compile: bool = False
    """compile the update with torch.compile (needs a C++ compiler; the first updates then take a minute)"""
    eval_interval: int = 50_000
    """steps between two evaluations"""
    eval_episodes: int = 10
    """episodes of one evaluation, played with the deterministic policy"""
    run_dir: Path | None = None
    """where the run is written (default: runs/<task>__<algorithm>__<seed>__<time>)"""
    evaluate: Path | None = None
    """evaluate the policy saved in this run directory instead of training"""

    def __post_init__(self):
        if self.rho is None:
            self.rho = 20.0 if re.search(r"(Humanoid|Walker2d)-v\d+$", self.env_id) else 1.0


class Batch(NamedTuple):
    """Transitions. `terminated` is 1 where the task ended, and 0 where a time limit merely cut the episode."""

    obs: Tensor  # (B, S)
    action: Tensor  # (B, A), in the environment's own units
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, S)
    terminated: Tensor  # (B,)


class Linear(nn.Module):
    """n linear layers side by side, (n, B, fan_in) -> (n, B, fan_out), each initialised as nn.Linear would be."""

    def __init__(self, n: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(n, fan_out, fan_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.transpose(1, 2))


def mlp(n: int, inputs: int, outputs: int, width: int) -> nn.Sequential:
    """n independent networks in one: (n, B, inputs) -> (n, B, outputs), three hidden GELU layers, linear outputs."""
    hidden = [layer for fan_in in (inputs, width, width) for layer in (Linear(n, fan_in, width), nn.GELU())]
    return nn.Sequential(*hidden, Linear(n, width, outputs))


class Policy(nn.Module):
    """Squashed Gaussian: action = center + half_range * tanh(u), u ~ N(mu(obs), std(obs)).

    low, high: (A,) bounds of the action space.
    """

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(1, obs_dim, 2 * len(low), hidden_width)
        self.register_buffer("center", torch.as_tensor((high + low) / 2, dtype=torch.float32))
        self.register_buffer("half_range", torch.as_tensor((high - low) / 2, dtype=torch.float32))

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, S), standard normal noise (B, A) -> action (B, A), log pi(action|obs) (B,).

        The density is per unit of the environment's own action, which is what gives H0 = -A its meaning.
        """
        mu, log_std = self.net(obs.unsqueeze(0)).squeeze(0).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 0.5)
        u = mu + log_std.exp() * noise
        # log(1 - tanh(u)^2) in a form that stays exact where tanh(u) rounds to 1.
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.half_range.log()
        log_prob = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2 - log_slope
        return self.center + self.half_range * u.tanh(), log_prob.sum(-1)

    @torch.inference_mode()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """obs (B, S) -> action (B, A): a sample, or the squashed mean when deterministic."""
        shape = (len(obs), len(self.center))
        noise = torch.zeros(shape, device=obs.device) if deterministic else torch.randn(shape, device=obs.device)
        return self(obs, noise)[0]


class TwinCritics(nn.Module):
    """Two Gaussian value distributions N(Q, sigma^2): obs (B, S), action (B, A) -> Q (2, B), sigma (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(2, obs_dim + action_dim, 2, hidden_width)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        q, raw = self.net(torch.cat((obs, action), -1).expand(2, -1, -1)).unbind(-1)
        return q, F.softplus(raw)


class EntropyCritic(nn.Module):
    """Qe(s, a) = E[sum over t >= 1 of gamma^t H(pi|s_t)]: obs (B, S), action (B, A) -> (B,), in nats."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(1, obs_dim + action_dim, 1, hidden_width)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat((obs, action), -1).unsqueeze(0)).squeeze((0, -1))


def frozen(net: nn.Module):
    """The network as a function of its inputs alone: no gradient is computed for its weights."""
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    return lambda *inputs: torch.func.functional_call(net, weights, inputs)


def pev(critics, target_critics, batch, next_action, noise, sigma_mean, gamma, tau):
    """PEV, policy evaluation (Eq. 11): both value distributions towards the return of the reward alone.

    next_action (B, A) ~ target policy at next_obs; noise (B,) standard normal;
    sigma_mean (2,) running mean of each twin's sigma, 0 before the first batch.
    Returns the loss, whose gradient (not its value) is the paper's; the new sigma_mean; tensors to log.
    """
    q, sigma = critics(batch.obs, batch.action)  # (2, B)
    with torch.no_grad():
        next_q, next_sigma = target_critics(batch.next_obs, next_action)  # (2, B)
        smaller = next_q.argmin(0, keepdim=True)  # the twin with the smaller mean, per sample
        next_q, next_sigma = next_q.gather(0, smaller), next_sigma.gather(0, smaller)  # (1, B)
        discount = gamma * (1 - batch.terminated)
        y_q = batch.reward + discount * next_q  # DSAC-T refinement 1: the expected target moves the mean
        y_z = batch.reward + discount * (next_q + next_sigma * noise.clamp(-3, 3))  # the sampled one moves sigma
        sigma_mean = torch.where(sigma_mean > 0, sigma_mean.lerp(sigma.mean(1), tau), sigma.mean(1))
        bound = 3 * sigma_mean.unsqueeze(1)
        y_z = y_z.clamp(q - bound, q + bound)  # (2, B)
        # DSAC-T refinement 3: variance-based scaling of the gradient of the Gaussian log-likelihood.
        eps = 0.1
        weight = sigma_mean.square().unsqueeze(1) + eps
        q_gradient = -weight * (y_q - q) / (sigma**2 + eps)
        sigma_gradient = -weight * ((y_z - q) ** 2 - sigma**2) / (sigma**3 + eps)
    loss = (q_gradient * q + sigma_gradient * sigma).mean(1).sum()
    return loss, sigma_mean, {"critic/q": q.detach(), "critic/sigma": sigma.detach(), "critic/target": y_q}


def pis(entropy_critic, target_entropy_critic, batch, next_action, next_log_prob, gamma):
    """PIS, policy introspection (Eq. 12-13): Qe towards the discounted entropy from the next state on.

    next_action (B, A), next_log_prob (B,): the sample of the target policy that PEV uses too.
    Returns the loss and tensors to log.
    """
    with torch.no_grad():
        # [ours] one-sample estimate of the entropy, -log pi: unbiased, and the quantity that PIM and TUP see.
        next_entropy = -next_log_prob
        next_qe = target_entropy_critic(batch.next_obs, next_action)
        y_e = gamma * (1 - batch.terminated) * (next_entropy + next_qe)
    qe = entropy_critic(batch.obs, batch.action)
    return F.mse_loss(qe, y_e), {"entropy/qe": qe.detach()}


def pim(policy, critics, entropy_critic, obs, noise, alpha):
    """PIM, policy improvement (Eq. 14): maximise min Q + alpha * (-log pi + Qe), critics frozen, alpha constant.

    obs (B, S), noise (B, A) standard normal, alpha (). Returns the loss and, (B,) each without a gradient,
    the policy's entropy estimate -log pi and the trajectory entropy -log pi + Qe.
    """
    action, log_prob = policy(obs, noise)
    q, _ = frozen(critics)(obs, action)
    trajectory_entropy = -log_prob + frozen(entropy_critic)(obs, action)
    loss = -(torch.minimum(q[0], q[1]) + alpha.detach() * trajectory_entropy).mean()
    return loss, -log_prob.detach(), trajectory_entropy.detach()


def tup(log_alpha, trajectory_entropy, budget):
    """TUP, temperature update (Eq. 15): minimised, so alpha falls while there is more entropy than the budget.

    log_alpha (), trajectory_entropy (B,) from PIM, budget in nats. Returns the loss.
    """
    return log_alpha.exp() * (trajectory_entropy.detach().mean() - budget)


class Agent(nn.Module):
    """Everything that learns, and the order in which it learns."""

    def __init__(self, args: Args, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.args = args
        self.policy = Policy(obs_dim, low, high, args.hidden_width)
        self.critics = TwinCritics(obs_dim, len(low), args.hidden_width)
        self.entropy_critic = EntropyCritic(obs_dim, len(low), args.hidden_width)
        self.target_policy, self.target_critics, self.target_entropy_critic = (
            copy.deepcopy(net).requires_grad_(False) for net in (self.policy, self.critics, self.entropy_critic)
        )
        self.log_alpha = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("sigma_mean", torch.zeros(2))
        budget = args.rho * -len(low) / (1 - args.gamma)  # rho * H0 / (1 - gamma), H0 = -A
        self.register_buffer("budget", torch.tensor(budget), persistent=False)

        critic_weights = [*self.critics.parameters(), *self.entropy_critic.parameters()]
        self.critic_optimizer = torch.optim.Adam(critic_weights, lr=args.critic_lr, fused=True)
        policy_group = {"params": [*self.policy.parameters()], "lr": args.policy_lr}
        alpha_group = {"params": [self.log_alpha], "lr": args.alpha_lr}
        self.policy_optimizer = torch.optim.Adam([policy_group, alpha_group], fused=True)
        self.online = [*self.policy.parameters(), *critic_weights]
        targets = (self.target_policy, self.target_critics, self.target_entropy_critic)
        self.targets = [weight for net in targets for weight in net.parameters()]

    def update(self, batch: Batch, delayed: bool) -> dict[str, Tensor]:
        """One update; the policy, alpha and the targets move in the delayed ones only. Returns tensors to log."""
        args = self.args
        with torch.no_grad():
            noise = torch.randn_like(batch.action)
            next_action, next_log_prob = self.target_policy(batch.next_obs, noise)
        pev_loss, sigma_mean, metrics = pev(
            self.critics, self.target_critics, batch, next_action, torch.randn_like(batch.reward),
            self.sigma_mean, args.gamma, args.tau,
        )  # fmt: skip
        pis_loss, pis_metrics = pis(
            self.entropy_critic, self.target_entropy_critic, batch, next_action, next_log_prob, args.gamma
        )
        self.critic_optimizer.zero_grad()
        (pev_loss + pis_loss).backward()  # two losses of separate weights, one optimiser step
        self.critic_optimizer.step()
        self.sigma_mean.copy_(sigma_mean)
        metrics |= {"losses/pev_loss": pev_loss.detach(), "losses/pis_loss": pis_loss.detach(), **pis_metrics}
        if not delayed:
            return metrics

        noise = torch.randn_like(batch.action)
        pim_loss, entropy, trajectory_entropy = pim(
            self.policy, self.critics, self.entropy_critic, batch.obs, noise, self.log_alpha.exp()
        )
        tup_loss = tup(self.log_alpha, trajectory_entropy, self.budget)
        self.policy_optimizer.zero_grad()
        (pim_loss + tup_loss).backward()
        self.policy_optimizer.step()
        with torch.no_grad():
            # [ours] Far from its budget log(alpha) drifts for the whole run, and exp would leave float32.
            self.log_alpha.clamp_(-20, 20)
            torch._foreach_lerp_(self.targets, self.online, args.tau)
        return metrics | {
            "losses/pim_loss": pim_loss.detach(),
            "losses/alpha_loss": tup_loss.detach(),
            "losses/alpha": self.log_alpha.detach().exp(),
            "entropy/policy": entropy,
            "entropy/trajectory": trajectory_entropy,
            "entropy/budget": self.budget,
        }


# ======================================================================================================================
# The harness: data and training, the same text in dsac_e.py, dsac_t.py, sac.py and td3.py.
# It knows the algorithm as Args, Batch, Policy.act and Agent.update.

LOG_INTERVAL = 500  # updates between two readings of the metrics: reading them waits for the device


def fail(message: str) -> NoReturn:
    """Ends the program with one line and exit code 2: what is wrong, and what to type instead."""
    print(f"{ALGORITHM}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(args: Args):
    """Refuses arguments that cannot work, before anything is built."""
    if not 0 <= args.gamma < 1:
        fail(f"--gamma must lie in [0, 1), not {args.gamma}")
    for name, value in vars(args).items():
        lowest = 0 if name in ("seed", "gamma", "learning_starts") else sys.float_info.min
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not lowest <= value < math.inf:
            fail(f"--{name.replace('_', '-')} must be {'at least 0' if lowest == 0 else 'positive'}, not {value}")
    if args.tau > 1:
        fail(f"--tau must lie in (0, 1], not {args.tau}")
    if args.buffer_size < max(args.batch_size, args.num_envs):
        fail(f"--buffer-size {args.buffer_size} must hold --batch-size {args.batch_size} and --num-envs {args.num_envs}")
    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} must be below --total-timesteps {args.total_timesteps}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: this PyTorch sees no CUDA device; use --device cpu")


def explain(env_id: str, error: Exception) -> str:
    """Why gymnasium could not make env_id, and which id to type instead."""
    name = re.sub(r"-v\d+$", "", env_id)
    newer = [f"{name}-v{n}" for n in (4, 5) if f"{name}-v{n}" in gym.registry and f"{name}-v{n}" != "Pusher-v4"]
    if isinstance(error, ImportError) and newer and env_id not in newer:
        why = "needs mujoco < 3" if env_id == "Pusher-v4" else "(a v3-or-older task, as in the papers) needs mujoco-py"
        return f"{env_id} {why}, which is no longer supported; use --env-id {' or '.join(newer)}"
    if isinstance(error, gym.error.UnregisteredEnv | gym.error.DeprecatedEnv):
        known = {known.lower(): known for known in gym.registry}
        close = newer or [known[match] for match in difflib.get_close_matches(env_id.lower(), known, n=3)]
        return f"there is no task {env_id!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
    return f"gymnasium could not make {env_id}: {error}".splitlines()[0]


def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """num_envs copies of the task, stepped in turn; an episode's last observation is in infos["final_obs"].

    In turn, since worker processes were slower on two cores (20 copies: HalfCheetah 5.0 ms against 1.5 ms, Hopper
    6.5 against 3.7, Humanoid 9.0 against 7.5).
    """
    gym.logger.min_level = gym.logger.ERROR  # a v4 id is deprecated: one warning per copy, for what the papers use
    mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else print(text, file=sys.stderr))
    try:
        thunks = [lambda: gym.make(env_id, disable_env_checker=True)] * num_envs
        envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except Exception as error:  # whatever a third-party task raises, the user gets a line
        fail(explain(env_id, error))
    obs, action = envs.single_observation_space, envs.single_action_space
    if not (isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1):
        fail(f"{env_id} observes {obs}, but only flat vectors work: choose or register a task with a 1-D Box observation")
    if not (isinstance(action, gym.spaces.Box) and len(action.shape) == 1):
        fail(f"{env_id} acts in {action}, but only continuous actions work: choose a task with a 1-D Box action")
    span = action.high.astype(np.float64) - action.low.astype(np.float64)
    if not (np.all(0 < span) and np.all(span < np.finfo(np.float32).max)):
        fail(f"{env_id} has an unbounded (or empty) action range: wrap it in gymnasium.wrappers.RescaleAction")
    return envs


def act(policy: Policy, obs: np.ndarray, space: gym.spaces.Box, deterministic: bool = False) -> np.ndarray:
    """obs (n, S) -> action (n, A) in the dtype and inside the box of `space`, the task's action space."""
    obs = torch.as_tensor(obs, dtype=torch.float32, device=policy.center.device)
    action = policy.act(obs, deterministic).cpu().numpy()
    if np.issubdtype(space.dtype, np.integer):
        action = action.round()
    return action.astype(space.dtype).clip(space.low, space.high)  # rounding may step out of the box by one ulp


def evaluate(policy: Policy, envs: gym.vector.VectorEnv, seed: np.random.SeedSequence) -> tuple[np.ndarray, np.ndarray]:
    """Plays one deterministic episode in each environment. Returns their returns and lengths, (num_envs,) each."""
    obs, _ = envs.reset(seed=seed.generate_state(envs.num_envs).tolist())
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, int)
    running = np.ones(envs.num_envs, bool)
    while running.any():
        obs, reward, terminated, truncated, _ = envs.step(act(policy, obs, envs.single_action_space, True))
        returns[running] += reward[running]
        lengths[running] += 1
        running &= ~(terminated | truncated)
    return returns, lengths


class ReplayBuffer:
    """Ring of the last `capacity` transitions, each one packed row: a batch is a single gather."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = (obs_dim, action_dim, obs_dim, 1, 1)
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.added = 0

    def add(self, obs, action, next_obs, reward, terminated):
        """Arrays of n rows each; reward and terminated (n,). The oldest n rows make way."""
        columns = (obs, action, next_obs, reward[:, None], terminated[:, None])
        rows = torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe"))
        at = torch.arange(self.added, self.added + len(rows)) % len(self.rows)
        self.rows[at.to(self.rows.device)] = rows.to(self.rows.device)
        self.added += len(rows)

    def sample(self, batch_size: int) -> Batch:
        """batch_size transitions drawn uniformly, with replacement."""
        at = torch.randint(min(self.added, len(self.rows)), (batch_size,), device=self.rows.device)
        obs, action, next_obs, reward, terminated = self.rows.index_select(0, at).split(self.widths, dim=1)
        return Batch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))


def read(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The metrics as numbers, in one transfer from the device: of a batch of values, their mean and spread."""
    scalars = {}
    for tag, value in metrics.items():
        scalars |= {tag: value} if value.dim() == 0 else {f"{tag}_mean": value.mean(), f"{tag}_std": value.std()}
    return dict(zip(scalars, torch.stack([*scalars.values()]).tolist(), strict=True))


def save_policy(path: Path, args: Args, policy: Policy):
    """Writes what --evaluate needs; whoever dies while writing leaves the previous file whole."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    torch.save({"algorithm": ALGORITHM, "args": plain, "policy": policy.state_dict()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(args: Args):
    """The whole run: collect, update, evaluate, log and save, in `args.run_dir`."""
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    envs, eval_envs = make_envs(args.env_id, args.num_envs), make_envs(args.env_id, args.eval_episodes)
    space, obs_dim = envs.single_action_space, envs.single_observation_space.shape[0]
    task = re.sub(r"\W+", "-", args.env_id)
    run_dir = args.run_dir or Path("runs", f"{task}__{ALGORITHM}__{args.seed}__{int(time.time())}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            fail(f"--run-dir {run_dir} is not empty: name a new directory")
        writer = SummaryWriter(str(run_dir))
    except OSError as error:
        fail(f"cannot write to the run directory {run_dir} ({error.strerror}): name another with --run-dir")
    rows = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{rows}")

    torch.manual_seed(args.seed)
    agent = Agent(args, obs_dim, space.low, space.high).to(device)
    update = torch.compile(agent.update) if args.compile else agent.update
    buffer = ReplayBuffer(args.buffer_size, obs_dim, len(space.low), device)
    caught = []  # the first Ctrl-C or SIGTERM ends the run in order, a second one at once

    def catch(signum, frame):
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, catch)

    print(f"{args.env_id} on {device}, {args.total_timesteps} steps, into {run_dir}")
    bar = tqdm(total=args.total_timesteps, unit=" steps", unit_scale=True, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 60)  # fmt: skip
    obs, _ = envs.reset(seed=np.random.SeedSequence(args.seed).generate_state(args.num_envs).tolist())
    episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
    step, updates, metrics, shown = 0, 0, {}, {}
    logged_step, logged_time = 0, time.perf_counter()
    while True:
        last = step >= args.total_timesteps or bool(caught)
        if step % args.eval_interval < args.num_envs or last:
            seed = np.random.SeedSequence(args.seed, spawn_key=(step,))  # spawned: never the training environments'
            returns, lengths = evaluate(agent.policy, eval_envs, seed)
            writer.add_scalar("eval/episodic_return", returns.mean(), step)
            writer.add_scalar("eval/episodic_return_std", returns.std(), step)
            writer.add_scalar("eval/episodic_length", lengths.mean(), step)
            save_policy(run_dir / "policy.pt", args, agent.policy)
            shown["return"] = f"{returns.mean():.1f}"
            bar.set_postfix(shown, refresh=False)
        if last:
            break

        action = act(agent.policy, obs, space)
        next_obs, reward, terminated, truncated, infos = envs.step(action)
        step += args.num_envs
        bar.update(args.num_envs)
        done = terminated | truncated
        final_obs = next_obs
        if done.any():  # next_obs already belongs to the next episode there
            final_obs = next_obs.copy()
            final_obs[done] = np.stack(infos["final_obs"][done])
        buffer.add(obs, action, final_obs, reward, terminated)
        obs = next_obs
        episode_return += reward
        episode_length += 1
        for i in done.nonzero()[0]:
            writer.add_scalar("charts/episodic_return", episode_return[i], step)
            writer.add_scalar("charts/episodic_length", episode_length[i], step)
            episode_return[i] = episode_length[i] = 0

        if step >= args.learning_starts:
            updates += 1
            metrics |= update(buffer.sample(args.batch_size), updates % args.policy_delay == 0)
            if updates % LOG_INTERVAL == 0:
                scalars = read(metrics)
                broken = [tag for tag, value in scalars.items() if not math.isfinite(value)]
                if broken:
                    sys.exit(f"stopped at step {step}: {', '.join(broken)} not finite; {run_dir}/policy.pt is older")
                scalars["charts/SPS"] = (step - logged_step) / (time.perf_counter() - logged_time)
                logged_step, logged_time = step, time.perf_counter()
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, step)
                if "losses/alpha" in scalars:
                    shown["alpha"] = f"{scalars['losses/alpha']:.3g}"
                bar.set_postfix(shown, refresh=False)

    bar.close()
    writer.close()
    envs.close()
    eval_envs.close()
    print(f"{'interrupted' if caught else 'done'} at step {step}: mean return {returns.mean():.1f} +- {returns.std():.1f}")
    print(f"again: python {sys.argv[0]} --evaluate {run_dir}    curves: tensorboard --logdir {run_dir.parent}")
    if caught:
        raise SystemExit(128 + caught[0])


def evaluate_run(args: Args):
    """Plays the policy saved in `args.evaluate` and prints its returns."""
    try:
        saved = torch.load(args.evaluate / "policy.pt", map_location="cpu", weights_only=True)
        if saved["algorithm"] != ALGORITHM:
            fail(f"{args.evaluate} is a run of {saved['algorithm']}: use python {saved['algorithm']}.py --evaluate")
        env_id, width, weights = saved["args"]["env_id"], saved["args"]["hidden_width"], saved["policy"]
    except FileNotFoundError:
        fail(f"{args.evaluate} is not a run: it has no policy.pt; name a directory under runs/")
    except Exception as error:
        fail(f"{args.evaluate}/policy.pt is not a policy saved by this script ({type(error).__name__})")
    envs = make_envs(env_id, args.eval_episodes)
    space = envs.single_action_space
    policy = Policy(envs.single_observation_space.shape[0], space.low, space.high, width)
    policy.load_state_dict(weights)
    returns, lengths = evaluate(policy, envs, np.random.SeedSequence(args.seed, spawn_key=(0,)))
    print(f"{env_id}, {len(returns)} deterministic episodes: return {returns.mean():.1f} +- {returns.std():.1f}, "
          f"length {lengths.mean():.0f}")  # fmt: skip


def main():
    args = tyro.cli(Args)
    check(args)
    evaluate_run(args) if args.evaluate else train(args)


if __name__ == "__main__":
    main()
