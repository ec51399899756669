"""Agent.update as a whole, against reference.Reference (NumPy, float64, own differentiation and Adam).

Per update: PEV and PIS with one Adam step; in every second update also PIM, TUP and their Adam steps, then
Polyak averaging target += tau * (online - target) for every target network.
"""

import numpy as np
import pytest
import torch
from reference import VARIANTS, A, B, Reference, make_agent, make_batch, unstack, weights_of

import dsac_e
import dsac_t


def draws(variant, seed):
    """The standard normal numbers that an update draws after torch.manual_seed(seed), as NumPy arrays."""
    torch.manual_seed(seed)
    shapes = {"td3": [(B, A)], "sac": [(B, A)] * 2}.get(variant, [(B, A), (B,), (B, A)])
    return [torch.randn(*shape, dtype=torch.float64).numpy() for shape in shapes]


def assert_same(actual, expected, what):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11, err_msg=what)


def assert_same_networks(actual, expected, what):
    for i, (net, known_net) in enumerate(zip(actual, expected, strict=True)):
        for j, (array, known) in enumerate(zip(net, known_net, strict=True)):
            assert_same(array, known, f"{what}, network {i}, array {j}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_equals_numpy(variant):
    """Six updates, three of them with the policy, give the reference's gradients, weights, alpha and log.

    Adam's first moment is compared as well: it shows the scale of a gradient, which the first step hides.
    """
    script, arguments = VARIANTS[variant]
    agent = make_agent(script, **arguments)
    names = [name for name, _ in agent.named_children()]
    reference = Reference(variant, {name: unstack(getattr(agent, name).parameters()) for name in names})
    moments = {}

    for step in range(1, 7):
        update_policy = step % 2 == 0
        batch = make_batch(script, 10 + step)
        reference.update(*(column.numpy() for column in batch), draws(variant, step), update_policy)
        torch.manual_seed(step)
        log = agent.update(batch, update_policy)

        for name in names:
            nets = unstack(getattr(agent, name).parameters())
            assert_same_networks(nets, reference.networks[name], f"{name} after update {step}")
        for name, gradients in reference.gradients.items():
            old = moments.get(name, [[0.0] * len(net) for net in gradients])
            moments[name] = [
                [0.9 * m + 0.1 * g for m, g in zip(ms, gs, strict=True)]
                for ms, gs in zip(old, gradients, strict=True)
            ]
            state = [agent.optimizer.state[weight]["exp_avg"] for weight in getattr(agent, name).parameters()]
            assert_same_networks(unstack(state), moments[name], f"gradient of {name} in update {step}")
        if variant != "td3":
            assert_same(agent.log_alpha.item(), reference.log_alpha[0], f"log_alpha after update {step}")
        if reference.mean_sigma is not None:
            assert_same(agent.mean_sigma, reference.mean_sigma, f"mean_sigma after update {step}")
        for tag, value in reference.log.items():
            assert_same(log[tag].squeeze(0), value, f"{tag} in update {step}")

    one_sided = [branch for branch, counts in reference.branches.items() if not counts.all()]
    assert not one_sided, f"the batches do not reach both sides of: {one_sided}"


def test_full_ablation_is_dsac_t():
    """dsac_e with --no-tec --no-res at rho = 1 equals dsac_t: same weights, alpha, mean sigma and log."""
    ablated, sibling = make_agent(dsac_e, rho=1.0, tec=False, res=False), make_agent(dsac_t)
    state = ablated.state_dict()
    sibling.load_state_dict({name: state[name] for name in sibling.state_dict()})
    for step in range(1, 7):
        logs = []
        for agent, script in ((ablated, dsac_e), (sibling, dsac_t)):
            torch.manual_seed(step)
            logs.append(agent.update(make_batch(script, 10 + step), step % 2 == 0))
        known = weights_of(ablated)
        for name, weight in weights_of(sibling).items():
            assert_same(weight, known[name], f"{name} after update {step}")
        for tag, value in logs[1].items():
            assert_same(value, logs[0][tag], f"{tag} in update {step}")
