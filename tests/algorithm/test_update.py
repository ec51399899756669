"""Agent.update as a whole, compared with reference.Reference, which is written from the papers' formulas.

Per update: PEV and PIS with one Adam step; in every second update also PIM, TUP and their Adam steps, then
Polyak averaging target += tau * (online - target) for every target network.
"""

import pytest
import torch
from reference import DEVICES, VARIANTS, A, B, Reference, make_agent, make_batch


def draws(variant, seed, device):
    """The standard normal numbers that an update draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    shapes = {"td3": [(B, A)], "sac": [(B, A)] * 2}.get(variant, [(B, A), (B,), (B, A)])
    return [torch.randn(*shape, dtype=torch.float64, device=device).cpu() for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_update_equals_the_reference(variant, device, monkeypatch):
    """Six updates, three of them with the policy, give the same gradients, weights, alpha, means and log.

    Adam's first moment shows the scale of a gradient, on which its first step does not depend.
    """
    script, arguments = VARIANTS[variant]
    agent = make_agent(script, **arguments)
    reference = Reference(variant, agent)
    agent.to(device)

    def assert_same(actual, expected, what):
        expected = torch.as_tensor(expected, dtype=actual.dtype).broadcast_to(actual.shape)
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-9, atol=1e-11, msg=f"{what}, {step}")

    grad, swap = torch.autograd.grad, lambda x: x.transpose(0, -1)  # gradients get other strides than weights
    monkeypatch.setattr("torch.autograd.grad", lambda *x: [swap(swap(g).contiguous()) for g in grad(*x)])
    for step in range(1, 7):
        update_policy = step % 2 == 0
        batch = make_batch(script, 10 + step)
        reference.update(batch, draws(variant, step, device), update_policy)
        torch.manual_seed(step)
        log = agent.update(script.Batch(*(column.to(device) for column in batch)), update_policy)

        for name, network in agent.named_children():
            pairs = zip(network.parameters(), reference.networks[name], strict=True)
            for i, (weight, expected) in enumerate(pairs):
                assert_same(weight, expected, f"{name}, array {i}")
                moments = agent.optimizer.state.get(weight), reference.adam[name].state.get(expected)
                assert (moments[0] is None) == (moments[1] is None)
                if moments[0]:
                    assert_same(*[moment["exp_avg"] for moment in moments], f"moment of {name}, array {i}")
        if variant != "td3":
            assert_same(agent.log_alpha, reference.log_alpha, "log_alpha")
        if reference.mean_sigma is not None:
            assert_same(agent.mean_sigma, reference.mean_sigma.squeeze(1), "mean_sigma")
        if reference.mean_entropy is not None:
            assert_same(agent.mean_entropy, reference.mean_entropy, "mean_entropy")
            assert_same(agent.mean_discount, reference.mean_discount, "mean_discount")
        for tag, value in reference.log.items():
            assert_same(log[tag].squeeze(0), value, tag)  # the target is (1, B)

    if device == "cuda":  # other draws
        return
    not_covered = [branch for branch, counts in reference.branches.items() if not counts.all()]
    assert not not_covered, f"always or never true in the batches: {not_covered}"
