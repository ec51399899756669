"""What the tests share: the four scripts as modules, small tasks that keep a record, and a run in a few seconds."""

import importlib
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("dsac_e", "dsac_t", "sac", "td3")
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the tests' networks are small: a second thread only costs


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the four scripts in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, **arguments): trains for some seconds at most and returns the run directory."""

    def run(script, **arguments):
        small = {"num_envs": 3, "total_timesteps": 120, "learning_starts": 60, "batch_size": 16, "buffer_size": 1000,
                 "hidden_width": 16, "eval_episodes": 2, "eval_interval": 60, "device": "cpu"}  # fmt: skip
        directory = arguments.pop("run_dir", tmp_path / f"{script.ALGORITHM}_{len(list(tmp_path.iterdir()))}")
        script.train(script.Args(**(small | {"run_dir": directory} | arguments)))
        return directory

    monkeypatch.setattr(sys, "argv", ["script.py"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Ledger(gym.Env):
    """Every observation is unique: (copy, episode, time in it, 0). Episodes end in turn by termination after 3 steps
    and by truncation after 5. The action box is neither +-1 nor symmetric. Seeds and actions are kept on the class."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Box(np.array([-2.0, 1.0]), np.array([5.0, 1.5]), dtype=np.float64)
    seeds, actions = [], []
    copies = 0

    def __init__(self):
        Ledger.copies += 1
        self.copy, self.episode, self.time = Ledger.copies, -1, 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            Ledger.seeds.append(seed)
        self.episode, self.time = self.episode + 1, 0
        return self.observe(), {}

    def observe(self):
        return np.array([self.copy, self.episode, self.time, 0.0])

    def step(self, action):
        Ledger.actions.append(action)
        self.time += 1
        terminated = self.episode % 2 == 0 and self.time == 3
        truncated = self.episode % 2 == 1 and self.time == 5
        return self.observe(), 100.0 * self.episode + self.time, terminated, truncated, {"time": self.time}


class Staggered(Ledger):
    """The same, but copy n is truncated after n steps, and every step is worth 1."""

    def step(self, action):
        obs, *_ = super().step(action)
        return obs, 1.0, False, self.time == self.copy, {}


class Whole(Ledger):
    """The same with whole-numbered actions."""

    action_space = gym.spaces.Box(-3, 4, (2,), np.int32)


class Unbounded(Ledger):
    """The same with an action that has no bounds."""

    action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Image(Ledger):
    """The same with an image for an observation."""

    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Painted(Staggered):
    """The same, and its picture shows the time: black at 0, white at 5, where it ends."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def step(self, action):
        obs, reward, _, _, infos = super().step(action)
        return obs, reward, self.time == 5, False, infos

    def render(self):
        return np.full((64, 64, 3), 51 * self.time, np.uint8)


for task in (Ledger, Staggered, Whole, Unbounded, Image, Painted):
    if f"{task.__name__}-v0" not in gym.registry:
        gym.register(f"{task.__name__}-v0", task)


@pytest.fixture
def ledger():
    """The Ledger task with an empty record."""
    Ledger.seeds, Ledger.actions, Ledger.copies = [], [], 0
    return Ledger
