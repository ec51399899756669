"""Which quantity influences which.

PEV, PIS  train the critics only; targets are constants; alpha appears only in entangled targets
          (DSAC-T, SAC, DSAC-E with --no-res)
PIM       trains the policy only, through the critics and, for DSAC-E, through Qe; alpha is a constant
TUP       trains log_alpha only; the entropy is a constant
targets   move by tau toward their online networks, in updates with the policy only
"""

import copy

import pytest
import torch
from reference import (
    TAU,
    VARIANTS,
    B,
    every_script,
    every_stochastic,
    make_agent,
    make_batch,
    weights_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

import dsac_e

ENTANGLED = ("no_tec_no_res", "dsac_t", "sac")


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.rand(shape, dtype=torch.float64).add(0.1).requires_grad_() for shape in shapes]


def reached(loss, **inputs):
    """The names of the inputs to which the loss sends a gradient other than zero."""
    gradients = torch.autograd.grad(loss, inputs.values(), allow_unused=True)
    return {name for name, g in zip(inputs, gradients, strict=True) if g is not None and g.abs().max() > 0}


@every_script
def test_pev_sends_gradients_to_the_critics_only(script):
    """Every argument asks for a gradient; q, and sigma of a distributional critic, receive one."""
    parameters = script.pev.__annotations__.keys() - {"return", "tau"}
    twins = ("q", "sigma", "next_q", "next_sigma")
    shapes = {"alpha": (), "mean_sigma": (2,)} | dict.fromkeys(twins, (2, B))
    inputs = {name: leaf for name in sorted(parameters) for leaf in leaves(shapes.get(name, (B,)))}
    inputs["q"].data += torch.linspace(-1, 1, B)
    loss, *rest = script.pev(**inputs, **({"tau": TAU} if "sigma" in parameters else {}))
    assert reached(loss, **inputs) == {"q", "sigma"} & parameters
    assert not any(tensor.requires_grad for tensor in rest)


def test_pis_sends_gradients_to_the_entropy_critic_only():
    inputs = dict(zip(("qe", "next_qe", "next_log_prob", "discount"), leaves(*[(B,)] * 4), strict=True))
    assert reached(dsac_e.pis(**inputs), **inputs) == {"qe"}


@every_script
def test_pim_sends_gradients_to_critics_and_entropy_but_not_to_alpha(script):
    """To the smaller twin per sample, negative where larger is better; TD3 uses the first twin only."""
    q, entropy, alpha = leaves((2, B), (B,), ())
    if "alpha" not in script.pim.__annotations__:
        (gradient,) = torch.autograd.grad(script.pim(q), q)
        assert torch.allclose(gradient, torch.tensor([[-1 / B], [0.0]]).double().expand(2, B))
        return
    loss = script.pim(q, entropy, alpha)
    by_q, by_entropy, by_alpha = torch.autograd.grad(loss, (q, entropy, alpha), allow_unused=True)
    assert by_alpha is None
    first = q[0] < q[1]
    assert 0 < first.sum() < B
    assert torch.allclose(by_q, torch.stack([first, ~first]).double() / -B)
    assert torch.allclose(by_entropy, -alpha.detach() / B)


@every_stochastic
def test_tup_sends_a_gradient_to_log_alpha_only(script):
    log_alpha, entropy = leaves((), (B,))
    loss = script.tup(log_alpha, entropy, torch.tensor(-2.0))
    assert reached(loss, log_alpha=log_alpha, entropy=entropy) == {"log_alpha"}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "td3"])
def test_alpha_enters_the_critic_step_only_if_entangled(variant):
    """With log_alpha = NaN, gradients, running means and log of the critic step stay finite if and only if
    reward and entropy are separated. Entangled targets contain -discount * alpha * log pi, linear in alpha.
    """
    script, arguments = VARIANTS[variant]
    batch, targets = make_batch(script, 1), []
    for log_alpha in (float("nan"), float("-inf"), 0.0, torch.tensor(2.0).log().item()):
        agent = make_agent(script, log_alpha, **arguments)
        torch.manual_seed(0)
        gradients, *means, log = agent.critic_gradients(batch)
        targets.append(log["critic/target"].reshape(B))
        if log_alpha != log_alpha:
            means = [m for mean in means for m in (mean if isinstance(mean, tuple) else (mean,))]
            values = [*gradients, *means, *log.values()]
            assert all(v.isfinite().all() for v in values) == (variant not in ENTANGLED)
    _, none, one, two = targets
    if variant not in ENTANGLED:
        assert torch.equal(none, one) and torch.equal(one, two)
        return
    assert torch.allclose(two - none, 2 * (one - none), rtol=1e-6)
    torch.manual_seed(0)
    policy = agent.policy if variant == "sac" else agent.target_policy
    _, log_prob = policy(batch.next_obs, torch.randn_like(batch.action))
    assert torch.allclose(one - none, -agent.args.gamma * (1 - batch.terminated) * log_prob)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_methods_have_no_side_effects(variant):
    """critic_gradients and policy_gradients change no weight, buffer or .grad."""
    script, arguments = VARIANTS[variant]
    agent, batch = make_agent(script, **arguments), make_batch(script, 1)
    before = weights_of(agent)
    agent.critic_gradients(batch)
    agent.policy_gradients(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(agent).items())
    assert all(weight.grad is None for weight in agent.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_move_the_right_weights(variant):
    """Without the policy: every layer of the critics moves, everything else is equal bit by bit. With it: the
    critics move exactly as without, policy and log_alpha move, targets by tau toward their online network.
    Updates alternate, so that Adam has moments for every weight.
    """
    script, arguments = VARIANTS[variant]
    full = make_agent(script, **arguments)
    buffers = {name for name, _ in full.named_buffers()}
    for step in range(1, 7):
        with_policy = step % 2 == 0
        batch, before = make_batch(script, step), weights_of(full)
        plain = copy.deepcopy(full)
        for agent, flag in ((plain, False), (full, with_policy)):
            torch.manual_seed(step)
            agent.update(batch, flag)
        without, after = weights_of(plain), weights_of(full)
        for name, weight in after.items():
            moved = not torch.equal(weight, before[name])
            if name in buffers:
                assert torch.equal(weight, without[name]), name
            elif name.startswith(("critics.", "entropy_critic.")):
                assert moved and torch.equal(weight, without[name]), name
            elif name.startswith("target_"):
                assert moved == with_policy, name
                if moved:
                    expected = before[name].lerp(after[name.removeprefix("target_")], TAU)
                    assert torch.allclose(weight, expected, rtol=1e-12), name
            else:
                assert moved == with_policy, name


class NoSynchronization(TorchDispatchMode):
    """Raises where a tensor's value decides about the program: on a GPU the host would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0].removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_does_not_synchronize_with_the_host(variant):
    """No .item(), float(), bool() or boolean index in an update of either kind."""
    script, arguments = VARIANTS[variant]
    agent, batch = make_agent(script, **arguments), make_batch(script, 1)
    with NoSynchronization():
        for update_policy in (False, True, True):
            agent.update(batch, update_policy)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronization():
        batch.reward[0].item()
