"""Data and training: what is stored, what is drawn, what is written, and that a run can be repeated."""

import importlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

dsac_e = importlib.import_module("dsac_e")  # the harness is the same in all four: test_family.py


def scalars(run_dir) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a run, as (step, value) pairs by tag."""
    events = EventAccumulator(str(run_dir)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def stored(monkeypatch):
    """All transitions that training adds to the replay buffer, as (obs, action, next_obs, reward, terminated)."""
    rows = []

    class Recorder(dsac_e.ReplayBuffer):
        def add(self, *columns):
            rows.extend(zip(*(column.copy() for column in columns), strict=True))
            super().add(*columns)

    monkeypatch.setattr(dsac_e, "ReplayBuffer", Recorder)
    return rows


def test_every_transition_is_stored_once_and_true(run, ledger, stored):
    """Over terminations and truncations: next_obs is the observation that followed, also at the end of an episode;
    only true terminations count as such; no reset is stored as a transition, and none is lost."""
    run(dsac_e, env_id="Ledger-v0", total_timesteps=150)
    assert len(stored) == 150
    expected = {}
    for obs, _, next_obs, reward, terminated in stored:
        copy, episode, time, _ = obs
        assert next_obs.tolist() == [copy, episode, time + 1, 0]
        assert reward == 100 * episode + time + 1
        assert terminated == (episode % 2 == 0 and time + 1 == 3)
        last = expected.get(copy, (0, -1))
        ended = last[1] + 1 == (3 if last[0] % 2 == 0 else 5)
        assert (episode, time) == ((last[0] + 1, 0) if ended else (last[0], last[1] + 1))
        expected[copy] = (episode, time)
    assert sum(row[4] for row in stored) > 0 and len(expected) == 3


def test_actions_fit_the_box(run, ledger, stored):
    """The task sees float64 actions inside its own box, and those, not others, are stored."""
    run(dsac_e, env_id="Ledger-v0")
    actions = np.array(ledger.actions)
    assert all(action.dtype == np.float64 and ledger.action_space.contains(action) for action in ledger.actions)
    assert np.ptp(actions[:, 0]) > 2 and np.ptp(actions[:, 1]) > 0.1  # the box is used, in both dimensions
    taken = {tuple(action) for action in ledger.actions}
    assert all(tuple(action) in taken for _, action, *_ in stored)


def test_whole_numbered_actions(run, ledger, script):
    """An integer box gets integers, both ends included, by every algorithm."""
    run(script, env_id="Whole-v0", total_timesteps=300)
    assert all(action.dtype == np.int32 and -3 <= action.min() <= action.max() <= 4 for action in ledger.actions)


def test_act_never_leaves_the_box():
    """float32 rounds 0.4 up and -0.4 down; a saturated policy still returns actions that the space contains."""
    space = gym.spaces.Box(-0.4, 0.4, (3,), np.float64)
    policy = dsac_e.Policy(2, space.low, space.high, 8)
    torch.nn.init.constant_(policy.net[-1].bias, 30.0)
    action = dsac_e.act(policy, np.zeros((1, 2)), space, deterministic=True)
    assert space.contains(action[0]) and np.all(action == 0.4)


def test_small_integer_box(script):
    """The middle and half range of an int8 box are not computed in int8."""
    low, high = np.array([-128], np.int8), np.array([127], np.int8)
    policy = script.Policy(1, low, high, 8)
    assert policy.center.item() == -0.5 and policy.half_range.item() == 127.5


@pytest.mark.parametrize("task", ["MountainCarContinuous-v0", "Pendulum-v1", "Pusher-v5", "Hopper-v4"])
def test_tasks_run(run, script, task):
    """Tasks beside MuJoCo, boxes other than +-1, one or many dimensions: training runs and the policy is saved."""
    run_dir = run(script, env_id=task)
    assert (run_dir / "policy.pt").exists()
    assert all(np.isfinite(value) for points in scalars(run_dir).values() for _, value in points)


def test_odd_sizes(run, script):
    """One environment, one episode, steps that divide nothing, no discount, no warm-up."""
    run_dir = run(script, env_id="Pendulum-v1", num_envs=7, total_timesteps=100, learning_starts=0, eval_interval=33,
                  eval_episodes=1, gamma=0.0, buffer_size=16)  # fmt: skip
    assert [step for step, _ in scalars(run_dir)["eval/episodic_return"]] == [0, 35, 70, 105]
    run_dir = run(script, env_id="Pendulum-v1", num_envs=1, total_timesteps=20, learning_starts=10)
    assert [step for step, _ in scalars(run_dir)["eval/episodic_return"]] == [0, 20]


def test_seeds_differ(run, ledger):
    """No two environments of a run share a seed, and no evaluation reuses the seed of a training environment."""
    run(dsac_e, env_id="Ledger-v0", seed=5)
    first = ledger.seeds.copy()
    assert len(first) == 3 + 3 * 2 and len(set(first)) == len(first)  # 3 environments, 3 evaluations of 2 episodes
    ledger.seeds.clear()
    run(dsac_e, env_id="Ledger-v0", seed=6)
    assert not set(first) & set(ledger.seeds)


def test_replay_ring():
    """The newest rows replace the oldest, also across the seam; a batch holds rows as they were added, each alike often."""
    buffer = dsac_e.ReplayBuffer(10, 2, 1, torch.device("cpu"))
    for start in range(0, 24, 4):
        n = np.arange(start, start + 4.0)
        buffer.add(np.stack([n, -n], 1), n[:, None] + 0.25, np.stack([n + 1, -n - 1], 1), n * 10, n % 2 == 0)
    torch.manual_seed(0)
    batch = buffer.sample(20_000)
    n = batch.obs[:, 0]
    assert set(n.tolist()) == set(range(14, 24))
    assert torch.equal(batch.obs[:, 1], -n) and torch.equal(batch.action, (n + 0.25)[:, None])
    assert torch.equal(batch.next_obs, torch.stack([n + 1, -n - 1], 1))
    assert torch.equal(batch.reward, n * 10) and torch.equal(batch.terminated, (n % 2 == 0).float())
    counts = torch.bincount(n.long(), minlength=24)[14:]
    assert (counts - 2000).abs().max() < 5 * (20_000 * 0.1 * 0.9) ** 0.5


def test_partly_filled_ring_draws_only_what_was_added():
    buffer = dsac_e.ReplayBuffer(1000, 1, 1, torch.device("cpu"))
    buffer.rows.fill_(torch.nan)
    one = np.ones((3, 1))
    buffer.add(one, one, one, one[:, 0], one[:, 0])
    assert torch.stack([column.flatten() for column in buffer.sample(500)]).eq(1).all()


def test_schedule(monkeypatch, run, script):
    """One update per step of all environments once the warm-up is over; every policy_delay-th is a delayed one."""
    calls = []
    update = script.Agent.update

    def spy(self, batch, delayed):
        calls.append((len(batch.reward), delayed))
        return update(self, batch, delayed)

    monkeypatch.setattr(script.Agent, "update", spy)
    run(script, env_id="Pendulum-v1", num_envs=4, total_timesteps=100, learning_starts=60, batch_size=9, policy_delay=3)
    assert calls == [(9, i % 3 == 0) for i in range(1, 11)]  # after steps 60, 64, ... 96


def test_log(monkeypatch, run, script):
    """The tags that the README explains are there, at environment steps, with the values of the run's own objects."""
    monkeypatch.setattr(script, "LOG_INTERVAL", 5)
    run_dir = run(script, env_id="Ledger-v0", total_timesteps=240)
    log = scalars(run_dir)
    tags = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return",
            "eval/episodic_return_std", "eval/episodic_length", "losses/pev", "losses/pim", "critic/q_mean",
            "critic/q_std", "critic/target_mean", "critic/target_std"}  # fmt: skip
    if script.ALGORITHM != "td3":
        tags |= {"losses/tup", "losses/alpha", "entropy/policy_mean", "entropy/policy_std", "entropy/budget"}
    if script.ALGORITHM in ("dsac_t", "dsac_e"):
        tags |= {"critic/sigma_mean", "critic/sigma_std"}
    if script.ALGORITHM == "dsac_e":
        tags |= {"losses/pis", "entropy/qe_mean", "entropy/qe_std", "entropy/trajectory_mean", "entropy/trajectory_std"}
    assert set(log) == tags
    # The first update follows step 60, one more every 3 steps: the 5th comes before step 75.
    assert [step for step, _ in log["critic/q_mean"]] == list(range(75, 241, 15))
    assert log["charts/episodic_length"][:3] == [(9, 3.0)] * 3  # 3 copies, each ends its first episode after 3 steps
    assert log["charts/episodic_return"][:3] == [(9, 6.0)] * 3  # 1 + 2 + 3
    assert log["charts/episodic_return"][3] == (24, 100 * 5 + 15.0)
    if "entropy/budget" in log:
        budget = -2 / (1 - 0.99) if script.ALGORITHM == "dsac_e" else -2
        assert log["entropy/budget"][0][1] == pytest.approx(budget)
    text = EventAccumulator(str(run_dir)).Reload().Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0]
    assert "|env_id|Ledger-v0|" in text.decode() and "|gamma|0.99|" in text.decode()


def test_to_numbers():
    """Numbers stay numbers; batches become their mean and standard deviation."""
    batch = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    expected = {"a": 7.0, "b_mean": 3.0, "b_std": pytest.approx(3.5**0.5)}
    assert dsac_e.to_numbers({"a": torch.tensor(7.0), "b": batch}) == expected


def test_runs_repeat_exactly(monkeypatch, run, tmp_path):
    """The same seed gives the same weights and the same evaluation, bit by bit, in another process too; another seed
    gives others."""
    options = "--env-id Hopper-v4 --num-envs 3 --total-timesteps 360 --learning-starts 90 --batch-size 32 --device cpu " \
              "--buffer-size 300 --hidden-width 32 --eval-episodes 2 --eval-interval 180"  # fmt: skip
    runs = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        command = f"dsac_e.py {options} --seed {seed} --run-dir {tmp_path / name}".split()
        if name == "b":
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: a sum split over threads rounds otherwise
            subprocess.run([sys.executable, *command], cwd=ROOT, env=one_thread, check=True, capture_output=True)
        else:
            monkeypatch.setattr(sys, "argv", command)
            dsac_e.main()
        weights = torch.load(tmp_path / name / "policy.pt", weights_only=True)["policy"]
        log = scalars(tmp_path / name)
        runs.append((weights, log["eval/episodic_return"], log["charts/episodic_return"]))
    (a, *a_log), (b, *b_log), (c, *c_log) = runs
    assert len(a_log[0]) == 3 and a_log == b_log and all(torch.equal(a[key], b[key]) for key in a)
    assert a_log != c_log and not all(torch.equal(a[key], c[key]) for key in a)


def test_evaluate_reports_what_the_policy_does(monkeypatch, capsys, run, script):
    """--evaluate prints mean and spread of deterministic episodes: the same as playing the saved policy by hand."""
    run_dir = run(script, env_id="Pendulum-v1")
    monkeypatch.setattr(sys, "argv", ["script.py", "--evaluate", str(run_dir), "--eval-episodes", "3", "--seed", "4"])
    capsys.readouterr()
    script.main()
    printed = capsys.readouterr().out
    env = gym.make("Pendulum-v1")
    saved = torch.load(run_dir / "policy.pt", weights_only=True)
    policy = script.Policy(3, env.action_space.low, env.action_space.high, saved["args"]["hidden_width"])
    policy.load_state_dict(saved["policy"])
    returns = []
    for seed in np.random.SeedSequence(4, spawn_key=(0,)).generate_state(3).tolist():
        (obs, _), total, over = env.reset(seed=seed), 0.0, False
        while not over:
            action = policy.act(torch.as_tensor(obs[None]), deterministic=True)[0].numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
    mean, spread = map(float, re.search(r"return (\S+) \+- (\S+),", printed).groups())
    assert "Pendulum-v1, 3 deterministic episodes" in printed and "length 200" in printed
    assert mean == pytest.approx(np.mean(returns), abs=0.1) and spread == pytest.approx(np.std(returns), abs=0.1)


def test_evaluation_counts_one_episode_of_each_environment(ledger):
    """What follows the end of an episode, here by truncation, counts no more, while others still play theirs."""
    envs = dsac_e.make_envs("Staggered-v0", 4)
    policy = dsac_e.Policy(4, ledger.action_space.low, ledger.action_space.high, 8)
    returns, lengths = dsac_e.evaluate(policy, envs, np.random.SeedSequence(0))
    assert returns.tolist() == lengths.tolist() == [1, 2, 3, 4]


def test_evaluation_leaves_training_alone(run):
    """Evaluating more often changes nothing that is learned."""
    often = run(dsac_e, env_id="Pendulum-v1", eval_interval=3) / "policy.pt"
    seldom = run(dsac_e, env_id="Pendulum-v1", eval_interval=10_000) / "policy.pt"
    a, b = (torch.load(path, weights_only=True)["policy"] for path in (often, seldom))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_evaluation_ends_where_the_task_never_does(monkeypatch, run):
    """Without a time limit of its own, an evaluation episode is cut."""
    monkeypatch.setattr(gym.registry["Pendulum-v1"], "max_episode_steps", None)
    monkeypatch.setattr(dsac_e, "EVAL_LIMIT", 30)
    assert {value for _, value in scalars(run(dsac_e, env_id="Pendulum-v1"))["eval/episodic_length"]} == {30.0}


def test_a_terminal_gets_a_bar(tmp_path):
    """In a terminal one bar shows progress, speed, time left, the last return and alpha."""
    options = "--env-id Pendulum-v1 --num-envs 4 --total-timesteps 2400 --learning-starts 200 --hidden-width 8 " \
              "--eval-episodes 1 --batch-size 8 --device cpu"  # fmt: skip
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 150))
    command = f"{sys.executable} {ROOT / 'dsac_e.py'} {options} --run-dir {tmp_path / 'run'}"
    process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    shown = b""
    try:
        while chunk := os.read(terminal, 1000):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    assert process.wait() == 0
    last = r"100%.*2.40k/2.40k \[\d\d:\d\d<00:00, .* steps/s, return=-\d+\.\d \+- 0\.0, alpha=2\.\d+\]"
    assert re.search(last, shown.decode())
    assert shown.count(b"\n") <= 2


def test_ctrl_c_saves_and_says_so(tmp_path):
    """One Ctrl-C ends a run in order: the policy is saved, the user told, the exit code that of an interrupt."""
    command = f"{sys.executable} {ROOT / 'dsac_e.py'} --env-id Pendulum-v1 --device cpu --run-dir {tmp_path / 'run'}"
    process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
    assert "writing to" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.search(r"interrupted at step \d+", out)
    assert "policy" in torch.load(tmp_path / "run" / "policy.pt", weights_only=True)


SLOW = """
import time
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

class Slow(PendulumEnv):
    def step(self, action):
        print("stepping", flush=True)
        time.sleep(5)
        return super().step(action)

gym.register("Slow-v0", Slow, max_episode_steps=1)
"""


@pytest.mark.parametrize("late", [False, True])
def test_two_signals(tmp_path, late):
    """A signal that arrives twice at once, as from a terminal and a wrapper, ends the run in order; one more after
    two seconds ends it where it stands."""
    (tmp_path / "slow_task.py").write_text(SLOW)
    command = [sys.executable, ROOT / "sac.py", "--env-id", "slow_task:Slow-v0", "--num-envs", "1", "--eval-episodes"]
    command += ["1", "--device", "cpu", "--run-dir", tmp_path / "run"]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("step 0") for line in lines)
    assert any(line.startswith("stepping") for line in lines)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    if late:
        time.sleep(2.5)
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert err == "" and process.returncode == (-signal.SIGTERM if late else 128 + signal.SIGTERM)
    assert (tmp_path / "run" / "checkpoint.pt").exists() is not late
