"""Figures of a suite from its runs.csv, and of its search from trials.csv."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import optuna
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from bench.collect import SUCCESS
from bench.methods import METHODS, parse_flags
from bench.statistics import BLIND, mean_interval
from bench.style import CYCLE, GREY, color_of, line_of
from bench.tables import best_first, measure, scores, title_of

FEW = 3  # of fewer runs Student's t makes an interval that covers a figure


def residual_methods(runs: pd.DataFrame) -> list[str]:
    """Those that log the norm of residuals, in the order of methods.csv."""
    return [m for m in scores(runs) if ((runs.method == m) & (runs.metric == "residual/ratio")).any()]


def panel_grid(
    number: int, columns: int, width: float, height: float, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, in rows; width and height are a panel's."""
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=share_y).flat)
    for ax in axes:
        ax.tick_params(labelsize=7)
    for ax in axes[number:]:
        ax.set_visible(False)
    return figure, axes[:number]


def bands(curve: pd.DataFrame) -> np.ndarray:
    """Mean over runs and its interval at every step: (run, step) -> (3, step)."""
    return np.array([mean_interval(x) for x in curve.to_numpy().T]).T


def draw_curve(ax: Axes, method: str, x: Iterable[float], curve: pd.DataFrame, **options) -> None:
    """Mean over runs and its 95 % interval; below `FEW` runs the runs, as their interval says nothing."""
    mean, low, high = bands(curve)
    ax.plot(x, mean, line_of(method), color=color_of(method), lw=1.8, label=title_of(method), **options)
    if len(curve) < FEW:
        ax.plot(x, curve.to_numpy().T, color=color_of(method), lw=0.8, alpha=0.6)
    else:
        ax.fill_between(x, low, high, color=color_of(method), alpha=0.13, lw=0)


def heading(title: str, runs: pd.DataFrame) -> str:
    """Of evaluations over time."""
    what = "success in %, evaluation" if measure(runs) == SUCCESS else "evaluation"
    few = runs.groupby("method").seed.nunique().min() < FEW
    return f"{title}: {what}, mean over tasks, {'thin lines are runs' if few else '95 % intervals over runs'}"


def label_steps(ax: Axes) -> None:
    """The axis of environment steps."""
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("environment steps, all tasks together")


def plot_curves(runs: pd.DataFrame, title: str, highest: float | None) -> Figure:
    """Evaluations on the way: the methods without residuals, and those with them."""
    by_method, residual = scores(runs), residual_methods(runs)
    others = [m for m in by_method if m not in residual]
    panels = {"residuals": residual, "others": others} if residual and others else {"": list(by_method)}
    figure = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    figure.suptitle(heading(title, runs), fontsize=11 if len(panels) > 1 else 9, wrap=True)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    if measure(runs) == SUCCESS:
        axes[0].set_ylim(-3, 103)  # intervals of few runs reach beyond what is possible
    best = best_first({m: by_method[m] for m in residual})[0] if residual else None
    for ax, (name, methods) in zip(axes, panels.items()):
        for method in methods:
            draw_curve(ax, method, by_method[method].curve.columns, by_method[method].curve)
        if name == "others" and best:  # to compare with
            draw_curve(ax, best, by_method[best].curve.columns, by_method[best].curve)
        if highest is not None:
            ax.axhline(highest, color="0.6", lw=1, ls=":", label="what the tasks allow")
        label_steps(ax)
        ax.legend(fontsize=8, loc="best")
    return figure


def plot_cost(runs: pd.DataFrame, title: str, highest: float | None) -> Figure | None:
    """Where SAC and PPO are compared: evaluations against environment steps and against time."""
    by_method = scores(runs)
    if not any(METHODS[m].script.endswith("_sac.py") for m in by_method if m in METHODS):
        return None
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    figure.suptitle(heading(title, runs), fontsize=11)
    axes = figure.subplots(1, 2, sharey=True)
    for method, s in by_method.items():
        rows = runs[(runs.method == method) & (runs.metric == "charts/wall_time") & (runs.task == "mean")]
        seconds = rows.groupby("step").value.median()  # of the runs
        steps = s.curve.columns.to_numpy(float)
        at = (
            np.interp(steps, seconds.index, seconds)
            if len(seconds) > 1
            else seconds.iloc[0] * steps / steps[-1]
        )
        draw_curve(axes[0], method, steps, s.curve)
        draw_curve(axes[1], method, at, s.curve)
    label_steps(axes[0])
    axes[1].set_xlabel("seconds on one core")
    axes[1].set_xscale("log")
    axes[0].legend(fontsize=8, loc="best")
    return figure


def plot_tasks(runs: pd.DataFrame, title: str, highest: float | None) -> Figure:
    """The score of every task in the final evaluation: a dot for each run, a line at their mean."""
    by_method = scores(runs)
    methods = best_first(by_method)
    tasks = list(next(iter(by_method.values())).final)
    columns = min(5, len(tasks))
    figure, axes = panel_grid(len(tasks), columns, 2.3, 0.6 + 0.17 * len(methods))
    what = f"{'success in %' if measure(runs) == SUCCESS else 'return'} of the final evaluation"
    figure.suptitle(f"{title}: {what}, a dot a run, a line at the mean", fontsize=11)
    for ax, task in zip(axes, tasks):
        for i, method in enumerate(methods):
            x = by_method[method].final[task]
            ax.plot(x, np.full(len(x), i), "o", color=color_of(method), ms=3, alpha=0.6, mew=0)
            ax.plot([x.mean()] * 2, [i - 0.35, i + 0.35], color=color_of(method), lw=2)
        ax.set_title(task, fontsize=8)
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(methods)), [title_of(m) for m in methods])
    axes[0].invert_yaxis()
    return figure


def heat(ax: Axes, values: np.ndarray, rows: list[str], columns: list[str], low, high, texts) -> None:
    """A heat map with its numbers written in."""
    image = ax.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for (row, column), text in np.ndenumerate(texts):
        color = "white" if values[row, column] < (low + high) / 2 else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
    names = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "fontsize": 6}
    ax.set_xticks(range(len(columns)), columns, **names)
    ax.set_yticks(range(len(rows)), rows, fontsize=6)
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, pad=0.01)


def plot_sharing(runs: pd.DataFrame, title: str, highest: float | None) -> Figure | None:
    """Cosines of the tasks' residuals, and the residuals' share of every layer's squared norm.

    Both free of what all residuals have in common. The share is on a logarithmic scale: next to theta's it is
    small nearly everywhere, and what differs is by how much.
    """
    methods = residual_methods(runs)
    if not methods:
        return None
    figure = Figure(figsize=(13, 0.5 + 4.0 * len(methods)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(methods), 2, squeeze=False)
    tasks = list(next(iter(scores(runs).values())).final)
    ratios = runs[runs.metric.str.contains("/sharing_ratio/") & (runs.task != "mean")]
    ratios = ratios.assign(layer=ratios.metric.str.rpartition("/")[2], share=1 - ratios.value)
    shares = {
        m: rows.pivot_table(index="layer", columns="task", values="share")[tasks]
        for m, rows in ratios.groupby("method")
    }
    logs = {m: np.log10(x.clip(lower=1e-6)) for m, x in shares.items()}
    low, high = min(x.min().min() for x in logs.values()), max(x.max().max() for x in logs.values())
    for (left, right), method in zip(axes, methods):
        rows = runs[(runs.method == method) & (runs.metric == "cosine")]
        cosines = np.full((len(tasks), len(tasks)), np.nan)
        for pair, value in rows.groupby("task").value.mean().items():
            i, j = (tasks.index(task) for task in pair.split("|"))
            cosines[i, j] = cosines[j, i] = value
        texts = [["" if math.isnan(x) else f"{x:.2f}" for x in row] for row in cosines]
        off = np.nanmax(np.abs(cosines))
        heat(left, cosines, tasks, tasks, -off, off, texts)
        left.set_title(f"{title_of(method)}: cosine of the tasks' $\\mu_m$", fontsize=9)
        texts = [[f"{x:.1%}" if x > 0.001 else f"{x:.0e}" for x in row] for row in shares[method].to_numpy()]
        heat(right, logs[method].to_numpy(), list(logs[method].index), tasks, low, high, texts)
        name = r"$|\mu_m|^2 / (|\theta|^2 + |\mu_m|^2)$, colour: its $\log_{10}$"
        right.set_title(f"{title_of(method)}: {name}", fontsize=9)
    return figure


def plot_change(runs: pd.DataFrame, title: str, highest: float | None) -> Figure | None:
    """How far theta and the residuals have moved from where they began, and the residuals' share of it.

    theta first, the residuals later, where a share rises: the "crowd effect" of many tasks that pull one
    theta, while every residual is pulled by its own.
    """
    sac = [m.name for m in METHODS.values() if m.script.endswith("_sac.py")]
    moved = set(runs.method[runs.metric.str.endswith("/theta_moved")])  # which runs with --load do not log
    methods = [m for m in residual_methods(runs) if m in moved and m not in sac]
    if not methods:
        return None
    figure = Figure(figsize=(12.4, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, middle, right = figure.subplots(1, 3)
    for method in methods:
        rows = runs[(runs.method == method) & (runs.task == "mean")]
        norms = {
            name: rows[rows.metric.str.endswith(f"/{name}")].pivot(
                index="seed", columns="step", values="value"
            )
            for name in ("theta_moved", "mu_norm")
        }
        theta, mu = norms["theta_moved"], norms["mu_norm"]
        draw_curve(left, method, theta.columns, theta)
        draw_curve(middle, method, mu.columns, mu)
        draw_curve(right, method, mu.columns, mu**2 / (mu**2 + theta**2))
    left.set_title(r"$|\theta - \theta_0|$")
    middle.set_title(r"mean $|\mu_m|$, from 0")
    right.set_title(r"residuals' share, $|\mu|^2 / (|\mu|^2 + |\theta - \theta_0|^2)$")
    right.set_ylim(bottom=0)
    for ax in (left, middle, right):
        label_steps(ax)
    left.legend(fontsize=8, loc="best")
    return figure


def plot_residuals(suites: dict[str, pd.DataFrame]) -> Figure | None:
    """Size of the residuals over time, of suites with identical and with different tasks."""
    methods = [m for m in METHODS if all(m in residual_methods(runs) for runs in suites.values())]
    if len(suites) < 2 or not methods:
        return None
    figure, axes = panel_grid(len(methods), len(methods), 3.2, 3.2)
    figure.suptitle("norm of the residuals, mean over tasks and runs", fontsize=11)
    for ax, method in zip(axes, methods):
        for color, (name, runs) in zip(CYCLE, suites.items()):
            rows = runs[
                (runs.method == method) & (runs.task == "mean") & runs.metric.str.endswith("/mu_norm")
            ]
            curve = rows.pivot_table(index="seed", columns="step", values="value")
            ax.plot(curve.columns, curve.mean(), color=color, label=name)
        ax.set_title(title_of(method))
        label_steps(ax)
    axes[0].set_ylim(bottom=0)  # of all: they share the axis
    axes[0].set_ylabel(r"mean $|\mu_m|$")
    axes[0].legend(fontsize=8)
    return figure


PORTFOLIO = ("reptile", "lora", "variant")  # families of VarShare's variants, which have figures of their own


def of_portfolio(runs: pd.DataFrame, *families: str) -> list[str]:
    """Methods of these families, in the order of methods.csv."""
    return [m for m in scores(runs) if m in METHODS and METHODS[m].family in families]


def plot_variants(runs: pd.DataFrame, title: str, highest: float | None) -> Figure | None:
    """Evaluations of all of VarShare's variants; and of the best three with what they are compared to."""
    variants = of_portfolio(runs, *PORTFOLIO)
    if not variants:
        return None
    by_method = scores(runs)
    base = [m for m in of_portfolio(runs, "varshare") if not METHODS[m].variant]
    controls = [m for m in of_portfolio(runs, "varshare", "l2soft") if METHODS[m].variant] + [BLIND]
    best = best_first({m: by_method[m] for m in variants})[:3]
    panels = {"all variants": base + variants, "the best three": base + best + controls}
    figure = Figure(figsize=(10.8, 4.2), layout="constrained")
    figure.suptitle(heading(title, runs), fontsize=11)
    for ax, (name, methods) in zip(figure.subplots(1, 2), panels.items()):
        for method in (m for m in methods if m in by_method):
            draw_curve(ax, method, by_method[method].curve.columns, by_method[method].curve)
        if highest is not None:
            ax.axhline(highest, color="0.6", lw=1, ls=":", label="what the tasks allow")
        ax.set_title(name)
        label_steps(ax)
        ax.legend(fontsize=8, loc="best")
    return figure


SUITE_FIGURES = {
    "curves": plot_curves,
    "cost": plot_cost,
    "tasks": plot_tasks,
    "sharing": plot_sharing,
    "change": plot_change,
    "variants": plot_variants,
}


# The search

STATES = {"complete": "o", "dropped": "x", "crashed": "v"}  # all seeds, one or two, none


def with_settings(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials of one method, a column for each setting."""
    return trials.assign(**pd.DataFrame([parse_flags(x) for x in trials.settings], trials.index))


def floor_of(trials: pd.DataFrame) -> float:
    """Where an axis of returns begins: below it a few trials would flatten all others."""
    finals = trials[trials.state == "complete"].final
    finals = finals if len(finals) else trials.final.fillna(0)
    low, high = finals.quantile(0.05), finals.max()
    return low - 0.3 * max(high - low, 1.0)


def limits_of(trials: pd.DataFrame) -> tuple[float, float]:
    """Of an axis that all of these trials share."""
    low, high = floor_of(trials), trials.final.max()
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def draw_trials(ax: Axes, trials: pd.DataFrame, name: str, method: str, floor: float) -> None:
    """Mean final return of the seeds that ran, against one setting; at the floor where none did, or less."""
    space = METHODS[method].space[name]
    choices = list(getattr(space, "choices", ()))
    for state, mark in STATES.items():
        rows = trials[trials.state == state]
        x = [choices.index(v) for v in rows[name]] if choices else rows[name].astype(float)
        full = state == "complete"
        y = rows.final.fillna(floor).clip(lower=floor)
        ax.plot(x, y, mark, color=color_of(method) if full else GREY, ms=4 if full else 3.5, alpha=0.8)
    if choices:
        ax.set_xticks(range(len(choices)), choices)
        ax.set_xlim(-0.5, len(choices) - 0.5)
    elif space.log:
        ax.set_xscale("log")
        ax.set_xlim(space.low / 1.2, space.high * 1.2)
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())


def trial_legend(figure: Figure) -> None:
    """What the marks are."""
    names = ("three seeds", "dropped after one or two", "crashed")
    marks = [
        Line2D([], [], marker=mark, ls="", color="black" if state == "complete" else GREY)
        for state, mark in STATES.items()
    ]
    figure.legend(marks, names, loc="outside lower center", ncols=3, fontsize=8)


def plot_step_sizes(trials: pd.DataFrame, title: str) -> Figure:
    """Return against the step size for every method, whatever its other settings."""
    methods = [m for m in METHODS if m in set(trials.method)]
    figure, axes = panel_grid(len(methods), min(5, len(methods)), 2.5, 2.3, share_y=False)
    figure.suptitle(f"{title}: return of the trials against the step size", fontsize=11)
    others = trials[trials.method != BLIND]  # far above it, on an axis of their own
    for ax, method in zip(axes, methods):
        rows = with_settings(trials[trials.method == method])
        of_axis = rows if method == BLIND else others
        draw_trials(ax, rows, "learning-rate", method, floor_of(of_axis))
        ax.set_ylim(ax.get_ylim() if method == BLIND else limits_of(others))
        ax.set_title(title_of(method), fontsize=9)
    spaces = [METHODS[m].space["learning-rate"] for m in methods]  # SAC's is another, and the axis is shared
    axes[0].set_xlim(min(x.low for x in spaces) / 1.2, max(x.high for x in spaces) * 1.2)
    trial_legend(figure)
    return figure


def importance(trials: pd.DataFrame, method: str) -> dict[str, float]:
    """Share of each setting in what the best quarter of the trials has in common (PED-ANOVA)."""
    space = METHODS[method].space
    study = optuna.create_study(direction="maximize")
    for x in trials[trials.state == "complete"].itertuples():
        flags = parse_flags(x.settings)
        params = {
            name: flags[name] if hasattr(d, "choices") else float(flags[name]) for name, d in space.items()
        }
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=x.final))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def plot_settings(trials: pd.DataFrame, title: str) -> Figure:
    """Return against every setting, a row for each method; in the titles the setting's importance."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    methods = [m for m in METHODS if m in set(trials.method)]
    columns = max(len(METHODS[m].space) for m in methods)
    figure = Figure(figsize=(2.6 * columns, 1.9 * len(methods) + 0.4), layout="constrained")
    figure.suptitle(f"{title}: return of the trials against each setting, and its importance", fontsize=11)
    axes = figure.subplots(len(methods), columns, squeeze=False, sharey="row")
    for row, method in zip(axes, methods):
        rows = with_settings(trials[trials.method == method])
        shares = importance(rows, method)  # none where no trial is complete
        for ax, name in zip(row, METHODS[method].space):
            draw_trials(ax, rows, name, method, floor_of(rows))
            ax.tick_params(labelsize=7)
            ax.set_title(f"{name}: {shares[name]:.0%}" if shares else name, fontsize=8)
        for ax in row[len(METHODS[method].space) :]:
            ax.set_visible(False)
        row[0].set_ylabel(title_of(method), fontsize=8)
    trial_legend(figure)
    return figure
