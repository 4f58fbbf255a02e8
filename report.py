"""Figures and tables from run folders.

    python report.py runs/NAME [runs/NAME2 ...]     plots of single runs -> runs/NAME/plots/
    python report.py runs --suite cartpole          all runs/cartpole__* -> results/cartpole/
    python report.py results/cartpole               the same from the committed CSVs alone

Of a run: returns.png, norms.png, sharing_ratio.png, losses.png; what it has not logged is left out, and a run
that is not finished is drawn as far as it went. Of a suite, for every environment and budget of steps:

    runs.csv            every number used: env, steps, method, seed, metric, task, step, value (long)
    configs.csv         script, settings, commit and hardware of every run
    table.md            whether the suite can tell methods apart; task-blind and then every method by its mean
                        final evaluation: worst task, difference from task-blind; of the evaluations on the
                        way the area under their curve and the steps to 80 % of what the tasks allow; cost
    curves_*.png, tasks_*.png, improvement_*.png, sharing_*.png, cost_*.png
    claims.md           verdicts on those of the README's claims that the suite can answer

Intervals and verdicts are those of bench/statistics.py.

A method is what --exp-name says, by default the script's name.
"""

import io
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import pandas as pd
import tyro
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy import stats

from bench.controls import ceiling, markdown
from bench.statistics import (
    BLIND,
    MARGIN,
    Interval,
    can_tell,
    difference,
    holm,
    margin,
    mean_interval,
    median_interval,
    verdict,
)
from bench.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    MAX_CURVES,
    ORANGE,
    SKY,
    STYLE,
    TITLES,
    color_of,
)

HEADER = "global_step,metric,task,value"  # of heartbeat.csv


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
        evaluated = ((self.log["metric"] == "eval/episodic_return") & (self.log["task"] == "mean")).any()
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


def fail(message: str) -> NoReturn:
    """As `envs.runs.fail`, without the seconds that importing torch takes."""
    print(f"report.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_run(folder: Path) -> Run:
    """Read a run's folder."""
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


def start_figure(run: Run, width: float, height: float) -> Figure:
    """An empty figure under the run's title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(run.title, fontsize=11)
    return figure


def finish_axes(ax: Axes, run: Run, title: str, label_x: bool = True) -> None:
    """What all axes over time have: a title, and environment steps up to the run's total, as 200k."""
    ax.set_title(title)
    ax.set_xlim(0, run.config["args"]["total_timesteps"])
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    ax.set_xlabel("environment steps, all tasks together" if label_x else "")


def draw_tasks(
    ax: Axes,
    table: pd.DataFrame,
    tasks: list[str],
    center: Literal["mean", "median"] = "mean",
    extremes: Literal["none", "worst", "both"] = "both",
) -> None:
    """The mean of the tasks and each of them; of many tasks their spread and the extreme ones instead."""
    table = table.ffill()  # a task without an episode since the last log
    by_task = table[[task for task in tasks if task in table]]
    if 1 < by_task.shape[1] < MAX_CURVES:
        for color, (name, values) in zip(CYCLE[1:], by_task.items()):
            ax.plot(values, color=color, lw=1, label=name)
    elif by_task.shape[1] > 1:
        low, high = by_task.quantile(0.1, axis=1), by_task.quantile(0.9, axis=1)
        ax.fill_between(table.index, low, high, color=SKY, alpha=0.35, lw=0, label="80 % of the tasks")
        last = by_task.iloc[-1]
        if extremes == "both":
            ax.plot(by_task[last.idxmax()], color=ORANGE, lw=1, label=f"{last.idxmax()}, highest at the end")
            ax.plot(by_task[last.idxmin()], color=GREEN, lw=1, label=f"{last.idxmin()}, lowest at the end")
        elif extremes == "worst":
            ax.plot(by_task.min(axis=1), color=ORANGE, lw=1, label="worst task at that step")
    several = by_task.shape[1] > 1
    values = by_task.median(axis=1) if several and center == "median" else table["mean"]
    ax.plot(values, color=BLUE, lw=2, label=center if several else None)
    if several:
        ax.legend(fontsize=7, loc="best")


def plot_returns(run: Run) -> Figure | None:
    """Return of every task in a panel of its own, and above them their mean."""
    if not run.metrics("charts/episodic_return"):
        return None
    table = run.values("charts/episodic_return")
    evaluations = run.values("eval/episodic_return") if run.metrics("eval/episodic_return") else table[:0]
    tasks = run.tasks if len(run.tasks) > 1 else []
    columns = min(5, len(tasks)) or 1
    rows = math.ceil(len(tasks) / columns)
    figure = start_figure(run, max(7.0, 2.5 * columns), 3.4 + 1.7 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.9] + [1] * rows)
    top = figure.add_subplot(grid[0, :])
    draw_tasks(top, table, tasks, extremes="worst")
    finish_axes(top, run, "mean over tasks" if tasks else run.tasks[0])
    top.set_ylabel("return per episode")
    low, high = table.stack().quantile([0.02, 1.0])  # an early crash shall not flatten all that follows
    if table.min().min() < low - 0.25 * (high - low):
        top.set_ylim(low - 0.25 * (high - low), high + 0.05 * (high - low))
        top.text(0.01, 0.02, f"below the axes: down to {table.min().min():.0f}", transform=top.transAxes)
    panels = {"mean": top}
    for i, task in enumerate(tasks):
        panels[task] = ax = figure.add_subplot(grid[1 + i // columns, i % columns], sharex=top, sharey=top)
        ax.plot(table["mean"], color="0.75", lw=1)
        if task in table:
            ax.plot(table[task].dropna(), color=BLUE, lw=1.5)
        finish_axes(ax, run, task, label_x=False)
        ax.tick_params(labelbottom=i + columns >= len(tasks), labelleft=i % columns == 0)
    for name, ax in panels.items() if len(evaluations) else ():
        values = evaluations[name]
        label = "evaluations, deterministic actions"
        (marks,) = ax.plot(values, "D", color=BLACK, ms=3, clip_on=False, zorder=3)
        if run.finished:
            ax.plot(values.index[-1:], values[-1:], "D", color=BLACK, ms=5, clip_on=False, zorder=3)
            ax.set_title(f"{ax.get_title()}:  {values.iloc[-1]:.1f}")
            label += f", the final one {values.iloc[-1]:.1f}"
        if ax is top:
            marks.set_label(label)
            ax.legend(fontsize=8, loc="best")
    return figure


def plot_norms(run: Run) -> Figure | None:
    """Size of the residuals and of the shared weights, and the price of the residuals."""
    titles = {
        "mu_norm": r"$|\mu_m|$, residual means",
        "theta_norm": r"$|\theta|$, shared weights",
        "head_norm": "norm of a task's head",
        "embedding_norm": "norm of a task's embedding",
        "kl_loss": r"$\beta\,\mathrm{KL}_m / N_m$, in the loss",
        "kl_weight": r"$\beta / N_m$, weight of the KL",
        "lambda": r"$\lambda = \beta / (2 N_m \sigma_p^2)$, of $|\mu_m|^2$",
        "l2_loss": r"$\lambda\,|\mu_m|^2$, in the loss",
    }
    logged = {metric.split("/")[-1]: metric for metric in run.metrics()}
    tables = {name: run.values(logged[name]) for name in titles if name in logged}
    if not tables:
        return None
    bars = "mu_norm" in tables and len(run.tasks) > 1
    columns = min(3, len(tables) + bars)
    rows = math.ceil((len(tables) + bars) / columns)
    height = max(2.9, 0.17 * len(run.tasks)) if bars else 2.9
    figure = start_figure(run, 4.3 * columns, 0.5 + height * rows)
    for i, (name, table) in enumerate(tables.items()):
        ax = figure.add_subplot(rows, columns, i + 1)
        draw_tasks(ax, table, run.tasks)
        finish_axes(ax, run, titles[name])
        ax.set_ylim(0, 1.15 * table.max().max())
    if bars:
        ax = figure.add_subplot(rows, columns, rows * columns)
        ax.barh(run.tasks, tables["mu_norm"][run.tasks].iloc[-1], color=SKY)
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=7)
        ax.grid(visible=False, axis="y")
        ax.set_title(r"$|\mu_m|$ at the end")
    return figure


def layer_of(metric: str) -> str:
    """actor.0 of varshare/sharing_ratio/actor.0; older logs have actor_0."""
    return metric.rpartition("/")[2].replace("_", ".")


def by_network(layers: Iterable[str]) -> dict[str, list[str]]:
    """actor -> actor.0, actor.1, ..."""
    networks: dict[str, list[str]] = {}
    for layer in layers:
        networks.setdefault(layer.partition(".")[0], []).append(layer)
    return networks


def some_of(layers: list[str]) -> list[str]:
    """As many as there are colours, evenly spread."""
    return [layers[i] for i in sorted({round(x) for x in np.linspace(0, len(layers) - 1, MAX_CURVES)})]


def plot_sigma(run: Run) -> Figure | None:
    """Sigma among the live weights of the layers over time, and the share of those that are dead."""
    networks = by_network(metric.rpartition("/")[2] for metric in run.metrics("varshare/sigma_q50/"))
    if not networks:
        return None
    figure = start_figure(run, max(6.0, 4.0 * len(networks)), 6.4)
    axes = figure.subplots(2, len(networks), sharey="row", squeeze=False)
    for i, (network, layers) in enumerate(networks.items()):
        for color, layer in zip(CYCLE, some_of(layers)):
            low, middle, high = (run.values(f"varshare/sigma_q{q}/{layer}")["mean"] for q in (1, 50, 99))
            axes[0, i].fill_between(middle.index, low, high, color=color, alpha=0.12, lw=0)
            axes[0, i].plot(middle, color=color, lw=1.5, label=layer)
            axes[1, i].plot(run.values(f"varshare/dead/{layer}")["mean"], color=color, lw=1.5)
        finish_axes(axes[0, i], run, rf"{network}: $\sigma$ of live weights", label_x=False)
        finish_axes(axes[1, i], run, f"{network}: dead weights")
        axes[0, i].set_yscale("log")
        axes[0, i].legend(fontsize=8, loc="best")
    axes[0, 0].set_ylabel("median, and from 1 to 99 %")
    axes[1, 0].set_ylabel("share, mean over tasks")
    axes[1, 0].set_ylim(0, 1.02)
    return figure


def plot_sharing(run: Run) -> Figure | None:
    """Sharing ratio of the layers over time, and at the end for every task."""
    metrics = [metric for metric in run.metrics() if "/sharing_ratio/" in metric]
    if not metrics:
        return None
    layers = {layer_of(metric): run.values(metric) for metric in metrics}
    networks = by_network(layers)
    width = max(4.0 * len(networks), 3.0 + 0.5 * len(run.tasks))
    figure = start_figure(run, width, 5.4 + 0.3 * len(layers))
    grid = figure.add_gridspec(2, len(networks), height_ratios=[3.0, 1.8 + 0.3 * len(layers)])
    means = pd.DataFrame({name: table["mean"] for name, table in layers.items()})  # (step, layer)
    last = pd.DataFrame({name: table[run.tasks].iloc[-1] for name, table in layers.items()})
    last = last.T  # (layer, task)
    lowest = math.floor(10 * min(0.9, means.min().min())) / 10
    for i, (network, names) in enumerate(networks.items()):
        ax = figure.add_subplot(grid[0, i])
        for color, name in zip(CYCLE, some_of(names)):
            ax.plot(means[name], color=color, lw=1.5, label=name)
        finish_axes(ax, run, f"{network}, all tasks")
        ax.set_ylim(lowest, 1 + 0.02 * (1 - lowest))
        ax.legend(fontsize=8, loc="best")
        ax.set_ylabel("sharing ratio (1: fully shared)" if i == 0 else "")
    ax = figure.add_subplot(grid[1, :])
    lowest = math.floor(10 * min(0.9, last.min().min())) / 10
    image = ax.imshow(last, cmap="cividis", vmin=lowest, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(last.to_numpy()):
        color = "white" if value < (1 + lowest) / 2 else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(len(run.tasks)), run.tasks, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(last)), last.index)
    ax.grid(visible=False)
    ax.set_title("each task at the end")
    figure.colorbar(image, ax=ax, label=r"$|\theta|^2 / (|\theta|^2 + |\mu_m|^2)$", pad=0.01)
    return figure


def plot_losses(run: Run) -> Figure | None:
    """Everything logged as losses/*."""
    metrics = run.metrics("losses/")
    if not metrics:
        return None
    columns = min(4, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = start_figure(run, 3.3 * columns, 0.6 + 2.5 * rows)
    for i, metric in enumerate(metrics):
        ax, table = figure.add_subplot(rows, columns, i + 1), run.values(metric)
        # a solved task's returns hardly vary, so that of its explained variance only the median is of use
        draw_tasks(ax, table, run.tasks, center="median", extremes="none")
        finish_axes(ax, run, metric.removeprefix("losses/"), label_x=i + columns >= len(metrics))
        if metric == "losses/explained_variance":
            ax.set_ylim(max(-1.0, table.min().min()) - 0.05, 1.05)
        elif table["mean"].min() > 0 and table["mean"].max() > 100 * table["mean"].min():
            ax.set_yscale("log")
    return figure


PLOTS = {
    "returns": plot_returns,
    "norms": plot_norms,
    "sigma": plot_sigma,
    "sharing_ratio": plot_sharing,
    "losses": plot_losses,
}


def plot_run(run: Run) -> list[Path]:
    """Draw every plot that the run has logged something for; returns the files' paths."""
    folder, paths = run.folder / "plots", []
    folder.mkdir(exist_ok=True)
    with rc_context(STYLE):
        for name, plot in PLOTS.items():
            if figure := plot(run):
                paths.append(folder / f"{name}.png")
                figure.savefig(paths[-1])
    return paths


# Suites of runs

EVALUATION, TRAINING = "eval/episodic_return", "charts/episodic_return"
RUN = ["env", "steps", "method", "seed"]  # what names a run
SUCCESS = "eval/success_rate"
CURVES = [EVALUATION, TRAINING, "charts/wall_time", "varshare/mu_norm"]  # kept over time, of all tasks
LAST = ["charts/SPS", SUCCESS, "varshare/mu_norm", "varshare/theta_norm"]  # kept at the end, for every task
RESIDUAL = ("varshare", "varshare-recentred", "l2soft", "l2soft-recentred")  # methods with a mu_m per task
RESIDUAL += ("varshare-ppo", "varshare-sac")
NOT_TRAINED = ("return_stats", "target", "action_scale", "action_bias", "obs_norm", "value_norm")
THRESHOLD = 0.8  # share of a suite's ceiling that methods are timed to


def collect_run(folder: Path) -> tuple[pd.DataFrame, dict]:
    """A finished run in the rows of runs.csv, and its row of configs.csv."""
    import torch  # slow, and not needed for anything else here

    run = read_run(folder)
    args = run.config["args"]
    parts = [run.log[run.log.metric.isin(CURVES) & (run.log.task == "mean")]]
    kept = run.log.metric.isin([*LAST, EVALUATION]) | run.log.metric.str.contains("/sharing_ratio/")
    ends = run.log[kept]
    parts.append(ends[ends.global_step == run.log.global_step.max()])
    rows = pd.concat(parts).drop_duplicates().rename(columns={"global_step": "step"})
    agent = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)["agent"]
    agent = {name: x for name, x in agent.items() if name.partition(".")[0] not in NOT_TRAINED}
    own = {name: x for name, x in agent.items() if x.ndim == 2}  # (task, weight)
    extra = [
        ("parameters/own", "mean", sum(x.shape[1] for x in own.values())),
        ("parameters/all", "mean", sum(x.numel() for x in agent.values())),
    ]
    if "mu" in agent:  # what all residuals have in common counts as shared
        common = agent["mu"].mean(0)
        mu = agent["mu"] - common
        ratio = mu.norm(dim=1).mean() / (agent["theta"] + common).norm()
        extra.append(("residual/ratio", "mean", ratio))
        mu = mu / mu.norm(dim=1, keepdim=True)
        for (i, j), cosine in np.ndenumerate((mu @ mu.T).numpy()):
            if i < j:
                extra.append(("cosine", f"{run.tasks[i]}|{run.tasks[j]}", cosine))
    last = run.log.global_step.max()
    extra = [{"metric": m, "task": t, "step": last, "value": float(x)} for m, t, x in extra]
    rows = pd.concat([rows, pd.DataFrame(extra)], ignore_index=True)
    key = dict(zip(RUN, (args["env_id"], args["total_timesteps"], args["exp_name"], args["seed"])))
    config = {"script": run.config["script"], "args": json.dumps(args)}
    config |= {name: run.config[name] for name in ("git_commit", "hardware")}
    return rows.assign(**key)[[*RUN, "metric", "task", "step", "value"]], key | config


def collect(folder: Path, suite: str, out: Path) -> None:
    """Finished runs of a suite -> runs.csv and configs.csv, and missing.txt: the names of those that are not.

    What should be there is in folder/SUITE.tsv, which benchmark.sh writes.
    """
    found = sorted(path.parent for path in folder.glob(f"{suite}__*/model.pt"))
    if not found:
        fail(f"{folder} has no finished runs {suite}__*")
    expected = folder / f"{suite}.tsv"
    names = [line.split("\t")[0] for line in expected.read_text().splitlines()] if expected.exists() else []
    rows, configs = zip(*(collect_run(path) for path in found))
    out.mkdir(parents=True, exist_ok=True)
    runs = pd.concat(rows, ignore_index=True)
    runs["value"] = runs["value"].map("{:.6g}".format)
    runs.to_csv(out / "runs.csv", index=False)
    pd.DataFrame(configs).to_csv(out / "configs.csv", index=False)
    missing = [f"{name}\n" for name in names if not (folder / name / "model.pt").exists()]
    (out / "missing.txt").write_text("".join(missing))


@dataclass
class Scores:
    """What a method reached in one environment with one budget; rows are runs, by seed.

    Attributes:
        final: (run, task) return of the final evaluation.
        curve: (run, step) mean return over tasks of the evaluations on the way and of the final one.
        training: (run, step) mean training return over tasks.
    """

    final: pd.DataFrame
    curve: pd.DataFrame
    training: pd.DataFrame

    @property
    def means(self) -> pd.Series:
        """Mean over tasks of the final evaluation, by seed."""
        return self.final.mean(axis=1)


def scores(group: pd.DataFrame) -> dict[str, Scores]:
    """method -> Scores, in the order of TITLES and then of the alphabet."""
    methods = sorted(group.method.unique(), key=lambda m: (list(TITLES).index(m) if m in TITLES else 99, m))
    result = {}
    for method in methods:
        rows = group[group.method == method]
        mean = rows[rows.task == "mean"]
        final = rows[(rows.metric == EVALUATION) & (rows.task != "mean")]
        curve, training = (
            mean[mean.metric == metric].pivot(index="seed", columns="step", values="value")
            for metric in (EVALUATION, TRAINING)
        )
        final = final.pivot_table(index="seed", columns="task", values="value", sort=False)
        training = training.ffill(axis=1).bfill(axis=1)  # before the first episode of a task ended
        result[method] = Scores(final.sort_index(), curve, training)
    return result


def steps_to(s: Scores, target: float) -> np.ndarray:
    """(run,) steps of the first evaluation that reaches the target, infinite where none does."""
    reached = s.curve.to_numpy() >= target
    return np.where(reached.any(1), s.curve.columns.to_numpy(float)[reached.argmax(1)], math.inf)


def area(s: Scores) -> pd.Series:
    """Mean return over the steps between the first evaluation and the last, by seed."""
    steps = s.curve.columns.to_numpy(float)
    return pd.Series(np.trapezoid(s.curve, steps, axis=1) / (steps[-1] - steps[0]), s.curve.index)


def bands(curve: pd.DataFrame) -> np.ndarray:
    """Mean over runs and its interval at every step: (run, step) -> (3, step)."""
    return np.array([mean_interval(x) for x in curve.to_numpy().T]).T


def improvement(x: pd.DataFrame, y: pd.DataFrame) -> float:
    """P(a run of x scores above one of y on a task), ties half, mean over tasks; (run, task) each."""
    x, y = x.to_numpy()[:, None], y.to_numpy()[None]
    return float(np.mean((x > y) + 0.5 * (x == y)))


def make_table(group: pd.DataFrame, target: float | None) -> str:
    """The table of one environment and budget: task-blind, then the others, best mean first.

    Args:
        group: rows of runs.csv.
        target: return that methods are timed to, None for no such column.
    """
    by_method = scores(group)
    others = [method for method in by_method if method != BLIND]
    differences, corrected = {}, {}
    if BLIND in by_method:
        differences = {m: difference(by_method[m].means, by_method[BLIND].means) for m in others}
        corrected = dict(zip(others, holm([d.p for d in differences.values()])))
    within = margin(s.means.mean() for s in by_method.values())
    timed = all(s.curve.shape[1] > 1 for s in by_method.values())  # evaluated on the way
    cost = group[group.task == "mean"].groupby(["method", "seed", "metric"]).value.last().unstack()
    cost = cost.groupby("method").median()
    rows = []
    for method in sorted(by_method, key=lambda m: (m != BLIND, -by_method[m].means.mean())):
        s, c = by_method[method], cost.loc[method]
        row = {"method": TITLES.get(method, method), "runs": str(len(s.final))}
        row |= {
            "mean": mean_interval(s.means).text(),
            "worst task": mean_interval(s.final.min(axis=1)).text(),
        }
        if SUCCESS in c:
            row["success"] = f"{c[SUCCESS]:.0%}"
        if differences:
            row |= dict.fromkeys(("minus task-blind", "p (Holm)", "against task-blind"), "")
        if method in differences:
            d, p = differences[method], corrected[method]
            row |= {"minus task-blind": d.interval.text(), "p (Holm)": f"{p:.2g}"}
            row["against task-blind"] = verdict(d, p, within)
        if timed:
            row["area under evaluations"] = mean_interval(area(s)).text()
        if timed and target is not None:
            steps = steps_to(s, target)
            row[f"steps to {target:.0f} (median)"] = median_interval(steps).text(0)
            row["runs that get there"] = f"{np.isfinite(steps).sum()} of {len(steps)}"
        row |= {"parameters of a task's own": f"{c['parameters/own']:,.0f}"}
        row |= {"parameters": f"{c['parameters/all']:,.0f}", "seconds": f"{c['charts/wall_time']:.1f}"}
        rows.append(row | {"env steps/s": f"{c['charts/SPS']:,.0f}"})
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def panels_of(methods: list[str]) -> list[list[str]]:
    """Methods in panels of at most MAX_CURVES: those with residuals, and the plain one against the others."""
    residual = [m for m in methods if m in RESIDUAL]
    others = [m for m in methods if m not in RESIDUAL]
    if len(methods) < MAX_CURVES:
        return [methods]
    return [residual, [*residual[:1], *others][:MAX_CURVES]]


def draw_curves(ax: Axes, by_method: dict[str, Scores], methods: list[str], evaluated: bool) -> None:
    """Return of methods against steps: mean over runs and tasks, 95 % intervals."""
    for method in methods:
        s, color = by_method[method], color_of(method)
        curve = s.curve if evaluated else s.training
        mean, low, high = bands(curve)
        ax.plot(curve.columns, mean, color=color, lw=1.8, label=TITLES.get(method, method))
        ax.fill_between(curve.columns, low, high, color=color, alpha=0.15, lw=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("environment steps, all tasks together")
    ax.legend(fontsize=8, loc="lower right")


def plot_curves(group: pd.DataFrame, title: str) -> Figure:
    """Evaluations on the way of every method, or where there are none its training return."""
    by_method = scores(group)
    evaluated = all(s.curve.shape[1] > 1 for s in by_method.values())
    panels = panels_of(list(by_method))
    figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, methods in zip(axes, panels):
        draw_curves(ax, by_method, methods, evaluated)
    axes[0].set_ylabel(f"{'evaluation' if evaluated else 'training return'}, mean over tasks")
    return figure


def plot_cost(group: pd.DataFrame, title: str) -> Figure | None:
    """Where SAC and PPO are compared: training return against environment steps and against time."""
    by_method = scores(group)
    if not any(method.endswith("-sac") for method in by_method):
        return None
    figure = Figure(figsize=(11.2, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, 2, sharey=True)
    draw_curves(axes[0], by_method, list(by_method), evaluated=False)
    for method, s in by_method.items():
        rows = group[(group.method == method) & (group.metric == "charts/wall_time")]
        seconds = rows.groupby("step").value.median()[s.training.columns].to_numpy()  # of the runs
        mean, low, high = bands(s.training)
        axes[1].plot(seconds, mean, color=color_of(method), lw=1.8)
        axes[1].fill_between(seconds, low, high, color=color_of(method), alpha=0.15, lw=0)
    axes[1].set_xlabel("seconds on one core")
    axes[1].set_xscale("log")
    axes[0].set_ylabel("training return, mean over tasks")
    return figure


def plot_tasks(group: pd.DataFrame, title: str) -> Figure:
    """Final evaluation of every task: bars of the methods, 95 % intervals of the mean over runs."""
    by_method = scores(group)
    tasks = group[(group.metric == EVALUATION) & (group.task != "mean")].task.unique()
    columns = min(5, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(
        figsize=(2.6 * columns + 1.4, 0.9 + (0.5 + 0.2 * len(by_method)) * rows), layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    names = [TITLES.get(method, method) for method in by_method]
    for ax, task in zip(axes, tasks):
        for name, (method, s) in zip(names, by_method.items()):
            mean, low, high = mean_interval(s.final[task])
            error = None if math.isnan(low) else [[max(0, mean - low)], [max(0, high - mean)]]
            ax.barh(name, mean, color=color_of(method), xerr=error, error_kw={"lw": 1, "ecolor": "0.35"})
        ax.set_title(task, fontsize=8)
        ax.grid(visible=False, axis="y")
    axes[0].invert_yaxis()
    for ax in list(axes)[len(tasks) :]:
        ax.set_visible(False)
    figure.supxlabel("return of the final evaluation", fontsize=9)
    return figure


def heat(ax: Axes, values: np.ndarray, rows: list[str], columns: list[str], low: float, high: float) -> None:
    """A heat map with its numbers written in."""
    image = ax.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    size = 8 if max(values.shape) < 12 else 6
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            color = "white" if value < (low + high) / 2 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=size, color=color)
    ax.set_xticks(
        range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=size
    )
    ax.set_yticks(range(len(rows)), rows, fontsize=size)
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, pad=0.01)


def plot_improvement(group: pd.DataFrame, title: str) -> Figure:
    """Probability that a run of the row's method beats one of the column's on a task."""
    by_method = scores(group)
    names = [TITLES.get(method, method) for method in by_method]
    values = np.array(
        [[improvement(x.final, y.final) for y in by_method.values()] for x in by_method.values()]
    )
    np.fill_diagonal(values, np.nan)
    figure = Figure(figsize=(3.0 + 0.7 * len(names), 1.6 + 0.5 * len(names)), layout="constrained")
    ax = figure.subplots()
    heat(ax, values, names, names, 0, 1)
    ax.set_title(f"{title}\nprobability that the row beats the column", fontsize=10)
    return figure


def plot_sharing_map(group: pd.DataFrame, title: str) -> Figure | None:
    """Of every method with residuals: cosines of the tasks' mu, and the sharing ratio of the layers."""
    methods = [m for m in scores(group) if m in RESIDUAL]
    if not methods:
        return None
    figure = Figure(figsize=(15, 0.5 + 4.6 * len(methods)), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(len(methods), 2, squeeze=False)
    for (left, right), method in zip(axes, methods):
        rows = group[group.method == method]
        tasks = list(rows[(rows.metric == EVALUATION) & (rows.task != "mean")].task.unique())
        pairs = rows[rows.metric == "cosine"].groupby("task").value.mean()
        cosines = np.full((len(tasks), len(tasks)), np.nan)
        for pair, value in pairs.items():
            i, j = (tasks.index(task) for task in pair.split("|"))
            cosines[i, j] = cosines[j, i] = value
        heat(left, cosines, tasks, tasks, -1, 1)
        left.set_title(f"{TITLES[method]}: cosine of the tasks' $\\mu_m$", fontsize=10)
        ratios = rows[rows.metric.str.contains("/sharing_ratio/") & (rows.task != "mean")]
        ratios = ratios.assign(layer=ratios.metric.map(layer_of))
        ratios = ratios.pivot_table(index="layer", columns="task", values="value")[tasks]
        heat(right, ratios.to_numpy(), list(ratios.index), tasks, min(0.9, ratios.min().min()), 1)
        right.set_title(f"{TITLES[method]}: sharing ratio (1: fully shared)", fontsize=10)
    return figure


def plot_residuals(groups: dict[str, pd.DataFrame]) -> Figure | None:
    """Size of the residuals over time on identical and on different tasks."""
    names = {name: rows[rows.metric == "varshare/mu_norm"] for name, rows in groups.items()}
    methods = [m for m in RESIDUAL if all((rows.method == m).any() for rows in names.values())]
    if len(groups) < 2 or not methods:
        return None
    figure = Figure(figsize=(3.4 * len(methods), 3.4), layout="constrained")
    figure.suptitle("norm of the residuals, mean over tasks and runs", fontsize=11)
    for ax, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods):
        for color, (name, rows) in zip(CYCLE, names.items()):
            rows = rows[(rows.method == method) & (rows.task == "mean")]
            curve = rows.pivot_table(index="seed", columns="step", values="value")
            ax.plot(curve.columns, curve.mean(), color=color, label=name)
        ax.set_title(TITLES[method])
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_xlabel("environment steps")
    figure.axes[0].set_ylabel(r"mean $|\mu_m|$")
    figure.axes[0].legend(fontsize=8)
    return figure


# Claims: each gives a verdict and the numbers behind it

SEARCHED = ("cartpole10",)  # where every method's settings were searched with the same budget
BASELINES = ("independent", "hard-sharing", "contextual", "pcgrad", "cagrad")
SMALL = 0.1  # residuals on identical tasks are small if below this share of those on different tasks


def compare(by_method: dict[str, Scores], pairs: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Verdict and a row of a table for each pair of methods, corrected for their number."""
    found = [difference(by_method[x].means, by_method[y].means) for x, y in pairs]
    result = []
    for (x, y), d, p in zip(pairs, found, holm([d.p for d in found])):
        within = margin(by_method[method].means.mean() for method in (x, y))
        decision = verdict(d, p, within)
        chance = improvement(by_method[x].final, by_method[y].final)
        cells = [
            TITLES[x],
            TITLES[y],
            d.interval.text(),
            f"{p:.2g}",
            f"{within:.1f}",
            f"{chance:.2f}",
            decision,
        ]
        result.append((decision, cells))
    return result


def comparisons(rows: list[list[str]]) -> str:
    """The table of `compare`."""
    columns = ["method", "and", "difference of means", "p (Holm)", "margin", "probability of improvement"]
    return markdown([*columns, "verdict"], rows)


def claim_1(by_method: dict[str, Scores]) -> str | None:
    """VarShare and L2Soft beat the other baselines."""
    pairs = [(m, b) for m in ("varshare", "l2soft") for b in BASELINES if m in by_method and b in by_method]
    if not pairs:
        return None
    verdicts, rows = zip(*compare(by_method, pairs))
    won = verdicts.count("better")
    answer = "supported" if won == len(pairs) else f"supported in {won} of {len(pairs)} comparisons"
    if not won:
        answer = "not decided" if set(verdicts) == {"undecided"} else "not supported"
    test = "p below 5 % in every comparison, and not the same within the margin"
    return f"**{answer}** (test: {test})\n\n{comparisons(rows)}"


def claim_2(by_method: dict[str, Scores]) -> str | None:
    """VarShare and L2Soft are the same."""
    pairs = [("varshare", "l2soft"), ("varshare-recentred", "l2soft-recentred")]
    pairs = [(x, y) for x, y in pairs if x in by_method and y in by_method]
    if not pairs:
        return None
    verdicts, rows = zip(*compare(by_method, pairs))
    apart = {"better", "worse"} & set(verdicts)
    answer = "not supported" if apart else "supported" if set(verdicts) == {"the same"} else "not decided"
    test = f"the 95 % interval of the difference lies within {MARGIN:.0%} of the better mean"
    return f"**{answer}** (test: {test})\n\n{comparisons(rows)}"


def claim_6(by_method: dict[str, Scores], target: float | None) -> str | None:
    """SAC needs fewer samples than PPO."""
    if not {"varshare-sac", "varshare-ppo"} <= by_method.keys():
        return None
    sac, ppo = by_method["varshare-sac"], by_method["varshare-ppo"]
    if target is None or min(sac.curve.shape[1], ppo.curve.shape[1]) < 2:
        return "**not decided**: the runs were not evaluated on the way (--eval-interval)"
    needed = steps_to(sac, target), steps_to(ppo, target)
    p = stats.mannwhitneyu(*needed).pvalue
    fewer = np.mean(needed[0][:, None] < needed[1]) - np.mean(needed[0][:, None] > needed[1])
    answer = "not decided"
    if p < 0.05:
        answer = "supported" if fewer > 0 else "not supported: PPO needs fewer"
    lines = [
        f"- {TITLES[name]}: median {median_interval(x).text(0)} steps to an evaluation of {target:.0f}, "
        f"reached in {np.isfinite(x).sum()} of {len(x)} runs"
        for name, x in zip(("varshare-sac", "varshare-ppo"), needed)
    ]
    lines.append(f"- Mann-Whitney test of these steps: p = {p:.2g}, a run that never gets there the longest")
    center = difference(sac.means, ppo.means).interval
    lines.append(f"- final evaluation, VarShare-SAC minus VarShare-PPO: {center.text()}")
    return f"**{answer}** (test: p below 5 %; at the step sizes and beta searched)\n\n" + "\n".join(lines)


def claim_8(different: pd.DataFrame, identical: pd.DataFrame) -> str | None:
    """On identical tasks mu shrinks to 0, on different tasks it does not."""
    lines, small, less = [], [], []
    for method in RESIDUAL:
        rows = [x[(x.method == method) & (x.metric == "residual/ratio")] for x in (identical, different)]
        ratios = [x.set_index("seed").value for x in rows]
        if min(map(len, ratios)) < 2:
            continue
        d = difference(*map(np.log, ratios))  # whose difference is the logarithm of a quotient
        share = Interval(*np.exp(d.interval))
        small.append(share.high < SMALL)
        less.append(share.high < 1)
        lines.append(
            f"- {TITLES[method]}: mean |mu_m| / |theta| {ratios[0].mean():.4f} on identical and "
            f"{ratios[1].mean():.4f} on different tasks, quotient {share.text(2)}"
        )
    if not lines:
        reason = "fewer than two runs, or of before residuals were measured free of what they have in common"
        return f"**not decided**: {reason}" if set(RESIDUAL) & set(identical.method) else None
    answer = "supported" if all(small) else "not supported"
    if not all(small) and all(less):
        answer += ": smaller on identical tasks, but not small"
    test = f"the quotient's 95 % interval lies below {SMALL}; what all mu_m have in common counts as theta"
    return f"**{answer}** (test: {test})\n\n" + "\n".join(lines)


def write_suite(out: Path) -> None:
    """table.md, figures and claims.md from the CSVs."""
    for name in ("runs.csv", "configs.csv", "missing.txt"):
        if not (out / name).is_file():
            fail(f"{out} has no {name}")
    runs, configs = pd.read_csv(out / "runs.csv"), pd.read_csv(out / "configs.csv")
    missing = (out / "missing.txt").read_text().split()
    notes = [f"Missing: {len(missing)} runs, as {', '.join(missing[:5])}.\n"] if missing else []
    summary, tables, claims = [], [], []
    with rc_context(STYLE):
        for (env, steps), group in runs.groupby(["env", "steps"]):
            title, by_method, highest = f"{env}, {steps:,} steps", scores(group), ceiling(env)
            target = None if highest is None else THRESHOLD * highest
            able, why = can_tell(
                {TITLES.get(m, m) if m != BLIND else m: s.means for m, s in by_method.items()}, highest
            )
            power = f"{title}: **this suite {'can' if able else 'cannot'} tell methods apart**: {why}"
            summary.append(f"- {power}\n")
            tables.append(f"## {title}\n\n{make_table(group, target)}")
            for name, plot in SUITE_PLOTS.items():
                if figure := plot(group, title):
                    figure.savefig(out / f"{name}_{env}_{steps}.png")
            if "identical" in env:
                other = out.parent / "cartpole/runs.csv"
                different = pd.read_csv(other) if other.is_file() else runs[:0]
                different = different[(different.env == "cartpole10") & (different.steps == steps)]
                if text := claim_8(different, group):
                    claims.append(f"## C8 ({title}): {claim_8.__doc__}\n\n{text}\n")
                if figure := plot_residuals({"identical tasks": group, "different tasks": different}):
                    figure.savefig(out / f"residuals_{env}_{steps}.png")
                continue
            if text := claim_6(by_method, target):  # which is not about sharing: no power is asked for
                claims.append(f"## C6 ({title}): {claim_6.__doc__}\n\n{text}\n")
                continue
            if not able or env not in SEARCHED:
                reason = f"**this suite cannot tell**: {why}"
                if able:
                    reason = "no verdict: the methods' settings were not searched here"
                claims.append(f"## C1, C2 ({title})\n\n{reason}\n")
                continue
            for number, claim in ((1, claim_1), (2, claim_2)):
                if text := claim(by_method):
                    claims.append(f"## C{number} ({title}): {claim.__doc__}\n\n{text}\n")
    where = (
        ", ".join(configs.hardware.unique()),
        ", ".join(f"`{c}`" for c in configs.git_commit.astype(str).unique()),
    )
    seconds = runs[(runs.metric == "charts/wall_time")].groupby(RUN).value.last().sum()
    notes.append(f"{len(configs)} runs, {seconds / 60:.0f} minutes of training on one core each ({where[0]};")
    notes.append(f"commit {where[1]}).")
    notes.append("In brackets 95 % intervals over runs: Student's t, of medians order statistics.\n")
    (out / "table.md").write_text("\n".join([*summary, *notes, *tables]))
    (out / "claims.md").write_text(
        "\n".join([*summary, *notes, *claims]) if claims else "No claim can be answered by this suite.\n"
    )
    print((out / "table.md").read_text() + "\n" + (out / "claims.md").read_text())


SUITE_PLOTS = {
    "curves": plot_curves,
    "tasks": plot_tasks,
    "improvement": plot_improvement,
    "sharing": plot_sharing_map,
    "cost": plot_cost,
}


def main(folders: tyro.conf.Positional[tuple[Path, ...]], suite: str = "", out: Path | None = None) -> None:
    """Draw the plots of runs, or make the report of a suite.

    Args:
        folders: folders of runs, runs/NAME; or with --suite the folder that holds them; or results/SUITE
        suite: the runs whose names begin with this and two underscores
        out: where the report of a suite goes, by default results/SUITE
    """
    if not folders:
        fail("name one or more folders of runs: python report.py runs/NAME")
    if suite:
        out = out or Path("results", suite)
        collect(folders[0], suite, out)
        write_suite(out)
        return
    if len(folders) == 1 and (folders[0] / "runs.csv").exists():
        write_suite(folders[0])
        return
    for run in [read_run(folder) for folder in folders]:
        for path in plot_run(run):
            print(path)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
