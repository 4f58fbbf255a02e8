"""Which rank does LoRA need? results/studies/ranks/."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from bench.launch import Job
from bench.methods import title_of
from bench.statistics import difference
from bench.suites import Suite
from bench.tables import markdown
from studies import by_env, by_seed, job, of_settings, run_study, texts, worst


def jobs() -> Iterator[Job]:
    """LoRA by its rank, with the settings that the search chose except for it, and VarShare of full rank."""
    suite = Suite("cartpole-goals-physics10")
    for seed in range(1, 11):
        for rank in ("1", "2", "4", "8"):
            settings = suite.complete("varshare-lora", suite.chosen["varshare-lora"] | {"rank": rank})
            yield job("ranks", suite.env_id, suite.steps, f"varshare-lora@{rank}", seed, settings)
        settings = suite.complete("varshare", suite.chosen["varshare"])
        yield job("ranks", suite.env_id, suite.steps, "varshare@full", seed, settings)


def report(runs: pd.DataFrame) -> str:
    """The return of every rank, and beside full rank's."""
    [(env, group)] = by_env(runs).items()
    found, rows = of_settings(group), []
    full = next(by_seed(x) for (_, setting), x in found.items() if setting == "full")
    for (method, setting), x in found.items():
        minus = "" if setting == "full" else difference(by_seed(x), full).interval.text()
        rows.append([title_of(method), setting, *texts(by_seed(x), worst(x)), minus])
    title = f"## {env}, {group.steps.iloc[0]:,} steps, {group.seed.nunique()} seeds"
    return f"{title}\n\n{markdown(['method', 'rank', 'mean', 'worst task', 'minus full rank'], rows)}"


if __name__ == "__main__":
    run_study("ranks", jobs, report)
