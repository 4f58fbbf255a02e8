"""How figures look, the figures of a suite, and its report: table and figures from its CSVs."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bench.collect import SHARING
from bench.methods import METHODS, title_of
from bench.statistics import BLIND, mean_interval
from bench.tables import Result, best_first, make_table, provenance

# Okabe and Ito's palette, told apart with any kind of colour vision
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
GREY = "#808080"
MAX_CURVES = len(CYCLE)  # in one pair of axes
STYLE = {  # for matplotlib.rc_context
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "savefig.dpi": 130,
}
FEW = 3  # of fewer runs Student's t makes an interval that covers a figure
PORTFOLIO = ("reptile", "lora", "variant")  # families of variants, which have a figure of their own


def color_of(method: str) -> str:
    """One colour per method in every figure; a variant by flags has that of its method."""
    return METHODS[method].color if method in METHODS else GREY


def label_steps(ax: Axes) -> None:
    """The axis of environment steps."""
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("environment steps, all tasks together")


def draw_curve(ax: Axes, x: Iterable[float], values: pd.DataFrame, label: str, color: str, line="-") -> None:
    """Mean over runs and its 95 % interval, of (run, step); below `FEW` runs the runs themselves."""
    mean, low, high = zip(*(mean_interval(values[step]) for step in values))
    ax.plot(x, mean, line, color=color, lw=1.8, label=label)
    if len(values) < FEW:
        ax.plot(x, values.to_numpy().T, color=color, lw=0.8, alpha=0.6)
    else:
        ax.fill_between(x, low, high, color=color, alpha=0.13, lw=0)


def draw_method(ax: Axes, method: str, values: pd.DataFrame, x: Iterable[float] | None = None) -> None:
    """The same in the method's colour, by default over steps; dashed if it is a variant by flags."""
    dashed = method in METHODS and METHODS[method].variant
    line = ":" if method == BLIND else "--" if dashed else "-"
    x = values.columns if x is None else x
    draw_curve(ax, x, values, title_of(method), color_of(method), line)


def draw_ceiling(ax: Axes, highest: float | None) -> None:
    """What the tasks allow, if that is known."""
    if highest is not None:
        ax.axhline(highest, color="0.6", lw=1, ls=":", label="what the tasks allow")


def of_families(x: Result, *families: str) -> list[str]:
    """Methods of these families, in the order of methods.csv."""
    return [m for m in x.by_method if m in METHODS and METHODS[m].family in families]


def compared(x: Result) -> list[str]:
    """Methods that are no variants of VarShare's."""
    return [m for m in x.by_method if m not in of_families(x, *PORTFOLIO)]


def with_residuals(x: Result) -> list[str]:
    """Those among them that have residuals."""
    ratio = x.runs[x.runs.metric == "residual/ratio"]
    return [m for m in compared(x) if m in set(ratio.method)]


def plot_evaluations(x: Result, panels: dict[str, list[str]]) -> Figure:
    """Evaluations on the way, a panel for each list of methods."""
    figure = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    few = x.runs.groupby("method").seed.nunique().min() < FEW
    heading = f"{x.title}: {'thin lines are runs' if few else '95 % intervals over runs'}"
    figure.suptitle(heading, fontsize=11 if len(panels) > 1 else 9, wrap=True)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (title, methods) in zip(axes, panels.items()):
        for method in methods:
            draw_method(ax, method, x.by_method[method].curve)
        draw_ceiling(ax, x.ceiling)
        ax.set_title(title)
        label_steps(ax)
        ax.legend(fontsize=8, loc="best")
    axes[0].set_ylabel(f"{'success in %' if x.by_success else 'return'} of the evaluation, mean over tasks")
    if x.by_success:
        axes[0].set_ylim(-3, 103)  # intervals of few runs reach beyond what is possible
    return figure


def plot_curves(x: Result) -> Figure | None:
    """Evaluations of the methods with residuals; and of the others, with the best of the first."""
    residual = with_residuals(x)
    others = [m for m in compared(x) if m not in residual]
    if not (residual and others):
        return plot_evaluations(x, {"": compared(x)}) if compared(x) else None
    best = best_first({m: x.by_method[m] for m in residual})[0]
    return plot_evaluations(x, {"with residuals": residual, "the others, and the best": [*others, best]})


def plot_variants(x: Result) -> Figure | None:
    """Evaluations of all of VarShare's variants; and of the best three with what they are compared to."""
    variants = of_families(x, *PORTFOLIO)
    if not variants:
        return None
    base = [m for m in of_families(x, "varshare") if not METHODS[m].variant]
    controls = [m for m in of_families(x, "varshare", "l2soft") if METHODS[m].variant]
    controls += [BLIND] if BLIND in x.by_method else []
    best = best_first({m: x.by_method[m] for m in variants})[:3]
    return plot_evaluations(x, {"all variants": base + variants, "the best three": base + best + controls})


def plot_tasks(x: Result) -> Figure | None:
    """The score of every task in the final evaluation: a dot for each run, a line at their mean."""
    if not compared(x):
        return None
    methods = best_first({m: x.by_method[m] for m in compared(x)})
    tasks = list(x.by_method[methods[0]].final)
    columns = min(5, len(tasks))
    rows, height = math.ceil(len(tasks) / columns), 0.6 + 0.17 * len(methods)
    figure = Figure(figsize=(2.3 * columns, height * rows + 0.6), layout="constrained")
    what = "success in %" if x.by_success else "return"
    figure.suptitle(f"{x.title}: final evaluation, a dot is a run, a line the mean", fontsize=11)
    figure.supxlabel(f"{what} of the final evaluation", fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for ax, task in zip(axes, tasks):
        for i, method in enumerate(methods):
            values = x.by_method[method].final[task]
            ax.plot(values, np.full(len(values), i), "o", color=color_of(method), ms=3, alpha=0.6, mew=0)
            ax.plot([values.mean()] * 2, [i - 0.35, i + 0.35], color=color_of(method), lw=2)
        ax.set_title(task, fontsize=8)
        ax.grid(visible=False, axis="y")
    for ax in figure.axes:
        ax.set_visible(len(ax.lines) > 0)
        ax.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(methods)), [title_of(m) for m in methods])
    axes[0].invert_yaxis()
    return figure


def heat(ax: Axes, values: pd.DataFrame, low: float, high: float, text: str) -> None:
    """A heat map with its numbers written in."""
    image = ax.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        if not math.isnan(value):
            color = "white" if value < (low + high) / 2 else "black"
            number = format(value, text)
            ax.text(column, row, number, ha="center", va="center", fontsize=6, color=color)
    names = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "fontsize": 6}
    ax.set_xticks(range(values.shape[1]), values.columns, **names)
    ax.set_yticks(range(len(values)), values.index, fontsize=6)
    ax.set_xlabel("task", fontsize=7)
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, pad=0.01)


def plot_sharing(x: Result) -> Figure | None:
    """Cosines of the tasks' residuals, and the residuals' share of every layer's squared norm.

    Both are free of what all residuals have in common. The share is a logarithm: next to theta's it is small
    nearly everywhere, and what differs is by how much.
    """
    methods = with_residuals(x)
    if not methods:
        return None
    figure = Figure(figsize=(13, 0.5 + 4.0 * len(methods)), layout="constrained")
    figure.suptitle(x.title, fontsize=11)
    tasks = list(x.by_method[methods[0]].final)
    rows = pd.read_csv(x.folder / "sharing.csv")
    ratios = rows[rows.metric.str.startswith(SHARING)]
    layers = ratios.metric.str.removeprefix(SHARING)
    logs = ratios.assign(layer=layers, share=np.log10((1 - ratios.value).clip(lower=1e-6)))
    for (left, right), method in zip(figure.subplots(len(methods), 2, squeeze=False), methods):
        cosines = pd.DataFrame(np.nan, tasks, tasks)
        pairs = rows[(rows.method == method) & (rows.metric == "cosine")]
        for pair, value in zip(pairs.task, pairs.value):
            one, other = pair.split("|")
            cosines.loc[one, other] = cosines.loc[other, one] = value
        most = cosines.abs().max().max()
        heat(left, cosines, -most, most, ".2f")
        left.set_title(f"{title_of(method)}: cosine of the tasks' $\\mu_m$", fontsize=9)
        left.set_ylabel("task", fontsize=7)
        of_method = logs[logs.method == method]
        shares = of_method.pivot_table(index="layer", columns="task", values="share")[tasks]
        heat(right, shares, logs.share.min(), logs.share.max(), ".1f")
        name = r"$\log_{10}$ of $|\mu_m|^2 / (|\theta|^2 + |\mu_m|^2)$"
        right.set_title(f"{title_of(method)}: {name}", fontsize=9)
        right.set_ylabel("layer", fontsize=7)
    return figure


def write_suite(folder: Path) -> str:
    """table.md and the figures of a suite, from its CSVs in results/suites/NAME; returns the table."""
    x = Result(folder)
    able = f"**This suite {'can' if x.able else 'cannot'} tell methods apart**: {x.why}."
    note = "In brackets 95 % intervals over runs: Student's t, of medians order statistics."
    text = f"# {x.title}\n\n{able}\n\n{provenance(x.configs)} {note}\n\n{make_table(x)}"
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        for plot in (plot_curves, plot_tasks, plot_sharing, plot_variants):
            if figure := plot(x):
                figure.savefig(folder / f"{plot.__name__.removeprefix('plot_')}.png")
    return text
