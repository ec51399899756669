"""The four algorithms a second time: NumPy, float64, from the papers' formulas, nothing shared with torch."""

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[float])


class Var:
    """An array that knows which arrays it was computed from, and how its gradient becomes theirs."""

    def __init__(self, value, *sources):
        self.value, self.sources, self.grad = np.asarray(value, np.float64), sources, 0.0

    def __add__(self, other):
        return Var(self.value + constant(other).value, (self, lambda g: g), (constant(other), lambda g: g))

    def __mul__(self, other):
        other = constant(other)
        return Var(self.value * other.value, (self, lambda g: g * other.value), (other, lambda g: g * self.value))

    def __matmul__(self, other):
        return Var(self.value @ other.value, (self, lambda g: g @ other.value.T), (other, lambda g: self.value.T @ g))

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -constant(other)

    def __getitem__(self, index):
        def pull(g):
            full = np.zeros_like(self.value)
            full[index] = g
            return full

        return Var(self.value[index], (self, pull))

    def sum(self):
        """Over the last axis."""
        return Var(self.value.sum(-1), (self, lambda g: np.repeat(g[..., None], self.value.shape[-1], -1)))


def constant(x):
    return x if isinstance(x, Var) else Var(x)


def elementwise(x, value, slope):
    return Var(value, (x, lambda g: g * slope))


def exp(x):
    return elementwise(x, np.exp(x.value), np.exp(x.value))


def log_cosh(x):
    return elementwise(x, np.logaddexp(x.value, -x.value) - math.log(2), np.tanh(x.value))


def tanh(x):
    return elementwise(x, np.tanh(x.value), 1 / np.cosh(x.value) ** 2)


def softplus(x):
    return elementwise(x, np.log1p(np.exp(x.value)), 1 / (1 + np.exp(-x.value)))


def clip(x, low, high):
    return elementwise(x, np.clip(x.value, low, high), (low <= x.value) & (x.value <= high))


def gelu(x):
    below = (1 + erf(x.value / math.sqrt(2))) / 2
    return elementwise(x, x.value * below, below + x.value * np.exp(-(x.value**2) / 2) / math.sqrt(2 * math.pi))


def join(obs, action):
    """The critics' input: (B, S), (B, A) -> (B, S + A)."""
    return Var(np.hstack([obs, action.value]), (action, lambda g: g[:, obs.shape[1] :]))


def backward(*ends):
    """Fills .grad of everything behind the ends: pairs of a Var and the gradient of the loss with respect to it."""
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
    """weights: [W, b] of each layer one after the other, W (fan_in, fan_out); GELU between the layers."""
    for i in range(0, len(weights), 2):
        x = constant(x) @ weights[i] + weights[i + 1]
        if i < len(weights) - 2:
            x = gelu(x)
    return x


class Adam:
    """Adam with bias correction, for arrays that are changed in place."""

    def __init__(self, arrays, rate, betas=(0.9, 0.999), eps=1e-8):
        self.arrays, self.rate, self.betas, self.eps, self.steps = arrays, rate, betas, eps, 0
        self.first = [np.zeros_like(array) for array in arrays]
        self.second = [np.zeros_like(array) for array in arrays]

    def step(self, gradients):
        self.steps += 1
        beta1, beta2 = self.betas
        for array, m, v, g in zip(self.arrays, self.first, self.second, gradients, strict=True):
            m += (1 - beta1) * (g - m)
            v += (1 - beta2) * (g * g - v)
            array -= self.rate * (m / (1 - beta1**self.steps)) / (np.sqrt(v / (1 - beta2**self.steps)) + self.eps)


class Reference:
    """One agent: `variant` is dsac_e, no_tec, no_tec_no_res, dsac_t, sac or td3.

    networks: name -> list of networks, each a list of arrays [W, b, ...]; names as in Agent, targets with "target_".
    setting: gamma, tau, policy_lr, critic_lr, for all but TD3 alpha_lr, log_alpha and budget (the right-hand side of
    the entropy constraint), for TD3 target_noise and noise_clip; low, high: bounds of the action.
    After update(), `gradients` holds what each network's weights and log_alpha received in it; `branches` counts, over
    all updates, how often each decision of the algorithm went one way and how often the other.
    """

    def __init__(self, variant, networks, low, high, **setting):
        self.variant, self.networks, self.setting = variant, networks, setting
        self.low, self.high, self.center, self.half_range = low, high, (high + low) / 2, (high - low) / 2
        self.log_alpha = np.array([setting.get("log_alpha", 0.0)])
        self.spread = None
        self.branches = {}
        critics = [*networks["critics"], *networks.get("entropy_critic", [])]
        self.critic_adam = Adam([w for net in critics for w in net], setting["critic_lr"])
        self.policy_adam = Adam(networks["policy"][0], setting["policy_lr"])
        self.alpha_adam = Adam([self.log_alpha], setting.get("alpha_lr", 0.0))

    def note(self, branch, taken):
        counts = self.branches.setdefault(branch, np.zeros(2, int))
        counts += (~taken).sum(), taken.sum()

    def variables(self, name):
        return [[Var(w) for w in net] for net in self.networks[name]]

    def sample(self, weights, obs, noise):
        """Action and log pi of the squashed Gaussian, by the change of variables as the textbook has it."""
        out = mlp(weights, obs)
        dims = noise.shape[1]
        mu, log_std = out[:, :dims], clip(out[:, dims:], -20, 0.5)
        self.note("log_std at its bound", out.value[:, dims:] > 0.5)
        u = mu + exp(log_std) * noise
        z = (u - mu) * exp(-log_std)
        log_normal = z * z * -0.5 - log_std - math.log(2 * math.pi) / 2
        log_slope = log_cosh(u) * -2.0  # of tanh: 1 - tanh^2 = 1 / cosh^2
        return tanh(u) * self.half_range + self.center, (log_normal - log_slope - np.log(self.half_range)).sum()

    def values(self, weights, obs, action):
        """Per twin: Q, and sigma where the critics are distributional."""
        out = [mlp(net, join(obs, constant(action))) for net in weights]
        if self.variant in ("sac", "td3"):
            return [(o[:, 0], None) for o in out]
        return [(o[:, 0], softplus(o[:, 1])) for o in out]

    def update(self, obs, action, reward, next_obs, terminated, noise, delayed):
        """noise: the standard normal draws in the order of their use: next action, value, new action."""
        gamma, tau, variant, size = self.setting["gamma"], self.setting["tau"], self.variant, len(reward)
        draws, self.gradients = iter(noise), {}
        alpha = np.exp(self.log_alpha[0])
        discount = gamma * (1 - terminated)

        # a' and the entropy that the target carries
        if variant == "td3":
            raw = self.setting["target_noise"] * next(draws)
            blur = np.clip(raw, -self.setting["noise_clip"], self.setting["noise_clip"])
            clean = self.center + self.half_range * tanh(mlp(self.variables("target_policy")[0], next_obs)).value
            next_action = np.clip(clean + self.half_range * blur, self.low, self.high)
            self.note("target noise clipped", blur != raw)
            self.note("target action clipped", next_action != clean + self.half_range * blur)
            bonus = np.zeros(size)
        else:
            actor = self.variables("policy" if variant == "sac" else "target_policy")[0]
            next_action, next_log_prob = (x.value for x in self.sample(actor, next_obs, next(draws)))
            bonus = -alpha * next_log_prob if variant in ("no_tec_no_res", "dsac_t", "sac") else np.zeros(size)

        # PEV
        bars = self.values(self.variables("target_critics"), next_obs, next_action)
        bar_q = np.stack([q.value for q, _ in bars])
        chosen = (bar_q[1] < bar_q[0]).astype(int)
        self.note("second twin is smaller", chosen == 1)
        y_q = reward + discount * (bar_q[chosen, np.arange(size)] + bonus)
        weights = self.variables("critics")
        twins = self.values(weights, obs, action)
        ends = []
        if variant in ("sac", "td3"):
            ends = [(q, 2 * (q.value - y_q) / size) for q, _ in twins]
        else:
            bar_sigma = np.stack([sigma.value for _, sigma in bars])[chosen, np.arange(size)]
            y_z = y_q + discount * bar_sigma * np.clip(next(draws), -3, 3)
            mean_sigma = np.array([sigma.value.mean() for _, sigma in twins])
            self.spread = mean_sigma if self.spread is None else (1 - tau) * self.spread + tau * mean_sigma
            for (q, sigma), m in zip(twins, self.spread, strict=True):
                y = np.clip(y_z, q.value - 3 * m, q.value + 3 * m)
                self.note("sampled target clipped from above", y < y_z)
                self.note("sampled target clipped from below", y > y_z)
                w, s = m**2 + 0.1, sigma.value
                ends.append((q, -w * (y_q - q.value) / (s**2 + 0.1) / size))
                ends.append((sigma, -w * ((y - q.value) ** 2 - s**2) / (s**3 + 0.1) / size))
        backward(*ends)
        self.gradients["critics"] = [[w.grad for w in net] for net in weights]

        # PIS
        if "entropy_critic" in self.networks:
            bar_qe = mlp(self.variables("target_entropy_critic")[0], np.hstack([next_obs, next_action])).value[:, 0]
            y_e = discount * (-next_log_prob + bar_qe)
            weights = self.variables("entropy_critic")
            qe = mlp(weights[0], np.hstack([obs, action]))[:, 0]
            backward((qe, 2 * (qe.value - y_e) / size))
            self.gradients["entropy_critic"] = [[w.grad for w in net] for net in weights]

        critic_gradients = self.gradients["critics"] + self.gradients.get("entropy_critic", [])
        self.critic_adam.step([g for net in critic_gradients for g in net])
        if not delayed:
            return

        # PIM and TUP, with the critics that have just moved
        policy = self.variables("policy")[0]
        if variant == "td3":
            new_action = tanh(mlp(policy, obs)) * self.half_range + self.center
        else:
            new_action, log_prob = self.sample(policy, obs, next(draws))
        (q1, _), (q2, _) = self.values(self.variables("critics"), obs, new_action)
        if variant == "td3":
            backward((q1, np.full(size, -1 / size)))
        else:
            first = q1.value < q2.value
            self.note("first twin is smaller for the policy", first)
            ends = [(q1, first / -size), (q2, ~first / -size), (log_prob, np.full(size, alpha / size))]
            bracket = -log_prob.value
            if variant in ("dsac_e", "no_tec"):
                qe = mlp(self.variables("entropy_critic")[0], join(obs, new_action))[:, 0]
                ends.append((qe, np.full(size, -alpha / size)))
                bracket = bracket + qe.value if variant == "dsac_e" else bracket
            backward(*ends)
            # d/d log_alpha of alpha * mean[bracket - budget]
            self.gradients["log_alpha"] = alpha * (bracket.mean() - self.setting["budget"])
            self.alpha_adam.step([np.array([self.gradients["log_alpha"]])])
        self.gradients["policy"] = [[w.grad for w in policy]]
        self.policy_adam.step(self.gradients["policy"][0])

        # Polyak, after everything has moved
        for name in [name for name in self.networks if name.startswith("target_")]:
            for target, online in zip(self.networks[name], self.networks[name.removeprefix("target_")], strict=True):
                for t, w in zip(target, online, strict=True):
                    t += tau * (w - t)
