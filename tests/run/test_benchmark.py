"""benchmark.sh: the commands it lists, a failed run among others, an interruption, a Slurm array."""

import contextlib
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

import dsac_e
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
first = not run.exists()
run.mkdir(exist_ok=True)
print("seed", seed, os.environ.get("OMP_NUM_THREADS"), "threads", flush=True)
if seed == 0:
    print("an error")
    sys.exit(3)
if seed == 1 and first:
    time.sleep(300)
print("finished")
"""


def start(directory: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    shutil.copy(ROOT / "benchmark.sh", directory)
    (directory / "sac.py").write_text(SCRIPT)
    env = CLEAN | {"TASKS": "Pendulum-v1", "ALGOS": "sac", "JOBS": "2", "RUNS": "all runs"}
    env |= {"PYTHON": sys.executable} | variables
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([directory / "benchmark.sh", *arguments], env=env, **options)


def started(log: Path, process: subprocess.Popen):
    """Waits until the stand-in that writes this log has started."""
    while not (log.exists() and "seed" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)


def listed(group: str, **variables: str) -> list:
    """The arguments of each command of the group, as its script reads them."""
    command = [ROOT / "benchmark.sh", "--list", group]
    runs = []
    for line in subprocess.check_output(command, env=CLEAN | variables, text=True).splitlines():
        python, script, *words, log, _ = shlex.split(line)
        runs.append(tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=words))
        assert python == "python" and log == f">>{runs[-1].run_dir}.log"
    return runs


@pytest.mark.parametrize("group, number", [("main", 8 * 4 * 5), ("ablation", 4 * 3 * 5), ("rho", 8 * 5)])
def test_a_group_lists_each_run_once(group, number):
    runs = listed(group, RUNS="a b")
    assert len(runs) == len({args.run_dir for args in runs}) == number
    assert all(args.env_id in TASKS and args.total_timesteps == 30_000_000 for args in runs)


def test_a_misplaced_option_and_no_job_print_the_usage():
    for arguments, jobs in ((["main", "--list"], "1"), (["main"], "0")):
        env = CLEAN | {"RUNS": "/dev/null/run", "JOBS": jobs}
        bench = subprocess.run([ROOT / "benchmark.sh", *arguments], env=env, capture_output=True, text=True)
        assert bench.returncode == 2 and bench.stderr.startswith("usage: ") and not bench.stdout


def test_every_task_can_be_trained(capfd, recwarn):
    with contextlib.ExitStack() as cleanup:
        for task in TASKS:
            envs, _ = sac.make_envs(task, 2, cleanup)
            envs.reset(seed=0)
            envs.step(envs.action_space.sample())
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_a_variant_is_a_script_with_any_of_its_options():
    variants = "dsac_e; dsac_e --no-tec --no-res ;;\ndsac_e --center-entropy; dsac_e  --rho 2 --tau 0.01; "
    expected = {
        "dsac_e": {},
        "dsac_e-no-tec-no-res": {"tec": False, "res": False},
        "dsac_e-center-entropy": {"center_entropy": True},
        "dsac_e-rho-2-tau-0.01": {"rho": 2.0, "tau": 0.01},
    }
    runs = listed("main", ALGOS=variants, TASKS="Ant-v4", SEEDS="3", STEPS="9")
    for args, (name, options) in zip(runs, expected.items(), strict=True):
        run_dir = f"runs/Ant-v4__{name}__3"
        assert args == dsac_e.Args("Ant-v4", seed=3, total_timesteps=9, run_dir=run_dir, **options)


def test_a_failed_run_is_reported_and_the_others_finish(tmp_path):
    bench = start(tmp_path, "main", SEEDS="0 2 3")
    out, _ = bench.communicate(timeout=300)
    assert bench.returncode == 3 and out.count("failed with exit code 3") == out.count("failed") == 1
    logs = {path.name[-5]: path.read_text() for path in tmp_path.glob("all runs/*.log")}
    assert "an error" in logs["0"] and "finished" in logs["2"] and "finished" in logs["3"]
    assert f"seed 2 {max(1, len(os.sched_getaffinity(0)) // 2)} threads" in logs["2"]  # two runs at a time


@pytest.mark.parametrize(
    "send, number",
    [(os.killpg, signal.SIGINT), (os.killpg, signal.SIGHUP), (os.kill, signal.SIGTERM)],
    ids=["Ctrl-C", "closed terminal", "SIGTERM"],
)
def test_the_same_command_resumes_stopped_runs(tmp_path, send, number):
    bench = start(tmp_path, "main", SEEDS="1 2", JOBS="1")
    log = tmp_path / "all runs/Pendulum-v1__sac__1.log"
    started(log, bench)
    send(bench.pid, number)
    out, _ = bench.communicate(timeout=300)
    assert bench.returncode == 130 and "failed" not in out and "finished" not in log.read_text()
    assert out.count(" of 2: ") == 1  # JOBS=1, and none is started after the signal
    bench = start(tmp_path, "main", SEEDS="1 2", JOBS="1")
    assert bench.wait(timeout=300) == 0
    assert all("finished" in path.read_text() for path in tmp_path.glob("all runs/*.log"))


def test_slurm_tasks_are_requeued_at_the_time_limit_but_not_after_scancel(tmp_path):
    """Stand-ins of sbatch and scontrol write each argument to a line of a file."""
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '%s\\n' {name} \"$@\" >>'{tmp_path}/calls'\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{CLEAN['PATH']}"}
    assert start(tmp_path, "--slurm", "main", "--partition=gpu", SEEDS="0 1", **path).wait(timeout=300) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {"--array=1-2%2", "--partition=gpu", "--signal=B:USR1@120"} <= {*calls}
    log = tmp_path / "all runs/Pendulum-v1__sac__1.log"
    env = CLEAN | path | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "7"}
    for number, requeued in ((signal.SIGTERM, False), (signal.SIGUSR1, True)):
        shutil.rmtree(log.with_suffix(""), ignore_errors=True)
        log.unlink(missing_ok=True)
        task = subprocess.Popen(["sh", "-c", calls[-1]], cwd=tmp_path, env=env, stdout=subprocess.PIPE)
        started(log, task)
        task.send_signal(number)
        out, _ = task.communicate(timeout=300)
        assert task.returncode == 130 and b"failed" not in out and "finished" not in log.read_text()
        assert ("7_2" in (tmp_path / "calls").read_text().splitlines()) == requeued
    env["SLURM_ARRAY_TASK_ID"] = "1"  # its run fails
    assert subprocess.call(["sh", "-c", calls[-1]], cwd=tmp_path, env=env) == 3
    assert "7_1" not in (tmp_path / "calls").read_text()
