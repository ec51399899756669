"""--capture-video records one episode from its first to its last picture."""

import sys

import imageio
import pytest
from environments import RecordingEnv, RenderingEnv
from scripts import main, train

import dsac_e


def times(path):
    """The time in the episode, which the brightness of each picture of RenderingEnv shows."""
    return [round(frame.mean() / 51) for frame in imageio.get_reader(path)]


def test_the_video_shows_the_whole_episode(tmp_path, monkeypatch, capsys):
    train("Rendering", tmp_path)
    assert main("dsac_e", ["--run-dir", tmp_path, "--capture-video"]).code == 0
    path = tmp_path / "rl-video-episode-0.mp4"
    assert capsys.readouterr().out.endswith(f"step 100: return 15.0 +- 0.0\nvideo: {path}\n")
    assert times(path) == [0, 1, 2, 3, 4, 5] and list(tmp_path.glob("*.mp4")) == [path]
    assert RecordingEnv.copies == 1

    monkeypatch.setattr(dsac_e, "EVAL_LIMIT", 3)  # an episode that is cut off
    assert main("dsac_e", ["--run-dir", tmp_path, "--capture-video"]).code == 0
    assert times(path) == [0, 1, 2, 3]
    assert main("dsac_e", ["--run-dir", tmp_path, "--total-timesteps", "110"]).code == 0  # it continues


@pytest.mark.parametrize("renderer", [None, "osmesa"])
def test_the_renderer_that_the_user_selects(tmp_path, monkeypatch, renderer):
    """MUJOCO_GL; without it, a renderer that needs no display."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if renderer:
        monkeypatch.setenv("MUJOCO_GL", renderer)
    train("Rendering", tmp_path)
    assert main("dsac_e", ["--run-dir", tmp_path, "--capture-video"]).code == 0
    assert RenderingEnv.renderer == (renderer or ("egl" if sys.platform == "linux" else "glfw"))


@pytest.mark.parametrize("env, says", [("Recording", "render_mode"), ("NoOpenGL", "NoneType")])
def test_environments_that_cannot_be_rendered(tmp_path, env, says):
    train(env, tmp_path)
    assert main("dsac_e", ["--run-dir", tmp_path, "--capture-video"]).fails_with(says)
