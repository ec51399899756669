"""--capture-video: the film shows the evaluated episode, and what is missing for it costs one line."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import pytest
from test_errors import refuse

ROOT = Path(__file__).resolve().parent.parent
sac = importlib.import_module("sac")


@pytest.fixture
def painted(run, monkeypatch, capsys):
    """A run of a task that draws without any library, and film(arguments) -> what --evaluate printed."""
    run_dir = run(sac, env_id="Painted-v0")

    def film(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sac.py", "--evaluate", str(run_dir), *arguments])
        sac.main()
        return capsys.readouterr().out

    monkeypatch.setenv("MUJOCO_GL", "egl")  # so that what film() sets is taken back
    return run_dir, film


def brightness(video: Path) -> list[int]:
    return [round(frame.mean() / 51) for frame in imageio.get_reader(video)]


def test_the_film_is_the_first_episode(painted):
    """One episode from its first observation on, however many are evaluated, and the result is the one without it."""
    run_dir, film = painted
    result = film("--eval-episodes", "3", "--seed", "7")
    shown = film("--eval-episodes", "3", "--seed", "7", "--capture-video")
    video = run_dir / "evaluation-seed-7-episode-0.mp4"
    assert result in shown and f"the first of them: {video}\n" in shown
    assert brightness(video)[:5] == [0, 1, 2, 3, 4] and len(brightness(video)) <= 6
    assert [path.name for path in run_dir.glob("*.mp4")] == [video.name]


def test_an_episode_without_end_is_filmed_too(painted, monkeypatch):
    """What ends only because evaluation gives up on it is written when the environments close."""
    run_dir, film = painted
    monkeypatch.setattr(sac, "EVAL_LIMIT", 3)
    film("--eval-episodes", "1", "--capture-video")
    assert brightness(run_dir / "evaluation-seed-0-episode-0.mp4")[:3] == [0, 1, 2]


def refuse_film(monkeypatch, capsys, run_dir) -> str:
    capsys.readouterr()
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    return refuse(monkeypatch, capsys, sac, f"--evaluate {run_dir} --capture-video")


@pytest.mark.parametrize("module", ["moviepy", "imageio_ffmpeg"])
def test_no_encoder(painted, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)  # how Python marks what cannot be imported
    assert "pip install moviepy imageio-ffmpeg" in refuse_film(monkeypatch, capsys, painted[0])


def test_an_encoder_that_is_not_there(painted, monkeypatch, capsys):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent/ffmpeg")
    assert "unset IMAGEIO_FFMPEG_EXE" in refuse_film(monkeypatch, capsys, painted[0])


def test_no_gl_library(painted, monkeypatch, capsys):
    """What PyOpenGL raises where libEGL is missing, from the very place where it is raised."""

    def render(self):
        raise AttributeError("'NoneType' object has no attribute\n'eglQueryString'")

    monkeypatch.setattr(gym.envs.registry["Painted-v0"].entry_point, "render", render)
    assert "eglQueryString'): apt-get install libegl1" in refuse_film(monkeypatch, capsys, painted[0])


def test_full_disk(painted, monkeypatch, capsys):
    """No room at all, and room for a part of the film only; of a small film, ffmpeg and moviepy say nothing."""
    run_dir, film = painted
    video = run_dir / "evaluation-seed-0-episode-0.mp4"
    video.symlink_to("/dev/full")
    with pytest.raises(SystemExit):
        film("--capture-video")
    out, err = capsys.readouterr()
    assert ("No space left on device" in err or "is not whole: make room" in err) and err.count("\n") == 1

    video.unlink()
    stop = gym.wrappers.RecordVideo.stop_recording

    def cut(self):
        stop(self)
        video.write_bytes(video.read_bytes()[:200])

    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", cut)
    with pytest.raises(SystemExit):
        film("--capture-video")
    assert "is not whole: make room" in capsys.readouterr().err


def test_mujoco_without_a_screen(run):
    """A MuJoCo task is drawn where there is no display, or the one line says what to install."""
    run_dir = run(sac, env_id="InvertedPendulum-v4")
    command = [sys.executable, ROOT / "sac.py", "--evaluate", run_dir, "--eval-episodes", "1", "--capture-video"]
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode == 0:
        frames = np.stack([frame for frame in imageio.get_reader(run_dir / "evaluation-seed-0-episode-0.mp4")])
        assert frames.std() > 10 and (frames[0] != frames[-1]).any()  # something is drawn, and it moves
    else:
        assert done.returncode == 2 and "apt-get install libegl1" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("library", ["osmesa", "nonsense"])
def test_gl_library_that_mujoco_cannot_load(library):
    """MUJOCO_GL makes mujoco load a library at import, even where nothing is drawn."""
    command = [sys.executable, ROOT / "sac.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MUJOCO_GL": library})
    if done.returncode:  # osmesa may be there
        assert done.stderr.startswith("mujoco cannot be loaded (") and done.stderr.count("\n") == 1
        assert "unset MUJOCO_GL" in done.stderr
    assert done.returncode or library == "osmesa"
