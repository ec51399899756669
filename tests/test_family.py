"""The four scripts are a family: what repeats is identical, and each runs alone."""

import ast
import difflib
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
MARKER = "# " + "=" * 118 + "\n"

# Parts of the upper halves that the papers have in common, and the scripts they must be identical in.
SHARED = {
    "Batch": SCRIPTS,
    "StackedLinear": SCRIPTS,
    "mlp": SCRIPTS,
    "frozen": SCRIPTS,
    "Policy": ("dsac_e", "dsac_t", "sac"),
    "tup": ("dsac_e", "dsac_t", "sac"),
    "TwinCritics": ("dsac_e", "dsac_t"),
}


@functools.cache
def definitions(name: str) -> dict[str, str]:
    """The source of every class and function at the top level of a script, in order."""
    tree = ast.parse(SOURCES[name])
    return {node.name: ast.get_source_segment(SOURCES[name], node) for node in tree.body if hasattr(node, "name")}


def header(name: str) -> list[str]:
    """The dependencies in a script's inline metadata (PEP 723)."""
    block = re.search(r"(?m)^# /// script$\n((?:#.*\n)+?)# ///$", SOURCES[name]).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert metadata["requires-python"] == ">=3.11"
    return metadata["dependencies"]


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_harness_is_identical(name):
    """Below the marker line the scripts have the same text; what differs is named and shown."""
    halves = {}
    for script in ("dsac_e", name):
        assert SOURCES[script].count(MARKER) == 1, f"{script}.py has no marker line"
        halves[script] = SOURCES[script].split(MARKER)[1].splitlines()
    drift = list(difflib.unified_diff(halves["dsac_e"], halves[name], "dsac_e.py", f"{name}.py", lineterm="", n=0))
    here, there = definitions(name), definitions("dsac_e")
    parts = [part for part in there if there[part] in "\n".join(halves["dsac_e"]) and here.get(part) != there[part]]
    where = ", ".join(parts) or "what stands between the functions"
    assert not drift, f"{where} of {name}.py has drifted from dsac_e.py:\n" + "\n".join(drift[:20])


@pytest.mark.parametrize("part", SHARED)
def test_shared_parts_are_identical(part):
    """Networks and steps that belong to several papers are the same text in each."""
    first, *others = SHARED[part]
    for name in others:
        drift = difflib.unified_diff(
            definitions(first)[part].splitlines(), definitions(name)[part].splitlines(), f"{first}.py", f"{name}.py", lineterm=""
        )  # fmt: skip
        assert definitions(first)[part] == definitions(name)[part], f"{part} has drifted:\n" + "\n".join(drift)


def test_imports_are_identical():
    """One block of imports, the same in each script."""
    blocks = {name: re.search(r"(?ms)^import copy\n.*?^ALGORITHM", SOURCES[name]).group() for name in SCRIPTS}
    for name, block in blocks.items():
        assert block == blocks["dsac_e"], f"the imports of {name}.py have drifted from those of dsac_e.py"


def test_arguments_are_identical():
    """An argument that several scripts have means, and defaults to, the same in each."""
    seen = {}
    for name in SCRIPTS:
        fields = re.findall(r'(?m)^    (\w+): (.+)\n    """(.+)"""$', definitions(name)["Args"])
        assert len(fields) >= 20, f"every argument of {name}.py needs a docstring"
        for field, default, text in fields:
            if field in ("tau", "policy_delay"):  # they name what follows or moves, which differs
                text = ""
            assert seen.setdefault(field, (default, text)) == (default, text), f"--{field} of {name}.py has drifted"


def test_order_is_the_same():
    """A reader finds the parts of every script in the same order."""
    order = list(definitions("dsac_e"))
    for name in SCRIPTS[1:]:
        parts = list(definitions(name))
        assert parts == [part for part in order if part in parts]


@pytest.mark.parametrize(
    ("old", "new", "limit"), [("sac", "dsac_t", 80), ("dsac_t", "dsac_e", 90), ("sac", "td3", 110)]
)
def test_differences_stay_small(old, new, limit):
    """diff is documentation: what differs between two siblings fits on a screen or two."""
    done = subprocess.run(["diff", f"{old}.py", f"{new}.py"], cwd=ROOT, capture_output=True, text=True)
    changed = sum(line[0] in "<>" for line in done.stdout.splitlines())
    assert changed <= limit, f"{old}.py and {new}.py differ in {changed} lines"


@pytest.mark.parametrize("name", SCRIPTS)
def test_pins_agree(name):
    """The inline metadata pins exactly what the first section of requirements.txt does, the one for the scripts."""
    sections = [section.splitlines()[1:] for section in (ROOT / "requirements.txt").read_text().split("\n\n")]
    assert all("==" in pin for section in sections for pin in section)
    assert header(name) == sections[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_import_has_no_side_effect(name, tmp_path):
    """Importing prints nothing, writes nothing, and leaves random state, signals and gymnasium's logger alone."""
    code = f"""
import random, signal, sys
import gymnasium, numpy, torch
sys.path.insert(0, {str(ROOT)!r})
def state():
    return (torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate(), torch.get_num_threads(),
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), gymnasium.logger.min_level,
            torch.is_grad_enabled(), torch.get_default_dtype())
before = state()
from {name} import Agent, Args, Policy, TwinCritics
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_lone_copy_trains(name, tmp_path):
    """Copied into an empty folder a script trains on a MuJoCo task, and prints nothing but what a user wants to read."""
    (tmp_path / f"{name}.py").write_text(SOURCES[name])
    command = (
        f"{sys.executable} {name}.py --env-id HalfCheetah-v4 --num-envs 2 --total-timesteps 80 --learning-starts 40 "
        "--batch-size 8 --buffer-size 100 --hidden-width 8 --eval-episodes 1 --device cpu"
    )
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"HalfCheetah-v4__{name}__0__\d{{8}}-\d{{6}}", run_dir.name)
    assert re.fullmatch(rf"HalfCheetah-v4 on cpu, up to \S+ GiB of replay, writing to runs/{run_dir.name}", out[0])
    number = r"-?\d+\.\d \+- \d+\.\d"
    assert re.fullmatch(rf"step 0: return {number}", out[1]) and re.fullmatch(rf"step 80: return {number}", out[2])
    assert re.fullmatch(rf"finished at step 80, return {number}", out[3])
    assert len(out) == 6 and "--evaluate" in out[4] and "tensorboard" in out[5]
    assert done.stderr == ""  # no bar without a terminal, and no warning from gymnasium, MuJoCo or torch
    assert {path.name for path in Path(tmp_path).iterdir()} == {f"{name}.py", "runs"}
