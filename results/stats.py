"""Numbers behind the paper's claims, from saved curves or run directories, as one Markdown table per task.

    python results/stats.py results/halfcheetah_3M.csv.gz

A return is the mean of the evaluations in the last tenth of a run, IQM the interquartile mean over seeds, and
P the probability that a run of DSAC-E has a higher return than a run of the line (Agarwal et al., 2021).
Runs that are shorter than 90% of the task's longest run do not count in IQM and P.
Ranges and deviations are of the steps after the first million, or the last two thirds of shorter runs.
"""

from pathlib import Path

import numpy as np
import tyro
from plot import BUDGET, POLICY, RETURN, TRAJECTORY, read

WINDOW = 200_000  # environment steps, 10,000 updates


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half; values at its edges count in part."""
    shares = np.linspace(0, 1, len(values) + 1).clip(0.25, 0.75)
    return np.sort(values) @ np.diff(shares) / 0.5


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> float:
    """Probability that a value of the first is larger than one of the second; equal values count half."""
    return ((first[:, None] > second) + (first[:, None] == second) / 2).mean()


def final_return(steps: np.ndarray, values: np.ndarray) -> float:
    return values[steps >= 0.9 * steps[-1]].mean()


def late(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values[steps >= min(1e6, steps[-1] / 3)]


def drift(steps: np.ndarray, values: np.ndarray) -> float:
    """Mean absolute change over 10,000 updates."""
    change = np.abs(np.interp(steps + WINDOW, steps, values) - values)
    return late(steps, change)[late(steps, steps) + WINDOW <= steps[-1]].mean()


def extent(steps: np.ndarray, values: np.ndarray) -> str:
    return f"{late(steps, values).min():.3g} to {late(steps, values).max():.3g}"


def column(curves: dict, task: str, line: str) -> dict[str, str]:
    """The numbers of one line, those of different seeds separated by semicolons."""

    def each(tag: str, function) -> str:
        runs = sorted(curves.get((task, line, tag), {}).items())
        results = [function(*np.array(curve, float).T) for _, curve in runs]
        return "; ".join(x if isinstance(x, str) else f"{x:.4g}" for x in results)

    returns = {key[1]: runs for key, runs in curves.items() if key[0] == task and key[2] == RETURN}
    longest = max(curve[-1][0] for runs in returns.values() for curve in runs.values())

    def finals(line: str) -> np.ndarray:
        complete = [curve for curve in returns.get(line, {}).values() if curve[-1][0] >= 0.9 * longest]
        return np.array([final_return(*np.array(curve, float).T) for curve in complete])

    def over_runs(function, *samples: np.ndarray) -> str:
        return f"{function(*samples):.4g}" if all(map(len, samples)) else "-"

    tec = line.startswith("DSAC-E") and "--no-tec" not in line
    budget = next(iter(curves.get((task, line, BUDGET), {0: [(0, np.nan)]}).values()))[-1][1]
    return {
        "seeds": "; ".join(map(str, sorted(curves[task, line, RETURN]))),
        "million steps": each(RETURN, lambda steps, _: steps[-1] / 1e6),
        "return": each(RETURN, final_return),
        "IQM": over_runs(interquartile_mean, finals(line)),
        "P": over_runs(probability_of_improvement, finals("DSAC-E"), finals(line)),
        "alpha": each("losses/alpha", extent),
        "standard deviation of log(alpha)": each("losses/alpha", lambda *curve: np.log(late(*curve)).std()),
        "policy entropy": each(POLICY, extent),
        "constrained entropy / budget": each(
            TRAJECTORY if tec else POLICY, lambda steps, values: extent(steps, values / budget)
        ),
        "target: mean drift per 10,000 updates": each("critic/target_mean", drift),
        "target: standard deviation in a batch": each(
            "critic/target_std", lambda *curve: late(*curve).mean()
        ),
    }


def main(paths: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)):
    curves = read(paths)
    for task in dict.fromkeys(task for task, _, _ in curves):
        columns = {line: column(curves, task, line) for t, line, tag in curves if t == task and tag == RETURN}
        print(f"\n| {task} | {' | '.join(columns)} |\n{'|---' * (1 + len(columns))}|")
        for name in next(iter(columns.values())):
            print(f"| {name} | {' | '.join(column[name] for column in columns.values())} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
