"""Figures of the study posterior, from its CSVs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bench.collect import EVALUATION
from bench.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    add_legend,
    begin_at,
    bounds_of,
    describe_runs,
    draw_ceiling,
    draw_curve,
    label_steps,
    start_figure,
)
from bench.tables import ceiling
from studies import by_env, on_the_way
from studies.posterior.runs import (
    LEARNED,
    POINT,
    SIGMA_PRIOR,
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
    """Training and evaluation over steps on each suite."""
    envs, numbers = dense(runs), []
    figure = start_figure("", 1.2 + 2.5 * len(envs))
    axes = figure.subplots(len(envs), 2, squeeze=False)
    names = runs.method + "@" + runs.setting
    for (env, metric), ax in zip(((e, m) for e in envs for m in (TRAINING, EVALUATION)), axes.flat):
        there, bounds = set(names[runs.env == env]), bounds_of(env)
        for name, (label, color, style) in ((x, y) for x, y in STEPS_OF_LADDER.items() if x in there):
            curve = on_the_way(runs[(runs.env == env) & (names == name)], metric)
            numbers.append(len(curve))
            draw_curve(ax, curve.columns, curve, label, color, style, bounds)
        if metric == EVALUATION:
            draw_ceiling(ax, ceiling(env))
        what = "training episodes" if metric == TRAINING else "evaluations, mean weights"
        ax.set(title=f"{env}: {what}", ylabel="return, mean over tasks")
        label_steps(ax)
        begin_at(ax, bounds[0])
    figure.suptitle(f"what a learned sigma changes: {describe_runs(numbers)}")
    add_legend(figure)
    return figure


def plot_sigma(runs: pd.DataFrame, sigma: pd.DataFrame) -> Figure:
    """Sigma of every layer over training, and the prior's."""
    learned = sigma[sigma.method + "@" + sigma.setting == LEARNED]
    envs, number = dense(learned), runs[runs.method + "@" + runs.setting == LEARNED].seed.nunique()
    figure = start_figure(
        f"sigma of the live weights, median and 1 to 99 %: means of {number} runs", 1.0 + 2.3 * len(envs)
    )
    axes = figure.subplots(len(envs), 2, squeeze=False, sharex=True, sharey=True)
    for (env, network), ax in zip(((e, n) for e in envs for n in ("actor", "critic")), axes.flat):
        log = learned[learned.env == env]
        middle = f"{SIGMAS}50/{network}."
        layers = [x.removeprefix(middle) for x in log.metric.unique() if x.startswith(middle)]
        for layer, color in zip(layers, (BLUE, ORANGE, GREEN)):
            q1, q50, q99 = (
                log[log.metric == f"{SIGMAS}{q}/{network}.{layer}"].set_index("step").value
                for q in (1, 50, 99)
            )
            ax.plot(q50, color=color, label=f"layer {layer}")
            ax.fill_between(q1.index, q1, q99, color=color, alpha=0.12, lw=0)
        ax.axhline(float(SIGMA_PRIOR), color="black", ls=":", lw=1.2, label="prior")
        ax.set(yscale="log", title=f"{env}: {network}")
    for ax in axes.flat:
        label_steps(ax)
    figure.supylabel("sigma")
    add_legend(figure)
    return figure


def plot_use(runs: pd.DataFrame, others: pd.DataFrame) -> Figure:
    """Return under noise, and with residuals set to 0."""
    envs = dense(runs)
    number = others.groupby("run").seed.nunique().max()
    figure = start_figure(f"final models played in other ways: means of {number} runs", 1.4 + 2.4 * len(envs))
    axes = figure.subplots(len(envs), 2, squeeze=False)
    for (noise, pruned), env in zip(axes, envs):
        for run in USED:
            label, color, _ = STEPS_OF_LADDER[run]
            of_run = others[(others.env == env) & (others.run == run)]
            curves = {what: rows.groupby("level").value.mean() for what, rows in of_run.groupby("what")}
            if curves:
                noise.plot(pd.concat((curves["mean"], curves["noise"])), marker=".", color=color, label=label)
            for what, style in (("pruned by |mu|", "-"), ("pruned by |mu| / sigma", "--")):
                if what in curves and run in (POINT, LEARNED, WARM):
                    curve = curves[what].iloc[:-1]  # of the last nothing is kept
                    kept = 100 * (1 - curve.index)
                    pruned.plot(kept, curve, style, marker=".", color=color)
        pruned.plot([], [], "k-", label=r"pruned by $|\mu|$")
        pruned.plot([], [], "k--", label=r"pruned by $|\mu|$ / $\sigma$")
        noise.set(title=f"{env}: noise", xlabel="noise in the weights over their size")
        pruned.set(title=f"{env}: pruned", xlabel="% of the actor's residuals that are kept")
        pruned.set_xscale("log")
        pruned.invert_xaxis()
        pruned.xaxis.set_major_formatter("{x:g}")
        for ax in (noise, pruned):
            ax.set_ylabel("return, mean over tasks")
            begin_at(ax, bounds_of(env)[0])
    add_legend(figure)
    return figure
