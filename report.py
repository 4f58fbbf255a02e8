"""Figures and tables from run folders.

    python report.py runs/NAME [runs/NAME2 ...]     plots of single runs -> runs/NAME/plots/
    python report.py runs --suite cartpole          all runs/cartpole__* -> results/cartpole/
    python report.py results/cartpole               the same from the committed CSVs alone

Of a run: returns.png, norms.png, sharing_ratio.png, losses.png; what it has not logged is left out, and a run
that is not finished is drawn as far as it went. Of a suite, for every environment and budget of steps:

    runs.csv            every number used: env, steps, method, seed, metric, task, step, value (long)
    configs.csv         script, settings, commit and hardware of every run
    table.md            final evaluation (IQM and mean over tasks, worst task); of the training return the
                        area under the curve and the steps to 90 % of what the best method ends with; each
                        with a 95 % bootstrap interval over runs; cost
    curves_*.png, tasks_*.png, improvement_*.png, sharing_*.png, cost_*.png
    claims.md           verdicts on those of the README's claims that the suite can answer

A method is what --exp-name says, by default the script's name.
"""

import io
import json
import math
import sys
from collections.abc import Callable
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

# Okabe and Ito's palette, told apart with any kind of colour vision
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
)
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
MAX_CURVES = len(CYCLE)  # in one pair of axes
HEADER = "global_step,metric,task,value"  # of heartbeat.csv
STYLE = {  # for matplotlib.rc_context
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "savefig.dpi": 130,
}


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
    final = run.values("eval/episodic_return").iloc[-1] if run.finished else None
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
    if final is not None:
        for name, ax in panels.items():
            (mark,) = ax.plot(final.name, final[name], "D", color=BLACK, ms=5, clip_on=False, zorder=3)
            ax.set_title(f"{ax.get_title()}:  {final[name]:.1f}")
            if ax is top:
                mark.set_label(f"final evaluation, deterministic actions: {final[name]:.1f}")
                ax.legend(fontsize=8, loc="best")
    return figure


def plot_norms(run: Run) -> Figure | None:
    """Size of the residuals, of the shared weights, of the noise, and of the price of the residuals."""
    titles = {
        "mu_norm": r"$|\mu_m|$, residual means",
        "theta_norm": r"$|\theta|$, shared weights",
        "head_norm": "norm of a task's head",
        "embedding_norm": "norm of a task's embedding",
        "sigma": r"median $\sigma_m$",
        "sigma_over_theta": r"median $\sigma_m$ / median $|\theta|$",
        "kl_loss": r"$\beta\,\mathrm{KL}_m / N_m$, in the loss",
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
        draw_tasks(ax, table, run.tasks if name != "theta_norm" else [])
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


def plot_sharing(run: Run) -> Figure | None:
    """Sharing ratio of the layers over time, and at the end for every task."""
    metrics = [metric for metric in run.metrics() if "/sharing_ratio/" in metric]
    if not metrics:
        return None
    layers = {layer_of(metric): run.values(metric) for metric in metrics}
    networks: dict[str, list[str]] = {}
    for layer in layers:
        networks.setdefault(layer.partition(".")[0], []).append(layer)
    width = max(4.0 * len(networks), 3.0 + 0.5 * len(run.tasks))
    figure = start_figure(run, width, 5.4 + 0.3 * len(layers))
    grid = figure.add_gridspec(2, len(networks), height_ratios=[3.0, 1.8 + 0.3 * len(layers)])
    means = pd.DataFrame({name: table["mean"] for name, table in layers.items()})  # (step, layer)
    last = pd.DataFrame({name: table[run.tasks].iloc[-1] for name, table in layers.items()})
    last = last.T  # (layer, task)
    lowest = math.floor(10 * min(0.9, means.min().min())) / 10
    for i, (network, names) in enumerate(networks.items()):
        ax = figure.add_subplot(grid[0, i])
        some = sorted({round(x) for x in np.linspace(0, len(names) - 1, MAX_CURVES)})
        for color, name in zip(CYCLE, [names[x] for x in some]):
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
CURVES = [TRAINING, "charts/wall_time", "varshare/mu_norm"]  # kept over time, of all tasks together
LAST = ["charts/SPS", "varshare/mu_norm", "varshare/theta_norm"]  # kept at the end, and for every task
TITLES = {
    "varshare": "VarShare",
    "varshare-recentred": "VarShare, re-centred",
    "l2soft": "L2Soft",
    "l2soft-recentred": "L2Soft, re-centred",
    "independent": "Independent",
    "hard-sharing": "Hard sharing",
    "contextual": "Contextual",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "varshare-ppo": "VarShare-PPO",
    "varshare-sac": "VarShare-SAC",
}
RESIDUAL = ("varshare", "varshare-recentred", "l2soft", "l2soft-recentred")  # methods with a mu_m per task
RESIDUAL += ("varshare-ppo", "varshare-sac")
NOT_TRAINED = ("return_stats", "target", "action_scale", "action_bias")
RESAMPLES = 2000
NEVER = 1e18  # steps; finite, so that it can be averaged


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
    agent = {name: x for name, x in agent.items() if name not in NOT_TRAINED}
    own = {name: x for name, x in agent.items() if x.ndim == 2}  # (task, weight)
    extra = [
        ("parameters/own", "mean", sum(x.shape[1] for x in own.values())),
        ("parameters/all", "mean", sum(x.numel() for x in agent.values())),
    ]
    if "mu" in agent:
        mu = agent["mu"] / agent["mu"].norm(dim=1, keepdim=True)
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
    """What a method reached in one environment with one budget; the first axis is the run.

    Attributes:
        final: (run, task) return of the final evaluation.
        steps, curve: (step,) and (run, step), mean training return over tasks.
    """

    final: np.ndarray
    steps: np.ndarray
    curve: np.ndarray


def scores(group: pd.DataFrame) -> dict[str, Scores]:
    """method -> Scores, in the order of TITLES and then of the alphabet."""
    methods = sorted(group.method.unique(), key=lambda m: (list(TITLES).index(m) if m in TITLES else 99, m))
    result = {}
    for method in methods:
        rows = group[group.method == method]
        final = rows[(rows.metric == EVALUATION) & (rows.task != "mean")]
        curve = rows[rows.metric == TRAINING].pivot(index="seed", columns="step", values="value")
        curve = curve.ffill(axis=1).bfill(axis=1)  # before the first episode of a task ended
        final = final.pivot_table(index="seed", columns="task", values="value", sort=False)
        result[method] = Scores(final.to_numpy(), curve.columns.to_numpy(), curve.to_numpy())
    return result


def iqm(x: np.ndarray) -> float:
    """Mean of the middle half of all numbers (Agarwal et al. 2021)."""
    return float(stats.trim_mean(x, 0.25, axis=None))


def steps_to(s: Scores, target: float) -> np.ndarray:
    """(run,) steps until the training return first reaches the target, NEVER where it does not."""
    reached = s.curve >= target
    return np.where(reached.any(1), s.steps[reached.argmax(1)], NEVER)


def interval(statistic: Callable[..., float], *samples: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of samples whose runs, the first axis, are resampled."""
    if min(map(len, samples)) < 2 or any(np.isnan(x).any() for x in samples):
        return math.nan, math.nan
    found = stats.bootstrap(
        [np.arange(len(x)) for x in samples],
        lambda *rows: statistic(*(x[row] for x, row in zip(samples, rows))),
        vectorized=False,
        paired=False,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def curve_interval(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the IQM over runs at every step: (run, step) -> (step,) twice."""
    found = stats.bootstrap(
        (curve,),
        lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
        axis=0,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return found.low, found.high


def improvement(x: np.ndarray, y: np.ndarray) -> float:
    """P(a run of x scores above one of y on a task), ties half, mean over tasks; (run, task) each."""
    return float(np.mean((x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])))


def with_interval(x: float, low: float, high: float, digits: int = 1) -> str:
    """x [low, high]; of NEVER and NaN a dash."""
    x, low, high = (f"{v:,.{digits}f}" if abs(v) < 1e12 else "-" for v in (x, low, high))
    return f"{x} [{low}, {high}]"


def make_table(group: pd.DataFrame) -> str:
    """The table of one environment and budget, best IQM first."""
    by_method = scores(group)
    target = 0.9 * max(s.curve[:, -1].mean() for s in by_method.values())
    # IQM over runs and tasks; the rest are means over runs
    measures = {
        "IQM": (lambda s: s.final, iqm, 1),
        "mean": (lambda s: s.final, np.mean, 1),
        "worst task": (lambda s: s.final.min(1), np.mean, 1),
        "area under the curve": (lambda s: s.curve.mean(1), np.mean, 1),
        f"steps to {target:.0f} (median)": (lambda s: steps_to(s, target), np.median, 0),
    }
    cost = group[group.task == "mean"].groupby(["method", "seed", "metric"]).value.last().unstack()
    cost = cost.groupby("method").median()
    rows = []
    for method, s in by_method.items():
        cells = [TITLES.get(method, method), str(len(s.final))]
        for select, statistic, digits in measures.values():
            sample = select(s)
            cells.append(with_interval(statistic(sample), *interval(statistic, sample), digits))
        c = cost.loc[method]
        cells += [f"{c['parameters/own']:,.0f}", f"{c['parameters/all']:,.0f}"]
        cells += [f"{c['charts/wall_time']:.1f}", f"{c['charts/SPS']:,.0f}"]
        rows.append(((iqm(s.final), s.final.mean()), cells))
    columns = [
        "method",
        "runs",
        *measures,
        "parameters of a task's own",
        "parameters",
        "seconds",
        "env steps/s",
    ]
    lines = [
        columns,
        ["---"] * len(columns),
        *(cells for _, cells in sorted(rows, key=lambda row: row[0], reverse=True)),
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def panels_of(methods: list[str]) -> list[list[str]]:
    """Methods in panels of at most MAX_CURVES: those with residuals, and the plain one against the others."""
    residual = [m for m in methods if m in RESIDUAL]
    others = [m for m in methods if m not in RESIDUAL]
    if len(methods) < MAX_CURVES:
        return [methods]
    return [residual, [*residual[:1], *others][:MAX_CURVES]]


def color_of(method: str) -> str:
    """One colour per method in every figure; those with residuals have one also."""
    order = ["varshare", "independent", "hard-sharing", "contextual", "pcgrad", "cagrad"]
    order += ["l2soft", "varshare-recentred"]
    colors = dict(zip(order, (BLUE, BLACK, ORANGE, PURPLE, GREEN, RED, SKY, YELLOW)))
    colors |= {"varshare-ppo": BLUE, "varshare-sac": ORANGE}  # which are in no figure with the others
    return colors.get(method, "0.5")


def plot_curves(group: pd.DataFrame, title: str) -> Figure:
    """Training return of every method: IQM over runs of the mean over tasks, 95 % intervals."""
    by_method = scores(group)
    panels = panels_of(list(by_method))
    figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, methods in zip(axes, panels):
        for method in methods:
            s, color = by_method[method], color_of(method)
            ax.plot(
                s.steps, [iqm(x) for x in s.curve.T], color=color, lw=1.8, label=TITLES.get(method, method)
            )
            if len(s.curve) > 1:
                ax.fill_between(s.steps, *curve_interval(s.curve), color=color, alpha=0.15, lw=0)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_xlabel("environment steps, all tasks together")
        ax.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("training return, mean over tasks")
    return figure


def plot_cost(group: pd.DataFrame, title: str) -> Figure | None:
    """Where SAC and PPO are compared: training return against environment steps and against time."""
    by_method = scores(group)
    if not any(method.endswith("-sac") for method in by_method):
        return None
    figure = Figure(figsize=(11.2, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, 2, sharey=True)
    for method, s in by_method.items():
        rows = group[(group.method == method) & (group.metric == "charts/wall_time")]
        seconds = rows.groupby("step").value.median()[s.steps]  # of the runs
        for ax, x in zip(axes, (s.steps, seconds.to_numpy())):
            color, name = color_of(method), TITLES.get(method, method)
            ax.plot(x, [iqm(y) for y in s.curve.T], color=color, lw=1.8, label=name)
            if len(s.curve) > 1:
                ax.fill_between(x, *curve_interval(s.curve), color=color, alpha=0.15, lw=0)
    axes[0].set_xlabel("environment steps, all tasks together")
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[1].set_xlabel("seconds on one core")
    axes[1].set_xscale("log")
    axes[0].set_ylabel("training return, mean over tasks")
    axes[0].legend(fontsize=8, loc="lower right")
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
    for i, (ax, task) in enumerate(zip(axes, tasks)):
        for name, (method, s) in zip(names, by_method.items()):
            values = s.final[:, i]
            low, high = interval(np.mean, values)
            mean = values.mean()
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
    """|mu_m| over time on identical and on different tasks."""
    names = {name: rows[rows.metric == "varshare/mu_norm"] for name, rows in groups.items()}
    methods = [m for m in RESIDUAL if all((rows.method == m).any() for rows in names.values())]
    if len(groups) < 2 or not methods:
        return None
    figure = Figure(figsize=(3.4 * len(methods), 3.4), layout="constrained")
    figure.suptitle("norm of the residuals, mean over tasks, IQM over runs", fontsize=11)
    for ax, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods):
        for color, (name, rows) in zip(CYCLE, names.items()):
            rows = rows[(rows.method == method) & (rows.task == "mean")]
            curve = rows.pivot_table(index="seed", columns="step", values="value")
            ax.plot(curve.columns, [iqm(x) for x in curve.to_numpy().T], color=color, label=name)
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
MARGIN = 0.05  # two methods are the same if their means differ by less than this share of the better one
SMALL = 0.1  # residuals on identical tasks are small if below this share of those on different tasks


def difference(x: Scores, y: Scores) -> tuple[float, float, float]:
    """Mean final evaluation of x minus that of y, and its 95 % interval."""
    return x.final.mean() - y.final.mean(), *interval(lambda a, b: a.mean() - b.mean(), x.final, y.final)


def claim_1(by_method: dict[str, Scores]) -> str | None:
    """VarShare and L2Soft beat the other baselines."""
    pairs = [(m, b) for m in ("varshare", "l2soft") for b in BASELINES if m in by_method and b in by_method]
    if not pairs:
        return None
    lines, won, decided = [], 0, True
    for method, baseline in pairs:
        x, y = by_method[method], by_method[baseline]
        center, low, high = difference(x, y)
        chance = improvement(x.final, y.final), *interval(improvement, x.final, y.final)
        won, decided = won + (low > 0), decided and not math.isnan(low)
        lines.append(
            f"| {TITLES[method]} | {TITLES[baseline]} | {with_interval(center, low, high)} | "
            f"{with_interval(*chance, 2)} | {'yes' if low > 0 else 'no'} |"
        )
    verdict = "supported" if won == len(pairs) else f"supported in {won} of {len(pairs)} comparisons"
    verdict = verdict if won else "not supported"
    test = (
        "test: in every comparison the 95 % interval of the difference lies above 0; no correction for their"
    )
    columns = "| method | baseline | difference of means | probability of improvement | above 0 |"
    head = f"**{verdict if decided else 'not decided'}** ({test} number)\n\n{columns}\n|---|---|---|---|---|"
    return "\n".join([head, *lines])


def claim_2(by_method: dict[str, Scores]) -> str | None:
    """VarShare and L2Soft are the same."""
    pairs = [("varshare", "l2soft"), ("varshare-recentred", "l2soft-recentred")]
    pairs = [(x, y) for x, y in pairs if x in by_method and y in by_method]
    lines, same, apart = [], [], []  # apart: by more than the margin
    for x, y in pairs:
        center, low, high = difference(by_method[x], by_method[y])
        margin = MARGIN * abs(max(by_method[x].final.mean(), by_method[y].final.mean()))
        same.append(max(abs(low), abs(high)) < margin)
        apart.append(low > margin or high < -margin)
        lines.append(
            f"- {TITLES[x]} minus {TITLES[y]}: {with_interval(center, low, high)}, margin {margin:.1f}; "
            f"{'within it' if same[-1] else 'beyond it' if apart[-1] else 'not decided'}"
        )
    if not lines:
        return None
    verdict = "not supported" if any(apart) else "supported" if all(same) else "not decided"
    test = f"the 95 % interval of the difference lies within {MARGIN:.0%} of the better mean"
    return f"**{verdict}** (test: {test})\n\n" + "\n".join(lines)


def claim_6(by_method: dict[str, Scores]) -> str | None:
    """SAC needs fewer samples than PPO."""
    if not {"varshare-sac", "varshare-ppo"} <= by_method.keys():
        return None
    sac, ppo = by_method["varshare-sac"], by_method["varshare-ppo"]
    target = 0.9 * max(s.curve[:, -1].mean() for s in (sac, ppo))
    needed = steps_to(sac, target), steps_to(ppo, target)

    def quotient(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.median(x) / np.median(y))

    low, high = interval(quotient, *needed)
    verdict = "supported" if high < 1 else "not supported: PPO needs fewer" if low > 1 else "not decided"
    lines = [
        f"- {TITLES[name]}: median {with_interval(np.median(x), *interval(np.median, x), 0)} steps to a "
        f"training return of {target:.0f}, reached in {(x < NEVER).sum()} of {len(x)} runs"
        for name, x in zip(("varshare-sac", "varshare-ppo"), needed)
    ]
    lines.append(
        f"- quotient: {with_interval(quotient(*needed), low, high, 2)}, a run that never gets there "
        "counting as infinitely long"
    )
    center, *ends = difference(sac, ppo)
    lines.append(f"- final evaluation, VarShare-SAC minus VarShare-PPO: {with_interval(center, *ends)}")
    test = "the 95 % interval of the quotient of medians lies below 1; at the step sizes and beta searched"
    return f"**{verdict}** (test: {test})\n\n" + "\n".join(lines)


def claim_8(different: pd.DataFrame, identical: pd.DataFrame) -> str | None:
    """On identical tasks mu shrinks to 0, on different tasks it does not."""
    lines, small, less = [], [], []
    for method in RESIDUAL:
        ratios = []
        for rows in (identical, different):
            rows = rows[(rows.method == method) & (rows.task == "mean")]
            last = rows.groupby(["seed", "metric"]).value.last().unstack()
            if not len(last):
                break
            ratios.append((last["varshare/mu_norm"] / last["varshare/theta_norm"]).to_numpy())
        if len(ratios) < 2:
            continue
        share = ratios[0].mean() / ratios[1].mean()
        low, high = interval(lambda a, b: a.mean() / b.mean(), *ratios)
        small.append(high < SMALL)
        less.append(high < 1)
        lines.append(
            f"- {TITLES[method]}: mean |mu_m| / |theta| {ratios[0].mean():.4f} on identical and "
            f"{ratios[1].mean():.4f} on different tasks, quotient {with_interval(share, low, high, 2)}"
        )
    if not lines:
        return None
    verdict = "supported" if all(small) else "not supported"
    if not all(small) and all(less):
        verdict += ": smaller on identical tasks, but not small"
    return f"**{verdict}** (test: the quotient's 95 % interval lies below {SMALL})\n\n" + "\n".join(lines)


def write_suite(out: Path) -> None:
    """table.md, figures and claims.md from the CSVs."""
    for name in ("runs.csv", "configs.csv", "missing.txt"):
        if not (out / name).is_file():
            fail(f"{out} has no {name}")
    runs, configs = pd.read_csv(out / "runs.csv"), pd.read_csv(out / "configs.csv")
    missing = (out / "missing.txt").read_text().split()
    notes = [f"Missing: {len(missing)} runs, as {', '.join(missing[:5])}.\n"] if missing else []
    tables, claims = [], []
    with rc_context(STYLE):
        for (env, steps), group in runs.groupby(["env", "steps"]):
            title = f"{env}, {steps:,} steps"
            tables.append(f"## {title}\n\n{make_table(group)}")
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
            if env not in SEARCHED:
                claims.append(
                    f"## C1, C2 ({title})\n\nno verdict: the methods' settings were not searched here\n"
                )
                continue
            for number, claim in ((1, claim_1), (2, claim_2), (6, claim_6)):
                if text := claim(scores(group)):
                    claims.append(f"## C{number} ({title}): {claim.__doc__}\n\n{text}\n")
    where = (
        ", ".join(configs.hardware.unique()),
        ", ".join(f"`{c}`" for c in configs.git_commit.astype(str).unique()),
    )
    seconds = runs[(runs.metric == "charts/wall_time")].groupby(RUN).value.last().sum()
    notes.append(f"{len(configs)} runs, {seconds / 60:.0f} minutes of training on one core each ({where[0]};")
    notes.append(f"commit {where[1]}).")
    notes.append("In brackets 95 % bootstrap intervals over runs.\n")
    (out / "table.md").write_text("\n".join([*notes, *tables]))
    (out / "claims.md").write_text(
        "\n".join([*notes, *claims]) if claims else "No claim can be answered by this suite.\n"
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
