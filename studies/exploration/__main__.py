"""Which noise, and which step size, take PPO further on Meta-World? results/studies/exploration/."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.collect import SUCCESS, TRAINING_SUCCESS, compared
from bench.figures import (
    CYCLE,
    STYLE,
    add_legend,
    begin_at,
    describe_runs,
    draw_curve,
    label_steps,
    make_panels,
    save,
    start_figure,
)
from bench.launch import Job
from bench.methods import parse_flags, title_of
from bench.statistics import compare
from bench.suites import SEEDS
from bench.tables import markdown
from studies import by_seed, folder_of, job, of_settings, run_study, texts

STEPS = 2_500_000
METHODS = ("hard-sharing", "varshare-recentred")
WHITE, PINK = "white-0.0006", "pink-0.0006"  # which have three seeds
SETTINGS = {  # what differs from the settings for mt10
    WHITE: "--learning-rate 0.0006",
    "pink-0.0003": "--learning-rate 0.0003 --noise-color 1",
    PINK: "--learning-rate 0.0006 --noise-color 1",
    "pink-0.0012": "--learning-rate 0.0012 --noise-color 1",
    "pink-0.0006-entropy": "--learning-rate 0.0006 --noise-color 1 --ent-coef 0.003",
}
ENTROPY, KL = "losses/entropy", "losses/approx_kl"


def jobs() -> Iterator[Job]:
    """Step sizes that fall to 0, with white noise and with pink; a method that shares most and VarShare."""
    base = {"anneal-lr": "", "eval-interval": str(STEPS // 10), "eval-episodes": "20"}
    for seed in SEEDS:
        for setting, flags in SETTINGS.items():
            for method in METHODS if seed == SEEDS[0] or setting in (WHITE, PINK) else ():
                yield job(
                    "exploration", "mt10", STEPS, f"{method}@{setting}", seed, base | parse_flags(flags)
                )


def plot(method: str, settings: dict[str, pd.DataFrame], tasks: list[str]) -> Figure:
    """Success of every task in training, a curve for each setting."""
    runs = [x.seed.nunique() for x in settings.values()]
    figure = start_figure(f"mt10, {title_of(method)}, {describe_runs(runs)}", 4.2)
    axes = make_panels(figure, len(tasks), 5, sharex=True, sharey=True)
    for ax, task in zip(axes, tasks):
        for (setting, x), color in zip(settings.items(), CYCLE):
            rows = x[(x.metric == TRAINING_SUCCESS) & (x.task == task)]
            values = 100 * rows.pivot(index="seed", columns="step", values="value")
            draw_curve(ax, values.columns, values, setting, color, bounds=(0, 100))
        ax.set_title(task)
        label_steps(ax, "steps")
    begin_at(axes[0], 0)
    figure.supylabel("success in training, %")
    add_legend(figure)
    return figure


def report(runs: pd.DataFrame) -> str:
    """Of every setting success at the end, in training and by task, entropy and KL; and pink minus white."""
    tasks = [task for task in runs.task.unique() if task != "mean"]
    rows, pairs = [], {}
    for method, group in runs.groupby("method"):
        settings = {setting: x for (_, setting), x in of_settings(group).items()}
        with rc_context(STYLE):
            save(plot(method, settings, tasks), folder_of("exploration") / f"{method}.png")
        final = {setting: 100 * by_seed(x, SUCCESS) for setting, x in settings.items()}
        for setting in sorted(final, key=lambda s: -final[s].mean()):
            x = settings[setting]
            ends = x[(x.metric == SUCCESS) & (x.step == x.step.max())].groupby("task").value.mean()
            cells = [title_of(method), setting, str(len(final[setting])), *texts(final[setting])]
            cells.append(f"{100 * by_seed(x, TRAINING_SUCCESS).mean():.0f}")
            cells += [f"{by_seed(x, metric).mean():.2g}" for metric in (ENTROPY, KL)]
            rows.append([*cells, *(f"{100 * ends[task]:.0f}" for task in tasks)])
        if {WHITE, PINK} <= set(final):
            pairs[method] = final[PINK].align(final[WHITE], join="inner")
    columns = [
        "method",
        "setting",
        "runs",
        "success, %",
        "in training, %",
        "entropy",
        "approximate KL",
        *tasks,
    ]
    text = f"## mt10, {int(runs.steps.iloc[0]):,} steps\n\n{markdown(columns, rows)}"
    if pairs:
        minus = zip(pairs, compare(list(pairs.values())))
        cells = [[title_of(method), *c.cells()] for method, c in minus]
        text += f"\n{markdown(['method', f'{PINK} minus {WHITE}', 'p (Holm)', 'verdict'], cells)}"
    return text


if __name__ == "__main__":
    run_study("exploration", jobs, report, lambda run: compared(run, by_success=True))
