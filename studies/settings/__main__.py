"""Which settings did the searches find, and which of them matter? results/studies/settings/."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from optuna.distributions import BaseDistribution

from bench.collect import EVALUATION, read
from bench.figures import GREY, STYLE, color_of, save, start_figure
from bench.methods import METHODS, parse_flags, title_of
from bench.tables import markdown
from studies import report_study

STATES = {"complete": "o", "dropped": "x", "crashed": "v"}  # all seeds, one or two, none


def floor_of(trials: pd.DataFrame) -> float:
    """Where an axis of returns begins: below it a few trials would flatten all others."""
    finals = trials[trials.state == "complete"].final
    finals = finals if len(finals) else trials.final.fillna(0)
    low, high = finals.quantile(0.05), finals.max()
    return low - 0.3 * max(high - low, 1.0)


def draw_trials(ax: Axes, trials: pd.DataFrame, name: str, method: str) -> None:
    """Mean final return of the seeds that ran, against one setting; at the floor if none did, or if less."""
    space, floor = METHODS[method].space[name], floor_of(trials)
    choices = list(getattr(space, "choices", ()))
    for state, mark in STATES.items():
        rows = trials[trials.state == state]
        values = [parse_flags(settings)[name] for settings in rows.settings]
        x = [choices.index(v) if choices else float(v) for v in values]
        color = color_of(method) if state == "complete" else GREY
        ax.plot(x, rows.final.fillna(floor).clip(lower=floor), mark, color=color, ms=4, alpha=0.8)
    if choices:
        ax.set_xticks(range(len(choices)), choices)
        ax.set_xlim(-0.5, len(choices) - 0.5)
    elif space.log:
        ax.set_xscale("log")
        ax.set_xlim(space.low / 1.2, space.high * 1.2)
        narrow = space.high <= 100 * space.low
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if narrow else (1.0,)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())


def searched(trials: pd.DataFrame, method: str) -> dict[str, BaseDistribution]:
    """Space of a method's settings, of those that these trials have: an earlier search may have had fewer."""
    flags = parse_flags(trials.settings.iloc[0])
    return {name: space for name, space in METHODS[method].space.items() if name in flags}


def importance(trials: pd.DataFrame, method: str) -> dict[str, float]:
    """Share of each setting in what the best quarter of the trials has in common (PED-ANOVA)."""
    space = searched(trials, method)
    study = optuna.create_study(direction="maximize")
    for x in trials[trials.state == "complete"].itertuples():
        flags = parse_flags(x.settings)
        params = {n: flags[n] if hasattr(d, "choices") else float(flags[n]) for n, d in space.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=x.final))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def plot_settings(trials: pd.DataFrame, title: str) -> Figure:
    """Return against the two settings of every method that matter most, in turn of their importance."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    methods = [m for m in METHODS if m in set(trials.method)]
    rows = math.ceil(len(methods) / 2)
    what = "return of the trials against the two settings that matter most"
    figure = start_figure(f"{title}: {what}, and their importance", 0.8 + 1.6 * rows)
    axes = figure.subplots(rows, 4, squeeze=False).reshape(-1, 2)
    for pair, method in zip(axes, methods):
        of_method = trials[trials.method == method]
        shares = importance(of_method, method)  # none if no trial is complete
        names = sorted(searched(of_method, method), key=lambda name: -shares.get(name, 0.0))[:2]
        for ax, name in zip(pair, names):
            draw_trials(ax, of_method, name, method)
            ax.tick_params(labelsize=7)
            ax.set_xlabel(f"{name}, {shares[name]:.0%}" if shares else name)
            ax.set_ylabel("mean return")
            ax.set_title(title_of(method))
        if len(names) == 2:
            pair[1].sharey(pair[0])
            pair[1].tick_params(labelleft=False)
            pair[1].set_ylabel("")
    for ax in figure.axes:
        if not ax.has_data():
            ax.remove()
    names = ("all seeds", "dropped before", "crashed")
    marks = [Line2D([], [], marker=mark, ls="", color="black") for mark in STATES.values()]
    figure.legend(marks, names, loc="outside lower center", ncols=3)
    return figure


def settings_table(settings: pd.DataFrame, reported: pd.Series) -> str:
    """What each search chose for each method, and what it spent.

    reported: mean of the reported runs by (method, search): it falls short of that of the fresh seeds, which
    the best was chosen by.
    """
    columns = ["method", "search", "settings", "mean on fresh seeds", "reported minus that"]
    columns += ["trials", "dropped", "crashed", "steps spent"]
    rows = []
    for x in sorted(settings.itertuples(), key=lambda x: (list(METHODS).index(x.method), x.search)):
        counts = [str(x.complete + x.dropped + x.crashed), str(x.dropped), str(x.crashed)]
        drop = reported.get((x.method, x.search), math.nan) - x.final
        cells = [title_of(x.method), str(x.search), f"`{x.settings}`", f"{x.final:.1f}"]
        cells.append("" if math.isnan(drop) else f"{drop:.1f}")
        rows.append([*cells, *counts, f"{x.spent / 1e6:.1f} M"])
    return markdown(columns, rows)


def reported_means(suite: str) -> pd.Series:
    """Means of the reported runs of a suite with searches of its own, by (method, search)."""
    folder = Path("results/suites", suite)
    if not (folder / "runs.csv").exists():
        return pd.Series(dtype=float)
    runs, _ = read(folder)
    rows = runs[(runs.metric == EVALUATION) & (runs.task == "mean")]
    last = rows[rows.step == rows.groupby(["method", "setting"]).step.transform("max")]
    searches = pd.to_numeric(last.setting).fillna(1).astype(int)
    return last.value.groupby([last.method, searches]).mean()


def rates_table(trials: pd.DataFrame) -> str:
    """What each step size reached, one run each, where nothing else was tried; the chosen is bold.

    By return or by success in percent, as the suite is scored.
    """
    rates = trials.settings.map(lambda x: parse_flags(x)["learning-rate"])
    finals = trials.assign(rate=rates).pivot(index="method", columns="rate", values="final")
    rows = []
    for method in sorted(finals.index, key=list(METHODS).index):
        cells = []
        for x in finals.loc[method]:
            cell = "crashed" if math.isnan(x) else f"{x:.1f}"
            cells.append(f"**{cell}**" if x == finals.loc[method].max() else cell)
        rows.append([title_of(method), *cells, f"{trials[trials.method == method].steps.sum() / 1e6:.1f} M"])
    head = f"What one run of {trials.steps.max():,} steps ended with, for each step size (success in % on "
    head += "Meta-World). The best is the method's setting. This is no comparison of methods.\n\n"
    return head + markdown(["method", *finals, "steps spent"], rows)


def report(search: Path, out: Path) -> str:
    """table.md and a figure for each suite, from trials.csv and settings.csv; returns the table.

    Args:
        search: their folder.
        out: where to write.
    """
    if not (search / "settings.csv").exists():
        return "no search has come to an end"
    out.mkdir(parents=True, exist_ok=True)
    trials, settings = pd.read_csv(search / "trials.csv"), pd.read_csv(search / "settings.csv")
    tables = []
    for suite, rows in settings.groupby("suite", sort=False):
        of_suite = trials[trials.suite == suite]
        if of_suite.settings.str.count("--").max() == 1:  # nothing but the step size was tried
            tables.append(f"## {suite}\n\n{rates_table(of_suite)}")
            continue
        tables.append(f"## {suite}\n\n{settings_table(rows, reported_means(suite))}")
        with rc_context(STYLE):
            save(plot_settings(of_suite, suite), out / f"{suite}.png")
    text = "\n".join(tables)
    (out / "table.md").write_text(text)
    return text


if __name__ == "__main__":
    report_study("settings", lambda out: report(Path("results/search"), out))
