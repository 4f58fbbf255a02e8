"""What a suite is: every method on one environment, on the settings that a search found for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from bench import launch
from bench.methods import METHODS, Settings, parse_flags

SETTINGS = Path("results/search/settings.csv")  # suite, method, settings: what the searches chose


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

    def __post_init__(self) -> None:
        self.env_id = self.env_id or self.name
        self.settings = self.settings or self.name

    @property
    def searched(self) -> bool:
        """Whether this suite has a search of its own."""
        return self.settings == self.name

    def jobs(self) -> list[launch.Job]:
        """Its reported runs, a seed of all methods after the other."""
        return [
            launch.job(self.run_name(method), method, self.env_id, self.steps, seed, settings)
            for seed in range(1, self.seeds + 1)
            for method, settings in {m: chosen(self.settings, m) for m in self.methods}.items()
        ]

    def run_name(self, method: str) -> str:
        """Folder of a method's runs, without their seed."""
        return f"{self.name}__{method}"


def chosen(suite: str, method: str) -> Settings:
    """What the search of a suite found for a method.

    Raises:
        SystemExit: the search has not come to it.
    """
    if SETTINGS.exists():
        found = pd.read_csv(SETTINGS)
        found = found[(found.suite == suite) & (found.method == method)]
        if len(found):
            return parse_flags(found.settings.iloc[0])
    raise SystemExit(f"{SETTINGS} has no settings of {method} on {suite}: search them first")
