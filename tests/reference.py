"""The four algorithms in NumPy and float64, written from the papers' formulas, and helpers of the tests.

`Reference` shares no code with the scripts: it has its own reverse-mode differentiation (`Var`) and Adam.
"""

import math

import numpy as np
import pytest
import torch

import dsac_e
import dsac_t
import sac
import td3

SCRIPTS = {"dsac_e": dsac_e, "dsac_t": dsac_t, "sac": sac, "td3": td3}
STOCHASTIC = {"dsac_e": dsac_e, "dsac_t": dsac_t, "sac": sac}  # with a temperature
every_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
every_stochastic = pytest.mark.parametrize("script", STOCHASTIC.values(), ids=STOCHASTIC)
S, B, WIDTH = 3, 16, 5  # observation dimensions, batch size, hidden units
LOW, HIGH = np.array([-0.5, -2.0]), np.array([1.5, 1.0])  # asymmetric, exact in float32
A = len(LOW)
GAMMA, TAU, LOG_ALPHA, RHO = 0.9, 0.05, -0.4, 1.5
RATES = {"policy_lr": 3e-3, "critic_lr": 2e-3, "alpha_lr": 5e-3}
TD3_NOISE = {"target_noise": 0.6, "noise_clip": 0.5}
# variant: script and arguments that differ from its defaults
VARIANTS = {
    "dsac_e": (dsac_e, {"rho": RHO}),
    "center_entropy": (dsac_e, {"rho": RHO, "center_entropy": True}),
    "no_tec": (dsac_e, {"rho": RHO, "tec": False}),
    "no_tec_no_res": (dsac_e, {"rho": RHO, "tec": False, "res": False}),
    "dsac_t": (dsac_t, {}),
    "sac": (sac, {}),
    "td3": (td3, TD3_NOISE),
}


def make_agent(script, log_alpha=LOG_ALPHA, **arguments):
    """A float64 agent. Its weights are large enough to reach every branch; targets differ from online."""
    rates = {name: rate for name, rate in RATES.items() if name in script.Args.__dataclass_fields__}
    arguments = {"env_id": "Ant-v4", "gamma": GAMMA, "tau": TAU, "hidden_width": WIDTH} | rates | arguments
    agent = script.Agent(script.Args(**arguments), S, LOW, HIGH).double()
    rng = np.random.default_rng(41)
    with torch.no_grad():
        for name, weight in agent.named_parameters():
            weight.copy_(torch.from_numpy(rng.normal(0, 0.6, weight.shape)))
            if name == "log_alpha":
                weight.fill_(log_alpha)
    return agent


def make_batch(script, seed, dtype=torch.float64):
    """Random transitions, a quarter of them terminal."""
    rng = np.random.default_rng(seed)
    columns = {
        "obs": rng.normal(0, 1, (B, S)),
        "action": rng.uniform(LOW, HIGH, (B, A)),
        "reward": rng.normal(0, 3, B),
        "next_obs": rng.normal(0, 1, (B, S)),
        "terminated": np.arange(B) % 4 == 1,
    }
    return script.Batch(**{name: torch.tensor(column, dtype=dtype) for name, column in columns.items()})


def unstack(tensors):
    """Weights of n stacked networks as n lists [W (fan_in, fan_out), b (fan_out,), ...]."""
    arrays = [tensor.detach().numpy().copy() for tensor in tensors]
    return [[a[i].T if j % 2 == 0 else a[i, 0] for j, a in enumerate(arrays)] for i in range(len(arrays[0]))]


def weights_of(agent):
    """A copy of every parameter and buffer of the agent, by name."""
    tensors = [*agent.named_parameters(), *agent.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


erf = np.vectorize(math.erf, otypes=[float])


class Var:
    """An array with its sources: pairs of a Var and the function from this gradient to that of the source."""

    def __init__(self, value, *sources):
        self.value, self.sources, self.grad = np.asarray(value, np.float64), sources, 0.0

    def __add__(self, other):
        return Var(self.value + var(other).value, (self, lambda g: g), (var(other), lambda g: g))

    def __mul__(self, other):
        x, y = self.value, var(other).value
        return Var(x * y, (self, lambda g: g * y), (var(other), lambda g: g * x))

    def __matmul__(self, other):
        x, y = self.value, other.value
        return Var(x @ y, (self, lambda g: g @ y.T), (other, lambda g: x.T @ g))

    def __getitem__(self, index):
        def pull(g):
            full = np.zeros_like(self.value)
            full[index] = g
            return full

        return Var(self.value[index], (self, pull))

    def sum(self):
        """Over the last axis."""
        return Var(self.value.sum(-1), (self, lambda g: np.repeat(g[..., None], self.value.shape[-1], -1)))


def var(x):
    return x if isinstance(x, Var) else Var(x)


def elementwise(x, value, slope):
    return Var(value, (x, lambda g: g * slope))


def gelu(x):
    below = (1 + erf(x.value / math.sqrt(2))) / 2
    density = np.exp(-(x.value**2) / 2) / math.sqrt(2 * math.pi)
    return elementwise(x, x.value * below, below + x.value * density)


def tanh(x):
    return elementwise(x, np.tanh(x.value), 1 / np.cosh(x.value) ** 2)


def softplus(x):
    return elementwise(x, np.log1p(np.exp(x.value)), 1 / (1 + np.exp(-x.value)))


def backward(*ends):
    """Sets .grad of everything behind the ends: pairs of a Var and the gradient of the loss for it."""
    order, seen = [], set()

    def visit(node):
        if id(node) not in seen:
            seen.add(id(node))
            for source, _ in node.sources:
                visit(source)
            order.append(node)

    for node, gradient in ends:
        visit(node)
        node.grad = node.grad + gradient
    for node in reversed(order):
        for source, pull in node.sources:
            gradient = pull(node.grad)
            extra = tuple(range(gradient.ndim - source.value.ndim))  # a bias is shared by the rows of a batch
            source.grad = source.grad + gradient.sum(extra)


def mlp(weights, x):
    """weights: [W, b] of each layer in turn; GELU between the layers."""
    for i in range(0, len(weights), 2):
        x = var(x) @ weights[i] + weights[i + 1]
        if i < len(weights) - 2:
            x = gelu(x)
    return x


class Adam:
    """Adam with bias correction, for arrays that are changed in place."""

    def __init__(self, arrays, rate, betas=(0.9, 0.999), eps=1e-8):
        self.arrays, self.rate, self.betas, self.eps, self.steps = arrays, rate, betas, eps, 0
        self.moments = [(np.zeros_like(array), np.zeros_like(array)) for array in arrays]

    def step(self, gradients):
        self.steps += 1
        (b1, b2), t = self.betas, self.steps
        for array, (m, v), g in zip(self.arrays, self.moments, gradients, strict=True):
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            array -= self.rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + self.eps)


class Reference:
    """One agent. networks: name -> list of networks, each a list of arrays [W, b, ...]; names as in Agent.

    After update(), `gradients` holds its gradients and `log` what Agent.update should return. `branches`
    counts how often each side of each branch occurred.
    """

    def __init__(self, variant, networks):
        self.variant, self.networks = variant, networks
        self.center, self.half_range = (LOW + HIGH) / 2, (HIGH - LOW) / 2
        self.log_alpha, self.branches = np.array([LOG_ALPHA]), {}
        self.mean_sigma = self.mean_entropy = None
        self.budget = -A * (RHO if "entropy_critic" in networks else 1)
        if variant in ("dsac_e", "center_entropy"):
            self.budget /= 1 - GAMMA
        critics = [*networks["critics"], *networks.get("entropy_critic", [])]
        self.critic_adam = Adam([w for net in critics for w in net], RATES["critic_lr"])
        self.policy_adam = Adam(networks["policy"][0], RATES["policy_lr"])
        self.alpha_adam = Adam([self.log_alpha], RATES["alpha_lr"])

    def note(self, branch, taken):
        counts = self.branches.setdefault(branch, np.zeros(2, int))
        counts += (~taken).sum(), taken.sum()

    def variables(self, name):
        return [[Var(w) for w in net] for net in self.networks[name]]

    def sample(self, weights, obs, noise):
        """Action and log pi: the Gaussian's density at u, divided by da/du = half_range / cosh(u)^2."""
        out = mlp(weights, obs)
        raw = out[:, A:]
        self.note("log_std at its bound", raw.value > 0.5)
        log_std = elementwise(raw, np.minimum(raw.value, 0.5), raw.value <= 0.5)
        std = elementwise(log_std, np.exp(log_std.value), np.exp(log_std.value))
        u = out[:, :A] + std * noise
        log_cosh = elementwise(u, np.log(np.cosh(u.value)), np.tanh(u.value))
        constant = noise**2 / -2 - math.log(2 * math.pi) / 2 - np.log(self.half_range)
        return tanh(u) * self.half_range + self.center, (log_std * -1 + log_cosh * 2 + constant).sum()

    def values(self, weights, obs, action):
        """Per network: Q and, where the critics are distributional, sigma."""
        action = var(action)
        x = Var(np.hstack([obs, action.value]), (action, lambda g: g[:, S:]))
        outputs = [mlp(net, x) for net in weights]
        return [(o[:, 0], softplus(o[:, 1]) if o.value.shape[1] == 2 else None) for o in outputs]

    def update(self, obs, action, reward, next_obs, terminated, noise, update_policy):
        """noise: the standard normal draws in the order of their use."""
        variant, draws, self.gradients = self.variant, iter(noise), {}
        alpha, discount = np.exp(self.log_alpha[0]), GAMMA * (1 - terminated)

        # Next action, and the entropy that the target carries
        bonus = np.zeros(B)
        if variant == "td3":
            raw = TD3_NOISE["target_noise"] * next(draws)
            clipped = np.clip(raw, -TD3_NOISE["noise_clip"], TD3_NOISE["noise_clip"])
            mean = np.tanh(mlp(self.variables("target_policy")[0], next_obs).value)
            mean = self.center + self.half_range * mean
            next_action = np.clip(mean + self.half_range * clipped, LOW, HIGH)
            self.note("target noise clipped", clipped != raw)
            self.note("target action clipped", next_action != mean + self.half_range * clipped)
        else:
            actor = self.variables("policy" if variant == "sac" else "target_policy")[0]
            next_action, next_log_prob = (x.value for x in self.sample(actor, next_obs, next(draws)))
            if variant in ("no_tec_no_res", "dsac_t", "sac"):
                bonus = -alpha * next_log_prob

        # PEV
        (q1, sigma1), (q2, sigma2) = self.values(self.variables("target_critics"), next_obs, next_action)
        second = q2.value < q1.value
        self.note("second twin is smaller", second)
        y_q = reward + discount * (np.where(second, q2.value, q1.value) + bonus)
        weights = self.variables("critics")
        twins, ends = self.values(weights, obs, action), []
        if sigma1 is None:
            ends = [(q, 2 * (q.value - y_q) / B) for q, _ in twins]
        else:
            y_z = y_q + discount * np.where(second, sigma2.value, sigma1.value) * np.clip(next(draws), -3, 3)
            m_new = np.array([sigma.value.mean() for _, sigma in twins])
            self.mean_sigma = m_new if self.mean_sigma is None else (1 - TAU) * self.mean_sigma + TAU * m_new
            for (q, sigma), m in zip(twins, self.mean_sigma, strict=True):
                y = np.clip(y_z, q.value - 3 * m, q.value + 3 * m)
                self.note("sampled target clipped from above", y < y_z)
                self.note("sampled target clipped from below", y > y_z)
                w, s = m**2 + 0.1, sigma.value
                ends.append((q, -w * (y_q - q.value) / (s**2 + 0.1) / B))
                ends.append((sigma, -w * ((y - q.value) ** 2 - s**2) / (s**3 + 0.1) / B))
        backward(*ends)
        self.gradients["critics"] = [[w.grad for w in net] for net in weights]
        self.log = {"critic/q": [q.value for q, _ in twins], "critic/target": y_q}

        # PIS
        shift = 0.0
        if "entropy_critic" in self.networks:
            if variant == "center_entropy":
                m, new = self.mean_entropy, -next_log_prob.mean()
                self.mean_entropy = new if m is None else (1 - TAU) * m + TAU * new
                shift = GAMMA / (1 - GAMMA) * self.mean_entropy
            ((next_qe, _),) = self.values(self.variables("target_entropy_critic"), next_obs, next_action)
            y_e = discount * (-next_log_prob + next_qe.value + shift)
            weights = self.variables("entropy_critic")
            ((qe, _),) = self.values(weights, obs, action)
            backward((qe, 2 * (qe.value + shift - y_e) / B))
            self.gradients["entropy_critic"] = [[w.grad for w in net] for net in weights]
            self.log |= {"entropy/qe": qe.value + shift, "losses/pis": np.mean((qe.value + shift - y_e) ** 2)}

        critic_gradients = self.gradients["critics"] + self.gradients.get("entropy_critic", [])
        self.critic_adam.step([g for net in critic_gradients for g in net])
        if not update_policy:
            return

        # PIM and TUP, with the critics' new weights
        policy = self.variables("policy")[0]
        if variant == "td3":
            new_action = tanh(mlp(policy, obs)) * self.half_range + self.center
            (q1, _), _ = self.values(self.variables("critics"), obs, new_action)
            backward((q1, np.full(B, -1 / B)))
            self.log["losses/pim"] = -q1.value.mean()
        else:
            new_action, log_prob = self.sample(policy, obs, next(draws))
            (q1, _), (q2, _) = self.values(self.variables("critics"), obs, new_action)
            first = q1.value < q2.value
            self.note("first twin is smaller for the policy", first)
            ends = [(q1, first / -B), (q2, ~first / -B), (log_prob, np.full(B, alpha / B))]
            bonus = entropy = trajectory_entropy = -log_prob.value
            if "entropy_critic" in self.networks:
                ((qe, _),) = self.values(self.variables("entropy_critic"), obs, new_action)
                self.log["entropy/trajectory"] = trajectory_entropy = entropy + qe.value + shift
                if variant != "no_tec_no_res":
                    ends.append((qe, np.full(B, -alpha / B)))
                    bonus = trajectory_entropy
            backward(*ends)
            constrained = trajectory_entropy if variant in ("dsac_e", "center_entropy") else entropy
            excess = constrained.mean() - self.budget
            self.alpha_adam.step([np.array([alpha * excess])])  # d/d log_alpha of alpha * excess
            self.log |= {"entropy/policy": entropy, "losses/alpha": alpha, "losses/tup": alpha * excess}
            self.log |= {"losses/pim": -np.mean(np.minimum(q1.value, q2.value) + alpha * bonus)}
            self.log |= {"entropy/budget": self.budget}
        self.gradients["policy"] = [[w.grad for w in policy]]
        self.policy_adam.step(self.gradients["policy"][0])

        # Polyak averaging, after every network has moved
        for name in [name for name in self.networks if name.startswith("target_")]:
            for target, online in zip(self.networks[name], self.networks[name[7:]], strict=True):
                for t, w in zip(target, online, strict=True):
                    t += TAU * (w - t)
