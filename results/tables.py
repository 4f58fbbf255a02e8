"""Runs of a suite -> results/SUITE/runs.csv (long) and table.md: `python results/tables.py main|noise`.

The table is made from runs.csv alone, which is made anew where runs/SUITE__* exist.
"""

import json
import sys
from pathlib import Path

import pandas as pd

KEPT = ["eval/episodic_return", "charts/SPS", "charts/wall_time", "varshare/sigma"]
AVERAGED = "losses/clipfrac_first_minibatch"  # over the run; of the others the last value is kept
SETTINGS = ["env_id", "total_timesteps", "seed", "reptile_alpha", "rollout_weights", "sigma_init"]
SETTINGS += ["sigma_prior", "beta"]


def collect(suite: str) -> pd.DataFrame:
    """One row per run, kept metric and task; hardware and commit with every row."""
    rows = []
    for config_file in sorted(Path("runs").glob(f"{suite}__*/config.json")):
        config = json.loads(config_file.read_text())
        heartbeat = pd.read_csv(config_file.parent / "heartbeat.csv")
        last = heartbeat[heartbeat.metric.isin(KEPT)].groupby(["metric", "task"]).value.last()
        average = heartbeat[heartbeat.metric == AVERAGED].groupby(["metric", "task"]).value.mean()
        values = pd.concat([last, average]).reset_index()
        for name in SETTINGS:
            values[name] = config["args"][name]
        values["commit"], values["hardware"] = config["git_commit"], config["hardware"]
        rows.append(values)
    return pd.concat(rows)[[*SETTINGS, "metric", "task", "value", "commit", "hardware"]]


def table(runs: pd.DataFrame) -> str:
    """Per setting: mean over tasks of the final evaluation, over seeds; and what else explains it."""
    groups = [name for name in SETTINGS if name != "seed" and runs[name].nunique() > 1] or ["env_id"]
    mean = runs[runs.task == "mean"].pivot_table(index=[*groups, "seed"], columns="metric", values="value")
    tasks = runs[(runs.metric == "eval/episodic_return") & (runs.task != "mean")]
    mean["worst task"] = tasks.groupby([*groups, "seed"]).value.min()
    over_seeds = mean.reset_index().groupby(groups)
    evaluation = over_seeds["eval/episodic_return"]
    result = pd.DataFrame({"seeds": evaluation.count(), "return": evaluation.mean().round(1)})
    result["std over seeds"], result["worst seed"] = evaluation.std().round(1), evaluation.min().round(1)
    result["worst task"] = over_seeds["worst task"].mean().round(1)
    result["clipped at first minibatch"] = (over_seeds[AVERAGED].mean() * 100).map("{:.2f} %".format)
    result["sigma at end"] = over_seeds["varshare/sigma"].mean().round(4)
    result = result.sort_values("return", ascending=False).reset_index()
    lines = [list(result.columns), ["---"] * len(result.columns), *result.to_numpy().tolist()]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def main(suite: str) -> None:
    folder = Path("results", suite)
    folder.mkdir(parents=True, exist_ok=True)
    if list(Path("runs").glob(f"{suite}__*/config.json")):
        collect(suite).to_csv(folder / "runs.csv", index=False)
    text = table(pd.read_csv(folder / "runs.csv"))
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
