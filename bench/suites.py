"""What a suite is: a row of benchmark.sh, environment, methods, budget and seeds; results/suites/NAME."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

from bench import launch
from bench.collect import SECONDS, collect, compared, read
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

    @property
    def folder(self) -> Path:
        """Of its results."""
        return Path("results/suites", self.name)

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

    def job(self, method: str, seed: int) -> launch.Job:
        """A reported run."""
        name = f"{self.name}__{method}"
        return launch.job(name, method, self.env_id, self.steps, seed, self.complete(self.chosen[method]))

    def jobs(self) -> list[launch.Job]:
        """The reported runs, one seed of all methods after the other, if the search has come to all."""
        for method in self.methods:
            if method not in self.chosen:
                fail(f"the search has no settings of {method} on {self.settings} yet")
        return [self.job(method, seed) for seed in range(1, self.seeds + 1) for method in self.methods]

    def complete(self, settings: Settings, steps: int | None = None) -> Settings:
        """A method's settings with what all runs of a suite have: ten evaluations, and its further flags."""
        return settings | {"eval-interval": str((steps or self.steps) // 10)} | parse_flags(self.flags)

    def finished(self, method: str) -> int:
        """How many of a method's reported runs are."""
        if method not in self.chosen:
            return 0
        return sum(self.job(method, seed).finished for seed in range(1, self.seeds + 1))

    @cached_property
    def chosen(self) -> dict[str, Settings]:
        """What the search chose for each method: the project's, and over it that of $OUT."""
        found = {}
        for path in (ROOT / SETTINGS, SETTINGS):
            if path.exists():
                rows = pd.read_csv(path, keep_default_na=False).query("suite == @self.settings")
                found |= dict(zip(rows.method, map(parse_flags, rows.settings)))
        return found
