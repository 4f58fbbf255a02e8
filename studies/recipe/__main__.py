"""What helps PPO on Meta-World, a change at a time? results/studies/recipe/."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from bench.collect import SUCCESS
from bench.launch import Job
from bench.methods import parse_flags, title_of
from bench.statistics import compare
from bench.suites import SEEDS
from bench.tables import markdown
from studies import by_env, by_seed, job, of_settings, run_study, texts

RECIPES = {  # setting -> what differs from the settings for mt10 and lambda 0.95
    "base": "",
    "no critic norm": "--no-norm-critic",
    "2 environments": "--envs-per-task 2",
    "16 epochs": "--update-epochs 16",
    "annealed": "--anneal-lr",
    "entropy 0.003": "--ent-coef 0.003",
    "lambda 0.97": "--gae-lambda 0.97",
    "lambda 0.99": "--gae-lambda 0.99",
    "lambda 0.97 entropy 0.003": "--gae-lambda 0.97 --ent-coef 0.003",
    "256 x 256": "--hidden-sizes 256 256",
    "clip norm 10": "--max-grad-norm 10",
}


def jobs() -> Iterator[Job]:
    """Of a baseline, so that VarShare is not favoured."""
    for seed in SEEDS:
        for setting, flags in RECIPES.items():
            settings = {"gae-lambda": "0.95", "eval-episodes": "20"} | parse_flags(flags)
            method = f"hard-sharing@{setting.replace(' ', '-')}"
            yield job("recipe", "mt10", 1_000_000, method, seed, settings)


def report(runs: pd.DataFrame) -> str:
    """Success in percent of every setting, the best first, and of every task."""
    [(env, group)] = by_env(runs).items()
    tasks, rows = [task for task in group.task.unique() if task != "mean"], []
    found = {setting: x[x.metric == SUCCESS] for (_, setting), x in of_settings(group).items()}
    success = {setting: 100 * by_seed(x, SUCCESS) for setting, x in found.items()}
    others = [setting for setting in success if setting != "base"]
    pairs = [success[s].align(success["base"], join="inner") for s in others]
    minus_base = dict(zip(others, compare(pairs)))
    for setting in sorted(found, key=lambda s: -success[s].mean()):
        x, by_task = success[setting], found[setting].groupby("task").value.mean()
        cells = [setting.replace("-", " "), str(len(x)), *texts(x), "", ""]
        if setting in minus_base:
            cells[-2:] = [cell.replace("nan", "-") for cell in minus_base[setting].cells()[:2]]
        rows.append([*cells, *(f"{100 * by_task[task]:.0f}" for task in tasks)])
    columns = ["setting", "runs", "success, %", "minus base, same seeds", "p (Holm)", *tasks]
    title = f"## {env}, {group.steps.iloc[0]:,} steps, {title_of(group.method.iloc[0])}"
    return f"{title}\n\n{markdown(columns, rows)}"


if __name__ == "__main__":
    run_study("recipe", jobs, report)
