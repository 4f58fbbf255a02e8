"""What is made of results/loo/SUITE/: table.md, loo.png, and the verdict on C7."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bench.loo import FOLDER, OURS, REGIMES, SCRATCH
from bench.statistics import Interval, difference, holm, margin, mean_interval, median_interval, verdict
from bench.style import CYCLE, STYLE
from bench.tables import markdown

SHARE = 0.9  # of what Scratch ends with: a task is learned when an evaluation has it
FIELDS = {"gravity": "gravity", "masscart": "cart", "masspole": "pole", "length": "length", "goal": "goal"}
SPEED = {"better": "slower", "worse": "faster"}  # more steps


class Adaptations:
    """The runs of a suite, from its CSVs, of all seeds that are complete.

    Attributes:
        runs: a row for each.
        curves: regime and task -> (seed, step) return of the evaluations; step 0 is before the run.
        tasks: numbers of the held-out tasks.
        target: return at which a task is learned, of each.
    """

    def __init__(self, folder: Path):
        self.name = folder.name
        runs = pd.read_csv(folder / "runs.csv")
        number = runs.groupby("seed").regime.transform("size")
        self.runs = runs[number == number.max()]
        start = self.runs.rename(columns={"before": "value"}).assign(step=0)
        later = pd.read_csv(folder / "evaluations.csv")
        rows = pd.concat([start[[*later]], later[later.seed.isin(self.runs.seed)]])
        groups = rows.groupby(["regime", "task"])
        self.curves = {key: x.pivot(index="seed", columns="step", values="value") for key, x in groups}
        self.regimes = [r for r in REGIMES if r in set(self.runs.regime)]
        self.tasks = sorted(self.runs.task.unique())
        self.target = {task: SHARE * self.curves[SCRATCH, task].iloc[:, -1].mean() for task in self.tasks}

    def steps(self, regime: str, task: int) -> pd.Series:
        """By seed, steps of the first evaluation at which the task is learned; infinite where none is."""
        curve = self.curves[regime, task]
        learned = curve.to_numpy() >= self.target[task]
        first = np.where(learned.any(1), curve.columns.to_numpy(float)[learned.argmax(1)], math.inf)
        return pd.Series(first, curve.index)

    def mean_steps(self, regime: str) -> pd.Series:
        """The same, mean over tasks; a run that never gets there counts as long as it is."""
        last = next(iter(self.curves.values())).columns[-1]
        return pd.concat([self.steps(regime, task).clip(upper=last) for task in self.tasks], axis=1).mean(
            axis=1
        )

    def mean_of(self, regime: str, what: str) -> pd.Series:
        """By seed, mean over tasks of a column of runs.csv, of "final", or of "area" under evaluations."""
        if what in self.runs:
            return self.runs[self.runs.regime == regime].groupby("seed")[what].mean()
        curves = [self.curves[regime, task] for task in self.tasks]
        if what == "final":
            return pd.concat([x.iloc[:, -1] for x in curves], axis=1).mean(axis=1)
        steps = curves[0].columns.to_numpy(float)
        areas = [np.trapezoid(x, steps, axis=1) / (steps[-1] - steps[0]) for x in curves]
        return pd.Series(np.mean(areas, axis=0), curves[0].index)

    def comparisons(self) -> dict[str, tuple[Interval, float, str]]:
        """Residual adaptation against every other regime: steps more, p by Holm, and faster or slower."""
        others = [r for r in self.regimes if r != OURS]
        ours = self.mean_steps(OURS)
        found = {r: difference(ours, self.mean_steps(r)) for r in others}
        result = {}
        for (r, d), p in zip(found.items(), holm([d.p for d in found.values()])):
            says = verdict(d, p, margin([ours.mean(), self.mean_steps(r).mean()]))
            result[r] = d.interval, p, SPEED.get(says, says)
        return result


def novelty(task: int, params: list[dict[str, float]]) -> str:
    """What of a task's parameters lies beyond the range of the other tasks'; "between" if nothing does."""
    others = [x for i, x in enumerate(params) if i != task]
    beyond = []
    for name, value in params[task].items():
        values = [x[name] for x in others]
        if not min(values) <= value <= max(values):
            beyond.append(FIELDS[name])
    return f"{' and '.join(beyond)} beyond the others'" if beyond else "between the others"


def describe(suite: str) -> dict[int, tuple[str, str]]:
    """Of every task its name, and what is new in it."""
    from envs import make  # slow, and not needed for anything else here

    envs = make(suite, 1)
    return {i: (name, novelty(i, list(envs.task_params))) for i, name in enumerate(envs.task_names)}


def claim_7(x: Adaptations) -> tuple[str, str]:
    """On a held-out task training only (mu, sigma) is faster than training from scratch."""
    found = x.comparisons()
    says = found[SCRATCH][2]
    answer = {"faster": "supported", "undecided": "not decided"}.get(says, f"not supported: {says}")
    for other in ("fine-tuning", "task-blind"):
        if other in found:
            answer += f"; against {REGIMES[other].title.lower()}: {found[other][2]}"
    text = (
        f"Test: steps to {SHARE:.0%} of what Scratch ends with, mean over held-out tasks, p below 5 % among "
    )
    text += "the comparisons below. A run that never gets there counts as long as it is.\n\n"
    columns = ["Residual adaptation and", "difference of steps", "p (Holm)", "it is"]
    rows = [[REGIMES[r].title, d.text(0), f"{p:.2g}", s] for r, (d, p, s) in found.items()]
    return answer, text + markdown(columns, rows)


def make_table(x: Adaptations) -> str:
    """All regimes, the comparisons, and every held-out task."""
    last = next(iter(x.curves.values())).columns[-1]
    rows = []
    for r in x.regimes:
        steps = np.concatenate([x.steps(r, task) for task in x.tasks])
        values = (x.mean_of(r, what) for what in ("before", "area", "final"))
        start, area, final = (mean_interval(v).text() for v in values)
        parameters = x.runs[x.runs.regime == r].parameters.iloc[0]
        cells = [REGIMES[r].title, f"{parameters:,}", start, mean_interval(x.mean_steps(r)).text(0)]
        rows.append([*cells, f"{np.isfinite(steps).sum()} of {len(steps)}", area, final])
    columns = ["regime", "trained parameters", "return before", f"steps to {SHARE:.0%} of Scratch"]
    text = markdown([*columns, "runs that get there", "area under evaluations", "final return"], rows)
    means = [(r, x.mean_of(r, "before_mean").dropna()) for r in x.regimes if REGIMES[r].trains == "own"]
    means = [f"{REGIMES[r].title} {mean_interval(v).text()}" for r, v in means if len(v)]
    text += f"\nBefore, with the mean residual of the other tasks added to theta: {', '.join(means)}.\n"
    answer, why = claim_7(x)
    text += f"\n## C7: {answer}\n\n{claim_7.__doc__} {why}"
    described = describe(x.name)
    text += f"\n## Every held-out task: median steps to {SHARE:.0%} of Scratch\n\n"
    text += f"In parentheses the runs that never get there in {last:,} steps; a dash is no number.\n\n"
    rows = [
        ["", *(described[task][1] for task in x.tasks)],
        ["return to reach", *(f"{x.target[t]:.0f}" for t in x.tasks)],
    ]
    for r in x.regimes:
        cells = []
        for task in x.tasks:
            steps = x.steps(r, task)
            lost = int(np.isinf(steps).sum())
            cells.append(median_interval(steps).text(0) + f" ({lost})" * bool(lost))
        rows.append([REGIMES[r].title, *cells])
    return text + markdown(["regime", *(described[task][0] for task in x.tasks)], rows)


def plot(x: Adaptations) -> Figure:
    """A panel for each held-out task, and their mean: every regime's evaluations, 95 % intervals."""
    described = describe(x.name)
    panels = {f"{described[task][0]}\n{described[task][1]}": [task] for task in x.tasks}
    panels = {"mean of the held-out tasks\n": x.tasks, **panels}
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(11.4, 3.1 * rows + 0.7), layout="constrained")
    figure.suptitle(f"{x.name}: a held-out task, 95 % intervals over runs", fontsize=11)
    axes = list(figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).flat)
    for ax, (title, tasks) in zip(axes, panels.items()):
        for r, color in zip(REGIMES, CYCLE):
            if r not in x.regimes:
                continue
            curve = sum(x.curves[r, task] for task in tasks) / len(tasks)
            mean, low, high = np.array([mean_interval(values) for values in curve.to_numpy().T]).T
            style = ":" if r == SCRATCH else "--" if REGIMES[r].trains == "all" else "-"
            ax.plot(curve.columns, mean, style, color=color, lw=1.8, label=REGIMES[r].title)
            ax.fill_between(curve.columns, low, high, color=color, alpha=0.12, lw=0)
        goal = np.mean([x.target[task] for task in tasks])
        ax.axhline(goal, color="0.6", lw=1, ls=":", label=f"{SHARE:.0%} of what Scratch ends with")
        ax.set_title(title, fontsize=9)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[-3:]:
        ax.set_xlabel("steps of the held-out task")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def report(suite: str) -> str:
    """table.md and loo.png of a suite from its CSVs; returns the table."""
    folder = FOLDER / suite
    if not (folder / "runs.csv").exists():
        return f"{suite}: no run has finished yet"
    x = Adaptations(folder)
    runs = f"{len(x.runs)} runs, one core each ({', '.join(x.runs.hardware.unique())}; commit "
    runs += f"{', '.join(f'`{c}`' for c in x.runs.commit.unique())})."
    text = f"# Leave-one-out on {suite}\n\n{runs} In brackets 95 % intervals over seeds.\n\n{make_table(x)}"
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        plot(x).savefig(folder / "loo.png")
    return text
