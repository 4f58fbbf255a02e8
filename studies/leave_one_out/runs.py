"""The runs of leave-one-out: a held-out task learned from a model of the other tasks, or from scratch.

For each held-out task and seed every method trains one model on the other tasks, which the regimes that start
from it share. The step size of each regime is searched on tasks that are not reported, by the mean of the
evaluations, which says how fast a task is learned: results/studies/leave_one_out/settings.csv.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

import enjoy
from bench import launch
from bench.collect import EVALUATION, Run, collect, evaluations, parameters, read_agent, read_run
from bench.launch import Job, job
from bench.methods import METHODS, ROOT, Settings, fail
from bench.suites import SEEDS, Suite
from envs import make
from envs.evaluation import evaluate
from envs.models import load_agent
from studies import folder_of

FOLDER = folder_of("leave_one_out")
SETTINGS = FOLDER / "settings.csv"  # suite, regime, rate, mean, final, chosen: what the search found
RATES = ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3")  # step sizes that are tried of every regime
STEPS_OF_TASK = 100_000  # of each of the others before, and of the held-out task
INTERVAL = 4096  # steps between evaluations
TASKS = 10  # of every suite below
LATER = 1000  # added to a model's seed for the runs that load it: their draws are others
WITH_MEAN = "eval/with_mean_residual"  # before a run, with the other tasks' mean residual added to theta
TRAINED, RATE = "parameters/trained", "learning_rate"


class Regime(NamedTuple):
    """How the held-out task is learned."""

    title: str
    method: str  # of methods.csv
    start: str = "other tasks"  # or "scratch"
    trains: str = "all"  # or "own": what tasks do not share


REGIMES = {
    "scratch": Regime("Scratch", "independent", start="scratch"),
    "fine-tuning": Regime("Full fine-tuning", "varshare-recentred"),
    "residual": Regime("Residual adaptation", "varshare-recentred", trains="own"),
    "lora": Regime("LoRA: A, B and biases", "varshare-lora", trains="own"),
    "l2soft": Regime("L2Soft: residual", "l2soft-recentred", trains="own"),
    "hard-sharing": Regime("Hard sharing: new head", "hard-sharing", trains="own"),
    "contextual": Regime("Contextual: new embedding", "contextual", trains="own"),
    "task-blind": Regime("Task-blind, fine-tuned", "task-blind"),
}
SCRATCH, OURS, LORA = "scratch", "residual", "lora"


@dataclass(frozen=True)
class LeaveOneOut:
    """An environment: whose settings and step sizes it takes; tasks held out, to report and to search."""

    name: str
    settings: str
    reported: tuple[int, ...]
    searched: tuple[int, ...]

    @cached_property
    def chosen(self) -> dict[str, Settings]:
        """The settings of every method, from the search with all tasks.

        Raises:
            SystemExit: it has not come to a method.
        """
        chosen = Suite(self.name, settings=self.settings).chosen
        if lost := [how.method for how in REGIMES.values() if how.method not in chosen]:
            fail(f"the search has no settings of {lost[0]} on {self.settings} yet")
        return chosen

    def model(self, method: str, task: int, seed: int) -> Job:
        """A method's training on the other tasks."""
        others = " ".join(str(i) for i in range(TASKS) if i != task)
        steps = (TASKS - 1) * STEPS_OF_TASK
        name = f"leave_one_out__{self.name}__without{task}__{method}"
        return job(name, method, self.name, steps, seed, self.chosen[method] | {"tasks": others})

    def adaptation(self, regime: str, rate: str, task: int, seed: int) -> Job:
        """A regime's learning of the held-out task."""
        how = REGIMES[regime]
        settings = self.chosen[how.method] | {"learning-rate": rate, "tasks": str(task)}
        settings |= {"eval-interval": str(INTERVAL)}
        if "reptile-alpha" in settings | METHODS[how.method].flags:
            settings["reptile-alpha"] = "0"  # there is one task only
        if how.start != "scratch":
            settings["load"] = f"runs/{self.model(how.method, task, seed).name}"
        if how.trains == "own":
            settings["freeze-theta"] = ""
        name, exp_name = (
            f"leave_one_out__{self.name}__task{task}__{regime}@{rate}",
            f"{how.method}@{regime}-{task}",
        )
        return job(name, exp_name, self.name, STEPS_OF_TASK, LATER + seed, settings)

    def models(self, tasks: tuple[int, ...], seeds: tuple[int, ...]) -> list[Job]:
        """All models of the other tasks, one for all regimes of a method."""
        methods = dict.fromkeys(how.method for how in REGIMES.values() if how.start != "scratch")
        return [self.model(method, task, seed) for seed in seeds for task in tasks for method in methods]

    def trials(self) -> dict[Job, tuple[str, str]]:
        """Runs of the search -> regime and step size."""
        cases = ((r, rate, t, s) for s in SEEDS for t in self.searched for r in REGIMES for rate in RATES)
        return {self.adaptation(*case): case[:2] for case in cases}

    def rates(self) -> dict[str, str]:
        """The step sizes that the search of `settings` chose; {} where there is none for a regime."""
        rates = {}
        for path in (ROOT / SETTINGS, SETTINGS):  # the project's, and over it that of $OUT
            if path.exists():
                rows = pd.read_csv(path, dtype={"rate": str}).query("suite == @self.settings and chosen")
                rates |= dict(zip(rows.regime, rows.rate))
        return {r: rates[r] for r in REGIMES} if REGIMES.keys() <= rates.keys() else {}

    def adaptations(self, seeds: tuple[int, ...]) -> dict[Job, tuple[str, int, int]]:
        """Reported runs -> regime, task and seed, once the search has chosen."""
        rates = self.rates()
        cases = [(r, task, seed) for seed in seeds for task in self.reported for r in rates]
        return {self.adaptation(r, rates[r], task, seed): (r, task, seed) for r, task, seed in cases}


PHYSICS = dict(settings="cartpole-goals-physics10", reported=(0, 2, 4, 5, 7), searched=(3, 8))
SUITES = {
    "cartpole-goals10": dict(settings="cartpole-goals10", reported=(0, 2, 4, 6, 9), searched=(3, 8)),
    "cartpole-goals-physics10": PHYSICS,
    "cartpole10": PHYSICS,
}
SUITES = {name: LeaveOneOut(name, **rest) for name, rest in SUITES.items()}


def all_jobs(suite: LeaveOneOut, seeds: tuple[int, ...]) -> list[Job]:
    """The runs in their order: of the search unless it has chosen, then of the report as far as it has."""
    tried = SUITES[suite.settings]
    search = [] if suite.rates() else [*tried.models(tried.searched, SEEDS), *tried.trials()]
    return [*search, *suite.models(suite.reported, seeds), *suite.adaptations(seeds)]


def run(suite: LeaveOneOut, seeds: tuple[int, ...]) -> bool:
    """Search the step sizes unless they are known, then train and adapt; whether all runs have finished."""
    if not suite.rates():
        tried = SUITES[suite.settings]
        if not launch.launch(tried.models(tried.searched, SEEDS)):
            return False
        launch.launch(tried.trials())  # one may fail, as with a step size that diverges
        choose(tried)
    trained = launch.launch(suite.models(suite.reported, seeds))
    return launch.launch(suite.adaptations(seeds)) and trained


def curve_of(job: Job) -> pd.Series:
    """Of a finished run: return of its task by step."""
    return read_run(Path("runs", job.name)).values(EVALUATION)["mean"]


def choose(suite: LeaveOneOut) -> None:
    """Write to settings.csv what each step size reached, and which has the highest mean of evaluations.

    A step size of which a run failed has no mean, and is not chosen.
    """
    rows = []
    for x, key in suite.trials().items():
        curve = curve_of(x) if x.finished else pd.Series([math.nan])
        rows.append((suite.name, *key, curve.mean(), curve.iloc[-1]))
    table = pd.DataFrame(rows, columns=["suite", "regime", "rate", "mean", "final"])
    groups = table.groupby(["suite", "regime", "rate"], sort=False)
    table = groups.agg(lambda x: x.mean(skipna=False)).reset_index()
    table["chosen"] = table.index.isin(table.groupby("regime")["mean"].idxmax())
    if SETTINGS.exists():
        others = pd.read_csv(SETTINGS, dtype={"rate": str})
        table = pd.concat([others[others.suite != suite.name], table])
    FOLDER.mkdir(parents=True, exist_ok=True)
    table.to_csv(SETTINGS, index=False, float_format="%.5g")


def before(folder: Path) -> tuple[float, float]:
    """Return of the held-out task before a run, with what it starts from, and with the mean residual added.

    The second is of theta + mean_m(mu_m), m the tasks that the loaded model knows; NaN of other methods.
    """
    model = enjoy.read_model(folder)
    script = enjoy.load_script(model["script"])
    args = enjoy.read_args(model, script)
    envs = make(args.env_id, args.eval_interval_episodes, args.tasks)
    agent = script.Agent(envs, args, torch.Generator().manual_seed(args.seed)).requires_grad_(False)
    if not args.load:
        return evaluate(agent, envs, args.seed).returns.mean(), float("nan")
    load_agent(agent, args, envs.task_names)
    alone = evaluate(agent, envs, args.seed).returns.mean()
    mu = enjoy.read_model(Path(args.load))["agent"].get("mu")
    if mu is None or mu.shape[1:] != agent.theta.shape:  # no residuals, or of low rank
        return alone, float("nan")
    agent.theta += mu.mean(0)
    return alone, evaluate(agent, envs, args.seed).returns.mean()


def rows_of(run: Run) -> pd.DataFrame:
    """A run's evaluations, with those before its first step, and what it trains."""
    own, every = parameters(read_agent(run))
    alone, with_mean = before(run.folder)
    args = run.config["args"]
    first = {EVALUATION: alone, WITH_MEAN: with_mean, RATE: args["learning_rate"]}
    first[TRAINED] = own if args.get("freeze_theta") else every
    rows = [{"metric": m, "step": 0, "value": float(x)} for m, x in first.items() if not math.isnan(x)]
    later = evaluations(run)
    return pd.concat([pd.DataFrame(rows).assign(task="mean"), later[later.task == "mean"]])


def collect_runs(suite: LeaveOneOut, seeds: tuple[int, ...]) -> None:
    """Write the CSVs of a suite, if any of its runs have finished here."""
    jobs = list(suite.adaptations(seeds))
    if any(job.finished for job in jobs):
        collect(jobs, FOLDER / suite.name, rows_of)
