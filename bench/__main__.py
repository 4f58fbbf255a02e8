"""`python -m bench COMMAND ...`: what benchmark.sh calls."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from bench import launch
from bench.suites import STORAGE, Suite

# what takes a second to import, or more, is imported where it is needed
SuiteArg = Annotated[Suite, tyro.conf.arg(name="")]


def search(suite: SuiteArg, storage: str = STORAGE, missing: bool = False) -> bool:
    """Search the settings of a suite's methods, unless it takes those of another.

    Args:
        suite: a line of benchmark.sh.
        storage: URL of the database of trials, e.g. postgresql+psycopg://user@host/name
        missing: only of those of which settings.csv has none
    """
    methods = tuple(m for m in suite.methods if not (missing and m in suite.chosen))
    if not (suite.searched and methods):
        return True
    from bench import tune

    return tune.search(replace(suite, methods=methods), storage)


def runs(suite: SuiteArg) -> bool:
    """Start or continue the reported runs of a suite, then report; on Slurm submit both."""
    if launch.on_slurm():
        launch.submit(suite.name, suite.jobs(), ["report", suite.name])
        return True
    done = launch.launch(suite.jobs())
    report(suite)
    return done


def report(suite: SuiteArg) -> None:
    """Table and figures of a suite's finished runs, or if there are none here of its CSVs in results/."""
    from bench.figures import write_suite

    if any(map(suite.finished, suite.methods)):
        suite.collect()
    elif not (suite.folder / "configs.csv").exists():
        print(f"{suite.name}: no run has finished yet")
        return
    print(write_suite(suite.folder))


def commands(suite: SuiteArg) -> None:
    """Print the commands of the reported runs."""
    launch.show_commands(suite.jobs())


def plan(suite: SuiteArg) -> None:
    """Print what of a suite is done, and about how long the rest takes, so many runs at a time as JOBS."""
    done, steps, seconds = 0, 0, 0.0
    for method in suite.methods:
        finished = suite.finished(method)
        left = (suite.seeds - finished) * suite.steps
        if suite.searched and method not in suite.chosen:
            left += suite.steps_of_search
        cost = suite.seconds_per_step(method)
        done, steps, seconds = done + finished, steps + left, seconds + (left and left * cost)
    hours = seconds / 3600 / launch.jobs_at_a_time()
    runs = f"{done:3} of {suite.seeds * len(suite.methods):3} runs done"
    time = "for an unknown time" if math.isnan(hours) else f"some {hours:.1f} h on the machine of results/"
    print(f"{suite.name:25} {runs}, {steps / 1e6:5.0f} M steps left, {time}")


def job(path: tyro.conf.Positional[Path], number: tyro.conf.Positional[int]) -> bool:
    """One run of those that `runs` submitted to Slurm."""
    return launch.run_line(path, number) == 0


if __name__ == "__main__":
    launch.set_up()
    functions = (search, runs, report, commands, plan, job)
    result = tyro.extras.subcommand_cli_from_dict({f.__name__: f for f in functions})
    raise SystemExit(result is False)
