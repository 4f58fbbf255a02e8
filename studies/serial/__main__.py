"""One environment of each task or eight, different tasks or identical ones: results/studies/serial/."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.collect import Run, evaluations, read_agent
from bench.figures import (
    STYLE,
    add_legend,
    begin_at,
    bounds_of,
    describe_runs,
    draw_method,
    label_steps,
    save,
    start_figure,
)
from bench.launch import Job
from bench.methods import METHODS, title_of
from bench.statistics import against, difference, mean_interval
from bench.suites import Suite
from bench.tables import markdown
from studies import by_env, by_seed, folder_of, job, of_settings, on_the_way, run_study, texts, worst

SPREAD = "embedding/spread"
NUMBERS = ("1", "8")  # environments of each task
COMPARED = ("task-blind", "hard-sharing", "contextual", "l2soft", "varshare")


def jobs() -> Iterator[Job]:
    """The settings of one search, with one environment of each task and with eight."""
    chosen = Suite("cartpole-goals10").chosen
    for seed in range(1, 11):
        for env in ("cartpole-goals10", "cartpole-identical10"):
            for method in COMPARED:
                for number in NUMBERS:
                    settings = chosen[method] | {"envs-per-task": number, "eval-interval": "50000"}
                    settings |= {"norm-value": ""}  # on both
                    yield job("serial", env, 500_000, f"{method}@{number}", seed, settings)


def rows_of(run: Run) -> pd.DataFrame:
    """Evaluations, and how far the tasks' embeddings are from their mean, over what it was at first."""
    rows = evaluations(run)
    if "embedding_std" not in run.config["args"]:
        return rows
    spread = read_agent(run)["embedding"].std(0).square().mean().sqrt().item()
    last = {"metric": SPREAD, "task": "mean", "step": rows.step.max()}
    last["value"] = spread / run.config["args"]["embedding_std"]
    return pd.concat([rows, pd.DataFrame([last])])


def in_order(group: pd.DataFrame) -> list[str]:
    """Its methods in the order of methods.csv."""
    return sorted(group.method.unique(), key=list(METHODS).index)


def report(runs: pd.DataFrame) -> str:
    """The return with one environment of each task and with eight; VarShare against others; embeddings."""
    tables, spreads = [], []
    for env, group in by_env(runs).items():
        found, rows, compared = of_settings(group), [], []
        for method in in_order(group):
            one, eight = (found[method, number] for number in NUMBERS)
            cells = texts(by_seed(one), by_seed(eight), worst(one), worst(eight))
            gain = difference(by_seed(eight), by_seed(one)).interval.text()
            rows.append([title_of(method), *cells, gain])
        for number in NUMBERS:
            minus = against({m: by_seed(found[m, number]) for m in in_order(group)}, "varshare")
            compared += [[title_of(m), number, *x.cells()] for m, x in minus.items()]
            for (_, n), x in found.items():
                if n == number and (x.metric == SPREAD).any():
                    spreads.append([env, number, mean_interval(by_seed(x, SPREAD)).text(2)])
        columns = ["method", "1 environment", "8", "worst task, 1", "worst task, 8", "8 minus 1"]
        title = f"## {env}, {group.steps.iloc[0]:,} steps, {group.seed.nunique()} seeds"
        tables.append(f"{title}\n\n{markdown(columns, rows)}")
        columns = ["method", "environments of each task", "minus VarShare", "p (Holm)", "against VarShare"]
        tables.append(markdown(columns, compared))
    title = "## Contextual: spread of the embeddings at the end, 1 is that of the draws they start as"
    columns = ["environment", "environments of each task", "spread"]
    with rc_context(STYLE):
        save(plot(runs), folder_of("serial") / "serial.png")
    return "\n".join([*tables, f"{title}\n\n{markdown(columns, spreads)}"])


def plot(runs: pd.DataFrame) -> Figure:
    """Four panels: one environment of each task and eight, different and identical tasks."""
    groups = by_env(runs)
    figure = start_figure("", 1.0 + 2.6 * len(groups))
    panels = figure.subplots(len(groups), 2, sharex=True, sharey="row", squeeze=False)
    numbers = []
    for row, (env, group) in zip(panels, groups.items()):
        bounds = bounds_of(env)
        for ax, number in zip(row, NUMBERS):
            for method in in_order(group):
                curve = on_the_way(of_settings(group)[method, number])
                numbers.append(len(curve))
                draw_method(ax, method, curve, bounds=bounds)
            ax.set_title(f"{env}, {number} environment{'s' * (number != '1')} of each task")
        begin_at(row[0], bounds[0])
    for ax in panels.flat:
        label_steps(ax)
    figure.suptitle(f"one environment of each task or eight: {describe_runs(numbers)}")
    figure.supylabel("return of the evaluation, mean over tasks")
    add_legend(figure, columns=5)
    return figure


if __name__ == "__main__":
    run_study("serial", jobs, report, rows_of)
