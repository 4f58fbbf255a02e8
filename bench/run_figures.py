"""Figures of a single run: plots/ in its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bench.collect import Run
from bench.style import BLACK, BLUE, CYCLE, GREEN, MAX_CURVES, ORANGE, SKY, STYLE


def start_figure(run: Run, width: float, height: float) -> Figure:
    """An empty figure under the run's title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(run.title, fontsize=11)
    return figure


def finish_axes(ax: Axes, run: Run, title: str, label_x: bool = True) -> None:
    """What all axes over time have: a title, and environment steps up to the run's total, as 200k."""
    ax.set_title(title)
    ax.set_xlim(0, run.config["args"]["total_timesteps"])
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    ax.set_xlabel("environment steps, all tasks together" if label_x else "")


def draw_tasks(
    ax: Axes,
    table: pd.DataFrame,
    tasks: list[str],
    center: Literal["mean", "median"] = "mean",
    extremes: Literal["none", "worst", "both"] = "both",
) -> None:
    """The mean of the tasks and each of them; of many tasks their spread and the extreme ones instead."""
    table = table.ffill()  # a task without an episode since the last log
    by_task = table[[task for task in tasks if task in table]]
    if 1 < by_task.shape[1] < MAX_CURVES:
        for color, (name, values) in zip(CYCLE[1:], by_task.items()):
            ax.plot(values, color=color, lw=1, label=name)
    elif by_task.shape[1] > 1:
        low, high = by_task.quantile(0.1, axis=1), by_task.quantile(0.9, axis=1)
        ax.fill_between(table.index, low, high, color=SKY, alpha=0.35, lw=0, label="80 % of the tasks")
        last = by_task.iloc[-1]
        if extremes == "both":
            ax.plot(by_task[last.idxmax()], color=ORANGE, lw=1, label=f"{last.idxmax()}, highest at the end")
            ax.plot(by_task[last.idxmin()], color=GREEN, lw=1, label=f"{last.idxmin()}, lowest at the end")
        elif extremes == "worst":
            ax.plot(by_task.min(axis=1), color=ORANGE, lw=1, label="worst task at that step")
    several = by_task.shape[1] > 1
    values = by_task.median(axis=1) if several and center == "median" else table["mean"]
    ax.plot(values, color=BLUE, lw=2, label=center if several else None)
    if several:
        ax.legend(fontsize=7, loc="best")


def plot_returns(run: Run) -> Figure | None:
    """Return of every task in a panel of its own, and above them their mean."""
    return plot_episodes(run, "episodic_return", "return per episode", ".1f")


def plot_success(run: Run) -> Figure | None:
    """The same of the success rate, where the environment reports success."""
    return plot_episodes(run, "success_rate", "success rate", ".0%", limits=(-0.03, 1.03))


def plot_episodes(run: Run, name: str, label_y: str, digits: str, limits=None) -> Figure | None:
    """charts/NAME and eval/NAME of every task in a panel of its own, and above them their mean."""
    if not run.metrics(f"charts/{name}"):
        return None
    table = run.values(f"charts/{name}")
    evaluations = run.values(f"eval/{name}") if run.metrics(f"eval/{name}") else table[:0]
    tasks = run.tasks if len(run.tasks) > 1 else []
    columns = min(5, len(tasks)) or 1
    rows = math.ceil(len(tasks) / columns)
    figure = start_figure(run, max(7.0, 2.5 * columns), 3.4 + 1.7 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.9] + [1] * rows)
    top = figure.add_subplot(grid[0, :])
    draw_tasks(top, table, tasks, extremes="worst")
    finish_axes(top, run, "mean over tasks" if tasks else run.tasks[0])
    top.set_ylabel(label_y)
    low, high = table.stack().quantile([0.02, 1.0])  # an early crash shall not flatten all that follows
    if limits:
        top.set_ylim(*limits)
    elif table.min().min() < low - 0.25 * (high - low):
        top.set_ylim(low - 0.25 * (high - low), high + 0.05 * (high - low))
        top.text(0.01, 0.02, f"below the axes: down to {table.min().min():.0f}", transform=top.transAxes)
    panels = {"mean": top}
    for i, task in enumerate(tasks):
        panels[task] = ax = figure.add_subplot(grid[1 + i // columns, i % columns], sharex=top, sharey=top)
        ax.plot(table["mean"], color="0.75", lw=1)
        if task in table:
            ax.plot(table[task].dropna(), color=BLUE, lw=1.5)
        finish_axes(ax, run, task, label_x=False)
        ax.tick_params(labelbottom=i + columns >= len(tasks), labelleft=i % columns == 0)
    for panel, ax in panels.items() if len(evaluations) else ():
        values = evaluations[panel]
        label = "evaluations, deterministic actions"
        (marks,) = ax.plot(values, "D", color=BLACK, ms=3, clip_on=False, zorder=3)
        if run.finished:
            ax.plot(values.index[-1:], values[-1:], "D", color=BLACK, ms=5, clip_on=False, zorder=3)
            ax.set_title(f"{ax.get_title()}:  {values.iloc[-1]:{digits}}")
            label += f", the final one {values.iloc[-1]:{digits}}"
        if ax is top:
            marks.set_label(label)
            ax.legend(fontsize=8, loc="best")
    return figure


def plot_norms(run: Run) -> Figure | None:
    """Size of the residuals and of the shared weights, and the price of the residuals."""
    titles = {
        "mu_norm": r"$|\mu_m|$, residual means",
        "theta_norm": r"$|\theta|$, shared weights",
        "head_norm": "norm of a task's head",
        "embedding_norm": "norm of a task's embedding",
        "kl_loss": r"$\beta\,\mathrm{KL}_m / N_m$, in the loss",
        "kl_weight": r"$\beta / N_m$, weight of the KL",
        "lambda": r"$\lambda = \beta / (2 N_m \sigma_p^2)$, of $|\mu_m|^2$",
        "l2_loss": r"$\lambda\,|\mu_m|^2$, in the loss",
    }
    logged = {metric.split("/")[-1]: metric for metric in run.metrics()}
    tables = {name: run.values(logged[name]) for name in titles if name in logged}
    if not tables:
        return None
    bars = "mu_norm" in tables and len(run.tasks) > 1
    columns = min(3, len(tables) + bars)
    rows = math.ceil((len(tables) + bars) / columns)
    height = max(2.9, 0.17 * len(run.tasks)) if bars else 2.9
    figure = start_figure(run, 4.3 * columns, 0.5 + height * rows)
    for i, (name, table) in enumerate(tables.items()):
        ax = figure.add_subplot(rows, columns, i + 1)
        draw_tasks(ax, table, run.tasks)
        finish_axes(ax, run, titles[name])
        ax.set_ylim(0, 1.15 * table.max().max() or 1)  # 0: a single task's residual counts as theta
    if bars:
        ax = figure.add_subplot(rows, columns, rows * columns)
        ax.barh(run.tasks, tables["mu_norm"][run.tasks].iloc[-1], color=SKY)
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=7)
        ax.grid(visible=False, axis="y")
        ax.set_title(r"$|\mu_m|$ at the end")
    return figure


def layer_of(metric: str) -> str:
    """actor.0 of varshare/sharing_ratio/actor.0; older logs have actor_0."""
    return metric.rpartition("/")[2].replace("_", ".")


def by_network(layers: Iterable[str]) -> dict[str, list[str]]:
    """actor -> actor.0, actor.1, ..."""
    networks: dict[str, list[str]] = {}
    for layer in layers:
        networks.setdefault(layer.partition(".")[0], []).append(layer)
    return networks


def some_of(layers: list[str]) -> list[str]:
    """As many as there are colours, evenly spread."""
    return [layers[i] for i in sorted({round(x) for x in np.linspace(0, len(layers) - 1, MAX_CURVES)})]


def plot_sigma(run: Run) -> Figure | None:
    """Sigma among the live weights of the layers over time, and the share of those that are dead."""
    networks = by_network(metric.rpartition("/")[2] for metric in run.metrics("varshare/sigma_q50/"))
    if not networks:
        return None
    figure = start_figure(run, max(6.0, 4.0 * len(networks)), 6.4)
    axes = figure.subplots(2, len(networks), sharey="row", squeeze=False)
    for i, (network, layers) in enumerate(networks.items()):
        for color, layer in zip(CYCLE, some_of(layers)):
            low, middle, high = (run.values(f"varshare/sigma_q{q}/{layer}")["mean"] for q in (1, 50, 99))
            axes[0, i].fill_between(middle.index, low, high, color=color, alpha=0.12, lw=0)
            axes[0, i].plot(middle, color=color, lw=1.5, label=layer)
            axes[1, i].plot(run.values(f"varshare/dead/{layer}")["mean"], color=color, lw=1.5)
        finish_axes(axes[0, i], run, rf"{network}: $\sigma$ of live weights", label_x=False)
        finish_axes(axes[1, i], run, f"{network}: dead weights")
        axes[0, i].set_yscale("log")
        axes[0, i].legend(fontsize=8, loc="best")
    axes[0, 0].set_ylabel("median, and from 1 to 99 %")
    axes[1, 0].set_ylabel("share, mean over tasks")
    axes[1, 0].set_ylim(0, 1.02)
    return figure


def plot_sharing(run: Run) -> Figure | None:
    """Sharing ratio of the layers over time, and at the end for every task."""
    metrics = [metric for metric in run.metrics() if "/sharing_ratio/" in metric]
    if not metrics:
        return None
    layers = {layer_of(metric): run.values(metric) for metric in metrics}
    networks = by_network(layers)
    width = max(4.0 * len(networks), 3.0 + 0.5 * len(run.tasks))
    figure = start_figure(run, width, 5.4 + 0.3 * len(layers))
    grid = figure.add_gridspec(2, len(networks), height_ratios=[3.0, 1.8 + 0.3 * len(layers)])
    means = pd.DataFrame({name: table["mean"] for name, table in layers.items()})  # (step, layer)
    last = pd.DataFrame({name: table[run.tasks].iloc[-1] for name, table in layers.items()})
    last = last.T  # (layer, task)
    lowest = math.floor(10 * min(0.9, means.min().min())) / 10
    for i, (network, names) in enumerate(networks.items()):
        ax = figure.add_subplot(grid[0, i])
        for color, name in zip(CYCLE, some_of(names)):
            ax.plot(means[name], color=color, lw=1.5, label=name)
        finish_axes(ax, run, f"{network}, all tasks")
        ax.set_ylim(lowest, 1 + 0.02 * (1 - lowest))
        ax.legend(fontsize=8, loc="best")
        ax.set_ylabel("sharing ratio (1: fully shared)" if i == 0 else "")
    ax = figure.add_subplot(grid[1, :])
    lowest = math.floor(10 * min(0.9, last.min().min())) / 10
    image = ax.imshow(last, cmap="cividis", vmin=lowest, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(last.to_numpy()):
        color = "white" if value < (1 + lowest) / 2 else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(len(run.tasks)), run.tasks, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(last)), last.index)
    ax.grid(visible=False)
    ax.set_title("each task at the end")
    figure.colorbar(image, ax=ax, label=r"$|\theta|^2 / (|\theta|^2 + |\mu_m|^2)$", pad=0.01)
    return figure


def plot_losses(run: Run) -> Figure | None:
    """Everything logged as losses/*."""
    metrics = run.metrics("losses/")
    if not metrics:
        return None
    columns = min(4, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = start_figure(run, 3.3 * columns, 0.6 + 2.5 * rows)
    for i, metric in enumerate(metrics):
        ax, table = figure.add_subplot(rows, columns, i + 1), run.values(metric)
        # a solved task's returns hardly vary, so that of its explained variance only the median is of use
        draw_tasks(ax, table, run.tasks, center="median", extremes="none")
        finish_axes(ax, run, metric.removeprefix("losses/"), label_x=i + columns >= len(metrics))
        if metric == "losses/explained_variance":
            ax.set_ylim(max(-1.0, table.min().min()) - 0.05, 1.05)
        elif table["mean"].min() > 0 and table["mean"].max() > 100 * table["mean"].min():
            ax.set_yscale("log")
    return figure


PLOTS = {
    "returns": plot_returns,
    "success": plot_success,
    "norms": plot_norms,
    "sigma": plot_sigma,
    "sharing_ratio": plot_sharing,
    "losses": plot_losses,
}


def plot_run(run: Run) -> list[Path]:
    """Draw every plot that the run has logged something for; returns the files' paths."""
    folder, paths = run.folder / "plots", []
    folder.mkdir(exist_ok=True)
    with rc_context(STYLE):
        for name, plot in PLOTS.items():
            if figure := plot(run):
                paths.append(folder / f"{name}.png")
                figure.savefig(paths[-1])
    return paths


def plot_together(runs: list[Run]) -> Path | None:
    """Evaluations of several runs, mean over tasks, in compared.png beside the plots of the first.

    None of runs on different tasks, or that were not evaluated on the way.
    """
    if len({(run.config["args"]["env_id"], *run.tasks) for run in runs}) > 1:
        return None
    curves = [
        run.values("eval/episodic_return")["mean"] if run.metrics("eval/episodic_return") else []
        for run in runs
    ]
    if min(map(len, curves)) < 2:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        ax = figure.subplots()
        for run, curve, color in zip(runs, curves, CYCLE * len(runs)):
            ax.plot(curve, color=color, lw=1.8, marker=".", ms=4, label=run.folder.name)
        finish_axes(
            ax,
            max(runs, key=lambda run: run.config["args"]["total_timesteps"]),
            "evaluation, mean over tasks",
        )
        ax.set_ylabel("return per episode")
        ax.legend(fontsize=8, loc="best")
        figure.suptitle(runs[0].config["args"]["env_id"], fontsize=11)
        path = runs[0].folder / "plots/compared.png"
        figure.savefig(path)
    return path
