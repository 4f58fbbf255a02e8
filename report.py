"""Figures and tables from run folders.

    python report.py runs/NAME [runs/NAME2 ...]   plots of single runs -> runs/NAME/plots/
    python report.py runs/latest                  of the newest
    python report.py results/suites/NAME          table and figures of a suite, from its committed CSVs

Of a run: returns.png, success.png, norms.png, sigma.png, sharing_ratio.png, losses.png, task_map.png. What it
has not logged is left out, and a run that is not finished is drawn as far as it went. task_map.png is of the
saved model: how tasks lie to each other, by their residuals or embeddings.

Several runs on the same tasks are compared too, grouped by script and settings, over seeds: a table, and
compared.png beside the plots of the first, of evaluations on the way (--eval-interval) or without these of
training. Of a suite: table.md, curves.png, tasks.png, variants.png, and sharing_METHOD.png of every method
with residuals. Intervals and verdicts are those of bench/statistics.py. A suite's method is what --exp-name
says.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure

from bench.collect import (
    SHARING,
    Run,
    cosines,
    hidden_parameter,
    principal_components,
    read_run,
    task_vectors,
)
from bench.compare import write_comparison
from bench.figures import (
    BLUE,
    CYCLE,
    GREEN,
    MAX_CURVES,
    ORANGE,
    SKY,
    STYLE,
    add_legend,
    begin_at,
    bounds_of,
    heat,
    label_steps,
    make_panels,
    own_share,
    start_figure,
    write_suite,
)
from bench.methods import fail

MAX_NAMES = 20  # tasks whose names can be read in a map
NORMS = {  # what single methods log, such as a weight that is on a schedule, is drawn if it is there
    "varshare/mu_norm": r"$|\mu_m|$, residual means",
    "varshare/theta_norm": r"$|\theta|$, shared weights",
    "varshare/head_norm": "norm of a task's head",
    "varshare/embedding_norm": "norm of a task's embedding",
    "varshare/kl_loss": r"$\beta\,\mathrm{KL}_m / N_m$, in the loss",
    "varshare/kl_weight": r"$\beta / N_m$, weight of the KL",
    "varshare/lambda": r"$\lambda = \beta / (2 N_m \sigma_p^2)$, of $|\mu_m|^2$",
    "varshare/l2_loss": r"penalty of $|\mu_m|^2$, in the loss",
}


def start(run: Run, height: float) -> Figure:
    """An empty figure; its title says which run it is of, and how far that went if it is not finished."""
    args, step = run.config["args"], run.log["global_step"].max()
    title = f"{run.folder.name}\n{run.config['script']} on {args['env_id']}, seed {args['seed']}"
    if not run.finished:
        title += f"  (not finished: {step:,} of {args['total_timesteps']:,} steps)"
    return start_figure(title, height)


def finish_axes(ax: Axes, run: Run, title: str, label_y: str = "") -> None:
    """What all axes over time have: a title, labels, and steps up to the run's total."""
    ax.set(title=title, ylabel=label_y)
    label_steps(ax)
    ax.set_xlim(0, run.config["args"]["total_timesteps"])


def plot_episodes(run: Run, name: str, label_y: str, bounds: tuple[float, float]) -> Figure | None:
    """charts/NAME and eval/NAME: the mean over tasks, then every task in a panel of its own."""
    training = run.values(f"charts/{name}")
    evaluated = run.values(f"eval/{name}")
    if training.empty:
        return None
    panels = ["mean"]
    if len(run.tasks) > 1:
        panels += [task for task in run.tasks if task in training]
    figure = start(run, 1.0 + 1.7 * math.ceil(len(panels) / 4))
    axes = make_panels(figure, len(panels), 4, sharex=True, sharey=True)
    for ax, panel in zip(axes, panels):
        title = panel
        if panel == "mean":
            title = "mean over tasks" if len(run.tasks) > 1 else run.tasks[0]
        else:
            ax.plot(training["mean"], color="0.75", lw=1, label="mean over tasks")
        ax.plot(training[panel].dropna(), color=BLUE, lw=1.5, label="training, with exploration")
        if len(evaluated):
            ax.plot(evaluated[panel], "D", color="black", ms=4, label="evaluation, deterministic actions")
            title += f": {evaluated[panel].iloc[-1]:.4g}" if run.finished else ""
        finish_axes(ax, run, title)
    figure.supylabel(label_y)
    add_legend(figure)
    low, high = training.stack().quantile(0.02), training.max().max()
    floor = low - 0.25 * (high - low)
    if training.min().min() < floor:  # an early crash shall not flatten all that follows
        begin_at(axes[0], floor)
    begin_at(axes[0], bounds[0])
    return figure


def plot_returns(run: Run) -> Figure | None:
    """Returns of training and evaluation."""
    bounds = bounds_of(run.config["args"]["env_id"])
    return plot_episodes(run, "episodic_return", "return per episode", bounds)


def plot_success(run: Run) -> Figure | None:
    """Shares of episodes with success, if the environments report it."""
    return plot_episodes(run, "success_rate", "share of episodes with success", (0.0, 1.0))


def draw_tasks(ax: Axes, values: pd.DataFrame) -> str:
    """The mean of the tasks and each of them; of many tasks their spread and the extreme ones instead.

    Returns which ones these are.
    """
    values = values.ffill()  # a task without an episode since the last log
    by_task, extremes = values.drop(columns="mean"), ""
    number = by_task.shape[1]
    if 1 < number < MAX_CURVES:
        for color, (name, x) in zip(CYCLE[1:], by_task.items()):
            ax.plot(x, color=color, lw=1, label=name)
    elif number > 1:
        low, high = by_task.quantile(0.1, axis=1), by_task.quantile(0.9, axis=1)
        ax.fill_between(values.index, low, high, color=SKY, alpha=0.35, lw=0, label="80 % of the tasks")
        highest, lowest = by_task.iloc[-1].idxmax(), by_task.iloc[-1].idxmin()
        ax.plot(by_task[highest], color=ORANGE, lw=1, label="highest at the end")
        ax.plot(by_task[lowest], color=GREEN, lw=1, label="lowest at the end")
        extremes = f"\nhighest: {highest}\nlowest: {lowest}"
    ax.plot(values["mean"], color=BLUE, lw=2, label="mean over tasks, or one for all")
    return extremes


def plot_panels(run: Run, titles: dict[str, str]) -> Figure | None:
    """A panel for each of these metrics that the run has logged."""
    metrics = [metric for metric in titles if metric in run.metrics()]
    if not metrics:
        return None
    figure = start(run, 1.0 + 2.2 * math.ceil(len(metrics) / 3))
    for ax, metric in zip(make_panels(figure, len(metrics), 3), metrics):
        extremes = draw_tasks(ax, run.values(metric))
        finish_axes(ax, run, metric, titles[metric])
        ax.set_title(metric + extremes, fontsize=7)
    add_legend(figure)
    return figure


def plot_norms(run: Run) -> Figure | None:
    """Size of the residuals and of the shared weights, and the price of the residuals."""
    return plot_panels(run, NORMS)


def plot_losses(run: Run) -> Figure | None:
    """Everything logged as losses/*."""
    figure = plot_panels(run, {metric: metric.partition("/")[2] for metric in run.metrics("losses/")})
    for ax in figure.axes if figure else ():
        if ax.get_title().startswith("losses/explained_variance"):  # low where returns hardly vary
            ax.set_ylim(max(-1.0, ax.get_ylim()[0]), 1.05)
    return figure


def by_network(run: Run, prefix: str) -> dict[str, dict[str, str]]:
    """Network -> layer in it -> metric that begins so; as many layers of all as there are colours."""
    networks: dict[str, dict[str, str]] = {}
    for metric in run.metrics(prefix):
        network, _, layer = metric.removeprefix(prefix).partition(".")
        networks.setdefault(network, {})[f"layer {layer}" if layer else network] = metric
    every = list(dict.fromkeys(layer for layers in networks.values() for layer in layers))
    places = np.linspace(0, len(every) - 1, min(len(every), MAX_CURVES))
    chosen = {every[round(place)] for place in places}
    return {net: {x: layers[x] for x in layers if x in chosen} for net, layers in networks.items()}


def layer_colors(networks: dict[str, dict[str, str]]) -> dict[str, str]:
    """A colour for each layer, the same in all networks."""
    return dict(zip(dict.fromkeys(layer for layers in networks.values() for layer in layers), CYCLE))


def draw_prior(ax: Axes, run: Run, layers: dict[str, str], colors: dict[str, str]) -> None:
    """sigma_prior of these layers over time; nothing where it is not that of single weights."""
    args, style = run.config["args"], {"ls": ":", "lw": 1.2}
    learned = {x: run.values(layers[x].replace("sigma_q50", "sigma_prior") + ".weight") for x in layers}
    scheduled = run.values("varshare/sigma_prior")
    if any(map(len, learned.values())):
        for layer, prior in learned.items():
            ax.plot(prior["mean"], color=colors[layer], label="learned prior, of the weights", **style)
    elif len(scheduled):
        ax.plot(scheduled["mean"], color="black", label="prior", **style)
    elif "sigma_prior" in args and "rank" not in args:  # low rank: sigma is that of factors
        ax.axhline(args["sigma_prior"], color="black", label="prior", **style)


def plot_sigma(run: Run) -> Figure | None:
    """Sigma among the live weights of the layers over time, and the share of those that are dead."""
    networks = by_network(run, "varshare/sigma_q50/")
    if not networks:
        return None
    colors = layer_colors(networks)
    figure = start(run, 5.6)
    axes = figure.subplots(2, len(networks), sharex=True, sharey="row", squeeze=False)
    for above, below, (network, layers) in zip(*axes, networks.items()):
        for layer, metric in layers.items():
            low, median, high = (run.values(metric.replace("q50", q))["mean"] for q in ("q1", "q50", "q99"))
            above.plot(median, color=colors[layer], lw=1.5, label=layer)
            above.fill_between(low.index, low, high, color=colors[layer], alpha=0.12, lw=0)
            dead = run.values(metric.replace("sigma_q50", "dead"))["mean"]
            below.plot(dead, color=colors[layer], lw=1.5, label=layer)
        draw_prior(above, run, layers, colors)
        above.set_yscale("log")
        finish_axes(above, run, f"{network}: median, and 1 to 99 %")
        finish_axes(below, run, network)
    axes[0, 0].set_ylabel(r"$\sigma$ of live weights")
    axes[1, 0].set_ylabel("share of dead weights")
    begin_at(axes[1, 0], 0.0)
    add_legend(figure, columns=6)
    return figure


def plot_sharing(run: Run) -> Figure | None:
    """The residuals' share of the layers' squared norms over time, and at the end for every task.

    One task shares nothing: its residuals are what all have in common.
    """
    networks, metrics = by_network(run, SHARING), run.metrics(SHARING)
    if not networks or len(run.tasks) < 2:
        return None
    colors, height = layer_colors(networks), 1.2 + 0.24 * len(metrics)
    figure = start(run, 3.6 + height)
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, height])
    axes = above.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for ax, (network, layers) in zip(axes, networks.items()):
        for layer, metric in layers.items():
            ax.plot(10 ** own_share(run.values(metric)["mean"]), color=colors[layer], lw=1.5, label=layer)
        ax.set_yscale("log")
        finish_axes(ax, run, f"{network}: the residuals' share")
    axes[0].set_ylabel("1 - sharing ratio")
    add_legend(above)
    last = {metric.removeprefix(SHARING): run.values(metric)[run.tasks].iloc[-1] for metric in metrics}
    table = own_share(pd.DataFrame(last).T)  # (layer, task)
    ax = below.subplots()
    scale = Normalize(table.min().min(), table.max().max())
    heat(ax, table, scale, "cividis", ".1f", r"$\log_{10}$ of the share")
    ax.set(title="each task at the end", ylabel="layer")
    return figure


def draw_components(ax: Axes, places: np.ndarray, hidden: pd.Series | None, labels: list[str]) -> None:
    """A dot for each task at its first two components (task, 2), in the colour of its parameter (task,)."""
    color = {"c": BLUE} if hidden is None else {"c": hidden, "cmap": "cividis"}
    dots = ax.scatter(*places.T, s=30, **color)
    if hidden is not None:
        ax.figure.colorbar(dots, ax=ax, pad=0.01, label=hidden.name)
    outwards = 9 * places / np.linalg.norm(places, axis=1, keepdims=True)
    style = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7}
    for label, place, offset in zip(labels, places, outwards):
        ax.annotate(label, place, offset, **style)
    ax.margins(0.12)


def plot_task_map(run: Run) -> Figure | None:
    """Of three tasks or more, what each has of its own: its principal components, and its cosines.

    Dots have the numbers of the map's rows, which have names, if there are few enough to be read.
    """
    if len(run.tasks) < 3 or not (run.folder / "model.pt").exists():
        return None
    try:
        vectors = task_vectors(run)
    except ValueError:  # low rank, and its environments cannot be built on this machine
        return None
    if vectors is None:
        return None
    places, shares = principal_components(vectors)
    order = places[:, 0].argsort()
    places, params = places[order], [run.config["task_params"][i] for i in order]
    rows, labels = [[""] * len(order)] * 2
    if len(order) <= MAX_NAMES:
        labels = [str(i + 1) for i in range(len(order))]
        rows = [f"{run.tasks[i]}  {label}" for i, label in zip(order, labels)]
    figure = start(run, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4), gridspec_kw={"wspace": 0.08})
    draw_components(left, places, hidden_parameter(params, places[:, 0]), labels)
    axes = [f"component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1)]
    left.set(title="principal components", xlabel=axes[0], ylabel=axes[1])
    matrix = cosines(vectors[order])
    np.fill_diagonal(matrix, np.nan)
    unrelated = -1 / (len(order) - 1)
    scale = CenteredNorm(unrelated, np.nanmax(np.abs(matrix - unrelated)))
    table = pd.DataFrame(matrix, rows, labels)
    heat(right, table, scale, "RdBu_r", ".1f", f"cosine (unrelated: {unrelated:.2f})")
    for number in right.texts:
        number.set_fontsize(7)
    right.tick_params(length=0)
    right.set_xticks(right.get_xticks(), labels, rotation=0, ha="center")
    right.set(title="cosine of two tasks", xlabel="task, by component 1", ylabel="task")
    return figure


PLOTS = {
    "returns": plot_returns,
    "success": plot_success,
    "norms": plot_norms,
    "sigma": plot_sigma,
    "sharing_ratio": plot_sharing,
    "losses": plot_losses,
    "task_map": plot_task_map,
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
