"""Figures and a results table from the runs of dsac_e.py, dsac_t.py, sac.py and td3.py.

    python plot.py runs                     every run below runs/, whatever it was stopped or resumed
    python plot.py results/curves.csv.gz    the same figures again, from the numbers that plot.py kept

Writes into --out, each figure as PNG and SVG:
    returns       evaluation returns over environment steps
    temperature   alpha, policy entropy, and DSAC-E's trajectory entropy against its budget, where that is in reach
    targets       mean and spread over the batch of what the critics follow
    results.md    the table: return in the last tenth of the steps, its interval, (seeds x steps)
    curves.csv.gz the numbers behind all of them
Lines are means over seeds (or interquartile means), bands are 95% bootstrap intervals of those over the seeds.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro
from scipy.stats import bootstrap, trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # files only: no screen needed
from matplotlib import pyplot as plt  # noqa: E402

NAMES = {"dsac_e": "DSAC-E", "dsac_t": "DSAC-T", "sac": "SAC", "td3": "TD3"}
# What may differ between runs that share a line: all that does not change what is learned, and the seed.
SHARED = {"env_id", "seed", "total_timesteps", "device", "compile", "run_dir", "resume", "evaluate", "capture_video"}
SHARED |= {"eval_interval", "eval_episodes", "checkpoint_interval"}
RETURN = "eval/episodic_return"
TAGS = (RETURN, "losses/alpha", "entropy/policy_mean", "entropy/trajectory_mean", "entropy/budget")
TAGS += ("critic/target_mean", "critic/target_std")
COLUMNS = ["task", "line", "seed", "tag", "step", "value"]
POINTS = 300  # kept of one curve, evaluations aside
# Colours of different lightness, dashes and markers: the lines can be told apart in black and white too.
STYLES = [
    ("#000000", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#0072b2", "-.", "^"),
    ("#56b4e9", ":", "D"),
    ("#009e73", "-", "v"),
    ("#cc79a7", "--", "P"),
    ("#e69f00", "-.", "X"),
    ("#444444", ":", "*"),
]


@dataclass
class Args:
    """Draw learning curves, temperatures and target values; write the results table."""

    paths: tyro.conf.Positional[list[Path]]
    """directories that hold runs, at any depth, and files that plot.py wrote (curves.csv.gz)"""
    out: Path = Path("plots")
    """directory of what is written"""
    statistic: Literal["mean", "iqm"] = "mean"
    """over the seeds: mean, or interquartile mean, which differs from it with four seeds or more"""


def fail(message: str) -> NoReturn:
    """Ends the program with exit code 2 and one line: what is wrong, and what to type instead."""
    print(f"plot: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_run(run_dir: Path) -> tuple[dict, pd.DataFrame]:
    """A run's algorithm and arguments, and its curves as columns tag, step, value.

    Where a run was killed and resumed, what it logged after the checkpoint was made twice; the first is dropped.
    """
    saved = torch.load(run_dir / "policy.pt", map_location="cpu", weights_only=True)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()  # 0: all of them, no sampling
    rows = []
    for tag in TAGS:
        curve = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        stride = 1 if tag == RETURN else -(-len(curve) // POINTS) or 1
        # Six digits are what curves.csv.gz keeps, so that what is drawn from it is the same.
        rows += [(tag, event.step, float(f"{event.value:.6g}")) for event in curve[::stride]]
    return {"algorithm": saved["algorithm"], **saved["args"]}, pd.DataFrame(rows, columns=["tag", "step", "value"])


def read(paths: list[Path]) -> pd.DataFrame:
    """All curves, as COLUMNS; `line` is the algorithm and the arguments in which its runs on a task differ."""
    if any(path.is_file() for path in paths):
        if len(paths) > 1:  # it does not know the arguments any more, by which runs are told apart
            fail("a file of curves is drawn alone: name one such file, or only directories")
        try:
            return pd.read_csv(paths[0])[COLUMNS]
        except Exception as error:  # whatever pandas makes of some other file
            fail(f"{paths[0]} is not a file that plot.py wrote ({error}): name that or a directory of runs")
    tables, runs = [], []
    for path in paths:
        found = sorted({file.parent for file in path.rglob("events.out.tfevents*")})
        if not found:
            fail(f"no TensorBoard files in {path}: name the directory of a run, or one that holds runs")
        for run_dir in found:
            try:
                runs.append((run_dir, *read_run(run_dir)))
            except Exception as error:  # whatever torch and tensorboard make of a file that is missing or damaged
                print(f"{run_dir} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    if not runs:
        fail("none of these runs can be read")
    settings = pd.DataFrame([args for _, args, _ in runs]).astype(str)
    for (run_dir, args, curves), own in zip(runs, settings.to_dict("records"), strict=True):
        alike = settings[(settings.env_id == own["env_id"]) & (settings.algorithm == own["algorithm"])]
        varying = [name for name in alike if name not in SHARED and alike[name].nunique() > 1]
        line = ", ".join([NAMES[own["algorithm"]], *(f"{name} {own[name]}" for name in varying)])
        tables.append(curves.assign(task=args["env_id"], line=line, seed=args["seed"], run=str(run_dir)))
    curves = pd.concat(tables)
    # Of runs with the same line and seed the longest: together they would count as more seeds than they are.
    lengths = curves.groupby(["task", "line", "seed", "run"]).step.max().sort_values()
    kept = lengths.reset_index().drop_duplicates(["task", "line", "seed"], keep="last").run
    for run in sorted(set(curves.run) - set(kept)):
        print(f"{run} is left out: another run has the same arguments and seed", file=sys.stderr)
    return curves[curves.run.isin(kept)][COLUMNS]


def over_seeds(curves: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Curves of one task, line and tag -> steps (n,), values (seeds, n), as far as every seed has come.

    Seeds evaluated at other steps than the one with the fewest evaluations are interpolated to those.
    """
    runs = [run.drop_duplicates("step").sort_values("step") for _, run in curves.groupby("seed")]
    first, last = max(run.step.min() for run in runs), min(run.step.max() for run in runs)
    steps = min((run.step[run.step.between(first, last)].to_numpy() for run in runs), key=len)
    return steps, np.array([np.interp(steps, run.step, run.value) for run in runs])


def interval(values: np.ndarray, statistic) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile bootstrap over the seeds: (seeds, n) -> low (n,), high (n,). One seed alone has no width."""
    if len(values) == 1:
        return values[0], values[0]
    result = bootstrap((values,), statistic, axis=0, method="percentile", n_resamples=2000, rng=0)
    return result.confidence_interval


def draw(axes, curves: pd.DataFrame, tag: str, lines: list[str], statistic):
    """One line with its band for each of `lines` that has the tag."""
    for line, (colour, dashes, marker) in zip(lines, STYLES * len(lines), strict=False):
        mine = curves[(curves.line == line) & (curves.tag == tag)]
        if len(mine):
            steps, values = over_seeds(mine)
            style = {"color": colour, "linestyle": dashes, "marker": marker, "markevery": 0.12, "markersize": 4}
            axes.plot(steps, statistic(values, axis=0), label=line, linewidth=1.4, **style)
            axes.fill_between(steps, *interval(values, statistic), color=colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def save(figure, axes, out: Path, name: str):
    """One legend for the whole figure, then PNG and SVG; the same curves give the same bytes."""
    entries = {
        label: line for panel in axes.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=4 if axes.shape[1] > 1 else 2,
        handlelength=4,
        frameon=False,
    )
    figure.savefig(out / f"{name}.png", dpi=150)
    figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def figure_returns(curves: pd.DataFrame, lines: list[str], out: Path, statistic):
    """Learning curves, one panel for each task."""
    tasks = list(curves.task.unique())
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3 * rows + 0.6), layout="constrained", squeeze=False
    )
    for panel, task in zip(axes.flat, tasks, strict=False):
        draw(panel, curves[curves.task == task], RETURN, lines, statistic)
        panel.set(title=task, xlabel="environment steps")
    for panel in axes.flat[len(tasks) :]:
        panel.remove()
    for panel in axes[:, 0]:
        panel.set_ylabel("evaluation return")
    save(figure, axes, out, "returns")


def figure_rows(
    curves: pd.DataFrame, rows: list[tuple[str, str, str]], lines: list[str], out: Path, name: str, statistic
):
    """A column for each task, a row for each (tag, label of the y axis, its scale)."""
    tasks = [task for task, mine in curves.groupby("task", sort=False) if mine.tag.isin([row[0] for row in rows]).any()]
    if not tasks:
        return
    size = (4.2 * len(tasks), 2.6 * len(rows) + 0.6)
    figure, axes = plt.subplots(len(rows), len(tasks), figsize=size, layout="constrained", squeeze=False, sharex="col")
    for column, task in enumerate(tasks):
        mine = curves[curves.task == task]
        for panel, (tag, label, scale) in zip(axes[:, column], rows, strict=True):
            draw(panel, mine, tag, lines, statistic)
            panel.set_yscale(scale)
            if tag == "entropy/trajectory_mean":
                low, high = panel.dataLim.intervaly
                bound = mine[(mine.tag == "entropy/budget") & mine.line.str.startswith("DSAC-E")]
                for budget in bound[~bound.line.str.contains("tec False")].value.unique():  # that is of single steps
                    if budget > low - 5 * (high - low):  # else the curves would be flat lines above it
                        panel.axhline(budget, color="black", linewidth=1, label="budget", dashes=(1, 1))
            if column == 0:
                panel.set_ylabel(label)
        axes[0, column].set_title(task)
        axes[-1, column].set_xlabel("environment steps")
    save(figure, axes, out, name)


def table(curves: pd.DataFrame, lines: list[str], statistic) -> str:
    """Markdown: a row for each task, a column for each line."""
    rows = [["task", *lines], ["---"] * (1 + len(lines))]
    for task, of_task in curves[curves.tag == RETURN].groupby("task", sort=False):
        cells = [task]
        for line in lines:
            mine = of_task[of_task.line == line]
            if mine.empty:
                cells.append("")
                continue
            steps, values = over_seeds(mine)
            final = values[:, steps >= 0.9 * steps[-1]].mean(axis=1, keepdims=True)
            low, high = interval(final, statistic)
            span = f" [{low[0]:.0f}, {high[0]:.0f}]" if len(final) > 1 else ""
            cells.append(f"{statistic(final, axis=0)[0]:.0f}{span} ({len(final)} x {steps[-1] / 1000:.0f}k)")
        rows.append(cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main():
    args = tyro.cli(Args)
    statistic = np.mean if args.statistic == "mean" else partial(trim_mean, proportiontocut=0.25)
    curves = read(args.paths)
    ends_of = curves[curves.tag == RETURN].groupby(["task", "line", "seed"]).step.max()
    for (task, line), ends in ends_of.groupby(level=[0, 1]):
        if ends.min() < 0.9 * ends.max():
            print(
                f"{line} on {task} is drawn up to step {ends.min()}, where seed {ends.idxmin()[2]} ends",
                file=sys.stderr,
            )
    order = {name: place for place, name in enumerate(NAMES.values())}
    lines = sorted(curves.line.unique(), key=lambda line: (order.get(line.split(",")[0], 9), line))
    matplotlib.rcParams |= {"svg.hashsalt": "curves", "font.size": 9, "axes.titlesize": 10}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        figure_returns(curves, lines, args.out, statistic)
        rows = [("losses/alpha", "alpha", "log"), ("entropy/policy_mean", "policy entropy, nats", "linear")]
        rows += [("entropy/trajectory_mean", "trajectory entropy, nats", "linear")]
        figure_rows(curves, rows, lines, args.out, "temperature", statistic)
        rows = [
            ("critic/target_mean", "mean of the targets", "linear"),
            ("critic/target_std", "spread of the targets", "log"),
        ]
        figure_rows(curves, rows, lines, args.out, "targets", statistic)
        results = table(curves, lines, statistic)
        (args.out / "results.md").write_text(results)
        compression = {"method": "gzip", "mtime": 0}  # no time stamp: the same curves give the same bytes
        curves.to_csv(args.out / "curves.csv.gz", columns=COLUMNS, index=False, compression=compression)
    except OSError as error:
        fail(f"cannot write to {args.out} ({error.strerror}): name another directory with --out")
    print(results, end="")
    print(f"figures, table and curves: {args.out}")


if __name__ == "__main__":
    main()
