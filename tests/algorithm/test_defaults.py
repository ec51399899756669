"""The defaults are the papers' protocol, and the algorithm above the line of = signs works on its own."""

import ast
import dataclasses
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import SCRIPTS

PROTOCOL = {
    "env_id": "Humanoid-v4", "seed": 0, "gamma": 0.99, "tau": 0.005, "policy_delay": 2, "hidden_width": 256,
    "policy_lr": 1e-4, "critic_lr": 1e-4, "batch_size": 256, "buffer_size": 1_000_000, "learning_starts": 10_000,
    "num_envs": 20, "updates_per_step": 1,  # 20 environment steps per update
    "total_timesteps": 30_000_000,  # 1.5 million updates
    "eval_interval": 50_000,  # 2,500 updates
    "eval_episodes": 10, "checkpoint_interval": 500_000, "env_threads": None, "device": "auto", "compile": True,
    "run_dir": "", "evaluate": False, "capture_video": False,
}  # fmt: skip
TEMPERATURE = {"alpha_lr": 3e-4, "initial_alpha": math.e}
OWN = {
    "dsac_e": TEMPERATURE | {"rho": 20.0, "tec": True, "res": True, "center_entropy": False},
    "dsac_t": TEMPERATURE,
    "sac": TEMPERATURE,
    "td3": {"exploration_noise": 0.1, "target_noise": 0.2, "noise_clip": 0.5},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults(name):
    """Every argument, so that a new one has to be added here as well."""
    assert dataclasses.asdict(SCRIPTS[name].Args()) == PROTOCOL | OWN[name]
    assert name == SCRIPTS[name].ALGORITHM


@pytest.mark.parametrize("name", SCRIPTS)
def test_networks_have_three_hidden_layers(name):
    agent = SCRIPTS[name].Agent(SCRIPTS[name].Args(hidden_width=7), 3, -np.ones(2), np.ones(2))
    for key, network in agent.named_children():
        shapes = [weight.shape[1:] for weight in network.parameters()][::2]
        assert shapes[:3] == [(7, 3 if "policy" in key else 5), (7, 7), (7, 7)] and len(shapes) == 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_upper_half_alone(name):
    """The text above the line of = signs imports only torch, numpy and the standard library, uses nothing
    below it, and trains in another loop: every weight changes.
    """
    upper, line, _ = Path(SCRIPTS[name].__file__).read_text().partition("\n# =====")
    assert line
    imports = [node for node in ast.walk(ast.parse(upper)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [getattr(node, "module", None) or alias.name for node in imports for alias in node.names]
    assert {module.partition(".")[0] for module in modules} <= {"torch", "numpy"} | sys.stdlib_module_names
    module = types.ModuleType(f"upper_half_of_{name}")
    sys.modules[module.__name__] = module  # dataclasses look themselves up
    exec(upper, module.__dict__)

    agent = module.Agent(module.Args(env_id="Ant-v4", hidden_width=16), 3, -np.ones(1), np.ones(1))
    before = {key: weight.clone() for key, weight in agent.named_parameters()}
    obs = torch.randn(64, 3)
    for step in range(4):
        action = torch.from_numpy(agent.policy.act(obs.numpy()))
        batch = module.Batch(obs, action, action.square().squeeze(1), torch.randn(64, 3), torch.zeros(64))
        agent.update(batch, update_policy=step % 2 == 0)
    assert all(not torch.equal(weight, before[key]) for key, weight in agent.named_parameters())
