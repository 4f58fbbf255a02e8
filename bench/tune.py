"""The search for the settings of every method, as long for each, or for each setting that it has.

A trial runs two or three seeds of one setting, proposed by TPE (Bergstra et al. 2011, in Optuna). It is
dropped after a seed if its mean final return so far is below the median of the trials that ran all; what it
saves goes to further trials. Then the best settings run on fresh seeds, as long as the runs that are
reported, and the best mean of those is the method's setting. A suite may have several such searches of each
method, which share no seed. If a run takes long a suite names a few step sizes instead, and each method runs
each of them once. docs/benchmark.md says why.

Trials are kept in a database, a file by default; several processes, on several machines if it is a server,
work on one search. A trial whose process died is enqueued anew, and its runs continue from their checkpoints
if those are at hand.
"""

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
from bench.collect import EVALUATION, SUCCESS, read_log
from bench.methods import Settings, fail, parse_flags, write_flags
from bench.suites import FRESH_SEEDS, SEEDS, SETTINGS, STORAGE, Suite, read_table

RANDOM_TRIALS = 8  # before TPE proposes, and before one is dropped
EVALUATIONS = 4  # of a run of a search
TIE = 0.01  # of those whose return is within this share of the best, the fastest learner wins
HEARTBEAT = 30  # seconds; a process silent for four of them is dead, and its trial enqueued again
RESULTS = SETTINGS.parent
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "dropped", TrialState.FAIL: "crashed"}
# tables that another process was creating at the same time
CREATED_BY_ANOTHER = (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError)


class Ended(Exception):
    """A trial has no result: the search was told to stop, or a run crashed, as with settings that diverge."""


class Search:
    """One search of a method's settings on a suite, which may have several, numbered from 1."""

    def __init__(self, suite: Suite, method: str, storage: RDBStorage, number: int = 1):
        self.suite, self.method, self.number = suite, method, number
        self.name = f"{suite.name}__{method}" + f"__{number}" * (suite.searches > 1)
        if suite.length:  # another search than that of the suite's own length
            self.name += f"__{suite.trial_steps}"
        trial_seeds, later = 1 if suite.rates else suite.trial_seeds, 20 * (number - 1)
        self.seeds = [later + seed for seed in SEEDS[:trial_seeds]]
        self.fresh_seeds = [later + seed for seed in FRESH_SEEDS[: suite.best]]
        self.space = suite.space_of(method)
        if suite.rates:
            self.space = {"learning-rate": CategoricalDistribution(suite.rates)}
        self.trial_steps = len(self.seeds) * suite.trial_steps
        self.budget = (len(suite.rates) or suite.trials_of(method)) * self.trial_steps
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
        sampler = {"n_startup_trials": RANDOM_TRIALS, "multivariate": True, "seed": seed}
        self.study.sampler = optuna.samplers.TPESampler(**sampler)
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
        rare = {"eval-interval": str(steps // EVALUATIONS)}
        if self.suite.rates:
            rare = {"eval-interval": "0", "eval-episodes": "20"}
        settings = self.suite.complete(self.method, self.suite.found_at_base(self.method) | settings) | rare
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
            while (code := launch.run(job)) == launch.BUSY:
                pass  # another process has chosen the same
            if code in launch.STOPPED:
                raise Ended
            trial.set_user_attr("steps", (i + 1) * self.suite.trial_steps)
            if code:
                trial.set_user_attr("crashed", True)
                raise Ended
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
            self.study.optimize(self.objective, n_trials=1, catch=(Ended,), callbacks=[again])
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            # of a process that slept so long that others took it for dead: they have enqueued the trial again
            if isinstance(error, ValueError) and "Cannot tell" not in str(error):
                raise

    def table(self) -> pd.DataFrame:
        """All trials that ended or crashed, one row each, in their order."""
        rows = []
        for t in self.study.get_trials(deepcopy=False):
            if t.state.is_finished() and (steps := self.steps_of(t)):
                finals, curves = (t.user_attrs.get(name, []) for name in ("finals", "curves"))
                row = {"suite": self.suite.name, "method": self.method, "search": self.number}
                row["trial"] = t.number
                row |= {"state": STATES[t.state], "steps": steps, "settings": t.user_attrs["settings"]}
                row |= {f"final {i}": x for i, x in enumerate(finals, 1)}
                row |= {"final": pd.Series(finals).mean(), "curve": pd.Series(curves).mean()}
                rows.append(row)
        return pd.DataFrame(rows)

    def jobs(self) -> list[tuple[str, launch.Job]]:
        """The runs that the best settings are chosen by, each with its flags, best first.

        On fresh seeds; of a few step sizes the trials themselves.
        """
        steps, seeds = self.suite.steps, self.fresh_seeds
        if self.suite.rates:
            steps, seeds = self.suite.trial_steps, self.seeds
        complete = self.table().query("state == 'complete'").drop_duplicates("settings")
        best = list(rank(complete).settings[: self.suite.best])
        return [(flags, self.job(parse_flags(flags), steps, seed)) for seed in seeds for flags in best]

    def fresh(self) -> pd.DataFrame:
        """A row for each of the best settings of which all these runs have finished, best first."""
        jobs = self.jobs()
        finished = {flags for flags, _ in jobs} - {flags for flags, job in jobs if not job.finished}
        rows = [(flags, *read_scores(job, self.suite)) for flags, job in jobs if flags in finished]
        scores = pd.DataFrame(rows, columns=["settings", "final", "curve"])
        means = rank(scores.groupby("settings", sort=False).mean().reset_index())
        steps = self.suite.trial_steps if self.suite.rates else self.suite.steps
        return means.assign(suite=self.suite.name, method=self.method, search=self.number, steps=steps)

    def summary(self) -> dict[str, object]:
        """A row of settings.csv: what was chosen, and what the search spent."""
        states = self.table().state.value_counts()
        counts = {state: int(states.get(state, 0)) for state in STATES.values()}
        return self.fresh().iloc[0].to_dict() | counts | {"spent": self.spent()}


def read_scores(job: launch.Job, suite: Suite) -> tuple[float, float]:
    """Of a finished run: the final evaluation, and the mean of all evaluations, both means over tasks."""
    log = read_log(Path("runs", job.name, "heartbeat.csv"))
    metric, unit = (SUCCESS, 100) if suite.score == "success" else (EVALUATION, 1)
    values = unit * log[(log.metric == metric) & (log.task == "mean")].value
    if values.empty:
        fail(f"{job.name} has no {metric}")
    return float(values.iloc[-1]), float(values.mean())


def rank(settings: pd.DataFrame) -> pd.DataFrame:
    """Best first by `final`; those within TIE of the best by `curve`, which says how fast they got there."""
    highest = settings.final.max()
    tied = settings.final >= highest - TIE * abs(highest)
    key = settings.curve.where(tied, settings.final)
    return (
        settings.assign(tied=tied, key=key)
        .sort_values(["tied", "key"], ascending=False, kind="stable")
        .drop(columns=["tied", "key"])
    )


def open_storage(url: str) -> RDBStorage:
    """The database of all searches; trials of dead processes are enqueued again."""
    options = {"heartbeat_interval": HEARTBEAT, "grace_period": 4 * HEARTBEAT}
    options["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback()
    if url == STORAGE:
        Path("runs").mkdir(exist_ok=True)
    for last in (False, False, True):
        try:
            return RDBStorage(url, **options)
        except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
            if last or not isinstance(error, CREATED_BY_ANOTHER):
                fail(f"cannot open the database {url}: {str(error).splitlines()[0]}")
            time.sleep(2)


def search(suite: Suite, pairs: list[tuple[str, int]] | None = None, storage: str = STORAGE) -> bool:
    """Search, run the best again, write results/search/; whether all of it is done.

    Args:
        suite: whose methods' settings are searched.
        pairs: a method and the number of a search of its settings, each; by default all.
        storage: URL of the database of trials.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats: since 2021
    database = open_storage(storage)
    searches = [Search(suite, method, database, number) for method, number in pairs or suite.pairs]

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
        while wait(futures, timeout=5).not_done:
            spent, budget = sum(s.spent() for s in searches), sum(s.budget for s in searches)
            if shown != (shown := f"search of {suite.name}: {spent / budget:.0%}"):
                print(shown, flush=True)
    for future in futures:
        future.result()  # raises what a worker raised
    launch.leave_if_stopped()
    done = launch.launch([job for s in searches for _, job in s.jobs()])
    found = [s for s in searches if len(s.fresh())]  # the others crashed whatever was tried
    update("trials.csv", pd.concat([s.table() for s in searches]))
    update("fresh.csv", pd.concat([s.fresh() for s in found]) if found else pd.DataFrame())
    update("settings.csv", pd.DataFrame([s.summary() for s in found]))
    return done


def update(name: str, rows: pd.DataFrame) -> None:
    """Replace what a CSV of results/search/ has of the searches of these rows; the rest stays."""
    path = RESULTS / name
    if rows.empty:
        return
    if path.exists():
        old = read_table(path)
        key = ["suite", "method", "search"]
        again = old.set_index(key).index.isin(rows.set_index(key).index)
        rows = pd.concat([old[~again], rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False, float_format="%.6g")
