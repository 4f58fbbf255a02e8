"""From the folders of finished runs to the CSVs in results/, the same for suites and for studies.

runs.csv     env, method, setting, seed, metric, task, step, value: every number that something is made of
configs.csv  a row for each run: env, method, setting, seed, steps, searched_on, command, commit, hardware
sharing.csv  method, metric, task, value: the map of what tasks share, mean over runs; of suites only

A run's --exp-name is method or method@setting. In runs.csv env and setting are left out where all runs have
the same. Without a commit a run has not finished.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench.launch import Job
from bench.methods import fail, parse_flags
from envs.folders import find_run

HEADER = "global_step,metric,task,value"  # of heartbeat.csv
EVALUATION, SUCCESS, TRAINING_SUCCESS = "eval/episodic_return", "eval/success_rate", "charts/success_rate"
SECONDS = "charts/wall_time"
NORMS = ("varshare/mu_norm", "varshare/theta_moved")
SHARING = "varshare/sharing_ratio/"
NOT_TRAINED = ("return_stats", "target", "obs_norm", "value_norm", "live")
NOT_TRAINED += ("sigma", "h_sum", "h_count", "sigma_prior", "scales")  # made of gradients, or of the prior
KEY = ["env", "method", "setting", "seed"]
COLUMNS = [*KEY, "metric", "task", "step", "value"]


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
        return evaluated and (self.folder / "evaluation.csv").exists()

    def metrics(self, prefix: str = "") -> list[str]:
        """Names of the metrics that begin so, in the order of the log."""
        return [name for name in self.log["metric"].unique() if name.startswith(prefix)]

    def values(self, metric: str) -> pd.DataFrame:
        """A metric's values as far as they are logged: rows are global steps, columns tasks and "mean"."""
        rows = self.log[self.log["metric"] == metric]
        table = rows.pivot(index="global_step", columns="task", values="value")
        return table[[name for name in (*self.tasks, "mean") if name in table]]


def read_log(source: Path | io.StringIO) -> pd.DataFrame:
    """heartbeat.csv; a task may be called NA or 1, which are no missing value and no number."""
    texts = {"metric": str, "task": str}
    return pd.read_csv(source, dtype=texts, keep_default_na=False, na_values={"value": ["nan"]})


def read_run(folder: Path) -> Run:
    """Read a run's folder."""
    folder = find_run(folder)
    for name in ("heartbeat.csv", "config.json"):
        if not (folder / name).is_file():
            fail(f"{folder} is not the folder of a run: it has no {name}")
    text = (folder / "heartbeat.csv").read_text()
    if not text.startswith(f"{HEADER}\n"):
        fail(f"{folder / 'heartbeat.csv'} is not the log of a run: its first line is not {HEADER}")
    whole_lines = text[: text.rindex("\n")]  # the last one may be being written
    log = read_log(io.StringIO(whole_lines))
    run = Run(folder, json.loads((folder / "config.json").read_text()), log)
    if not run.finished:  # nor may the numbers of the last step be complete
        run.log = run.log[run.log["global_step"] < run.log["global_step"].max()]
    if run.log.empty:
        fail(f"{folder} has not logged enough yet")
    return run


def read_agent(run: Run) -> dict:
    """The saved agent of a finished run, by the names of its parameters and buffers."""
    import torch  # slow, and not needed for anything else here

    return torch.load(run.folder / "model.pt", map_location="cpu", weights_only=True)["agent"]


def residuals(agent: dict, tasks: list[str]) -> list[tuple[str, str, float]]:
    """Of a saved agent with residuals: their size over theta's, and the cosine of each pair of tasks."""
    common = agent["mu"].mean(0)  # counts as shared: (theta + c, mu_m - c) is the same network
    mu = agent["mu"] - common
    size = mu.norm(dim=1)
    theta_norm = (agent["theta"] + common).norm()
    rows = [("residual/ratio", "mean", size.mean() / theta_norm)]
    directions = mu / size.unsqueeze(1)
    cosines = directions @ directions.T
    for i, j in itertools.combinations(range(len(tasks)), 2):
        rows.append(("cosine", f"{tasks[i]}|{tasks[j]}", cosines[i, j]))
    return rows


def parameters(agent: dict) -> tuple[int, int]:
    """Of a saved agent: own parameters per task, and parameters in all."""
    trained = [x for name, x in agent.items() if name.partition(".")[0] not in NOT_TRAINED]
    own = [x.shape[1] for x in trained if x.ndim == 2]  # (task, weight)
    return sum(own), sum(x.numel() for x in trained)


def evaluations(run: Run, final: Iterable[str] = (), on_the_way: Iterable[str] = ()) -> pd.DataFrame:
    """A run's evaluations in rows: all of the last step, and of every step the mean return over tasks.

    With the last values of further metrics, `final`, and the means over tasks of those `on_the_way`.
    """
    log = run.log
    means = (log.task == "mean") & log.metric.isin([EVALUATION, *on_the_way])
    at_end = log.metric.isin([EVALUATION, SUCCESS, *final]) & (log.global_step == log.global_step.max())
    return log[means | at_end].rename(columns={"global_step": "step"})


def compared(run: Run, by_success: bool = False) -> pd.DataFrame:
    """What is kept of a run of a suite, whose methods are compared by return or by success.

    Success in training is kept in the second case only: `bench.tables.Result` goes by that.
    """
    final = [SECONDS, "charts/SPS", *run.metrics(SHARING)]
    on_the_way = [*NORMS]
    if run.config["script"].endswith("_sac.py"):  # its cost is compared
        on_the_way.append(SECONDS)
    if by_success:
        on_the_way += [SUCCESS, TRAINING_SUCCESS]
    rows = evaluations(run, final, on_the_way)
    agent = read_agent(run)
    own, every = parameters(agent)
    more = [("parameters/own", "mean", own), ("parameters/all", "mean", every)]
    if "mu" in agent and agent["mu"].shape[1:] == agent["theta"].shape:  # not the factors of low rank
        more += residuals(agent, run.tasks)
    more = pd.DataFrame(more, columns=["metric", "task", "value"]).assign(step=rows.step.max())
    return pd.concat([rows, more.astype({"value": float})], ignore_index=True)


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """runs.csv and configs.csv of a suite or a study."""
    texts = dict.fromkeys(("setting", "searched_on", "command", "commit", "hardware"), str)
    runs = pd.read_csv(folder / "runs.csv", dtype=texts, keep_default_na=False)
    configs = pd.read_csv(folder / "configs.csv", dtype=texts, keep_default_na=False)
    for name in {"env", "setting"} - set(runs):
        runs[name] = configs[name].iloc[0]
    return runs[COLUMNS], configs


def earlier(folder: Path, today: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is known of methods and settings that are not today's, if their runs are as long as today's."""
    if not (folder / "configs.csv").exists():
        return pd.DataFrame(columns=COLUMNS), today[:0]
    runs, configs = read(folder)
    again = configs.set_index(KEY[:-1]).index.isin(today.set_index(KEY[:-1]).index)
    configs = configs[~again]
    steps = today.drop_duplicates("env").set_index("env").steps
    configs = configs[configs.steps == configs.env.map(steps).fillna(configs.steps)]
    return runs.merge(configs[KEY]), configs


def config_of(job: Job) -> dict:
    """A run's row in configs.csv; without commit and hardware if it has not finished."""
    flags = parse_flags(job.flags)
    method, _, setting = flags["exp-name"].partition("@")
    row = {"env": flags["env-id"], "method": method, "setting": setting, "seed": int(flags["seed"])}
    row |= {"steps": int(flags["total-timesteps"]), "searched_on": "", "command": job.command}
    if not job.finished:
        return row | {"commit": "", "hardware": ""}
    config = json.loads(Path("runs", job.name, "config.json").read_text(encoding="utf-8"))
    return row | {"commit": config["git_commit"], "hardware": config["hardware"]}


def collect(
    jobs: Iterable[Job],
    out: Path,
    rows_of: Callable[[Run], pd.DataFrame] = evaluations,
    searched_on: str = "",
) -> None:
    """Write a suite's or a study's CSVs to its folder in results/, of all runs that have finished.

    What is known of other methods and settings stays. rows_of: what is kept of a run: metric, task, step,
    value. searched_on: the suite whose search chose the settings.
    """
    jobs, new = list(jobs), []
    today = pd.DataFrame([config_of(job) for job in jobs]).assign(searched_on=searched_on)
    for job, key in zip(jobs, today[KEY].to_dict("records")):
        if job.finished:
            new.append(rows_of(read_run(Path("runs", job.name))).assign(**key))
    if not new:
        fail(f"no run of {out.name} has finished")
    new, (old, configs) = pd.concat(new)[COLUMNS], earlier(out, today)
    out.mkdir(parents=True, exist_ok=True)
    mapped = (new.metric == "cosine") | new.metric.str.startswith(SHARING)
    if mapped.any():
        write_sharing(new[mapped & (new.task != "mean")], configs.method, out)
    runs = pd.concat([rows for rows in (old, new[~mapped]) if len(rows)])
    same = [name for name in ("env", "setting") if runs[name].nunique() == 1]
    runs = runs.assign(value=runs.value.map("{:.5g}".format)).drop(columns=same)
    runs.to_csv(out / "runs.csv", index=False)
    configs = pd.concat([rows for rows in (configs, today) if len(rows)])
    configs.to_csv(out / "configs.csv", index=False)


def write_sharing(rows: pd.DataFrame, others: pd.Series, out: Path) -> None:
    """sharing.csv: means over runs; rows of these other methods stay."""
    means = rows.groupby(["method", "metric", "task"], sort=False).value.mean().reset_index()
    if (out / "sharing.csv").exists():
        old = pd.read_csv(out / "sharing.csv")
        means = pd.concat([old[old.method.isin(others)], means])
    means.to_csv(out / "sharing.csv", index=False, float_format="%.5g")
