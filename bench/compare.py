"""Methods compared over seeds: `python -m bench compare SCRIPT ...`, and `report.py` of runs that exist.

A group is the runs of one script with the same settings, whatever their seeds; labels say what differs.
For the table each run is a number, the mean over tasks of its final evaluation.
"""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench import launch
from bench.collect import EVALUATION, SECONDS, Run, read_run
from bench.figures import (
    CYCLE,
    STYLE,
    add_legend,
    begin_at,
    bounds_of,
    describe_runs,
    draw_curve,
    label_steps,
    save,
    start_figure,
)
from bench.methods import ROOT, fail, parse_flags, write_flags
from bench.statistics import compare, mean_interval
from bench.tables import markdown
from envs import make

TRAINING = "charts/episodic_return"
# settings that make no other method
BOOKKEEPING = "seed run_name resume checkpoint_interval num_threads env_workers cuda compile track".split()
BOOKKEEPING += "wandb_project_name wandb_entity capture_video eval_episodes eval_interval".split()
BOOKKEEPING += ["eval_interval_episodes"]
TRIAL = 20  # the part of a run that is tried first, a twentieth, to say what all of them cost
LEAST = 2_500  # steps of each task in it at least: more than a rollout


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by script and settings, in their order; a label says what differs."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        settings = {k: str(x) for k, x in run.config["args"].items() if k not in BOOKKEEPING}
        groups.setdefault((run.config["script"], *sorted(settings.items())), []).append(run)
    labelled = {}
    for script, *settings in groups:
        siblings = [dict(others) for other, *others in groups if other == script]
        own = [f"{k} {x or 'none'}" for k, x in settings if any(other.get(k) != x for other in siblings)]
        stems = {Path(other).stem for other, *_ in groups if other != script}
        name = script if Path(script).stem in stems else Path(script).stem
        members = groups[(script, *settings)]
        seeds = [run.config["args"]["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            fail(f"{name}: several runs have the same seed and settings; tell them apart by --exp-name")
        labelled[", ".join([name, *own])] = members
    return labelled


def check_alike(runs: list[Run]) -> None:
    """Refuse runs on different tasks."""
    first, *others = runs

    def about(run: Run) -> str:
        return json.dumps([run.config["args"]["env_id"], run.tasks, run.config["task_params"]])

    for run in others:
        if about(run) != about(first):
            fail(f"{run.folder} cannot be compared with {first.folder}: its tasks are others")


def scores(runs: list[Run], metric: str) -> pd.DataFrame:
    """(seed, task) of the final evaluation, or of training the mean of its last tenth."""
    rows = {}
    for run in runs:
        values = run.values(metric)
        last = values.index.max()
        values = values[values.index >= (last if metric == EVALUATION else 0.9 * last)]
        rows[run.config["args"]["seed"]] = values[run.tasks].mean()
    return pd.DataFrame(rows).T.sort_index()


def make_table(groups: dict[str, list[Run]]) -> str:
    """Mean and worst task of every group, and its difference to the first one, paired by seed."""
    metric = EVALUATION if all(run.finished for runs in groups.values() for run in runs) else TRAINING
    of_group = {label: scores(runs, metric) for label, runs in groups.items()}
    first, *others = of_group
    means = {label: x.mean(axis=1) for label, x in of_group.items()}
    found = dict(zip(others, compare([(means[label], means[first]) for label in others])))
    rows = []
    for label, x in of_group.items():
        cells = found[label].cells() if label in found else [""] * 3
        row = [label, str(len(x)), mean_interval(means[label]).text(), mean_interval(x.min(axis=1)).text()]
        rows.append(row + cells)
    columns = ["method", "runs", "mean", "worst task", f"minus {first}", "p (Holm)", "verdict"]
    what = "the final evaluation" if metric == EVALUATION else "the last tenth of training, with exploration"
    note = f"Returns of {what}. In brackets 95 % intervals over runs (Student's t); same seeds are paired."
    return f"{markdown(columns, rows)}\n{note}\n"


def plot(groups: dict[str, list[Run]]) -> Figure:
    """Return over steps of every group: of evaluations on the way, or if there are none of training."""
    evaluated = min(len(run.values(EVALUATION)) for runs in groups.values() for run in runs) > 1
    metric = EVALUATION if evaluated else TRAINING
    env_id = next(iter(groups.values()))[0].config["args"]["env_id"]
    bounds = bounds_of(env_id)
    figure = start_figure(f"{env_id}: {describe_runs(map(len, groups.values()))}", 4.2)
    ax = figure.subplots()
    for color, (label, runs) in zip(CYCLE * len(groups), groups.items()):
        values = pd.DataFrame([run.values(metric)["mean"] for run in runs]).dropna(axis=1)
        draw_curve(ax, values.columns, values, label, color, bounds=bounds)
    what = "evaluation" if evaluated else "training, with exploration"
    ax.set_ylabel(f"return of {what}, mean over tasks")
    label_steps(ax)
    begin_at(ax, bounds[0])
    add_legend(figure, columns=2)
    return figure


def write_comparison(runs: list[Run], folder: Path) -> str:
    """compared.png and compared.md of these runs; returns the table."""
    check_alike(runs)
    groups = group_runs(runs)
    folder.mkdir(parents=True, exist_ok=True)
    text = make_table(groups)
    (folder / "compared.md").write_text(text, encoding="utf-8")
    with rc_context(STYLE):
        save(plot(groups), folder / "compared.png")
    return text


def find_script(words: str) -> tuple[Path, dict[str, str]]:
    """ "forks/my_idea.py --beta 0.01" -> the script's path and its flags."""
    name, *flags = shlex.split(words) or [""]
    for path in (Path(name), ROOT / name):
        if path.is_file() and path.suffix == ".py":
            return path.resolve(), parse_flags(" ".join(flags))
    fail(f"there is no script {name!r}")


def make_jobs(scripts: list[str], env_id: str, seeds: int, steps: int) -> list[launch.Job]:
    """A run of every script for each seed, seed after seed; other settings have other folders."""
    jobs = []
    for seed in range(1, seeds + 1):
        for words in scripts:
            path, flags = find_script(words)
            given = {
                "env-id": env_id,
                "total-timesteps": str(steps),
                "eval-interval": str(max(1, steps // 10)),
            }
            given |= flags
            digest = hashlib.sha256(f"{path} {write_flags(given)}".encode()).hexdigest()[:8]
            name = f"compare__{env_id}__{path.stem}__{digest}__{seed}"
            script = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
            flags = write_flags(given | {"seed": str(seed)})
            jobs.append(launch.Job(re.sub(r"[^A-Za-z0-9._-]+", "-", name), script, flags))
    return jobs


def say_cost(scripts: list[str], env_id: str, seeds: int, steps: int) -> None:
    """Try a short run of each script, which shows wrong flags too, and print what all runs will take."""
    try:
        envs = make(env_id, 1)
    except ValueError as error:
        fail(str(error))
    envs.close()
    tried = min(steps, max(LEAST * envs.num_tasks, steps // TRIAL))
    trials = make_jobs(scripts, env_id, 1, tried)
    launch.launch(trials)
    seconds = 0.0
    for trial in trials:
        if not trial.finished:
            fail(f"{trial.script} does not run with these flags: nothing else is started")
        run = read_run(Path("runs", trial.name))
        seconds += seeds * steps / tried * run.values(SECONDS)["mean"].iloc[-1]
    at_a_time = launch.jobs_at_a_time()
    runs = f"{seeds * len(scripts)} runs of {steps:,} steps, {at_a_time} at a time"
    print(f"{runs}: about {max(1, round(seconds / at_a_time / 60))} min, evaluations left out", flush=True)


def run_comparison(scripts: list[str], env_id: str, seeds: int, steps: int, name: str) -> bool:
    """Run what has not finished, and compare; whether all has."""
    if not scripts:
        fail("name one or more scripts, e.g. varshare_ppo.py 'forks/my_idea.py --beta 0.01'")
    if seeds < 1 or steps < 1:
        fail("--seeds and --steps must be 1 or more")
    jobs = make_jobs(scripts, env_id, seeds, steps)
    if not all(job.finished for job in jobs):
        say_cost(scripts, env_id, seeds, steps)
    done = launch.launch(jobs)
    runs = [read_run(Path("runs", job.name)) for job in jobs if job.finished]
    if not runs:
        fail("no run has finished")
    folder = Path("results/compare", name or re.sub(r"[^A-Za-z0-9._-]+", "-", env_id))
    print(write_comparison(runs, folder))
    print(f"{folder / 'compared.png'}")
    return done
