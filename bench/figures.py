"""How figures look, the figures of a suite, and its report: table and figures from its CSVs."""

import io
import math
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from bench.collect import MANY, SHARING
from bench.methods import METHODS, base_of, title_of
from bench.statistics import BLIND, control_in, mean_interval, search_noise
from bench.tables import Result, best_first, make_table, provenance
from envs import ENV_IDS

# Okabe and Ito's palette, told apart with any kind of colour vision
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
GREY = "#808080"
MAX_CURVES = len(CYCLE)  # in one pair of axes
WIDTH = 8.0  # inches of every figure: its words can be read where it is shown 800 pixels wide
STYLE = {  # for matplotlib.rc_context
    "font.size": 9,
    "figure.titlesize": 10,
    "figure.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "savefig.dpi": 120,
}
FEW = 5  # of fewer runs Student's t says little: the runs themselves are drawn
MAX_NUMBERS = 12  # columns of a heat map whose numbers can be read
ANY = (-math.inf, math.inf)
ALLOWED = "what the tasks allow"
PORTFOLIO = ("reptile", "lora", "variant")  # families of variants, which have a figure of their own


def color_of(method: str) -> str:
    """One colour per method in every figure; a variant by flags has that of its method."""
    return METHODS[method].color if method in METHODS else GREY


def bounds_of(env: str, by_success: bool = False) -> tuple[float, float]:
    """What no score is below or above: success in percent; on CartPoles 500 rewards from 0 to 1."""
    if by_success:
        return 0.0, 100.0
    known = env == "CartPole-v1" or (env in ENV_IDS and env.startswith("cartpole"))
    return (0.0, 500.0) if known else ANY


def start_figure(title: str, height: float) -> Figure:
    """An empty figure, as wide as a page."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title)
    return figure


def make_panels(figure: Figure, number: int, columns: int, **share) -> list[Axes]:
    """Axes of a grid, row by row; where they share x, the lowest of every column has numbers."""
    columns = min(columns, number)
    grid = figure.subplots(math.ceil(number / columns), columns, squeeze=False, **share).flat
    for ax in grid[number:]:
        ax.remove()
    for ax in grid[number - columns : number]:
        ax.tick_params(labelbottom=True)
    return list(grid[:number])


def has_label_x(ax: Axes) -> bool:
    """Whether an x axis is to have a label: of panels that share it those in the last row have."""
    return len(ax.get_shared_x_axes().get_siblings(ax)) == 1 or ax.get_subplotspec().is_last_row()


def label_steps(ax: Axes, label: str = "steps of all tasks together") -> None:
    """The axis of environment steps, from 0; after all is drawn."""
    ax.set_xlabel(label if has_label_x(ax) else "")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    ax.set_xlim(left=0)


def begin_at(ax: Axes, low: float) -> None:
    """An axis of values begins at the least that is possible, if that is known; after all is drawn."""
    if math.isfinite(low):
        ax.set_ylim(bottom=low)


def add_legend(figure: Figure, columns: int = 4) -> None:
    """Below the panels; what stands in several is named once."""
    named = {}
    for ax in figure.axes:
        for line, label in zip(*ax.get_legend_handles_labels()):
            named.setdefault(label, line)
    if ALLOWED in named:
        named[ALLOWED] = named.pop(ALLOWED)  # after the curves of all panels
    figure.legend(named.values(), named, loc="outside lower center", ncols=columns)


def describe_runs(numbers: Iterable[int]) -> str:
    """For a title: how many runs curves are made of, and how they show them."""
    low, high = min(numbers := list(numbers)), max(numbers)
    if high == 1:
        return "1 run"
    text = f"means of {low} runs" if low == high else f"means of {low} to {high} runs"
    if low >= FEW:
        return f"{text}, 95 % intervals"
    return f"{text}, thin lines are runs" + f", 95 % intervals from {FEW} runs on" * (high >= FEW)


def save(figure: Figure, path: Path) -> None:
    """A PNG of 256 colours, which look the same in a third of the size."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer)
        image = Image.open(buffer).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_curve(
    ax: Axes,
    x: Iterable[float],
    values: pd.DataFrame,
    label: str,
    color: str,
    line: str = "-",
    bounds: tuple[float, float] = ANY,
) -> None:
    """Mean over runs and its 95 % interval within bounds, of (run, step); of few runs the runs themselves."""
    mean, low, high = zip(*(mean_interval(values[step]) for step in values))
    ax.plot(x, mean, line, color=color, lw=1.8, label=label)
    if len(values) < FEW:
        ax.plot(x, values.to_numpy().T, color=color, lw=0.7, alpha=0.5)
    else:
        ax.fill_between(x, np.clip(low, *bounds), np.clip(high, *bounds), color=color, alpha=0.13, lw=0)


def draw_method(
    ax: Axes,
    method: str,
    values: pd.DataFrame,
    x: Iterable[float] | None = None,
    bounds: tuple[float, float] = ANY,
) -> None:
    """The same in the method's colour, by default over steps; dashed if it is a variant by flags."""
    dashed = method in METHODS and METHODS[method].variant
    line = ":" if base_of(method) == BLIND else "--" if dashed else "-"
    x = values.columns if x is None else x
    draw_curve(ax, x, values, title_of(method), color_of(method), line, bounds)


def draw_ceiling(ax: Axes, highest: float | None) -> None:
    """What the tasks allow, if that is known."""
    if highest is not None:
        ax.axhline(highest, color="0.6", lw=1, ls=":", label=ALLOWED)


def of_families(x: Result, *families: str) -> list[str]:
    """Methods of these families, in the order of methods.csv."""
    return [m for m in x.by_method if m in METHODS and METHODS[m].family in families]


def portfolio(x: Result) -> list[str]:
    """VarShare's variants, where there are several; a single one stands among the other methods."""
    variants = of_families(x, *PORTFOLIO)
    return variants if len(variants) > 1 else []


def compared(x: Result) -> list[str]:
    """Methods that are not in the portfolio."""
    return [m for m in x.by_method if m not in portfolio(x)]


def with_residuals(x: Result) -> list[str]:
    """Those among them that have residuals."""
    ratio = x.runs[x.runs.metric == "residual/ratio"]
    return [m for m in compared(x) if m in set(ratio.method)]


def plot_evaluations(x: Result, panels: dict[str, list[str]]) -> Figure:
    """Evaluations on the way, a panel for each list of methods."""
    numbers = [len(x.by_method[m].final) for methods in panels.values() for m in methods]
    figure = start_figure(f"{x.title}: {describe_runs(numbers)}", 4.4)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    bounds = bounds_of(x.env, x.by_success)
    for ax, (title, methods) in zip(axes, panels.items()):
        for method in methods:
            draw_method(ax, method, x.by_method[method].curve, bounds=bounds)
        draw_ceiling(ax, x.ceiling)
        ax.set_title(title)
        label_steps(ax)
    begin_at(axes[0], bounds[0])
    axes[0].set_ylabel(f"{'success in %' if x.by_success else 'return'} of the evaluation, mean over tasks")
    add_legend(figure)
    return figure


def plot_curves(x: Result) -> Figure | None:
    """Evaluations of the methods with residuals; and of the others, in one panel or more, with the best."""
    residual = with_residuals(x)
    others = [m for m in compared(x) if m not in residual]
    if not (residual and others):
        return plot_evaluations(x, {"all methods": compared(x)}) if compared(x) else None
    best = best_first({m: x.by_method[m] for m in residual})[0]
    panels, width = {"methods with residuals": residual}, MAX_CURVES - 2  # beside the best and the ceiling
    for i in range(0, len(others), width):
        part = f", part {i // width + 1}" if len(others) > width else ""
        panels[f"the others{part}, and the best on the left"] = [*others[i : i + width], best]
    return plot_evaluations(x, panels)


def plot_variants(x: Result) -> Figure | None:
    """Evaluations of all of VarShare's variants; and of the best three with what they are compared to."""
    variants = portfolio(x)
    if not variants:
        return None
    base = [m for m in of_families(x, "varshare") if not METHODS[m].variant]
    controls = [m for m in of_families(x, "varshare", "l2soft") if METHODS[m].variant]
    blind = control_in(x.by_method, BLIND)
    controls += [blind] if blind in x.by_method else []
    best = best_first({m: x.by_method[m] for m in variants})[:3]
    panels = {"all variants": base + variants, "the best three, and controls": base + best + controls}
    return plot_evaluations(x, panels)


def plot_tasks(x: Result) -> Figure | None:
    """The score of every task in the final evaluation: a dot for each run, a line at their mean."""
    if not compared(x):
        return None
    methods = best_first({m: x.by_method[m] for m in compared(x)})
    tasks = list(x.by_method[methods[0]].final)
    if len(tasks) > MANY:
        return None
    low, high = (f(len(x.by_method[m].final) for m in methods) for f in (min, max))
    number = f"{low} run{'s' * (low != 1)}" if low == high else f"{low} to {high} runs"
    rows = math.ceil(len(tasks) / 5)
    title = f"{x.title}, {number} of each method: a dot is a run, a line the mean"
    figure = start_figure(title, 0.7 + rows * (0.4 + 0.16 * len(methods)))
    figure.supylabel("method")
    axes = make_panels(figure, len(tasks), 5, sharex=True, sharey=True)
    for ax, task in zip(axes, tasks):
        for i, method in enumerate(methods):
            values = x.by_method[method].final[task]
            style = {"color": color_of(method), "clip_on": False}  # what is at 0 is seen whole
            ax.plot(values, np.full(len(values), i), "o", ms=3, alpha=0.6, mew=0, **style)
            ax.plot([values.mean()] * 2, [i - 0.35, i + 0.35], lw=2, **style)
        ax.set_title(task if len(task) < 24 else textwrap.fill(task, 18), fontsize=7)
        ax.grid(visible=False, axis="y")
        if has_label_x(ax):
            ax.set_xlabel("success in %" if x.by_success else "final return")
    axes[0].set_yticks(range(len(methods)), [title_of(m) for m in methods])
    axes[0].invert_yaxis()
    if math.isfinite(bounds_of(x.env, x.by_success)[0]):
        axes[0].set_xlim(left=0)
    return figure


def heat(ax: Axes, values: pd.DataFrame, norm: Normalize, cmap: str, text: str, label: str) -> None:
    """A heat map of (row, task) with its numbers written in, if they can be read.

    Args:
        norm: the scale of the colours, which may be common to several maps.
        text: format of a number.
        label: of the scale.
    """
    image = ax.imshow(values, cmap=cmap, norm=norm, aspect="auto")
    columns = range(values.shape[1])
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        if not math.isnan(value) and len(columns) <= MAX_NUMBERS:
            red, green, blue, _ = image.cmap(image.norm(value))
            color = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            ax.text(column, row, format(value, text), ha="center", va="center", fontsize=8, color=color)
    if has_label_x(ax):
        ax.set_xticks(columns, values.columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=7)
        ax.set_xlabel("task")
    ax.set_yticks(range(len(values)), values.index, fontsize=7)
    ax.set_facecolor("0.75")  # of what has no number
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, pad=0.01, label=label)


def own_share(ratio: pd.DataFrame) -> pd.DataFrame:
    """log10 of the residuals' share of the squared norm, 1 - sharing ratio, where float32 can tell it from 0.

    The share is small nearly everywhere, and what differs is by how much.
    """
    return np.log10((1 - ratio).clip(lower=1e-6))


def plot_sharing(x: Result) -> dict[str, Figure]:
    """Of every method with residuals their cosines, and their share of every layer's squared norm.

    Both are free of what all residuals have in common. What is left of M unrelated residuals has cosine
    -1 / (M - 1). All methods have the same scales.
    """
    methods, tasks = with_residuals(x), list(next(iter(x.by_method.values())).final)
    if not methods or not 2 <= len(tasks) <= MANY:
        return {}
    rows = pd.read_csv(x.folder / "sharing.csv")
    cosines = rows[(rows.metric == "cosine") & rows.method.isin(methods)]
    ratios = rows[rows.metric.str.startswith(SHARING) & rows.method.isin(methods)]
    shares = ratios.assign(layer=ratios.metric.str.removeprefix(SHARING), value=own_share(ratios.value))
    unrelated = -1 / (len(tasks) - 1)
    related = CenteredNorm(unrelated, (cosines.value - unrelated).abs().max())
    size = Normalize(shares.value.min(), shares.value.max())
    figures = {}
    for method in methods:
        matrix = pd.DataFrame(np.nan, tasks, tasks)
        for row in cosines[cosines.method == method].itertuples():
            one, other = row.task.split("|")
            matrix.loc[one, other] = matrix.loc[other, one] = row.value
        layers = shares[shares.method == method].pivot_table(index="layer", columns="task", values="value")
        heights = [len(tasks), len(layers)]
        figure = start_figure(
            f"{title_of(method)} on {x.title}, mean of {len(x.by_method[method].final)} runs",
            2.1 + 0.24 * sum(heights),
        )
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=heights)
        heat(above, matrix, related, "RdBu_r", ".2f", f"cosine (unrelated: {unrelated:.2f})")
        above.set(title="cosine of two tasks' residuals $\\mu_m$", ylabel="task")
        heat(below, layers[tasks], size, "cividis", ".1f", r"$\log_{10}$ of the share")
        share = r"$|\mu_m|^2 / (|\theta|^2 + |\mu_m|^2)$"
        below.set(title=f"the residuals' share of a layer's squared norm, {share}", ylabel="layer")
        figures[method] = figure
    return figures


def write_suite(folder: Path) -> str:
    """table.md and the figures of a suite, from its CSVs in results/suites/NAME; returns the table."""
    x = Result(folder)
    able = f"**This suite {'can' if x.able else 'cannot'} tell methods apart**: {x.why}."
    note = "In brackets 95 % intervals over runs: Student's t, of medians order statistics."
    if search_noise(x.values("means")):
        note += (
            " Those of means, differences and areas are over searches and runs; of the worst task, and in "
        )
        note += "the figures, over runs alone."
    text = f"# {x.title}\n\n{able}\n\n{provenance(x.configs)} {note}\n\n{make_table(x)}"
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        figures = {"curves": plot_curves(x), "tasks": plot_tasks(x), "variants": plot_variants(x)}
        figures |= {f"sharing_{method}": figure for method, figure in plot_sharing(x).items()}
        for name, figure in figures.items():
            if figure:
                save(figure, folder / f"{name}.png")
    return text
