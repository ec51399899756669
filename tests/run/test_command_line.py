"""The command line: mistakes cost one line, arguments have an effect, printed commands work."""

import importlib
import math
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from environments import RecordingEnv
from scripts import ROOT, SCRIPTS, TESTS, command_in, load, main, options, train


@pytest.mark.parametrize("words, says", [
    ("--env-id Nosuch-v0", "cannot make Nosuch-v0: Environment `Nosuch` doesn't exist"),
    ("--env-id nosuch:X-v0", "No module named 'nosuch'"),
    ("--env-id :X-v0", "cannot make :X-v0"),
    ("--env-id Ant-v2", "cannot make Ant-v2"),
    ("--env-id CartPole-v1", "actions real and bounded"),
    ("--num-envs 0", "--num-envs 0 "), ("--num-envs 1001", "--num-envs 1001 "),
    ("--batch-size -1", "--batch-size -1 "), ("--batch-size 1001", "--batch-size 1001 "),
    ("--policy-lr 0", "--policy-lr 0.0 "), ("--policy-lr nan", "--policy-lr nan "),
    ("--critic-lr inf", "--critic-lr inf "), ("--alpha-lr -1", "--alpha-lr -1.0 "),
    ("--seed -1", "--seed -1 "), ("--seed 36893488147419103232", "--seed 36893488147419103232 "),
    ("--gamma 1", "--gamma 1.0 "), ("--gamma -0.1", "--gamma -0.1 "), ("--tau 1.1", "--tau 1.1 "),
    ("--rho 1e300", r"--rho 1e\+300 "), ("--rho -1", "--rho -1.0 "),
    ("--learning-starts 100", "--learning-starts 100 "), ("--total-timesteps 0", "-"),
    ("--eval-interval 0", "--eval-interval 0 "), ("--checkpoint-interval 0", "--checkpoint-interval 0 "),
    ("--buffer-size 1000000000000000", "cannot train in .*memory"),
    ("--device nonsense", "cannot train in .* on nonsense"),
    ("--run-dir /dev/null/run", "cannot train in /dev/null/run"), ("--run-dir /dev/null", "cannot train in /dev/null"),
    ("--evaluate", "there is no policy.pt in "), ("--capture-video", "there is no policy.pt in "),
])  # fmt: skip
def test_one_line(tmp_path, monkeypatch, words, says):
    """Exit code 1, and a start that fails leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    assert main("dsac_e", options("Recording", tmp_path / "run") + words.split()).fails_with(says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_number_may_be_negative(tmp_path, script):
    fields = vars(importlib.import_module(script).Args())
    numbers = [name for name, value in fields.items() if type(value) in (int, float)]
    assert len(numbers) > 15
    for name in [*numbers, "env_threads"]:
        option = f"--{name.replace('_', '-')}"
        assert main(script, ["--run-dir", tmp_path / "run", option, -1]).fails_with(f"{option} -1.* must ")


def test_smallest_values(tmp_path):
    words = {"gamma": 0, "learning_starts": 0, "rho": 0, "num_envs": 1, "batch_size": 1, "total_timesteps": 3,
             "eval_episodes": 1, "eval_interval": 1, "checkpoint_interval": 1, "tau": 1, "buffer_size": 1}  # fmt: skip
    assert train("Recording", tmp_path / "run", **words).code == 0
    assert load(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("script", ["dsac_e", "dsac_t", "sac"])
def test_initial_alpha(tmp_path, script):
    """Before the first update."""
    train("Recording", tmp_path, script, learning_starts=99, initial_alpha=0.3)
    assert load(tmp_path)["agent"]["log_alpha"].item() == pytest.approx(math.log(0.3))


OWN_MODULE = f"""
    import multiprocessing
    import os
    import sys
    import time

    import gymnasium

    os.chdir({str(TESTS)!r})
    sys.path.append(os.getcwd())
    from environments import GlobalRandomEnv

    # At exit, Python terminates this process and waits for it.
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(900,), daemon=True)


    class OwnEnv(GlobalRandomEnv):
        def reward(self):
            if process.pid is None:
                process.start()
            return super().reward()


    gymnasium.register("Own-v3", OwnEnv)
"""


def test_default_directory_and_module_in_the_working_directory(tmp_path):
    """As a user starts it, with an id without version and a task that changes the directory and forks a process."""

    def run(*words):
        command = [sys.executable, ROOT / "sac.py", "--env-id", "own:Own", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    (tmp_path / "own.py").write_text(textwrap.dedent(OWN_MODULE))
    words = options("Recording", None, env_id=None)
    trained = run(*words)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert "Own-v3 on cpu" in trained.stdout
    assert load(tmp_path / "runs/own-Own__sac__0")["step"] == 100
    again = run("--evaluate")  # with the run's arguments
    assert again.stdout == re.search(r"step 100: return .*\n", trained.stdout)[0]
    refused = run(*words, "--gamma", "2")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and not refused.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluate(tmp_path, script, capsys):
    """The printed command repeats the last evaluation of the run, with its networks; the run does not change."""
    run_dir = tmp_path / "it's a run"
    train("GlobalRandom", run_dir, script)
    trained = capsys.readouterr().out
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    python, file, *words = command_in(trained)
    assert (python, file) == ("python", f"{script}.py")
    for width in ([], ["--hidden-width", "99"]):
        assert main(script, [*words, "--evaluate", *width]).code == 0
        assert RecordingEnv.copies == 2
        assert capsys.readouterr().out == re.search(r"step 100: return .*\n", trained)[0]
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    for more in (["--seed", "9"], ["--eval-episodes", "3"]):
        assert main(script, ["--run-dir", run_dir, "--evaluate", *more]).code == 0
        assert capsys.readouterr().out not in trained
    assert RecordingEnv.copies == 3


def test_auto_selects_the_gpu(tmp_path, monkeypatch, capsys):
    """If there is none, this is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = train("Recording", tmp_path / "run", device="auto")
    assert " on cuda" in result.message + capsys.readouterr().out
