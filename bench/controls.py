"""The control suites of benchmark.sh: runs/SUITE__* -> results/SUITE/runs.csv and table.md.

    python -m bench.controls power           can a suite tell methods apart?
    python -m bench.controls ceilings        what does each task allow an agent of its own?
    python -m bench.controls normalisation   what do --norm-obs and --norm-value change?

A run's --exp-name is method@setting. The table is made from runs.csv alone, which is made anew where there
are runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from bench.statistics import BLIND, MARGIN, can_tell, difference, holm, margin, mean_interval, verdict

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("eval/episodic_return", "eval/success_rate")
RETURN = METRICS[0]
KEY = ["env", "steps", "method", "setting", "seed"]
HIGHEST = {"cartpole10": 500.0, "cartpole-identical10": 500.0}  # by construction: a reward of 1, 500 steps


def collect(folder: Path, suite: str) -> pd.DataFrame:
    """The final evaluations of all finished runs, long, with commit and hardware."""
    rows = []
    for model in sorted(folder.glob(f"{suite}__*/model.pt")):
        config = json.loads((model.parent / "config.json").read_text())
        log, args = pd.read_csv(model.parent / "heartbeat.csv"), config["args"]
        log = log[log.metric.isin(METRICS) & (log.global_step == log.global_step.max())]
        method, _, setting = args["exp_name"].partition("@")
        key = dict(zip(KEY, (args["env_id"], args["total_timesteps"], method, setting, args["seed"])))
        rows.append(log.assign(**key, commit=config["git_commit"], hardware=config["hardware"]))
    columns = [*KEY, "metric", "task", "value", "commit", "hardware"]
    return pd.concat(rows)[columns] if rows else pd.DataFrame(columns=columns)


def ceiling(env: str) -> float | None:
    """Mean over tasks of what each allows: the highest there is, or what results/ceilings has measured."""
    path = Path("results/ceilings/runs.csv")  # of $OUT, else of the project
    path = path if path.exists() else ROOT / path
    if env in HIGHEST or not path.exists():
        return HIGHEST.get(env)
    runs = pd.read_csv(path)
    found = runs[(runs.env == env) & (runs.task == "mean") & (runs.metric == RETURN)].value
    return found.mean() if len(found) else None


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def by_seed(runs: pd.DataFrame, metric: str = RETURN) -> pd.Series:
    """Of the rows of one method and setting: mean over tasks, by seed."""
    rows = runs[(runs.metric == metric) & (runs.task == "mean")]
    return rows.set_index("seed").value.sort_index()


def worst(runs: pd.DataFrame) -> pd.Series:
    """The same for the worst task."""
    rows = runs[(runs.metric == RETURN) & (runs.task != "mean")]
    return rows.groupby("seed").value.min()


def power(runs: pd.DataFrame) -> str:
    """For every suite the control and the others at their step sizes, and whether the suite can tell."""
    summary, tables = [], []
    for (env, steps), group in runs.groupby(["env", "steps"], sort=False):
        settings = sorted(group.setting.unique(), key=float)
        methods = dict(iter(group.groupby("method", sort=False)))
        means = {m: {s: by_seed(x) for s, x in rows.groupby("setting")} for m, rows in methods.items()}
        chosen = {m: max(x, key=lambda s: x[s].mean()) for m, x in means.items()}
        best = {m: x[chosen[m]] for m, x in means.items()}
        able, why = can_tell(best, ceiling(env))
        others = [m for m in best if m != BLIND and BLIND in best]
        differences = {m: difference(best[m], best[BLIND]) for m in others}
        corrected = dict(zip(others, holm([d.p for d in differences.values()])))
        within = margin(x.mean() for x in best.values())
        rows = []
        for method in sorted(best, key=lambda m: (m != BLIND, -best[m].mean())):
            rows_of = methods[method][methods[method].setting == chosen[method]]
            cells = [method, str(len(best[method]))]
            cells += [f"{means[method][s].mean():.1f}" if s in means[method] else "" for s in settings]
            cells += [mean_interval(x).text() for x in (best[method], worst(rows_of))]
            successes = by_seed(rows_of, METRICS[1])
            cells += [f"{successes.mean():.0%}"] if METRICS[1] in set(group.metric) else []
            if method in differences:
                d = differences[method]
                cells += [
                    d.interval.text(),
                    f"{corrected[method]:.2g}",
                    verdict(d, corrected[method], within),
                ]
            rows.append(cells if method in differences else [*cells, "", "", ""])
        columns = [
            "method",
            "runs",
            *(f"step size {s}" for s in settings),
            "mean at the best",
            "its worst task",
        ]
        columns += ["success"] * (METRICS[1] in set(group.metric))
        columns += ["minus task-blind", "p (Holm)", "against task-blind"]
        answer = "can tell" if able else "**cannot tell**"
        summary.append([env, f"{steps:,}", answer, why])
        tables.append(f"## {env}, {steps:,} steps: {answer}\n\n{why}\n\n{markdown(columns, rows)}")
    head = markdown(["suite", "steps", "methods apart", "why"], summary)
    note = "The step size of each method is the best of those tried, on the same seeds. In brackets 95 % "
    note += "intervals, Student's t over runs; differences are paired by seed. "
    note += f"The same: within {MARGIN:.0%} of the best mean.\n"
    return "\n".join([head, note, *tables])


def ceilings(runs: pd.DataFrame) -> str:
    """For every task what an agent of its own reaches, each seed and their mean."""
    tables = []
    for env, group in runs.groupby("env", sort=False):
        values = group[group.metric == RETURN].pivot(index="task", columns="seed", values="value")
        values = values.loc[group.task.unique()]
        rows = [
            [task, *(f"{x:.0f}" for x in [*row, row.mean(), row.max()])] for task, row in values.iterrows()
        ]
        columns = ["task", *(f"seed {seed}" for seed in values), "mean", "best"]
        tables.append(f"## {env}\n\n{markdown(columns, rows)}")
    return "\n".join(tables)


def normalisation(runs: pd.DataFrame) -> str:
    """For every suite and method the return with either, both and neither, and what they add."""
    settings, tables = ["none", "obs", "value", "obs+value"], []
    for (env, steps), group in runs.groupby(["env", "steps"], sort=False):
        rows, gains = [], []
        for method, rows_of in group.groupby("method", sort=False):
            means = {s: by_seed(x) for s, x in rows_of.groupby("setting")}
            center = {s: means[s].mean() if s in means else np.nan for s in settings}
            spread = {s: f" +- {x.std():.1f}" if len(x) > 1 else "" for s, x in means.items()}
            rows.append([method, *(f"{center[s]:.1f}{spread[s]}" if s in means else "" for s in settings)])
            gains.append([center[s] - center["none"] for s in settings[1:]])
        mean = pd.DataFrame(gains).mean()  # of the methods that have both
        rows.append(["mean gain over none", "", *(f"{x:+.1f}" for x in mean)])
        columns = ["method", *settings]
        seeds = group.seed.nunique()
        tables.append(f"## {env}, {steps:,} steps, {seeds} seeds\n\n{markdown(columns, rows)}")
    return "\n".join(tables)


def main(suite: str) -> None:
    """Make runs.csv, where runs exist, and table.md."""
    folder = Path("results", suite)
    folder.mkdir(parents=True, exist_ok=True)
    if len(runs := collect(Path("runs"), suite)):
        runs["value"] = runs["value"].map("{:.6g}".format)
        runs.to_csv(folder / "runs.csv", index=False)
    runs = pd.read_csv(folder / "runs.csv", keep_default_na=False)
    machine = (
        f"{', '.join(runs.hardware.unique())}; commit {', '.join(f'`{x}`' for x in runs.commit.unique())}"
    )
    table = {"power": power, "ceilings": ceilings, "normalisation": normalisation}[suite]
    text = f"{table(runs)}\n{len(runs[KEY].drop_duplicates())} runs, one core each ({machine}).\n"
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
