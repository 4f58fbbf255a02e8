"""What a suite is: a row of benchmark.sh, environment, methods, budget and seeds; results/suites/NAME."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro
from optuna.distributions import BaseDistribution

from bench import launch
from bench.collect import SECONDS, collect, compared, left, read, reported
from bench.methods import METHODS, ROOT, Settings, fail, parse_flags

SETTINGS = Path("results/search/settings.csv")  # suite, method, search, settings: what the searches chose
STORAGE = "sqlite:///runs/search.db"  # of trials
# of a search, and its next one has 20 more each: no result is reported of these
SEEDS, FRESH_SEEDS = (101, 102, 103), (111, 112, 113, 114, 115)


@dataclass
class Suite:
    """A line of benchmark.sh."""

    name: tyro.conf.Positional[str]  # of the suite, by default its environment's too
    env_id: str = ""
    steps: int = 1_000_000  # of a reported run, all tasks together
    seeds: int = 10  # reported: so many from first_seed on
    first_seed: int = 1
    score: Literal["return", "success"] = "return"  # what its methods are compared by
    methods: tuple[str, ...] = ("task-blind", "independent", "hard-sharing", "varshare")
    settings: str = ""  # the suite whose search chose the settings, by default this one
    trial_steps: int = 500_000  # of a run of the search
    searches: int = 1  # independent ones of each method, which the reported seeds are dealt out to in turn
    trials: int = 24  # full ones that a method's search is worth
    per_dimension: bool = False  # so many trials for each setting in the method's space
    trial_seeds: int = 3  # runs of a full trial
    best: int = 5  # settings that run again, on as many fresh seeds
    rates: tuple[str, ...] = ()  # step sizes, each tried once: all there is of a search, where a run is long
    base: str = ""  # the suite whose search chose the rest, with `rates`; by default it is the scripts'
    fixed: str = ""  # flags of every run, which no search changes
    flags: str = ""  # further ones of every run, e.g. "--cuda"
    length: int = (
        0  # steps of a reported run in place of `steps`; the runs of the search change in proportion
    )

    def __post_init__(self) -> None:
        self.env_id = self.env_id or self.name
        self.settings = self.settings or self.name
        if self.length:
            self.trial_steps = max(1, self.trial_steps * self.length // self.steps)
            self.steps = self.length
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name):
            fail(f"the name of a suite is that of a folder: letters, digits and ._- only, not {self.name!r}")
        if lost := [method for method in self.methods if method not in METHODS]:
            fail(f"unknown method {lost[0]}, choose from {', '.join(METHODS)}")
        if not 1 <= self.best <= len(FRESH_SEEDS):
            fail(f"--best must be from 1 to {len(FRESH_SEEDS)}, not {self.best}")
        if not 1 <= self.trial_seeds <= len(SEEDS):
            fail(f"--trial-seeds must be from 1 to {len(SEEDS)}, not {self.trial_seeds}")
        if self.searches < 1:
            fail(f"--searches must be 1 or more, not {self.searches}")

    @property
    def folder(self) -> Path:
        """Of its results."""
        return Path("results/suites", self.name)

    @property
    def searched(self) -> bool:
        """Whether this suite has a search of its own."""
        return self.settings == self.name

    def space_of(self, method: str) -> dict[str, BaseDistribution]:
        """What a search tries: the method's space without what the suite fixes."""
        fixed = parse_flags(self.fixed)
        return {name: x for name, x in METHODS[method].space.items() if name not in fixed}

    def trials_of(self, method: str) -> int:
        """Full trials that one search of a method's settings is worth."""
        return self.trials * (len(self.space_of(method)) if self.per_dimension else 1)

    def steps_of_search(self, method: str) -> int:
        """Environment steps of one search of a method's settings, and of its best on fresh seeds."""
        if self.rates:
            return len(self.rates) * self.trial_steps
        return self.trials_of(method) * self.trial_seeds * self.trial_steps + self.best**2 * self.steps

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Every method with the numbers of its searches."""
        return [(method, number) for method in self.methods for number in range(1, self.searches + 1)]

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Those of which no settings are known."""
        return [pair for pair in self.pairs if pair not in self.found]

    @property
    def seconds_per_step(self) -> float:
        """Of the committed runs, evaluations left out; NaN if there are none."""
        if not (ROOT / self.folder / "configs.csv").exists():
            return math.nan
        runs, _ = read(ROOT / self.folder)
        rows = runs[(runs.metric == SECONDS) & (runs.task == "mean")]
        return float((rows.value / rows.step).mean())

    def collect(self) -> None:
        """Write the CSVs of what has finished."""
        by_success = self.score == "success"
        collect(self.jobs(), self.folder, lambda run: compared(run, by_success), self.settings)

    @property
    def reported_seeds(self) -> range:
        """The seeds of the reported runs."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def job(self, method: str, seed: int) -> launch.Job:
        """A reported run, with the settings of one of the searches."""
        number = (seed - self.first_seed) % self.searches + 1
        label = method if self.searches == 1 else f"{method}@{number}"
        settings = self.complete(method, self.found_at_base(method) | self.found[method, number])
        return launch.job(f"{self.name}__{label}", label, self.env_id, self.steps, seed, settings)

    def left(self) -> list[launch.Job]:
        """The reported runs, with REST=1 without those whose numbers are there already."""
        return left(self.jobs(), self.folder)

    def jobs(self) -> list[launch.Job]:
        """The reported runs, one seed of all methods after the other, if the search has come to all."""
        for method, _ in self.missing:
            fail(f"the search has no settings of {method} on {self.settings} yet")
        return [self.job(method, seed) for seed in self.reported_seeds for method in self.methods]

    def complete(self, method: str, settings: Settings) -> Settings:
        """A method's settings with what all runs of a suite have: ten evaluations, and its flags.

        A fixed flag that the method's script does not have is left out.
        """
        interval = {"eval-interval": str(self.steps // 10)}
        fixed = {x: value for x, value in parse_flags(self.fixed).items() if METHODS[method].has_flag(x)}
        return settings | interval | fixed | parse_flags(self.flags)

    def finished(self, method: str) -> int:
        """How many of a method's reported runs are."""
        if method in dict(self.missing):
            return 0
        jobs, elsewhere = [self.job(method, seed) for seed in self.reported_seeds], reported(self.folder)
        return sum(job.finished or job.command in elsewhere for job in jobs)

    @property
    def chosen(self) -> dict[str, Settings]:
        """What the first search chose for each method."""
        return {method: settings for (method, number), settings in self.found.items() if number == 1}

    @cached_property
    def found(self) -> dict[tuple[str, int], Settings]:
        """What each search chose for each method."""
        return read_settings(self.settings)

    def found_at_base(self, method: str) -> Settings:
        """Of which the step size is chosen anew."""
        if not self.base:
            return {}
        found = read_settings(self.base)
        if (method, 1) not in found:
            fail(f"the search has no settings of {method} on {self.base} yet")
        return found[method, 1]


def read_settings(suite: str) -> dict[tuple[str, int], Settings]:
    """What the searches of a suite chose, by method and search: the project's, and over it that of $OUT."""
    found = {}
    for path in (ROOT / SETTINGS, SETTINGS):
        if path.exists():
            rows = read_table(path).query("suite == @suite")
            found |= dict(zip(zip(rows.method, rows.search), map(parse_flags, rows.settings)))
    return found


def read_table(path: Path) -> pd.DataFrame:
    """A CSV of results/search/; before there were several searches of a method it had no column for them."""
    rows = pd.read_csv(path, keep_default_na=False)
    return rows if "search" in rows else rows.assign(search=1)
