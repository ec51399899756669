"""Small environments, most of them with one fault.

Importing this module registers the class <Name>Env as <Name>-v0, on a command line environments:<Name>-v0.
"""

import os
import random
import time

import gymnasium as gym
import numpy as np


def box(low, high, shape=None, dtype=np.float32) -> gym.spaces.Box:
    low, high = (np.broadcast_to(bound, shape or np.shape(bound)).astype(dtype) for bound in (low, high))
    return gym.spaces.Box(low, high, dtype=dtype)


FLOAT64 = box(-np.inf, np.inf, (3,), np.float64)
INT64 = box(-1000, 1000, (3,), np.int64)


# Recording


class RecordingEnv(gym.Env):
    """Observes (copy, episode, time). Episodes alternately terminate after 3 steps and are truncated after 5.

    The class records the seeds of reset() and the actions of each copy, since the last call of main(). Copies are
    numbered in the order in which they are made: first those for training, then those for evaluation.
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


# Unusual, but allowed


class MutatingEnv(RecordingEnv):
    """Changes the action array in place."""

    def step(self, action):
        result = super().step(action)
        action *= 10
        return result


class ReusingEnv(RecordingEnv):
    """Returns the same observation array every time."""

    def __init__(self):
        super().__init__()
        self.array = np.zeros(3, self.observation_space.dtype)

    def observe(self):
        self.array[:] = super().observe()
        return self.array


class ReusingFloat64Env(ReusingEnv):
    observation_space = FLOAT64


class InfosEnv(RecordingEnv):
    """Its infos contain arrays of different shapes, None, and keys that the vector environment uses itself."""

    def info(self):
        info = {"array": np.zeros(self.time + self.copy), "none": 1.0 if self.copy % 2 else None}
        return info | {"final_obs": "nothing", "final_info": {"a": 1}, "episode": {"r": 1e9}}

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], self.info()

    def step(self, action):
        return *super().step(action)[:4], self.info()


class GlobalRandomEnv(RecordingEnv):
    """Draws from the global generators instead of its own."""

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs + np.random.uniform(size=3).astype(np.float32), {}

    def reward(self):
        return random.random()


class RaisingCloseEnv(RecordingEnv):
    def close(self):
        raise ZeroDivisionError


class SlowEnv(RecordingEnv):
    def reward(self):
        time.sleep(0.02)
        return super().reward()


class HangingStepEnv(RecordingEnv):
    """Hangs in the iteration that begins at step 88 of a run of the sizes SMALL."""

    def reward(self):
        if self.hangs():
            print("hangs")
            time.sleep(600)
        return super().reward()

    def hangs(self):
        return self.copy == 1 and len(RecordingEnv.actions[1]) == 45


class HangingEvaluationEnv(HangingStepEnv):
    """Hangs in the evaluation at step 50, the second one of three steps."""

    def hangs(self):
        return self.copy == 3 and len(RecordingEnv.actions[3]) == 4


# Faulty values


class ShapeEnv(RecordingEnv):
    def observe(self):
        return np.zeros(4, np.float32)


class NanAutoresetEnv(RecordingEnv):
    def observe(self):
        return np.full(3, np.nan if self.episode == 2 and self.time == 0 else 1)


class FaultyEnv(RecordingEnv):
    """Is correct until the last step of episode 2; the classes below say what it returns there."""

    last_obs = (1, 1, 1)
    last_reward = 0.0

    def observe(self):
        return np.array(self.last_obs if self.fails() else (1, 1, 1), float)

    def reward(self):
        return self.last_reward if self.fails() else 0.0

    def fails(self):
        return self.episode == 2 and self.time == 3


class NanObservationEnv(FaultyEnv):
    last_obs = (1, np.nan, 1)


class OverflowObservationEnv(FaultyEnv):
    observation_space = FLOAT64
    last_obs = (1, -1e39, 1)


class FractionalIntegerEnv(FaultyEnv):
    observation_space = INT64
    last_obs = (1, 0.5, 1)


class UnsignedEnv(FaultyEnv):
    observation_space = box(0, 9, (3,), np.uint8)
    last_obs = (1, -1, 1)


class NanRewardEnv(FaultyEnv):
    last_reward = np.nan


class OverflowRewardEnv(FaultyEnv):
    last_reward = -1e39


class ArrayRewardEnv(FaultyEnv):
    last_reward = np.ones(2)


# Spaces


class Float64Env(RecordingEnv):
    """float64 everywhere; bounds that float32 cannot represent."""

    observation_space = FLOAT64
    action_space = box(np.array([-0.4, 0.1]), np.array([0.4, 0.7]), dtype=np.float64)

    def step(self, action):
        assert action.dtype == np.float64 and self.action_space.contains(action), action
        return super().step(action)


class DictionaryEnv(RecordingEnv):
    observation_space = gym.spaces.Dict({"a": box(-1, 1, (2,))})


class ImageEnv(RecordingEnv):
    observation_space = box(0, 255, (8, 8, 3), np.uint8)


class NarrowEnv(RecordingEnv):
    action_space = box(-0.002, 0.002, (2,))


class EmptyEnv(RecordingEnv):
    action_space = box(np.array([-1.0, 1.0]), np.array([1.0, 1.0]))  # the second action has one value


class HalfBoundedEnv(RecordingEnv):
    action_space = box(0, np.inf, (2,))


class IntegerActionEnv(RecordingEnv):
    action_space = box(np.arange(60), np.arange(60) + 1, dtype=np.int64)  # NumPy prints several lines


# Episodes


class OneStepEnv(RecordingEnv):
    def terminated(self):
        return True

    def truncated(self):
        return False


class EndlessEnv(RecordingEnv):
    """Odd copies never end. Even ones end after 3 steps: 0 and 4 terminate, 2 is truncated."""

    def terminated(self):
        assert self.time <= 60, "an evaluation without limit"
        return self.copy % 4 == 0 and self.time == 3

    def truncated(self):
        return self.copy % 4 == 2 and self.time == 3


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


# Rendering


class RenderingEnv(RecordingEnv):
    """Its picture shows the time: black at 0, white at 5, where the episode ends."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    renderer = None  # MUJOCO_GL when it was last rendered

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        RenderingEnv.renderer = os.environ.get("MUJOCO_GL")
        return np.full((64, 64, 3), 51 * self.time, np.uint8)

    def terminated(self):
        return self.time == 5

    def truncated(self):
        return False


class NoOpenGLEnv(RenderingEnv):
    def render(self):
        return None.eglQueryString  # the error of MuJoCo without OpenGL


for name, value in list(vars().items()):
    if name.endswith("Env"):
        gym.register(f"{name.removesuffix('Env')}-v0", value)
