"""A user's mistake costs one line and exit code 2: what is wrong, and what to type instead."""

import importlib
import re
import sys

import conftest
import pytest
import torch


def refuse(monkeypatch, capsys, script, arguments: str) -> str:
    """Runs the script's main with these arguments; returns the one line it must print before it exits with 2."""
    monkeypatch.setattr(sys, "argv", [f"{script.ALGORITHM}.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--env-id Ant-v3", r"mujoco-py.*Ant-v4 or Ant-v5"),
        ("--env-id Humanoid-v2", r"mujoco-py.*Humanoid-v4 or Humanoid-v5"),
        ("--env-id Pusher-v4", r"mujoco < 3.*Pusher-v5$"),
        ("--env-id halfcheetah", r"not registered.*HalfCheetah-v[45]"),
        ("--env-id HalfCheetah-v9", r"not registered.*HalfCheetah-v4 or HalfCheetah-v5"),
        ("--env-id Ant-v1", r"not registered.*Ant-v4 or Ant-v5"),
        ("--env-id Hoper-v4", r"not registered.*Hopper-v4"),
        ("--env-id nosuchmodule:Task-v0", r"No module named 'nosuchmodule'"),
        ("--env-id CartPole-v1", r"Discrete\(2\).*continuous"),
        ("--env-id Unbounded-v0", r"bounded"),
        ("--env-id Image-v0", r"flat"),
        ("--env-id Blackjack-v1", r"flat"),
        ("--num-envs 0", r"--num-envs must be positive, not 0"),
        ("--batch-size -1", r"--batch-size must be positive"),
        ("--policy-lr 0", r"--policy-lr must be positive"),
        ("--policy-lr nan", r"--policy-lr must be positive"),
        ("--seed -1", r"--seed must be zero or more"),
        ("--seed 36893488147419103232", r"--seed must be below"),
        ("--env-id Pendulum-v1 --buffer-size 1000000000000000", r"--buffer-size.*smaller"),
        ("--gamma 1.0", r"--gamma must be below 1"),
        ("--gamma -0.1", r"--gamma must be zero or more"),
        ("--tau 1.5", r"--tau must be at most 1"),
        ("--batch-size 300 --buffer-size 200", r"--batch-size must be at most --buffer-size \(200\)"),
        ("--num-envs 300 --batch-size 8 --buffer-size 200", r"--num-envs must be at most --buffer-size"),
        ("--learning-starts 500 --total-timesteps 500", r"--learning-starts must be below --total-timesteps"),
        ("--env-id Pendulum-v1 --run-dir /dev/null/run", r"/dev/null/run.*--run-dir"),
        ("--env-id Pendulum-v1 --run-dir .", r"not empty.*--run-dir"),
        ("--capture-video", r"--capture-video needs --evaluate RUN_DIR"),
        ("--evaluate /nonexistent", r"/nonexistent/policy.pt.*FileNotFound.*directory of a run"),
        pytest.param(
            "--device cuda", "--device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
        ),
    ],
)
def test_one_line(monkeypatch, capsys, script, arguments, says):
    assert re.search(says, refuse(monkeypatch, capsys, script, arguments).strip())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", {"some": "thing"}])
def test_foreign_policy(monkeypatch, capsys, tmp_path, content):
    """Whatever lies where the policy should be, --evaluate says so."""
    script = importlib.import_module("dsac_e")
    if isinstance(content, bytes):
        (tmp_path / "policy.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "policy.pt")
    assert "--evaluate cannot use" in refuse(monkeypatch, capsys, script, f"--evaluate {tmp_path}")


def test_policy_of_a_sibling(monkeypatch, capsys, run):
    """A run is evaluated by the script that made it; another one names that script."""
    run_dir = run(importlib.import_module("sac"), env_id="Pendulum-v1")
    capsys.readouterr()
    err = refuse(monkeypatch, capsys, importlib.import_module("td3"), f"--evaluate {run_dir}")
    assert f"use sac.py --evaluate {run_dir}" in err


def test_ablation_needs_both_flags(monkeypatch, capsys):
    """The trajectory constraint without Qe is refused."""
    assert "--no-tec" in refuse(monkeypatch, capsys, importlib.import_module("dsac_e"), "--no-res")


def test_unknown_option_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dsac_e.py", "--no-such-option"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("dsac_e").main()
    assert stop.value.code == 2 and "--no-such-option" in capsys.readouterr().err


def test_tasks_of_the_tests_are_registered():
    """The cases above must fail for their own reason, not because the task is missing."""
    assert {"Unbounded-v0", "Image-v0"} <= set(conftest.gym.registry)
