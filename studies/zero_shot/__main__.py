"""Which methods play goals that were never trained? results/studies/zero_shot/.

Twenty CartPoles with goals at equal distances. Some are held out of training; then the trained tasks' weights
are regressed on the goal (a cubic, `enjoy.interpolate`), and play the held-out goals.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.collect import Run, evaluations
from bench.figures import STYLE, add_legend, color_of, save, start_figure
from bench.launch import Job
from bench.methods import fail, title_of
from bench.statistics import compare, mean_interval
from bench.suites import Suite
from bench.tables import markdown
from enjoy import interpolate, load_agent, load_script, read_model
from envs import make
from envs.evaluation import play_episodes, spread_seeds
from studies import folder_of, job, run_study

ENV, TASKS, STEPS_OF_TASK, EPISODES = "cartpole-goals20", range(20), 25_000, 20
SEEDS = range(1001, 1006)
METHODS = (
    "independent",
    "hard-sharing",
    "pcgrad",
    "cagrad",
    "contextual",
    "l2soft",
    "varshare",
    "varshare-lora",
)
# every fourth goal, 0.16 m from its neighbours; or six in a row, so that the trained ones are 1.1 m apart
HELD_OUT = {"spread": range(2, 20, 4), "gap": range(10, 16)}
REGRESSED, NEAREST = "zero_shot/regressed", "zero_shot/nearest"


def jobs() -> Iterator[Job]:
    """Every method without the held-out tasks, with the settings of the suite of twenty tasks."""
    suite = Suite("many-tasks20", ENV, methods=METHODS, base="cartpole-goals10")
    for method, _ in suite.missing:
        fail(f"the settings of {method} are those of many-tasks20: bash benchmark.sh search many-tasks20")
    for seed in SEEDS:
        for protocol, held_out in HELD_OUT.items():
            trained = [task for task in TASKS if task not in held_out]
            for method in METHODS:
                settings = suite.found_at_base(method) | suite.chosen[method]
                settings |= {"envs-per-task": "4", "tasks": " ".join(map(str, trained))}
                steps = STEPS_OF_TASK * len(trained)
                yield job("zero_shot", ENV, steps, f"{method}@{protocol}", seed, settings)


def play_held_out(run: Run) -> pd.DataFrame:
    """The run's evaluation of its trained tasks, and returns of every held-out goal.

    Of regressed weights, and of those of the trained task whose goal is nearest.
    """
    everything = make(ENV, 1)
    trained = [everything.task_names.index(name) for name in run.tasks]
    held_out = [task for task in TASKS if task not in trained]
    goals = [params["goal"] for params in everything.task_params]
    model = read_model(run.folder)
    agent = load_agent(model, load_script(model["script"]), make(ENV, 1, trained))
    known, wanted = ([goals[task] for task in tasks] for tasks in (trained, held_out))
    distance = (torch.tensor(wanted)[:, None] - torch.tensor(known)).abs()
    weights = {
        REGRESSED: interpolate(agent.weights(), known, wanted),
        NEAREST: agent.weights()[distance.argmin(1)],
    }
    envs, rows = make(ENV, EPISODES, held_out), []
    for metric, of_tasks in weights.items():
        W = agent.unpack(of_tasks)
        seeds = spread_seeds(run.config["args"]["seed"], 2, envs.num_envs)
        returns = play_episodes(lambda obs, W=W: agent.policy(W, obs), envs, seeds).returns.mean(1)
        rows += [(metric, name, x) for name, x in zip(envs.task_names, returns)]
        rows.append((metric, "mean", returns.mean()))
    last = evaluations(run)
    new = pd.DataFrame(rows, columns=["metric", "task", "value"]).assign(step=last.step.max())
    return pd.concat([last, new], ignore_index=True)


def by_method(runs: pd.DataFrame, protocol: str, metric: str) -> dict[str, pd.Series]:
    """Method -> means over held-out tasks, by seed."""
    rows = runs[(runs.setting == protocol) & (runs.metric == metric) & (runs.task == "mean")]
    rows = rows[rows.step == rows.groupby(["method", "seed"]).step.transform("max")]
    return {
        method: x.set_index("seed").value.sort_index() for method, x in rows.groupby("method", sort=False)
    }


def claim_12(runs: pd.DataFrame) -> tuple[str, str]:
    """Weights regressed on the goal play goals that were never trained; heads do not.

    Test: on the spread goals VarShare's are better than the nearest trained task's, and than Hard sharing's
    heads, treated alike.
    """
    ours, near, heads = (
        by_method(runs, "spread", metric).get(method)
        for method, metric in (("varshare", REGRESSED), ("varshare", NEAREST), ("hard-sharing", REGRESSED))
    )
    if ours is None or near is None or heads is None:
        return "not decided", "runs are missing"
    found = compare([(ours, near), (ours, heads)])
    won = [c.verdict == "better" for c in found]
    answer = (
        "supported" if all(won) else "not supported" if not any(won) else "supported in 1 of 2 comparisons"
    )
    lines = [
        f"- VarShare, regressed, minus {what}: {c.interval.text()}, p {c.p:.2g} (Holm), {c.verdict}"
        for what, c in zip(("its nearest trained task", "Hard sharing, regressed"), found)
    ]
    return answer, "\n".join(lines) + "\n"


def plot(runs: pd.DataFrame) -> Figure:
    """Return of every held-out goal under both protocols, means over runs."""
    figure = start_figure(f"goals never trained, means of {runs.seed.nunique()} runs", 3.8)
    axes = figure.subplots(1, len(HELD_OUT), sharey=True)
    for ax, (protocol, held_out) in zip(axes, HELD_OUT.items()):
        rows = runs[(runs.setting == protocol) & (runs.metric == REGRESSED) & (runs.task != "mean")]
        for method, x in rows.groupby("method", sort=False):
            means = x.groupby("task").value.mean()
            goals = means.index.str.removeprefix("goal").astype(float)
            line = means.set_axis(goals).sort_index()
            ax.plot(line.index, line, "o-", ms=4, lw=1.3, color=color_of(method), label=title_of(method))
        ax.set(title=f"{protocol}: {len(held_out)} of 20 goals held out", xlabel="goal in m", ylim=(0, 500))
    axes[0].set_ylabel("return, weights regressed on the goal")
    add_legend(figure)
    return figure


def report(runs: pd.DataFrame) -> str:
    """Both protocols: held-out goals by regressed weights and by the nearest task, and the trained tasks."""
    text = []
    for protocol, held_out in HELD_OUT.items():
        regressed, nearest, trained = (
            by_method(runs, protocol, metric) for metric in (REGRESSED, NEAREST, "eval/episodic_return")
        )
        names = sorted(regressed, key=lambda m: -regressed[m].mean())
        near = compare([(regressed[m], nearest[m]) for m in names])
        own = compare([(regressed[m], trained[m]) for m in names])
        rows = [
            [title_of(m), *(mean_interval(x[m]).text(0) for x in (regressed, nearest, trained))]
            + [*of_near.cells(0), *of_own.cells(0)]
            for m, of_near, of_own in zip(names, near, own)
        ]
        columns = ["method", "held out, regressed", "held out, nearest trained task", "trained tasks"]
        for what in ("nearest", "trained tasks, other goals"):
            columns += [f"regressed minus {what}", "p (Holm)", "verdict"]
        text.append(f"## {protocol}: {len(held_out)} of 20 goals held out\n\n{markdown(columns, rows)}")
    with rc_context(STYLE):
        save(plot(runs), folder_of("zero_shot") / "zero_shot.png")
    answer, lines = claim_12(runs)
    return "\n".join([*text, f"C12: {answer}\n\n{lines}"])


if __name__ == "__main__":
    run_study("zero_shot", jobs, report, play_held_out)
