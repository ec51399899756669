"""results/plot.py and stats.py: what is drawn and printed, from what was logged."""

import sys
from pathlib import Path

import numpy as np
import plot
import pytest
import stats
import torch
from torch.utils.tensorboard import SummaryWriter

ARGS = {"env_id": "Hopper-v4", "seed": 0, "rho": 1.0, "tec": True, "total_timesteps": 900}


def log(run_dir: Path, curve: dict[int, float], algorithm="sac", purge=None, finished=True, **arguments):
    """A run directory as the scripts write it."""
    with SummaryWriter(str(run_dir), purge_step=purge) as writer:
        for step, value in curve.items():
            for tag in plot.TAGS:
                values = {plot.RETURN: value, plot.TRAJECTORY: -3 * value, plot.BUDGET: -100}
                writer.add_scalar(tag, values.get(tag, 0.1), step)
    saved = {"algorithm": algorithm, "args": ARGS | arguments, "policy": {}, "finished": finished}
    torch.save(saved, run_dir / "policy.pt")


def run_plot(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    plot.tyro.cli(plot.main)


def test_a_resumed_run_is_one_curve(tmp_path):
    log(tmp_path / "a", {0: 1, 100: 2, 200: 99, 300: 98})
    log(tmp_path / "a", {200: 3, 300: 4}, purge=200)
    assert plot.read_run(tmp_path / "a")[1][plot.RETURN] == [(0, 1), (100, 2), (200, 3), (300, 4)]


def test_lines_are_named_by_the_arguments_that_differ(tmp_path):
    log(tmp_path / "a", {0: 0}, "dsac_e", rho=5.0)
    log(tmp_path / "b", {0: 0}, "dsac_e", rho=20.0, seed=1, total_timesteps=50)
    log(tmp_path / "c", {0: 0}, "dsac_e", rho=5.0, seed=3)
    log(tmp_path / "d", {0: 0}, "dsac_e", rho=9.0, tec=False, env_id="Ant-v4")
    log(tmp_path / "e", {0: 0}, "dsac_e", rho=9.0, center_entropy=True, env_id="Ant-v4")
    lines = {(task, line): sorted(seeds) for (task, line, _), seeds in plot.read([tmp_path]).items()}
    hopper = {("Hopper-v4", "DSAC-E --rho 5"): [0, 3], ("Hopper-v4", "DSAC-E --rho 20"): [1]}
    ant = {("Ant-v4", "DSAC-E --no-tec"): [0], ("Ant-v4", "DSAC-E --center-entropy"): [0]}
    assert lines == hopper | ant


def test_seeds_are_averaged_as_far_as_all_have_come():
    steps, values = plot.over_seeds({0: [(0, 0.0), (100, 2.0), (200, 4.0)], 1: [(0, 2.0), (100, 4.0)]})
    assert steps.tolist() == [0, 100] and values.mean(0).tolist() == [1, 3]
    low, high = plot.interval(np.array([[1.0], [2.0], [6.0]]))
    assert (low[0], high[0]) == (1, 6)  # of three seeds: the lowest and the highest


def test_statistics():
    """The interquartile mean of 1, 2, 3, 100 is 2.5, that of three values (1/4 1 + 2 + 1/4 3) / 1.5."""
    assert stats.interquartile_mean(np.array([1.0, 100, 3, 2])) == pytest.approx(2.5)
    assert stats.interquartile_mean(np.array([1.0, 2, 6])) == pytest.approx((0.25 + 2 + 1.5) / 1.5)
    assert stats.probability_of_improvement(np.array([1.0, 2]), np.array([1.0, 0])) == (0.5 + 3) / 4
    steps = np.arange(0.0, 3e6, 1e5)
    assert stats.drift(steps, 2e-5 * steps) == pytest.approx(4)  # per 200,000 steps
    assert stats.final_return(steps, steps) == np.mean([2.7e6, 2.8e6, 2.9e6])
    last_points = (1000, 1.0), (900, 3.0), (500, 99.0)  # the third run is not finished
    seeds = {seed: [(0, 0.0), last] for seed, last in enumerate(last_points)}
    curves = {("Hopper-v4", line, plot.RETURN): seeds for line in ("DSAC-E", "SAC")}
    numbers = stats.column(curves, "Hopper-v4", "SAC")
    assert (numbers["return"], numbers["IQM"], numbers["P"]) == ("1; 3; 99", "2", "0.5")


def test_table_figures_and_saved_curves(tmp_path, monkeypatch, capsys):
    for seed in range(2):
        log(tmp_path / f"runs/{seed}", {0: 5, 500_000: 20, 1_000_000: 10 + 2 * seed}, "dsac_e", seed=seed)
    run_plot(monkeypatch, tmp_path / "runs", "--out", tmp_path / "first")
    table = capsys.readouterr().out
    assert "| Hopper-v4 | 11 [10, 12] (2 x 1000k) |" in table
    panels = plot.plt.figure(plot.plt.get_fignums()[-2]).axes  # temperature.png
    with_budget = [p.get_ylabel() for p in panels if "entropy budget" in p.get_legend_handles_labels()[1]]
    assert with_budget == ["trajectory entropy (nats)"]
    stats.main((tmp_path / "first/curves.csv.gz",))
    assert "| constrained entropy / budget | 0.3 to 0.6; 0.36 to 0.6 |" in capsys.readouterr().out
    run_plot(monkeypatch, tmp_path / "first/curves.csv.gz", "--out", tmp_path / "second")
    assert capsys.readouterr().out == table
    for name in ("returns.png", "temperature.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_crashed_run_is_named_with_its_reason(tmp_path, monkeypatch, capsys):
    log(tmp_path / "a", {0: 5}, finished=False)  # also: one evaluation only
    (tmp_path / "a.log").write_text("step 0\ntraining diverged at step 70\n")
    SummaryWriter(str(tmp_path / "b")).close()
    run_plot(monkeypatch, tmp_path, "--out", tmp_path / "out")
    notes = capsys.readouterr().err
    assert "a is unfinished, last evaluation at 0 of 900 steps (last line of a.log: training " in notes
    assert "b is left out: policy.pt cannot be read (FileNotFoundError)" in notes
    with pytest.raises(SystemExit, match="can be drawn"):
        plot.read([tmp_path / "b"])
