"""benchmark.sh: the commands it lists, a failed run among others, an interruption."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {"PATH": os.environ["PATH"]}
# A stand-in for the scripts: runs until SIGTERM if it is seed 1 and started for the first time.
SCRIPT = """
import pathlib, signal, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("seed", seed, flush=True)
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


def listed(group: str, **variables: str) -> list[str]:
    command = [ROOT / "benchmark.sh", "--list", group]
    return subprocess.check_output(command, env=CLEAN | variables, text=True).splitlines()


@pytest.mark.parametrize("group, number", [("main", 8 * 4 * 5), ("ablation", 4 * 3 * 5), ("rho", 7 * 5)])
def test_a_group_lists_each_run_once(group, number):
    directories = {re.search(r"--run-dir (\S+)", command)[1] for command in listed(group)}
    assert len(listed(group)) == len(directories) == number


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


@pytest.mark.parametrize("to_group", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_stopped_runs_continue_with_the_same_command(tmp_path, to_group):
    bench = start(tmp_path, "main", SEEDS="1 2", JOBS="1")
    log = tmp_path / "runs/Pendulum-v1__sac__1.log"
    while not (log.exists() and "seed" in log.read_text()):
        time.sleep(0.05)
    os.killpg(bench.pid, signal.SIGINT) if to_group else bench.terminate()
    out, _ = bench.communicate(timeout=120)
    assert bench.returncode == 130 and "failed" not in out and "finished" not in log.read_text()
    bench = start(tmp_path, "main", SEEDS="1 2", JOBS="1")
    assert bench.wait(timeout=120) == 0
    assert all("finished" in path.read_text() for path in tmp_path.glob("runs/*.log"))
