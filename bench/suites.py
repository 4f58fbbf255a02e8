"""What a suite is: every method on one environment, on the settings that a search found for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from bench import launch
from bench.methods import METHODS, ROOT, Settings, fail, parse_flags

SETTINGS = Path("results/search/settings.csv")  # suite, method, settings: what the searches chose


SEEDS, FRESH_SEEDS = (101, 102, 103), (111, 112, 113, 114, 115)  # of searches: no result is reported of


@dataclass
class Suite:
    """A line of benchmark.sh."""

    name: tyro.conf.Positional[str]  # of the suite, by default its environment's too
    env_id: str = ""
    steps: int = 1_000_000  # of a reported run, all tasks together
    seeds: int = 10  # reported: 1, 2, ...
    methods: tuple[str, ...] = ("task-blind", "independent", "hard-sharing", "varshare")
    settings: str = ""  # the suite whose search chose the settings, by default this one
    trial_steps: int = 500_000  # of a run of the search
    trials: int = 24  # full ones that a method's search is worth
    best: int = 5  # settings that run again, on as many fresh seeds
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

    def pairs(self) -> list[tuple[str, int]]:
        """Method and seed of its reported runs, a seed of all methods after the other."""
        return [(method, seed) for seed in range(1, self.seeds + 1) for method in self.methods]

    def jobs(self) -> list[launch.Job]:
        """The reported runs, in the order of `pairs`.

        Raises:
            SystemExit: the search has not come to a method.
        """
        settings = {method: self.chosen(method) for method in self.methods}
        if lost := [method for method in self.methods if settings[method] is None]:
            fail(f"the search has no settings of {lost[0]} on {self.settings} yet")
        return [
            launch.job(f"{self.name}__{m}", m, self.env_id, self.steps, seed, self.complete(settings[m]))
            for m, seed in self.pairs()
        ]

    def complete(self, settings: Settings, steps: int | None = None) -> Settings:
        """A method's settings with what all runs of a suite have: ten evaluations, and its further flags."""
        return settings | {"eval-interval": str((steps or self.steps) // 10)} | parse_flags(self.flags)

    def finished(self, method: str) -> int:
        """How many of a method's reported runs are."""
        names = (f"{self.name}__{method}__{seed}" for seed in range(1, self.seeds + 1))
        return sum(Path("runs", name, "model.pt").exists() for name in names)

    def chosen(self, method: str) -> Settings | None:
        """What the search found for a method, None where it has not come to it."""
        path = SETTINGS if SETTINGS.exists() else ROOT / SETTINGS  # of $OUT, else of the project
        if path.exists():
            found = pd.read_csv(path)
            found = found[(found.suite == self.settings) & (found.method == method)]
            if len(found):
                return parse_flags(found.settings.iloc[0])
        return None
