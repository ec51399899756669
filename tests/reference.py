"""The four algorithms in float64, written from the papers' formulas, and helpers of the tests.

`Reference` shares no code with the scripts. The derivatives of the losses with respect to Q, sigma, Qe and log pi are
written by hand; autograd computes those of these outputs with respect to the weights.
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
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
S, B, WIDTH = 3, 16, 5  # observation dimensions, batch size, hidden units
# float32 represents the bounds exactly
LOW = torch.tensor([-0.5, -2.0]).double()
HIGH = torch.tensor([1.5, 1.0]).double()
CENTER, HALF_RANGE, A = (LOW + HIGH) / 2, (HIGH - LOW) / 2, len(LOW)
GAMMA, TAU, LOG_ALPHA, RHO = 0.9, 0.05, 0.4, 1.5
RATES = {"policy_lr": 3e-3, "critic_lr": 2e-3, "alpha_lr": 5e-3}
TD3_NOISE = {"target_noise": 0.6, "noise_clip": 0.4}
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
    """A float64 agent. Its weights are large enough that every branch is taken; target networks have other weights."""
    rates = {name: rate for name, rate in RATES.items() if name in script.Args.__dataclass_fields__}
    arguments = {"env_id": "Ant-v4", "gamma": GAMMA, "tau": TAU, "hidden_width": WIDTH} | rates | arguments
    agent = script.Agent(script.Args(**arguments), S, LOW.numpy(), HIGH.numpy()).double()
    rng = np.random.default_rng(41)
    with torch.no_grad():
        for name, weight in agent.named_parameters():
            weight.copy_(torch.from_numpy(rng.normal(0, 0.8, weight.shape)))
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


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(weights, x):
    """n networks at once: weights W (n, out, in) and b (n, 1, out) of each layer in turn, x (n or 1, B, in)."""
    for i in range(0, len(weights), 2):
        x = (gelu(x) if i else x) @ weights[i].transpose(1, 2) + weights[i + 1]
    return x


class Reference:
    """The weights of an agent, and their updates from the papers' formulas.

    After update(), `log` contains what Agent.update should return. `branches` contains for each condition how often
    it was false and how often true.
    """

    def __init__(self, variant, agent):
        self.variant, self.log_alpha = variant, torch.tensor(LOG_ALPHA, dtype=torch.float64)
        self.mean_sigma, self.mean_entropy, self.mean_discount, self.branches = None, None, None, {}
        self.networks = {
            name: [weight.detach().clone().requires_grad_() for weight in network.parameters()]
            for name, network in agent.named_children()
        }
        self.adam = {
            name: torch.optim.Adam(weights, RATES["policy_lr" if name == "policy" else "critic_lr"])
            for name, weights in self.networks.items()
        }
        self.alpha_adam = torch.optim.Adam([self.log_alpha], RATES["alpha_lr"])
        self.budget = -A * (RHO if "entropy_critic" in self.networks else 1)
        if variant in ("dsac_e", "center_entropy"):
            self.budget /= 1 - GAMMA

    def count(self, branch, taken):
        counts = self.branches.setdefault(branch, np.zeros(2, int))
        counts += (~taken).sum().item(), taken.sum().item()

    def descend(self, name, *pairs):
        """An Adam step of a network. pairs: an output and the gradient of the loss with respect to it."""
        outputs, grad_outputs = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(outputs, self.networks[name], grad_outputs)
        for weight, gradient in zip(self.networks[name], gradients, strict=True):
            weight.grad = gradient
        self.adam[name].step()

    def sample(self, name, obs, noise):
        """Action and log pi: the Gaussian's density at u, divided by da/du = half_range / cosh(u)^2."""
        mean, raw = mlp(self.networks[name], obs)[0].split(A, 1)
        self.count("log_std at its bound", raw > 0.5)
        log_std = torch.where(raw > 0.5, 0.5, raw)  # the lower bound of -20 is not reached here
        u = mean + log_std.exp() * noise
        log_slope = (HALF_RANGE / u.cosh() ** 2).log()
        log_density = -(noise**2) / 2 - math.log(2 * math.pi) / 2 - log_std
        return CENTER + HALF_RANGE * u.tanh(), (log_density - log_slope).sum(1)

    def values(self, name, obs, action):
        """Outputs (n, B) of n critics: Q and, where they are distributional, sigma."""
        out = mlp(self.networks[name], torch.cat((obs, action), 1))
        return out[..., 0], (1 + out[..., -1].exp()).log()  # softplus

    def entropy_parts(self, prefix, obs, action):
        """deviation and steps; steps is learned relative to that of a process with the mean discount."""
        (deviation,), _ = self.values(f"{prefix}entropy_critic", obs, action)
        (relative_steps,), _ = self.values(f"{prefix}steps_critic", obs, action)
        return deviation, self.mean_discount / (1 - self.mean_discount) * (1 + relative_steps)

    def update(self, batch, noise, update_policy):
        """noise: the standard normal draws in the order of their use."""
        variant, draws, networks = self.variant, iter(noise), self.networks
        obs, action, reward, next_obs, terminated = batch
        alpha = self.log_alpha.exp().item()
        discount = GAMMA * (1 - terminated)

        # Next action, and the entropy that the target carries
        entropy_in_target = torch.zeros(B)
        if variant == "td3":
            raw = TD3_NOISE["target_noise"] * next(draws)
            clipped = raw.clip(-TD3_NOISE["noise_clip"], TD3_NOISE["noise_clip"])
            unclipped = CENTER + HALF_RANGE * (mlp(networks["target_policy"], next_obs)[0].tanh() + clipped)
            next_action = torch.minimum(torch.maximum(unclipped, LOW), HIGH)
            self.count("target noise clipped", clipped != raw)
            self.count("target action clipped", next_action != unclipped)
        else:
            actor = "policy" if variant == "sac" else "target_policy"
            next_action, next_log_prob = (x.detach() for x in self.sample(actor, next_obs, next(draws)))
            if variant in ("no_tec_no_res", "dsac_t", "sac"):
                entropy_in_target = -alpha * next_log_prob

        # PEV
        next_q, next_sigma = self.values("target_critics", next_obs, next_action)
        second_is_smaller = next_q[1] < next_q[0]
        self.count("second twin is smaller", second_is_smaller)
        next_q = torch.where(second_is_smaller, next_q[1], next_q[0])
        next_sigma = torch.where(second_is_smaller, next_sigma[1], next_sigma[0])
        y_q = (reward + discount * (next_q + entropy_in_target)).detach()
        q, sigma = self.values("critics", obs, action)
        self.log = {"critic/q": q, "critic/target": y_q}
        if variant in ("sac", "td3"):
            self.log["losses/pev"] = ((q - y_q) ** 2).mean(1).sum()
            self.descend("critics", (q, 2 * (q - y_q) / B))
        else:
            y_z = y_q + discount * next_sigma * next(draws).clip(-3, 3)
            m_new, old = sigma.mean(1, keepdim=True).detach(), self.mean_sigma
            m = self.mean_sigma = m_new if old is None else (1 - TAU) * old + TAU * m_new
            y = torch.minimum(torch.maximum(y_z, q - 3 * m), q + 3 * m)
            self.count("sampled target clipped from above", y < y_z)
            self.count("sampled target clipped from below", y > y_z)
            grad_q = -(m**2 + 0.1) * (y_q - q) / (sigma**2 + 0.1) / B
            grad_sigma = -(m**2 + 0.1) * ((y - q) ** 2 - sigma**2) / (sigma**3 + 0.1) / B
            self.log |= {"critic/sigma": sigma, "critic/td_error": y_q - q}
            self.descend("critics", (q, grad_q), (sigma, grad_sigma))

        # PIS
        if variant == "center_entropy":
            new_entropy, new_discount = -next_log_prob.mean(), discount.mean()
            if self.mean_entropy is None:
                self.mean_entropy, self.mean_discount = new_entropy, new_discount
            self.mean_entropy = (1 - TAU) * self.mean_entropy + TAU * new_entropy
            self.mean_discount = (1 - TAU) * self.mean_discount + TAU * new_discount
            next_deviation, next_steps = self.entropy_parts("target_", next_obs, next_action)
            y_deviation = discount * (-next_log_prob - self.mean_entropy + next_deviation)
            y_steps = discount * (1 + next_steps)
            deviation, steps = self.entropy_parts("", obs, action)
            self.descend("entropy_critic", (deviation, 2 * (deviation - y_deviation) / B))
            self.descend("steps_critic", (steps, 2 * (steps - y_steps) / B))
            self.log |= {"entropy/qe": deviation + self.mean_entropy * steps, "entropy/steps": steps}
            loss = ((deviation - y_deviation) ** 2).mean() + ((steps - y_steps) ** 2).mean()
            self.log |= {"losses/pis": loss}
        elif "entropy_critic" in networks:
            (next_qe,), _ = self.values("target_entropy_critic", next_obs, next_action)
            y_e = discount * (-next_log_prob + next_qe)
            (qe,), _ = self.values("entropy_critic", obs, action)
            self.descend("entropy_critic", (qe, 2 * (qe - y_e) / B))
            self.log |= {"entropy/qe": qe, "losses/pis": ((qe - y_e) ** 2).mean()}
        if not update_policy:
            return

        # PIM and TUP, with the critics' new weights
        if variant == "td3":
            new_action = CENTER + HALF_RANGE * mlp(networks["policy"], obs)[0].tanh()
            q1 = self.values("critics", obs, new_action)[0][0]
            self.descend("policy", (q1, torch.full_like(q1, -1 / B)))
            self.log["losses/pim"] = -q1.mean()
        else:
            new_action, log_prob = self.sample("policy", obs, next(draws))
            q, _ = self.values("critics", obs, new_action)
            first_is_smaller = q[0] < q[1]
            self.count("first twin is smaller for the policy", first_is_smaller)
            smaller = torch.stack((first_is_smaller, ~first_is_smaller)).double()
            pairs = [(q, -smaller / B), (log_prob, torch.full_like(log_prob, alpha / B))]
            maximized = constrained = entropy = -log_prob
            if "entropy_critic" in networks:
                if variant == "center_entropy":
                    deviation, steps = self.entropy_parts("", obs, new_action)
                    qe = deviation + self.mean_entropy * steps
                else:
                    (qe,), _ = self.values("entropy_critic", obs, new_action)
                self.log["entropy/trajectory"] = trajectory_entropy = entropy + qe
                if variant != "no_tec_no_res":
                    pairs.append((qe, torch.full_like(qe, -alpha / B)))
                    maximized = trajectory_entropy
                if variant in ("dsac_e", "center_entropy"):
                    constrained = trajectory_entropy
            self.descend("policy", *pairs)
            excess = (constrained.mean() - self.budget).detach()
            self.log_alpha.grad = alpha * excess  # d/d log_alpha of alpha * excess
            self.alpha_adam.step()
            self.log |= {"entropy/policy": entropy, "losses/alpha": alpha, "losses/tup": alpha * excess}
            self.log |= {"losses/pim": -((smaller * q).sum(0) + alpha * maximized).mean()}
            self.log |= {"entropy/budget": self.budget}

        # Polyak averaging, after all optimizer steps
        for name, weights in networks.items():
            if name.startswith("target_"):
                for target, online in zip(weights, networks[name.removeprefix("target_")], strict=True):
                    target.data += TAU * (online - target).detach()
