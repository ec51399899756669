"""The four scripts are one family: identical harness, pinned requirements, values that are known in closed form."""

import importlib
import math
import re
import tomllib

import pytest
import torch
from environments import ProbeEnv
from scripts import ROOT, SCRIPTS, load, main, options

SOURCES = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
GAMMA = 0.5


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_harness_is_identical(script):
    _, lower = re.split(r"\n# =+\n", SOURCES[script])
    assert lower == re.split(r"\n# =+\n", SOURCES["dsac_e"])[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_header_repeats_the_pins(script):
    """imageio-ffmpeg comes with moviepy."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", SOURCES[script])[1]
    header = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    section = (ROOT / "requirements.txt").read_text().split("\n\n")[0]
    pins = [line for line in section.splitlines() if line and line[0] != "#" and "imageio-ffmpeg" not in line]
    assert header["dependencies"] == pins and all("==" in pin for pin in pins)
    assert header["requires-python"] == ">=3.11"


@pytest.mark.parametrize("variant", [*SCRIPTS, "dsac_e --center-entropy"])
def test_values_of_known_episodes(tmp_path, variant):
    script, *words = variant.split()
    arguments = {"gamma": GAMMA, "tau": 0.05, "critic_lr": 3e-3, "policy_lr": 3e-3, "hidden_width": 32, "batch_size": 64,
                 "num_envs": 4, "learning_starts": 400, "total_timesteps": 4000, "eval_interval": 10**6,
                 "buffer_size": 10_000}  # fmt: skip
    if script == "td3":
        arguments |= {"exploration_noise": 1.0, "policy_lr": 1e-3}  # a saturated tanh has no gradient
    else:
        arguments |= {"initial_alpha": 0.05, "alpha_lr": 3e-3}
    assert main(script, options("Probe", tmp_path, **arguments) + words).code == 0
    module, saved = importlib.import_module(script), load(tmp_path)
    box = ProbeEnv.action_space
    agent = module.Agent(module.Args(**saved["args"]), 5, box.low, box.high)
    agent.load_state_dict(saved["agent"])
    obs = torch.cat((torch.eye(5)[:4], torch.tensor([[0, 0, 1.0, 0, 1.0]])))
    torch.manual_seed(0)
    with torch.no_grad():
        if script == "td3":
            action, alpha, entropy = agent.policy(obs), 0.0, torch.zeros(5)
        else:
            many = obs.repeat(2000, 1)
            entropy = -agent.policy(many, torch.randn(len(many), 1))[1].view(-1, 5).mean(0)
            action, alpha = agent.policy(obs, torch.zeros(5, 1))[0], agent.log_alpha.exp().item()
    batch = module.Batch(obs, action, torch.zeros(5), obs, torch.zeros(5))
    log = agent.update(batch, update_policy=False)  # Q and Qe before this update
    h = alpha * entropy if script in ("sac", "dsac_t") else torch.zeros(5)  # the entropy is part of Q
    constant = (1 + GAMMA * h[0]) / (1 - GAMMA)
    expected = torch.tensor([constant, 1, GAMMA * (1 + h[4]), 0, 1])
    torch.testing.assert_close(log["critic/q"].amin(0), expected, atol=0.1, rtol=0)
    assert action[3].item() == pytest.approx(0.5, abs=0.15)
    if alpha:  # the best density exp(-(action - 0.5)^2 / alpha) has the entropy log(pi e alpha) / 2
        assert entropy[3].item() == pytest.approx((1 + math.log(math.pi * alpha)) / 2, abs=0.7)
    if "entropy/qe" in log:
        expected = torch.tensor([GAMMA * entropy[0] / (1 - GAMMA), 0, GAMMA * entropy[4], 0, 0])
        torch.testing.assert_close(log["entropy/qe"], expected, atol=0.2, rtol=0)
