"""--env-threads and a second signal: the same run, and nothing lost when a step fails or hangs in a thread."""

import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import RecordingEnv
from scripts import Moment, call_at, equal, load, main, options, scalars, start, train

import dsac_e


@pytest.mark.parametrize("env", ["Recording", "Reusing", "Mutating", "Slow"])
def test_threads_change_nothing(tmp_path, env):
    """Bitwise the same replay, weights and evaluations; each environment makes the same steps, one at a time."""
    steps = []
    for threads in (0, 1, 4):
        assert train(env, tmp_path / str(threads), env_threads=threads, total_timesteps=60).code == 0
        steps.append(RecordingEnv.actions)
    first, *others = [load(tmp_path / name) for name in ("0", "1", "4")]
    for other, actions in zip(others, steps[1:], strict=True):
        assert equal(first, other)
        assert str(actions) == str(steps[0])
    returns = [scalars(tmp_path / name)["eval/episodic_return"] for name in ("0", "1", "4")]
    assert returns[0] == returns[1] == returns[2]


def test_environments_step_during_the_update(tmp_path, monkeypatch):
    """The step has begun, in another thread, when the update starts; without threads it has not."""
    update, log = dsac_e.Agent.update, []

    def slow_update(self, batch, update_policy):
        time.sleep(0.05)  # the threads need no more
        log.append(("update", len(RecordingEnv.actions[0])))
        return update(self, batch, update_policy)

    def reward(self):
        if threading.current_thread() is not threading.main_thread():
            log.append(("thread", self.copy))
        return 0.0

    monkeypatch.setattr(dsac_e.Agent, "update", slow_update)
    monkeypatch.setattr(RecordingEnv, "reward", reward)
    for threads, begun in ((0, 20), (2, 21)):
        log.clear()
        train("Recording", tmp_path / str(threads), env_threads=threads, total_timesteps=42)
        assert [entry for entry in log if entry[0] == "update"] == [("update", begun)]
        assert bool(("thread", 0) in log) == (threads > 0)


def test_a_begun_step_is_made_once():
    """step() completes what begin() has started; without begin() it makes a step of its own."""
    env = dsac_e.CheckedEnv(gym.make("Recording-v0"))
    env.reset()
    with ThreadPoolExecutor(1) as env.pool:
        env.begin(np.ones(2, np.float32))
        times = [env.step(np.ones(2, np.float32))[0][2] for _ in range(2)]
    assert times == [1, 2]


@pytest.mark.parametrize("env", ["NanReward", "NanObservation"])
def test_an_invalid_value_in_a_thread(tmp_path, env):
    results = [train(env, tmp_path / str(threads), env_threads=threads) for threads in (0, 2)]
    assert results[0] == results[1] and results[1].fails_with(f"{env}-v0 returned an invalid")
    assert equal(load(tmp_path / "0"), load(tmp_path / "2")) and load(tmp_path / "2")["step"] == 20


def test_an_exception_in_a_thread_saves(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        call_at(patch, Moment.LEARNING, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("Recording", tmp_path, env_threads=2)
    assert load(tmp_path)["step"] == Moment.LEARNING.value[1]
    assert train("Recording", tmp_path, env_threads=2).code == 0


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("env, step", [("HangingStep", 88), ("HangingEvaluation", 50)])
def test_a_second_signal_interrupts_an_environment_that_hangs(tmp_path, env, step, threads):
    """The first one waits for the environment. What was learned is saved, and the process ends."""
    process = start(env, tmp_path, "dsac_e", env_threads=threads)
    while "hangs" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.terminate()
    assert process.wait(300) == 128 + signal.SIGTERM
    assert load(tmp_path)["step"] == step and load(tmp_path)["replay"].isfinite().all()


@pytest.mark.parametrize("mujoco, threads, device, started", [
    (True, 6, "cpu", 2), (True, 4, "cpu", None), (True, 2, "cpu", None), (False, 6, "cpu", None)
])  # fmt: skip
def test_the_default_is_the_number_of_idle_cores_for_mujoco(
    tmp_path, monkeypatch, mujoco, threads, device, started
):
    """torch takes at most four threads, unless OMP_NUM_THREADS says otherwise."""
    pools = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: state[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: state.__setitem__(0, number))
    monkeypatch.setattr(dsac_e, "ThreadPoolExecutor", lambda number: pools.append(number) or executor(1))
    state, executor = [threads], ThreadPoolExecutor
    words = options("Recording", tmp_path, total_timesteps=4, learning_starts=2)
    if mujoco:
        words += ["--env-id", "InvertedPendulum-v5"]
    assert main("dsac_e", words).code == 0
    assert pools == ([started] if started else []) and state == [min(4, threads)]
