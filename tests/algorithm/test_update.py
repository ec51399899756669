"""Agent.update as a whole, against reference.Reference, which is written from the papers' formulas.

Per update: PEV and PIS with one Adam step; in every second update also PIM, TUP and their Adam steps, then
Polyak averaging target += tau * (online - target) for every target network.
"""

import pytest
import torch
from reference import VARIANTS, A, B, Reference, make_agent, make_batch


def draws(variant, seed):
    """The standard normal numbers that an update draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    shapes = {"td3": [(B, A)], "sac": [(B, A)] * 2}.get(variant, [(B, A), (B,), (B, A)])
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_equals_the_reference(variant):
    """Six updates, three of them with the policy, give the same gradients, weights, alpha, means and log.

    Adam's first moment is compared as well: it shows the scale of a gradient, which the first step hides.
    """
    script, arguments = VARIANTS[variant]
    agent = make_agent(script, **arguments)
    reference = Reference(variant, agent)

    def assert_same(actual, expected, what):
        expected = torch.as_tensor(expected, dtype=actual.dtype).broadcast_to(actual.shape)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=f"{what} in update {step}")

    for step in range(1, 7):
        update_policy = step % 2 == 0
        batch = make_batch(script, 10 + step)
        reference.update(batch, draws(variant, step), update_policy)
        torch.manual_seed(step)
        log = agent.update(batch, update_policy)

        for name, network in agent.named_children():
            for i, pair in enumerate(zip(network.parameters(), reference.networks[name], strict=True)):
                assert_same(*pair, f"{name}, array {i}")
                states = agent.optimizer.state.get(pair[0]), reference.adam[name].state.get(pair[1])
                if states[0]:
                    assert_same(*[state["exp_avg"] for state in states], f"gradient of {name}, array {i}")
        if variant != "td3":
            assert_same(agent.log_alpha, reference.log_alpha, "log_alpha")
        if reference.mean_sigma is not None:
            assert_same(agent.mean_sigma, reference.mean_sigma.squeeze(1), "mean_sigma")
        for tag, value in reference.log.items():
            assert_same(log[tag].squeeze(0), value, tag)

    one_sided = [branch for branch, counts in reference.branches.items() if not counts.all()]
    assert not one_sided, f"the batches do not reach both sides of: {one_sided}"
