"""results/plot.py and stats.py: what is drawn, printed and saved, from what was logged."""

import csv
import gzip
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


def test_lines_are_named_by_the_arguments_that_differ(tmp_path, monkeypatch):
    log(tmp_path / "a", {0: 0}, "dsac_e", rho=5.0)
    log(tmp_path / "b", {0: 0}, "dsac_e", rho=20.0, seed=1, total_timesteps=50)
    log(tmp_path / "c", {0: 0}, "dsac_e", rho=5.0, seed=3)
    log(tmp_path / "d", {0: 0}, "dsac_e", rho=9.0, tec=False, env_id="Ant-v4")
    log(tmp_path / "e", {0: 0}, "my_idea", env_id="Ant-v4")
    log(tmp_path / "f", {0: 0}, "my_idea", env_id="Ant-v4", seed=1, updates_per_step=1, env_threads=3)
    lines = {(task, line): sorted(seeds) for (task, line, _), seeds in plot.read([tmp_path]).items()}
    hopper = {("Hopper-v4", "DSAC-E --rho 5"): [0, 3], ("Hopper-v4", "DSAC-E --rho 20"): [1]}
    assert lines == hopper | {("Ant-v4", "DSAC-E --no-tec"): [0], ("Ant-v4", "my_idea"): [0, 1]}
    run_plot(monkeypatch, tmp_path, "--out", tmp_path / "out")


def test_widths_are_separate_lines_in_runs_and_saved_curves(tmp_path, monkeypatch):
    """Also where all runs of a directory have one width: it may be drawn together with curves of another."""
    log(tmp_path / "256/a", {0: 1, 100: 1}, "dsac_e", hidden_width=256, center_entropy=True)
    log(tmp_path / "64/a", {0: 9, 100: 9}, "dsac_e", hidden_width=64, center_entropy=True)
    run_plot(monkeypatch, tmp_path / "64", "--out", tmp_path / "out")
    assert plot.plt.gcf().get_suptitle().endswith(" 64 hidden units")
    files = tmp_path / "out/curves.csv.gz", tmp_path / "256"  # saved curves and a directory
    curves = plot.read(files)
    lines = {"DSAC-E --center-entropy": 1, "DSAC-E --center-entropy --hidden-width 64": 9}
    assert {line: curves["Hopper-v4", line, plot.RETURN][0][0][1] for line in lines} == lines
    assert {line for _, line, _ in curves} == {*lines}
    assert [(row["width"], row["return"]) for row in stats.rows(curves)] == [(256, 1), (64, 9)]
    run_plot(monkeypatch, *files, "--out", tmp_path / "both")
    assert plot.plt.gcf().get_suptitle().endswith(" 64 or 256 hidden units")


def test_seeds_are_averaged_as_far_as_all_have_come():
    steps, values = plot.over_seeds({0: [(0, 0.0), (100, 2.0), (200, 4.0)], 1: [(0, 2.0), (100, 4.0)]})
    assert steps.tolist() == [0, 100] and values.mean(0).tolist() == [1, 3]
    low, high = plot.interval(np.array([[1.0], [2.0], [6.0]]))
    assert (low[0], high[0]) == (1, 6)  # of three seeds: the lowest and the highest


def test_long_curves_are_saved_with_at_most_300_points_and_all_evaluations(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1000):
            writer.add_scalar("losses/alpha", step, step)
            writer.add_scalar(plot.RETURN, step, step)
    torch.save({"algorithm": "sac", "args": ARGS, "policy": {}}, tmp_path / "policy.pt")
    _, curves = plot.read_run(tmp_path)
    assert (len(curves["losses/alpha"]), len(curves[plot.RETURN])) == (250, 1000)
    assert curves["losses/alpha"][1] == (4, 4)


def test_statistics():
    steps = np.arange(0.0, 3e6, 1e5)
    assert stats.drift(steps, 2e-5 * steps, 0, 2.9e6) == pytest.approx(4)  # per 200,000 steps
    assert stats.drift(steps, steps**2, 0, 2e5) == 4e10  # the only window
    assert stats.drift(steps, steps, 0, 1e5) is None
    assert stats.last(0.1, steps, steps).tolist() == [2.7e6, 2.8e6, 2.9e6]


def test_numbers_and_table(tmp_path, monkeypatch, capsys):
    """One row per run in numbers.csv. The table has no mean over runs of different lengths."""
    curve = {0: 5, 500_000: 20, 1_000_000: 10, 1_500_000: 1200}
    log(tmp_path / "runs/a", curve, "dsac_e", seed=1)
    log(tmp_path / "runs/b", curve | {1_500_000: 30}, "dsac_e", seed=0)
    log(tmp_path / "runs/c", {0: 5, 1_000_000: 10}, "dsac_e", seed=2)
    log(tmp_path / "runs/d", {0: 5, 1_000_000: 10}, "dsac_e", seed=0, tec=False)
    stats.main((tmp_path / "runs",), tmp_path)
    table = capsys.readouterr().out
    assert "| Hopper-v4 | 256 | DSAC-E | 1.5; 1.5; 1 | 0; 1; 2 | 30; 1200; 10 |  |\n" in table
    assert "| Hopper-v4 | 256 | DSAC-E --no-tec | 1 | 0 | 10 | 10 |\n" in table
    with open(tmp_path / "numbers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["line"], row["seed"]) for row in rows[2:]] == [("DSAC-E", "2"), ("DSAC-E --no-tec", "0")]
    row = rows[1]
    assert (row["width"], row["steps"], row["return"]) == ("256", "1500000", "1200")
    assert (row["alpha_min"], row["log_alpha_std"], row["following_steps"]) == ("0.1", "0", "0.1")
    constrained = [(row["constrained_entropy_min"], row["constrained_entropy_max"]) for row in rows[1::2]]
    assert constrained == [("-3600", "-30"), ("0.1", "0.1")]  # of the trajectory, from 0.5M on; of a step
    assert [row["above_1000"] for row in rows] == ["", "1500000", "", ""]


def test_figures_and_saved_curves(tmp_path, monkeypatch):
    for seed in range(2):
        log(tmp_path / f"runs/{seed}", {0: 5, 500_000: 20, 1_000_000: 10 + 2 * seed}, "dsac_e", seed=seed)
    run_plot(monkeypatch, tmp_path / "runs", "--out", tmp_path / "first")
    panels = plot.plt.figure(plot.plt.get_fignums()[-2]).axes  # temperature.png
    with_budget = [p.get_ylabel() for p in panels if "entropy budget" in p.get_legend_handles_labels()[1]]
    assert with_budget == ["trajectory entropy (nats)"]
    run_plot(monkeypatch, tmp_path / "first/curves.csv.gz", "--out", tmp_path / "second")
    for name in ("returns.png", "temperature.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_runs_that_are_read_twice_count_once(tmp_path, monkeypatch, capsys):
    log(tmp_path / "a", {0: 1, 100: 2})
    log(tmp_path / "b", {0: 3, 100: 4})
    assert plot.read([tmp_path])["Hopper-v4", "SAC", plot.RETURN] == {0: [(0, 1), (100, 2)]}
    note = f"note: {tmp_path / 'b'} is left out: {tmp_path / 'a'} has seed 0 of Hopper-v4, SAC"
    assert note in capsys.readouterr().err


def test_files_without_saved_curves_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("task,line,seed\n")
    with pytest.raises(SystemExit, match="notes.txt has no saved curves: Not a gzipped file"):
        plot.read([tmp_path / "notes.txt"])
    with gzip.open(tmp_path / "other.csv.gz", "wt") as file:
        file.write("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other.csv.gz has no saved curves"):
        plot.read([tmp_path / "other.csv.gz"])


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
