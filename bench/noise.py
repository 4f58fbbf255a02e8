"""The suite `noise`: beta and lambda, and how noisy each of them is. runs/noise__* -> results/noise/.

The table is made from runs.csv alone, which is made anew where there are runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from bench.tables import markdown

KEPT = ["eval/episodic_return", "charts/SPS", "charts/wall_time", "varshare/sigma"]
AVERAGED = "losses/clipfrac_first_minibatch"  # over the run; of the others the last value is kept
SETTINGS = ["exp_name", "env_id", "total_timesteps", "seed", "reptile_alpha", "rollout_weights", "sigma_init"]
SETTINGS += ["sigma_prior", "beta", "l2_coef", "sigma"]  # those that differ are columns
NONE = "-"  # of a setting that a script has not


def collect() -> pd.DataFrame:
    """One row per finished run, kept metric and task; hardware and commit with every row."""
    rows = []
    for model in sorted(Path("runs").glob("noise__*/model.pt")):
        config = json.loads((model.parent / "config.json").read_text())
        heartbeat = pd.read_csv(model.parent / "heartbeat.csv")
        last = heartbeat[heartbeat.metric.isin(KEPT)].groupby(["metric", "task"]).value.last()
        average = heartbeat[heartbeat.metric == AVERAGED].groupby(["metric", "task"]).value.mean()
        values = pd.concat([last, average]).reset_index()
        for name in SETTINGS:
            values[name] = config["args"].get(name, NONE)
        values["exp_name"] = values["exp_name"].str.partition("@")[0]
        values["commit"], values["hardware"] = config["git_commit"], config["hardware"]
        rows.append(values)
    return pd.concat(rows)[[*SETTINGS, "metric", "task", "value", "commit", "hardware"]]


def table(runs: pd.DataFrame) -> str:
    """Per setting: mean over tasks of the final evaluation, over seeds; and what else explains it."""
    differ = [name for name in SETTINGS if name in runs and runs[name][runs[name] != NONE].nunique() > 1]
    groups = [name for name in differ if name != "seed"] or ["env_id"]
    mean = runs[runs.task == "mean"].pivot_table(index=[*groups, "seed"], columns="metric", values="value")
    tasks = runs[(runs.metric == "eval/episodic_return") & (runs.task != "mean")]
    mean["worst task"] = tasks.groupby([*groups, "seed"]).value.min()
    over_seeds = mean.reset_index().groupby(groups)
    evaluation = over_seeds["eval/episodic_return"]
    result = pd.DataFrame({"seeds": evaluation.count(), "return": evaluation.mean().round(1)})
    result["std over seeds"], result["worst seed"] = evaluation.std().round(1), evaluation.min().round(1)
    result["worst task"] = over_seeds["worst task"].mean().round(1)
    clipped = over_seeds[AVERAGED].mean() * 100  # which SAC does not have
    result["clipped at first minibatch"] = clipped.map("{:.2f} %".format).where(clipped.notna(), "")
    sigma = over_seeds["varshare/sigma"].mean()  # which VarShare only has
    result["sigma at end"] = sigma.map("{:.4f}".format).where(sigma.notna(), "")
    result = result.sort_values("return", ascending=False).reset_index()
    return markdown(list(result.columns), [list(map(str, row)) for row in result.to_numpy()])


def main() -> str:
    """Make runs.csv, where runs exist, and table.md; returns the table."""
    folder = Path("results/noise")
    folder.mkdir(parents=True, exist_ok=True)
    if list(Path("runs").glob("noise__*/model.pt")):
        collect().to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    text = table(pd.read_csv(folder / "runs.csv"))
    (folder / "table.md").write_text(text)
    return text
