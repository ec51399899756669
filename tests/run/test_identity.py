"""What identifies a run: the file name of the script, its arguments and its spaces; and what is only a note."""

import importlib
import re
import subprocess
import sys

import environments
import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import RecordingEnv
from scripts import ROOT, load, main, options, train


@pytest.fixture
def my_idea(tmp_path, monkeypatch):
    """A function that writes a changed copy of sac.py, as a user would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(*changes):
        text = (ROOT / "sac.py").read_text()
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "my_idea.py").write_text(text)
        sys.modules.pop("my_idea", None)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("my_idea", None)


def test_a_copy_under_another_name_has_its_own_runs(tmp_path, my_idea, capsys):
    """Its default directory contains its name, and it refuses the runs of the original."""
    my_idea()
    train("Recording", tmp_path / "original", "sac")
    assert train("Recording", None, "my_idea").code == 0
    assert load(tmp_path / "runs/environments-Recording-v0__my_idea__0")["algorithm"] == "my_idea"
    assert train("Recording", tmp_path / "original", "my_idea").fails_with("saved by sac.py, not my_idea.py")


def test_a_changed_script_resumes_only_with_run_dir(tmp_path, my_idea, capsys):
    """It is refused in the default directory, also if the run is finished, where an unchanged one resumes. With
    --run-dir or to evaluate, it prints a note until it has trained; the run then names both scripts.
    """
    run_dir = tmp_path / "runs/environments-Recording-v0__my_idea__0"
    my_idea()
    for steps in (60, 80):
        assert train("Recording", None, "my_idea", total_timesteps=steps).code == 0
    my_idea(("log_alpha.clamp_(-15, 15)", "log_alpha.clamp_(-14, 14)"))
    for steps in (80, 100):
        assert train("Recording", None, "my_idea", total_timesteps=steps).fails_with("resume with --run-dir")
    assert load(run_dir)["step"] == 80 and "note" not in capsys.readouterr().err
    names = r"trained by my_idea.py (\w{8}), torch \S*, this is my_idea.py (\w{8})"
    for words in (["--evaluate"], [], ["--total-timesteps", "100"]):
        assert main("my_idea", ["--run-dir", run_dir, *words]).code == 0
        note = re.search(f"note: the run was {names}", capsys.readouterr().err)
        assert note[1] != note[2]
    assert load(run_dir)["step"] == 100
    assert re.search(f"{note[1]}.*from step 80 .*{note[2]}", load(run_dir)["code"])
    assert train("Recording", None, "my_idea", total_timesteps=120).code == 0
    assert "note" not in capsys.readouterr().err


def test_changed_networks_cannot_resume_and_keep_the_files(tmp_path, my_idea):
    my_idea()
    train("Recording", tmp_path / "run", "my_idea", total_timesteps=60)
    before = load(tmp_path / "run")
    my_idea(("for fan_in in (inputs, width, width):", "for fan_in in (inputs, width):"))
    result = train("Recording", tmp_path / "run", "my_idea")
    assert result.code == 1 and re.search(
        "cannot resume .* with other networks.*\n.*policy.net", result.message
    )
    assert load(tmp_path / "run")["step"] == before["step"] == 60
    assert main("my_idea", ["--run-dir", tmp_path / "run", "--evaluate"]).message.startswith(
        "cannot evaluate"
    )


def test_changed_optimizer_settings_take_effect(tmp_path, my_idea):
    my_idea()
    train("Recording", tmp_path / "run", "my_idea", total_timesteps=60)
    my_idea(("fused=True", "fused=True, betas=(0.8, 0.9)"))
    assert train("Recording", tmp_path / "run", "my_idea").code == 0
    optimizer = load(tmp_path / "run")["optimizer"]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer["param_groups"])
    updates = max(float(moment["step"]) for moment in optimizer["state"].values())
    assert updates == 30  # resumed with the moments


def test_a_new_argument_may_be_negative(tmp_path, my_idea):
    my_idea(("    seed: int", "    offset: float = -1.0\n    seed: int"))
    assert train("Recording", tmp_path / "run", "my_idea", total_timesteps=60).code == 0


def test_an_argument_that_cannot_be_loaded_again(tmp_path, my_idea):
    """The run fails at its start, not when it resumes."""
    path = "    path: Path = Path()\n"
    my_idea(
        ("import math\n", "import math\nfrom pathlib import Path\n"),
        ("    seed: int", path + "    seed: int"),
    )
    assert train("Recording", tmp_path / "run", "my_idea").fails_with("cannot read .*policy.pt")


def test_a_mistake_in_a_changed_agent_shows_where_it_is(tmp_path, my_idea):
    my_idea(
        ("        self.args = args\n        action_dim", "        self.args = int('?')\n        action_dim")
    )
    with pytest.raises(ValueError, match="invalid literal"):
        train("Recording", tmp_path / "run", "my_idea")


def test_arguments_of_an_older_script(tmp_path):
    """One that does not exist any more is ignored, a new one has its default."""
    train("Recording", tmp_path, "sac", total_timesteps=60)
    for name in ("policy.pt", "checkpoint.pt"):
        saved = load(tmp_path, name)
        saved["args"]["old_name"] = saved["args"].pop("tau")
        torch.save(saved, tmp_path / name)
    assert train("Recording", tmp_path, "sac").code == 0
    assert load(tmp_path)["args"]["tau"] == 0.005 and "old_name" not in load(tmp_path)["args"]


def test_the_refusal_shows_both_values(tmp_path):
    train("Recording", tmp_path, "sac", total_timesteps=60)
    assert train("Recording", tmp_path, "sac", gamma=0.5).fails_with(
        r"has gamma 0\.99, not 0\.5: choose another --run-dir"
    )


def test_print_options_do_not_change_the_spaces(tmp_path):
    """A task may call np.set_printoptions when it is imported, or not."""
    train("Recording", tmp_path, "sac", total_timesteps=60)
    with np.printoptions(precision=1, threshold=1):
        assert train("Recording", tmp_path, "sac").code == 0


def test_a_small_change_of_the_bounds_is_refused(tmp_path, monkeypatch):
    train("Recording", tmp_path, "sac", total_timesteps=60)
    low, high = RecordingEnv.action_space.low, RecordingEnv.action_space.high
    monkeypatch.setattr(RecordingEnv, "action_space", environments.box(low, high + np.float32(1e-6)))
    assert train("Recording", tmp_path, "sac").fails_with("other spaces than the run")
    words = ["--run-dir", tmp_path, "--evaluate", "--env-id", "environments:Image-v0"]
    assert main("sac", words).fails_with("flat boxes")


class Normalized(gym.wrappers.NormalizeObservation):
    """NormalizeObservation of RecordingEnv."""

    def __init__(self):
        super().__init__(RecordingEnv())


def test_a_note_about_statistics_that_are_not_saved(tmp_path, capsys):
    gym.register("Normalized-v0", Normalized)
    try:
        assert main("sac", options("Recording", tmp_path) + ["--env-id", "Normalized-v0"]).code == 0
    finally:
        gym.registry.pop("Normalized-v0")
    assert capsys.readouterr().out.count("note: a wrapper normalizes with statistics of each copy") == 1
    train("Recording", tmp_path / "without", "sac")
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--evaluate"], ["--env-id", "environments:NanReward-v0"]])
def test_every_environment_is_closed(tmp_path, monkeypatch, words):
    """After training, an evaluation and an error; also if the first one fails to close."""
    closed = []

    def close(self):
        closed.append(self.copy)
        if self.copy == 0:
            raise ZeroDivisionError

    monkeypatch.setattr(RecordingEnv, "close", close)
    arguments = options("Recording", tmp_path)
    if words == ["--evaluate"]:
        main("sac", arguments)
        closed.clear()
    main("sac", arguments + words)
    assert sorted({*closed}) == list(range(RecordingEnv.copies)) and RecordingEnv.copies in (2, 4)


def test_closed_output(tmp_path):
    words = options("Recording", tmp_path / "run", total_timesteps=60)
    command = f"{sys.executable} {ROOT / 'sac.py'} {' '.join(words)} >&-"
    assert subprocess.run(command, shell=True, cwd=ROOT / "tests", timeout=300).returncode == 0
    assert load(tmp_path / "run")["finished"]
