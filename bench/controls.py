"""The control suites of benchmark.sh: runs/SUITE__* -> results/SUITE/runs.csv and table.md.

    power           can a suite tell methods apart? (and power.png)
    ceilings        what does each task allow an agent of its own?
    normalisation   what do --norm-obs and --norm-value change?
    serial          one environment of each task or eight, different tasks or identical ones (and serial.png)
    ranks           LoRA by its rank
    recipe          what helps PPO on Meta-World?

A run's --exp-name is method@setting. The table is made from runs.csv alone, which is made anew where there
are runs; of recipe earlier runs of other settings and seeds stay.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bench.methods import METHODS
from bench.statistics import BLIND, MARGIN, can_tell, difference, holm, margin, mean_interval, verdict
from bench.style import STYLE, color_of, line_of
from bench.tables import markdown, title_of
from envs import ENV_IDS

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("eval/episodic_return", "eval/success_rate")
RETURN, SPREAD = METRICS[0], "embedding/spread"
KEY = ["env", "steps", "method", "setting", "seed"]
HIGHEST = {"cartpole10": 500.0, "cartpole-identical10": 500.0}  # by construction: a reward of 1, 500 steps


def collect(folder: Path, suite: str) -> pd.DataFrame:
    """The evaluations of all finished runs, long, with commit and hardware; on the way only their means."""
    rows = []
    for model in sorted(folder.glob(f"{suite}__*/model.pt")):
        config = json.loads((model.parent / "config.json").read_text())
        log, args = pd.read_csv(model.parent / "heartbeat.csv"), config["args"]
        final = (log.global_step == log.global_step.max()) | (log.metric == RETURN) & (log.task == "mean")
        log = log[log.metric.isin(METRICS) & final].rename(columns={"global_step": "step"})
        method, _, setting = args["exp_name"].partition("@")
        key = dict(zip(KEY, (args["env_id"], args["total_timesteps"], method, setting, args["seed"])))
        if "embedding_std" in args:
            last = {"step": log.step.max(), "metric": SPREAD, "task": "mean"}
            log = pd.concat([log, pd.DataFrame([last | {"value": spread_of(model, args["embedding_std"])}])])
        rows.append(log.assign(**key, commit=config["git_commit"], hardware=config["hardware"]))
    columns = [*KEY, "metric", "task", "step", "value", "commit", "hardware"]
    return pd.concat(rows)[columns] if rows else pd.DataFrame(columns=columns)


def spread_of(model: Path, std: float) -> float:
    """How far the tasks' embeddings are from their mean, over what it was when they were drawn."""
    embedding = torch.load(model, map_location="cpu", weights_only=True)["agent"]["embedding"]
    return embedding.std(0).square().mean().sqrt().item() / std


def ceiling(env: str) -> float | None:
    """Mean over tasks of what each allows: the highest there is, or the best seed in results/ceilings."""
    path = Path("results/ceilings/runs.csv")  # of $OUT, else of the project
    path = path if path.exists() else ROOT / path
    if env in HIGHEST or not path.exists():
        return HIGHEST.get(env)
    runs = pd.read_csv(path)
    runs = runs[(runs.env == env) & (runs.metric == RETURN) & (runs.task != "mean")]
    return runs.groupby("task").value.max().mean() if len(runs) else None


def by_seed(runs: pd.DataFrame, metric: str = RETURN) -> pd.Series:
    """Of the rows of one method and setting: mean over tasks, by seed."""
    rows = runs[(runs.metric == metric) & (runs.task == "mean")]
    return rows[rows.step == rows.step.max()].set_index("seed").value.sort_index()


def worst(runs: pd.DataFrame) -> pd.Series:
    """The same for the worst task."""
    rows = runs[(runs.metric == RETURN) & (runs.task != "mean")]
    return rows.groupby("seed").value.min()


def suites(runs: pd.DataFrame) -> dict[tuple[str, int], pd.DataFrame]:
    """(env, steps) -> its rows, in the order in which `envs` names the suites."""
    order = {env: i for i, env in enumerate(ENV_IDS)}
    groups = dict(iter(runs.groupby(["env", "steps"])))
    return {key: groups[key] for key in sorted(groups, key=lambda x: (order.get(x[0], len(order)), *x))}


def best_settings(group: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of the runs on one suite: method -> rows of the setting with the highest mean."""
    best = {}
    for method, rows in group.groupby("method", sort=False):
        settings = dict(iter(rows.groupby("setting")))
        best[method] = max(settings.values(), key=lambda x: by_seed(x).mean())
    return best


def draw_evaluations(ax: Axes, method: str, rows: pd.DataFrame) -> None:
    """Evaluations on the way of one method's runs: mean over them, and its 95 % interval."""
    curve = rows[(rows.metric == RETURN) & (rows.task == "mean")]
    curve = curve.pivot(index="seed", columns="step", values="value")
    mean, low, high = np.array([mean_interval(x) for x in curve.to_numpy().T]).T
    color = color_of(method)
    ax.plot(curve.columns, mean, line_of(method), color=color, lw=1.8, label=title_of(method))
    ax.fill_between(curve.columns, low, high, color=color, alpha=0.15, lw=0)


def plot_power(runs: pd.DataFrame) -> Figure:
    """For every suite the evaluations on the way, of each method at its best step size, 95 % intervals."""
    groups = suites(runs)
    figure = Figure(figsize=(3.6 * math.ceil(len(groups) / 2), 5.6), layout="constrained")
    axes = figure.subplots(2, math.ceil(len(groups) / 2), squeeze=False).flat
    for ax, ((env, _), group) in zip(axes, groups.items()):
        best = best_settings(group)
        for method in sorted(best, key=list(METHODS).index):
            draw_evaluations(ax, method, best[method])
        if (highest := ceiling(env)) is not None:
            ax.axhline(highest, color="0.6", lw=1, ls=":", label="what the tasks allow")
        able, _ = can_tell({m: by_seed(x) for m, x in best.items()}, highest)
        ax.set_title(f"{env}: {'can tell' if able else 'cannot tell'}")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_xlabel("environment steps, all tasks together", fontsize=8)
    for ax in list(axes)[len(groups) :]:
        ax.set_visible(False)
    figure.axes[0].set_ylabel("evaluation, mean over tasks")
    lines, labels = max((ax.get_legend_handles_labels() for ax in figure.axes), key=lambda x: len(x[1]))
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
    return figure


def power(runs: pd.DataFrame) -> str:
    """For every suite the control and the others at their step sizes, and whether the suite can tell."""
    summary, tables = [], []
    for (env, steps), group in suites(runs).items():
        settings = sorted(group.setting.unique(), key=float)
        methods = dict(iter(group.groupby("method", sort=False)))
        means = {m: {s: by_seed(x) for s, x in rows.groupby("setting")} for m, rows in methods.items()}
        rows_of = best_settings(group)
        best = {m: by_seed(x) for m, x in rows_of.items()}
        able, why = can_tell(best, ceiling(env))
        others = [m for m in best if m != BLIND and BLIND in best]
        differences = {m: difference(best[m], best[BLIND]) for m in others}
        corrected = dict(zip(others, holm([d.p for d in differences.values()])))
        within = margin(x.mean() for x in best.values())
        rows = []
        for method in sorted(best, key=lambda m: (m != BLIND, -best[m].mean())):
            cells = [method, str(len(best[method]))]
            cells += [f"{means[method][s].mean():.1f}" if s in means[method] else "" for s in settings]
            cells += [mean_interval(x).text() for x in (best[method], worst(rows_of[method]))]
            successes = by_seed(rows_of[method], METRICS[1])
            cells += [f"{successes.mean():.0%}"] if METRICS[1] in set(group.metric) else []
            if method in differences:
                d = differences[method]
                cells += [
                    d.interval.text(),
                    f"{corrected[method]:.2g}",
                    verdict(d, corrected[method], within),
                ]
            rows.append(cells if method in differences else [*cells, "", "", ""])
        columns = ["method", "runs", *(f"step size {s}" for s in settings)]
        columns += ["mean at the best", "its worst task"]
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
    for (env, _), group in suites(runs).items():
        final = group[(group.metric == RETURN) & (group.step == group.step.max())]
        values = final.pivot(index="task", columns="seed", values="value")
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
    for (env, steps), group in suites(runs).items():
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


def of_settings(group: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """(method, setting) -> rows."""
    return dict(iter(group.groupby(["method", "setting"], sort=False)))


def serial(runs: pd.DataFrame) -> str:
    """For both suites the return with one environment of each task and with eight; and the embeddings."""
    tables, spreads = [], {}
    for (env, steps), group in suites(runs).items():
        found, rows = of_settings(group), []
        for method in sorted(group.method.unique(), key=list(METHODS).index):
            means = [by_seed(found[method, number]) for number in ("1", "8")]
            cells = [
                mean_interval(x).text() for x in (*means, *(worst(found[method, n]) for n in ("1", "8")))
            ]
            rows.append([title_of(method), *cells, difference(*means[::-1]).interval.text()])
        columns = ["method", "1 environment", "8", "worst task, 1", "worst task, 8", "8 minus 1"]
        tables.append(f"## {env}, {steps:,} steps, {group.seed.nunique()} seeds\n\n{markdown(columns, rows)}")
        for (_, number), rows in found.items():
            if (rows.metric == SPREAD).any():
                spreads[env, number] = by_seed(rows, SPREAD)
    lines = [f"| {env} | {number} | {mean_interval(x).text(2)} |" for (env, number), x in spreads.items()]
    head = "## Contextual: spread of the embeddings at the end, 1 is that of the draws they start as"
    table = "\n".join(["| suite | environments of each task | spread |", "|---|---|---|", *lines])
    return "\n".join([*tables, f"{head}\n\n{table}\n"])


def ranks(runs: pd.DataFrame) -> str:
    """The return of every rank, and beside full rank's."""
    (((env, steps), group),) = suites(runs).items()
    found = of_settings(group)
    full = next(by_seed(rows) for (_, setting), rows in found.items() if setting == "full")
    rows = []
    for (method, setting), rows_of in found.items():
        x, d = by_seed(rows_of), difference(by_seed(rows_of), full)
        against = "" if setting == "full" else d.interval.text()
        rows.append(
            [
                title_of(method),
                setting,
                mean_interval(x).text(),
                mean_interval(worst(rows_of)).text(),
                against,
            ]
        )
    columns = ["method", "rank", "mean", "worst task", "minus full rank"]
    return f"## {env}, {steps:,} steps, {group.seed.nunique()} seeds\n\n{markdown(columns, rows)}"


def recipe(runs: pd.DataFrame) -> str:
    """Success in percent of every setting, the best first, and of every task."""
    (((env, steps), group),) = suites(runs).items()
    tasks, rows = [task for task in group.task.unique() if task != "mean"], []
    found = {setting: x[x.metric == METRICS[1]] for (_, setting), x in of_settings(group).items()}
    success = {setting: 100 * by_seed(x, METRICS[1]) for setting, x in found.items()}
    base = success["base"]
    others = {s: difference(*(y.align(base, join="inner"))) for s, y in success.items() if y is not base}
    corrected = dict(zip(others, holm([d.p for d in others.values()])))
    for setting in sorted(found, key=lambda s: -success[s].mean()):
        x, by_task = success[setting], found[setting].groupby("task").value.mean()
        rows.append([setting.replace("-", " "), str(len(x)), mean_interval(x).text(), "", ""])
        if setting in others:
            rows[-1][-2:] = [others[setting].interval.text(), f"{corrected[setting]:.2g}".replace("nan", "-")]
        rows[-1] += [f"{100 * by_task[task]:.0f}" for task in tasks]
    columns = ["setting", "runs", "success, %", "minus base, same seeds", "p (Holm)", *tasks]
    return f"## {env}, {steps:,} steps, {title_of(group.method.iloc[0])}\n\n{markdown(columns, rows)}"


def plot_serial(runs: pd.DataFrame) -> Figure:
    """Four panels: one environment of each task and eight, different and identical tasks."""
    groups = suites(runs)
    figure = Figure(figsize=(9.6, 6.6), layout="constrained")
    for row, ((env, _), group) in zip(
        figure.subplots(len(groups), 2, sharex=True, sharey="row", squeeze=False), groups.items()
    ):
        for ax, number in zip(row, ("1", "8")):
            for method in sorted(group.method.unique(), key=list(METHODS).index):
                draw_evaluations(ax, method, of_settings(group)[method, number])
            ax.set_title(f"{env}, {number} environment{'s' * (number != '1')} of each task")
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    for ax in row:
        ax.set_xlabel("environment steps, all tasks together")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def main(suite: str) -> str:
    """Make runs.csv, where runs exist, and table.md; returns the table."""
    folder = Path("results", suite)
    folder.mkdir(parents=True, exist_ok=True)
    path, options = folder / "runs.csv", {"keep_default_na": False, "dtype": {"setting": str, "value": str}}
    if len(runs := collect(Path("runs"), suite)):
        runs["value"] = runs["value"].map("{:.6g}".format)
        if suite == "recipe" and path.exists():  # which takes hours: it may be run in parts
            earlier = pd.read_csv(path, **options)
            again = earlier.set_index(KEY).index.isin(runs.set_index(KEY).index)
            runs = pd.concat([earlier[~again], runs])
        runs.to_csv(path, index=False)
    runs = pd.read_csv(path, **options).astype({"value": float})
    machine = (
        f"{', '.join(runs.hardware.unique())}; commit {', '.join(f'`{x}`' for x in runs.commit.unique())}"
    )
    tables = {f.__name__: f for f in (power, ceilings, normalisation, serial, ranks, recipe)}
    text = f"{tables[suite](runs)}\n{len(runs[KEY].drop_duplicates())} runs, one core each ({machine}).\n"
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        if plot := {"power": plot_power, "serial": plot_serial}.get(suite):
            plot(runs).savefig(folder / f"{suite}.png")
    return text
