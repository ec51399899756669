"""Equal seeds give bitwise equal runs, also after equal interruptions."""

import shutil
import signal

from environments import RecordingEnv
from scripts import Moment, call_at, equal, load, train


def test_equal_seeds_give_equal_runs(tmp_path):
    """The environment draws from np.random and random, which --seed seeds."""
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("GlobalRandom", tmp_path / name, seed=seed)
        runs.append(load(tmp_path / name))
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])
    assert not runs[0]["replay"][:, :3].equal(runs[2]["replay"][:, :3])  # np.random
    assert not runs[0]["replay"][:, 8].equal(runs[2]["replay"][:, 8])  # random


def test_seeds_give_independent_initial_weights(tmp_path):
    """Before the first update."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("Recording", tmp_path / name, seed=seed, learning_starts=99)
    first, second, third = (load(tmp_path / name)["agent"] for name in "abc")
    for name in [name for name in first if ".net." in name]:
        assert first[name].equal(second[name]) and (first[name] != third[name]).all()


def test_environments_do_not_share_seeds(tmp_path):
    train("Recording", tmp_path / "a", seed=1)
    first = RecordingEnv.seeds.copy()
    assert len(first) == 2 + 3 * 2 == len(set(first))  # 2 environments and 3 evaluations of 2 episodes
    train("Recording", tmp_path / "b", seed=2)
    assert not set(first) & set(RecordingEnv.seeds)


def test_a_checkpoint_determines_the_rest_of_the_run(tmp_path, monkeypatch):
    call_at(monkeypatch, Moment.LEARNING, lambda: signal.raise_signal(signal.SIGTERM))
    assert train("Recording", tmp_path / "a").code == 128 + signal.SIGTERM
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    seeds = RecordingEnv.seeds.copy()
    for name in "ab":
        assert train("Recording", tmp_path / name).code == 0
        assert not set(seeds) & set(RecordingEnv.seeds[:2])  # of the training environments
    assert equal(load(tmp_path / "a"), load(tmp_path / "b"))
