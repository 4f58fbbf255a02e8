"""Can a suite tell methods apart? Controls on every environment: runs, results/studies/power/."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.collect import SUCCESS
from bench.figures import (
    STYLE,
    add_legend,
    begin_at,
    bounds_of,
    describe_runs,
    draw_ceiling,
    draw_method,
    label_steps,
    make_panels,
    save,
    start_figure,
)
from bench.launch import Job
from bench.methods import METHODS
from bench.statistics import BLIND, MARGIN, against, can_tell
from bench.tables import ceiling, markdown
from studies import GOALS, by_env, by_seed, folder_of, job, on_the_way, run_study, texts, worst


def jobs() -> Iterator[Job]:
    """CartPoles at three step sizes, of which each method's best counts; landers at one, rivals at three."""
    for seed in range(1, 6):
        for env in ("cartpole10", "cartpole-identical10", *GOALS):
            for rate in ("0.003", "0.006", "0.012"):
                for method in ("task-blind", "independent", "hard-sharing", "varshare"):
                    settings = {"learning-rate": rate, "eval-interval": "50000"}
                    yield job("power", env, 500_000, f"{method}@{rate}", seed, settings)
    for seed in range(1, 4):
        for method in ("independent", "l2soft", "contextual"):
            for rate in ("0.001", "0.003", "0.01"):
                settings = {"learning-rate": rate, "eval-interval": "200000"}
                yield job("power", "lunarlander20-goals", 2_000_000, f"{method}@{rate}", seed, settings)
        for env in ("lunarlander20-goals", "lunarlander20"):
            for method in ("task-blind", "hard-sharing", "varshare"):
                settings = {"learning-rate": "0.003", "eval-interval": "200000"}
                yield job("power", env, 2_000_000, f"{method}@0.003", seed, settings)


def best_settings(group: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of the runs on one environment: method -> rows of the setting with the highest mean."""
    best = {}
    for method, rows in group.groupby("method", sort=False):
        settings = dict(iter(rows.groupby("setting")))
        best[method] = max(settings.values(), key=lambda x: by_seed(x).mean())
    return best


def plot(runs: pd.DataFrame) -> Figure:
    """Evaluations on the way on every environment, of each method at its best step size."""
    groups = by_env(runs)
    figure = start_figure("each method at its best step size", 1.2 + 2.3 * math.ceil(len(groups) / 3))
    for ax, (env, group) in zip(make_panels(figure, len(groups), 3), groups.items()):
        best, bounds = best_settings(group), bounds_of(env)
        curves = {method: on_the_way(best[method]) for method in sorted(best, key=list(METHODS).index)}
        for method, curve in curves.items():
            draw_method(ax, method, curve, bounds=bounds)
        draw_ceiling(ax, ceiling(env))
        able, _ = can_tell({m: by_seed(x) for m, x in best.items()}, ceiling(env))
        says = f"{env}: {'can tell' if able else 'cannot tell'}"
        ax.set_title(f"{says}\n{describe_runs(map(len, curves.values()))}", fontsize=8)
        label_steps(ax)
        begin_at(ax, bounds[0])
    figure.supylabel("return of the evaluation, mean over tasks")
    add_legend(figure, columns=5)
    return figure


def table(group: pd.DataFrame) -> str:
    """Of the runs on one environment: every method at its step sizes, and against the control."""
    settings, success = sorted(group.setting.unique(), key=float), SUCCESS in set(group.metric)
    rows_of = best_settings(group)
    best = {m: by_seed(x) for m, x in rows_of.items()}
    compared, rows = against(best, BLIND), []
    for method in sorted(best, key=lambda m: (m != BLIND, -best[m].mean())):
        means = {s: by_seed(x).mean() for s, x in group[group.method == method].groupby("setting")}
        cells = [method, str(len(best[method]))]
        cells += [f"{means[s]:.1f}" if s in means else "" for s in settings]
        cells += texts(best[method], worst(rows_of[method]))
        cells += [f"{by_seed(rows_of[method], SUCCESS).mean():.0%}"] * success
        rows.append([*cells, *(compared[method].cells() if method in compared else [""] * 3)])
    columns = ["method", "runs", *(f"step size {s}" for s in settings)]
    columns += ["mean at the best", "its worst task", *["success"] * success]
    return markdown([*columns, "minus task-blind", "p (Holm)", "against task-blind"], rows)


def report(runs: pd.DataFrame) -> str:
    """For every environment whether a suite on it can tell, and the control and the others."""
    summary, tables = [], []
    for env, group in by_env(runs).items():
        steps = f"{group.steps.iloc[0]:,}"
        best = {m: by_seed(x) for m, x in best_settings(group).items()}
        able, why = can_tell(best, ceiling(env))
        answer = "can tell" if able else "**cannot tell**"
        summary.append([env, steps, answer, why])
        tables.append(f"## {env}, {steps} steps: {answer}\n\n{why}\n\n{table(group)}")
    with rc_context(STYLE):
        save(plot(runs), folder_of("power") / "power.png")
    note = "The step size of each method is the best of those tried, on the same seeds. In brackets 95 % "
    note += "intervals, Student's t over runs; differences are paired by seed. "
    note += f"The same: within {MARGIN:.0%} of the best mean.\n"
    return "\n".join([markdown(["environment", "steps", "methods apart", "why"], summary), note, *tables])


if __name__ == "__main__":
    run_study("power", jobs, report)
