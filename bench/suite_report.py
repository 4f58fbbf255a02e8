"""What is made of the CSVs in results/: tables and figures of a suite and of its search, and the verdicts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context

from bench.claims import Result, read_result, verdicts
from bench.figures import (
    PORTFOLIO,
    SUITE_FIGURES,
    of_portfolio,
    plot_residuals,
    plot_settings,
    plot_step_sizes,
)
from bench.loo_report import Adaptations
from bench.methods import METHODS, fail
from bench.style import STYLE
from bench.tables import make_table, rates_table, settings_table


def write_suite(folder: Path) -> str:
    """table.md and the figures of a suite, from results/SUITE/runs.csv and configs.csv; returns the table."""
    result, configs = read_result(folder), pd.read_csv(folder / "configs.csv")
    title = f"{result.env}, {result.steps:,} steps"
    missing = configs[~configs.finished]
    finished = len(configs) - len(missing)
    notes = [f"{finished} run{'s' * (finished != 1)}, one core each"]
    notes[0] += f" ({', '.join(configs.hardware.dropna().unique())}; "
    notes[0] += f"commit {', '.join(f'`{x}`' for x in configs.git_commit.dropna().unique())})."
    if len(missing):
        runs = f"{len(missing)} run{'s' * (len(missing) != 1)}"
        notes.append(f"Missing: {runs}, as {missing.method.iloc[0]}, seed {missing.seed.iloc[0]}.")
    notes.append("In brackets 95 % intervals over runs: Student's t, of medians order statistics.")
    able = f"**This suite {'can' if result.able else 'cannot'} tell methods apart**: {result.why}."
    text = f"# {title}\n\n{able}\n\n{' '.join(notes)}\n\n{make_table(result.runs, result.target)}"
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        apart = result.runs.method.isin(of_portfolio(result.runs, *PORTFOLIO))
        for name, plot in SUITE_FIGURES.items():
            runs = result.runs if name == "variants" else result.runs[~apart]
            if len(runs) and (figure := plot(runs, title, result.ceiling)):
                figure.savefig(folder / f"{name}.png")
    return text


def write_search(folder: Path) -> None:
    """table.md and two figures for each suite, from results/search/trials.csv and settings.csv."""
    if not (folder / "settings.csv").exists():  # no search has come to an end
        return
    trials, settings = pd.read_csv(folder / "trials.csv"), pd.read_csv(folder / "settings.csv")
    tables = []
    with rc_context(STYLE):
        for suite, rows in settings.groupby("suite", sort=False):
            order = sorted(rows.index, key=lambda i: list(METHODS).index(rows.method[i]))
            of_suite = trials[trials.suite == suite]
            if of_suite.settings.str.count("--").max() == 1:  # nothing but the step size was tried
                tables.append(f"## {suite}\n\n{rates_table(of_suite)}")
                continue
            tables.append(f"## {suite}\n\n{settings_table(rows.loc[order])}")
            plot_step_sizes(of_suite, suite).savefig(folder / f"steps_{suite}.png")
            plot_settings(of_suite, suite).savefig(folder / f"settings_{suite}.png")
    (folder / "table.md").write_text("\n".join(tables))


def read_results(folder: Path) -> list[Result]:
    """All suites in results/."""
    return [read_result(path.parent) for path in sorted(folder.glob("*/configs.csv"))]


def write_claims(folder: Path) -> str:
    """claims.md, and residuals.png of identical against different tasks; returns the verdicts."""
    results = read_results(folder)
    if not results:
        fail(f"no suite has results in {folder} yet")
    held_out = [Adaptations(path.parent) for path in sorted((folder / "loo").glob("*/runs.csv"))]
    text = verdicts(results, held_out)
    (folder / "claims.md").write_text(text)
    identical = [x for x in results if "identical" in x.env]
    suites = {x.env: x.runs for x in results if identical and x.searched_on == identical[0].searched_on}
    with rc_context(STYLE):
        if identical and (figure := plot_residuals(suites)):
            figure.savefig(folder / "residuals.png")
    return text
