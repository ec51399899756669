"""plot.py: every number it draws or prints, against the numbers that were logged."""

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import plot

ARGS = {"env_id": "Hopper-v4", "seed": 0, "rho": 1.0, "tec": True, "total_timesteps": 9, "run_dir": None, "gamma": 0.99}


def log(run_dir: Path, curves: dict[str, dict[int, float]], algorithm="sac", purge=None, **arguments):
    """A run directory as the scripts write it: {tag: {step: value}}."""
    with SummaryWriter(str(run_dir), purge_step=purge) as writer:
        for tag, curve in curves.items():
            for step, value in curve.items():
                writer.add_scalar(tag, value, step)
    torch.save({"algorithm": algorithm, "args": ARGS | arguments, "policy": {}}, run_dir / "policy.pt")


def returns(*values, every=100) -> dict:
    return {plot.RETURN: {every * i: value for i, value in enumerate(values)}}


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    plot.main()


def test_a_killed_and_resumed_run_is_one_curve(tmp_path):
    """What a run logged after its last checkpoint was made again after the resume: the first version must not count."""
    log(tmp_path, {plot.RETURN: {0: 1, 100: 2, 200: 3, 300: 99, 400: 98}})
    log(tmp_path, {plot.RETURN: {300: 4, 400: 5, 500: 6}}, purge=201)
    _, curves = plot.read_run(tmp_path)
    assert list(zip(curves.step, curves.value, strict=True)) == [
        (0, 1),
        (100, 2),
        (200, 3),
        (300, 4),
        (400, 5),
        (500, 6),
    ]


def test_every_evaluation_is_read_and_long_diagnostics_are_thinned(tmp_path):
    """TensorBoard's own reader samples 10,000 points of a curve; here none of the evaluations is lost."""
    many = {20 * i: float(i) for i in range(10_500)}
    log(tmp_path, {plot.RETURN: many, "losses/alpha": many})
    _, curves = plot.read_run(tmp_path)
    assert (curves.tag == plot.RETURN).sum() == 10_500
    alpha = curves[curves.tag == "losses/alpha"]
    assert 150 <= len(alpha) <= plot.POINTS and (alpha.value == alpha.step / 20).all()


def test_lines_are_told_apart_by_what_differs(tmp_path):
    """Seeds and bookkeeping do not make a new line, any other argument does, and only where it differs."""
    log(tmp_path / "a", returns(0, 2), "dsac_e", rho=5.0)
    log(tmp_path / "b", returns(1, 2), "dsac_e", rho=20.0, seed=1, total_timesteps=50, device="cuda")
    log(tmp_path / "c", returns(2, 2), "dsac_e", rho=5.0, seed=3)
    log(tmp_path / "d", returns(3, 2), "dsac_e", rho=40.0, env_id="Ant-v4")
    log(tmp_path / "e", returns(4, 2), "td3", rho=7.0)
    curves = plot.read([tmp_path])
    first = curves[curves.step == 0][["value", "task", "line", "seed"]]
    named = {mark: tuple(rest) for mark, *rest in first.itertuples(index=False)}
    assert named == {
        0: ("Hopper-v4", "DSAC-E, rho 5.0", 0),
        1: ("Hopper-v4", "DSAC-E, rho 20.0", 1),
        2: ("Hopper-v4", "DSAC-E, rho 5.0", 3),
        3: ("Ant-v4", "DSAC-E", 0),
        4: ("Hopper-v4", "TD3", 0),
    }


def test_the_same_run_twice_counts_once(tmp_path, capsys):
    log(tmp_path / "short", returns(1, 2))
    log(tmp_path / "long", returns(5, 6, 7))
    log(tmp_path / "other", returns(8, 9), seed=1)
    curves = plot.read([tmp_path])
    assert sorted(curves.value) == [5, 6, 7, 8, 9]
    assert "short is left out" in capsys.readouterr().err


def test_seeds_of_different_length_and_interval(tmp_path):
    """A curve over seeds ends where the shortest ends, and seeds evaluated at other steps are interpolated."""
    log(tmp_path / "0", returns(0, 10, 20, 30, 40, 50))
    log(tmp_path / "1", returns(100, 102, 104, every=150), seed=1)
    steps, values = plot.over_seeds(plot.read([tmp_path]))
    assert steps.tolist() == [0, 150, 300]
    assert values.tolist() == [[0, 15, 30], [100, 102, 104]]

    log(tmp_path / "2", returns(*range(8), every=20), seed=2)  # the shortest, with the most evaluations
    steps, values = plot.over_seeds(plot.read([tmp_path / "0", tmp_path / "2"]))
    assert steps.tolist() == [0, 100]
    assert values.tolist() == [[0, 10], [0, 5]]


def test_interval_is_the_percentile_bootstrap():
    """Three seeds have 27 resamples, all equally likely: the interval is that of their means."""
    values = np.array([[1.0, 3.0], [2.0, -7.0], [6.0, 5.0]])
    means = np.array([np.mean([values[i] for i in draw], axis=0) for draw in itertools.product(range(3), repeat=3)])
    low, high = plot.interval(values, np.mean)
    exact_low, exact_high = (np.quantile(means, q, axis=0, method="inverted_cdf") for q in (0.025, 0.975))
    np.testing.assert_allclose(low, exact_low)
    np.testing.assert_allclose(high, exact_high)


def test_one_seed_has_no_band():
    low, high = plot.interval(np.array([[1.0, 2.0]]), np.mean)
    assert low.tolist() == high.tolist() == [1, 2]


def test_results(monkeypatch, capsys, tmp_path):
    """The table's numbers from the logged ones: the evaluations of the last tenth, then the statistic over seeds."""
    last = {}
    for seed, offset in enumerate([0, 10, 20, 30, 1000]):
        log(tmp_path / f"runs/sac{seed}", returns(*(offset + np.arange(21.0))), seed=seed)
        last[seed] = offset + np.mean([18, 19, 20])
    log(tmp_path / "runs/td3", returns(*range(21)), "td3", env_id="Ant-v4")
    main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "mean")
    out = capsys.readouterr().out
    mean = np.mean(list(last.values()))
    row = re.search(r"\| Hopper-v4 \| (\d+) \[(\d+), (\d+)\] \(5 x 2k\) \|  \|", out)
    assert float(row[1]) == round(mean) and float(row[2]) < mean < float(row[3])
    assert "| Ant-v4 |  | 19 (1 x 2k) |" in out
    assert (tmp_path / "mean/results.md").read_text() in out

    main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "iqm", "--statistic", "iqm")
    middle = sorted(last.values())[1:4]  # of five, a quarter is one at each end
    assert re.search(rf"\| Hopper-v4 \| {np.mean(middle):.0f} \[", capsys.readouterr().out)


def full(seed: int) -> dict:
    """All tags of a run."""
    steps = range(0, 2000, 100)
    curves = {tag: {step: 1.0 + i + seed + step / 1000 for step in steps} for i, tag in enumerate(plot.TAGS)}
    return curves | {"entropy/budget": dict.fromkeys(steps, -5.0)}


def test_drawn_again_from_the_kept_numbers(monkeypatch, capsys, tmp_path):
    """curves.csv.gz is enough: the figures and the table made from it are the same files, byte for byte."""
    for algorithm in ("dsac_e", "dsac_t"):
        for seed in (0, 1):
            log(tmp_path / f"runs/{algorithm}{seed}", full(seed), algorithm, seed=seed)
    main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "a")
    main(monkeypatch, tmp_path / "a/curves.csv.gz", "--out", tmp_path / "b")
    names = {"curves.csv.gz", "results.md"} | {
        f"{figure}.{kind}" for figure in ("returns", "temperature", "targets") for kind in ("png", "svg")
    }
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert capsys.readouterr().err == ""


def test_what_is_drawn(monkeypatch, tmp_path):
    """The lines and bands of a panel are the statistic over the seeds and its interval, and the budget is there."""
    for seed in range(3):
        log(tmp_path / str(seed), full(seed), "dsac_e", seed=seed)
    panels = {}

    def keep(figure, axes, out, name):
        for panel in axes.flat:
            panels[panel.get_ylabel()] = panel

    monkeypatch.setattr(plot, "save", keep)
    main(monkeypatch, tmp_path, "--out", tmp_path / "out")
    steps = np.arange(0, 2000, 100)
    for label, tag in (("evaluation return", plot.RETURN), ("alpha", "losses/alpha"),
                       ("trajectory entropy, nats", "entropy/trajectory_mean"),
                       ("spread of the targets", "critic/target_std")):  # fmt: skip
        line = panels[label].lines[0]
        assert line.get_label() == "DSAC-E"
        np.testing.assert_allclose(line.get_xdata(), steps)
        middle = 1.0 + plot.TAGS.index(tag) + 1 + steps / 1000
        np.testing.assert_allclose(line.get_ydata(), middle, rtol=1e-6)
        band = panels[label].collections[0].get_paths()[0].vertices
        assert np.isclose(band[:, 1].min(), middle[0] - 1, atol=0.01)  # all resamples of one seed: within 2.5%
        assert np.isclose(band[:, 1].max(), middle[-1] + 1, atol=0.01)
    budgets = [line for line in panels["trajectory entropy, nats"].lines if line.get_label() == "budget"]
    assert [line.get_ydata()[0] for line in budgets] == [-5] and panels["alpha"].get_yscale() == "log"


def test_lines_can_be_told_apart_in_black_and_white():
    """Up to eight lines: no two share dashes and marker, and neighbours of equal dashes differ in lightness."""
    assert len({(dashes, marker) for _, dashes, marker in plot.STYLES}) == len(plot.STYLES) == 8
    light = [
        np.dot([int(colour[i : i + 2], 16) for i in (1, 3, 5)], [0.299, 0.587, 0.114]) for colour, *_ in plot.STYLES
    ]
    for (i, (_, a, _)), (j, (_, b, _)) in itertools.combinations(enumerate(plot.STYLES), 2):
        assert a != b or abs(light[i] - light[j]) > 30


@pytest.mark.parametrize("content", [None, "", "task,line\na,b\n", "\x00\x01"])
def test_one_line_for_what_is_not_a_run(monkeypatch, capsys, tmp_path, content):
    path = tmp_path / "nothing"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, path, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("plot: ") and err.count("\n") == 1


def test_a_damaged_run_is_named_and_left_out(monkeypatch, capsys, tmp_path):
    log(tmp_path / "good", returns(1, 2))
    log(tmp_path / "bad", returns(1, 2), seed=1)
    (tmp_path / "bad/policy.pt").write_bytes(b"nonsense")
    main(monkeypatch, tmp_path, "--out", tmp_path / "out")
    out, err = capsys.readouterr()
    assert "bad is left out" in err and "(1 x 0k)" in out
    (tmp_path / "good/policy.pt").unlink()
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, tmp_path, "--out", tmp_path / "out")
    assert stop.value.code == 2


def test_files_and_directories_do_not_mix(monkeypatch, capsys, tmp_path):
    log(tmp_path / "run", returns(1, 2))
    (tmp_path / "curves.csv").write_text(",".join(plot.COLUMNS))
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, tmp_path / "run", tmp_path / "curves.csv")
    assert stop.value.code == 2 and "is drawn alone" in capsys.readouterr().err


def test_a_short_seed_is_named(monkeypatch, capsys, tmp_path):
    """One seed that has just begun cuts the line of all: the user is told which."""
    log(tmp_path / "0", returns(*range(11)))
    log(tmp_path / "1", returns(1, 2), seed=1)
    main(monkeypatch, tmp_path, "--out", tmp_path / "out")
    out, err = capsys.readouterr()
    assert err == "SAC on Hopper-v4 is drawn up to step 100, where seed 1 ends\n" and "(2 x 0k)" in out


def test_budgets_out_of_reach_or_of_single_steps_are_not_drawn(monkeypatch, tmp_path):
    for name, seed, budget, tec in (("far", 0, -1e5, True), ("single", 1, -5.0, False)):
        curves = full(seed) | {"entropy/budget": {0: budget, 100: budget}}
        log(tmp_path / name, curves, "dsac_e", seed=seed, tec=tec)
    panels = []
    monkeypatch.setattr(plot, "save", lambda figure, axes, out, name: panels.extend(axes.flat))
    main(monkeypatch, tmp_path, "--out", tmp_path / "out")
    (panel,) = [panel for panel in panels if panel.get_ylabel().startswith("trajectory")]
    assert {line.get_label() for line in panel.lines} == {"DSAC-E, tec True", "DSAC-E, tec False"}


def test_where_it_cannot_write(monkeypatch, capsys, tmp_path):
    log(tmp_path / "run", returns(1, 2))
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, tmp_path / "run", "--out", "/dev/null/plots")
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
