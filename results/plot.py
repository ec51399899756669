"""Draws figures from the runs of dsac_e.py, dsac_t.py, sac.py and td3.py, and saves their curves.

    python results/plot.py runs --out plots                    all runs in a directory, at any depth
    python results/plot.py results/ant_2M.csv.gz --out plots   the same figures from saved curves

Lines are means over seeds up to where the first seed ends, bands are 95% bootstrap intervals of the mean.
They are named by the algorithm, by the arguments in NAMED that are not the scripts' defaults, and by other
arguments in which runs of the same task and algorithm differ.
"""

import csv
import gzip
import itertools
import logging
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # needs no display
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about every resumed run
from matplotlib import pyplot as plt

NAMES = {"dsac_e": "DSAC-E", "dsac_t": "DSAC-T", "sac": "SAC", "td3": "TD3"}
NAMED = {"tec": True, "res": True, "center_entropy": False, "hidden_width": 256}  # with their defaults
SHARED = ["env_id", "seed", "total_timesteps", "device", "compile", "run_dir", "evaluate", "capture_video"]
SHARED += ["eval_interval", "eval_episodes", "checkpoint_interval", "env_threads"]  # may differ within a line
RETURN, BUDGET = "eval/episodic_return", "entropy/budget"
POLICY, TRAJECTORY = "entropy/policy_mean", "entropy/trajectory_mean"
STEPS = "entropy/steps_mean"  # with --center-entropy
TAGS = (RETURN, "losses/alpha", POLICY, TRAJECTORY, BUDGET, STEPS, "critic/target_mean", "critic/target_std")
STYLES = [("#000000", "-", "o"), ("#d55e00", "--", "s"), ("#0072b2", "-.", "^"), ("#56b4e9", ":", "D"),
          ("#009e73", "-", "v"), ("#cc79a7", "--", "P"), ("#e69f00", "-.", "X")]  # fmt: skip


def read_run(run_dir: Path) -> tuple[dict, dict]:
    """Arguments and {tag: [(step, value), ...]}. TensorBoard drops what a resumed run has repeated."""
    log = run_dir.with_name(run_dir.name + ".log")  # written by benchmark.sh
    last = log.read_text(errors="replace").strip().rpartition("\n")[2] if log.exists() else ""
    why = f" (last line of {log.name}: {last})" if last else ""
    try:
        saved = torch.load(run_dir / "policy.pt", map_location="cpu", weights_only=True)
        run = {"algorithm": saved["algorithm"], "updates_per_step": 1, **saved["args"]}  # 1: in older runs
    except Exception as error:  # torch.load raises many types for missing, damaged and foreign files
        raise ValueError(f"policy.pt cannot be read ({type(error).__name__}){why}") from error
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()  # 0: no sampling
    curves = {tag: c for tag in events.Tags()["scalars"] if tag in TAGS and (c := events.Scalars(tag))}
    if RETURN not in curves:
        raise ValueError(f"it ended before its first evaluation{why}")
    if saved.get("finished") is False:
        steps = f"{curves[RETURN][-1].step} of {run['total_timesteps']} steps"
        print(f"note: {run_dir} is unfinished, last evaluation at {steps}{why}", file=sys.stderr)
    for tag, curve in curves.items():
        stride = 1 if tag == RETURN else -(-len(curve) // 300)  # points of a curve, except returns
        curves[tag] = [(event.step, float(f"{event.value:.6g}")) for event in curve[::stride]]
    return run, curves


def line_name(run: dict, alike: list[dict]) -> str:
    """Name of the line of a run; `alike`: all runs with its task and algorithm."""
    line = NAMES.get(run["algorithm"], run["algorithm"])
    for name in [*NAMED, *(name for name in run if name not in NAMED)]:
        value = run.get(name, NAMED.get(name))
        if name in NAMED:  # also if all runs have it: they may be compared with saved curves
            shown = value != NAMED[name]
        else:
            shown = name not in SHARED and len({str(other.get(name)) for other in alike}) > 1
        if not shown:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            line += f" --{option}" if value else f" --no-{option}"
        else:
            line += f" --{option} {value:.4g}" if isinstance(value, float) else f" --{option} {value}"
    return line


def width(line: str) -> int:
    """Hidden units of the runs of a line."""
    named = re.search(r"--hidden-width (\d+)", line)
    return int(named[1]) if named else NAMED["hidden_width"]


def read_runs(paths: list[Path]) -> dict:
    """{(task, line, seed, source): {tag: [(step, value), ...]}} of the run directories below the paths."""
    runs = []
    for run_dir in sorted({file.parent for path in paths for file in path.rglob("events.out.tfevents*")}):
        try:
            runs.append((run_dir, *read_run(run_dir)))
        except ValueError as error:
            print(f"note: {run_dir} is left out: {error}", file=sys.stderr)
    named = {}
    for run_dir, run, points in runs:
        alike = [r for _, r, _ in runs if (r["env_id"], r["algorithm"]) == (run["env_id"], run["algorithm"])]
        named[run["env_id"], line_name(run, alike), run["seed"], run_dir] = points
    return named


def read_saved(path: Path) -> dict:
    """The same from a curves.csv.gz."""
    runs = defaultdict(lambda: defaultdict(list))
    try:
        with gzip.open(path, "rt", newline="") as file:
            for task, line, seed, tag, step, value in [*csv.reader(file)][1:]:
                runs[task, line, int(seed), path][tag].append((int(step), float(value)))
    except (OSError, EOFError, ValueError) as error:
        sys.exit(f"{path} has no saved curves: {error}")
    return runs


def read(paths: list[Path]) -> dict:
    """{(task, line, tag): {seed: [(step, value), ...]}} of saved curves (files) and runs (directories)."""
    runs = {}
    for path in paths:
        if path.is_file():
            runs.update(read_saved(path))
    runs.update(read_runs([path for path in paths if not path.is_file()]))
    if not runs:
        sys.exit(f"no run in {', '.join(map(str, paths))} can be drawn")
    curves, sources = defaultdict(dict), {}
    for (task, line, seed, source), points in runs.items():
        first = sources.setdefault((task, line, seed), source)
        if first != source:
            print(f"note: {source} is left out: {first} has seed {seed} of {task}, {line}", file=sys.stderr)
            continue
        for tag, curve in points.items():
            curves[task, line, tag][seed] = curve
    return curves


def over_seeds(seeds: dict) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) that all seeds have reached, and values (seeds, n), interpolated where steps differ."""
    runs = [np.array(curve, float).T for curve in seeds.values()]
    first, last = max(run[0][0] for run in runs), min(run[0][-1] for run in runs)
    steps = min((run[0][(run[0] >= first) & (run[0] <= last)] for run in runs), key=len)
    return steps, np.array([np.interp(steps, *run) for run in runs])


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile bootstrap interval of the mean: (seeds, n) -> low (n,), high (n,)."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    return tuple(np.percentile([values[draw].mean(0) for draw in draws], [2.5, 97.5], axis=0))


def figure(curves: dict, lines: list[str], rows: list[tuple[str, str, str]], path: Path):
    """One panel per task and row (tag, label of the y axis, scale); the title says what is averaged."""
    if not (tasks := list(dict.fromkeys(task for task, _, tag in curves if tag in [row[0] for row in rows]))):
        return
    columns = min(len(tasks), 4) if len(rows) == 1 else len(tasks)
    height = len(rows) * -(-len(tasks) // columns)
    fig, axes = plt.subplots(height, columns, figsize=(max(4 * columns, 6), 2.6 * height + 1), squeeze=False,
                             layout="constrained")  # fmt: skip
    panels = zip(axes.flat if len(rows) == 1 else axes.T.flat, itertools.product(tasks, rows), strict=False)
    ends = {key: over_seeds(seeds)[0][-1] for key, seeds in curves.items()}
    counts = {len(seeds) for (_, _, tag), seeds in curves.items() if tag in [row[0] for row in rows]}
    for panel, (task, (tag, label, scale)) in panels:
        for line, (color, dashes, marker) in zip(lines, STYLES * len(lines), strict=False):
            if not (seeds := curves.get((task, line, tag))):
                continue
            steps, values = over_seeds(seeds)
            panel.plot(steps, values.mean(0), label=line, color=color, linestyle=dashes, linewidth=1.4,
                       marker=marker, markersize=4, markevery=max(1, len(steps) // 8))  # fmt: skip
            panel.fill_between(steps, *interval(values), color=color, alpha=0.15, linewidth=0)
            bound = curves.get((task, line, BUDGET))
            if bound and tag == (TRAJECTORY if "DSAC-E" in line and "--no-tec" not in line else POLICY):
                level, (low, high) = next(iter(bound.values()))[-1][1], panel.dataLim.intervaly
                if level > low - (high - low):  # otherwise the curves would be flat
                    panel.axhline(level, color="gray", linewidth=1, linestyle=":", label="entropy budget")
        panel.set(title=task, ylabel=label, xlabel="environment steps", yscale=scale)
        end = max(1, *(last for key, last in ends.items() if key[0] == task))
        panel.set_xlim(-0.03 * end, 1.03 * end)
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        if scale == "log":
            low, high = np.log10(panel.get_ylim())
            locator = matplotlib.ticker.LogLocator(subs=(1, 2, 5) if high - low < 3 else (1,))
            panel.yaxis.set(major_locator=locator, major_formatter="{x:g}", minor_formatter="")
        panel.grid(alpha=0.3)
    _ = [panel.remove() for panel in axes.flat if not panel.has_data()]
    key = {label: h for p in fig.axes for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    fig.legend(key.values(), key, loc="outside lower center", ncols=columns + (max(map(len, key)) < 36))
    caption = f"mean and 95% bootstrap interval; seeds per line: {' or '.join(map(str, sorted(counts)))}"
    caption += f"\nup to {max(ends.values()) / 1e6:.3g}M environment steps (paper: 30M), "
    caption += " or ".join(map(str, sorted({width(line) for _, line, _ in curves}))) + " hidden units"
    fig.suptitle(caption, fontsize=9)
    fig.savefig(path, dpi=130)


def main(paths: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),), out: Path = Path("plots")):
    curves = read(paths)
    order = {name: i for i, name in enumerate(NAMES.values())}  # then scripts of the user
    lines = sorted({line for _, line, _ in curves}, key=lambda line: (order.get(line.split()[0], 9), line))
    out.mkdir(parents=True, exist_ok=True)
    figure(curves, lines, [(RETURN, "evaluation return", "linear")], out / "returns.png")
    rows = [("losses/alpha", "alpha", "log"), (POLICY, "policy entropy (nats)", "linear")]
    rows.append((TRAJECTORY, "trajectory entropy (nats)", "linear"))
    figure(curves, lines, rows, out / "temperature.png")
    rows = [("critic/target_mean", "target mean", "linear"), ("critic/target_std", "target std", "log")]
    figure(curves, lines, rows, out / "targets.png")
    rows = [(task, line, seed, tag, *point) for (task, line, tag), seeds in curves.items()
            for seed, curve in seeds.items() for point in curve]  # fmt: skip
    with gzip.open(out / "curves.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([("task", "line", "seed", "tag", "step", "value"), *rows])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
