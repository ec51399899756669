"""benchmark.sh: its commands are runs of the scripts, and however it is stopped, starting it again ends all of them."""

import contextlib
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
OURS = ("TASKS", "ALGOS", "SEEDS", "STEPS", "JOBS", "RUNS", "ARGS", "PYTHON", "OMP_NUM_THREADS")
CLEAN = {name: value for name, value in os.environ.items() if name not in OURS and "SLURM" not in name}


@pytest.fixture
def bench(tmp_path):
    """bench(arguments, **variables) -> Popen of benchmark.sh in a folder of its own."""
    for name in ("benchmark.sh", "sac.py", "td3.py"):
        shutil.copy(ROOT / name, tmp_path)

    started = []

    def bench(*arguments, **variables):
        defaults = {"TASKS": "Pendulum-v1", "ALGOS": "sac td3", "SEEDS": "0", "ARGS": SMALL, "PYTHON": sys.executable}
        started.append(subprocess.Popen([tmp_path / "benchmark.sh", *arguments], env=CLEAN | defaults | variables, cwd="/",
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        start_new_session=True))  # fmt: skip
        return started[-1]

    yield bench
    for process in started:  # and what it has started: a failed test must not leave a run behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listed(group: str, **variables) -> list[list[str]]:
    command = [ROOT / "benchmark.sh", "--list", group]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=CLEAN | variables).stdout
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
        (["main"], {"RUNS": "my runs"}, "RUNS must be a path without spaces"),
        (["main"], {"ARGS": "--gamma 0.9\n--tau 1"}, "ARGS must be one line"),
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
    """A terminal closed in the middle saves both runs; SIGKILL of everything before a third has a checkpoint; started
    again, all end at their last step on whole curves; once more, nothing is done."""
    runs = tmp_path / "runs"
    sac, td3, late = (runs / f"Pendulum-v1__{name}" for name in ("sac__0", "td3__0", "sac__1"))
    process = bench("main", STEPS="1000000", JOBS="2")
    for run_dir in (sac, td3):
        wait_for(Path(f"{run_dir}.log"), "step 2000:")
    os.killpg(process.pid, signal.SIGHUP)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and out.count("interrupted at step") == 2 and "FAILED" not in out, out
    stopped = {run_dir: torch.load(run_dir / "checkpoint.pt")["counters"]["step"] for run_dir in (sac, td3)}

    process = bench("main", STEPS="1000000", SEEDS="1", ALGOS="sac")
    wait_for(Path(f"{late}.log"), "step 0:")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (late / "checkpoint.pt").exists() and any(late.iterdir())
    (late / "checkpoint.tmp").touch()  # as if killed while it wrote the first one

    last = max(stopped.values()) + 1000
    process = bench("main", STEPS=str(last), SEEDS="0 1", JOBS="2")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert out.count("goes on") == 2 and out.count(": starts") == 2
    assert len(re.findall(rf"finished at step {last + last % 2}, .*return -\d+", out)) == 4, out
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
    marker = tmp_path / "runs/Pendulum-v1__sac__0/finished"
    for says in ("finished at step 200", "has made its 200 steps"):
        process = bench("main", ALGOS="sac", STEPS="200")
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and says in out, out
        marker.write_text("a[$(touch executed)]")  # nor is what a stranger's run holds executed
    assert not (tmp_path / "executed").exists()


def test_what_is_kept_of_a_finished_run_is_not_lost(bench, tmp_path):
    """Without its checkpoint, deleted to save space, a finished run cannot go on; its curves and policy stay."""
    run_dir = tmp_path / "runs/Pendulum-v1__sac__0"
    run_dir.mkdir(parents=True)
    for name, content in (("finished", "200"), ("policy.pt", "p"), ("events.out.tfevents.1", "e")):
        (run_dir / name).write_text(content)
    process = bench("main", ALGOS="sac", STEPS="400")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "finished at step 200 and its checkpoint gone" in out
    assert (run_dir / "policy.pt").read_text() + (run_dir / "events.out.tfevents.1").read_text() == "pe"


def test_other_arguments_are_not_ignored(bench):
    """What a run was not made with is refused by its script, not passed over."""
    bench("main", ALGOS="sac", STEPS="200").communicate(timeout=120)
    process = bench("main", ALGOS="sac", STEPS="400", ARGS=SMALL + " --gamma 0.5")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "--gamma cannot change in a run that goes on" in out


def test_jobs_and_threads(bench, tmp_path):
    """Never more than JOBS at a time, and each with its share of the cores, whatever OMP_NUM_THREADS says outside."""
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\necho start $OMP_NUM_THREADS >>{tmp_path}/log\nfor last; do :; done\nmkdir -p "$last"\n'  # --run-dir
        f"sleep 1.5\necho end >>{tmp_path}/log\n"
    )
    stub.chmod(0o755)
    process = bench("main", JOBS="2", SEEDS="0 1", PYTHON=str(stub), OMP_NUM_THREADS="1")
    process.communicate(timeout=60)
    running = [0]
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    for line in lines:
        running.append(running[-1] + (1 if "start" in line else -1))
    assert process.returncode == 0 and max(running) == 2 and running[-1] == 0
    threads = str(max(len(os.sched_getaffinity(0)) // 2, 1))
    assert [line.split()[1] for line in lines if "start" in line] == [threads] * 4


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
    assert "--signal=B:USR1@90" in calls and calls[-2] == "--wrap"
    wrapped = calls[-1].split()
    assert wrapped[:3] == ["exec", "./benchmark.sh", "--task"]
    assert (
        (tmp_path / wrapped[3]).read_text().splitlines()[3].startswith("./benchmark.sh --run runs/Pendulum-v1__td3__1 ")
    )

    (tmp_path / "calls").unlink()
    task = path | {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    process = bench(*wrapped[2:], **task)
    run_dir = tmp_path / "runs/Pendulum-v1__td3__1"
    wait_for(Path(f"{run_dir}.log"), "step 1000:")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert "interrupted at step" in out and (run_dir / "checkpoint.pt").exists()
    assert (tmp_path / "calls").read_text().splitlines() == ["scontrol", "requeue", "12_3"]

    # A signal that comes while python still imports: nothing to save, but the task must come again.
    (tmp_path / "calls").unlink()
    stub = tmp_path / "bin" / "slow"
    stub.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nexec sleep 30\n")
    stub.chmod(0o755)
    process = bench(*wrapped[2:], **task, PYTHON=str(stub))
    while not (tmp_path / "begun").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)
    assert "interrupted before its first step" in out and process.returncode == 143
    assert (tmp_path / "calls").read_text().splitlines() == ["scontrol", "requeue", "12_3"]
