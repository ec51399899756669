"""Writes numbers.csv, one row per run, and prints the table of final returns, from saved curves or runs.

    python results/stats.py results/*.csv.gz --out results

Lengths are environment steps, entropies nats. "Late" is the last two thirds of a run.
    return                  mean of the evaluations in the last tenth of the run
    above_1000              step of the first evaluation with a return above 1000 (on Ant: of standing still)
    alpha, policy_entropy   late minimum and maximum
    log_alpha_std           late standard deviation of log(alpha)
    constrained_entropy     late minimum and maximum of what alpha is tuned on: the entropy of the trajectory
                            (DSAC-E with TEC) or of a step (all others); budget is its lower bound
    following_steps         mean of the discounted steps that follow, in the last tenth (--center-entropy)
    target_drift_start      mean absolute change of the mean target in 10,000 updates, first 500,000 steps
    target_drift            the same, late
    target_std              late mean of the standard deviation of the targets in a batch
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import tyro
from plot import BUDGET, POLICY, RETURN, STEPS, TRAJECTORY, read, width

WINDOW = 200_000  # environment steps, 10,000 updates
COLUMNS = ["task", "width", "line", "steps", "seed", "return", "above_1000", "alpha_min", "alpha_max"]
COLUMNS += ["log_alpha_std", "policy_entropy_min", "policy_entropy_max", "constrained_entropy_min"]
COLUMNS += ["constrained_entropy_max", "budget", "following_steps", "target_drift_start", "target_drift"]
COLUMNS += ["target_std"]


def last(share: float, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values in the last share of a run."""
    return values[steps >= (1 - share) * steps[-1]]


def drift(steps: np.ndarray, values: np.ndarray, start: float, end: float) -> float | None:
    """Mean absolute change over WINDOW steps, of the windows between start and end."""
    change = np.abs(np.interp(steps + WINDOW, steps, values) - values)
    inside = (steps >= start) & (steps + WINDOW <= end)
    return change[inside].mean() if inside.any() else None


def numbers(line: str, curves: dict[str, np.ndarray]) -> dict[str, float]:
    """The columns of one run, from its curves {tag: (2, n) steps and values}."""
    steps, returns = curves[RETURN]
    row = {"steps": int(steps[-1]), "return": last(0.1, steps, returns).mean()}
    if returns.max() > 1000:
        row["above_1000"] = int(steps[returns > 1000][0])
    if "losses/alpha" in curves:  # not TD3
        tec = line.startswith("DSAC-E") and "--no-tec" not in line
        tags = {"alpha": "losses/alpha", "policy_entropy": POLICY}
        tags["constrained_entropy"] = TRAJECTORY if tec else POLICY
        for name, tag in tags.items():
            late = last(2 / 3, *curves[tag])
            row[f"{name}_min"] = late.min()
            row[f"{name}_max"] = late.max()
        row["log_alpha_std"] = np.log(last(2 / 3, *curves["losses/alpha"])).std()
        row["budget"] = curves[BUDGET][1][-1]
    if STEPS in curves:
        row["following_steps"] = last(0.1, *curves[STEPS]).mean()
    target = curves["critic/target_mean"]
    row["target_drift_start"] = drift(*target, 0, 500_000)
    row["target_drift"] = drift(*target, target[0][-1] / 3, target[0][-1])
    row["target_std"] = last(2 / 3, *curves["critic/target_std"]).mean()
    return row


def rows(curves: dict) -> list[dict]:
    """One dictionary per run. `curves` as plot.read returns them."""
    runs = defaultdict(dict)
    for (task, line, tag), seeds in curves.items():
        for seed, curve in seeds.items():
            runs[task, line, seed][tag] = np.array(curve, float).T
    result = []
    for (task, line, seed), points in sorted(runs.items()):
        row = {"task": task, "width": width(line), "line": line, "seed": seed}
        row.update(numbers(line, points))
        result.append(row)
    return result


def table(rows: list[dict]) -> str:
    """Markdown: final returns, one row per task, width and line; there is no mean over different lengths."""
    text = "| task | hidden units | variant | million steps | seeds | returns by seed | mean |\n"
    text += "|---" * 7 + "|\n"
    for key in dict.fromkeys((row["task"], row["width"], row["line"]) for row in rows):
        runs = [row for row in rows if (row["task"], row["width"], row["line"]) == key]
        lengths = [row["steps"] / 1e6 for row in runs]
        mean = f"{np.mean([row['return'] for row in runs]):.0f}"
        if min(lengths) > 0.9 * max(lengths):
            lengths = [min(lengths)]
        else:
            mean = ""
        cells = ["; ".join(f"{length:.3g}" for length in lengths)]
        cells.append("; ".join(str(row["seed"]) for row in runs))
        cells.append("; ".join(f"{row['return']:.0f}" for row in runs))
        text += f"| {' | '.join(map(str, [*key, *cells, mean]))} |\n"
    return text


def main(paths: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),), out: Path = Path("plots")):
    runs = rows(read(paths))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "numbers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in runs:
            writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})
    print(table(runs), end="")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
