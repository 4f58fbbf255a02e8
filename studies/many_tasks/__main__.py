"""What does sharing gain as tasks get more and the samples of each fewer? results/studies/many_tasks/.

The runs are those of the suites many-tasks10 to many-tasks160 of benchmark.sh: equal total steps. A map of
the tasks of one of them is kept too, for the README's first figure.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from bench.collect import principal_components, read_run, task_vectors
from bench.figures import STYLE, add_legend, color_of, save, start_figure
from bench.methods import METHODS, title_of
from bench.statistics import BLIND, INDEPENDENT, Interval, against, compare, mean_interval
from bench.tables import Result, markdown
from studies import report_study

NUMBERS = (10, 20, 40, 80, 160)
MAPPED = Path("runs/many-tasks80__varshare__1001")  # the first run of VarShare's on eighty tasks
# in the README's figure
SHOWN = ("varshare-lora", "varshare", "hard-sharing", "contextual", INDEPENDENT, BLIND)


def read_suites() -> dict[int, Result]:
    """Number of tasks -> what is committed of its suite."""
    folders = {number: Path("results/suites", f"many-tasks{number}") for number in NUMBERS}
    return {n: Result(folder) for n, folder in folders.items() if (folder / "configs.csv").exists()}


def slope(gains: dict[int, pd.Series]) -> tuple[Interval, float]:
    """How much a gain, by seed, grows when tasks double: mean over seeds of the slopes, and p of none."""
    table = pd.DataFrame(gains).dropna()
    doublings = np.log2(table.columns.to_numpy(float))
    slopes = np.polyfit(doublings, table.T, 1)[0]
    return mean_interval(slopes), float(stats.ttest_1samp(slopes, 0).pvalue)


def claim_10(suites: dict[int, Result]) -> tuple[str, str]:
    """Sharing gains more with more tasks and fewer samples of each.

    Test: the difference between VarShare and Independent, and between Hard sharing and Independent, grows
    with the logarithm of the number of tasks, p below 2.5 % for each of the two.
    """
    lines, won, tried = [], 0, 0
    for method in ("varshare", "hard-sharing"):
        values = {n: x.values("means") for n, x in suites.items()}
        gains = {n: x[method] - x[INDEPENDENT] for n, x in values.items() if {method, INDEPENDENT} <= set(x)}
        if len(gains) < 3 or len(pd.DataFrame(gains).dropna()) < 2:
            continue
        interval, p = slope(gains)
        tried += 1
        won += interval.low > 0 and p < 0.025
        of_each = ", ".join(f"{n}: {x.mean():.0f}" for n, x in gains.items())
        lines.append(
            f"- {title_of(method)} minus Independent by the number of tasks: {of_each}; with every doubling "
            f"{interval.text()} more, p {p:.2g}"
        )
    answer = "not decided" if not tried else "supported" if won == tried else "not supported"
    return answer, "\n".join(lines) + "\n"


def draw(ax: Axes, suites: dict[int, Result], what: dict[str, dict[int, Interval]]) -> None:
    """A line for each method over the number of tasks."""
    for method, of_number in what.items():
        x, (mean, low, high) = list(of_number), zip(*of_number.values())
        line = ":" if method == BLIND else "-"
        ax.plot(x, mean, line, marker="o", ms=3, color=color_of(method), label=title_of(method))
        ax.fill_between(x, low, high, color=color_of(method), alpha=0.12, lw=0)
    ax.set(xscale="log", xlabel="tasks")
    ax.set_xticks(list(suites), [str(n) for n in suites])
    ax.minorticks_off()


def map_tasks(folder: Path) -> pd.DataFrame:
    """Of a run: goal and two principal components of the residuals of each task, and their shares."""
    run = read_run(folder)
    places, shares = principal_components(task_vectors(run))
    goals = [params["goal"] for params in run.config["task_params"]]
    columns = {"goal": goals, "component 1": places[:, 0], "component 2": places[:, 1]}
    return pd.DataFrame(columns).assign(share_1=shares[0], share_2=shares[1])


def plot_first(suites: dict[int, Result], places: pd.DataFrame) -> Figure:
    """The map of the tasks, and what some methods reach by the number of tasks."""
    steps = next(iter(suites.values())).steps
    figure = start_figure("what residuals know, and what sharing gains", 3.6)
    left, right = figure.subplots(1, 2)
    dots = left.scatter(places["component 1"], places["component 2"], c=places.goal, cmap="cividis", s=22)
    figure.colorbar(dots, ax=left, pad=0.01, label="hidden goal of the task, m")
    labels = [f"component {i} ({places[f'share_{i}'].iloc[0]:.0%})" for i in (1, 2)]
    left.set(title=f"residuals of {len(places)} tasks", xlabel=labels[0], ylabel=labels[1])
    intervals = {n: x.intervals("means") for n, x in suites.items()}
    shown = [m for m in SHOWN if any(m in x for x in intervals.values())]
    draw(right, suites, {m: {n: x[m] for n, x in intervals.items() if m in x} for m in shown})
    right.set(title=f"{steps:,} steps of all tasks together", ylabel="return, mean over tasks", ylim=(0, 500))
    add_legend(figure)
    return figure


def plot(suites: dict[int, Result]) -> Figure:
    """Return against the number of tasks, and parameters in all per task."""
    runs = min(len(s.final) for x in suites.values() for s in x.by_method.values())
    steps = next(iter(suites.values())).steps
    figure = start_figure(f"{steps:,} steps of all tasks together: means of {runs} runs, 95 % intervals", 4.4)
    left, right = figure.subplots(1, 2)
    methods = [m for m in METHODS if any(m in x.by_method for x in suites.values())]
    intervals = {n: x.intervals("means") for n, x in suites.items()}
    found = {m: {n: x[m] for n, x in intervals.items() if m in x} for m in methods}
    draw(
        left,
        suites,
        {m: {n: Interval(*np.clip(x, 0, 500)) for n, x in of.items()} for m, of in found.items()},
    )
    left.set(ylabel="return of the evaluation, mean over tasks", ylim=(0, 500))
    cost = {}
    for n, x in suites.items():
        rows = x.runs[x.runs.metric == "parameters/all"].groupby("method").value.median() / n
        for method, value in rows.items():
            cost.setdefault(method, {})[n] = Interval(value, value, value)
    draw(right, suites, {m: cost[m] for m in methods if m in cost})
    right.set(ylabel="parameters in all, per task", yscale="log")
    add_legend(figure, columns=5)
    return figure


def table(suites: dict[int, Result]) -> str:
    """Every method at every number of tasks, VarShare beside L2Soft, and all beside the best."""
    intervals = {n: x.intervals("means") for n, x in suites.items()}
    last = intervals[max(intervals)]
    methods = {method for x in intervals.values() for method in x}
    rows = []
    for method in sorted(methods, key=lambda m: (-last[m].center if m in last else 0, m)):
        rows.append(
            [title_of(method), *(x[method].text(0) if method in x else "" for x in intervals.values())]
        )
    text = markdown(["method", *(f"{n} tasks" for n in suites)], rows)
    rows = []
    for n, x in suites.items():
        values = x.values("means")
        if not {"varshare", "l2soft"} <= set(values):
            continue
        [c] = compare([(values["varshare"], values["l2soft"])])
        rows.append([str(n), *c.cells()])
    text += f"\n{markdown(['tasks', 'VarShare minus L2Soft', 'p', 'verdict'], rows)}"
    for n, x in suites.items():
        values = x.values("means")
        best = max(values, key=lambda method: values[method].mean())
        rows = [[title_of(m), *c.cells()] for m, c in against(values, best).items()]
        text += (
            f"\n{markdown([f'{n} tasks', f'minus {title_of(best)}, the best', 'p (Holm)', 'verdict'], rows)}"
        )
    return text


def report(out: Path) -> str:
    """table.md, many_tasks.png, and of a run that is at hand or was the map of its tasks and first.png."""
    suites = read_suites()
    if not suites:
        return "many_tasks: no suite has results yet"
    out.mkdir(parents=True, exist_ok=True)
    answer, lines = claim_10(suites)
    gates = [f"- {n} tasks: {'can' if x.able else '**cannot**'} tell: {x.why}" for n, x in suites.items()]
    text = "\n".join([table(suites), *gates, "", f"C10: {answer}\n", lines])
    (out / "table.md").write_text(text)
    if (MAPPED / "evaluation.csv").exists():
        map_tasks(MAPPED).to_csv(out / "map.csv", index=False, float_format="%.5g")
    with rc_context(STYLE):
        save(plot(suites), out / "many_tasks.png")
        if (out / "map.csv").exists():
            save(plot_first(suites, pd.read_csv(out / "map.csv")), out / "first.png")
    return text


if __name__ == "__main__":
    report_study("many_tasks", report)
