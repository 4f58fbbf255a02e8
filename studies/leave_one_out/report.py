"""What is made of results/studies/leave_one_out/NAME: table.md, loo.png, and the verdict on C7."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.collect import EVALUATION, read
from bench.figures import (
    STYLE,
    add_legend,
    begin_at,
    bounds_of,
    color_of,
    describe_runs,
    draw_curve,
    label_steps,
    make_panels,
    save,
    start_figure,
)
from bench.statistics import BLIND, MARGIN, Comparison, compare, difference, mean_interval, median_interval
from bench.tables import markdown, provenance
from envs import make
from studies.leave_one_out.runs import FOLDER, LORA, OURS, RATE, RATES, REGIMES, SCRATCH, TRAINED, WITH_MEAN

SHARE = 0.9  # of what Scratch ends with: a task is learned when two evaluations have it
FIELDS = {"gravity": "gravity", "masscart": "cart", "masspole": "pole", "length": "length", "goal": "goal"}
SPEED = {"better": "slower", "worse": "faster"}  # more steps


class Adaptations:
    """The runs on an environment, from its CSVs, of the seeds that are complete.

    Attributes:
        runs: runs.csv with the columns regime and held_out, the number of the task.
        curves: regime and task -> (seed, step) return of the evaluations; step 0 is before the run.
        tasks: numbers of the held-out tasks.
        target: return at which a task is learned, of each.
        last: step of the last evaluation.
    """

    def __init__(self, folder: Path):
        self.name = folder.name
        runs, self.configs = read(folder)
        runs[["regime", "held_out"]] = runs.setting.str.rsplit("-", n=1, expand=True)
        runs["held_out"] = runs.held_out.astype(int)
        self.regimes = [r for r in REGIMES if r in set(runs.regime)]
        self.tasks = sorted(runs.held_out.unique())
        number = runs.groupby("seed").setting.transform("nunique")
        complete = number == len(self.regimes) * len(self.tasks)
        self.runs = runs[complete & ({SCRATCH, OURS} <= set(self.regimes))]
        groups = self.runs[self.runs.metric == EVALUATION].groupby(["regime", "held_out"])
        self.curves = {key: x.pivot(index="seed", columns="step", values="value") for key, x in groups}
        self.last = self.runs.step.max()
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

    def first(self, regime: str, metric: str = EVALUATION, of: str = "seed") -> pd.Series:
        """Mean before the first step, by seed or by "held_out" task."""
        rows = self.runs[(self.runs.regime == regime) & (self.runs.metric == metric) & (self.runs.step == 0)]
        return rows.groupby(of).value.mean()

    def reached(self, regime: str) -> tuple[int, int]:
        """In how many runs, of how many, a task is learned."""
        steps = np.concatenate([self.steps(regime, task) for task in self.tasks])
        return int(np.isfinite(steps).sum()), len(steps)

    def comparisons(self, ours: str = OURS) -> dict[str, Comparison]:
        """A regime against every other: steps more, p by Holm, and faster or slower.

        One that is faster but gets there in fewer runs is said to be that.
        """
        steps = {r: self.mean_steps(r) for r in self.regimes}
        others = [r for r in self.regimes if r != ours]
        within = [MARGIN * min(steps[ours].mean(), steps[r].mean()) for r in others]  # the fewer the better
        result = {}
        for r, c in zip(others, compare([(steps[ours], steps[r]) for r in others], within)):
            says = SPEED.get(c.verdict, c.verdict)
            winner, loser = (ours, r) if says == "faster" else (r, ours)
            if says in SPEED.values() and self.reached(winner)[0] < self.reached(loser)[0]:
                says = f"{says}, but {REGIMES[winner].title} gets there in fewer runs"
            result[r] = c._replace(verdict=says)
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
    envs = make(suite, 1)
    return {i: (name, novelty(i, list(envs.task_params))) for i, name in enumerate(envs.task_names)}


def claim_7(x: Adaptations, ours: str = OURS) -> tuple[str, str]:
    """On a held-out task training only (mu, sigma) is faster than training from scratch."""
    found = x.comparisons(ours)
    says = found[SCRATCH].verdict
    answer = {"faster": "supported", "undecided": "not decided"}.get(says, f"not supported: {says}")
    for other in ("fine-tuning", "task-blind"):
        if other in found:
            answer += f"; against {REGIMES[other].title.lower()}: {found[other].verdict}"
    text = f"Test: fewer steps to {SHARE:.0%} of what Scratch ends with, mean over held-out tasks, p below "
    text += "5 % among the comparisons below, and no fewer runs that get there. One that never does "
    text += "counts as long as it is.\n\n"
    columns = [f"{REGIMES[ours].title} and", "difference of steps", "p (Holm)", "it is"]
    rows = [[REGIMES[r].title, *c.cells(0)] for r, c in found.items()]
    blind = x.first(BLIND, of="held_out")
    if len(blind) and all(blind[task] >= x.target[task] for task in x.tasks):
        answer = "this suite cannot tell"
        text += "On every held-out task the task-blind network of the others is there as it is: "
        text += f"{blind.mean():.1f} before the first step.\n\n"
    return answer, text + markdown(columns, rows)


def make_table(x: Adaptations) -> str:
    """All regimes, the comparisons, and every held-out task."""
    rows = []
    for r in x.regimes:
        rate = x.first(r, RATE).iloc[0]
        edge = " (an edge)" * (rate in (float(RATES[0]), float(RATES[-1])))
        start, area, final = (mean_interval(f(r)).text() for f in (x.first, x.areas, x.finals))
        steps, (reached, runs) = mean_interval(x.mean_steps(r)).text(0), x.reached(r)
        cells = [REGIMES[r].title, f"{rate:g}{edge}", f"{x.first(r, TRAINED).iloc[0]:,.0f}", start]
        rows.append([*cells, steps, f"{reached} of {runs}", area, final])
    columns = ["regime", "step size", "trained parameters", "return before"]
    columns += [f"steps to {SHARE:.0%} of Scratch", "runs that get there", "area under evaluations"]
    text = markdown([*columns, "final return"], rows)
    text += "\nFull fine-tuning trains theta and mu, whose sum is half as many weights. "
    text += "Sigma does not count.\n"
    for r in x.regimes:
        if len(mean := x.first(r, WITH_MEAN)) and REGIMES[r].trains == "own":
            text += f"\n{REGIMES[r].title}, before, with the other tasks' mean residual added to theta: "
            text += f"{mean_interval(mean).text()}.\n"
    before = x.first(OURS, of="held_out")
    answer, why = claim_7(x)
    text += f"\n## C7: {answer}\n\n{claim_7.__doc__} {why}"
    if LORA in x.regimes:
        answer, why = claim_7(x, LORA)
        text += f"\n## C7 with residuals of low rank: {answer}\n\n{why}"
    apart = [task for task in x.tasks if before[task] < x.target[task]]
    if 0 < len(apart) < len(x.tasks):
        steps = [sum(x.steps(r, t).clip(upper=x.last) for t in apart) / len(apart) for r in (OURS, SCRATCH)]
        gap = difference(*steps).interval.text(0)
        text += f"\nPost hoc and not corrected: on the {len(apart)} held-out tasks that theta alone "
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
    """A panel for each held-out task, and their mean: every regime's evaluations."""
    described = describe(x.name)
    panels = {f"{described[task][0]}\n{described[task][1]}": [task] for task in x.tasks}
    panels = {"mean of the held-out tasks\n": x.tasks, **panels}
    title = f"{x.name}, a held-out task: {describe_runs(map(len, x.curves.values()))}"
    figure = start_figure(title, 1.2 + 2.2 * math.ceil(len(panels) / 3))
    axes = make_panels(figure, len(panels), 3, sharex=True, sharey=True)
    bounds = bounds_of(x.name)
    for ax, (title, tasks) in zip(axes, panels.items()):
        for r in x.regimes:
            how = REGIMES[r]
            curve = sum(x.curves[r, task] for task in tasks) / len(tasks)
            line = ":" if r == SCRATCH else "--" if how.trains == "all" else "-"
            draw_curve(ax, curve.columns, curve, how.title, color_of(how.method), line, bounds)
        goal = np.mean([x.target[task] for task in tasks])
        ax.axhline(goal, color="0.6", lw=1, ls=":", label=f"{SHARE:.0%} of what Scratch ends with")
        ax.set_title(title, fontsize=8)
    for ax in axes:
        label_steps(ax, "steps of the held-out task")
    begin_at(axes[0], bounds[0])
    figure.supylabel("return of the evaluation")
    add_legend(figure)
    return figure


def report(suite: str) -> str:
    """table.md and loo.png of a suite from its CSVs; returns the table."""
    folder = FOLDER / suite
    if not (folder / "runs.csv").exists() or not len((x := Adaptations(folder)).runs):
        return f"{suite}: not all runs of a seed have finished yet"
    text = f"# Leave-one-out on {suite}\n\n{provenance(x.configs)} In brackets 95 % intervals over seeds.\n\n"
    text += make_table(x)
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        save(plot(x), folder / "loo.png")
    return text
