"""Figures of single runs: plots/ in their folders."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.collect import EVALUATION, SHARING, Run
from bench.figures import heat
from bench.style import BLACK, BLUE, CYCLE, GREEN, MAX_CURVES, ORANGE, SKY, STYLE, label_steps


def start_figure(run: Run, width: float, height: float) -> Figure:
    """An empty figure under the run's title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(run.title, fontsize=11)
    return figure


def finish_axes(ax: Axes, run: Run, title: str, label_y: str = "") -> None:
    """What all axes over time have: a title, labels, and steps up to the run's total."""
    ax.set(title=title, xlim=(0, run.config["args"]["total_timesteps"]), ylabel=label_y)
    label_steps(ax)


def draw_tasks(ax: Axes, table: pd.DataFrame, tasks: list[str]) -> None:
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
        ax.plot(by_task[last.idxmax()], color=ORANGE, lw=1, label=f"{last.idxmax()}, highest at the end")
        ax.plot(by_task[last.idxmin()], color=GREEN, lw=1, label=f"{last.idxmin()}, lowest at the end")
    several = by_task.shape[1] > 1
    ax.plot(table["mean"], color=BLUE, lw=2, label="mean" if several else None)
    if several:
        ax.legend(fontsize=7, loc="best")


def plot_episodes(run: Run, name: str, label_y: str) -> Figure | None:
    """charts/NAME and eval/NAME: first the mean over tasks, then every task, each in a panel of its own."""
    if not run.metrics(f"charts/{name}"):
        return None
    training = run.values(f"charts/{name}")
    evaluated = run.values(f"eval/{name}") if run.metrics(f"eval/{name}") else training[:0]
    panels = [x for x in ("mean", *run.tasks) if x in training]
    panels = panels if len(run.tasks) > 1 else ["mean"]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = start_figure(run, max(6.0, 3.0 * columns), 0.6 + 2.2 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for ax, panel in zip(axes, panels):
        ax.plot(training["mean"], color="0.75", lw=1)
        ax.plot(training[panel].dropna(), color=BLUE, lw=1.5, label="training, with exploration")
        title = "mean over tasks" if panel == "mean" else panel
        if len(evaluated):
            ax.plot(evaluated[panel], "D", color=BLACK, ms=4, label="evaluation, deterministic actions")
            title += f": {evaluated[panel].iloc[-1]:.4g}" if run.finished else ""
        finish_axes(ax, run, title)
    for i, ax in enumerate(figure.axes):
        ax.set_visible(i < len(panels))
        ax.set_xlabel(ax.get_xlabel() if i >= len(panels) - columns else "")
    figure.supylabel(label_y, fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    lowest, low = training.min().min(), training.stack().quantile(0.02)
    if lowest < low - 0.25 * (
        training.max().max() - low
    ):  # an early crash shall not flatten all that follows
        axes[0].set_ylim(bottom=low - 0.25 * (training.max().max() - low))
    return figure


plot_returns = partial(plot_episodes, name="episodic_return", label_y="return per episode")
plot_success = partial(plot_episodes, name="success_rate", label_y="success rate")


def plot_panels(run: Run, titles: dict[str, str]) -> Figure | None:
    """A panel for each of these metrics that the run has logged."""
    metrics = [metric for metric in titles if metric in run.metrics()]
    if not metrics:
        return None
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = start_figure(run, max(6.0, 4.3 * columns), 0.6 + 2.9 * rows)
    for i, metric in enumerate(metrics):
        ax = figure.add_subplot(rows, columns, i + 1)
        draw_tasks(ax, run.values(metric), run.tasks)
        finish_axes(ax, run, metric, titles[metric])
    return figure


def plot_norms(run: Run) -> Figure | None:
    """Size of the residuals and of the shared weights, and the price of the residuals."""
    titles = {
        "varshare/mu_norm": r"$|\mu_m|$, residual means",
        "varshare/theta_norm": r"$|\theta|$, shared weights",
        "varshare/head_norm": "norm of a task's head",
        "varshare/embedding_norm": "norm of a task's embedding",
        "varshare/kl_loss": r"$\beta\,\mathrm{KL}_m / N_m$, in the loss",
        "varshare/kl_weight": r"$\beta / N_m$, weight of the KL",
        "varshare/lambda": r"$\lambda = \beta / (2 N_m \sigma_p^2)$, of $|\mu_m|^2$",
        "varshare/l2_loss": r"$\lambda\,|\mu_m|^2$, in the loss",
    }
    return plot_panels(run, titles)


def plot_losses(run: Run) -> Figure | None:
    """Everything logged as losses/*."""
    figure = plot_panels(run, {metric: metric.partition("/")[2] for metric in run.metrics("losses/")})
    for ax in figure.axes if figure else ():
        if ax.get_title() == "losses/explained_variance":  # of a solved task, whose returns hardly vary
            ax.set_ylim(max(-1.0, ax.get_ylim()[0]), 1.05)
    return figure


def by_network(run: Run, prefix: str) -> dict[str, list[str]]:
    """actor -> actor.0, actor.1, ... of the layers whose metrics begin so; as many as there are colours."""
    networks: dict[str, list[str]] = {}
    for layer in (metric.removeprefix(prefix) for metric in run.metrics(prefix)):
        networks.setdefault(layer.partition(".")[0], []).append(layer)
    for network, names in networks.items():
        chosen = sorted({round(i) for i in np.linspace(0, len(names) - 1, MAX_CURVES)})
        networks[network] = [names[i] for i in chosen]
    return networks


def draw_layers(ax: Axes, run: Run, prefix: str, layers: list[str], label_y: str) -> None:
    """A metric of layers, mean over tasks."""
    for color, layer in zip(CYCLE, layers):
        ax.plot(run.values(prefix + layer)["mean"], color=color, lw=1.5, label=layer)
    finish_axes(ax, run, layers[0].partition(".")[0], label_y)
    ax.legend(fontsize=8, loc="best")


def plot_sigma(run: Run) -> Figure | None:
    """Sigma among the live weights of the layers over time, and the share of those that are dead."""
    median = "varshare/sigma_q50/"
    networks = by_network(run, median)
    if not networks:
        return None
    figure = start_figure(run, max(6.0, 4.0 * len(networks)), 6.4)
    axes = figure.subplots(2, len(networks), sharey="row", squeeze=False)
    for (above, below), layers in zip(axes.T, networks.values()):
        draw_layers(above, run, median, layers, r"$\sigma$ of live weights: median, 1 to 99 %")
        for color, layer in zip(CYCLE, layers):
            low, high = (run.values(f"varshare/sigma_q{q}/{layer}")["mean"] for q in (1, 99))
            above.fill_between(low.index, low, high, color=color, alpha=0.12, lw=0)
        above.set_yscale("log")
        draw_layers(below, run, "varshare/dead/", layers, "share of dead weights")
    return figure


def plot_sharing(run: Run) -> Figure | None:
    """Sharing ratio of the layers over time, and at the end for every task."""
    networks, layers = by_network(run, SHARING), run.metrics(SHARING)
    if not networks:
        return None
    height = 1.8 + 0.3 * len(layers)
    figure = start_figure(run, max(4.0 * len(networks), 3.0 + 0.5 * len(run.tasks)), 3.6 + height)
    grid = figure.add_gridspec(2, len(networks), height_ratios=[3.0, height])
    for i, names in enumerate(networks.values()):
        draw_layers(figure.add_subplot(grid[0, i]), run, SHARING, names, "sharing ratio (1: fully shared)")
    last = {name.removeprefix(SHARING): run.values(name)[run.tasks].iloc[-1] for name in layers}
    table = pd.DataFrame(last).T  # (layer, task)
    ax = figure.add_subplot(grid[1, :])
    heat(ax, table, table.min().min(), 1.0, ".2f")
    ax.set(title="each task at the end", ylabel="layer")
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

    None of runs on different tasks, or if they were not evaluated on the way.
    """
    same_tasks = len({(run.config["args"]["env_id"], *run.tasks) for run in runs}) == 1
    if not same_tasks or not all(run.metrics(EVALUATION) for run in runs):
        return None
    curves = [run.values(EVALUATION)["mean"] for run in runs]
    if min(map(len, curves)) < 2:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        ax = figure.subplots()
        for run, curve, color in zip(runs, curves, CYCLE * len(runs)):
            ax.plot(curve, color=color, lw=1.8, marker=".", ms=4, label=run.folder.name)
        ax.set(title=runs[0].config["args"]["env_id"], ylabel="return of the evaluation, mean over tasks")
        label_steps(ax)
        ax.legend(fontsize=8, loc="best")
        path = runs[0].folder / "plots/compared.png"
        figure.savefig(path)
    return path
