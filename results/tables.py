"""Runs of a suite -> results/SUITE/runs.csv and table.md: `python results/tables.py main|noise|search`.

The table is made from runs.csv alone, which is made anew where runs/SUITE__* exist. Of a search there is also
settings.csv, every method's best flags, from which benchmark.sh takes them. For the suites of all methods see
report.py.
"""

import json
import sys
from pathlib import Path

import pandas as pd

KEPT = ["eval/episodic_return", "charts/SPS", "charts/wall_time", "varshare/sigma"]
AVERAGED = "losses/clipfrac_first_minibatch"  # over the run; of the others the last value is kept
SETTINGS = ["exp_name", "env_id", "total_timesteps", "seed", "reptile_alpha", "rollout_weights", "sigma_init"]
SETTINGS += ["sigma_prior", "beta", "l2_coef", "sigma"]  # those that differ in a suite are its columns
NONE = "-"  # of a setting that a script has not
SEARCHED = ["env_id", "total_timesteps", "method", "flags"]
COEFFICIENTS = {"varshare": "beta", "l2soft": "l2-coef", "contextual": "embedding-size", "cagrad": "cagrad-c"}
COEFFICIENTS |= {
    "varshare-sac": "beta",
    "varshare-recentred": "reptile-alpha",
    "l2soft-recentred": "reptile-alpha",
}


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
            values[name] = config["args"].get(name, NONE)
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
    lines = [list(result.columns), ["---"] * len(result.columns), *result.to_numpy().tolist()]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def collect_search() -> pd.DataFrame:
    """One row per finished run, here or in the runs.csv of before."""
    rows = []
    for model in sorted(Path("runs").glob("search__*/model.pt")):
        config = json.loads((model.parent / "config.json").read_text())
        heartbeat, args = pd.read_csv(model.parent / "heartbeat.csv"), config["args"]
        final = heartbeat[heartbeat.global_step == heartbeat.global_step.max()]
        final = final[final.metric == "eval/episodic_return"].set_index("task").value
        *_, rate, value, seed = model.parent.name.split("__")
        coefficient = COEFFICIENTS.get(args["exp_name"], "max-grad-norm")
        flags = f"--learning-rate {rate} --{coefficient} {value}"
        setting = args["env_id"], args["total_timesteps"], args["exp_name"], flags
        curve = heartbeat[(heartbeat.metric == "charts/episodic_return") & (heartbeat.task == "mean")].value
        scores = final["mean"], final.drop("mean").min(), curve.mean()
        rows.append((*setting, seed, *scores, config["git_commit"], config["hardware"]))
    columns = [*SEARCHED, "seed", "return", "worst_task", "area", "commit", "hardware"]
    earlier = Path("results/search/runs.csv")
    runs = pd.DataFrame(rows, columns=columns)
    if earlier.exists():
        runs = pd.concat([pd.read_csv(earlier, dtype={"seed": str}, float_precision="round_trip"), runs])
    return runs.drop_duplicates([*SEARCHED, "seed"], keep="last")


def search_table(runs: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """All settings, best first; and the best of every method with the budget of its search.

    The best has the highest final evaluation; of equal ones the largest area under the training curve.
    """
    complete = runs.groupby(SEARCHED).seed.transform("nunique") == runs.seed.nunique()
    runs = runs[complete]  # a setting of which a run has failed is no candidate
    settings = runs.groupby(SEARCHED)[["return", "worst_task", "area"]].mean().round(1)
    settings["std"] = runs.groupby(SEARCHED)["return"].std().round(1)
    settings = settings.sort_values(["total_timesteps", "return", "area"], ascending=[True, False, False])
    settings = settings.reset_index()
    by_method = settings.groupby(SEARCHED[:3], sort=False)
    best = by_method.first()
    best["settings_tried"] = by_method.size()
    best["seeds"] = runs.groupby(SEARCHED[:3]).seed.nunique()
    best["runs"] = runs.groupby(SEARCHED[:3]).size()
    lines = [list(settings.columns), ["---"] * len(settings.columns), *settings.to_numpy().tolist()]
    text = "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
    return text, best.drop(columns=["worst_task", "area", "std"]).reset_index()


def main(suite: str) -> None:
    folder = Path("results", suite)
    folder.mkdir(parents=True, exist_ok=True)
    if list(Path("runs").glob(f"{suite}__*/config.json")):
        runs = collect_search() if suite == "search" else collect(suite)
        runs.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    runs = pd.read_csv(folder / "runs.csv")
    if suite == "search":
        text, best = search_table(runs)
        best.to_csv(folder / "settings.csv", index=False)
        print(best.to_string(index=False))
    else:
        text = table(runs)
        print(text)
    (folder / "table.md").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
