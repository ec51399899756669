"""Who may feel whom: alpha and the reward critics, the steps and the networks they leave alone, targets and Polyak."""

import copy

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from test_distribution import Answers, pev
from test_update import BATCH, GAMMA, TAU, VARIANTS, make_agent, make_batch

import dsac_e
import dsac_t
import sac
import td3

LOW_ALPHA, HIGH_ALPHA = -3.0, 1.5
SEPARATED, ENTANGLED = ("dsac_e", "no_tec"), ("no_tec_no_res", "dsac_t", "sac")


def updated(variant, log_alpha, delayed=True):
    """The agent of always the same start but for log_alpha, after one update on always the same batch and noise."""
    module, arguments, _ = VARIANTS[variant]
    agent = make_agent(module, **arguments)
    with torch.no_grad():
        agent.log_alpha.fill_(log_alpha)
    start = copy.deepcopy(agent)
    torch.manual_seed(0)
    log = agent.update(make_batch(module, 1), delayed)
    return start, agent, log


def bits(agent, part):
    """Weights and gradients of everything whose name begins with `part`."""
    return {
        name: (weight.detach().clone(), weight.grad)
        for name, weight in agent.named_parameters()
        if name.startswith(part)
    }


def assert_no_gradient(*nets):
    for net in nets:
        for weight in net.parameters():
            assert weight.requires_grad and weight.grad is None  # without requires_grad, None would prove nothing


def assert_gradient(*nets):
    for net in nets:
        assert all(weight.grad.abs().max() > 0 for weight in net.parameters())


@pytest.mark.parametrize("variant", SEPARATED + ENTANGLED)
def test_alpha_and_what_the_critics_learn(variant):
    """With separation, two agents that differ in alpha alone compute the same critic gradients, weights and spread, bit
    by bit; their policies part, so alpha was felt where it may be. Without, every gradient of the twins differs."""
    (_, low, _), (_, high, _) = updated(variant, LOW_ALPHA), updated(variant, HIGH_ALPHA)
    twins, others = bits(low, "critics"), bits(high, "critics")
    if variant in SEPARATED:
        twins, others = twins | bits(low, "entropy_critic"), others | bits(high, "entropy_critic")
        for name, (weight, gradient) in twins.items():
            assert torch.equal(weight, others[name][0]) and torch.equal(gradient, others[name][1]), name
        assert torch.equal(low.spread, high.spread)
    else:
        for name, (_, gradient) in twins.items():
            assert not torch.equal(gradient, others[name][1]), name
    for name, (_, gradient) in bits(low, "policy").items():
        assert not torch.equal(gradient, bits(high, "policy")[name][1]), name


@pytest.mark.parametrize("variant", SEPARATED + ENTANGLED)
def test_targets_shift_by_the_entropy_bonus_or_not_at_all(variant):
    """From one alpha to another the targets of entangled critics move by -gamma (1-d) (alpha' - alpha) log pi(a'|s'),
    those of separated critics not by a bit."""
    start, _, low = updated(variant, LOW_ALPHA, delayed=False)
    _, _, high = updated(variant, HIGH_ALPHA, delayed=False)
    shift = high["critic/target"] - low["critic/target"]
    if variant in SEPARATED:
        assert torch.equal(shift, torch.zeros_like(shift))
        return
    batch = make_batch(VARIANTS[variant][0], 1)
    torch.manual_seed(0)
    with torch.no_grad():
        policy = start.policy if variant == "sac" else start.target_policy
        _, log_prob = policy(batch.next_obs, torch.randn_like(batch.action))
    expected = -GAMMA * (1 - batch.terminated) * (np.exp(HIGH_ALPHA) - np.exp(LOW_ALPHA)) * log_prob
    assert expected.abs().max() > 1 and (expected == 0).sum() == batch.terminated.sum() > 0
    np.testing.assert_allclose(shift.reshape(-1, BATCH)[0], expected, rtol=1e-10, atol=1e-12)


def test_sampled_target_of_dsac_t_shifts_as_well():
    """The target that moves sigma carries the same entropy as the one that moves Q."""
    batch, size = make_batch(dsac_t, 1), (2, BATCH)
    noise, log_prob = (torch.linspace(-x, x, BATCH, dtype=torch.float64) for x in (2, 3))
    wide, targets = 1e3, []
    for alpha in (0.25, 1.5):
        # So low a Q makes y - Q positive, and so wide a spread leaves y unclipped.
        critics, target_critics = Answers(np.full(size, -100.0), np.ones(size)), Answers(np.zeros(size), np.ones(size))
        pev(dsac_t, critics, target_critics, batch, noise, [wide, wide], alpha, log_prob, tau=0.0)[0].backward()
        # d loss / d sigma = -(wide^2 + 0.1) ((y - Q)^2 - 1) / (1 + 0.1) / B, solved for y
        targets.append(-100 + np.sqrt(1 - critics.sigma.grad.numpy() * BATCH * 1.1 / (wide**2 + 0.1)))
    expected = -GAMMA * (1 - batch.terminated) * (1.5 - 0.25) * log_prob
    np.testing.assert_allclose(targets[1] - targets[0], [expected, expected], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SCRIPTS)
def test_targets_are_constants(name):
    """PEV and PIS send gradients into the critics they train and nowhere else: not into target networks, the policy
    behind the next action and its entropy, or alpha, even where all of these ask for gradients."""
    module, arguments, _ = VARIANTS[name]
    agent = make_agent(module, **arguments).requires_grad_(True)
    batch = make_batch(module, 1)
    spread = torch.zeros(2, dtype=torch.float64)
    noise = torch.ones_like(batch.reward)
    critics = agent.critics, agent.target_critics
    if module is td3:
        sources = [agent.policy]
        loss, _ = module.pev(*critics, batch, agent.policy(batch.next_obs), GAMMA)
    else:
        sources = [agent.policy, agent.target_policy] if name != "sac" else [agent.policy]
        samples = [policy(batch.next_obs, torch.ones_like(batch.action)) for policy in sources]
        action, log_prob = sum(a for a, _ in samples), sum(p for _, p in samples)
        alpha = agent.log_alpha.exp()
        if module is dsac_e:
            loss, new_spread, _ = module.pev(*critics, batch, action, noise, spread, GAMMA, TAU)
            qe_loss, _ = module.pis(agent.entropy_critic, agent.target_entropy_critic, batch, action, log_prob, GAMMA)
            loss = loss + qe_loss
        elif module is dsac_t:
            loss, new_spread, _ = module.pev(*critics, batch, action, log_prob, noise, alpha, spread, GAMMA, TAU)
        else:
            loss, _ = module.pev(*critics, batch, action, log_prob, alpha, GAMMA)
        assert agent.log_alpha.requires_grad and (name == "sac" or not new_spread.requires_grad)
    loss.backward()
    targets = [net for part, net in agent.named_children() if part.startswith("target_") and net not in sources]
    assert_no_gradient(*sources, *targets)
    assert_gradient(agent.critics, *([agent.entropy_critic] if module is dsac_e else []))
    assert module is td3 or agent.log_alpha.grad is None


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_plain_update_touches_only_critics(name):
    """An update that is not delayed leaves no gradient outside the critics and moves nothing outside them."""
    module, arguments, _ = VARIANTS[name]
    agent = make_agent(module, **arguments)
    before = bits(agent, "")
    agent.update(make_batch(module, 1), delayed=False)
    for part, (weight, gradient) in bits(agent, "").items():
        learns = part.startswith(("critics.", "entropy_critic."))
        assert (gradient is not None) == learns, part
        assert torch.equal(weight, before[part][0]) != learns, part


@pytest.mark.parametrize("name", SCRIPTS)
def test_pim_spares_the_critics(name):
    """Policy improvement gives the policy a gradient, and none to the critics, which ask for one, or to alpha. What it
    hands to TUP carries no gradient."""
    module, arguments, _ = VARIANTS[name]
    agent = make_agent(module, **arguments)
    obs = make_batch(module, 1).obs
    noise = torch.ones(BATCH, 2, dtype=torch.float64)
    if module is td3:
        module.pim(agent.policy, agent.critics, obs).backward()
    else:
        critics = (agent.critics, agent.entropy_critic) if module is dsac_e else (agent.critics,)
        loss, *entropies = module.pim(agent.policy, *critics, obs, noise, agent.log_alpha.exp())
        assert not any(entropy.requires_grad for entropy in entropies)
        loss.backward()
        assert_no_gradient(*critics)
        assert agent.log_alpha.grad is None
    assert_no_gradient(agent.critics)
    assert_gradient(agent.policy)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_delayed_update_trains_the_critics_as_a_plain_one_does(name):
    """The policy step adds nothing to the gradients of the critics and does not move them."""
    module, arguments, _ = VARIANTS[name]
    plain, delayed = make_agent(module, **arguments), make_agent(module, **arguments)
    for agent in (plain, delayed):
        torch.manual_seed(0)
        agent.update(make_batch(module, 1), delayed=agent is delayed)
    for part in ("critics", "entropy_critic"):
        others = bits(delayed, part)
        for key, (weight, gradient) in bits(plain, part).items():
            assert torch.equal(weight, others[key][0]) and torch.equal(gradient, others[key][1]), key


@pytest.mark.parametrize("module", [dsac_e, dsac_t, sac], ids=["dsac_e", "dsac_t", "sac"])
def test_tup_spares_the_policy(module):
    """The temperature's loss moves alpha alone, even when the entropy it is given depends on the policy's weights."""
    agent = make_agent(module)
    _, log_prob = agent.policy(make_batch(module, 1).obs, torch.ones(BATCH, 2, dtype=torch.float64))
    module.tup(agent.log_alpha, -log_prob, agent.budget).backward()
    assert_no_gradient(agent.policy)
    assert agent.log_alpha.grad.abs() > 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_targets_move_by_polyak_alone(name):
    """A target network rests bit by bit in a plain update; in a delayed one it goes by exactly tau towards what its own
    online network has become. SAC takes the next action from the online policy and so has no target policy."""
    module, arguments, _ = VARIANTS[name]
    agent = make_agent(module, **arguments)
    names = {part for part, _ in agent.named_children() if part.startswith("target_")}
    extra = {"dsac_e": {"target_policy", "target_entropy_critic"}, "sac": set()}.get(name, {"target_policy"})
    assert names == {"target_critics"} | extra
    for step in (1, 2, 3, 4):
        before = bits(agent, "target_")
        agent.update(make_batch(module, step), delayed=step % 2 == 0)
        after, online = bits(agent, "target_"), dict(agent.named_parameters())
        for part, (old, _) in before.items():
            new = after[part][0]
            if step % 2 == 1:
                assert torch.equal(new, old), part
            else:
                expected = old + TAU * (online[part.removeprefix("target_")].detach() - old)
                np.testing.assert_allclose(new, expected, rtol=1e-12, atol=1e-14, err_msg=part)
                assert not torch.equal(new, old), part


def test_targets_move_in_every_second_update_of_a_run(run, script, monkeypatch):
    """By default, in a real run: the targets start as copies, rest in the odd updates and move in the even ones."""
    args = script.Args()
    assert (args.tau, args.policy_delay, args.gamma) == (0.005, 2, 0.99)
    moved, update = [], script.Agent.update

    def spy(agent, batch, delayed):
        before = bits(agent, "target_")
        if not moved:
            online = dict(agent.named_parameters())
            assert all(torch.equal(old, online[part.removeprefix("target_")]) for part, (old, _) in before.items())
        log = update(agent, batch, delayed)
        after = bits(agent, "target_")
        changes = {not torch.equal(after[part][0], old) for part, (old, _) in before.items()}
        assert len(changes) == 1  # all of them or none
        moved.extend(changes)
        return log

    monkeypatch.setattr(script.Agent, "update", spy)
    run(script, env_id="Ledger-v0")
    assert len(moved) > 6 and moved == [i % 2 == 1 for i in range(len(moved))]
