"""What do --norm-obs and --norm-value change? results/studies/normalisation/."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bench.launch import Job
from bench.suites import SEEDS
from bench.tables import markdown
from studies import GOALS, by_env, by_seed, job, prior, run_study

SETTINGS = ["none", "obs", "value", "obs+value"]


def jobs() -> Iterator[Job]:
    """With either, both and neither; L2Soft and VarShare with the same penalty."""
    for env in (*GOALS, "lunarlander20-goals"):
        lander = env.startswith("lunar")
        steps, rate = (2_000_000, "0.003") if lander else (500_000, "0.006")
        own = {"l2soft": {"l2-coef": "0.01"}}
        own["varshare"] = {"beta": "0.001", "sigma-prior": prior(0.001, 0.01, 512 if lander else 1024)}
        for seed in SEEDS:
            for setting in SETTINGS:
                settings = {"learning-rate": rate}
                for name in ("obs", "value"):
                    settings[f"norm-{name}" if name in setting else f"no-norm-{name}"] = ""
                for method in ("task-blind", "hard-sharing", "l2soft", "varshare"):
                    flags = settings | own.get(method, {})
                    yield job("normalisation", env, steps, f"{method}@{setting}", seed, flags)


def report(runs: pd.DataFrame) -> str:
    """For every environment and method the return with either, both and neither, and what they add."""
    tables = []
    for env, group in by_env(runs).items():
        rows, gains = [], []
        for method, rows_of in group.groupby("method", sort=False):
            means = {s: by_seed(x) for s, x in rows_of.groupby("setting")}
            center = {s: means[s].mean() if s in means else np.nan for s in SETTINGS}
            spread = {s: f" +- {x.std():.1f}" if len(x) > 1 else "" for s, x in means.items()}
            rows.append([method, *(f"{center[s]:.1f}{spread[s]}" if s in means else "" for s in SETTINGS)])
            gains.append([center[s] - center["none"] for s in SETTINGS[1:]])
        mean = pd.DataFrame(gains).mean()  # of the methods that have both
        rows.append(["mean gain over none", "", *(f"{x:+.1f}" for x in mean)])
        title = f"{env}, {group.steps.iloc[0]:,} steps, {group.seed.nunique()} seeds"
        tables.append(f"## {title}\n\n{markdown(['method', *SETTINGS], rows)}")
    return "\n".join(tables)


if __name__ == "__main__":
    run_study("normalisation", jobs, report)
