"""Figures and tables from run folders.

    python report.py runs/NAME [runs/NAME2 ...]   plots of single runs -> runs/NAME/plots/
    python report.py runs/latest                  of the newest
    python report.py results/suites/NAME          table and figures of a suite, from its committed CSVs

Of a run: returns.png, success.png, norms.png, sigma.png, sharing_ratio.png, losses.png. What it has not
logged is left out, and a run that is not finished is drawn as far as it went.

Several runs on the same tasks are compared too, grouped by script and settings, over seeds: a table, and
compared.png beside the plots of the first, of evaluations on the way (--eval-interval) or without these of
training. Of a suite: table.md, curves.png, tasks.png, sharing.png and variants.png. Intervals and verdicts
are those of bench/statistics.py. A suite's method is what --exp-name says.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.collect import SHARING, Run, read_run
from bench.compare import write_comparison
from bench.figures import BLUE, CYCLE, GREEN, MAX_CURVES, ORANGE, SKY, STYLE, heat, label_steps, write_suite
from bench.methods import fail

NORMS = {  # what single methods log, such as a weight that is on a schedule, is drawn if it is there
    "varshare/mu_norm": r"$|\mu_m|$, residual means",
    "varshare/theta_norm": r"$|\theta|$, shared weights",
    "varshare/head_norm": "norm of a task's head",
    "varshare/embedding_norm": "norm of a task's embedding",
    "varshare/kl_loss": r"$\beta\,\mathrm{KL}_m / N_m$, in the loss",
    "varshare/kl_weight": r"$\beta / N_m$, weight of the KL",
    "varshare/lambda": r"$\lambda = \beta / (2 N_m \sigma_p^2)$, of $|\mu_m|^2$",
    "varshare/l2_loss": r"$\lambda\,|\mu_m|^2$, in the loss",
}


def start_figure(run: Run, width: float, height: float) -> Figure:
    """An empty figure; its title says which run it is of, and how far that went if it is not finished."""
    args, step = run.config["args"], run.log["global_step"].max()
    title = f"{run.folder.name}:  {run.config['script']} on {args['env_id']}, seed {args['seed']}"
    if not run.finished:
        title += f"  (not finished: {step:,} of {args['total_timesteps']:,} steps)"
    figure = Figure(figsize=(max(6.0, width), height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def finish_axes(ax: Axes, run: Run, title: str, label_y: str = "") -> None:
    """What all axes over time have: a title, labels, and steps up to the run's total."""
    ax.set(title=title, xlim=(0, run.config["args"]["total_timesteps"]), ylabel=label_y)
    label_steps(ax)


def plot_episodes(run: Run, name: str, label_y: str) -> Figure | None:
    """charts/NAME and eval/NAME: the mean over tasks, then every task in a panel of its own."""
    training = run.values(f"charts/{name}")
    evaluated = run.values(f"eval/{name}")
    if training.empty:
        return None
    panels = ["mean"]
    if len(run.tasks) > 1:
        panels += [task for task in run.tasks if task in training]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = start_figure(run, 3.0 * columns, 0.6 + 2.2 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for ax, panel in zip(axes, panels):
        ax.plot(training["mean"], color="0.75", lw=1)
        ax.plot(training[panel].dropna(), color=BLUE, lw=1.5, label="training, with exploration")
        title = "mean over tasks" if panel == "mean" else panel
        if len(evaluated):
            ax.plot(evaluated[panel], "D", color="black", ms=4, label="evaluation, deterministic actions")
            title += f": {evaluated[panel].iloc[-1]:.4g}" if run.finished else ""
        finish_axes(ax, run, title)
    for ax in axes[: len(panels) - columns]:
        ax.set_xlabel("")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.supylabel(label_y, fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    low, high = training.stack().quantile(0.02), training.max().max()
    floor = low - 0.25 * (high - low)
    if training.min().min() < floor:  # an early crash shall not flatten all that follows
        axes[0].set_ylim(bottom=floor)
    return figure


def plot_returns(run: Run) -> Figure | None:
    """Returns of training and evaluation."""
    return plot_episodes(run, "episodic_return", "return per episode")


def plot_success(run: Run) -> Figure | None:
    """Shares of episodes with success, if the environments report it."""
    return plot_episodes(run, "success_rate", "success rate")


def draw_tasks(ax: Axes, values: pd.DataFrame) -> None:
    """The mean of the tasks and each of them; of many tasks their spread and the extreme ones instead."""
    values = values.ffill()  # a task without an episode since the last log
    by_task = values.drop(columns="mean")
    number = by_task.shape[1]
    if 1 < number < MAX_CURVES:
        for color, (name, x) in zip(CYCLE[1:], by_task.items()):
            ax.plot(x, color=color, lw=1, label=name)
    elif number > 1:
        low, high = by_task.quantile(0.1, axis=1), by_task.quantile(0.9, axis=1)
        ax.fill_between(values.index, low, high, color=SKY, alpha=0.35, lw=0, label="80 % of the tasks")
        highest, lowest = by_task.iloc[-1].idxmax(), by_task.iloc[-1].idxmin()
        ax.plot(by_task[highest], color=ORANGE, lw=1, label=f"{highest}, highest at the end")
        ax.plot(by_task[lowest], color=GREEN, lw=1, label=f"{lowest}, lowest at the end")
    ax.plot(values["mean"], color=BLUE, lw=2, label="mean")
    if number > 1:
        ax.legend(fontsize=7, loc="best")


def plot_panels(run: Run, titles: dict[str, str]) -> Figure | None:
    """A panel for each of these metrics that the run has logged."""
    metrics = [metric for metric in titles if metric in run.metrics()]
    if not metrics:
        return None
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = start_figure(run, 4.3 * columns, 0.6 + 2.9 * rows)
    for i, metric in enumerate(metrics, 1):
        ax = figure.add_subplot(rows, columns, i)
        draw_tasks(ax, run.values(metric))
        finish_axes(ax, run, metric, titles[metric])
    return figure


def plot_norms(run: Run) -> Figure | None:
    """Size of the residuals and of the shared weights, and the price of the residuals."""
    return plot_panels(run, NORMS)


def plot_losses(run: Run) -> Figure | None:
    """Everything logged as losses/*."""
    figure = plot_panels(run, {metric: metric.partition("/")[2] for metric in run.metrics("losses/")})
    for ax in figure.axes if figure else ():
        if ax.get_title() == "losses/explained_variance":  # of a solved task, whose returns hardly vary
            ax.set_ylim(max(-1.0, ax.get_ylim()[0]), 1.05)
    return figure


def by_network(run: Run, prefix: str) -> list[list[str]]:
    """For actor and critic the layers whose metrics begin so; as many as there are colours."""
    networks: dict[str, list[str]] = {}
    for metric in run.metrics(prefix):
        layer = metric.removeprefix(prefix)
        networks.setdefault(layer.partition(".")[0], []).append(layer)
    chosen = []
    for layers in networks.values():
        places = np.linspace(0, len(layers) - 1, MAX_CURVES)
        chosen.append([layers[i] for i in sorted({round(x) for x in places})])
    return chosen


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
    figure = start_figure(run, 4.0 * len(networks), 6.4)
    axes = figure.subplots(2, len(networks), sharey="row", squeeze=False)
    for above, below, layers in zip(*axes, networks):
        draw_layers(above, run, median, layers, r"$\sigma$ of live weights: median, 1 to 99 %")
        for color, layer in zip(CYCLE, layers):
            low = run.values(f"varshare/sigma_q1/{layer}")["mean"]
            high = run.values(f"varshare/sigma_q99/{layer}")["mean"]
            above.fill_between(low.index, low, high, color=color, alpha=0.12, lw=0)
        above.set_yscale("log")
        draw_layers(below, run, "varshare/dead/", layers, "share of dead weights")
    return figure


def plot_sharing(run: Run) -> Figure | None:
    """Sharing ratio of the layers over time, and at the end for every task."""
    networks, metrics = by_network(run, SHARING), run.metrics(SHARING)
    if not networks:
        return None
    width = max(4.0 * len(networks), 3.0 + 0.5 * len(run.tasks))
    height = 1.8 + 0.3 * len(metrics)
    figure = start_figure(run, width, 3.6 + height)
    grid = figure.add_gridspec(2, len(networks), height_ratios=[3.0, height])
    for i, layers in enumerate(networks):
        ax = figure.add_subplot(grid[0, i])
        draw_layers(ax, run, SHARING, layers, "sharing ratio (1: fully shared)")
    last = {metric.removeprefix(SHARING): run.values(metric)[run.tasks].iloc[-1] for metric in metrics}
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
    for name, plot in PLOTS.items():
        if figure := plot(run):
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def main(folders: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Draw the plots of runs, or make the report of a suite.

    Args:
        folders: runs/NAME, one or more; or results/suites/NAME
    """
    if not folders:
        fail("name one or more folders of runs: python report.py runs/NAME")
    if len(folders) == 1 and (folders[0] / "configs.csv").exists():
        print(write_suite(folders[0]))
        return
    runs = [read_run(folder) for folder in folders]
    with rc_context(STYLE):
        paths = [path for run in runs for path in plot_run(run)]
    print(*paths, sep="\n")
    if len(runs) > 1:
        print(runs[0].folder / "plots/compared.png")
        print(write_comparison(runs, runs[0].folder / "plots"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
