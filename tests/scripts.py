"""Functions that run a script on an environment and read what it has written, and named moments of such a run."""

import gc
import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from unittest import mock

import torch
from environments import RecordingEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPTS = ("dsac_e", "dsac_t", "sac", "td3")
SMALL = {"num_envs": 2, "total_timesteps": 100, "learning_starts": 40, "batch_size": 8, "buffer_size": 1000,
         "hidden_width": 8, "eval_interval": 50, "eval_episodes": 2, "compile": False, "device": "cpu"}  # fmt: skip


# Running


@dataclass
class Result:
    """How a script has ended: its exit code and, if it called sys.exit with a text, that text."""

    code: int
    message: str = ""

    def fails_with(self, pattern: str) -> bool:
        """Whether it exited with code 1 and one line, in which the regular expression occurs."""
        return self.code == 1 and re.search(pattern, self.message) is not None and "\n" not in self.message


def options(env: str, run_dir: Path | None, **arguments) -> list[str]:
    """Command-line options of a run of the sizes SMALL; None omits an option."""
    arguments = {"env_id": f"environments:{env}-v0", "run_dir": run_dir} | SMALL | arguments
    words = []
    for name, value in arguments.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def main(script: str, words: list) -> Result:
    """Calls main() of a script with this command line, after clearing what RecordingEnv has recorded.

    Exceptions other than SystemExit pass. Environment variables and sys.path are restored.
    """
    gc.collect()  # releases the lock of a run directory that the frames of an exception still hold
    RecordingEnv.clear()
    module = importlib.import_module(script)
    argv = [f"{script}.py", *map(str, words)]
    try:
        with mock.patch.dict(os.environ), mock.patch.multiple(sys, argv=argv, path=sys.path.copy()):
            module.main()
    except SystemExit as error:
        if isinstance(error.code, str):
            return Result(1, error.code)
        return Result(error.code or 0)
    return Result(0)


def train(env: str, run_dir: Path, script: str = "dsac_e", **arguments) -> Result:
    return main(script, options(env, run_dir, **arguments))


def start(env: str, run_dir: Path, script: str, **arguments) -> subprocess.Popen:
    """Starts a script as another process, in the directory of environments.py."""
    command = [sys.executable, ROOT / f"{script}.py", *options(env, run_dir, **arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=TESTS, env=os.environ | {"PYTHONUNBUFFERED": ""}, **pipes)


# Moments of a run


class Moment(Enum):
    """In a run of the sizes SMALL: the phase, and the step at which this iteration or evaluation begins.

    The moment is the first step of the second environment in it; the first environment has just made its own.
    """

    BEFORE_LEARNING = ("training", 12)
    EVALUATION = ("evaluation", 50)
    LEARNING = ("training", 86)
    LAST_EVALUATION = ("evaluation", 100)


def call_at(monkeypatch, moment: Moment, function):
    """Calls a function once, at a moment of the next run of RecordingEnv; the run must start at step 0."""
    calls, reward = [function], RecordingEnv.reward

    def reward_and_call(self):
        trained = len(RecordingEnv.actions[0]) + len(RecordingEnv.actions[1])
        now = {1: ("training", trained - 2), 3: ("evaluation", trained)}  # by copy; 2 and 3 evaluate
        if calls and now.get(self.copy) == moment.value:
            calls.pop()()
        return reward(self)

    monkeypatch.setattr(RecordingEnv, "reward", reward_and_call)


# What a run has written


def evaluated(output: str) -> list[int]:
    """The steps of the evaluations that a run has printed."""
    return [int(step) for step in re.findall(r"^step (\d+): return ", output, re.MULTILINE)]


def command_in(output: str) -> list[str]:
    """The words of the command that resumes the run, which it prints at the end."""
    return shlex.split(re.search(r"python .*--run-dir .*", output)[0])


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


def equal(first: dict, second: dict, parts=("agent", "optimizer", "replay")) -> bool:
    """Whether these parts of two checkpoints are bitwise equal."""
    leaves = [flat([content[part] for part in parts]) for content in (first, second)]
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*leaves, strict=True))
