"""From the folders of finished runs to long tables: results/SUITE/runs.csv and configs.csv.

runs.csv     method, seed, metric, task, step, value: every number that tables, figures and claims use
configs.csv  method, seed, env, steps, the suite searched on, finished, command, commit, hardware
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bench.methods import fail
from bench.suites import Suite

HEADER = "global_step,metric,task,value"  # of heartbeat.csv
EVALUATION, TRAINING = "eval/episodic_return", "charts/episodic_return"
SUCCESS, TRAINING_SUCCESS = "eval/success_rate", "charts/success_rate"
NORMS = ("mu_norm", "theta_norm", "theta_moved")  # of methods with residuals, whatever they begin with
NOT_TRAINED = ("return_stats", "target", "action_scale", "action_bias", "obs_norm", "value_norm")
NOT_TRAINED += ("sigma", "live", "fisher", "fisher_weight")  # sigma is made of mu's gradients
NOT_TRAINED += ("sigma_prior", "scales")  # of the prior


@dataclass
class Run:
    """What is logged of a run: its folder, config.json, and heartbeat.csv in long form."""

    folder: Path
    config: dict
    log: pd.DataFrame

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return self.config["task_names"]

    @property
    def finished(self) -> bool:
        """The final evaluation is logged, and the model saved."""
        evaluated = ((self.log["metric"] == EVALUATION) & (self.log["task"] == "mean")).any()
        return evaluated and (self.folder / "model.pt").exists()

    @property
    def title(self) -> str:
        """Name, environment, script, and how far it went if it is not finished."""
        args, step = self.config["args"], self.log["global_step"].max()
        title = f"{self.folder.name}:  {self.config['script']} on {args['env_id']}, seed {args['seed']}"
        if not self.finished:
            title += f"  (not finished: {step:,} of {args['total_timesteps']:,} steps)"
        return title

    def metrics(self, prefix: str = "") -> list[str]:
        """Names of the metrics that begin so, in the order of the log."""
        return [name for name in self.log["metric"].unique() if name.startswith(prefix)]

    def values(self, metric: str) -> pd.DataFrame:
        """A metric's values as far as they are logged: rows are global steps, columns tasks and "mean"."""
        rows = self.log[self.log["metric"] == metric]
        table = rows.pivot(index="global_step", columns="task", values="value")
        return table[[name for name in (*self.tasks, "mean") if name in table]]


def read_run(folder: Path) -> Run:
    """Read a run's folder."""
    if folder.is_symlink():  # runs/latest
        folder = folder.parent / folder.readlink()
    for name in ("heartbeat.csv", "config.json"):
        if not (folder / name).is_file():
            fail(f"{folder} is not the folder of a run: it has no {name}")
    header, _, text = (folder / "heartbeat.csv").read_text().partition("\n")
    if header != HEADER:
        fail(f"{folder / 'heartbeat.csv'} is not the log of a run: its first line is not {HEADER}")
    whole_lines = f"{header}\n{text[: text.rfind(chr(10)) + 1]}"  # the last one may be being written
    run = Run(folder, json.loads((folder / "config.json").read_text()), pd.read_csv(io.StringIO(whole_lines)))
    if not run.finished:  # neither may the numbers of the last step be complete
        run.log = run.log[run.log["global_step"] < run.log["global_step"].max()]
    if run.log.empty:
        fail(f"{folder} has not logged enough yet")
    return run


def residuals(agent: dict, tasks: list[str]) -> list[tuple[str, str, float]]:
    """Of a saved agent with residuals: their size over theta's, and the cosine of each pair of tasks.

    What all residuals have in common counts as shared: (theta + c, mu_m - c) is the same network.
    """
    common = agent["mu"].mean(0)
    mu = agent["mu"] - common
    rows = [("residual/ratio", "mean", mu.norm(dim=1).mean() / (agent["theta"] + common).norm())]
    mu = mu / mu.norm(dim=1, keepdim=True)
    cosines = (mu @ mu.T).numpy()
    return rows + [
        ("cosine", f"{tasks[i]}|{tasks[j]}", cosines[i, j]) for i, j in zip(*np.triu_indices(len(mu), 1))
    ]


def parameters(agent: dict) -> tuple[int, int]:
    """Of a saved agent, how many each task has of its own, and how many there are in all."""
    trained = [x for name, x in agent.items() if name.partition(".")[0] not in NOT_TRAINED]
    return sum(x.shape[1] for x in trained if x.ndim == 2), sum(x.numel() for x in trained)  # (task, weight)


def collect_run(folder: Path, score: str = "return") -> pd.DataFrame:
    """A finished run in rows: metric, task, step, value.

    Success on the way is kept only of suites that are scored by it: `bench.tables.measure` goes by that.
    """
    import torch  # slow, and not needed for anything else here

    run = read_run(folder)
    log, last = run.log, run.log.global_step.max()
    name = log.metric.str.rpartition("/")[2]
    on_the_way = (log.metric == EVALUATION) & (log.task == "mean")
    on_the_way |= name.isin(NORMS) & (log.task == "mean")
    if score == "success":
        on_the_way |= log.metric.isin((SUCCESS, TRAINING_SUCCESS)) & (log.task == "mean")
    if run.config["script"].endswith("_sac.py"):  # its cost is compared
        on_the_way |= (log.metric == "charts/wall_time") & (log.task == "mean")
    at_end = log.metric.isin((EVALUATION, SUCCESS, "charts/wall_time", "charts/SPS"))
    at_end |= log.metric.str.contains("/sharing_ratio/")
    rows = log[on_the_way | at_end & (log.global_step == last)].rename(columns={"global_step": "step"})
    agent = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)["agent"]
    own, every = parameters(agent)
    extra = [("parameters/own", "mean", own), ("parameters/all", "mean", every)]
    if "mu" in agent and agent["mu"].shape[1:] == agent["theta"].shape:  # not the factors of low rank
        extra += residuals(agent, run.tasks)
    extra = [{"metric": m, "task": t, "step": last, "value": float(x)} for m, t, x in extra]
    return pd.concat([rows, pd.DataFrame(extra)], ignore_index=True)


def of_other_methods(suite: Suite, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of configs.csv and runs.csv of methods that are not the suite's, from runs as long as its."""
    if not (out / "configs.csv").exists():
        return pd.DataFrame(), pd.DataFrame()
    configs, runs = (pd.read_csv(out / f"{name}.csv") for name in ("configs", "runs"))
    others = configs[~configs.method.isin(suite.methods)]
    others = others[(others.env == suite.env_id) & (others.steps == suite.steps)]
    return others, runs[runs.method.isin(others.method)]


def collect(suite: Suite, out: Path) -> None:
    """Write runs.csv and configs.csv of a suite's finished runs; those of other methods stay as they are."""
    others = of_other_methods(suite, out)
    runs, configs = [], []
    for job, (method, seed) in zip(suite.jobs(), suite.pairs()):
        key = {"method": method, "seed": seed}
        config = {"env": suite.env_id, "steps": suite.steps, "searched_on": suite.settings}
        config |= {"finished": job.finished, "command": job.command}
        if job.finished:
            folder = Path("runs", job.name)
            runs.append(collect_run(folder, suite.score).assign(**key))
            found = json.loads((folder / "config.json").read_text())
            config |= {"git_commit": found["git_commit"], "hardware": found["hardware"]}
        configs.append(key | config)
    if not runs:
        fail(f"no run of the suite {suite.name} has finished")
    out.mkdir(parents=True, exist_ok=True)
    table = pd.concat([others[1], *runs])[["method", "seed", "metric", "task", "step", "value"]]
    table["value"] = table["value"].map("{:.5g}".format)
    table.to_csv(out / "runs.csv", index=False)
    pd.concat([others[0], pd.DataFrame(configs)]).to_csv(out / "configs.csv", index=False)
