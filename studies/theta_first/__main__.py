"""Does theta move first, and the residuals later? From the committed suites: results/studies/theta_first/."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.collect import NORMS
from bench.figures import STYLE, draw_method, label_steps, with_residuals
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
    figure = Figure(figsize=(12.4, 3.8), layout="constrained")
    figure.suptitle(f"{x.title}: mean over tasks", fontsize=11)
    left, middle, right = figure.subplots(1, 3)
    for method in methods:
        mu, theta = (x.logged(method, metric) for metric in NORMS)
        draw_method(left, method, theta)
        draw_method(middle, method, mu)
        draw_method(right, method, share(x, method))
    left.set_ylabel(r"$|\theta - \theta_0|$")
    middle.set_ylabel(r"mean $|\mu_m|$, from 0")
    right.set_ylabel(r"residuals' share, $|\mu|^2 / (|\mu|^2 + |\theta - \theta_0|^2)$")
    right.set_ylim(bottom=0)
    for ax in (left, middle, right):
        label_steps(ax)
    left.legend(fontsize=8, loc="best")
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
            plot(x).savefig(out / f"{x.name}.png")
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
