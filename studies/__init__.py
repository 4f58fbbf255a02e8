"""Studies: one question each, in a folder of its own with its script, its page and its test.

`bash benchmark.sh NAME` starts or continues the runs of studies/NAME and reports to results/studies/NAME.
What most of them have in common is here. bench, envs and the scripts know nothing of studies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import tyro

from bench import launch
from bench.collect import EVALUATION, Run, collect, evaluations, left, read
from bench.launch import Job
from bench.methods import METHODS, Method, Settings
from bench.statistics import mean_interval
from bench.tables import provenance
from envs import ENV_IDS

GOALS = ("cartpole-goals10", "cartpole-goals-physics10")


def job(
    study: str,
    env: str,
    steps: int,
    method: str,
    seed: int,
    settings: Settings,
    methods: dict[str, Method] = METHODS,
) -> Job:
    """A run of a study; the method is method@setting."""
    return launch.job(f"{study}__{env}__{steps}__{method}", method, env, steps, seed, settings, methods)


def run_study(
    study: str,
    jobs: Callable[[], Iterable[Job]],
    report: Callable[[pd.DataFrame], str],
    rows_of: Callable[[Run], pd.DataFrame] = evaluations,
) -> None:
    """The command line of a study: its runs, its CSVs, its report.

    Args:
        study: its name.
        jobs: its runs.
        report: runs.csv -> the text of table.md; may draw figures too.
        rows_of: what is collected of a run.
    """
    launch.set_up()

    def main(dry_run: bool = False, report_only: bool = False) -> bool:
        """Start or continue the runs of a study, then report; on Slurm submit both.

        Args:
            dry_run: print the commands only
            report_only: of whatever has finished
        """
        runs = list(jobs())
        todo = left(runs, folder_of(study))
        if dry_run:
            launch.show_commands(todo)
            return True
        if launch.on_slurm() and not report_only:
            launch.submit(study, todo, [study, "--report-only"])
            return True
        done = report_only or launch.launch(todo)
        print(write_report(study, runs, report, rows_of))
        return done

    raise SystemExit(not tyro.cli(main))


def report_study(study: str, report: Callable[[Path], str]) -> None:
    """The command line of a study without runs of its own: report takes its folder, returns what to print."""

    def main(dry_run: bool = False, report_only: bool = False) -> None:
        """Make the report of what is in results/.

        Args:
            dry_run: print nothing: this study has no runs of its own
            report_only: the same as without it
        """
        if not dry_run:
            print(report(folder_of(study)))

    tyro.cli(main)


def write_report(
    study: str,
    jobs: list[Job],
    report: Callable[[pd.DataFrame], str],
    rows_of: Callable[[Run], pd.DataFrame] = evaluations,
) -> str:
    """Collect what has finished here, and write table.md from the CSVs; returns its text."""
    folder = folder_of(study)
    if any(job.finished for job in jobs):
        collect(jobs, folder, rows_of)
    if not (folder / "configs.csv").exists():
        return f"{study}: no run has finished yet"
    runs, configs = read(folder)
    text = f"{report(runs.merge(configs[[*runs.columns[:4], 'steps']]))}\n{provenance(configs)}\n"
    (folder / "table.md").write_text(text)
    return text


def folder_of(study: str) -> Path:
    """Where a study's results are."""
    return Path("results/studies", study)


def by_env(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Environment -> its rows, in the order in which `envs` names them."""
    order = {env: i for i, env in enumerate(ENV_IDS)}
    groups = dict(iter(runs.groupby("env")))
    return {env: groups[env] for env in sorted(groups, key=lambda x: (order.get(x, len(order)), x))}


def of_settings(runs: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """(method, setting) -> rows."""
    return dict(iter(runs.groupby(["method", "setting"], sort=False)))


def by_seed(runs: pd.DataFrame, metric: str = EVALUATION) -> pd.Series:
    """Of the rows of one method and setting: mean over tasks at the end, by seed."""
    rows = runs[(runs.metric == metric) & (runs.task == "mean")]
    return rows[rows.step == rows.step.max()].set_index("seed").value.sort_index()


def worst(runs: pd.DataFrame) -> pd.Series:
    """The same of the worst task's return."""
    rows = runs[(runs.metric == EVALUATION) & (runs.task != "mean")]
    return rows.groupby("seed").value.min()


def on_the_way(runs: pd.DataFrame, metric: str = EVALUATION) -> pd.DataFrame:
    """Of the rows of one method and setting: (run, step) means over tasks."""
    rows = runs[(runs.metric == metric) & (runs.task == "mean")]
    return rows.pivot(index="seed", columns="step", values="value")


def texts(*values: pd.Series) -> list[str]:
    """Mean and interval of each."""
    return [mean_interval(x).text() for x in values]


def prior(beta: float, penalty: float, samples: int = 1024) -> str:
    """The sigma_prior at which lambda = beta / (2 N_m sigma_prior^2) is this penalty."""
    return f"{math.sqrt(beta / (2 * samples * penalty)):.3g}"
