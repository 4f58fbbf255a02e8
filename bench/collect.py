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
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from bench.launch import Job
from bench.methods import fail, parse_flags
from envs.folders import find_run

HEADER = "global_step,metric,task,value"  # of heartbeat.csv
EVALUATION, SUCCESS, TRAINING_SUCCESS = "eval/episodic_return", "eval/success_rate", "charts/success_rate"
LEARNED = (TRAINING_SUCCESS, "losses/entropy", "losses/approx_kl", "losses/kl")  # of each task, on the way
SECONDS = "charts/wall_time"
NORMS = ("varshare/mu_norm", "varshare/theta_moved")
SHARING = "varshare/sharing_ratio/"
DIRECTION = "residual/direction"
MANY = 50  # tasks: pictures with a place for each of more, or for each pair, cannot be read
NOT_TRAINED = ("return_stats", "obs_norm", "value_norm", "live", "alpha", "highest", "atoms")
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


def has_residuals(agent: dict) -> bool:
    """Whether a saved agent has residuals of every weight, not the factors of low rank."""
    return "mu" in agent and agent["mu"].shape[1:] == agent["theta"].shape


def low_rank_residuals(run: Run) -> np.ndarray:
    """Of a finished run with factors: B_m A_m of every matrix and the biases' residuals, (task, weight)."""
    from enjoy import Model  # slow too
    from envs.networks import split

    agent = Model(run.folder).agent
    own, parts = split(agent.mu, agent.factors), []
    for name in agent.shapes:
        layer = name.removesuffix(".weight")
        part = own[name] if name in own else own[f"{layer}.B"] @ own[f"{layer}.A"]
        parts.append(part.flatten(1).numpy())
    return np.concatenate(parts, axis=1)


def mixing_weights(run: Run) -> np.ndarray:
    """Of a finished run with experts: the weights by which actor and critic mix them, (task, 2 * expert)."""
    from enjoy import Model  # slow too

    W = Model(run.folder).W
    return np.concatenate([W[f"{net}.w"].numpy() for net in ("actor", "critic")], axis=1)


def task_vectors(run: Run) -> np.ndarray | None:
    """Of a finished run: what tells a task from others, (task, number).

    Residuals, of PaCo the mixed weights, of MOORE the weights that mix, or an embedding; None if the method
    has none of them. A vector that is added to all of them says nothing.
    """
    agent = read_agent(run)
    if has_residuals(agent):
        return agent["mu"].numpy()
    if "mu" in agent:
        return low_rank_residuals(run)
    if "w" in agent:
        return (agent["w"] @ agent["theta"]).numpy()
    if "num_experts" in run.config["args"]:
        return mixing_weights(run)
    embedding = agent.get("embedding", agent.get("embeddings"))
    return None if embedding is None else embedding.numpy()


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors (task, weight) without what all have in common."""
    return vectors - vectors.mean(0, dtype=float)


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Of centred vectors (task, weight), of each pair: (task, task)."""
    x = centred(vectors)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two of centred vectors (task, weight): (task, 2), and their shares of the variance (2,).

    The first task has no positive coordinates: signs have no meaning of their own.
    """
    x = centred(vectors)
    directions, variances, _ = np.linalg.svd(x @ x.T)  # of (task, task): there are two of one number too
    places = directions[:, :2] * np.sqrt(variances[:2])
    return places * np.copysign(1, -places[0]), variances[:2] / variances.sum()


def direction_correlation(vectors: np.ndarray, values: Sequence[float]) -> float:
    """Whether tasks that are near each other have like directions: a rank correlation over pairs of tasks.

    Spearman's, of the cosine of centred vectors (task, weight) and minus the distance of values (task,).
    """
    one, other = np.triu_indices(len(values), 1)
    distances = np.abs(np.subtract.outer(values, values))
    return float(spearmanr(cosines(vectors)[one, other], -distances[one, other]).statistic)


def hidden_parameter(params: list[dict], order: np.ndarray) -> pd.Series | None:
    """The number by which tasks differ, with its name: their goal, or what follows this order (task,) most.

    None if they differ by no number.
    """
    numbers = pd.DataFrame(params).select_dtypes("number").dropna(axis=1)
    numbers = numbers.loc[:, numbers.nunique() > 1]
    if numbers.empty or "goal" in numbers:
        return numbers.get("goal")
    follows = numbers.corrwith(pd.Series(order), method="spearman").abs()
    return numbers[follows.idxmax()]


def residuals(agent: dict, tasks: list[str]) -> list[tuple[str, str, float]]:
    """Of a saved agent with residuals: their size over theta's; of up to `MANY` tasks each pair's cosine."""
    common = agent["mu"].mean(0)  # counts as shared: (theta + c, mu_m - c) is the same network
    size = (agent["mu"] - common).norm(dim=1)
    theta_norm = (agent["theta"] + common).norm()
    rows = [("residual/ratio", "mean", size.mean() / theta_norm)]
    if len(tasks) > MANY:
        return rows
    matrix = cosines(agent["mu"].numpy())
    for i, j in itertools.combinations(range(len(tasks)), 2):
        rows.append(("cosine", f"{tasks[i]}|{tasks[j]}", matrix[i, j]))
    return rows


def parameters(agent: dict) -> tuple[int, int]:
    """Of a saved agent: own parameters per task, and parameters in all."""
    trained = {name: x for name, x in agent.items() if name.partition(".")[0] not in NOT_TRAINED}
    mixed = ["theta"] if "w" in agent else []  # PaCo's (set, weight)
    own = [x.shape[1] for name, x in trained.items() if x.ndim == 2 and name not in mixed]  # (task, weight)
    return sum(own), sum(x.numel() for x in trained.values())


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

    Success in training is kept in the second case only: `bench.tables.Result` goes by that. So is what says
    of each task when it was learned or lost again, and how narrow its policy was and how far it moved then.
    """
    final = [SECONDS, "charts/SPS", *run.metrics(SHARING)]
    on_the_way = [*NORMS]
    if by_success:
        on_the_way += [SUCCESS, TRAINING_SUCCESS]
    rows = evaluations(run, final, on_the_way)
    if by_success:
        log = run.log.rename(columns={"global_step": "step"})
        logged = log.step[log.metric == TRAINING_SUCCESS].unique()
        some = log.step.isin(logged[::-5])  # fifty times ten tasks would be many rows
        by_task = log.metric.eq(SUCCESS) | (log.metric.isin(LEARNED) & some)
        rows = pd.concat([rows, log[by_task]]).drop_duplicates(["step", "metric", "task"])
    agent = read_agent(run)
    own, every = parameters(agent)
    more = [("parameters/own", "mean", own), ("parameters/all", "mean", every)]
    if has_residuals(agent):
        more += residuals(agent, run.tasks)
    goals = [params.get("goal") for params in run.config["task_params"]]
    numbers = len(goals) > 2 and all(isinstance(goal, (int, float)) for goal in goals)
    if numbers and len(set(goals)) > 2 and (vectors := task_vectors(run)) is not None:
        more.append((DIRECTION, "mean", direction_correlation(vectors, goals)))
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


def reported(folder: Path) -> set[str]:
    """With the environment variable REST=1 the commands of all runs that the CSVs have, else none."""
    rest = os.environ.get("REST", "")
    if rest not in ("", "1"):
        fail(f"REST is 1 or nothing, not {rest!r}")
    if not (rest and (folder / "configs.csv").exists()):
        return set()
    configs = read(folder)[1]
    return set(configs.command[configs.commit != ""])


def left(jobs: Iterable[Job], folder: Path) -> list[Job]:
    """All runs, or with REST=1 those that have finished here and those that the CSVs do not have."""
    elsewhere = reported(folder)
    return [job for job in jobs if job.finished or job.command not in elsewhere]


def earlier(
    folder: Path, today: pd.DataFrame, key: list[str], elsewhere: set[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is known of those that are not today's, by this key, if their runs are as long as today's.

    And of today's that ran elsewhere, by their commands.
    """
    if not (folder / "configs.csv").exists():
        return pd.DataFrame(columns=COLUMNS), today[:0]
    runs, configs = read(folder)
    again = configs.set_index(key).index.isin(today.set_index(key).index)
    configs = configs[~again | configs.command.isin(elsewhere)]
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

    What is known of other methods stays, and in a study of other settings; with REST=1 also of runs that
    have not finished here. rows_of: what is kept of a run:
    metric, task, step, value. searched_on: the suite whose search chose the settings.
    """
    every, new = list(jobs), []
    jobs = left(every, out)
    elsewhere = {job.command for job in every} - {job.command for job in jobs}
    today = pd.DataFrame([config_of(job) for job in jobs]).assign(searched_on=searched_on)
    for job, key in zip(jobs, today[KEY].to_dict("records")):
        if job.finished:
            new.append(rows_of(read_run(Path("runs", job.name))).assign(**key))
    if not new and elsewhere:
        return
    if not new:
        fail(f"no run of {out.name} has finished")
    key = KEY[:2] if searched_on else KEY[:3]  # a suite's settings are the numbers of its searches
    new, (old, configs) = pd.concat(new)[COLUMNS], earlier(out, today, key, elsewhere)
    out.mkdir(parents=True, exist_ok=True)
    mapped = (new.metric == "cosine") | new.metric.str.startswith(SHARING)
    if mapped.any():
        write_sharing(new[mapped & (new.task != "mean")], configs, out)
    runs = pd.concat([rows for rows in (old, new[~mapped]) if len(rows)])
    same = [name for name in ("env", "setting") if runs[name].nunique() == 1]
    runs = runs.assign(value=runs.value.map("{:.5g}".format)).drop(columns=same)
    runs.to_csv(out / "runs.csv", index=False)
    configs = pd.concat([rows for rows in (configs, today) if len(rows)])
    configs.to_csv(out / "configs.csv", index=False)


def write_sharing(rows: pd.DataFrame, others: pd.DataFrame, out: Path) -> None:
    """sharing.csv: means over runs, of these rows and of the other runs, which are in it already."""
    key = ["method", "metric", "task"]
    means = rows.groupby(key, sort=False).value.agg(["mean", "count"]).reset_index()
    if (out / "sharing.csv").exists():
        old = pd.read_csv(out / "sharing.csv").rename(columns={"value": "mean"})
        old["count"] = old.method.map(others[others.commit != ""].method.value_counts())
        means = pd.concat([old.dropna(subset="count"), means])
    means["value"] = means["mean"] * means["count"]
    sums = means.groupby(key, sort=False)[["value", "count"]].sum(min_count=1)
    means = (sums.value / sums["count"]).rename("value").reset_index()
    means.to_csv(out / "sharing.csv", index=False, float_format="%.5g")
