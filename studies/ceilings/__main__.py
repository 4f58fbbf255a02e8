"""What does each task allow an agent of its own? results/studies/ceilings/; bench/ceilings.csv is from it."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from bench.collect import EVALUATION
from bench.launch import Job
from bench.tables import markdown
from studies import GOALS, by_env, job, run_study


def jobs() -> Iterator[Job]:
    """A million steps of each task, an agent of its own."""
    for seed in (1, 2, 3):
        for env in (*GOALS, "lunarlander20-goals"):
            steps = 20_000_000 if env.startswith("lunar") else 10_000_000
            yield job("ceilings", env, steps, "independent", seed, {"ent-coef": "0.01"})


def finals(group: pd.DataFrame) -> pd.DataFrame:
    """(task, seed) final return of every task and, last, of their mean."""
    final = group[(group.metric == EVALUATION) & (group.step == group.step.max())]
    return final.pivot(index="task", columns="seed", values="value").loc[final.task.unique()]


def report(runs: pd.DataFrame) -> str:
    """For every task what an agent of its own reaches, each seed, their mean and the best."""
    tables, ceilings = [], []
    for env, group in by_env(runs).items():
        values, rows = finals(group), []
        for task, row in values.iterrows():
            rows.append([task, *(f"{x:.0f}" for x in [*row, row.mean(), row.max()])])
        columns = ["task", *(f"seed {seed}" for seed in values), "mean", "best"]
        tables.append(f"## {env}\n\n{markdown(columns, rows)}")
        ceilings.append([env, f"{values.drop('mean').max(axis=1).mean():.6g}"])
    tables.append(f"## What each environment allows\n\n{markdown(['environment', 'ceiling'], ceilings)}")
    return "\n".join(tables)


if __name__ == "__main__":
    run_study("ceilings", jobs, report)
