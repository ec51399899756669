"""Small environments, most of them with one fault, and functions that run a script on them.

Importing this module registers the class <Name>Env as <Name>-v0, on a command line environments:<Name>-v0.
"""

import gc
import importlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPTS = ("dsac_e", "dsac_t", "sac", "td3")
SMALL = {"num_envs": 2, "total_timesteps": 100, "learning_starts": 40, "batch_size": 8, "buffer_size": 1000,
         "hidden_width": 8, "eval_interval": 50, "eval_episodes": 2, "compile": False, "device": "cpu"}  # fmt: skip
ENVIRON = os.environ | {"PYTHONUNBUFFERED": "1"}  # without MUJOCO_GL, which main() sets: it requires EGL


def options(env: str, run_dir: Path, **arguments) -> list[str]:
    """Command-line options of a small run; None omits an option."""
    arguments = {"env_id": f"environments:{env}-v0", "run_dir": run_dir} | SMALL | arguments
    words = []
    for name, value in arguments.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def main(script: str, words: list[str]) -> int | str | Exception | None:
    """Calls main() of a script, after clearing what RecordingEnv has recorded. Returns None, the argument of
    sys.exit, or the exception that it raised.
    """
    RecordingEnv.clear()
    module = importlib.import_module(script)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = sys.argv, sys.path.copy(), [signal.getsignal(number) for number in signals]
    sys.argv = [f"{script}.py", *map(str, words)]
    try:
        module.main()
    except SystemExit as error:
        return error.code
    except Exception as error:
        return error.with_traceback(None)  # whose frames hold the lock of the run directory
    finally:
        sys.argv, sys.path[:], handlers = before
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
        gc.collect()  # releases the lock of the run directory


def train(env: str, run_dir: Path, script: str = "dsac_e", **arguments):
    return main(script, options(env, run_dir, **arguments))


def start(words: list[str], script: str) -> subprocess.Popen:
    """Starts a script as a process in the directory of this module."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": TESTS, "env": ENVIRON}
    return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *words], **pipes)


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """The scalars of a run by tag and step, as TensorBoard shows them; asserts that no step occurs twice."""
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    assert all(len(dict(values)) == len(values) for values in points.values()), "a step occurs twice"
    return {tag: dict(values) for tag, values in points.items()}


def load(run_dir: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(run_dir / name, weights_only=True)


def flat(value) -> list:
    """The leaves of nested dictionaries and lists."""
    if isinstance(value, dict):
        value = [*value.values()]
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, list | tuple) else [value]


def equal(first: dict, second: dict) -> bool:
    """Whether the networks, the optimizers and the transitions of two checkpoints are bitwise equal."""
    parts = ("agent", "optimizer", "replay")
    leaves = [flat([content[part] for part in parts]) for content in (first, second)]
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*leaves, strict=True))


def box(low, high, shape=None, dtype=np.float32) -> gym.spaces.Box:
    low, high = (np.broadcast_to(bound, shape or np.shape(bound)).astype(dtype) for bound in (low, high))
    return gym.spaces.Box(low, high, dtype=dtype)


class RecordingEnv(gym.Env):
    """Observes (copy, episode, time). Episodes alternately terminate after 3 steps and are truncated after 5.

    The class records the seeds of reset() and the actions of each copy, since the last call of main().
    """

    observation_space = box(-np.inf, np.inf, (3,))
    action_space = box(np.array([-2.0, 1.0]), np.array([5.0, 1.5]))
    copies, seeds, actions = 0, [], {}

    def __init__(self):  # takes no render_mode: it cannot be rendered
        self.copy, self.episode, self.time = RecordingEnv.copies, -1, 0
        RecordingEnv.copies += 1
        RecordingEnv.actions[self.copy] = []

    @classmethod
    def clear(cls):
        RecordingEnv.copies, RecordingEnv.seeds, RecordingEnv.actions = 0, [], {}

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            RecordingEnv.seeds.append(seed)
        self.episode, self.time = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        RecordingEnv.actions[self.copy].append(action.copy())
        self.time += 1
        return self.observe(), self.reward(), self.terminated(), self.truncated(), {}

    def observe(self):
        return np.array([self.copy, self.episode, self.time], np.float32)

    def reward(self):
        return 100.0 * self.episode + self.time

    def terminated(self):
        return self.episode % 2 == 0 and self.time == 3

    def truncated(self):
        return self.episode % 2 == 1 and self.time == 5

    def close(self):
        pass


def variant(name: str, base: type = RecordingEnv, **attributes):
    """An environment that differs from another in some attributes and methods."""
    globals()[f"{name}Env"] = type(f"{name}Env", (base,), attributes)


def call_at(monkeypatch, n: int | None, function):
    """Calls a function in the n-th step of RecordingEnv from now on, all copies counted; never if n is None.

    In a run of the sizes SMALL, steps 1-6 belong to the first evaluation, 7-56 to training, 57-62 to the evaluation
    at step 50, 63-112 to training, 113-118 to the last evaluation.
    """
    calls, reward = [], RecordingEnv.reward

    def counted(self):
        calls.append(self)
        if len(calls) == n:
            function()
        return reward(self)

    monkeypatch.setattr(RecordingEnv, "reward", counted)


class MutatingEnv(RecordingEnv):
    """Changes the action array in place."""

    def step(self, action):
        result = super().step(action)
        action *= 10
        return result


class ReusingEnv(RecordingEnv):
    """Returns the same observation array every time."""

    def observe(self):
        if not hasattr(self, "array"):
            self.array = np.zeros(3, np.float32)
        self.array[:] = super().observe()
        return self.array


class InfosEnv(RecordingEnv):
    """Its infos contain arrays of different shapes, None, and keys that the vector environment uses itself."""

    def step(self, action):
        *result, _ = super().step(action)
        info = {"array": np.zeros(self.time + self.copy), "none": 1.0 if self.copy % 2 else None}
        return *result, info | {"final_obs": "nothing", "final_info": {"a": 1}, "episode": {"r": 1e9}}


class GlobalRandomEnv(RecordingEnv):
    """Draws from the global generators instead of its own."""

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs + np.random.uniform(size=3).astype(np.float32), {}

    def reward(self):
        return random.random()


variant("RaisingClose", close=lambda self: 1 / 0)


def last_of_episode_2(value, otherwise=0.0):
    """A method that returns `value` in the last step of episode 2, otherwise `otherwise`."""
    return lambda self: value if self.episode == 2 and self.time == 3 else otherwise


ONES, FLOAT64, INT64 = np.ones(3), box(-np.inf, np.inf, (3,), np.float64), box(-1000, 1000, (3,), np.int64)
# Invalid values
variant("NanReset", observe=lambda self: np.nan * ONES)
variant("Shape", observe=lambda self: np.zeros(4, np.float32))
variant("NanAutoreset", observe=lambda self: (np.nan if self.episode == 2 and self.time == 0 else 1) * ONES)
variant("NanObservation", observe=last_of_episode_2(np.nan * ONES, ONES))
variant("InfiniteObservation", observe=last_of_episode_2(-np.inf * ONES, ONES))
variant("OverflowObservation", observation_space=FLOAT64, observe=last_of_episode_2(1e39 * ONES, ONES))
variant("NanInteger", observation_space=INT64, observe=last_of_episode_2(np.nan * ONES, ONES))
variant("FractionalInteger", observation_space=INT64, observe=last_of_episode_2(0.5 * ONES, ONES))
variant("Unsigned", observation_space=box(0, 9, (3,), np.uint8), observe=last_of_episode_2(-ONES, ONES))
variant("NanReward", reward=last_of_episode_2(np.nan))
variant("InfiniteReward", reward=last_of_episode_2(-np.inf))
variant("OverflowReward", reward=last_of_episode_2(1e39))
variant("ArrayReward", reward=last_of_episode_2(np.ones(2)))
# Spaces
variant("Narrow", action_space=box(-0.002, 0.002, (2,)))
variant("Wide", action_space=box(-2000, 2000, (2,)))
variant("Dictionary", observation_space=gym.spaces.Dict({"a": box(-1, 1, (2,))}))
variant("Image", observation_space=box(0, 255, (8, 8, 3), np.uint8))
variant("IntegerAction", action_space=box(-3, 4, (2,), np.int64))
variant("IntegerObservation", observation_space=INT64)
variant("Unbounded", action_space=box(-np.inf, np.inf, (2,)))
MANY = np.arange(60)  # printed in several lines
variant("ManyBounds", action_space=box(MANY, MANY + 1, dtype=np.int64))
# Episodes
variant("Endless", terminated=lambda self: False, truncated=lambda self: False)
variant("OneStep", terminated=lambda self: True, truncated=lambda self: False)
variant(  # in each pair of copies the first is truncated after 2 steps, the second after 5
    "Staggered",
    reward=lambda self: 10.0 * self.episode + self.time,
    terminated=lambda self: False,
    truncated=lambda self: self.time == (2, 5)[self.copy % 2],
)


class Float64Env(RecordingEnv):
    """float64 everywhere; bounds that float32 cannot represent."""

    observation_space = box(-np.inf, np.inf, (3,), np.float64)
    action_space = box(np.array([-0.4, 0.1]), np.array([0.4, 0.7]), dtype=np.float64)

    def step(self, action):
        assert action.dtype == np.float64 and self.action_space.contains(action), action
        return super().step(action)


class RenderingEnv(RecordingEnv):
    """Its picture shows the time: black at 0, white at 5, where the episode ends."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode
        assert render_mode is None or "MUJOCO_GL" in os.environ  # without a display MuJoCo's default fails

    def render(self):
        return np.full((64, 64, 3), 51 * self.time, np.uint8)

    def terminated(self):
        return self.time == 5

    def truncated(self):
        return False


variant("NoOpenGL", RenderingEnv, render=lambda self: None.eglQueryString)  # as mujoco without it


class ProbeEnv(gym.Env):
    """Four kinds of episodes whose values are known, shown in the observation as a one-hot vector and the time.

    Kind 0: reward 1, truncated after 2 steps. Kind 1: reward 1, terminates after 1 step. Kind 2: reward 1 in the
    second step, where it terminates. Kind 3: reward -(action - 0.5)^2, terminates after 1 step.
    """

    observation_space = box(0, 1, (5,))
    action_space = box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.kind, self.time = self.np_random.integers(4), 0
        return self.observe(), {}

    def observe(self):
        obs = np.zeros(5, np.float32)
        obs[self.kind] = 1
        obs[4] = self.time == 1 and self.kind == 2
        return obs

    def step(self, action):
        reward = (1.0, 1.0, float(self.time), -((action[0] - 0.5) ** 2))[self.kind]
        self.time += 1
        truncated = self.kind == 0 and self.time == 2
        terminated = self.kind != 0 and self.time == (1, 1, 2, 1)[self.kind]
        return self.observe(), reward, terminated, truncated, {}


for env in [value for value in vars().values() if isinstance(value, type) and issubclass(value, gym.Env)]:
    if env is not gym.Env:
        gym.register(f"{env.__name__.removesuffix('Env')}-v0", env)
