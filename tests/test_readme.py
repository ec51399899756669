"""What the README tells a reader to type is run, and what it counts is counted."""

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [
    command
    for kind, block in BLOCKS
    for command in re.findall(r"python ((?:dsac_e|dsac_t|sac|td3)\.py [^<\n]*)$", block, re.M)
    if not kind
]
assert len(COMMANDS) == 3  # the first, and the settings of SAC's and TD3's own papers


def python(containing: str) -> str:
    (block,) = (block for kind, block in BLOCKS if kind == "python" and containing in block)
    return block


def test_importing():
    exec(python("import Agent"), {})


def test_five_lines_load_a_policy_and_act(run):
    """The README's lines, run as they are, give the squashed mean that NumPy computes from the saved weights."""
    script = importlib.import_module("dsac_e")
    run_dir = run(script, env_id="InvertedPendulum-v4", hidden_width=24)
    code = python("policy.pt").replace("runs/<the run's directory>", str(run_dir))
    assert len([line for line in code.splitlines() if line and "import" not in line]) == 5
    torch.manual_seed(0)
    space = {}
    exec(code, space)
    obs, action = space["env"].unwrapped._get_obs(), space["action"]
    weights = [value.double().numpy() for name, value in space["saved"]["policy"].items() if name.startswith("net.")]
    x = obs[None]
    for weight, bias in zip(weights[0::2], weights[1::2], strict=True):
        last = weight is weights[-2]
        x = x @ weight[0].T + bias[0]
        if not last:
            x = x * np.array([[0.5 * (1 + math.erf(v / 2**0.5)) for v in x[0]]])
    np.testing.assert_allclose(action, 3 * np.tanh(x[0, :1]), rtol=1e-5)  # the task's box is +-3
    space["env"].step(action)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    """Every training command is accepted by its script as it stands."""
    script = importlib.import_module(command.partition(".py")[0])
    script.check(script.tyro.cli(script.Args, args=command.split()[1:]))


def test_numbers_of_lines_and_tables():
    """The length of dsac_e.py and the table of tests are those of the files."""
    lines = (ROOT / "dsac_e.py").read_text().splitlines()
    harness = next(i for i, line in enumerate(lines) if line.startswith("# ====="))
    assert f"1 file, {len(lines)} lines, of which {len(lines) - harness} are the harness" in README
    table = set(re.findall(r"^\| `(test_\w+\.py)`", README, re.M))
    assert table == {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert "@@" not in README


def test_files_that_are_named_exist():
    named = re.findall(r"\]\((?!http|#)([^)]+)\)", README) + re.findall(r"`((?:tests|results)/[\w./]+)`", README)
    assert named and all((ROOT / name).exists() for name in named), [n for n in named if not (ROOT / n).exists()]


def test_benchmark_commands_list(tmp_path):
    """Every benchmark.sh line lists runs, and the one that made the results lists 24."""
    lines = [line for kind, block in BLOCKS if not kind for line in block.splitlines() if "./benchmark.sh" in line]
    assert len(lines) == 5 and any("STEPS=610000" in line for line in lines)
    for line in lines:
        listed = line.replace("--slurm", "").replace("--list", "").replace("./benchmark.sh", "./benchmark.sh --list")
        out = subprocess.run(listed.partition("|")[0], shell=True, cwd=ROOT, capture_output=True, text=True)
        assert out.returncode == 0 and out.stdout, (line, out.stderr)
        if "STEPS=610000" in line and "main" in line:
            assert len(out.stdout.splitlines()) == 24


def test_results_table_is_that_of_the_curves(tmp_path):
    """The README's table is what plot.py makes of the curves in results/."""
    done = subprocess.run([sys.executable, "plot.py", "results/curves.csv.gz", "--out", tmp_path], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "results.md").read_text()
    assert table == (ROOT / "results/results.md").read_text() and table in README
