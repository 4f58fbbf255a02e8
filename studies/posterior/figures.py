"""Figures of the study posterior, from its CSVs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bench.collect import EVALUATION
from bench.figures import BLACK, BLUE, GREEN, ORANGE, RED, SKY, draw_ceiling, draw_curve, label_steps
from bench.tables import ceiling
from studies import by_env, on_the_way
from studies.posterior.runs import (
    LEARNED,
    POINT,
    SIGMAS,
    SPARSE,
    TRAINING,
    USED,
    WARM,
    WARM_FIXED,
    WARM_SHUFFLED,
)

STEPS_OF_LADDER = {
    "l2soft@mean": ("L2Soft", SKY, "-"),
    "varshare-fixed@mean": ("sigma fixed", ORANGE, "-"),
    "varshare@mean": ("sigma learned", BLUE, "-"),
    "varshare@sample": ("sigma learned, samples act", BLUE, ":"),
    WARM: ("ten times sigma, learned", GREEN, "-"),
    WARM_SHUFFLED: ("ten times sigma, shuffled", RED, "--"),
    WARM_FIXED: ("sigma fixed at 0.1", BLACK, ":"),
}


def dense(runs: pd.DataFrame) -> list[str]:
    """The environments except for the one with sparse rewards."""
    return [env for env in by_env(runs[~runs.method.str.endswith("-sac")]) if env != SPARSE]


def plot_ladder(runs: pd.DataFrame) -> Figure:
    """Training and evaluation over steps, 95 % intervals, on each suite."""
    envs = dense(runs)
    figure = Figure(figsize=(8.5, 3.2 * len(envs)), layout="constrained")
    axes = figure.subplots(len(envs), 2, squeeze=False)
    names = runs.method + "@" + runs.setting
    for (env, metric), ax in zip(((e, m) for e in envs for m in (TRAINING, EVALUATION)), axes.flat):
        there = set(names[runs.env == env])
        for name, (label, color, style) in ((x, y) for x, y in STEPS_OF_LADDER.items() if x in there):
            rows = runs[(runs.env == env) & (names == name)]
            curve = on_the_way(rows, metric)
            draw_curve(ax, curve.columns, curve, label, color, style)
        if metric == EVALUATION:
            draw_ceiling(ax, ceiling(env))
        what = "training episodes" if metric == TRAINING else "evaluations, mean weights"
        ax.set(title=f"{env}: {what}", ylabel="return, mean over tasks")
        label_steps(ax)
    lines, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    return figure


def plot_use(runs: pd.DataFrame, others: pd.DataFrame, sigma: pd.DataFrame) -> Figure:
    """Sigma of every layer over training; return under noise, and with residuals set to 0."""
    envs = dense(runs)
    figure = Figure(figsize=(12, 3.3 * len(envs)), layout="constrained")
    axes = figure.subplots(len(envs), 3, squeeze=False)
    for (posterior, noise, pruned), env in zip(axes, envs):
        log = sigma[(sigma.env == env) & (sigma.method == "varshare")]
        layers = [x.rpartition("/")[2] for x in log.metric.unique() if "/sigma_q50/" in x]
        for layer, color in zip(layers, (SKY, BLUE, BLACK, ORANGE, RED, GREEN)):
            q1, q50, q99 = (
                log[log.metric == f"{SIGMAS}{q}/{layer}"].set_index("step").value for q in (1, 50, 99)
            )
            posterior.plot(q50, color=color, label=layer)
            posterior.fill_between(q1.index, q1, q99, color=color, alpha=0.1, lw=0)
        posterior.set(yscale="log", title=env, ylabel="sigma of live weights: median, 1 to 99 %")
        label_steps(posterior)
        posterior.legend(fontsize=7, ncols=2)
        for run in USED:
            label, color, _ = STEPS_OF_LADDER[run]
            of_run = others[(others.env == env) & (others.run == run)]
            curves = {what: rows.groupby("level").value.mean() for what, rows in of_run.groupby("what")}
            if curves:
                noise.plot(pd.concat((curves["mean"], curves["noise"])), marker=".", color=color, label=label)
            for what, style in (("pruned by |mu|", "-"), ("pruned by |mu| / sigma", "--")):
                if what in curves and run in (POINT, LEARNED, WARM):
                    curve = curves[what].iloc[:-1]  # of the last nothing is kept
                    name = what.removeprefix("pruned ").replace("mu", r"$\mu$").replace("sigma", r"$\sigma$")
                    pruned.plot(
                        100 * (1 - curve.index),
                        curve,
                        style,
                        marker=".",
                        color=color,
                        label=f"{label}, {name}",
                    )
        noise.set(xlabel="noise in the weights over their size", ylabel="return, mean over tasks")
        pruned.set(xlabel="% of the actor's residuals that are kept", ylabel="return, mean over tasks")
        pruned.set_xscale("log")
        pruned.invert_xaxis()
        pruned.xaxis.set_major_formatter("{x:g}")
        for ax in (noise, pruned):
            ax.set_ylim(bottom=0)
            ax.legend(fontsize=7)
    return figure
