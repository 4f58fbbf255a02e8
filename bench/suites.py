"""What a suite is: every method on one environment, on the settings that a search found for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

from bench import launch
from bench.methods import METHODS, ROOT, Settings, fail, parse_flags

SETTINGS = Path("results/search/settings.csv")  # suite, method, settings: what the searches chose
STORAGE = "sqlite:///runs/search.db"  # of trials
SEEDS, FRESH_SEEDS = (101, 102, 103), (111, 112, 113, 114, 115)  # of searches: no result is reported of


@dataclass
class Suite:
    """A line of benchmark.sh."""

    name: tyro.conf.Positional[str]  # of the suite, by default its environment's too
    env_id: str = ""
    steps: int = 1_000_000  # of a reported run, all tasks together
    seeds: int = 10  # reported: 1, 2, ...
    score: Literal["return", "success"] = "return"  # what its methods are compared by
    methods: tuple[str, ...] = ("task-blind", "independent", "hard-sharing", "varshare")
    settings: str = ""  # the suite whose search chose the settings, by default this one
    trial_steps: int = 500_000  # of a run of the search
    trials: int = 24  # full ones that a method's search is worth
    best: int = 5  # settings that run again, on as many fresh seeds
    rates: tuple[str, ...] = ()  # step sizes, each tried once: all there is of a search, where a run is long
    flags: str = ""  # further ones of every run, e.g. "--cuda"

    def __post_init__(self) -> None:
        self.env_id = self.env_id or self.name
        self.settings = self.settings or self.name
        if lost := [method for method in self.methods if method not in METHODS]:
            fail(f"unknown method {lost[0]}, choose from {', '.join(METHODS)}")
        if not 1 <= self.best <= len(FRESH_SEEDS):
            fail(f"--best must be from 1 to {len(FRESH_SEEDS)}, not {self.best}")

    @property
    def searched(self) -> bool:
        """Whether this suite has a search of its own."""
        return self.settings == self.name

    @property
    def steps_of_search(self) -> int:
        """Environment steps of one method's search, and of its best settings on fresh seeds."""
        if self.rates:
            return len(self.rates) * self.trial_steps
        return self.trials * len(SEEDS) * self.trial_steps + self.best**2 * self.steps

    def seconds_per_step(self, method: str) -> float:
        """Of a method's committed runs, evaluations left out; NaN where there are none."""
        path = ROOT / "results" / self.name / "runs.csv"
        if not path.exists():
            return math.nan
        runs = pd.read_csv(path)
        rows = runs[(runs.method == method) & (runs.metric == "charts/wall_time") & (runs.task == "mean")]
        return float((rows.value / rows.step).median())

    def pairs(self) -> list[tuple[str, int]]:
        """Method and seed of its reported runs, a seed of all methods after the other."""
        return [(method, seed) for seed in range(1, self.seeds + 1) for method in self.methods]

    def job(self, method: str, seed: int) -> launch.Job | None:
        """A reported run; None where the search has not come to the method."""
        if method not in self.chosen:
            return None
        name = f"{self.name}__{method}"
        return launch.job(name, method, self.env_id, self.steps, seed, self.complete(self.chosen[method]))

    def jobs(self) -> list[launch.Job]:
        """The reported runs, in the order of `pairs`.

        Raises:
            SystemExit: the search has not come to a method.
        """
        jobs = [self.job(method, seed) for method, seed in self.pairs()]
        if None in jobs:
            fail(f"the search has no settings of {self.methods[jobs.index(None)]} on {self.settings} yet")
        return jobs

    def complete(self, settings: Settings, steps: int | None = None) -> Settings:
        """A method's settings with what all runs of a suite have: ten evaluations, and its further flags."""
        return settings | {"eval-interval": str((steps or self.steps) // 10)} | parse_flags(self.flags)

    def finished(self, method: str) -> int:
        """How many of a method's reported runs are."""
        jobs = [self.job(method, seed) for seed in range(1, self.seeds + 1)]
        return sum(job is not None and job.finished for job in jobs)

    @cached_property
    def chosen(self) -> dict[str, Settings]:
        """What the search chose for each method: the project's, and over it that of $OUT."""
        found = {}
        for path in (ROOT / SETTINGS, SETTINGS):
            if path.exists():
                rows = pd.read_csv(path, keep_default_na=False).query("suite == @self.settings")
                found |= dict(zip(rows.method, map(parse_flags, rows.settings)))
        return found
