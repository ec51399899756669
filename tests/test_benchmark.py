"""benchmark.sh: its commands are runs of the scripts, and however it is stopped, starting it again ends all of them."""

import fcntl
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--num-envs 2 --learning-starts 40 --batch-size 16 --buffer-size 5000 --hidden-width 8 --eval-episodes 1 "
SMALL += "--eval-interval 1000 --checkpoint-interval 1000 --device cpu --no-compile"


@pytest.fixture
def bench(tmp_path):
    """bench(arguments, **variables) -> Popen of benchmark.sh in a folder of its own."""
    for name in ("benchmark.sh", "sac.py", "td3.py"):
        shutil.copy(ROOT / name, tmp_path)

    def bench(*arguments, **variables):
        defaults = {"TASKS": "Pendulum-v1", "ALGOS": "sac td3", "SEEDS": "0", "ARGS": SMALL, "PYTHON": sys.executable}
        env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return subprocess.Popen([tmp_path / "benchmark.sh", *arguments], env=env | defaults | variables, cwd="/",
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    return bench


def listed(group: str, **variables) -> list[list[str]]:
    command = [ROOT / "benchmark.sh", "--list", group]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables).stdout
    return [line.split() for line in out.splitlines()]


def wait_for(path: Path, text: str):
    for _ in range(1200):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never said {text!r}")


def parsed(words: list[str]):
    """The Args that the listed command gives to its script."""
    assert words[:2] == ["./benchmark.sh", "--run"] and words[3].endswith(".py")
    script = importlib.import_module(words[3].removesuffix(".py"))
    return script.ALGORITHM, tyro.cli(script.Args, args=words[4:])


@pytest.mark.parametrize(
    ("group", "runs", "expected"),
    [
        ("main", 8 * 4 * 5, {("dsac_e", True, True), ("dsac_t",), ("sac",), ("td3",)}),
        ("ablation", 4 * 3 * 5, {("dsac_e", True, True), ("dsac_e", False, True), ("dsac_e", False, False)}),
    ],
)
def test_groups(group, runs, expected):
    """Every run once, under a directory of its own, with the arguments that its group is about and the protocol's."""
    commands = listed(group)
    assert len(commands) == len({words[2] for words in commands}) == runs
    kinds = set()
    for words in commands:
        algorithm, args = parsed(words)
        kinds.add((algorithm, args.tec, args.res) if algorithm == "dsac_e" else (algorithm,))
        assert words[2].startswith(f"runs/{args.env_id}__{algorithm}") and words[2].endswith(f"__{args.seed}")
        assert args.total_timesteps == 30_000_000 and args.num_envs == 20
        if algorithm == "dsac_e":
            assert args.rho == (20 if args.env_id in ("Humanoid-v4", "Walker2d-v4") else 1)
    assert kinds == expected
    assert {parsed(words)[1].seed for words in commands} == set(range(5))


def test_rho_group():
    commands = [parsed(words) for words in listed("rho")]
    assert {(args.env_id, args.rho) for _, args in commands} == {
        ("Humanoid-v4", rho) for rho in (0.5, 1, 5, 10, 20, 30, 40)
    }
    assert len(commands) == 35


def test_variables():
    commands = listed("rho", TASKS="Hopper-v4 Ant-v4", ALGOS="dsac_e-no-tec-rho-2 td3", SEEDS="3 9", STEPS="5000",
                      RUNS="/tmp/x", ARGS="--num-envs 4")  # fmt: skip
    assert [words[2] for words in commands[:3]] == [
        "/tmp/x/Hopper-v4__dsac_e-no-tec-rho-2__3", "/tmp/x/Hopper-v4__td3__3", "/tmp/x/Ant-v4__dsac_e-no-tec-rho-2__3"
    ]  # fmt: skip
    _, args = parsed(commands[0])
    assert (args.env_id, args.seed, args.rho, args.tec, args.num_envs, args.total_timesteps) == (
        "Hopper-v4", 3, 2, False, 4, 5000
    )  # fmt: skip
    assert len(commands) == 8


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        ([], {}, "groups are main, ablation and rho"),
        (["mian"], {}, "not 'mian'"),
        (["--list", "mian"], {}, "not 'mian'"),
        (["main"], {"STEPS": "1e6"}, "STEPS must be a whole number such as 610000, not '1e6'"),
        (["main"], {"JOBS": "0"}, "JOBS must be"),
        (["main"], {"ALGOS": "sac ppo"}, "not 'ppo'"),
    ],
)
def test_mistakes_cost_one_line(bench, arguments, variables, says):
    process = bench(*arguments, **variables)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and says in out and out.count("\n") == 1


def steps_of(run_dir: Path) -> list[int]:
    events = EventAccumulator(str(run_dir)).Reload()
    return [event.step for event in events.Scalars("eval/episodic_return")]


def test_stop_and_go(bench, tmp_path):
    """SIGTERM in the middle saves both runs; SIGKILL of everything before a third has a checkpoint; started again, all
    end at their last step on whole curves; once more, nothing is done; with more steps, all go on."""
    runs = tmp_path / "runs"
    sac, td3, late = (runs / f"Pendulum-v1__{name}" for name in ("sac__0", "td3__0", "sac__1"))
    process = bench("main", STEPS="1000000", JOBS="2")
    for run_dir in (sac, td3):
        wait_for(Path(f"{run_dir}.log"), "step 2000:")
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and out.count("interrupted at step") == 2 and "FAILED" not in out
    stopped = {run_dir: torch.load(run_dir / "checkpoint.pt")["counters"]["step"] for run_dir in (sac, td3)}

    process = bench("main", STEPS="1000000", SEEDS="1", ALGOS="sac")
    wait_for(Path(f"{late}.log"), "step 0:")
    process.kill()
    subprocess.run(["pkill", "-KILL", "-f", "--", f"--run-dir runs/{late.name}"], check=True)
    process.communicate(timeout=60)
    assert not (late / "checkpoint.pt").exists() and any(late.iterdir())

    last = max(stopped.values()) + 1000
    process = bench("main", STEPS=str(last), SEEDS="0 1", JOBS="2")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert out.count("goes on") == 2 and out.count(": starts") == 2
    assert len(re.findall(rf"finished at step {last + last % 2}, return -\d+", out)) == 4
    for run_dir in (sac, td3, late):
        steps = steps_of(run_dir)
        assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == last + last % 2
        assert set(range(0, last, 1000)) <= set(steps)

    process = bench("main", STEPS=str(last), SEEDS="0 1")
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and "4 runs, 4 finished before" in out and out.count("\n") == 1


def test_failure_is_named_and_the_others_go_on(bench):
    process = bench("main", TASKS="Pendulum-v7 Pendulum-v1", ALGOS="sac", STEPS="200")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(
        r"Pendulum-v7__sac__0: FAILED with exit code 2, see .*log: sac: Pendulum-v7 is not registered", out
    )
    assert "Pendulum-v1__sac__0: finished at step 200" in out


def test_a_run_is_not_started_twice(bench, tmp_path):
    (tmp_path / "runs").mkdir()
    with open(tmp_path / "runs/Pendulum-v1__sac__0.log", "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        process = bench("main", ALGOS="sac", STEPS="200")
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and "left alone, it is running already" in out


def test_marker_lost(bench, tmp_path):
    """A run that was killed between its end and the note of it counts as finished."""
    for _ in range(2):
        process = bench("main", ALGOS="sac", STEPS="200")
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
        (tmp_path / "runs/Pendulum-v1__sac__0/finished").unlink()


def test_slurm(bench, tmp_path):
    """One array job of all runs; a task of it runs its line, and on USR1 saves and has that task requeued."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "scontrol"):
        stub = tmp_path / "bin" / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >>{tmp_path}/calls\n')
        stub.chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SEEDS": "0 1", "STEPS": "1000000"}
    bench("--slurm", "main", "--gres=gpu:1", **path, JOBS="3").communicate(timeout=20)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "sbatch" and {"--array=0-3%3", "--requeue", "--open-mode=append", "--gres=gpu:1"} <= set(calls)
    assert calls[-2:] == ["--wrap", "exec ./benchmark.sh --task main"]

    (tmp_path / "calls").unlink()
    task = path | {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    process = bench("--task", "main", **task)
    run_dir = tmp_path / "runs/Pendulum-v1__td3__1"
    wait_for(Path(f"{run_dir}.log"), "step 1000:")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert "interrupted at step" in out and (run_dir / "checkpoint.pt").exists()
    assert (tmp_path / "calls").read_text().splitlines() == ["scontrol", "requeue", "12_3"]
