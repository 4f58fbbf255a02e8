"""Tables of a suite from its runs.csv: what every method reached, how fast, and at what cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bench.collect import EVALUATION, SUCCESS, TRAINING_SUCCESS
from bench.methods import METHODS, parse_flags
from bench.statistics import (
    BLIND,
    difference,
    holm,
    margin,
    mean_interval,
    median_interval,
    verdict,
)

THRESHOLD = 0.8  # share of a suite's ceiling that methods are timed to


@dataclass
class Scores:
    """What a method reached on a suite, by return or by success in percent; rows are runs, by seed.

    Attributes:
        final: (run, task) score of the final evaluation.
        curve: (run, step) mean score over tasks of the evaluations on the way and of the final one.
    """

    final: pd.DataFrame
    curve: pd.DataFrame

    @property
    def means(self) -> pd.Series:
        """Mean over tasks of the final evaluation, by seed."""
        return self.final.mean(axis=1)

    @property
    def worst(self) -> pd.Series:
        """The same of the worst task."""
        return self.final.min(axis=1)

    @property
    def area(self) -> pd.Series:
        """Mean score over the steps between the first evaluation and the last, by seed."""
        steps = self.curve.columns.to_numpy(float)
        return pd.Series(np.trapezoid(self.curve, steps, axis=1) / (steps[-1] - steps[0]), self.curve.index)

    def steps_to(self, target: float) -> np.ndarray:
        """(run,) steps of the first evaluation that reaches the target, infinite where none does."""
        reached = self.curve.to_numpy() >= target
        return np.where(reached.any(1), self.curve.columns.to_numpy(float)[reached.argmax(1)], math.inf)


def title_of(method: str) -> str:
    """As in tables and figures; a method of a fork is called what it is."""
    return METHODS[method].title if method in METHODS else method


def measure(runs: pd.DataFrame) -> str:
    """What a suite is scored by: success where its training's is in runs.csv, else return."""
    return SUCCESS if (runs.metric == TRAINING_SUCCESS).any() else EVALUATION


def scores(runs: pd.DataFrame, metric: str = "") -> dict[str, Scores]:
    """method -> Scores, in the order of methods.csv and then of the alphabet; by default of `measure`."""
    order, metric = list(METHODS), metric or measure(runs)
    result = {}
    for method in sorted(runs.method.unique(), key=lambda m: (order.index(m) if m in order else 99, m)):
        rows = runs[(runs.method == method) & (runs.metric == metric)]
        rows = rows.assign(value=rows.value * (100 if metric == SUCCESS else 1))
        final = rows[rows.task != "mean"].pivot_table(
            index="seed", columns="task", values="value", sort=False
        )
        curve = rows[rows.task == "mean"].pivot(index="seed", columns="step", values="value")
        result[method] = Scores(final.sort_index(), curve)
    return result


def training_success(runs: pd.DataFrame, method: str) -> pd.Series:
    """Success in percent, with exploration, in the last tenth of a method's training; by seed."""
    rows = runs[(runs.method == method) & (runs.metric == TRAINING_SUCCESS)]
    rows = rows[rows.step > 0.9 * rows.step.max()]
    return 100 * rows.groupby("seed").value.mean()


def best_first(by_method: dict[str, Scores]) -> list[str]:
    """Task-blind, then the others by their mean."""
    return sorted(by_method, key=lambda m: (m != BLIND, -by_method[m].means.mean()))


def improvement(x: pd.DataFrame, y: pd.DataFrame) -> float:
    """P(a run of x scores above one of y on a task), ties half, mean over tasks; (run, task) each."""
    x, y = x.to_numpy()[:, None], y.to_numpy()[None]
    return float(np.mean((x > y) + 0.5 * (x == y)))


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def make_table(runs: pd.DataFrame, target: float | None) -> str:
    """The table of a suite: task-blind, then the others, best mean first.

    Args:
        runs: of runs.csv.
        target: score that methods are timed to, None for no such columns.
    """
    by_method, returns, by_success = scores(runs), scores(runs, EVALUATION), measure(runs) == SUCCESS
    mean = "success, %" if by_success else "mean"
    differences, corrected = {}, {}
    if BLIND in by_method:
        others = [method for method in by_method if method != BLIND]
        differences = {m: difference(by_method[m].means, by_method[BLIND].means) for m in others}
        corrected = dict(zip(others, holm([d.p for d in differences.values()])))
    within = margin(s.means.mean() for s in by_method.values())
    timed = all(s.curve.shape[1] > 1 for s in by_method.values())  # evaluated on the way
    cost = runs[runs.task == "mean"].groupby(["method", "seed", "metric"]).value.last().unstack()
    cost = cost.groupby("method").median()
    rows = []
    for method in best_first(by_method):
        s, c = by_method[method], cost.loc[method]
        row = {"method": title_of(method), "runs": str(len(s.final)), mean: mean_interval(s.means).text()}
        row["worst task"] = mean_interval(s.worst).text()
        if by_success:
            row["success in training, %"] = mean_interval(training_success(runs, method)).text()
            row["return"] = mean_interval(returns[method].means).text()
        elif SUCCESS in c:
            row["success"] = f"{c[SUCCESS]:.0%}"
        if differences:
            row |= dict.fromkeys(("minus task-blind", "p (Holm)", "against task-blind"), "")
        if method in differences:
            d, p = differences[method], corrected[method]
            row |= {"minus task-blind": d.interval.text(), "p (Holm)": f"{p:.2g}"}
            row["against task-blind"] = verdict(d, p, within)
        if timed:
            row["area under evaluations"] = mean_interval(s.area).text()
        if timed and target is not None:
            steps = s.steps_to(target)
            row[f"steps to {target:.0f} (median)"] = median_interval(steps).text(0)
            row["runs that get there"] = f"{np.isfinite(steps).sum()} of {len(steps)}"
        row |= {"parameters of a task's own": f"{c['parameters/own']:,.0f}"}
        row |= {"parameters": f"{c['parameters/all']:,.0f}", "seconds": f"{c['charts/wall_time']:.1f}"}
        rows.append(row | {"env steps/s": f"{c['charts/SPS']:,.0f}"})
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def settings_table(settings: pd.DataFrame) -> str:
    """What the search chose for each method, and what it spent."""
    columns = ["method", "settings", "mean on fresh seeds", "trials", "dropped", "crashed", "steps spent"]
    rows = []
    for x in settings.itertuples():
        counts = [str(x.complete + x.dropped + x.crashed), str(x.dropped), str(x.crashed)]
        rows.append(
            [title_of(x.method), f"`{x.settings}`", f"{x.final:.1f}", *counts, f"{x.spent / 1e6:.1f} M"]
        )
    return markdown(columns, rows)


def rates_table(trials: pd.DataFrame) -> str:
    """What each step size reached, one run each, where nothing else was tried; the chosen is bold.

    By return or by success in percent, as the suite is scored.
    """
    flags = trials.settings.map(parse_flags)
    by_rate = trials.assign(rate=[x["learning-rate"] for x in flags]).pivot(
        index="method", columns="rate", values="final"
    )
    rows = []
    for method in sorted(by_rate.index, key=list(METHODS).index):
        finals = by_rate.loc[method]
        cells = ["crashed" if math.isnan(x) else f"{x:.1f}" for x in finals]
        cells = [f"**{cell}**" if x == finals.max() else cell for x, cell in zip(finals, cells)]
        rows.append([title_of(method), *cells, f"{trials[trials.method == method].steps.sum() / 1e6:.1f} M"])
    head = f"What one run of {trials.steps.max():,} steps ended with, for each step size (success in % on "
    head += "Meta-World). The best is the method's setting. This is no comparison of methods.\n\n"
    return head + markdown(["method", *by_rate, "steps spent"], rows)
