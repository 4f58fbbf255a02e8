"""Does theta move first, and the residuals later? From the committed suites: results/studies/theta_first/."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.collect import NORMS
from bench.figures import (
    STYLE,
    add_legend,
    begin_at,
    describe_runs,
    draw_method,
    label_steps,
    save,
    start_figure,
    with_residuals,
)
from bench.methods import title_of
from bench.statistics import mean_interval
from bench.tables import Result, markdown
from studies import GOALS, folder_of


def plot(x: Result) -> Figure:
    """How far theta and the residuals have moved from where they began, and the residuals' share of it.

    theta first, the residuals later, where a share rises: the "crowd effect" of many tasks that pull one
    theta, while every residual is pulled by its own.
    """
    moved = set(x.runs.method[x.runs.metric == NORMS[1]])
    methods = [m for m in with_residuals(x) if m in moved]
    moves = {m: [x.logged(m, metric) for metric in reversed(NORMS)] + [share(x, m)] for m in methods}
    numbers = [len(theta) for theta, *_ in moves.values()]
    figure = start_figure(f"{x.title}, mean over tasks: {describe_runs(numbers)}", 3.6)
    titles = {
        "shared weights": r"$|\theta - \theta_0|$",
        "residuals": r"mean $|\mu_m|$, from 0",
        "residuals' share": r"$|\mu|^2 / (|\mu|^2 + |\theta - \theta_0|^2)$",
    }
    for i, (ax, title) in enumerate(zip(figure.subplots(1, 3), titles)):
        for method, values in moves.items():
            draw_method(ax, method, values[i], bounds=(0, math.inf))
        ax.set(title=title, ylabel=titles[title])
        label_steps(ax)
        begin_at(ax, 0)
    add_legend(figure)
    return figure


def share(x: Result, method: str) -> pd.DataFrame:
    """(run, step) residuals' share of the squared change."""
    mu, theta = (x.logged(method, metric) for metric in NORMS)
    return mu**2 / (mu**2 + theta**2)


def report(out: Path) -> str:
    """table.md, the residuals' share at the first log and at the end, and a figure of each suite."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for x in (Result(Path("results/suites", name)) for name in GOALS):
        with rc_context(STYLE):
            save(plot(x), out / f"{x.name}.png")
        for method in with_residuals(x):
            shares = share(x, method)
            cells = [mean_interval(100 * shares.iloc[:, i]).text(2) for i in (0, -1)]
            rows.append([x.name, title_of(method), *cells])
    text = markdown(["suite", "method", "share at the first log, %", "at the end, %"], rows)
    (out / "table.md").write_text(text)
    return text


def main(dry_run: bool = False, report_only: bool = False) -> None:
    """Make the table and the figures from the committed suites.

    Args:
        dry_run: print nothing: this study has no runs of its own
        report_only: the same as without it
    """
    if not dry_run:
        print(report(folder_of("theta_first")))


if __name__ == "__main__":
    tyro.cli(main)
