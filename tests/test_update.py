"""Whole updates of the four agents, against an independent implementation and against each other."""

import numpy as np
import pytest
import torch
from numpy_reference import Reference

import dsac_e
import dsac_t
import sac
import td3

OBS, BATCH, HIDDEN = 3, 16, 5
LOW, HIGH = np.array([-0.5, -2.0]), np.array([1.5, 1.0])  # neither +-1 nor around zero, and exact in float32
ACTIONS = len(LOW)
GAMMA, TAU, LOG_ALPHA, RHO = 0.9, 0.05, -0.4, 1.5
RATES = {"policy_lr": 3e-3, "critic_lr": 2e-3}
TD3_NOISE = {"target_noise": 0.6, "noise_clip": 0.5}

# variant: script, further arguments, right-hand side of the entropy constraint
VARIANTS = {
    "dsac_e": (dsac_e, {"rho": RHO}, RHO * -ACTIONS / (1 - GAMMA)),
    "no_tec": (dsac_e, {"rho": RHO, "tec": False}, RHO * -ACTIONS),
    "no_tec_no_res": (dsac_e, {"rho": RHO, "tec": False, "res": False}, RHO * -ACTIONS),
    "dsac_t": (dsac_t, {}, -ACTIONS),
    "sac": (sac, {}, -ACTIONS),
    "td3": (td3, TD3_NOISE, None),
}


def make_agent(module, **arguments):
    """A float64 agent with weights large enough to reach every branch, and with targets off their networks."""
    if module is not td3:
        arguments["alpha_lr"] = 5e-3
    args = module.Args(env_id="Ant-v4", gamma=GAMMA, tau=TAU, hidden_width=HIDDEN, **RATES, **arguments)
    agent = module.Agent(args, OBS, LOW, HIGH).double()
    rng = np.random.default_rng(41)
    with torch.no_grad():
        for name, weight in agent.named_parameters():
            weight.copy_(torch.from_numpy(rng.normal(0, 0.6, weight.shape)))
            if name == "log_alpha":
                weight.fill_(LOG_ALPHA)
    return agent


def make_batch(module, seed):
    """Random transitions in float64, a quarter of them terminal."""
    rng = np.random.default_rng(seed)
    return module.Batch(
        obs=torch.from_numpy(rng.normal(0, 1, (BATCH, OBS))),
        action=torch.from_numpy(rng.uniform(LOW, HIGH, (BATCH, ACTIONS))),
        reward=torch.from_numpy(rng.normal(0, 3, BATCH)),
        next_obs=torch.from_numpy(rng.normal(0, 1, (BATCH, OBS))),
        terminated=torch.from_numpy((np.arange(BATCH) % 4 == 1).astype(np.float64)),
    )


def draws(variant, seed):
    """The standard normal numbers that an update draws after torch.manual_seed(seed), as NumPy arrays."""
    torch.manual_seed(seed)
    shapes = {"td3": [(BATCH, ACTIONS)], "sac": [(BATCH, ACTIONS)] * 2}
    default = [(BATCH, ACTIONS), (BATCH,), (BATCH, ACTIONS)]
    return [torch.randn(*shape, dtype=torch.float64).numpy() for shape in shapes.get(variant, default)]


def unstack(tensors):
    """Weights of n side-by-side networks, or their gradients: n lists [W (fan_in, fan_out), b (fan_out), ...]."""
    arrays = [tensor.detach().numpy().copy() for tensor in tensors]
    return [[a[i].T if j % 2 == 0 else a[i, 0] for j, a in enumerate(arrays)] for i in range(len(arrays[0]))]


def networks(agent):
    return {name: unstack(child.parameters()) for name, child in agent.named_children()}


def assert_same(actual, expected, what):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11, err_msg=what)


def assert_same_networks(actual, expected, what):
    for i, (net, reference) in enumerate(zip(actual, expected, strict=True)):
        for j, (array, known) in enumerate(zip(net, reference, strict=True)):
            assert_same(array, known, f"{what}, network {i}, array {j}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_equals_numpy(variant):
    """Four consecutive updates, two of them delayed, give the gradients, weights, targets, log(alpha) and spread of an
    independent implementation. Two delayed ones, because the first step of Adam shows only a gradient's sign."""
    module, arguments, budget = VARIANTS[variant]
    agent = make_agent(module, **arguments)
    setting = {"gamma": GAMMA, "tau": TAU, **RATES}
    setting |= TD3_NOISE if variant == "td3" else {"alpha_lr": 5e-3, "log_alpha": LOG_ALPHA, "budget": budget}
    reference = Reference(variant, networks(agent), LOW, HIGH, **setting)

    for step in (1, 2, 3, 4):
        delayed = step % 2 == 0
        batch = make_batch(module, 10 + step)
        reference.update(*(column.numpy() for column in batch), draws(variant, step), delayed)
        torch.manual_seed(step)
        agent.update(batch, delayed)

        for name, gradients in reference.gradients.items():
            if name == "log_alpha":
                assert_same(agent.log_alpha.grad.item(), gradients, f"{name} gradient after update {step}")
            else:
                received = unstack(weight.grad for weight in getattr(agent, name).parameters())
                assert_same_networks(received, gradients, f"{name} gradient after update {step}")
        weights = networks(agent)
        assert weights.keys() == reference.networks.keys()
        for name in weights:
            assert_same_networks(weights[name], reference.networks[name], f"{name} after update {step}")
        if variant != "td3":
            assert_same(agent.log_alpha.item(), reference.log_alpha[0], f"log_alpha after update {step}")
        if variant not in ("sac", "td3"):
            assert_same(agent.spread.numpy(), reference.spread, f"spread after update {step}")

    # Otherwise a wrong clip or a wrong twin could pass unseen.
    one_sided = [branch for branch, counts in reference.branches.items() if not counts.all()]
    assert not one_sided, f"the batches never reach one side of: {one_sided}"


def test_full_ablation_is_dsac_t():
    """dsac_e --no-tec --no-res at rho = 1 is DSAC-T: same gradients, weights, spread, alpha from the same start."""
    ablated = make_agent(dsac_e, rho=1.0, tec=False, res=False)
    sibling = make_agent(dsac_t)
    state = {name: value for name, value in ablated.state_dict().items() if "entropy_critic" not in name}
    sibling.load_state_dict(state)  # strict: nothing of DSAC-T is left at its own start
    for step in (1, 2, 3, 4):
        for agent, module in ((ablated, dsac_e), (sibling, dsac_t)):
            torch.manual_seed(step)
            agent.update(make_batch(module, 10 + step), step % 2 == 0)
        weights = dict(ablated.named_parameters())
        for name, weight in sibling.named_parameters():
            assert_same(weight.detach(), weights[name].detach(), f"{name} after update {step}")
            assert (weight.grad is None) == (weights[name].grad is None), name
            if weight.grad is not None:
                assert_same(weight.grad, weights[name].grad, f"gradient of {name} after update {step}")
        assert_same(sibling.spread, ablated.spread, f"spread after update {step}")


def test_td3_target_action_and_exploration():
    """With TD3's own settings, the target critics see the action of the target policy plus noise of 0.2 half ranges,
    clipped at 0.5 half ranges and then to a box that is not +-1; the acting policy explores with 0.1 half ranges."""
    center, half_range, size = (LOW + HIGH) / 2, (HIGH - LOW) / 2, 4096
    agent = td3.Agent(td3.Args(), OBS, LOW, HIGH).double()
    with torch.no_grad():
        agent.policy.net[-1].weight.zero_()
        agent.policy.net[-1].bias.copy_(torch.tensor([-0.5, 0.375]))
        agent.target_policy.net[-1].weight.zero_()
        agent.target_policy.net[-1].bias.copy_(torch.tensor([0.25, 1.5]))  # the second action is close to its bound
    seen = []
    agent.target_critics.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].numpy()))
    obs, zeros = torch.ones(size, OBS, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)

    torch.manual_seed(1)
    agent.update(td3.Batch(obs, torch.zeros(size, ACTIONS, dtype=torch.float64), zeros, obs, zeros), delayed=False)
    torch.manual_seed(1)
    normal = torch.randn(size, ACTIONS, dtype=torch.float64).numpy()
    blurred = center + half_range * (np.tanh([0.25, 1.5]) + np.clip(0.2 * normal, -0.5, 0.5))
    assert np.any(0.2 * normal > 0.5) and np.any(0.2 * normal < -0.5) and np.any(blurred > HIGH)
    assert_same(seen[0], np.clip(blurred, LOW, HIGH), "target action")

    torch.manual_seed(2)
    explored = agent.policy.act(obs).numpy()
    torch.manual_seed(2)
    normal = torch.randn_like(agent.policy(obs).detach()).numpy()
    assert_same(
        explored, np.clip(center + half_range * (np.tanh([-0.5, 0.375]) + 0.1 * normal), LOW, HIGH), "exploration"
    )
    assert_same(
        agent.policy.act(obs, deterministic=True)[0].numpy(), center + half_range * np.tanh([-0.5, 0.375]), "mean"
    )


def test_td3_policy_is_delayed():
    """Between delayed updates TD3's policy rests, bit for bit, while every layer of its critics moves."""
    agent = make_agent(td3, **TD3_NOISE)
    for step in (1, 2, 3, 4):
        policy, critics = networks(agent)["policy"], networks(agent)["critics"]
        agent.update(make_batch(td3, step), delayed=step % 2 == 0)
        rested = all(np.array_equal(a, b) for a, b in zip(policy[0], networks(agent)["policy"][0], strict=True))
        assert rested == (step % 2 == 1)
        assert not any(np.array_equal(a, b) for a, b in zip(critics[0], networks(agent)["critics"][0], strict=True))
