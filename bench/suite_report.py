"""What is made of the CSVs in results/: tables and figures of a suite and of its search."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context

from bench.figures import SUITE_FIGURES, plot_settings
from bench.style import STYLE
from bench.tables import Result, make_table, provenance, rates_table, settings_table


def write_suite(folder: Path) -> str:
    """table.md and the figures of a suite, from its CSVs in results/suites/NAME; returns the table."""
    x = Result(folder)
    able = f"**This suite {'can' if x.able else 'cannot'} tell methods apart**: {x.why}."
    note = "In brackets 95 % intervals over runs: Student's t, of medians order statistics."
    text = f"# {x.title}\n\n{able}\n\n{provenance(x.configs)} {note}\n\n{make_table(x)}"
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        for name, plot in SUITE_FIGURES.items():
            if figure := plot(x):
                figure.savefig(folder / f"{name}.png")
    return text


def write_search(folder: Path) -> None:
    """table.md and a figure for each suite, from results/search/trials.csv and settings.csv."""
    if not (folder / "settings.csv").exists():  # no search has come to an end
        return
    trials, settings = pd.read_csv(folder / "trials.csv"), pd.read_csv(folder / "settings.csv")
    tables = []
    for suite, rows in settings.groupby("suite", sort=False):
        of_suite = trials[trials.suite == suite]
        if of_suite.settings.str.count("--").max() == 1:  # nothing but the step size was tried
            tables.append(f"## {suite}\n\n{rates_table(of_suite)}")
            continue
        tables.append(f"## {suite}\n\n{settings_table(rows)}")
        with rc_context(STYLE):
            plot_settings(of_suite, suite).savefig(folder / f"settings_{suite}.png")
    (folder / "table.md").write_text("\n".join(tables))
