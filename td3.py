# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "mujoco==4.0.0", "imageio==2.38.1",
#     "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1",
# ]
# ///
"""TD3: twin delayed deep deterministic policy gradient, in one file.

Paper: "Addressing Function Approximation Error in Actor-Critic Methods" (TD3, arXiv 1802.09477).

A deterministic policy climbs the first of two critics:
  - the target takes the smaller of the twins, against overestimation;
  - the target's action is blurred with clipped noise, so that the critics stay smooth around it;
  - policy and target networks move less often than the critics.

    step, as in TECRL (arXiv 2511.11592)    here
    PEV  policy evaluation, Eq. 11          pev()
    PIM  policy improvement, Eq. 14         pim()
    order, delay, target networks           Agent.update()

Shapes: B batch, S observation, A action dimensions. What the papers leave open is marked [ours].
Above the line of = signs is the algorithm. Below it, data and training: the same text in all four scripts.
"""

import copy
import difflib
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
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

ALGORITHM = "td3"


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
    """rate at which the target networks follow"""
    policy_delay: int = 2
    """critic updates per update of everything else"""
    hidden_width: int = 256
    """units in each of the three hidden layers"""
    policy_lr: float = 1e-4
    """learning rate of the policy"""
    critic_lr: float = 1e-4
    """learning rate of the critics"""
    exploration_noise: float = 0.1
    """noise of the acting policy, in half ranges of the action"""
    target_noise: float = 0.2
    """noise of the target policy, in half ranges of the action"""
    noise_clip: float = 0.5
    """bound of the target policy's noise, in half ranges of the action"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and replay live; auto takes CUDA when there is one"""
    compile: bool = True
    """go over to updates compiled by torch.compile once a helper has made them, during the first ones"""
    eval_interval: int = 50_000
    """steps between two evaluations"""
    eval_episodes: int = 10
    """episodes of one evaluation, played with the deterministic policy"""
    run_dir: Path | None = None
    """where the run is written; None: runs/<task>__<algorithm>__<seed>__<time>"""
    evaluate: Path | None = None
    """evaluate the policy saved in this run directory; of the other arguments --seed and --eval-episodes apply"""


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
    """Deterministic: action = center + half_range * tanh(u(obs)).

    low, high: (A,) bounds of the action space.
    """

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, hidden_width: int = 256):
        super().__init__()
        low, high = low.astype(np.float64), high.astype(np.float64)  # an int8 box would overflow below
        self.net = mlp(1, obs_dim, len(low), hidden_width)
        self.exploration_noise = 0.1  # in half ranges of the action
        self.register_buffer("center", torch.tensor((high + low) / 2, dtype=torch.float32))
        self.register_buffer("half_range", torch.tensor((high - low) / 2, dtype=torch.float32))

    def forward(self, obs: Tensor) -> Tensor:
        """obs (B, S) -> action (B, A)."""
        return self.center + self.half_range * self.net(obs.unsqueeze(0)).squeeze(0).tanh()

    def blur(self, action: Tensor, noise: Tensor) -> Tensor:
        """action (B, A) plus noise (B, A) in half ranges, clipped to the box."""
        low, high = self.center - self.half_range, self.center + self.half_range
        return (action + self.half_range * noise).clamp(low, high)

    @torch.inference_mode()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """obs (B, S) -> action (B, A): with exploration noise, or without when deterministic."""
        action = self(obs)
        if deterministic:
            return action
        return self.blur(action, self.exploration_noise * torch.randn(action.shape, device=action.device))


class TwinCritics(nn.Module):
    """Two action values: obs (B, S), action (B, A) -> Q (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_width: int = 256):
        super().__init__()
        self.net = mlp(2, obs_dim + action_dim, 1, hidden_width)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat((obs, action), -1).expand(2, -1, -1)).squeeze(-1)


def frozen(net: nn.Module):
    """The network as a function of its inputs alone: no gradient is computed for its weights."""
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    return lambda *inputs: torch.func.functional_call(net, weights, inputs)


def pev(critics, target_critics, batch, next_action, gamma):
    """PEV, policy evaluation (Eq. 11): both values towards the return.

    next_action (B, A) of the target policy at next_obs, blurred with noise.
    Returns the loss, tensors to log.
    """
    q = critics(batch.obs, batch.action)  # (2, B)
    with torch.no_grad():
        next_q = target_critics(batch.next_obs, next_action)  # (2, B)
        next_q = torch.minimum(next_q[0], next_q[1])
        y_q = batch.reward + gamma * (1 - batch.terminated) * next_q  # (B,)
    loss = F.mse_loss(q[0], y_q) + F.mse_loss(q[1], y_q)
    log = {"losses/pev": loss.detach(), "critic/q": q.detach(), "critic/target": y_q}
    return loss, log


def pim(policy, critics, obs):
    """PIM, policy improvement (Eq. 14): maximise the first Q; critics are constants.

    obs (B, S). Returns the loss.
    """
    q = frozen(critics)(obs, policy(obs))
    return -q[0].mean()


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
        self.policy.exploration_noise = args.exploration_noise
        self.critics = TwinCritics(obs_dim, action_dim, args.hidden_width)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        weights = dict(self.named_parameters())
        self.targets = [weight for name, weight in weights.items() if name.startswith("target_")]
        self.online = [weights[name.removeprefix("target_")] for name in weights if name.startswith("target_")]
        self.critic_weights = [weight for name, weight in weights.items() if "critic" in name and weight.requires_grad]
        self.critic_optimizer = torch.optim.Adam(self.critic_weights, args.critic_lr, fused=True, capturable=True)
        self.policy_weights = [*self.policy.parameters()]
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, fused=True, capturable=True)

    def critic_gradients(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Policy evaluation: gradients of `critic_weights`, tensors to log."""
        gamma, clip = self.args.gamma, self.args.noise_clip
        with torch.no_grad():
            noise = (self.args.target_noise * torch.randn_like(batch.action)).clamp(-clip, clip)
            next_action = self.target_policy.blur(self.target_policy(batch.next_obs), noise)
        pev_loss, log = pev(self.critics, self.target_critics, batch, next_action, gamma)
        return torch.autograd.grad(pev_loss, self.critic_weights), log

    def policy_gradients(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Policy improvement: gradients of `policy_weights`, tensors to log."""
        pim_loss = pim(self.policy, self.critics, batch.obs)
        return torch.autograd.grad(pim_loss, self.policy_weights), {"losses/pim": pim_loss.detach()}

    def update(self, batch: Batch, delayed: bool) -> dict[str, Tensor]:
        """One update; a delayed one moves not only the critics but everything else too. Returns tensors to log."""
        gradients, log = self.critic_gradients(batch)
        descend(self.critic_optimizer, self.critic_weights, gradients)
        if not delayed:
            return log

        gradients, policy_log = self.policy_gradients(batch)
        descend(self.policy_optimizer, self.policy_weights, gradients)
        with torch.no_grad():
            torch._foreach_lerp_(self.targets, self.online, self.args.tau)
        return log | policy_log


# ======================================================================================================================
# The harness: data and training, the same text in dsac_e.py, dsac_t.py, sac.py and td3.py.
# Of the algorithm it knows Args (in which any *_noise may be zero), Batch, Policy.act and Agent.update.

COMPILE_AFTER = 5_000  # updates that run as they are, while a helper compiles what the later ones use
LOG_INTERVAL = 500  # updates between two readings of the tensors to log: a reading waits for the device
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


def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """num_envs copies of the task, stepped in turn; the last observation of an episode is in infos["final_obs"].

    In turn because worker processes were slower on two cores, in ms per step of 20 copies: HalfCheetah 5.0 against
    1.5, Hopper 6.5 against 3.7, Humanoid 9.0 against 7.5.
    """
    gym.logger.min_level = gym.logger.ERROR  # else one deprecation notice for each copy of a v4 task
    mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else print(text, file=sys.stderr))
    try:
        makers = [lambda: gym.make(env_id, disable_env_checker=True)] * num_envs
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


def act(policy: Policy, obs: np.ndarray, space: gym.spaces.Box, deterministic: bool = False) -> np.ndarray:
    """obs (n, S) -> action (n, A), of the dtype and inside the box of `space`."""
    action = policy.act(torch.as_tensor(obs, dtype=torch.float32, device=policy.center.device), deterministic)
    action = action.cpu().numpy()
    if np.issubdtype(space.dtype, np.integer):
        action = action.round()
    return action.astype(space.dtype).clip(space.low, space.high)  # float32 may exceed the box by a rounding error


def evaluate(policy: Policy, envs: gym.vector.VectorEnv, seed: np.random.SeedSequence) -> tuple[np.ndarray, np.ndarray]:
    """One episode of the deterministic policy in each environment: returns and lengths, (num_envs,) each."""
    obs, _ = envs.reset(seed=seed.generate_state(envs.num_envs).tolist())
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, int)
    running, limit = np.ones(envs.num_envs, bool), envs.envs[0].spec.max_episode_steps or EVAL_LIMIT
    while running.any() and lengths.max() < limit:
        action = act(policy, obs, envs.single_action_space, deterministic=True)
        obs, reward, terminated, truncated, _ = envs.step(action)
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

    def add(self, obs, action, next_obs, reward, terminated):
        """n transitions, as arrays of n rows; once the ring is full they replace the n oldest."""
        columns = (obs, action, next_obs, reward[:, None], terminated[:, None])
        rows = torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe"))
        slots = torch.arange(self.added, self.added + len(rows), device=self.rows.device) % len(self.rows)
        self.rows[slots] = rows.to(self.rows.device)
        self.added += len(rows)
        self.filled.fill_(min(self.added, len(self.rows)))

    def sample(self, batch_size: int) -> Batch:
        """batch_size transitions, uniformly and with replacement."""
        # Not randint(filled): a CUDA graph would go on with the number that it was captured with.
        slots = torch.randint(2**62, (batch_size,), device=self.rows.device) % self.filled
        obs, action, next_obs, reward, terminated = self.rows.index_select(0, slots).split(self.widths, dim=1)
        return Batch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))


def compile_update(agent: Agent):
    """Compiles the two methods of agent that an update spends its time in."""
    torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad would end the graph
    agent.critic_gradients = torch.compile(agent.critic_gradients, fullgraph=True)
    agent.policy_gradients = torch.compile(agent.policy_gradients, fullgraph=True)


def compile_ahead(args: Args, obs_dim: int, low: np.ndarray, high: np.ndarray, device: torch.device):
    """Leaves a compiled update in torch's cache on disk. For a process of its own: the run need not wait for it."""
    os.nice(10)
    agent, buffer = Agent(args, obs_dim, low, high).to(device), ReplayBuffer(1, obs_dim, len(low), device)
    zeros = np.zeros((1, obs_dim)), np.zeros((1, len(low))), np.zeros((1, obs_dim)), np.zeros(1), np.zeros(1)
    buffer.add(*zeros)
    compile_update(agent)
    try:
        agent.update(buffer.sample(args.batch_size), delayed=True)
    except Exception as error:  # the compiler may raise anything
        sys.exit(f"{ALGORITHM}: updates stay uncompiled: {str(error).splitlines()[0]} (--no-compile: do not try)")


def record(agent: Agent, buffer: ReplayBuffer):
    """The two kinds of update as CUDA graphs, drawing the batch included: each is a single launch from then on."""
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


def save_policy(path: Path, args: Args, policy: Policy):
    """Writes what --evaluate needs; aside and then renamed, so that a crash leaves the previous file whole."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    torch.save({"algorithm": ALGORITHM, "args": plain, "policy": policy.state_dict()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(args: Args):
    """The whole run: act, store, update, evaluate, log, save."""
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    envs, eval_envs = make_envs(args.env_id, args.num_envs), make_envs(args.env_id, args.eval_episodes)
    space, obs_dim = envs.single_action_space, envs.single_observation_space.shape[0]
    torch.manual_seed(args.seed)
    agent = Agent(args, obs_dim, space.low, space.high).to(device)
    try:
        buffer = ReplayBuffer(args.buffer_size, obs_dim, len(space.low), device)
    except RuntimeError:  # what torch raises when memory does not suffice
        fail(f"--buffer-size {args.buffer_size} does not fit into the memory of {device}: choose a smaller one")
    task = re.sub(r"[^\w.-]+", "-", args.env_id)
    run_dir = args.run_dir or Path(f"runs/{task}__{ALGORITHM}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            fail(f"the run directory {run_dir} is not empty: name another with --run-dir")
        writer = SummaryWriter(str(run_dir), flush_secs=10)
    except OSError as error:
        fail(f"cannot write to the run directory {run_dir} ({error.strerror}): name another with --run-dir")
    rows = [f"|{name}|{value}|" for name, value in vars(args).items()]
    writer.add_text("hyperparameters", "\n".join(["|argument|value|", "|-|-|", *rows]))

    def update(delayed: bool) -> dict[str, Tensor]:
        return agent.update(buffer.sample(args.batch_size), delayed)

    caught, helper = [], None
    if args.compile and args.total_timesteps - args.learning_starts > 2 * COMPILE_AFTER * args.num_envs:
        arguments = args, obs_dim, space.low, space.high, device
        helper = multiprocessing.get_context("spawn").Process(target=compile_ahead, args=arguments, daemon=True)

    def catch(signum, frame):  # the first Ctrl-C or SIGTERM ends the run in order, the second at once
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    gib = buffer.rows.nbytes / 2**30
    print(f"{args.env_id} on {device}, up to {gib:.2g} GiB of replay, writing to {run_dir}", flush=True)
    bar = tqdm(total=args.total_timesteps, unit=" steps", unit_scale=True, dynamic_ncols=True, disable=None)
    obs, _ = envs.reset(seed=np.random.SeedSequence(args.seed).generate_state(args.num_envs).tolist())
    episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
    step, updates, log, shown = 0, 0, {}, {}
    logged_step, logged_time = 0, time.perf_counter()
    while True:
        finished = step >= args.total_timesteps
        if finished or caught or step % args.eval_interval < args.num_envs:  # steps may jump over the very multiple
            if not all(weight.isfinite().all() for weight in agent.policy.parameters()):
                sys.exit(f"step {step}, not finite: policy; last good policy: {run_dir}/policy.pt")
            save_policy(run_dir / "policy.pt", args, agent.policy)
            if caught:
                break
            seed = np.random.SeedSequence(args.seed, spawn_key=(step,))  # spawned: no training environment shares it
            returns, lengths = evaluate(agent.policy, eval_envs, seed)
            writer.add_scalar("eval/episodic_return", returns.mean(), step)
            writer.add_scalar("eval/episodic_return_std", returns.std(), step)
            writer.add_scalar("eval/episodic_length", lengths.mean(), step)
            shown["return"] = f"{returns.mean():.1f} +- {returns.std():.1f}"
            bar.set_postfix(shown, refresh=False)
            if bar.disable:  # no terminal to draw in
                print(f"step {step}:", ", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
            if finished:
                break

        action = act(agent.policy, obs, space)
        if step >= max(args.learning_starts, 1):
            # The update comes before the environments step: on a GPU it then runs while they do.
            updates += 1
            log |= update(updates % args.policy_delay == 0)
            if updates % LOG_INTERVAL == 0:
                scalars = to_numbers(log)
                broken = [tag for tag, value in scalars.items() if not math.isfinite(value)]
                if broken:
                    sys.exit(f"step {step}, not finite: {', '.join(broken)}; last good policy: {run_dir}/policy.pt")
                scalars["charts/SPS"] = (step - logged_step) / (time.perf_counter() - logged_time)
                logged_step, logged_time = step, time.perf_counter()
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, step)
                if "losses/alpha" in scalars:
                    shown["alpha"] = f"{scalars['losses/alpha']:.3g}"
                bar.set_postfix(shown, refresh=False)
            if helper and updates == 1:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the helper inherits this: Ctrl-C is for the run alone
                helper.start()
                signal.signal(signal.SIGINT, catch)
            if helper and updates == COMPILE_AFTER:
                helper.join()
                if helper.exitcode == 0:
                    compile_update(agent)
            if helper and updates == COMPILE_AFTER + 10 and device.type == "cuda":  # by then everything ran once
                update = record(agent, buffer)
        next_obs, reward, terminated, truncated, infos = envs.step(action)
        step += args.num_envs
        bar.update(args.num_envs)
        done = terminated | truncated
        final_obs = next_obs
        if done.any():  # there, next_obs is already the first of the next episode
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

    bar.close()
    writer.close()
    envs.close()
    eval_envs.close()
    print(", ".join([f"{'interrupted' if caught else 'finished'} at step {step}", *map(" ".join, shown.items())]))
    print(f"evaluate: python {sys.argv[0]} --evaluate {run_dir}\ncurves:   tensorboard --logdir {run_dir.parent}")
    if caught:
        raise SystemExit(128 + caught[0])


def evaluate_run(args: Args):
    """Plays the policy saved in the run directory `args.evaluate` and prints how it did."""
    path = args.evaluate / "policy.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        algorithm, env_id, width = saved["algorithm"], saved["args"]["env_id"], saved["args"]["hidden_width"]
    except Exception as error:  # whatever torch.load makes of a file that is missing, damaged or something else
        fail(f"{path} holds no policy ({type(error).__name__}): name the directory of a run")
    if algorithm != ALGORITHM:
        fail(f"{args.evaluate} is a run of {algorithm}: use python {algorithm}.py --evaluate {args.evaluate}")
    envs = make_envs(env_id, args.eval_episodes)
    space = envs.single_action_space
    policy = Policy(envs.single_observation_space.shape[0], space.low, space.high, width)
    policy.load_state_dict(saved["policy"])
    returns, lengths = evaluate(policy, envs, np.random.SeedSequence(args.seed, spawn_key=(0,)))
    result = f"return {returns.mean():.1f} +- {returns.std():.1f}, length {lengths.mean():.0f}"
    print(f"{env_id}, {args.eval_episodes} deterministic episodes: {result}")


def main():
    args = tyro.cli(Args)
    check(args)
    if args.evaluate:
        evaluate_run(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
