"""The command line: mistakes cost one line, printed commands work."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from environments import ROOT, SCRIPTS, TESTS, RecordingEnv, load, main, options, train


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
    message = main("dsac_e", options("Recording", tmp_path / "run") + words.split())
    assert re.search(says, message) and "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["--no-such-option", "--seed x", "--no-res --total-timesteps 0"])
def test_errors_of_the_parser(words, capsys):
    assert main("dsac_e", words.split()) == 2
    assert words.split()[0] in capsys.readouterr().err


def test_smallest_values(tmp_path):
    words = {"gamma": 0, "learning_starts": 0, "rho": 0, "num_envs": 1, "batch_size": 1, "total_timesteps": 3,
             "eval_episodes": 1, "eval_interval": 1, "checkpoint_interval": 1, "tau": 1, "buffer_size": 1}  # fmt: skip
    assert train("Recording", tmp_path / "run", **words) is None
    assert load(tmp_path / "run")["step"] == 3


def test_default_directory_and_module_in_the_working_directory(tmp_path):
    """As a user starts it, with an id without version and a task that changes the directory and forks a process."""
    own = f"import functools, multiprocessing, os, sys, time; os.chdir({str(TESTS)!r}); sys.path.append(os.getcwd()); "
    own += "process = multiprocessing.get_context('fork').Process(target=time.sleep, args=(90,), daemon=True); import environments"
    own += "\nenvironments.GlobalRandomEnv.reward = lambda self, start=functools.cache(process.start): start() or 1"
    (tmp_path / "own.py").write_text(own)  # at exit, Python terminates the process and waits for it
    words = options("Recording", None) + ["--env-id", "own:GlobalRandom"]
    command = [sys.executable, ROOT / "sac.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "GlobalRandom-v0 on cpu, step 0;" in done.stdout
    assert load(tmp_path / "runs/own-GlobalRandom__sac__0")["step"] == 100
    words = [*command[:2], "--env-id", "own:GlobalRandom", "--evaluate"]  # with the run's number of episodes
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == re.search(r"step 100: return .*\n", done.stdout)[0]
    done = subprocess.run([*command, "--gamma", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluate(tmp_path, script, capsys):
    """The printed command repeats the last evaluation of the run, which does not change."""
    run_dir = tmp_path / "it's a run"
    train("GlobalRandom", run_dir, script)
    trained = capsys.readouterr().out
    command = re.search(r"to resume, extend or --evaluate: (python .*)", trained)[1]
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    words = shlex.split(command)
    assert words[:2] == ["python", f"{script}.py"] and main(script, [*words[2:], "--evaluate"]) is None
    assert RecordingEnv.copies == 2
    assert capsys.readouterr().out == re.search(r"step 100: return .*\n", trained)[0]
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    for more in (["--seed", "9"], ["--eval-episodes", "3"]):
        assert main(script, ["--run-dir", run_dir, "--evaluate", *more]) is None
        assert capsys.readouterr().out not in trained
    assert RecordingEnv.copies == 3


def test_auto_selects_the_gpu(tmp_path, monkeypatch, capsys):
    """If there is none, this is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = train("Recording", tmp_path / "run", device="auto")
    assert " on cuda" in f"{message} {capsys.readouterr().out}"
