"""The search for the settings of every method, the same number of environment steps for each.

A trial runs three seeds of one setting, proposed by TPE (Bergstra et al. 2011, in Optuna). After every seed
it is dropped if its mean final return so far, the higher one of two, is below the median of the trials that
ran all three: a run is judged when it is over, never on the way, where a large annealed step size looks
slow. What a dropped trial saves goes to further ones, until the steps of `trials` full ones are spent. Then
the five best settings run on five fresh seeds, as long as the runs that are reported, and the best mean of
those is the method's setting.

Trials are kept in a database, a file by default; several processes, on several machines if it is a server,
work on one search. A trial whose process died is taken up again: it is enqueued anew, and its runs continue
from their checkpoints if those are at hand.

If a run takes long a suite names a few step sizes instead, and each method runs each of them once, evaluated
only at the end, in fewer episodes: on Meta-World evaluations are a good part of a short run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import optuna
import pandas as pd
import sqlalchemy
from optuna.distributions import CategoricalDistribution
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from bench import launch
from bench.collect import EVALUATION, SUCCESS
from bench.methods import METHODS, Settings, fail, parse_flags, write_flags
from bench.suites import FRESH_SEEDS, SEEDS, SETTINGS, STORAGE, Suite

RANDOM_TRIALS = 8  # before TPE proposes, and before one is dropped
TIE = 0.01  # of those whose return is within this share of the best, the fastest learner wins
HEARTBEAT = 30  # seconds; a process silent for four of them is dead, and its trial enqueued again
RESULTS = SETTINGS.parent


class Stopped(Exception):
    """The search was told to stop in the middle of a trial."""


class Crashed(Exception):
    """A run of a trial failed, as with settings that diverge."""


class Search:
    """The search of one method's settings on a suite."""

    def __init__(self, suite: Suite, method: str, storage: RDBStorage):
        self.suite, self.method = suite, method
        self.name = f"{suite.name}__{method}"
        self.seeds = SEEDS[:1] if suite.rates else SEEDS
        self.space = METHODS[method].space
        if suite.rates:
            self.space = {"learning-rate": CategoricalDistribution(suite.rates)}
        self.trial_steps = len(self.seeds) * suite.trial_steps
        self.budget = (len(suite.rates) or suite.trials) * self.trial_steps
        self.lock, self.starting = threading.Lock(), 0
        self.study = optuna.create_study(
            study_name=self.name,
            storage=storage,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=RANDOM_TRIALS),
            direction="maximize",
            load_if_exists=True,
        )
        # another one for who continues a search, and for each process of several that share a server
        who = "" if storage.url == STORAGE else f"{platform.node()} {os.getpid()}"
        seed = zlib.crc32(f"{self.name} {len(self.study.trials)} {who}".encode())
        self.study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS, multivariate=True, seed=seed
        )
        if suite.rates:
            self.study.sampler = optuna.samplers.GridSampler({"learning-rate": suite.rates}, seed)

    def steps_of(self, trial: FrozenTrial) -> int:
        """What a trial counts of the budget: a running one in full, one that another took up nothing."""
        if trial.state == TrialState.RUNNING:
            return self.trial_steps
        ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or trial.user_attrs.get("crashed")
        return trial.user_attrs["steps"] if ended else 0

    def spent(self) -> int:
        """Environment steps of all trials."""
        return sum(map(self.steps_of, self.study.get_trials(deepcopy=False)))

    def has_room(self) -> bool:
        """Whether the budget has the steps of another trial."""
        steps = self.spent() + self.starting * self.trial_steps
        return steps + self.trial_steps <= self.budget

    def begin(self) -> bool:
        """Take the room of a trial, if there is any: `run_trial` is to follow."""
        with self.lock:
            optuna.storages.fail_stale_trials(self.study)
            room = self.has_room()
            self.starting += room
            return room

    def is_over(self) -> bool:
        """Nothing is left to start, and nothing runs that could leave something."""
        return not self.has_room() and not self.study.get_trials(False, (TrialState.RUNNING,))

    def job(self, settings: Settings, steps: int, seed: int) -> launch.Job:
        """A run, in a folder named by its settings: whoever runs them again finds it."""
        digest = hashlib.sha256(write_flags(settings).encode()).hexdigest()[:10]
        name = f"search__{self.name}__{steps}__{digest}"
        settings = self.suite.complete(settings, steps)
        if self.suite.rates:
            settings = settings | {"eval-interval": "0", "eval-episodes": "20"}
        return launch.job(name, self.method, self.suite.env_id, steps, seed, settings)

    def objective(self, trial: optuna.Trial) -> float:
        """Mean final return of the seeds."""
        with self.lock:
            self.starting -= 1  # from here it is a running one
        settings = {}
        for name, x in self.space.items():
            if isinstance(x, CategoricalDistribution):
                settings[name] = trial.suggest_categorical(name, x.choices)
            else:
                settings[name] = f"{trial.suggest_float(name, x.low, x.high, log=x.log):.3g}"
        trial.set_user_attr("settings", write_flags(settings))
        finals, curves = [], []
        for i, seed in enumerate(self.seeds):
            job = self.job(settings, self.suite.trial_steps, seed)
            while (code := launch.run(job)) == launch.BUSY and not launch.stopping.is_set():
                pass  # another process has chosen the same
            if launch.stopping.is_set() or code in launch.STOPPED:
                raise Stopped
            trial.set_user_attr("steps", (i + 1) * self.suite.trial_steps)
            if code:
                trial.set_user_attr("crashed", True)
                raise Crashed
            final, curve = read_scores(job, self.suite)
            finals.append(final)
            curves.append(curve)
            trial.set_user_attr("finals", finals)
            trial.set_user_attr("curves", curves)
            trial.report(sum(finals) / len(finals), i)
            if i + 1 < len(self.seeds) and trial.should_prune():
                raise optuna.TrialPruned
        return sum(finals) / len(finals)

    def run_trial(self) -> None:
        """The next trial; one that is stopped will be the next again."""

        def again(study: optuna.Study, trial: FrozenTrial) -> None:
            if trial.state == TrialState.FAIL and not trial.user_attrs.get("crashed"):
                RetryHeartbeatStaleTrialCallback()(study, trial)

        try:
            self.study.optimize(self.objective, n_trials=1, catch=(Stopped, Crashed), callbacks=[again])
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            if isinstance(error, ValueError) and "Cannot tell" not in str(error):
                raise
            # this process slept so long that others took it for dead: they have enqueued the trial again

    def table(self) -> pd.DataFrame:
        """All trials that ended or crashed, one row each, in their order."""
        rows = []
        for t in self.study.get_trials(deepcopy=False):
            if t.state.is_finished() and (steps := self.steps_of(t)):
                finals, curves = (t.user_attrs.get(name, []) for name in ("finals", "curves"))
                state = {"COMPLETE": "complete", "PRUNED": "dropped", "FAIL": "crashed"}[t.state.name]
                row = {"suite": self.suite.name, "method": self.method, "trial": t.number, "state": state}
                row |= {"steps": steps, "settings": t.user_attrs["settings"]}
                row |= {f"final {seed}": x for seed, x in zip(self.seeds, finals)}
                row |= {"final": pd.Series(finals).mean(), "curve": pd.Series(curves).mean()}
                rows.append(row)
        return pd.DataFrame(rows)

    def candidates(self) -> list[str]:
        """Flags of the best settings, best first."""
        complete = self.table().query("state == 'complete'").drop_duplicates("settings")
        return list(rank(complete).settings[: self.suite.best])

    def jobs(self) -> list[tuple[str, launch.Job]]:
        """The runs of the candidates on fresh seeds, each with the candidate's flags."""
        if self.suite.rates:
            return []
        return [
            (flags, self.job(parse_flags(flags), self.suite.steps, seed))
            for seed in FRESH_SEEDS[: self.suite.best]
            for flags in self.candidates()
        ]

    def fresh(self) -> pd.DataFrame:
        """A row for each candidate whose runs on fresh seeds have all finished, best first.

        Of a few step sizes, which have no such runs, the trials themselves.
        """
        names = {"suite": self.suite.name, "method": self.method}
        if self.suite.rates:
            complete = self.table().query("state == 'complete'")[["settings", "final", "curve"]]
            return rank(complete).assign(**names, steps=self.suite.trial_steps)
        rows = [(flags, *read_scores(job, self.suite)) for flags, job in self.jobs() if job.finished]
        runs = pd.DataFrame(rows, columns=["settings", "final", "curve"])
        complete = runs[runs.groupby("settings").settings.transform("size") == self.suite.best]
        means = complete.groupby("settings", sort=False).mean().reset_index()
        return rank(means).assign(**names, steps=self.suite.steps)

    def summary(self) -> dict[str, object]:
        """A row of settings.csv: what was chosen, and what the search spent."""
        states = self.table().state.value_counts()
        counts = {state: int(states.get(state, 0)) for state in ("complete", "dropped", "crashed")}
        return self.fresh().iloc[0].to_dict() | counts | {"spent": self.spent()}


def read_scores(job: launch.Job, suite: Suite) -> tuple[float, float]:
    """Of a finished run: the final evaluation, and the mean of all evaluations, both means over tasks."""
    log = pd.read_csv(Path("runs", job.name, "heartbeat.csv"))
    metric, unit = (SUCCESS, 100) if suite.score == "success" else (EVALUATION, 1)
    values = unit * log[(log.metric == metric) & (log.task == "mean")].value
    if values.empty:
        fail(f"{job.name} has no {metric}")
    return float(values.iloc[-1]), float(values.mean())


def rank(settings: pd.DataFrame) -> pd.DataFrame:
    """Best first by `final`; those within TIE of the best by `curve`, which says how fast they got there."""
    if settings.empty:
        return settings
    highest = settings.final.max()
    tied = settings.final >= highest - TIE * abs(highest)
    key = settings.curve.where(tied, settings.final - 1e9)
    return settings.loc[key.sort_values(ascending=False, kind="stable").index]


def open_storage(url: str) -> RDBStorage:
    """The database of all searches; trials of dead processes are enqueued again."""
    if url == STORAGE:
        Path("runs").mkdir(exist_ok=True)
    for attempt in range(3):
        try:
            return RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT,
                grace_period=4 * HEARTBEAT,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            if attempt == 2:
                raise
            time.sleep(2)  # another process was creating the tables at the same time
        except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
            fail(f"cannot open the database {url}: {str(error).splitlines()[0]}")


def search(suite: Suite, storage: str = STORAGE) -> bool:
    """Search, run the best again, write results/search/; whether all of it is done."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats: since 2021
    database = open_storage(storage)
    searches = [Search(suite, method, database) for method in suite.methods]

    def work() -> None:
        while not launch.stopping.is_set():
            if one := next((s for s in searches if s.begin()), None):
                one.run_trial()
            elif all(s.is_over() for s in searches):
                return
            else:  # a trial that runs may yet be dropped, and leave its steps to another
                time.sleep(1)

    workers, shown = launch.jobs_at_a_time(), ""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        while not all(future.done() for future in futures):
            wait(futures, timeout=5)
            shown = launch.show(progress(searches), shown)
    for future in futures:
        future.result()  # raises what a worker raised
    launch.end_line()
    launch.leave_if_stopped()
    done = launch.launch([job for s in searches for _, job in s.jobs()])
    write(searches)
    return done


def progress(searches: list[Search]) -> str:
    """A line on how far a suite's searches are."""
    spent, budget = [s.spent() for s in searches], [s.budget for s in searches]
    one = next((s for s in searches if s.has_room()), searches[-1])
    return f"search {one.name}: {one.spent() / one.budget:.0%}; all methods {sum(spent) / sum(budget):.0%}"


def write(searches: list[Search]) -> None:
    """What is new for trials.csv, fresh.csv and settings.csv; rows of other suites and methods stay."""
    update(RESULTS / "trials.csv", pd.concat([s.table() for s in searches]))
    update(RESULTS / "fresh.csv", pd.concat([s.fresh() for s in searches]))
    chosen = [s.summary() for s in searches if len(s.fresh())]
    update(RESULTS / SETTINGS.name, pd.DataFrame(chosen))


def update(path: Path, rows: pd.DataFrame) -> None:
    """Replace what a CSV has of the suites and methods of these rows."""
    if rows.empty:
        return
    if path.exists():
        old = pd.read_csv(path)
        keys = set(zip(rows.suite, rows.method))
        rows = pd.concat([old[[key not in keys for key in zip(old.suite, old.method)]], rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False, float_format="%.6g")
