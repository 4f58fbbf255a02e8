"""What is made of results/loo/SUITE/: table.md, loo.png, and the verdict on C7."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bench.loo import FOLDER, KEY, OURS, RATES, REGIMES, SCRATCH
from bench.statistics import (
    BLIND,
    MARGIN,
    Interval,
    difference,
    holm,
    mean_interval,
    median_interval,
    verdict,
)
from bench.style import CYCLE, STYLE
from bench.tables import markdown

SHARE = 0.9  # of what Scratch ends with: a task is learned when two evaluations have it
FIELDS = {"gravity": "gravity", "masscart": "cart", "masspole": "pole", "length": "length", "goal": "goal"}
SPEED = {"better": "slower", "worse": "faster"}  # more steps


class Adaptations:
    """The runs of a suite, from its CSVs, of the seeds that are complete.

    Attributes:
        runs: a row for each.
        curves: regime and task -> (seed, step) return of the evaluations; step 0 is before the run.
        tasks: numbers of the held-out tasks.
        target: return at which a task is learned, of each.
        last: step of the last evaluation.
    """

    def __init__(self, folder: Path):
        self.name = folder.name
        runs, later = (pd.read_csv(folder / f"{name}.csv") for name in ("runs", "evaluations"))
        self.regimes = [r for r in REGIMES if r in set(runs.regime)]
        self.tasks = sorted(runs.task.unique())
        complete = runs.groupby("seed").regime.transform("size") == len(self.regimes) * len(self.tasks)
        self.runs = runs[complete & ({SCRATCH, OURS} <= set(self.regimes))]
        before = self.runs.rename(columns={"before": "value"}).assign(step=0)
        rows = pd.concat([before[[*later]], later.merge(self.runs[KEY])])
        groups = rows.groupby(["regime", "task"])
        self.curves = {key: x.pivot(index="seed", columns="step", values="value") for key, x in groups}
        self.last = rows.step.max()
        if len(self.runs):
            finals = {task: self.curves[SCRATCH, task].iloc[:, -1] for task in self.tasks}
            self.target = {task: SHARE * final.mean() for task, final in finals.items()}

    def steps(self, regime: str, task: int) -> pd.Series:
        """By seed, steps at which a task is learned, which two evaluations in a row say; infinite: never."""
        curve = self.curves[regime, task]
        there = curve.to_numpy() >= self.target[task]
        learned = there[:, :-1] & there[:, 1:]
        first = np.where(learned.any(1), curve.columns.to_numpy(float)[learned.argmax(1)], math.inf)
        return pd.Series(first, curve.index)

    def over_tasks(self, of_task: Callable[[int], pd.Series]) -> pd.Series:
        """By seed, mean over tasks."""
        return pd.DataFrame({task: of_task(task) for task in self.tasks}).mean(axis=1, skipna=False)

    def mean_steps(self, regime: str) -> pd.Series:
        """By seed, steps at which a task is learned; a run that never gets there counts as long as it is."""
        return self.over_tasks(lambda task: self.steps(regime, task).clip(upper=self.last))

    def finals(self, regime: str) -> pd.Series:
        """By seed, return of the final evaluation."""
        return self.over_tasks(lambda task: self.curves[regime, task].iloc[:, -1])

    def areas(self, regime: str) -> pd.Series:
        """By seed, mean return over the steps."""
        steps = self.curves[regime, self.tasks[0]].columns.to_numpy(float)
        return self.over_tasks(
            lambda task: self.curves[regime, task].apply(np.trapezoid, axis=1, args=(steps,)) / self.last
        )

    def before(self, regime: str, column: str = "before") -> pd.Series:
        """By seed, return before the run, or "before_mean"."""
        return self.runs[self.runs.regime == regime].groupby("seed")[column].mean()

    def reached(self, regime: str) -> tuple[int, int]:
        """In how many runs, of how many, a task is learned."""
        steps = np.concatenate([self.steps(regime, task) for task in self.tasks])
        return int(np.isfinite(steps).sum()), len(steps)

    def comparisons(self) -> dict[str, tuple[Interval, float, str]]:
        """Residual adaptation against every other regime: steps more, p by Holm, and faster or slower.

        One that is faster but gets there in fewer runs is said to be that.
        """
        others = [r for r in self.regimes if r != OURS]
        ours = self.mean_steps(OURS)
        found = {r: difference(ours, self.mean_steps(r)) for r in others}
        result = {}
        for (r, d), p in zip(found.items(), holm([d.p for d in found.values()])):
            within = MARGIN * min(ours.mean(), self.mean_steps(r).mean())  # the fewer the better
            says = verdict(d, p, within)
            says = SPEED.get(says, says)
            winner, loser = (OURS, r) if says == "faster" else (r, OURS)
            if says in SPEED.values() and self.reached(winner)[0] < self.reached(loser)[0]:
                says = f"{says}, but {REGIMES[winner].title} gets there in fewer runs"
            result[r] = d.interval, p, says
        return result


def novelty(task: int, params: list[dict[str, float]]) -> str:
    """Whether a task's goal and its physics lie between those of the other tasks or beyond them."""
    others = [x for i, x in enumerate(params) if i != task]
    beyond, differs = [], []
    for name, value in params[task].items():
        values = [x[name] for x in others]
        if len({value, *values}) > 1:
            differs.append(name)
        if not min(values) <= value <= max(values):
            beyond.append(name)
    parts = {"goal": ["goal"], "physics": [name for name in FIELDS if name != "goal"]}
    texts = []
    for part, names in parts.items():
        new = [FIELDS[name] for name in names if name in beyond]
        if new:
            texts.append(f"{' and '.join(new)} beyond")
        elif set(names) & set(differs):
            texts.append(f"{part} between")
    return ", ".join(texts)


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
    text = f"Test: fewer steps to {SHARE:.0%} of what Scratch ends with, mean over held-out tasks, p below "
    text += (
        "5 % among the comparisons below, and no fewer runs that get there. One that never does counts as "
    )
    text += "long as it is.\n\n"
    columns = ["Residual adaptation and", "difference of steps", "p (Holm)", "it is"]
    rows = [[REGIMES[r].title, d.text(0), f"{p:.2g}", s] for r, (d, p, s) in found.items()]
    blind = x.runs[x.runs.regime == BLIND].groupby("task").before.mean()
    if len(blind) and all(blind[task] >= x.target[task] for task in x.tasks):
        answer = "this suite cannot tell"
        text += "On every held-out task the task-blind network of the others is there as it is: "
        text += f"{blind.mean():.1f} before the first step.\n\n"
    return answer, text + markdown(columns, rows)


def make_table(x: Adaptations) -> str:
    """All regimes, the comparisons, and every held-out task."""
    rows = []
    for r in x.regimes:
        of_regime = x.runs[x.runs.regime == r].iloc[0]
        edge = " (an edge)" * (float(of_regime.rate) in (float(RATES[0]), float(RATES[-1])))
        start, area, final = (mean_interval(f(r)).text() for f in (x.before, x.areas, x.finals))
        steps, (reached, runs) = mean_interval(x.mean_steps(r)).text(0), x.reached(r)
        cells = [REGIMES[r].title, f"{of_regime.rate:g}{edge}", f"{of_regime.parameters:,}", start]
        rows.append([*cells, steps, f"{reached} of {runs}", area, final])
    columns = [
        "regime",
        "step size",
        "trained parameters",
        "return before",
        f"steps to {SHARE:.0%} of Scratch",
    ]
    text = markdown([*columns, "runs that get there", "area under evaluations", "final return"], rows)
    text += (
        "\nFull fine-tuning trains theta and mu, whose sum is half as many weights. Sigma does not count.\n"
    )
    for r in x.regimes:
        if len(mean := x.before(r, "before_mean").dropna()) and REGIMES[r].trains == "own":
            text += f"\n{REGIMES[r].title}, before, with the other tasks' mean residual added to theta: "
            text += f"{mean_interval(mean).text()}.\n"
    before = x.runs[x.runs.regime == OURS].groupby("task").before.mean()
    answer, why = claim_7(x)
    text += f"\n## C7: {answer}\n\n{claim_7.__doc__} {why}"
    apart = [task for task in x.tasks if before[task] < x.target[task]]
    if 0 < len(apart) < len(x.tasks):
        steps = [sum(x.steps(r, t).clip(upper=x.last) for t in apart) / len(apart) for r in (OURS, SCRATCH)]
        gap = difference(*steps).interval.text(0)
        text += f"\nAn afterthought, not corrected: on the {len(apart)} held-out tasks that theta alone "
        text += f"cannot do before the first step the difference to Scratch is {gap}.\n"
    described = describe(x.name)
    text += f"\n## Every held-out task: median steps to {SHARE:.0%} of Scratch\n\n"
    text += f"In parentheses the runs that never get there in {x.last:,} steps; a dash is no number.\n\n"
    rows = [["new in it", *(described[task][1] for task in x.tasks)]]
    rows.append(["return to reach", *(f"{x.target[task]:.0f}" for task in x.tasks)])
    rows.append([f"{REGIMES[OURS].title}, before", *(f"{before[task]:.0f}" for task in x.tasks)])
    for r in x.regimes:
        cells = []
        for task in x.tasks:
            steps = x.steps(r, task)
            lost = int(np.isinf(steps).sum())
            cells.append(median_interval(steps).text(0) + f" ({lost})" * bool(lost))
        rows.append([REGIMES[r].title, *cells])
    cells = []
    for task in x.tasks:
        steps = [x.steps(r, task).clip(upper=x.last) for r in (OURS, SCRATCH)]
        cells.append(difference(*steps).interval.text(0))
    rows.append([f"mean: {REGIMES[OURS].title} minus {REGIMES[SCRATCH].title}", *cells])
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
        for r in x.regimes:
            color = CYCLE[[*REGIMES].index(r)]
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
    if not (folder / "runs.csv").exists() or not len((x := Adaptations(folder)).runs):
        return f"{suite}: not all runs of a seed have finished yet"
    runs = f"{len(x.runs)} runs, one core each ({', '.join(x.runs.hardware.unique())}; commit "
    runs += f"{', '.join(f'`{c}`' for c in x.runs.commit.unique())})."
    text = f"# Leave-one-out on {suite}\n\n{runs} In brackets 95 % intervals over seeds.\n\n{make_table(x)}"
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        plot(x).savefig(folder / "loo.png")
    return text
