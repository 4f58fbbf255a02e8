"""The table of a suite: what every method reached, how fast, and at what cost."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bench.collect import EVALUATION, KEY, SUCCESS, TRAINING_SUCCESS, read
from bench.methods import METHODS, ROOT, title_of
from bench.statistics import (
    BLIND,
    INDEPENDENT,
    Interval,
    Runs,
    against,
    can_tell,
    control_in,
    mean_interval,
    median_interval,
    search_noise,
)

THRESHOLD = 0.8  # share of a suite's ceiling that methods are timed to


@dataclass
class Scores:
    """What a method reached on a suite, by return or by success in percent.

    Rows are runs, by seed; or if several searches chose its settings by the search's number and the seed.
    """

    final: pd.DataFrame  # (run, task), of the final evaluation
    curve: pd.DataFrame  # (run, step) mean over tasks of the evaluations on the way and of the final one

    @property
    def means(self) -> pd.Series:
        """Mean over tasks of the final evaluation, by seed."""
        return self.final.mean(axis=1)

    @property
    def worst(self) -> pd.Series:
        """The same of the worst task."""
        return self.final.min(axis=1)

    @property
    def timed(self) -> bool:
        """Whether the runs were evaluated on the way."""
        return self.curve.shape[1] > 1

    @property
    def area(self) -> pd.Series:
        """Mean score over the steps between the first evaluation and the last, by seed."""
        steps = self.curve.columns.to_numpy(float)
        areas = np.trapezoid(self.curve, steps, axis=1)
        return pd.Series(areas / (steps[-1] - steps[0]), self.curve.index)

    def steps_to(self, target: float) -> np.ndarray:
        """(run,) steps of the first evaluation that reaches the target, infinite if none does."""
        reached = self.curve.to_numpy() >= target
        first = self.curve.columns.to_numpy(float)[reached.argmax(1)]
        return np.where(reached.any(1), first, math.inf)


class Result:
    """What is committed of a suite in results/suites/NAME, and whether it is able to tell methods apart."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.runs, self.configs = read(folder)
        first = self.configs.iloc[0]
        self.env, self.steps = first.env, int(first.steps)
        self.searched_on = first.searched_on  # the suite whose search chose the settings
        self.by_success = (self.runs.metric == TRAINING_SUCCESS).any()  # by that suites differ
        self.by_method = scores(self.runs, SUCCESS if self.by_success else EVALUATION)
        self.ceiling = 100.0 if self.by_success else ceiling(self.env)
        self.target = None if self.ceiling is None else THRESHOLD * self.ceiling
        self.able, self.why = can_tell(self.values("means"), self.ceiling)
        self.tasks_matter, _ = can_tell(self.values("means"), self.ceiling, (BLIND,))

    @property
    def title(self) -> str:
        """Environment and length."""
        return f"{self.env}, {self.steps:,} steps"

    def values(self, what: str) -> Runs:
        """Of every method what its `Scores` calls so, such as "means": a number of each run."""
        return {method: getattr(s, what) for method, s in self.by_method.items()}

    def intervals(self, what: str) -> dict[str, Interval]:
        """Means over runs of the same."""
        values = self.values(what)
        noise = search_noise(values)
        return {method: mean_interval(x, noise) for method, x in values.items()}

    def logged(self, method: str, metric: str) -> pd.DataFrame:
        """(run, step) means over tasks of a metric that was logged on the way."""
        rows = self.runs[(self.runs.method == method) & (self.runs.metric == metric)]
        return rows[rows.task == "mean"].pivot(index="seed", columns="step", values="value")


def ceiling(env: str) -> float | None:
    """Mean over tasks of what each task of an environment allows, if it is known."""
    known = pd.read_csv(ROOT / "bench/ceilings.csv", index_col="env").ceiling
    return float(known[env]) if env in known else None


def scores(runs: pd.DataFrame, metric: str) -> dict[str, Scores]:
    """method -> Scores, in the order of methods.csv and then of the alphabet."""
    order, result = list(METHODS), {}
    for method in sorted(runs.method.unique(), key=lambda m: (order.index(m) if m in order else 99, m)):
        rows = runs[(runs.method == method) & (runs.metric == metric)]
        rows = rows.assign(value=rows.value * (100 if metric == SUCCESS else 1))
        tasks, means = rows[rows.task != "mean"], rows[rows.task == "mean"]
        tasks = tasks[tasks.step == tasks.groupby(KEY).step.transform("max")]
        run = "seed" if rows.setting.nunique() == 1 else ["setting", "seed"]
        final = tasks.pivot_table(index=run, columns="task", values="value", sort=False)
        curve = means.pivot(index=run, columns="step", values="value")
        result[method] = Scores(final.sort_index(), at_common_steps(curve))
    return result


def at_common_steps(curve: pd.DataFrame) -> pd.DataFrame:
    """Evaluations (run, step) of runs whose rollouts differ in length, interpolated to the same steps.

    From the latest first evaluation on: before it a run has no value.
    """
    if not curve.isna().any(axis=None):
        return curve
    number = curve.notna().sum(axis=1).max()
    begin = curve.apply(pd.Series.first_valid_index, axis=1).max()
    steps = [round(curve.columns.max() * (i + 1) / number) for i in range(number)]
    steps = [step for step in steps if step >= begin]
    rows = [np.interp(steps, x.dropna().index, x.dropna()) for _, x in curve.iterrows()]
    return pd.DataFrame(rows, curve.index, steps)


def training_success(runs: pd.DataFrame, method: str) -> pd.Series:
    """Success in percent, with exploration, in the last tenth of a method's training; by seed."""
    rows = runs[(runs.method == method) & (runs.metric == TRAINING_SUCCESS) & (runs.task == "mean")]
    rows = rows[rows.step > 0.9 * rows.step.max()]
    return 100 * rows.groupby("seed").value.mean()


def best_first(by_method: dict[str, Scores]) -> list[str]:
    """Task-blind, then the others by their mean."""
    blind = control_in(by_method, BLIND)
    return sorted(by_method, key=lambda m: (m != blind, -by_method[m].means.mean()))


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def provenance(configs: pd.DataFrame) -> str:
    """How many runs there are, of which hardware and commits, and what is missing."""
    done, missing = configs[configs.commit != ""], configs[configs.commit == ""]
    hardware, commits = ", ".join(done.hardware.unique()), ", ".join(f"`{x}`" for x in done.commit.unique())
    number = len(done[KEY].drop_duplicates())
    text = f"{number} run{'s' * (number != 1)}, one core each ({hardware}; commit {commits})."
    if len(missing):
        text += f" Missing: {len(missing)} run{'s' * (len(missing) != 1)}, for example "
        text += f"{missing.method.iloc[0]}, seed {missing.seed.iloc[0]}."
    return text


def make_table(x: Result) -> str:
    """The table of a suite: task-blind, then the others, best mean first."""
    returns = scores(x.runs, EVALUATION)
    blind, independent = (control_in(x.by_method, control) for control in (BLIND, INDEPENDENT))
    controls = [control for control in (blind, independent) if control in x.by_method]
    if blind not in controls:
        controls = [best_first(x.by_method)[0]]
    compared = {control: against(x.values("means"), control) for control in controls}
    mean = x.intervals("means")
    timed = all(s.timed for s in x.by_method.values())
    area = x.intervals("area") if timed else {}
    cost = x.runs[x.runs.task == "mean"].groupby(["method", "seed", "metric"]).value.last().unstack()
    cost = cost.groupby("method").median()
    rows = []
    for method in best_first(x.by_method):
        s, c = x.by_method[method], cost.loc[method]
        row = {"method": title_of(method), "runs": str(len(s.final))}
        row["success, %" if x.by_success else "mean"] = mean[method].text()
        if s.means.index.nlevels > 1:
            row["by search"] = ", ".join(f"{value:.0f}" for value in s.means.groupby(level=0).mean())
        row["worst task"] = mean_interval(s.worst).text()
        if x.by_success:
            row["success in training, %"] = mean_interval(training_success(x.runs, method)).text()
            row["return"] = mean_interval(returns[method].means).text()
        elif SUCCESS in c:
            row["success"] = f"{c[SUCCESS]:.0%}"
        for control, found in compared.items():
            names = f"minus {control}", f"p of {control} (Holm)", f"against {control}"
            row |= zip(names, found[method].cells() if method in found else [""] * 3)
        if timed:
            row["area under evaluations"] = area[method].text()
        if timed and x.target is not None:
            steps = s.steps_to(x.target)
            row[f"steps to {x.target:.0f} (median)"] = median_interval(steps).text(0)
            row["runs that get there"] = f"{np.isfinite(steps).sum()} of {len(steps)}"
        row |= {"own parameters per task": f"{c['parameters/own']:,.0f}"}
        row |= {"parameters": f"{c['parameters/all']:,.0f}", "seconds": f"{c['charts/wall_time']:.1f}"}
        rows.append(row | {"env steps/s": f"{c['charts/SPS']:,.0f}"})
    return markdown(list(rows[0]), [list(row.values()) for row in rows])
