"""benchmark.sh: the commands it lists, a failed run among others, an interruption."""

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

import sac

TASKS = [f"{name}-v4" for name in ("Humanoid", "Ant", "HalfCheetah", "Walker2d", "Hopper", "Swimmer",
                                  "InvertedDoublePendulum")] + ["Pusher-v5"]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
CLEAN = {"PATH": os.environ["PATH"]}
# A stand-in for the scripts: runs until SIGTERM if it is seed 1 and started for the first time.
SCRIPT = """
import os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("seed", seed, os.environ.get("OMP_NUM_THREADS"), "threads", flush=True)
first = not run.exists()
run.mkdir(exist_ok=True)
if seed == 0:
    sys.exit("an error")
while seed == 1 and first:
    time.sleep(0.05)
print("finished")
"""


def start(directory: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    shutil.copy(ROOT / "benchmark.sh", directory)
    (directory / "sac.py").write_text(SCRIPT)
    env = CLEAN | {"TASKS": "Pendulum-v1", "ALGOS": "sac", "JOBS": "2", "PYTHON": sys.executable} | variables
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # may be ignored here
    return subprocess.Popen([directory / "benchmark.sh", *arguments], env=env, **options)


def started(log: Path, process: subprocess.Popen):
    """Waits until the stand-in that writes this log has started."""
    while not (log.exists() and "seed" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)


def listed(group: str, **variables: str) -> list[str]:
    command = [ROOT / "benchmark.sh", "--list", group]
    return subprocess.check_output(command, env=CLEAN | variables, text=True).splitlines()


@pytest.mark.parametrize("group, number", [("main", 8 * 4 * 5), ("ablation", 4 * 3 * 5), ("rho", 7 * 5)])
def test_a_group_lists_each_run_once(group, number):
    """With arguments that the scripts accept and a directory of its own."""
    directories = set()
    for command in listed(group, RUNS="a b"):
        _, script, *words = shlex.split(command)[:-2]  # without >>log 2>&1
        args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=words)
        assert args.env_id in TASKS and args.total_timesteps == 30_000_000
        directories.add(args.run_dir)
    assert len(listed(group)) == len(directories) == number
    misplaced = [ROOT / "benchmark.sh", group, "--list"]
    assert subprocess.call(misplaced, env=CLEAN | {"RUNS": "/dev/null/run"}) == 2


def test_every_task_can_be_trained(capfd, recwarn):
    for task in TASKS:
        envs, _ = sac.make_envs(task, 2)
        envs.reset(seed=0)
        envs.step(envs.action_space.sample())
        envs.close()
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_variants_become_arguments_of_the_scripts():
    (command,) = listed("rho", ALGOS="dsac_e-no-tec-rho-0.5", SEEDS="3", STEPS="9", ARGS="--tau 1", RUNS="r")
    assert command == (
        "python dsac_e.py --env-id Humanoid-v4 --seed 3 --no-tec --rho 0.5 --total-timesteps 9 --tau 1 "
        "--run-dir r/Humanoid-v4__dsac_e-no-tec-rho-0.5__3 >>r/Humanoid-v4__dsac_e-no-tec-rho-0.5__3.log 2>&1"
    )


def test_a_failed_run_is_reported_and_the_others_finish(tmp_path):
    bench = start(tmp_path, "main", SEEDS="0 2 3")
    out, _ = bench.communicate(timeout=120)
    assert bench.returncode == 1 and out.count("failed with exit code 1") == 1
    logs = {path.name[-5]: path.read_text() for path in tmp_path.glob("runs/*.log")}
    assert "an error" in logs["0"] and "finished" in logs["2"] and "finished" in logs["3"]
    assert f"seed 2 {max(1, len(os.sched_getaffinity(0)) // 2)} threads" in logs["2"]  # two runs at a time


@pytest.mark.parametrize("to_group", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_stopped_runs_continue_with_the_same_command(tmp_path, to_group):
    bench = start(tmp_path, "main", SEEDS="1 2", JOBS="1")
    log = tmp_path / "runs/Pendulum-v1__sac__1.log"
    started(log, bench)
    os.killpg(bench.pid, signal.SIGINT) if to_group else bench.terminate()
    out, _ = bench.communicate(timeout=120)
    assert bench.returncode == 130 and "failed" not in out and "finished" not in log.read_text()
    assert out.count(" of 2: ") == 1  # JOBS=1, and none is started after the signal
    bench = start(tmp_path, "main", SEEDS="1 2", JOBS="1")
    assert bench.wait(timeout=120) == 0
    assert all("finished" in path.read_text() for path in tmp_path.glob("runs/*.log"))


def test_slurm_tasks_are_requeued_at_the_time_limit_but_not_after_scancel(tmp_path):
    """Stand-ins of sbatch and scontrol write each argument to a line of a file."""
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '%s\\n' {name} \"$@\" >>'{tmp_path}/calls'\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{CLEAN['PATH']}"}
    assert start(tmp_path, "--slurm", "main", "--partition=gpu", SEEDS="0 1", **path).wait(timeout=60) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {"--array=1-2%2", "--partition=gpu", "--signal=B:USR1@120"} <= {*calls}
    env = CLEAN | path | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "7"}
    for number, requeued in ((signal.SIGTERM, False), (signal.SIGUSR1, True)):
        shutil.rmtree(tmp_path / "runs/Pendulum-v1__sac__1", ignore_errors=True)
        (tmp_path / "runs/Pendulum-v1__sac__1.log").unlink(missing_ok=True)
        task = subprocess.Popen(["bash", "-c", calls[-1]], cwd=tmp_path, env=env)
        started(tmp_path / "runs/Pendulum-v1__sac__1.log", task)
        task.send_signal(number)
        assert task.wait(timeout=60) == 143
        assert ("7_2" in (tmp_path / "calls").read_text().splitlines()) == requeued
